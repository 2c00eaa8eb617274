"""What an actor does with its own process: where it is, and imports ahead of need.

Owns: these two. Does not own: what is imported (the actors), or when (spares.py).
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray

SPARE_BYTES = 1 << 30
"""What a process with its imports done is taken to need."""
SPARE_SHARE = 0.25
"""Of a node's memory that must stay free beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where an actor runs; `devices` is its CUDA_VISIBLE_DEVICES, None where that is not set."""

    node: str
    pid: int
    devices: str | None


def whereabouts() -> Whereabouts:
    """Of this process."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Whereabouts(node=ray.util.get_node_ip_address(), pid=os.getpid(), devices=devices)


def has_room() -> bool:
    """Whether this node has memory for a spare process."""
    memory = psutil.virtual_memory()
    return bool(memory.available - SPARE_BYTES > SPARE_SHARE * memory.total)


def import_ahead(modules: Sequence[str], devices: str | None, prepare: Callable[[], None]) -> None:
    """Imports in a thread of the lowest priority, so that it costs the others nothing but idle time.

    Args:
        prepare: called in that thread first; sets what the modules read when they are imported.
        devices: those of the actor whose place this process may take: libraries ask for them when they are imported.
    """
    failed: list[BaseException] = []

    def work() -> None:
        with suppress(OSError):  # of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            prepare()
            for name in modules:
                importlib.import_module(name)
        except BaseException as error:
            failed.append(error)

    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    thread = threading.Thread(target=work, name="import-ahead")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
