"""What waits inside a rollout engine: groups, their requests, weight updates.

Owns: these records, and the error of those whose engine broke. Does not own: what becomes of them (vllm_engine.py).
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.types import Completion, Prompt
from medtvt_rl.weights import WeightBuffer

T = TypeVar("T")
OnUpdate = Literal["continue", "finish", "restart"]


class EngineBrokenError(RuntimeError):
    """The engine's state is unknown, after a failed load or step; it serves no more and has to be replaced."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One completion in flight.

    Attributes:
        internal_id: vLLM's own id.
        marks: (number of tokens, version): so many tokens were there when this version went out of service.
    """

    group: PendingGroup
    index: int
    internal_id: str = ""
    marks: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Groups that an engine begins with all at once, in id order and with empty caches, whatever the order in which
    they arrive and whatever was asked before: batches, and with them the rounding of log-probs, are those of every run.

    Attributes:
        number: unique in the run.
        size: members that this engine is sent.
    """

    number: int
    size: int


@dataclass(slots=True, kw_only=True)
class PendingGroup:
    """One submitted group: what was asked, and what has come of it.

    Attributes:
        first_index: of its first completion; more than 0 where it is a later part of a group.
        wave: what it starts together with; None to start at once.
        num_scored: 0 for a group to be sampled; else the last tokens of the prompt whose log-probs are asked for.
        future: of a RolloutGroup, or of [num_scored] float32 log-probs.
    """

    prompt: Prompt
    item: dict[str, Any] | None
    group_id: int
    num_completions: int
    run_seed: int
    sampling: SamplingConfig
    greedy: bool
    max_tokens: int
    future: Future[Any]
    first_index: int = 0
    wave: Wave | None = None
    num_scored: int = 0
    rendered: Any = None
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def indices(self) -> range:
        """Of its completions within their group."""
        return range(self.first_index, self.first_index + self.num_completions)


@dataclass(slots=True, kw_only=True)
class WeightUpdate:
    """One weight update that waits for its turn."""

    buffer: WeightBuffer
    on_update: OnUpdate
    future: Future[int]


def startable_groups(
    waiting: Sequence[PendingGroup], excused: Counter[Wave]
) -> tuple[list[PendingGroup], list[PendingGroup]]:
    """The groups that may start, those of complete waves last and in id order; and those that wait for their wave.

    Args:
        excused: members of a wave that will not come; a wave that is complete is taken out.
    """
    here = excused + Counter(group.wave for group in waiting if group.wave is not None)
    complete = {wave for wave, count in here.items() if count >= wave.size}
    for wave in complete:
        del excused[wave]
    free = [group for group in waiting if group.wave is None]
    members = [group for group in waiting if group.wave in complete]
    members.sort(key=lambda group: (group.group_id, group.first_index))
    return free + members, [group for group in waiting if group.wave is not None and group.wave not in complete]


def uncancellable() -> Future[Any]:
    """A future that a caller who stops waiting cannot cancel: the engine's thread will still set it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def answered(send: Callable[[Callable[[], None]], None], call: Callable[[], T]) -> T:
    """What a call returns, or raises, that `send` hands to the thread that is to make it."""
    answer: Future[T] = Future()

    def make() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    send(make)
    return answer.result()


def drained(commands: queue.SimpleQueue[Any]) -> list[Any]:
    """What a queue holds now; nobody else may take from it."""
    taken = []
    while not commands.empty():
        taken.append(commands.get())
    return taken
