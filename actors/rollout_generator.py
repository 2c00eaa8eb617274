"""The rollout generator: a thin asynchronous Ray actor around one rollout engine.

Owns: process set-up, reading the items of prompts on its own node, and the calls that the driver makes.
Does not own: generation and weight loading (medtvt_rl/rollout/engine.py), rewards, placement, deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.process import Whereabouts, has_room, import_ahead, whereabouts
from actors.run_folder import check_run_folder
from medtvt_rl.config import Config
from medtvt_rl.dotted import resolve
from medtvt_rl.logs import redirect_output
from medtvt_rl.privacy import hashed, open_for
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.rollout.engine import MakesAhead
from medtvt_rl.rollout.parts import join_group
from medtvt_rl.rollout.pending import Wave
from medtvt_rl.types import GroupHeader, Prompt, RolloutGroup
from medtvt_rl.user_code import task_items
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer

if TYPE_CHECKING:
    from medtvt_rl.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)
# Every group in flight holds one call; an engine has far fewer groups than this.
MAX_CALLS = 4096


@ray.remote(max_concurrency=MAX_CALLS)  # type: ignore[call-overload]
class RolloutGenerator:
    """One engine on one node.

    Args:
        model_folder: a Hugging Face folder with its tokenizer.
        config: of the run.
        index: of this generator among its kind.
        version: policy version of the weights in the folder.
    """

    def __init__(self, model_folder: str, config: Config, index: int, version: int = 0) -> None:
        redirect_output(config.folder / "logs" / f"rollout_{index}.log")
        open_for(config.privacy, config.folder)
        self._model_folder = model_folder
        self._config = config
        self._index = index
        self._first_version = version
        self._engine: RolloutEngine | None = None
        self._items: Any = None

    async def warm(self, devices: str | None, anyway: bool) -> bool:
        """Imports what `start` needs, and waits to be started; False, with nothing done, where the node is short of
        memory and it is not wanted `anyway`.

        On a CPU the engine is started, too, where there is memory for a second one; a GPU's is with the first."""
        if not anyway and not has_room():
            return False
        await asyncio.to_thread(import_ahead, (), devices, self._prepare)
        config = self._config
        if config.placement.rollout.gpus == 0 and has_room(config.rollout.engine.kv_cache_bytes):
            await asyncio.to_thread(self._start)
        return True

    async def start(self) -> Whereabouts:
        """Starts the engine, unless it is up already; where it runs. Raises what making it raises."""
        begin = time.perf_counter()
        await asyncio.to_thread(self._start)
        logger.info("the engine serves after %.1f s", time.perf_counter() - begin)
        return whereabouts()

    def _prepare(self) -> Any:
        """What makes the engine, with its imports done."""
        make_engine = resolve(self._config.rollout.make_engine, "rollout.make_engine")
        if isinstance(make_engine, MakesAhead):
            make_engine.prepare(self._config)
        return make_engine

    def _start(self) -> None:
        if self._engine is not None:
            return
        config = self._config
        check_run_folder(config.folder)
        # First: the usual one sets the environment up before anything imports torch.
        make_engine = self._prepare()
        # Then: importing the task may make its model known to transformers.
        self._items = task_items(config)
        self._engine = make_engine(self._model_folder, config, self._first_version)

    @ray.method(num_returns=2)
    async def generate(
        self,
        prompt: Prompt,
        group_id: int,
        num_completions: int,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        first_index: int = 0,
        wave: Wave | None = None,
    ) -> tuple[GroupHeader, RolloutGroup]:
        """G completions of one prompt: a small header for the driver, and the group, which stays here until asked for.

        Args:
            sampling: instead of the configuration's.
            first_index: of the first completion, where other generators make the rest of the group.
            wave: what it is to be started together with.

        Raises:
            ValueError: the prompt does not fit, or names an item without an item source.
            EngineBrokenError: the engine has to be replaced.
        """
        engine = self._running()
        begin = time.perf_counter()
        try:
            item = await asyncio.to_thread(self._item, prompt)
            settings = sampling or self._config.rollout.sampling
            seed = self._config.run.seed
            future = engine.submit(prompt, item, group_id, num_completions, seed, settings, greedy, first_index, wave)
        except Exception:
            if wave is not None:
                engine.excuse(wave)
            raise
        group = await asyncio.wrap_future(future)
        return GroupHeader.of(group, time.perf_counter() - begin, engine.version), group

    @ray.method(num_returns=2)
    async def merge(self, generate_s: float, *parts: RolloutGroup) -> tuple[GroupHeader, RolloutGroup]:
        """One group of parts that were made here and elsewhere, like `generate`; `generate_s` is of the slowest."""
        group = join_group(parts)
        return GroupHeader.of(group, generate_s, self._running().version), group

    async def score(self, group: RolloutGroup, index: int) -> NDArray[np.float32]:
        """Log-probs [T], at temperature 1 under the weights of now, of one completion of a group."""
        completion = group.completions[index]
        token_ids = np.concatenate([group.prompt.token_ids, completion.token_ids])
        item = await asyncio.to_thread(self._item, group.prompt)
        scored = self._running().score(replace(group.prompt, token_ids=token_ids), item, len(completion.token_ids))
        return await asyncio.wrap_future(scored)

    async def join_weight_group(self, group: WeightGroup, rank_offset: int) -> None:
        """Joins the learner and the other engines; returns when all are there. The first worker has rank_offset."""
        await asyncio.to_thread(self._running().join_weight_group, group, rank_offset)

    async def update_weights(self, buffer: WeightBuffer, version: int) -> int:
        """Takes new weights, those of a header from the weight group; the checksum of what arrived. See
        RolloutEngine.update_weights for what it raises.
        """
        if buffer.version != version:
            raise ValueError(
                f"version: {version} announced, but the buffer holds version {buffer.version}; publish again"
            )
        return await asyncio.to_thread(self._running().update_weights, buffer, self._config.rollout.on_update)

    async def health(self) -> dict[str, Any]:
        """Whether the engine serves, with which version, and if not why."""
        engine = self._engine
        broken = "not started" if engine is None else engine.broken
        version = self._first_version if engine is None else engine.version
        return {"index": self._index, "ok": broken is None, "broken": broken, "version": version}

    async def stats(self) -> dict[str, float]:
        """The engine's counters, see RolloutEngine.stats."""
        return self._running().stats()

    def _item(self, prompt: Prompt) -> Any:
        if prompt.item_id is None:
            return None
        if self._items is None:
            raise ValueError(
                f"prompt {hashed(prompt.prompt_id)}: names an item, but task.items is null; name an item source"
            )
        return self._items.get(prompt.item_id)

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError(f"rollout generator {self._index}: the engine is not running; call start first")
        return self._engine
