"""Keeps the words of file readers to themselves: their warnings quote what a file holds, names of patients included.

Owns: the silence. Does not own: faults, which the readers raise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_READERS = ("PIL", "pydicom", "wfdb")


@contextmanager
def silent_readers() -> Iterator[None]:
    """No warnings, and no log records of the packages that read recordings and films."""
    loggers = [logging.getLogger(name) for name in _READERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
