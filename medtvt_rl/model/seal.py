"""The seal of a model folder: size and SHA-256 of every file in it, so that damage is found before it is served.

Owns: writing and checking checksums.json. Does not own: the files. A folder without one, as of a model from elsewhere,
is taken as it is; one whose weights are not safetensors is refused, since other forms may hold code.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

SEAL = "checksums.json"


def seal(folder: str | Path) -> None:
    """Writes the checksums of everything that lies in a folder now, an adapter beside the weights included."""
    target = Path(folder) / SEAL
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(Path(folder))}
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"files": files, "digest": _digest_of(files)}, indent=1))
    os.replace(temporary, target)


def check_model_folder(folder: str | Path, sealed: bool = False) -> None:
    """Whether a folder holds a model whose files are those that were sealed.

    Args:
        sealed: refuse one without a seal, too.

    Raises:
        ValueError: it is no model folder, its weights are not safetensors, or a file was changed since it was sealed.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(f"model folder: {folder} holds no config.json; expected a Hugging Face model folder")
    if not any(place.glob("*.safetensors")):
        raise ValueError(f"model folder: {folder} holds no *.safetensors; save the model again with safe_serialization")
    if sealed or (place / SEAL).is_file():
        _check_seal(place)


def _check_seal(folder: Path) -> None:
    again = "copy the folder again, or, if you changed it yourself, delete the checksums"
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = content["files"]
        whole = content["digest"] == _digest_of(files)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"model folder: {folder / SEAL} is damaged ({type(error).__name__}); {again}") from error
    if not whole:
        raise ValueError(f"model folder: {folder / SEAL} is damaged (SHA-256 differs); {again}")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(f"model folder: {path} is missing or not what was written (SHA-256 differs); {again}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
