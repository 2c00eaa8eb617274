"""Spares: one an index, handed out once its imports are done, none where the node is short of memory."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.process import Whereabouts, import_ahead
from actors.spares import Spares

HERE = Whereabouts(node="10.0.0.7", pid=1, devices="3")


class FakeSpare:
    def __init__(self, answer: Any) -> None:
        self.answer, self.asked, self.dead = answer, list[tuple[Any, ...]](), False
        self.gate = asyncio.Event()
        self.warm = self

    async def _warm(self) -> Any:
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def remote(self, *arguments: Any) -> Any:
        self.asked.append(arguments)
        return self._warm()


@pytest.mark.parametrize(("answer", "is_there"), [(True, True), (False, False), (ActorDiedError(), False)])
def test_a_spare_is_there_when_its_imports_are_done_and_else_it_is_ended(answer: Any, is_there: bool) -> None:
    async def run() -> None:
        made: list[FakeSpare] = []

        def make(index: int) -> FakeSpare:
            made.append(FakeSpare(answer))
            return made[-1]

        spares = Spares("learner", None, make, 5.0, "s", kill=lambda spare: setattr(spare, "dead", True))
        spares.order(0, HERE)
        spares.order(0, HERE)
        await asyncio.sleep(0.01)
        assert len(made) == 1 and made[0].asked == [("3", False)]
        assert spares.take(0) is None, "not before its imports are done"
        made[0].gate.set()
        await asyncio.sleep(0.01)
        assert spares.take(0) is (made[0] if is_there else None) and spares.take(0) is None
        assert made[0].dead is not is_there
        spares.order(0, HERE)
        await asyncio.sleep(0.01)
        spares.stop()
        await asyncio.sleep(0.01)
        assert made[1].dead

    asyncio.run(run())


def test_none_are_kept_where_none_are_wanted() -> None:
    spares = Spares("learner", 0, lambda index: pytest.fail("made one"), 5.0, "s")
    spares.order(0, HERE)
    assert spares.take(0) is None


def test_imports_ahead_see_the_devices_and_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delitem(sys.modules, "this", raising=False)
    prepared: list[str] = []
    import_ahead(["this"], "3", lambda: prepared.append("yes"))
    assert "this" in sys.modules and prepared == ["yes"]
    with pytest.raises(ModuleNotFoundError):
        import_ahead(["there_is_no_such_module"], None, lambda: None)
