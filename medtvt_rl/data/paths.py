"""Keeps every path that a data file names inside the data root.

Owns: the check. Does not own: what is read there.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

from medtvt_rl.data.errors import DataError


def inside_root(root: Path, relative: str, field: str) -> Path:
    """The real path of `relative` under `root`; it need not exist.

    Raises:
        DataError: the path is absolute, climbs with "..", or a symbolic link leads out of the root; names `field`.
    """
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in relative):
        raise DataError(f"{field}: {relative!r} holds a character that no file name has; write a plain relative path")
    if "\\" in relative:
        raise DataError(f"{field}: {relative!r} holds a backslash; write / between folders")
    if os.path.isabs(relative) or PureWindowsPath(relative).drive:
        raise DataError(f"{field}: {relative!r} is absolute; write it relative to the data root {root}")
    if ".." in Path(relative).parts:
        raise DataError(f"{field}: {relative!r} climbs with '..'; write a path inside the data root {root}")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, relative))
    if os.path.commonpath((real_root, real)) != real_root:
        raise DataError(
            f"{field}: {relative!r} leads out of the data root by a link to {real}; copy the file into {root}"
        )
    return Path(real)
