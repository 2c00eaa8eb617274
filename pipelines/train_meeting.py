"""Where the workers of a Ray Train job meet: an address and a port of worker 0, told to all.

Owns: the backend that Ray Train is given in place of its own, whose meeting point listens on every address of the
machine, and that Ctrl-C stays the driver's. Does not own: joining (medtvt_rl/learner/process_group.py), which the
workers do themselves.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from medtvt_rl.network import LOOPBACK

ADDRESS, PORT = "MEDTVT_RL_MEETING_ADDRESS", "MEDTVT_RL_MEETING_PORT"


class Trainer(TorchTrainer):
    """Ray Train's own, but for its handler of SIGINT, which ends the driver with the exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves the driver's (stopping.py)."""


class MeetingConfig(TorchConfig):
    """Makes Ray Train tell its workers where to meet, and nothing more."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend below."""
        return Meeting


class Meeting(Backend):
    """Worker 0 names its address and a free port; every worker finds them in its environment."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before the training function."""
        address, port = worker_group.execute_single(0, _own_address)
        if set(worker_group.execute(_own_node)) == {address}:
            address = LOOPBACK
        worker_group.execute(_remember, address, port)


def meeting() -> tuple[str, int]:
    """Address and port of worker 0, in a worker."""
    return os.environ[ADDRESS], int(os.environ[PORT])


def _own_node() -> str:
    return str(ray.util.get_node_ip_address())


def _own_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return _own_node(), int(probe.getsockname()[1])


def _remember(address: str, port: int) -> None:
    os.environ[ADDRESS], os.environ[PORT] = address, str(port)
