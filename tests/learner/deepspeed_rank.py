"""One rank of the DeepSpeed tests, run as a process: `python deepspeed_rank.py RANK WORLD_SIZE PORT FOLDER`.

Runs every scenario once and writes results_RANK.pt; the tests read it. One start of DeepSpeed serves them all.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_llama import tiny_llama
from tiny_policy import STEEP, VOCABULARY, SteepPolicy, TinyItems, make_sequences

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.algorithm.packing import balanced_shards
from medtvt_rl.config import Config
from medtvt_rl.learner import process_group
from medtvt_rl.learner.training_state import rank_file
from medtvt_rl.model.policy import TextPolicy
from medtvt_rl.types import LearnerStep, TrainingSequence

NUM_SEQUENCES, TOKEN_BUDGET, LEARNING_RATE, VERSION = 11, 20, 1e-2, 3


def config() -> Config:
    """A token budget so small that the two ranks run several micro-batches, and not equally many of their own."""
    config = Config()
    config.learner.token_budget = TOKEN_BUDGET
    return config


def denominators(sequences: list[TrainingSequence]) -> Denominators:
    """Over the whole batch."""
    tokens = sum(len(s.completion.token_ids) for s in sequences)
    return Denominators(num_sequences=len(sequences), num_tokens=tokens, max_new_tokens=16)


def broken(sequence: TrainingSequence, cause: str) -> TrainingSequence:
    """The same sequence with an advantage of NaN, so that its loss is not finite, or with a gradient that is not."""
    if cause == "advantage":
        return dataclasses.replace(sequence, advantage=math.nan)
    token_ids = np.array([STEEP, *sequence.prompt.token_ids[1:]], dtype=np.int32)
    return dataclasses.replace(sequence, prompt=dataclasses.replace(sequence.prompt, token_ids=token_ids))


def shared_policy() -> TextPolicy:
    """A Llama, whose prompts are run once."""
    return TextPolicy(tiny_llama(VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True)).eval()


def text_sequences() -> list[TrainingSequence]:
    """Plain text; completions of odd groups have one token, which the prompt alone predicts."""
    sequences = []
    for s in make_sequences(NUM_SEQUENCES):
        assert s.reference_logprobs is not None
        end = 1 if s.group_id % 2 else None
        completion = dataclasses.replace(
            s.completion,
            token_ids=s.completion.token_ids[:end],
            behaviour_logprobs=s.completion.behaviour_logprobs[:end],
            policy_versions=s.completion.policy_versions[:end],
        )
        prompt = dataclasses.replace(s.prompt, item_id=None)
        reference = s.reference_logprobs[:end]
        sequences.append(dataclasses.replace(s, prompt=prompt, completion=completion, reference_logprobs=reference))
    return sequences


class Rank:
    """Makes learners and runs scenarios on this rank."""

    def __init__(self, rank: int, world_size: int, folder: Path, device: torch.device) -> None:
        self._rank, self._folder, self._device = rank, folder, device
        self._sequences = make_sequences(NUM_SEQUENCES)
        lengths = [len(s.completion.token_ids) for s in self._sequences]
        pairs = [lengths[i : i + 2] for i in range(0, NUM_SEQUENCES, 2)]
        self._shards = [[2 * g + i for g, i in shard] for shard in balanced_shards(pairs, world_size)]

    def learner(self, stage: int, dtype: torch.dtype = torch.float32) -> Any:
        from medtvt_rl.learner.deepspeed_engine import DeepSpeedEngine, EngineSettings
        from medtvt_rl.learner.grpo_learner import GrpoLearner

        settings = EngineSettings(zero_stage=stage, dtype=dtype, weight_decay=0.1)
        return GrpoLearner(DeepSpeedEngine(SteepPolicy(), settings, self._device), TinyItems(), config())

    def shared_prompts(self, stage: int) -> dict[str, Any]:
        """A Llama; this rank's completions of even groups, or those of odd ones, which have one token each."""
        from medtvt_rl.learner.deepspeed_engine import DeepSpeedEngine, EngineSettings
        from medtvt_rl.learner.grpo_learner import GrpoLearner

        engine = DeepSpeedEngine(shared_policy(), EngineSettings(zero_stage=stage, weight_decay=0.1), self._device)
        learner, sequences = GrpoLearner(engine, None, config()), text_sequences()
        own = [s for s in sequences if s.group_id % 2 == self._rank]
        metrics = [learner.train_step(own, denominators(sequences), LEARNING_RATE, VERSION).metrics for _ in range(2)]
        return {"metrics": metrics, "weights": self.weights(learner)}

    def train(self, learner: Any, cause: str | None = None) -> LearnerStep:
        """A step; a cause breaks the first sequence of rank 1, and no other."""
        own = [self._sequences[i] for i in self._shards[self._rank]]
        if cause is not None and self._rank == 1:
            own[0] = broken(own[0], cause)
        return learner.train_step(own, denominators(self._sequences), LEARNING_RATE, VERSION)

    def weights(self, learner: Any) -> dict[str, torch.Tensor]:
        with learner.engine.gathered(learner.engine.policy.parameters()):
            return {k: v.detach().clone() for k, v in learner.engine.policy.named_parameters()}

    def agreement(self, stage: int, dtype: torch.dtype) -> dict[str, Any]:
        learner = self.learner(stage, dtype)
        metrics = [self.train(learner).metrics for _ in range(2)]
        exported = learner.export(7)
        names = None if exported is None else {name: tensor.clone() for name, tensor in exported.tensors()}
        return {"metrics": metrics, "weights": self.weights(learner), "exported": names}

    def not_finite(self, stage: int, dtype: torch.dtype, cause: str) -> dict[str, Any]:
        """A good step, one that is broken, and a good one again."""
        learner = self.learner(stage, dtype)
        self.train(learner)
        before = self.weights(learner)
        step = self.train(learner, cause)
        after = self.weights(learner)
        group_id = self._sequences[self._shards[1][0]].group_id
        again = self.train(learner)
        return {
            "broken": group_id,
            "before": before,
            "step": step,
            "after": after,
            "next": again,
            "last": self.weights(learner),
        }

    def resume(self, stage: int, dtype: torch.dtype) -> dict[str, Any]:
        """Two steps, of which the second is repeated by learners that load the first: one of the same stage, and one of
        another."""
        learner, folder = self.learner(stage, dtype), self._folder / f"checkpoint_{stage}_{dtype}"
        self.train(learner)
        learner.state(copy=True).write(rank_file(folder, self._rank))
        torch.distributed.barrier()
        drawn = (torch.rand(3), np.random.rand(3), random.random())
        self.train(learner)
        found: dict[str, Any] = {"straight": self.weights(learner), "drawn": drawn}
        for name, other in (("resumed", stage), ("crossed", (stage + 1) % 4)):
            fresh = self.learner(other, dtype)
            fresh.load_checkpoint(folder)
            if name == "resumed":
                found["redrawn"] = (torch.rand(3), np.random.rand(3), random.random())
                found["held"] = self.weights(fresh)
            self.train(fresh)
            found[name] = self.weights(fresh)
        return found

    def of_one_rank(self) -> dict[str, torch.Tensor]:
        """Goes on from what a gang of one wrote, see test_deepspeed_engine."""
        learner = self.learner(2)
        learner.load_checkpoint(self._folder / "one_rank")
        self.train(learner)
        return self.weights(learner)


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    process_group.prepare_environment(num_threads=1)
    meeting = process_group.Rendezvous(rank=rank, world_size=world_size, address="127.0.0.1", port=port, timeout_s=60)
    this = Rank(rank, world_size, folder, process_group.join(meeting))
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        results[f"float32-{stage}"] = this.agreement(stage, torch.float32)
        results[f"shared-prompts-{stage}"] = this.shared_prompts(stage)
    results["bfloat16-2"] = this.agreement(2, torch.bfloat16)
    for name in ("float32-0", "float32-1", "float32-2", "float32-3", "bfloat16-2"):
        dtype, stage = getattr(torch, name[:-2]), int(name[-1])
        for cause in ("advantage", "gradient"):
            results[f"{cause}-{name}"] = this.not_finite(stage, dtype, cause)
    for stage in (0, 1, 2, 3):
        results[f"resume-float32-{stage}"] = this.resume(stage, torch.float32)
    results["resume-bfloat16-2"] = this.resume(2, torch.bfloat16)
    results["of-one-rank"] = this.of_one_rank()
    torch.save(results, folder / f"results_{rank}.pt")
    process_group.leave()


if __name__ == "__main__":
    main()
