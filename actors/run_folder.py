"""Whether a node sees the run folder that the driver writes into.

Owns: the mark that the driver leaves there, and the look for it on another node. Does not own: what lies in the folder.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

MARK = Path("logs") / "driver"
SPACE = b"medtvt_rl"


class RunFolderError(RuntimeError):
    """The run folder of this node is not the driver's."""


def mark_run_folder(folder: Path) -> None:
    """By the driver: leaves a mark in the folder, and tells the actors of its Ray job which."""
    mark = secrets.token_hex(8)
    (folder / MARK).parent.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(mark)
    node = ray.get_runtime_context().get_node_id()
    told = f"{mark} {node} {ray.util.get_node_ip_address()}"
    _internal_kv_put(_key(), told.encode(), overwrite=True, namespace=SPACE)


def check_run_folder(folder: Path) -> None:
    """By an actor, at its start. Raises RunFolderError where it is on another node than the driver and the mark is not
    there; one whose driver has left none passes."""
    told = _internal_kv_get(_key(), namespace=SPACE) if ray.is_initialized() else None
    if told is None:
        return
    mark, node, address = told.decode().split()
    if node == ray.get_runtime_context().get_node_id():
        return
    try:
        found = (folder / MARK).read_text()
    except OSError:
        found = ""
    if found != mark:
        raise RunFolderError(
            f"{folder.resolve()} on node {ray.util.get_node_ip_address()} is not the run folder of the driver on "
            f"{address}; set run.root to a folder of a file system that all nodes share, e.g. run.root=/shared/runs"
        )


def _key() -> bytes:
    return f"run_folder/{ray.get_runtime_context().get_job_id()}".encode()
