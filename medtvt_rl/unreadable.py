"""What is said of a file that a library could not read.

Owns: telling a pointer of git-lfs from damage, and the mend. Importable without torch.
"""

from __future__ import annotations

from pathlib import Path

LFS_BEGINNING = b"version https://git-lfs.github.com/spec/"
MAX_WORDS = 200


def why_unreadable(path: str | Path, error: BaseException) -> str:
    """ "(what is wrong with it); the mend", to stand behind the file's name: the first line of the error's own words,
    unless the file is what git-lfs leaves in place of one that was not fetched."""
    if is_lfs_pointer(path):
        return "(it is a pointer of git-lfs, not the file itself); fetch it with git lfs pull, or copy the file there"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:MAX_WORDS]
    return f"({reason}); check the path, or copy it again"


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is a pointer of git-lfs; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_BEGINNING)) == LFS_BEGINNING
    except OSError:
        return False
