"""Advantages, importance weights, losses and their gradients against TRL's own code, on the same random numbers.

A real trainer of TRL scores and computes its loss; replaced is only what needs a model: the completions, rewards and
log-probs are those of the test's batch. Where the two differ by convention, the arguments make them the same loss:
- `dapo` of TRL divides by the tokens of the optimizer step, as ours; its `bnpo` by those of the micro-batch, which is
  the same where there is one. `grpo` and `dr_grpo` of TRL are means over micro-batches, ours have the step's
  denominators: the same where the micro-batches hold equally many completions.
- `gspo` is TRL's `grpo` with importance_sampling_level "sequence".
- `cispo` clips at epsilon_high in TRL, at 1 + clip_high in ours; TRL has no lower bound: clip_low >= 1 in ours.
- TRL's truncation and masks may have a lower bound too (off by default), ours have none.
- TRL multiplies the KL term by policy / proximal unless use_bias_correction_kl is off; ours never does.
- TRL bounds no exponent, ours bounds log ratios to +-20, which this batch does not reach.
- For equal rewards, TRL has advantages of rounding noise / 1e-4, ours exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medtvt_rl.algorithm.advantages import group_advantages
from medtvt_rl.algorithm.config import ImportanceConfig, KlConfig, LossConfig
from medtvt_rl.algorithm.importance import importance_weights
from medtvt_rl.algorithm.losses import Denominators, LossInputs, policy_loss

GROUP_SIZE, MAX_NEW_TOKENS, CAP = 4, 9, 1.25
LENGTHS = (7, 1, 5, 3, 6, 7, 2, 4)
# The last group is equal but for one completion; its deviation is small against the epsilon that is added to it.
REWARDS = (1.5, 0.25, 0.0, 0.75, 0.5, 0.5, 0.5, 0.501)
NONE = ImportanceConfig(mode="none")
WITHOUT_KL, WITH_KL = KlConfig(coefficient=0.0), KlConfig(coefficient=0.3)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Two groups of four; log-probs [8, 7] float64, rewards [8]."""

    policy: Tensor
    proximal: Tensor
    behaviour: Tensor
    reference: Tensor
    rewards: Tensor
    lengths: tuple[int, ...] = LENGTHS

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.policy.shape[1]) < torch.tensor(self.lengths)[:, None]


@pytest.fixture
def batch() -> Batch:
    """Log-probs around common ones, far enough apart that both bounds of every clip take effect."""
    generator = torch.Generator().manual_seed(11)
    base = -3 * torch.rand(len(LENGTHS), max(LENGTHS), generator=generator)

    def near(scale: float) -> Tensor:
        # Drawn in float32, because TRL keeps what the engine gave in float32; computed with in float64.
        return (base + scale * torch.randn(base.shape, generator=generator)).double()

    return Batch(
        policy=near(0.4),
        proximal=near(0.2),
        behaviour=near(0.3),
        reference=near(0.5),
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
    )


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's trainers with a batch in the place of the model."""
    with pytest.MonkeyPatch.context() as patch:
        # TRL would import vLLM, whose environment must be set before its first import in a process, and not by TRL.
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        import_utils = pytest.importorskip("trl.import_utils")
        patch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    class OfBatch:
        batch: Batch

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            lengths = self.batch.lengths
            behaviour = [row[:length].tolist() for row, length in zip(self.batch.behaviour, lengths)]
            ids = [[2] * length for length in lengths]
            prompt_ids, texts = [[2]] * len(lengths), ["x"] * len(lengths)
            if isinstance(self, RLOOTrainer):
                return prompt_ids, ids, texts
            return prompt_ids, ids, None, texts, behaviour, {}, None, None

        def _calculate_rewards(self, *args: Any) -> Tensor:
            return self.batch.rewards[:, None]

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            logprobs = model if isinstance(model, Tensor) else self.batch.proximal
            return logprobs, torch.zeros_like(logprobs), None

    class Grpo(OfBatch, GRPOTrainer):
        pass

    class Rloo(OfBatch, RLOOTrainer):
        pass

    return SimpleNamespace(grpo=(Grpo, partial(GRPOConfig, use_bias_correction_kl=False)), rloo=(Rloo, RLOOConfig))


