"""What a rollout generator asks of its engine, and the start of the usual one.

Owns: the Protocols. Does not own: vLLM (vllm_engine.py), or who calls (actors/rollout_generator.py).
"""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.rollout.build import check_build
from medtvt_rl.rollout.config import SamplingConfig
from medtvt_rl.rollout.pending import OnUpdate, Wave
from medtvt_rl.types import Prompt, RolloutGroup
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer

if TYPE_CHECKING:
    from medtvt_rl.config import Config

IMPORTS = (
    "vllm.engine.arg_utils",
    "vllm.platforms",
    "vllm.v1.engine.llm_engine",
    "medtvt_rl.rollout.vllm_engine",
    "medtvt_rl.model.vllm_model",
)


class RolloutEngine(Protocol):
    """Generates groups and takes new weights. Every method may be called from any thread at any time.

    An engine whose state is unknown sets `broken` and raises EngineBrokenError (rollout/pending.py) from then on, from
    its methods and from every future that it still owes: the generator is then replaced. Any other exception concerns
    one call; but one that raises in `update_weights` does not hold what it should, and is replaced, too.

    Attributes:
        version: policy version of the weights that it holds.
        broken: why it serves no more; None while it does.
    """

    version: int
    broken: str | None

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
        """Asks for completions first_index .. first_index + num_completions - 1 of a group.

        The text of completion i depends on the weights and on (run_seed, group_id, i) alone, up to rounding; see
        sampling.completion_seed. Log-probs are those of the distribution it was drawn from (temperature included),
        at 1 for a greedy group; each token carries the version that made it.

        Args:
            wave: begin when all `wave.size` members are here, or excused, in the order of their ids, and reuse nothing
                computed for earlier requests. An engine whose batches do not change results may ignore it.

        Raises:
            ValueError: the prompt does not fit, or a number is out of range.
        """

    def excuse(self, wave: Wave) -> None:
        """A member of the wave will not come."""

    def score(self, prompt: Prompt, item: dict[str, Any] | None, num_scored: int) -> Future[NDArray[np.float32]]:
        """Log-probs [num_scored], at temperature 1 under the weights of now, of the last tokens of a prompt."""

    def update_weights(self, buffer: WeightBuffer, on_update: OnUpdate) -> int:
        """Takes new weights (weights.unpack gives names and arrays), drops what it cached under the old ones; returns
        the checksum of what arrived.

        Raises:
            WeightBufferError: what arrived is damaged; nothing was loaded.
            EngineBrokenError: the load failed half-way.
        """

    def join_weight_group(self, group: WeightGroup, rank_offset: int) -> None:
        """Joins a broadcast group, with `weights.transport: nccl` only."""

    def stats(self) -> dict[str, float]:
        """Totals since the start: those of counters.Totals. A late engine whose totals stand still is taken to hang."""


@runtime_checkable
class MakesAhead(Protocol):
    """What `rollout.make_engine` names where it imports more than its own module does."""

    def prepare(self, config: Config) -> None:
        """Called before the engine is made: early in a process that waits to take the place of a lost one."""


class VllmMaker:
    """The default of `rollout.make_engine`."""

    def prepare(self, config: Config) -> None:
        """Imports vLLM, which is most of a start."""
        self._set_environment(config)
        for name in IMPORTS:
            importlib.import_module(name)

    def __call__(self, model_folder: str, config: Config, version: int) -> RolloutEngine:
        """The engine, serving. Raises what vLLM raises."""
        self._set_environment(config)
        from medtvt_rl.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model_folder,
            config.rollout.engine,
            version=version,
            item_modality=config.task.item_modality,
            by_broadcast=config.weights.transport == "nccl",
            tensor_parallel=config.rollout.tensor_parallel,
        )

    def _set_environment(self, config: Config) -> None:
        check_build(config.placement.rollout.gpus)
        from medtvt_rl.rollout.vllm_core import prepare_environment

        prepare_environment(config.rollout.engine.num_threads, cpu=config.placement.rollout.gpus == 0)


vllm_engine = VllmMaker()
