"""Finds what a configuration names by a dotted path, "package.module:name"."""

from __future__ import annotations

import importlib
from typing import Any


def resolve(path: str, key: str) -> Any:
    """The object that `path` names. `key` is the configuration key it came from, for the error.

    Raises:
        ValueError: the path is malformed, or its module or name does not exist.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{key}: {path!r} is not of the form 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: no module {error.name!r} for {path!r}; check the spelling and PYTHONPATH") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{key}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)
