"""A folder of files, on a disk or behind any fsspec URL (s3://, gs://, memory://, ...).

Owns: names below a root, checksums, copies to and from local disk. Does not own: what the files mean, or when a set of
them is whole. Errors are OSError, whatever the file system.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

Digest = list[Any]
"""[bytes, SHA-256 in hex], JSON-ready."""
PIECE_BYTES = 1 << 20


class Storage:
    """A root and what lies below it; names are relative, with slashes.

    Args:
        root: a local path, or an fsspec URL.
    """

    def __init__(self, root: str) -> None:
        self._fs: Any
        self._fs, path = fsspec.core.url_to_fs(root)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.root = str(Path(path).resolve()) if self.is_local else root.rstrip("/")
        self._path = self.root if self.is_local else path.rstrip("/")

    def at(self, name: str) -> str:
        """The path or URL of a name."""
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """What lies directly below the root, sorted; nothing where there is no such folder."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name. Raises what the client does where the store cannot be asked."""
        self._fs.invalidate_cache()
        try:
            return bool(self._fs.info(self._in(name))["type"] == "file")  # `isfile` takes any failure for a no
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, name: str) -> bytes:
        """A file's content."""
        content: bytes = self._fs.cat_file(self._in(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """A file that appears whole or not at all, and survives a power cut."""
        if self.is_local:
            path = self._in(name)
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with open(f"{path}.tmp", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        else:
            self._fs.pipe_file(self._in(name), content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write a file to; it then has its name here, and survives a power cut."""
        if self.is_local:
            path = Path(self._in(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            sync(path)
        else:
            with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
                path = Path(folder) / name.rpartition("/")[2]
                yield path
                self._fs.put_file(str(path), self._in(name))

    @contextmanager
    def local_copy(self, names: list[str]) -> Iterator[Path]:
        """A local folder in which these files lie under their names; a temporary one where the root is remote."""
        if self.is_local:
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
            for name in names:
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._in(name), str(target))
            yield Path(folder)

    def digest(self, name: str) -> Digest:
        """Size and checksum of a file. Raises FileNotFoundError."""
        with self._fs.open(self._in(name), "rb") as file:
            return _digest(file)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all in it; nothing to do where there is none."""
        self._fs.invalidate_cache()
        if self._fs.exists(self._in(name)):
            self._fs.rm(self._in(name), recursive=True)

    def rename(self, old: str, new: str) -> None:
        """Renames a folder of a local root at once; `new` must not exist."""
        os.replace(self._in(old), self._in(new))
        sync(Path(self.root))

    def _in(self, name: str) -> str:
        return f"{self._path}/{name}"


def digest_of(path: Path) -> Digest:
    """Size and checksum of a local file."""
    with path.open("rb") as file:
        return _digest(file)


def sync(path: Path) -> None:
    """Makes a local file, or the entries of a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Any) -> Digest:
    checksum, size = hashlib.sha256(), 0
    while piece := file.read(PIECE_BYTES):
        checksum.update(piece)
        size += len(piece)
    return [size, checksum.hexdigest()]
