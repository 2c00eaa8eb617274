"""Which interfaces this process listens on: loopback for a local run, else the one that faces the others.

Owns: the names of interfaces, sockets that listen on one address alone, and the environment that keeps libraries on
loopback. Does not own: Ray's own ports (actors/session.py).
"""

from __future__ import annotations

import socket

import psutil

LOOPBACK = "127.0.0.1"
_DISCARD_PORT = 9


def interface_towards(address: str) -> str | None:
    """The interface from which this machine reaches `address`, e.g. "lo" or "eth0"; None where none has a name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _DISCARD_PORT))  # of a datagram socket: it chooses the interface and sends nothing
        own = probe.getsockname()[0]
    found = (name for name, held in psutil.net_if_addrs().items() if any(each.address == own for each in held))
    return next(found, None)


def listening_socket(address: str, port: int) -> socket.socket:
    """A socket that listens on this address, and no other of the machine. Raises OSError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def loopback_environment() -> dict[str, str]:
    """What gloo, NCCL and vLLM read, in every process of a run on one machine, to listen on loopback alone."""
    interface = interface_towards(LOOPBACK) or "lo"
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": LOOPBACK}
