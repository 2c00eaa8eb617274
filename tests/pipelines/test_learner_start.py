"""Where restarted learners begin: damaged checkpoints are passed over, a store that does not answer is no damage."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.learner_supervisor import OutOfReachError
from pipelines.checkpoints import CheckpointStore
from pipelines.learner_start import CheckpointShelf


class SlowDown(Exception):
    """What a store's client raises, of no kind that anyone else knows."""


class FakeStore(CheckpointStore):
    """Checkpoints by version: a name, or what reading it raises; `fault` is raised by every listing."""

    def __init__(self, root: str, kept: dict[int, Any]) -> None:
        super().__init__(root)
        self.kept = kept
        self.fault: Exception | None = None

    def versions(self) -> list[int]:
        if self.fault is not None:
            raise self.fault
        return sorted(self.kept, reverse=True)

    def read(self, version: int) -> Any:
        if isinstance(self.kept[version], Exception):
            raise self.kept[version]
        return SimpleNamespace(learner=self.kept[version], version=version)


def shelf_of(kept: dict[int, Any], root: str = "memory://b/r") -> tuple[CheckpointShelf, FakeStore, list[str]]:
    store, told = FakeStore(root, kept), list[str]()
    return CheckpointShelf(store, told.append), store, told


@pytest.mark.parametrize("damage", [ValueError("SHA-256 differs"), FileNotFoundError("loop.json"), KeyError("format")])
def test_a_damaged_checkpoint_is_told_and_passed_over(damage: Exception) -> None:
    shelf, store, told = shelf_of({9: "later", 6: damage, 4: "whole", 2: "old"})
    assert shelf.newest(8) == ("whole", 4) and store.damaged == {6}
    assert len(told) == 1 and told[0].startswith("checkpoint memory://b/r/step_000006 is damaged and passed over")


def test_a_disk_that_cannot_read_a_checkpoint_has_damaged_it(tmp_path: Path) -> None:
    shelf, _, told = shelf_of({6: OSError(errno.EIO, "Input/output error"), 4: "whole"}, str(tmp_path))
    assert shelf.newest(8) == ("whole", 4)
    assert len(told) == 1 and "is damaged and passed over: [Errno 5]" in told[0]
    shelf, store, told = shelf_of({6: OSError(errno.ESTALE, "Stale file handle"), 4: "whole"}, str(tmp_path))
    with pytest.raises(OutOfReachError, match="Stale file handle"):
        shelf.newest(8)
    assert not told and not store.damaged, "a file server says nothing of the files where it does not answer"


@pytest.mark.parametrize("fault", [SlowDown("503"), TimeoutError("503"), OSError("503")])
def test_a_store_that_does_not_answer_is_no_damage(fault: Exception) -> None:
    shelf, store, told = shelf_of({6: fault, 4: "whole"})
    words = f"{type(fault).__name__}: 503"
    with pytest.raises(OutOfReachError, match=words):
        shelf.newest(8)
    store.kept[6], store.fault = "newest", fault
    with pytest.raises(OutOfReachError, match=words):
        shelf.newest(8)
    store.fault = None
    assert shelf.newest(8) == ("newest", 6) and not told
