"""The process group of a learner gang: environment, rendezvous, deadline.

Owns: what has to happen before `import deepspeed`, and a deadline on every collective. Does not own: which processes
form the gang (actors/), or the optimizer. Call `prepare_environment` before any module imports deepspeed.
"""

from __future__ import annotations

import datetime
import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from medtvt_rl.network import interface_towards, listening_socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a gang meet.

    Attributes:
        local_rank: index of this rank's GPU among those that its process sees.
        address, port: of rank 0; a new gang needs a new port.
        timeout_s: of every collective, in every group.
    """

    rank: int
    world_size: int
    address: str
    port: int
    timeout_s: float
    local_rank: int = 0


def training_device(local_rank: int = 0) -> torch.device:
    """The GPU of this rank if the process sees one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def check_gpu(role: str, gpus: float) -> None:
    """Raises ValueError where an actor was given a GPU that PyTorch does not find: it would do with the CPU, many times
    slower, and without a word."""
    if gpus > 0 and not torch.cuda.is_available():
        raise ValueError(
            f"placement.{role}.gpus is {gpus:g}, and PyTorch {torch.__version__} on {socket.gethostname()} finds no "
            "GPU; see that `nvidia-smi` works there and set that node up with `make setup EXTRA=cuda`, or set "
            f"placement.{role}.gpus=0"
        )


def prepare_environment(num_threads: int) -> None:
    """Settings that DeepSpeed reads when it is imported, and the threads of torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(num_threads)


def join(rendezvous: Rendezvous) -> torch.device:
    """Joins the gang: gloo on a CPU, NCCL on a GPU. Returns this rank's device.

    Its ports are open on the interface between the ranks alone: loopback where all are on one machine.

    Raises:
        torch.distributed.DistError: not all ranks arrived within the deadline.
    """
    os.environ.update(
        RANK=str(rendezvous.rank),
        WORLD_SIZE=str(rendezvous.world_size),
        LOCAL_RANK=str(rendezvous.local_rank),
        MASTER_ADDR=rendezvous.address,
        MASTER_PORT=str(rendezvous.port),
    )
    interface = interface_towards(rendezvous.address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    device = training_device(rendezvous.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bound_every_group(rendezvous.timeout_s)
    timeout = datetime.timedelta(seconds=rendezvous.timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(rendezvous, timeout),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timeout,
    )
    return device


def _store(rendezvous: Rendezvous, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks find each other. Left alone, torch would listen on every address of the machine."""
    first = rendezvous.rank == 0
    listener = listening_socket(rendezvous.address, rendezvous.port) if first else None
    return dist.TCPStore(
        rendezvous.address,
        rendezvous.port,
        world_size=rendezvous.world_size,
        is_master=first,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def leave() -> None:
    """Leaves the gang, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def bound_every_group(timeout_s: float) -> None:
    """Gives every process group made from now on a deadline, unless its maker sets one.

    DeepSpeed makes groups of its own without one; a rank that failed would leave the others waiting for ever.
    """
    original: Callable[..., Any] = getattr(dist.new_group, "__wrapped__", dist.new_group)

    @functools.wraps(original)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = datetime.timedelta(seconds=timeout_s)
        return original(*args, **kwargs)

    dist.new_group = new_group