def make_trainer(
    kind: tuple[type, type], batch: Batch, folder: Any, num_micro_batches: int = 1, **settings: Any
) -> Any:
    """A trainer as TRL sets it up, around a model of three words that is never called."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x"))
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer_class, config_class = kind
    trainer = trainer_class(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=3, **sizes)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config_class(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=len(batch.lengths) // num_micro_batches,
            gradient_accumulation_steps=num_micro_batches,
            steps_per_generation=num_micro_batches,
            num_generations=GROUP_SIZE,
            num_iterations=2,  # else TRL takes policy for proximal
            max_completion_length=MAX_NEW_TOKENS,
            beta=0.0,  # a reference model would be loaded from a folder; it is given below
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.batch, trainer.ref_model = batch, batch.reference
    trainer.current_gradient_accumulation_steps = num_micro_batches
    trainer.model.train()
    return trainer


def scored(trainer: Any, *, beta: float = 0.0, importance: bool = False) -> dict[str, Tensor]:
    """The batch as TRL hands it to its loss: with advantages, and importance weights where it has them."""
    trainer.beta, trainer.use_vllm = beta, importance
    return trainer._generate_and_score_completions([{"prompt": "x"} for _ in trainer.batch.lengths])


def loss_of_trl(trainer: Any, inputs: dict[str, Tensor], num_micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    """The loss of the optimizer step and its gradient by policy log-probs."""
    policy = trainer.batch.policy.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(policy)).chunk(num_micro_batches):
        part = {name: value[rows] if value.ndim else value for name, value in inputs.items()}
        total = total + trainer.compute_loss(policy[rows], part)
    total.backward()
    return total.detach(), policy.grad


def our_loss(batch: Batch, advantages: Tensor, config: LossConfig, num_micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    """The same from the code under test."""
    policy = batch.policy.clone().requires_grad_()
    denominators = Denominators(
        num_sequences=len(batch.lengths), num_tokens=sum(batch.lengths), max_new_tokens=MAX_NEW_TOKENS
    )
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(policy)).chunk(num_micro_batches):
        inputs = LossInputs(
            policy_logprobs=policy[rows],
            proximal_logprobs=batch.proximal[rows],
            behaviour_logprobs=batch.behaviour[rows],
            reference_logprobs=batch.reference[rows],
            advantages=advantages[rows],
            mask=batch.mask[rows],
        )
        total = total + policy_loss(inputs, config, denominators)[0]
    total.backward()
    return total.detach(), policy.grad


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Both are float64, apart from our advantages; the absolute tolerance is for what is 0 on one side."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "trainer", "settings"),
    [
        ("group", "grpo", {"scale_rewards": "group"}),
        ("mean_only", "grpo", {"scale_rewards": "none"}),
        ("rloo", "rloo", {"normalize_advantages": False}),
    ],
)
def test_advantages(trl, batch, tmp_path, kind, trainer, settings):
    theirs = scored(make_trainer(getattr(trl, trainer), batch, tmp_path, **settings))["advantages"]
    ours = [group_advantages(rewards, kind) for rewards in batch.rewards.view(-1, GROUP_SIZE).numpy()]
    same(torch.from_numpy(np.concatenate(ours)).double(), theirs, rtol=1e-6)


# Ours, and what TRL calls it.
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
HIGHER = {"epsilon": 0.2, "epsilon_high": 0.28}
LOSSES = {
    "grpo": (LossConfig(kind="grpo"), {"loss_type": "grpo", **CLIP}),
    "dr_grpo": (LossConfig(kind="dr_grpo"), {"loss_type": "dr_grpo", **CLIP}),
    "dapo": (LossConfig(kind="dapo"), {"loss_type": "dapo", **CLIP}),
    "dapo as bnpo": (LossConfig(kind="dapo"), {"loss_type": "bnpo", **CLIP}),
    "clip-higher": (LossConfig(kind="dapo", clip_high=0.28), {"loss_type": "dapo", **HIGHER}),
    "gspo": (
        LossConfig(kind="gspo", clip_low=0.05, clip_high=0.08),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    ),
    "cispo": (LossConfig(kind="cispo", clip_low=1.0, clip_high=0.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
}


def same_loss(
    batch: Batch, trainer: Any, inputs: dict[str, Tensor], config: LossConfig, num_micro_batches: int
) -> None:
    """Loss and gradient agree, on the advantages that TRL computed."""
    theirs = loss_of_trl(trainer, inputs, num_micro_batches)
    ours = our_loss(batch, inputs["advantages"], config, num_micro_batches)
    for found, expected in zip(ours, theirs, strict=True):
        assert float(expected.abs().max()) > 1e-4
        same(found, expected)


@pytest.mark.parametrize("kl", [WITHOUT_KL, WITH_KL], ids=["no KL", "k3"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(trl, batch, tmp_path, name, kl):
    config, settings = LOSSES[name]
    trainer = make_trainer(trl.grpo, batch, tmp_path, **settings)
    same_loss(batch, trainer, scored(trainer, beta=kl.coefficient), replace(config, kl=kl, importance=NONE), 1)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_two_micro_batches_are_one_step(trl, batch, tmp_path, name):
    config, settings = LOSSES[name]
    trainer = make_trainer(trl.grpo, batch, tmp_path, num_micro_batches=2, **settings)
    inputs = scored(trainer, beta=WITH_KL.coefficient)
    same_loss(batch, trainer, inputs, replace(config, kl=WITH_KL, importance=NONE), 2)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "suffix"), [("truncated", "truncate"), ("masked", "mask")])
def test_importance_weights_and_the_losses_they_weigh(trl, batch, tmp_path, mode, suffix, level, name):
    config, settings = LOSSES[name]
    importance = ImportanceConfig(mode=mode, level=level, cap=CAP)
    corrected = {
        "vllm_importance_sampling_mode": f"{level}_{suffix}",
        "vllm_importance_sampling_clip_max": CAP,
    }
    trainer = make_trainer(trl.grpo, batch, tmp_path, **corrected, **settings)
    inputs = scored(trainer, beta=WITH_KL.coefficient, importance=True)
    weights, cut = importance_weights(batch.proximal, batch.behaviour, batch.mask, importance)
    assert 0 < int(cut.sum()) < int(batch.mask.sum()), "some are cut, and some are not"
    # TRL has one column for a sequence at that level, and 1 at padding.
    same(weights, inputs["importance_sampling_ratio"] * batch.mask)
    same_loss(batch, trainer, inputs, replace(config, kl=WITH_KL, importance=importance), 1)


def test_equal_rewards_leave_the_k3_term_alone(trl, batch, tmp_path):
    equal = replace(batch, rewards=torch.full((len(LENGTHS),), 0.5, dtype=torch.float64))
    trainer = make_trainer(trl.grpo, equal, tmp_path, loss_type="dapo")
    inputs = scored(trainer, beta=1.0)
    assert not inputs["advantages"].any()
    config = LossConfig(kind="dapo", kl=KlConfig(coefficient=1.0), importance=NONE)
    same_loss(equal, trainer, inputs, config, 1)


def test_the_bounds_of_every_clip_take_effect(batch):
    log_ratio = (batch.policy - batch.proximal) * batch.mask
    token, sequence = log_ratio.exp()[batch.mask], (log_ratio.sum(1) / batch.mask.sum(1)).exp()
    assert (token < 0.8).any() and (token > 1.3).any() and ((token > 0.8) & (token < 1.2)).any()
    assert (sequence < 0.95).any() and (sequence > 1.08).any() and ((sequence > 0.95) & (sequence < 1.08)).any()
