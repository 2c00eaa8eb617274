"""A node that does not see the driver's run folder says so; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import run_folder
from actors.run_folder import MARK, RunFolderError, check_run_folder, mark_run_folder


@pytest.fixture
def on_node(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Turns this process into one of another node."""
    kept: dict[bytes, bytes] = {}
    here = {"node": "driver"}
    context = SimpleNamespace(get_node_id=lambda: here["node"], get_job_id=lambda: "01000000")
    monkeypatch.setattr(run_folder, "_internal_kv_put", lambda key, value, **_: kept.update({key: value}))
    monkeypatch.setattr(run_folder, "_internal_kv_get", lambda key, **_: kept.get(key))
    monkeypatch.setattr(run_folder.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(run_folder.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(run_folder.ray.util, "get_node_ip_address", lambda: f"address-of-{here['node']}")
    return lambda node: here.update(node=node)


def test_a_folder_that_is_not_shared_is_named_with_the_mend(tmp_path: Path, on_node: Callable[[str], None]) -> None:
    mark_run_folder(tmp_path / "run")
    on_node("other")
    check_run_folder(tmp_path / "run")
    expected = (
        "is not the run folder of the driver on address-of-driver; set run.root to a folder of a file system that"
    )
    with pytest.raises(RunFolderError, match=f"elsewhere on node address-of-other {expected}"):
        check_run_folder(tmp_path / "elsewhere")
    (tmp_path / "run" / MARK).write_text("of an earlier run of this node")
    with pytest.raises(RunFolderError, match=expected):
        check_run_folder(tmp_path / "run")


def test_the_driver_s_own_node_and_a_driver_without_a_mark_pass(tmp_path: Path, on_node: Callable[[str], None]) -> None:
    check_run_folder(tmp_path / "run")
    mark_run_folder(tmp_path / "run")
    check_run_folder(tmp_path / "elsewhere")
