"""Which interface is chosen, and that a meeting place listens on one address alone."""

from __future__ import annotations

import socket
import subprocess
import sys

from medtvt_rl.network import interface_towards, listening_socket, loopback_environment

JOIN = """
import psutil, socket, torch
from medtvt_rl.learner import process_group
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
process_group.prepare_environment(1)
process_group.join(process_group.Rendezvous(rank=0, world_size=1, address="127.0.0.1", port=port, timeout_s=30))
torch.distributed.all_reduce(torch.ones(1))
listening = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
assert any(address.port == port for address in listening), listening
print({address.ip for address in listening})
"""


def test_loopback_is_found_by_name() -> None:
    assert interface_towards("127.0.0.1") in ("lo", "lo0")
    assert loopback_environment()["VLLM_HOST_IP"] == "127.0.0.1"


def test_a_socket_listens_on_one_address() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_gang_on_one_machine_listens_on_loopback_alone() -> None:
    run = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().splitlines()[-1] == "{'127.0.0.1'}"
