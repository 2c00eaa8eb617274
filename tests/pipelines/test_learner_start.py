"""Where restarted learners begin: damaged checkpoints are passed over, a store that does not answer is no damage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.learner_supervisor import OutOfReachError
from pipelines.learner_start import CheckpointShelf


class SlowDown(Exception):
    """What a store's client raises, of no kind that anyone else knows."""


class FakeStore:
    """Checkpoints by version: a place, or what reading it raises; `fault` is raised by every call."""

    def __init__(self, kept: dict[int, Any]) -> None:
        self.kept = kept
        self.fault: Exception | None = None

    def versions(self) -> list[int]:
        if self.fault is not None:
            raise self.fault
        return sorted(self.kept, reverse=True)

    def read(self, version: int) -> Any:
        if isinstance(self.kept[version], Exception):
            raise self.kept[version]
        return SimpleNamespace(learner=self.kept[version])

    def has(self, version: int) -> bool:
        return version in self.kept

    def place(self, version: int) -> str:
        return f"s3://b/{version}"


def shelf_of(kept: dict[int, Any]) -> tuple[CheckpointShelf, FakeStore, list[str]]:
    store, told = FakeStore(kept), list[str]()
    given: Any = store
    return CheckpointShelf(given, told.append), store, told


@pytest.mark.parametrize("damage", [ValueError("SHA-256 differs"), FileNotFoundError("loop.json"), KeyError("format")])
def test_a_damaged_checkpoint_is_told_and_passed_over(damage: Exception) -> None:
    shelf, _, told = shelf_of({9: "later", 6: damage, 4: "whole", 2: "old"})
    assert shelf.newest(8) == ("whole", 4)
    assert len(told) == 1 and told[0].startswith("checkpoint s3://b/6 is damaged and passed over")


@pytest.mark.parametrize("fault", [SlowDown("503"), TimeoutError("503"), PermissionError("503")])
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
