"""What an actor does with its own process: where it is, what it is at, and imports ahead of need.

Owns: these three. Does not own: what is imported (the actors), or when (spares.py).
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray

SPARE_BYTES = 1 << 30
"""What a process with its imports done is taken to need."""
SPARE_SHARE = 0.25
"""Of a node's memory that must stay free beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where an actor runs: address of its node, and Ray's id of that, empty where it is not known; `devices` is its
    CUDA_VISIBLE_DEVICES, None where that is not set."""

    node: str
    pid: int
    devices: str | None
    node_id: str = ""


def whereabouts() -> Whereabouts:
    """Of this process."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    node, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    return Whereabouts(node=node, pid=os.getpid(), devices=devices, node_id=node_id)


def entitle(actor: str, work: str) -> None:
    """Lets `ps` and `top` show what the actor of a class is at, as Ray does for a call, and in more detail than that:
    `ray::LearnerWorker.train_step backward`. Ray takes it back at the end of the call."""
    raylet: Any = ray._raylet
    raylet.setproctitle(f"ray::{actor}.{work}")


def has_room(more_bytes: int = 0) -> bool:
    """Whether this node has memory for a spare process, and for so much more."""
    memory = psutil.virtual_memory()
    return bool(memory.available - SPARE_BYTES - more_bytes > SPARE_SHARE * memory.total)


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
