"""A language model that is written once into a folder, because it does not come as a Hugging Face folder.

Owns: when the folder is written, and that it appears complete or not at all. Does not own: what is written (smollm2.py,
or a user's own source), that it is still what was written (seal.py), or what is built upon it (build.py).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medtvt_rl.model.seal import check_model_folder, seal

MANIFEST = "written.json"

Progress = Callable[[int, int], None]
"""f(parts done, parts in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmSource:
    """Where a language model comes from; `model.init_from` names one by a dotted path.

    Attributes:
        name: for progress and errors.
        version: of what is written; a folder of another version is written anew.
        check: raises ValueError, naming the mend, where what it is written from is not here.
        write: f(folder, progress) writes config.json, model.safetensors and the tokenizer with its chat template.
    """

    name: str
    version: str
    check: Callable[[], None]
    write: Callable[[Path, Progress], None]


def is_ready(source: LlmSource, folder: Path) -> bool:
    """Whether the folder can be used as it is. One without a manifest is the user's own, and never touched."""
    if not (folder / MANIFEST).is_file():
        return (folder / "config.json").is_file()
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["name"], manifest["version"]) != (source.name, source.version):
            return False
        check_model_folder(folder, sealed=True)
        return True
    except (ValueError, KeyError, TypeError):
        return False


def write_folder(source: LlmSource, folder: Path, progress: Progress) -> None:
    """Writes the folder, and replaces one that is outdated or damaged.

    Raises:
        ValueError: what it is written from is not here, or something else lies in the folder.
    """
    source.check()
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ValueError(
            f"model.init: {str(folder)!r} is there and holds no config.json; name a folder of its own for {source.name}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        source.write(temporary, progress)
        (temporary / MANIFEST).write_text(json.dumps({"name": source.name, "version": source.version}, indent=1))
        seal(temporary)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(temporary, folder)
        except OSError:  # another run has written it in the meantime
            if not is_ready(source, folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
