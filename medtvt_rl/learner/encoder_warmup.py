"""Short supervised training of fresh modality encoders on findings, in place of pre-trained ones.

Owns: the classification heads (thrown away afterwards), the steps, and the validation AUC of each finding. Does not
own: the encoders (model/), the labels (study store). Each encoder is trained on one rank and then sent to all, so
that BatchNorm sees whole batches and ranks work side by side. Training is in float32, whatever the encoders are kept
in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medtvt_rl.data.labels import FINDINGS
from medtvt_rl.learner.config import EncoderWarmupConfig
from medtvt_rl.learner.schedule import warmup_cosine
from medtvt_rl.learner.scoring import ItemSource
from medtvt_rl.types import MODALITIES

WEIGHT_DECAY, WARMUP_SHARE = 0.01, 0.05
EVALUATION_BATCH = 128


class FindingsSource(Protocol):
    """What the warm-up needs of a study store."""

    def study_ids(self, split: str) -> list[str]: ...
    def findings(self, study_id: str) -> Mapping[str, bool] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """Studies in which a modality is present and its findings are known; labels [N, findings] float32."""

    study_ids: Sequence[str]
    labels: NDArray[np.float32]


class EncoderWarmup:
    """Trains the three encoders of a study tower in place.

    Args:
        tower: has `encoders`, in the order of MODALITIES, each with `num_features`.
        on_step: told (modality, steps done, steps in all) on the rank that trains it.
    """

    def __init__(
        self,
        tower: Any,
        items: ItemSource,
        findings: FindingsSource,
        config: EncoderWarmupConfig,
        seed: int,
        device: torch.device,
        on_step: Callable[[str, int, int], None],
    ) -> None:
        self._tower, self._items, self._findings = tower, items, findings
        self._config, self._seed, self._device, self._on_step = config, seed, device, on_step
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def run(self) -> dict[str, float]:
        """Trains each encoder on the rank that owns it; returns the validation AUC of each finding, equal on all ranks.

        A finding that all or none of the validation studies show has no AUC and is left out.
        """
        found: dict[str, float] = {}
        for index, (modality, encoder) in enumerate(zip(MODALITIES, self._tower.encoders)):
            steps = int(getattr(self._config, f"{modality}_steps"))
            if steps > 0 and index % self._world_size == self._rank:
                found |= self._train(modality, encoder.to(self._device), steps)
        if self._world_size > 1:
            for index, encoder in enumerate(self._tower.encoders):
                self._send(encoder.to(self._device), index % self._world_size)
            names = [f"auc/{name}" for modality in MODALITIES for name in FINDINGS[modality]]
            values = torch.tensor([found.get(name, -1.0) for name in names], dtype=torch.float64, device=self._device)
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
            found = {name: value for name, value in zip(names, values.tolist()) if value >= 0}
        return found

    def _train(self, modality: str, encoder: nn.Module, steps: int) -> dict[str, float]:
        train, held_out = self._labelled("train", modality), self._labelled("validation", modality)
        generator = np.random.default_rng((self._seed, MODALITIES.index(modality)))
        with torch.random.fork_rng([]):
            torch.manual_seed(self._seed)
            head = nn.Linear(int(encoder.num_features), len(FINDINGS[modality])).to(self._device)  # type: ignore[arg-type]
        kept_dtype = next(encoder.parameters()).dtype
        encoder.float().requires_grad_(True).train()
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=WEIGHT_DECAY)
        for step in range(steps):
            rate = warmup_cosine(step, steps, self._config.learning_rate, int(WARMUP_SHARE * steps), 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = generator.choice(
                len(train.study_ids), min(self._config.batch_size, len(train.study_ids)), replace=False
            )
            logits = head(encoder(self._inputs(modality, [train.study_ids[i] for i in rows])))
            loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(train.labels[rows]).to(self._device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self._on_step(modality, step + 1, steps)
        encoder.eval()
        aucs = self._aucs(modality, nn.Sequential(encoder, head), held_out)
        encoder.to(kept_dtype)
        return aucs

    def _labelled(self, split: str, modality: str) -> _Labelled:
        """Raises ValueError where the training split has no such study."""
        place, names = MODALITIES.index(modality), FINDINGS[modality]
        study_ids, labels = [], []
        for study_id in self._findings.study_ids(split):
            findings = self._findings.findings(study_id)
            if findings is not None and self._items.get(study_id)["present"][place]:
                study_ids.append(study_id)
                labels.append([float(findings[name]) for name in names])
        if split == "train" and not study_ids:
            raise ValueError(
                f"encoders.{modality}_steps: no training study has known {modality} findings; name their table in "
                f"data.findings_csv, or set encoders.{modality}_steps=0"
            )
        return _Labelled(study_ids=study_ids, labels=np.array(labels, dtype=np.float32).reshape(-1, len(names)))

    def _inputs(self, modality: str, study_ids: Sequence[str]) -> Tensor:
        values = np.stack([self._items.get(study_id)[modality] for study_id in study_ids])
        return torch.from_numpy(values).to(self._device)

    @torch.no_grad()
    def _aucs(self, modality: str, classifier: nn.Module, held_out: _Labelled) -> dict[str, float]:
        ids = held_out.study_ids
        parts = [
            classifier(self._inputs(modality, ids[i : i + EVALUATION_BATCH])).cpu().numpy()
            for i in range(0, len(ids), EVALUATION_BATCH)
        ]
        if not parts:
            return {}
        scores, labels = np.concatenate(parts), held_out.labels
        return {
            f"auc/{name}": area_under_curve(labels[:, column] > 0, scores[:, column])
            for column, name in enumerate(FINDINGS[modality])
            if 0 < labels[:, column].sum() < len(labels)
        }

    @staticmethod
    def _send(encoder: nn.Module, source: int) -> None:
        """Makes every rank's encoder, with its BatchNorm statistics, that of `source`."""
        for tensor in encoder.state_dict().values():
            dist.broadcast(tensor, src=source)


def area_under_curve(truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> float:
    """The share of pairs of a true and a false one that the scores put in order, ties counting a half [N], [N]: the
    area under the ROC curve (Hanley and McNeil, Radiology 1982)."""
    from scipy.stats import mannwhitneyu  # half a second, for the one rank that warms an encoder

    statistic = mannwhitneyu(scores[truth], scores[~truth]).statistic
    return float(statistic / (truth.sum() * (~truth).sum()))
