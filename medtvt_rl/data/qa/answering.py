"""Has a model answer many items at once, keeps every answer on disk, and goes on where an interrupted run stopped.

Owns: the file of answers, how many tries an item gets, how many calls are under way, the tally of tokens and cost. Does
not own: a call (endpoint.py) or what makes an answer right (validation.py).

Every answer that came back is a line of the file before anything else happens with it, so that none is paid twice. A
line is known by the SHA-256 of the study, the model, the request and the whole prompt: other labels or another wording
ask anew, all else is taken from the file.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.qa.endpoint import ChatModel, EndpointSettings, RefusedError, Reply
from medtvt_rl.data.qa.templates import Item, chat_messages
from medtvt_rl.data.qa.validation import refusal

CUT = "the answer was cut at the longest length"


@dataclass(slots=True, kw_only=True)
class Tally:
    """How far the answering is. Tokens and cost include those of earlier runs that this one goes on from.

    Attributes:
        price_in, price_out: per million tokens, in whatever currency; 0 where no price is given.
        left_out: items whose tries are all used up.
        reused: answers that were on disk already.
    """

    total: int
    price_in: float = 0.0
    price_out: float = 0.0
    accepted: int = 0
    rejected: int = 0
    left_out: int = 0
    reused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def done(self) -> int:
        """Items that are settled."""
        return self.accepted + self.left_out

    @property
    def cost(self) -> float:
        """What the tokens so far cost."""
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6

    @property
    def cost_at_end(self) -> float:
        """What all will cost, if the rest is as the items so far."""
        return self.cost * self.total / self.done if self.done else 0.0


class AnswerFile:
    """Lines of answers, appended as they come; one process at a time. Use as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path}: another build-qa is writing it; wait for that one, or end it") from None
        self._lines: dict[str, list[dict[str, Any]]] = {}
        for line in self._read():
            self._lines.setdefault(line["key"], []).append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def of(self, key: str) -> list[dict[str, Any]]:
        """The answers to one item so far, in their order."""
        return self._lines.get(key, [])

    def add(self, line: dict[str, Any]) -> None:
        """Appends a line that is on disk when this returns."""
        self._lines.setdefault(line["key"], []).append(line)
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> Iterator[dict[str, Any]]:
        """The lines there; one that a crash cut short is ended, and skipped from then on."""
        self._file.seek(0)
        content = self._file.read()
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")
        for text in content.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("answer"), str):
                yield line


def item_key(item: Item, settings: EndpointSettings) -> str:
    """What an answer is known by."""
    asked = [item.labels.study_id, item.kind, settings.model, settings.max_tokens, dict(settings.request)]
    return hashlib.sha256(json.dumps([*asked, chat_messages(item)], sort_keys=True).encode()).hexdigest()


class Answering:
    """Answers items through a model.

    Args:
        attempts: answers that one item may get before it is left out.
        concurrency: calls under way at once.
        on_settled: called after each item with the tally.
    """

    def __init__(
        self,
        model: ChatModel,
        settings: EndpointSettings,
        file: AnswerFile,
        tally: Tally,
        attempts: int,
        concurrency: int,
        on_settled: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self._model, self._settings, self._file, self.tally = model, settings, file, tally
        self._attempts, self._concurrency, self._on_settled = attempts, concurrency, on_settled
        self._stopping = False

    async def run(self, items: Sequence[Item]) -> dict[int, str]:
        """Place of an item -> its accepted answer; items that are left out have none.

        After a fault, or an interruption, the calls under way are waited for (they are paid for), no other is begun,
        and the fault is raised.

        Raises:
            EndpointError: the endpoint cannot be used, or stopped answering.
        """
        answers: dict[int, str] = {}
        queue = iter(enumerate(items))
        workers = [asyncio.create_task(self._work(queue, answers)) for _ in range(self._concurrency)]
        fault: BaseException | None = None
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            fault = next((error for task in done if (error := task.exception()) is not None), None)
        finally:
            self._stopping = True
            self._model.stop()
            await asyncio.gather(*workers, return_exceptions=True)
        if fault is not None:
            raise fault
        return answers

    async def _work(self, queue: Iterator[tuple[int, Item]], answers: dict[int, str]) -> None:
        for place, item in queue:
            answer, settled = await self._answer(item)
            if answer is not None:
                answers[place] = answer
                self.tally.accepted += 1
            elif settled:
                self.tally.left_out += 1
            if self._stopping:
                return
            self._on_settled(self.tally)

    async def _answer(self, item: Item) -> tuple[str | None, bool]:
        """The accepted answer if there is one, and whether the item is settled."""
        key = item_key(item, self._settings)
        for line in self._file.of(key)[: self._attempts]:
            self.tally.reused += 1
            if self._judged(item, line):
                return line["answer"], True
            if line.get("final"):
                return None, True
        while len(self._file.of(key)) < self._attempts:
            if self._stopping:
                return None, False
            line = {"key": key, "study_id": item.labels.study_id, "split": item.labels.split, "kind": item.kind}
            try:
                line |= _line_of(await self._model.reply(chat_messages(item)))
            except RefusedError as error:
                line |= {"answer": "", "fault": str(error), "final": True}
            self._file.add(line)
            if self._judged(item, line):
                return line["answer"], True
            if line.get("final"):
                break
        return None, True

    def _judged(self, item: Item, line: dict[str, Any]) -> bool:
        """Whether an answer is taken; counts it and its tokens either way."""
        self.tally.tokens_in += line.get("tokens_in", 0)
        self.tally.tokens_out += line.get("tokens_out", 0)
        taken = reason_of(item, line) is None
        self.tally.rejected += not taken
        return taken


def reason_of(item: Item, line: dict[str, Any]) -> str | None:
    """Why the answer of a line is not taken; None for one that is."""
    return line.get("fault") or refusal(item, line["answer"])


def _line_of(reply: Reply) -> dict[str, Any]:
    line: dict[str, Any] = {"answer": reply.text.strip()}
    if reply.cut:
        line["fault"] = CUT
    return {**line, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
