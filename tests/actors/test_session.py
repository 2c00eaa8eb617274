"""An address at which nothing answers is refused at once, with the command that mends it."""

from __future__ import annotations

import socket

import pytest

from actors.session import probe_address
from medtvt_rl.config_checks import ConfigError


def test_a_listening_address_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        probe_address(f"127.0.0.1:{port}")
        probe_address(f"ray://127.0.0.1:{port}")


def test_a_silent_address_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"cluster\.address is '127\.0\.0\.1:{port}'.*ray up cluster\.yaml"):
        probe_address(f"127.0.0.1:{port}")


def test_what_is_no_host_and_port_is_left_to_ray() -> None:
    probe_address("auto")
