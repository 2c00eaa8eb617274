"""One rollout engine: groups of completions in, policy versions on every token, weights exchanged between two steps.

    submit ------+                    +---- step ----> completions ----> RolloutGroup futures
    update ------+--> command queue --+---- load, drop caches, version v+1
    close  ------+                    (one thread owns vLLM and does nothing but this loop)

Owns: the loop, groups in flight, versions of tokens, faults. Not: vLLM's objects (vllm_core.py), transport of weights.
"""

from __future__ import annotations

import atexit
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.privacy import hashed
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.counters import EngineCounters, Totals
from medtvt_rl.rollout.pending import (
    EngineBrokenError,
    OnUpdate,
    PendingGroup,
    Request,
    Wave,
    WeightUpdate,
    answered,
    drained,
    startable_groups,
    uncancellable,
)
from medtvt_rl.rollout.sampling import completion_seed
from medtvt_rl.rollout.vllm_core import SampledTokens, VllmCore
from medtvt_rl.types import Completion, Prompt, RolloutGroup
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer

logger = logging.getLogger(__name__)


class VllmEngine:
    """vLLM behind a thread: `submit` and `update_weights` may be called from any thread at any time.

    Args:
        model_folder: a Hugging Face folder with its tokenizer; MedTVT or any text model that vLLM knows.
        config: the engine's settings.
        version: policy version of the weights in the folder.
        item_modality: the name under which the model takes an item.
        by_broadcast: weights may come over NCCL, see `join_weight_group`.

    Raises:
        ValueError, RuntimeError: what starting vLLM raises.

    Call `vllm_core.prepare_environment` before vLLM is first imported in the process.
    """

    def __init__(
        self,
        model_folder: str | Path,
        config: EngineConfig,
        version: int = 0,
        item_modality: str = "study",
        by_broadcast: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        self.config = config
        self.version = version
        self.broken: str | None = None
        self._commands: queue.SimpleQueue[PendingGroup | WeightUpdate | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[PendingGroup] = []
        self._updates: list[WeightUpdate] = []
        self._in_flight: dict[str, Request] = {}
        self._excused: Counter[Wave] = Counter()
        self._next_request = 0
        self._closing = False
        self._lock = threading.Lock()
        self._counters = EngineCounters()
        started: Future[None] = Future()
        core = functools.partial(VllmCore, model_folder, config, item_modality, by_broadcast, tensor_parallel)
        self._thread = threading.Thread(target=self._run, args=(core, started), name="vllm-engine", daemon=True)
        self._thread.start()
        started.result()
        atexit.register(self.close)

    def submit(
        self,
        prompt: Prompt,
        item: dict[str, Any] | None,
        group_id: int,
        num_completions: int,
        run_seed: int,
        sampling: SamplingConfig,
        greedy: bool = False,
        first_index: int = 0,
        wave: Wave | None = None,
    ) -> Future[RolloutGroup]:
        """Asks for G completions of one prompt; they join whatever is running.

        The text of completion i depends on the weights and on (run_seed, group_id, i) alone, up to rounding. Log-probs
        are at the sampling temperature, at 1 for a greedy group.

        Args:
            prompt: placeholders of its item already expanded.
            item: the multimodal item, unbatched arrays; None for plain text.
            greedy: the most probable token each time, `sampling` gives the length only.
            first_index: of the first completion within its group, where other engines make the rest.
            wave: starts when all members of the wave are here, or excused.

        Raises:
            ValueError: the prompt leaves no room in `max_model_len`, or a number is out of range.
            EngineBrokenError: an earlier fault; the future raises it for one that comes later.
        """
        room = self.config.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise ValueError(
                f"prompt {hashed(prompt.prompt_id)}: {len(prompt.token_ids)} tokens leave no room in "
                f"rollout.engine.max_model_len = {self.config.max_model_len}; raise it or shorten the prompt"
            )
        if num_completions < 1 or first_index < 0:
            raise ValueError(
                f"num_completions: {num_completions} from index {first_index} on, expected at least 1 from 0 or later"
            )
        if not greedy and sampling.temperature <= 0:
            raise ValueError(
                f"rollout.sampling.temperature: {sampling.temperature}, expected more than 0; ask for greedy instead"
            )
        group = PendingGroup(
            prompt=prompt,
            item=item,
            group_id=group_id,
            num_completions=num_completions,
            run_seed=run_seed,
            sampling=sampling,
            greedy=greedy,
            max_tokens=min(sampling.max_new_tokens, room),
            future=uncancellable(),
            first_index=first_index,
            wave=wave,
        )
        self._send(group)
        return group.future

    def excuse(self, wave: Wave) -> None:
        """A member of the wave will not come: the others do not wait for it."""
        self._send(lambda: self._excused.update([wave]))

    def score(self, prompt: Prompt, item: dict[str, Any] | None, num_scored: int) -> Future[NDArray[np.float32]]:
        """Log-probs, at temperature 1 and under the weights of now, of the last `num_scored` tokens of a prompt.

        Args:
            prompt: a prompt with a completion behind it.
        """
        if not 0 < num_scored < len(prompt.token_ids) < self.config.max_model_len:
            raise ValueError(
                f"prompt {hashed(prompt.prompt_id)}: cannot score the last {num_scored} of {len(prompt.token_ids)} "
                f"tokens; expected fewer than there are, and room for one more in {self.config.max_model_len}"
            )
        group = PendingGroup(
            prompt=prompt,
            item=item,
            group_id=0,
            num_completions=1,
            run_seed=0,
            sampling=SamplingConfig(),
            greedy=True,
            max_tokens=1,
            future=uncancellable(),
            num_scored=num_scored,
        )
        self._send(group)
        return group.future

    def update_weights(self, buffer: WeightBuffer, on_update: OnUpdate = "continue") -> int:
        """Takes new weights between two steps; every later token is theirs.

        Args:
            buffer: the weights that change, whole or in part; or a header, whose data the weight group brings.
            on_update: requests in flight "continue" with keys and values computed anew, are let to "finish" first,
                or "restart" from their prompts.

        Returns:
            The checksum of what arrived.

        Raises:
            WeightBufferError: the checksum is wrong; nothing was loaded and the engine goes on serving.
            EngineBrokenError: the load failed half-way.
        """
        if on_update not in ("continue", "finish", "restart"):
            raise ValueError(f"rollout.on_update: {on_update!r}, expected 'continue', 'finish' or 'restart'")
        update = WeightUpdate(buffer=buffer, on_update=on_update, future=uncancellable())
        self._send(update)
        return update.future.result()

    def join_weight_group(self, group: WeightGroup, rank_offset: int) -> None:
        """Joins a group for broadcasts, between two steps; returns when all of its ranks are there."""
        answered(self._send, lambda: self._core.join_weight_group(group, rank_offset))

    def stats(self) -> dict[str, float]:
        """The totals since the start (counters.py), and the work at hand."""
        with self._lock:
            return {
                **self._counters.read(),
                "num_running": len(self._in_flight),
                "num_waiting": sum(group.num_completions for group in self._waiting),
                "version": self.version,
            }

    def num_encoded(self) -> int:
        """Multimodal items that went through the encoders since the start."""
        return answered(self._send, lambda: self._core.num_encoded())

    def close(self) -> None:
        """Ends the loop and vLLM; groups not finished raise EngineBrokenError. May be called twice."""
        atexit.unregister(self.close)
        self._commands.put(None)
        self._thread.join()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, command: PendingGroup | WeightUpdate | Callable[[], None]) -> None:
        with self._lock:
            if self.broken is not None:
                raise EngineBrokenError(self.broken)
            self._commands.put(command)

    # The rest runs in the engine's thread.

    def _run(self, start: Callable[[], VllmCore], started: Future[None]) -> None:
        try:
            self._core = start()
        except BaseException as error:
            self.broken = f"the engine did not start: {error}"
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while not self._closing and self.broken is None:
                self._turn()
        except Exception as error:
            logger.exception("the rollout engine's loop failed")
            self._break(f"a step of the engine failed: {error!r}; start a new engine with the newest weights")
        finally:
            self._break("the engine was closed")
            self._core.close()

    def _turn(self) -> None:
        """Takes commands, then updates, then admits, then one step."""
        self._take_commands()
        self._apply_updates()
        if not self._updates:
            self._admit()
        if self._in_flight:
            start = time.perf_counter()
            for sampled in self._core.step():
                self._finish(sampled)
            self._counters.add(Totals(busy_s=time.perf_counter() - start))

    def _take_commands(self) -> None:
        """Empties the command queue; sleeps on it when there is nothing else to do."""
        # A wave that is not complete is no work: what completes it comes as a command.
        can_start = any(group.wave is None for group in self._waiting)
        has_work = bool(self._in_flight or can_start or self._updates)
        start = time.perf_counter()
        while True:
            try:
                command = self._commands.get(block=not has_work)
            except queue.Empty:
                return
            if not has_work:
                self._counters.add(Totals(idle_s=time.perf_counter() - start))
                has_work = True
            if command is None:
                self._closing = True
            elif isinstance(command, PendingGroup):
                self._waiting.append(command)
            elif isinstance(command, WeightUpdate):
                self._updates.append(command)
            else:
                command()

    def _admit(self) -> None:
        startable, waiting = startable_groups(self._waiting, self._excused)
        if not self._in_flight and any(group.wave is not None for group in startable):
            self._core.drop_caches()  # batches of a wave do not depend on what was asked before
        self._waiting = waiting
        for group in startable:
            try:
                group.rendered, group.item = self._core.render(group.prompt, group.item), None
                for index in group.indices:
                    self._start(Request(group=group, index=index))
            except Exception as error:  # what vLLM refuses is this group's fault alone
                self._withdraw(group)
                group.future.set_exception(error)

    def _start(self, request: Request) -> None:
        group = request.group
        request_id = str(self._next_request)
        self._next_request += 1
        seed = None if group.greedy else completion_seed(group.run_seed, group.group_id, request.index)
        request.marks = []
        request.internal_id = self._core.add(
            request_id, group.rendered, group.sampling, group.max_tokens, seed, with_prompt=group.num_scored > 0
        )
        self._in_flight[request_id] = request

    def _finish(self, sampled: SampledTokens) -> None:
        request = self._in_flight.pop(sampled.request_id)
        group = request.group
        if group.num_scored:
            assert sampled.prompt_logprobs is not None, "asked for with the request"
            group.future.set_result(sampled.prompt_logprobs[-group.num_scored :])
            return
        versions = np.full(len(sampled.token_ids), self.version, dtype=np.int32)
        for count, version in reversed(request.marks):
            versions[:count] = version
        group.completions[request.index] = Completion(
            completion_id=f"{group.group_id}/{request.index}",
            token_ids=sampled.token_ids,
            behaviour_logprobs=sampled.logprobs,
            policy_versions=versions,
            finish_reason=sampled.finish_reason,
        )
        self._counters.add(sampled.totals)
        if len(group.completions) == group.num_completions:
            ordered = tuple(group.completions[i] for i in group.indices)
            group.future.set_result(RolloutGroup(group_id=group.group_id, prompt=group.prompt, completions=ordered))

    def _apply_updates(self) -> None:
        while self._updates and self.broken is None:
            if self._updates[0].on_update == "finish" and self._in_flight:
                return
            update = self._updates.pop(0)
            try:
                update.future.set_result(self._update(update))
            except Exception as error:
                update.future.set_exception(error)

    def _update(self, update: WeightUpdate) -> int:
        """Verifies, loads, drops caches. Nothing is paused: this thread steps again only when it is through."""
        started = time.perf_counter()
        checksum = self._core.verify(update.buffer)
        restarted: list[Request] = []
        try:
            if update.on_update == "restart":
                restarted = self._withdraw()
            for request in self._in_flight.values():
                request.marks.append((self._core.num_generated(request.internal_id), self.version))
            loading = time.perf_counter()
            self._core.load(update.buffer)
            loaded_s = time.perf_counter() - loading
            self._core.drop_caches()
            self.version = update.buffer.version
            for request in restarted:
                self._start(request)
        except Exception as error:
            self._break(
                f"loading weights of version {update.buffer.version} failed half-way: {error!r}; "
                "start a new engine with the newest weights",
                also=restarted,
            )
            raise EngineBrokenError(self.broken) from error
        self._counters.add(Totals(num_updates=1, update_s=time.perf_counter() - started, load_s=loaded_s))
        return checksum

    def _withdraw(self, group: PendingGroup | None = None) -> list[Request]:
        """Takes every request, or those of one group, out of vLLM."""
        ids = [name for name, request in self._in_flight.items() if group is None or request.group is group]
        self._core.abort(ids)
        return [self._in_flight.pop(name) for name in ids]

    def _break(self, reason: str, also: list[Request] | None = None) -> None:
        """Serves no more: everything at hand and everything to come raises EngineBrokenError."""
        with self._lock:
            self.broken = self.broken or reason
        for command in drained(self._commands):
            if isinstance(command, PendingGroup):
                self._waiting.append(command)
            elif isinstance(command, WeightUpdate):
                self._updates.append(command)
        groups = [request.group for request in (*self._in_flight.values(), *(also or ()))]
        futures = [each.future for each in (*groups, *self._waiting, *self._updates)]
        for each in (self._in_flight, self._waiting, self._updates):
            each.clear()
        for future in futures:
            if not future.done():
                future.set_exception(EngineBrokenError(self.broken))
