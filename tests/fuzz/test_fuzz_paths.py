"""Paths in data files: below the root, or refused; whatever links and spellings there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile import CASES, assert_clear
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.paths import inside_root

PARTS = [
    "..",
    ".",
    "",
    "a",
    "b.hea",
    "out",
    "loop",
    "inner",
    "~",
    "C:",
    "\\",
    "..\\..",
    "\0",
    "\n",
    "\ud800",
    "x" * 300,
]
NAMES = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), min_size=1, max_size=6)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with links: inside, out of it, to itself, and to a neighbour whose name begins alike."""
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (tmp_path / "data-else").mkdir()
    (root / "inner").symlink_to("a")
    (root / "out").symlink_to(tmp_path)
    (root / "a" / "out").symlink_to("../../data-else")
    (root / "loop").symlink_to("loop")
    return root


@CASES
@given(parts=NAMES, separator=st.sampled_from(["/", "\\", "//"]), absolute=st.booleans())
def test_no_path_leaves_the_root(root: Path, parts: list[str], separator: str, absolute: bool) -> None:
    relative = ("/" if absolute else "") + separator.join(parts)
    try:
        found = inside_root(root, relative, "ecg_path")
    except DataError as error:
        assert_clear(error, "ecg_path: ")
        return
    real = Path(os.path.realpath(root))
    assert found == real or real in found.parents
    assert not any(part in ("..", "\0") for part in found.parts)


@pytest.mark.parametrize(
    "relative",
    [
        "out/x",
        "a/out/x",
        "../data/a",
        "/etc/passwd",
        "a/../../x",
        "..\\x",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "a\0",
        "a\nb",
    ],
)
def test_known_ways_out_are_closed(root: Path, relative: str) -> None:
    with pytest.raises(DataError, match=r"^cxr_path: ") as caught:
        inside_root(root, relative, "cxr_path")
    assert_clear(caught.value)
