"""What a folder of files says of itself: a manifest with the checksums of its files and of itself, written last.

Owns: its form, and finding damage. Does not own: what the files mean (pipelines/checkpoints.py,
medtvt_rl/learner/epoch_checkpoints.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from medtvt_rl.storage import Digest, Storage

MANIFEST = "manifest.json"


def write_manifest(
    storage: Storage, folder: str, form: int, files: Mapping[str, Digest], content: Mapping[str, Any]
) -> None:
    """Seals the files of a folder.

    Args:
        form: which form the files have.
        files: by name below the folder.
        content: what else is to be known, JSON-ready.
    """
    manifest = {"format": form, "files": dict(files), **content}
    manifest["digest"] = _own_digest(manifest)
    storage.write(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())


def read_manifest(storage: Storage, folder: str, form: int) -> dict[str, Any]:
    """The manifest of a folder whose files are all what was written.

    Raises:
        ValueError, OSError: a file is missing or another than was written, or they are of another form.
    """
    if not storage.exists(f"{folder}/{MANIFEST}"):
        raise ValueError(f"{MANIFEST} is missing")
    manifest: dict[str, Any] = json.loads(storage.read(f"{folder}/{MANIFEST}"))
    if manifest["format"] != form:
        raise ValueError(f"format {manifest['format']}, this version reads {form}")
    if manifest.pop("digest", None) != _own_digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written (SHA-256 differs)")
    for file, digest in manifest["files"].items():
        if not storage.exists(f"{folder}/{file}"):
            raise ValueError(f"{file} is missing")
        if storage.digest(f"{folder}/{file}") != digest:
            raise ValueError(f"{file} is not what was written (size or SHA-256 differ)")
    return manifest


def is_damage(error: Exception, storage: Storage) -> bool:
    """Whether reading a folder ended so because its files are not those that were written, or a block of the disk
    fails. What else a file system or the client of a store raises says that it is out of reach, and nothing of the
    files."""
    fails = storage.is_local and isinstance(error, OSError) and error.errno == errno.EIO
    return fails or isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError))


def _own_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest without its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
