"""What the fuzzers share: how many cases, ways to spoil bytes and json, and what a clear refusal looks like."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

CASES = settings.get_profile(os.environ.get("MEDTVT_RL_FUZZ", "fuzz-quick"))
SLOW_CASES = settings(CASES, max_examples=max(6, CASES.max_examples // 4))
"""For what takes a large part of a second."""

NUMBERS = ["-1", "nan", "inf", "1e999", "9" * 30, "9" * 5000, "0x10"]
PATHS = ["../x", "/etc/passwd", "a\\b"]
MARKS = ["", " ", "\0", "%s", "\ud800", "\u202e", "\ufeff", "(" * 60, "{" * 60, "${x}", "None", "true", *"'\",;|\n\r"]
ODD_TEXTS = st.text(max_size=12) | st.sampled_from([*NUMBERS, *PATHS, *MARKS])
ODD_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXTS, inner, max_size=3),
    max_leaves=6,
)


def assert_clear(error: Exception, *names: str) -> None:
    """One line of reasonable length that holds each of `names`."""
    text = str(error)
    assert text and "\n" not in text and "\r" not in text, repr(text)
    assert len(text) < 2000, f"{len(text)} characters: {text[:200]}"
    for name in names:
        assert name in text, (name, text)


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which a few are flipped, cut, doubled, overwritten or put in between."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.sampled_from([1, 2, 7, 64, 1024]))
        match draw(st.sampled_from(["flip", "cut", "remove", "double", "write", "insert"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + size]
            case "double":
                data[place:place] = data[place : place + size]
            case "write":
                data[place : place + size] = draw(st.binary(max_size=16))
            case _:
                data[place:place] = draw(st.binary(max_size=16))
    return bytes(data)


@st.composite
def spoiled_text(draw: st.DrawFn, text: str, separator: str) -> bytes:
    """A text some of whose cells are something else."""
    cells = text.split(separator)
    for _ in range(draw(st.integers(1, 3))):
        cells[draw(st.integers(0, len(cells) - 1))] = draw(ODD_TEXTS)
    return separator.join(cells).encode("utf-8", "surrogatepass")


@st.composite
def spoiled_json(draw: st.DrawFn, text: str) -> bytes:
    """A json text of which one value, at any depth, is something else or missing."""
    tree: Any = json.loads(text)
    at = tree
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
        if not keys:
            return json.dumps(draw(ODD_JSON)).encode()
        key = draw(st.sampled_from(list(keys)))
        if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
            at = at[key]
            continue
        if draw(st.booleans()):
            at[key] = draw(ODD_JSON)
        else:
            del at[key]
        return json.dumps(tree).encode("utf-8", "surrogatepass")


def any_spoiled(content: bytes, separator: str | None = None, is_json: bool = False) -> st.SearchStrategy[bytes]:
    """One of the ways that fit the content."""
    ways: list[st.SearchStrategy[bytes]] = [spoiled(content)]
    if separator is not None:
        ways.append(spoiled_text(content.decode(), separator))
    if is_json:
        ways.append(spoiled_json(content.decode()))
    return st.one_of(ways)
