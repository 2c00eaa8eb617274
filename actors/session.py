"""Joining or starting a Ray cluster, and leaving it again.

Owns: how this process becomes a Ray driver, and that a local Ray is closed: it asks for a token and listens on loopback
alone. Does not own: what is placed where (placement.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError

from actors.jobs import read_token
from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.data.parallel import usable_cores
from medtvt_rl.network import loopback_environment

logger = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10.0
START_ATTEMPTS = 3
GREETING_TIMEOUT_S = 5
"""Ray adds about 10 s of its own."""
AUTH_MODE, TOKEN_SOURCES = "RAY_AUTH_MODE", ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_MEND = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, by default ~/.ray/auth_token"


@contextmanager
def ray_session(config: Config, num_cpus: float) -> Iterator[None]:
    """Joins `cluster.address` (or the cluster that a submitted job runs in), else starts a local Ray and ends it after.

    Args:
        num_cpus: logical CPUs that the placement needs; a local Ray offers at least so many, since roles share
            cores there.

    Raises:
        ConfigError: the cluster at the address cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
    else:
        close_local_ray()
        _start_local(config, num_cpus)
    _quiet_raylet()
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Joins a running cluster; raises ConfigError where it does not let us in: no answer, the token, its version."""
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does, which the probe is ahead of
    if os.environ.get(AUTH_MODE) == "token" and read_token(None, TOKEN_MEND) is None:
        raise ConfigError(f"cluster.address is {address!r}, {AUTH_MODE} is token, and there is none; {TOKEN_MEND}")
    probe_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()
        raise ConfigError(f"cluster.address is {address!r}: {why_not_joined(error)}") from error


def why_not_joined(error: Exception) -> str:
    """What Ray says when it cannot join a cluster, in one line with the mend."""
    if isinstance(error, AuthenticationError):
        return f"the token is not the cluster's, or there is none; {TOKEN_MEND}"
    last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    if "ersion mismatch" in str(error):
        words = " ".join(str(error).split())
        return f"{words}; set the same version of Ray in cluster.yaml (docker, setup_commands) or here"
    return f"{last}; start a cluster with `ray up cluster.yaml`, or leave the address out for a local run"


def _start_local(config: Config, num_cpus: float) -> None:
    """Starts a Ray of this process alone, again where it did not come within its own 30 s, on a busy machine."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",  # never a cluster that happens to run on this machine
                num_cpus=max(usable_cores(), math.ceil(num_cpus)),
                include_dashboard=False,
                object_store_memory=config.cluster.object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises a bare one
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            logger.warning("Ray did not start in time (attempt %d of %d): %s", attempt, START_ATTEMPTS, error)


def _quiet_raylet() -> None:
    """Sends what Ray prints of a process that died to the log: the run tells it in a line of its own."""
    from ray._private import worker

    def log(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        logger.info("ray: %s", " ".join(data["lines"]))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log


def close_local_ray() -> None:
    """Settings of a local Ray, to be made before it starts: token authentication, and loopback for every port.

    The token is the user's if the environment names one, else a fresh one that this process and its children alone
    know. The settings last as long as the process.

    Raises:
        ConfigError: what the environment names is no token; Ray would abort this process.
    """
    os.environ[AUTH_MODE] = "token"
    if any(os.environ.get(name) for name in TOKEN_SOURCES):
        read_token(None, TOKEN_MEND)
    else:
        os.environ[TOKEN_SOURCES[0]] = secrets.token_hex(32)
    RayletConfig.initialize("")  # Ray read the mode when it was imported
    # Without "clusters" Ray takes 127.0.0.1 for the node's own address; its environment variable counts at import only.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    os.environ.update(loopback_environment())


def probe_address(address: str) -> None:
    """Raises ConfigError if no Ray answers at HOST:PORT, or the address is another kind; Ray itself would wait for
    minutes. "auto" is what Ray finds: RAY_ADDRESS, a node that runs on this machine, or what the last `ray start` has
    left."""
    named = f"cluster.address is {address!r}"
    mend = "start it with `ray up cluster.yaml`, or leave the address out for a local run"
    if address == "auto":
        try:
            address = services.get_ray_address_from_environment(address, None)
        except ConnectionError as error:
            raise ConfigError(f"{named}: no Ray runs on this machine, and RAY_ADDRESS is not set; {mend}") from error
        named += f", here {address}"
    if "://" in address:  # at ray:// Ray offers clients less than a run needs, and waits for what is none in silence
        raise ConfigError(
            f"{named}: a run joins as a driver, at HOST:6379 of the head, in the cluster's network; from elsewhere "
            "send it with `medtvt-rl submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"{named}: nothing answers there ({error}); {mend}") from error
    RayletConfig.initialize(json.dumps({"py_gcs_connect_timeout_s": GREETING_TIMEOUT_S}))
    try:
        GcsClient(address=address)
    except AuthenticationError as error:
        raise ConfigError(f"{named}: {why_not_joined(error)}") from error
    except RpcError as error:
        raise ConfigError(
            f"{named}: what listens there is no head of a Ray cluster (its port is 6379 by default); {mend}"
        ) from error
    finally:
        RayletConfig.initialize("")
