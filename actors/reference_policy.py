"""The actor of the frozen reference policy: sets up its process and scores groups.

Owns: one frozen policy on one thread. Does not own: the log-prob computation (medtvt_rl/learner/scoring.py), or which
groups it gets.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.process import Whereabouts, whereabouts
from medtvt_rl.config import Config
from medtvt_rl.logs import redirect_output
from medtvt_rl.privacy import open_for
from medtvt_rl.types import ReferenceHeader, RolloutGroup
from medtvt_rl.user_code import task_items


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class ReferencePolicy:
    """Holds the policy of `model_folder` as it is; it never learns."""

    def __init__(self, model_folder: str, config: Config, index: int = 0) -> None:
        redirect_output(config.folder / "logs" / f"reference_{index}.log")
        open_for(config.privacy, config.folder)
        import torch

        from medtvt_rl.learner.process_group import check_gpu, training_device
        from medtvt_rl.model.policy import load_policy

        torch.set_num_threads(config.learner.num_threads)
        check_gpu("reference", config.placement.reference.gpus)
        # First, since importing the task may make its model known to transformers.
        self._items = task_items(config)
        policy: Any = load_policy(model_folder, dtype=getattr(torch, config.learner.dtype))
        self._policy = policy.requires_grad_(False).to(training_device())
        self._config = config

    def ready(self) -> Whereabouts:
        """Where it runs, when the policy is loaded: a call waits for the constructor."""
        return whereabouts()

    @ray.method(concurrency_group="health")
    def health(self) -> None:
        """Answers also while a group is scored."""

    @ray.method(num_returns=2)
    def logprobs(self, group: RolloutGroup) -> tuple[ReferenceHeader, tuple[NDArray[np.float32], ...]]:
        """The group under the frozen policy, at the sampling temperature: a header for the driver; the log-probs of
        each completion's tokens [T] float32, for the object store.
        """
        started = time.perf_counter()
        from medtvt_rl.algorithm.kl import sequence_kl
        from medtvt_rl.learner.scoring import ScoredSequence, score_sequences

        sequences = [
            ScoredSequence(prompt_ids=group.prompt.token_ids, completion_ids=c.token_ids, item_id=group.prompt.item_id)
            for c in group.completions
        ]
        scored = score_sequences(
            self._policy,
            sequences,
            self._items,
            self._config.rollout.sampling.temperature,
            self._config.learner.token_budget,
        )
        logprobs = tuple(values.float().cpu().numpy() for values in scored)
        estimator = self._config.grpo.loss.kl.estimator
        kl = [sequence_kl(c.behaviour_logprobs, values, estimator) for c, values in zip(group.completions, logprobs)]
        finite = all(bool(np.isfinite(values).all()) for values in logprobs)
        seconds = time.perf_counter() - started
        header = ReferenceHeader(kl=np.array(kl, dtype=np.float32), seconds=seconds, finite=finite)
        return header, logprobs
