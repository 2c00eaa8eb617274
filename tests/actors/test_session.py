"""An address at which nothing answers is refused at once, with the command that mends it; so is a cluster (a real head)
that has another token or another version of Ray."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import services

from actors import session
from actors.session import probe_address, ray_session
from medtvt_rl.config import ClusterConfig, Config
from medtvt_rl.config_checks import ConfigError


def test_what_listens_and_is_no_ray_is_refused_within_30_seconds() -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf":{port}': what listens there is no head of a Ray cluster"):
            probe_address(f"127.0.0.1:{port}")
    assert time.monotonic() - started < 30


def test_a_silent_address_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"cluster\.address is '127\.0\.0\.1:{port}'.*ray up cluster\.yaml"):
        probe_address(f"127.0.0.1:{port}")


def test_auto_is_the_address_that_ray_would_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)  # of others on this machine
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"is 'auto': no Ray runs on this machine, and RAY_ADDRESS is not set; start"):
        probe_address("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone)  # of a head that crashed
    with pytest.raises(ConfigError, match=rf"cluster\.address is 'auto', here {gone}: nothing answers there"):
        probe_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", f"ray://{gone}")
    with pytest.raises(ConfigError, match=rf"is 'auto', here ray://{gone}: a run joins as a driver, at HOST:6379"):
        probe_address("auto")


def test_an_address_for_clients_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        for named in (address, None):  # by the configuration, by the environment
            with (
                pytest.raises(ConfigError, match=rf"'{address}': a run joins as .* HOST:6379 .*`medtvt-rl submit`"),
                ray_session(Config(cluster=ClusterConfig(address=named)), 1),
            ):
                pass
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_what_is_no_token_ends_no_process(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first\nsecond")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ConfigError, match="RAY_AUTH_TOKEN holds no token"),
        ray_session(Config(cluster=ClusterConfig(address=address)), 1),
    ):
        pass


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_a_token_file_that_cannot_be_read_has_the_mend_of_a_run(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match=r"none cannot be read: No such file.*; set RAY_AUTH_MODE=token and RAY_AUTH_"),
        ray_session(Config(cluster=ClusterConfig(address=address)), 1),
    ):
        pass


@pytest.mark.parametrize(("asked", "offered"), [(1.0, 2), (4.5, 5)])
def test_a_local_ray_offers_the_cores_that_may_be_used_or_what_is_asked_for(
    asked: float, offered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(session, "close_local_ray", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **settings: given.update(settings))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(Config(), asked):
        assert given["num_cpus"] == offered


JOIN = """
import sys
import ray
from actors import session
from actors.session import ray_session
from medtvt_rl.config import Config, ClusterConfig
from medtvt_rl.config_checks import ConfigError

ray.__version__ = sys.argv[2]
try:
    with ray_session(Config(cluster=ClusterConfig(address=sys.argv[1])), 1):
        print("joined")
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of those who may join a cluster with a token; its address is FAR_ADDRESS there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    session = Path(tempfile.mkdtemp(prefix="rs"))  # short: the paths of Ray's sockets lie below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(session)}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--include-dashboard=false", "--num-cpus=1", "--object-store-memory=100000000"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield environment | {"FAR_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def joined(environment: dict[str, str], version: str = ray.__version__) -> str:
    """What becomes of a driver of that version of Ray."""
    command = [sys.executable, "-c", JOIN, environment["FAR_ADDRESS"], version]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.cluster
def test_who_may_join_a_cluster(head: dict[str, str]) -> None:
    assert joined(head) == "joined"
    unsaid = {name: value for name, value in head.items() if name != "RAY_AUTH_MODE"}
    assert joined(unsaid | {"FAR_ADDRESS": "auto"}) == "joined"  # with the token that Ray finds
    wrong = joined(head | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert re.match(r"cluster\.address is '127\.0\.0\.1:\d+': the token is not the cluster's, or there is none;", wrong)
    none = {name: value for name, value in head.items() if not name.startswith("RAY_AUTH")} | {"HOME": "/nonexistent"}
    assert "the token is not the cluster's, or there is none; " in joined(none)
    assert "is token, and there is none; set RAY_AUTH_MODE=token and" in joined(none | {"RAY_AUTH_MODE": "token"})
    other = joined(head, "2.59.1")
    assert "2.59.1" in other and ray.__version__ in other and "set the same version of Ray" in other, other
    assert "\n" not in wrong + other and len(other) < 500
