"""Joining or starting a Ray cluster, and leaving it again.

Owns: how this process becomes a Ray driver. Does not own: what is placed where (placement.py).
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError

logger = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10.0


@contextmanager
def ray_session(config: Config, num_cpus: float) -> Iterator[None]:
    """Joins `cluster.address` (or the cluster that a submitted job runs in), else starts a local Ray and ends it after.

    Args:
        num_cpus: logical CPUs that the placement needs; a local Ray offers at least so many, since roles share
            cores there.

    Raises:
        ConfigError: nothing answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        probe_address(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",  # never a cluster that happens to run on this machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),
            include_dashboard=False,
            object_store_memory=config.cluster.object_store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    _quiet_raylet()
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_raylet() -> None:
    """Sends what Ray prints of a process that died to the log: the run tells it in a line of its own."""
    from ray._private import worker

    def log(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        logger.info("ray: %s", " ".join(data["lines"]))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log


def probe_address(address: str) -> None:
    """Raises ConfigError if nothing listens at HOST:PORT; Ray itself would wait for minutes. "auto" is left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"cluster.address is {address!r}: nothing answers there ({error}); start it with `ray up cluster.yaml`, "
            "or leave the address out for a local run"
        ) from error
