"""What is known of a simulated split before its files are written, and what a layout makes of it.

Owns: the plan of a split, its questions and answers. Does not own: drawing a plan (cohort.py), the wording (texts.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.labs import PercentileTable
from medtvt_rl.data.simulate.texts import chain_of_evidence, question, section

Findings = dict[str, dict[str, bool] | None]
"""Findings by modality; None for the modality that is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One split before rendering.

    Attributes:
        ids: (study, patient) of each study.
        diseases: [N, 7] bool.
        labs: [N, 50] raw values, NaN where not measured.
        missing: per study the modality that is missing.
        seed: of the texts.
    """

    split: str
    ids: list[tuple[str, str]]
    diseases: NDArray[np.bool_]
    labs: NDArray[np.float64]
    missing: list[str | None]
    seed: tuple[int, ...]

    def names(self, index: int) -> frozenset[str]:
        """Diseases of one study."""
        return frozenset(name for name, has in zip(DISEASES, self.diseases[index]) if has)

    def dialogues(self, findings: Sequence[Findings]) -> Iterator[tuple[int, str, list[dict[str, str]]]]:
        """(index, kind, messages) of every question; a modality that is missing is not asked about."""
        rng = np.random.default_rng(self.seed)
        for index in range(len(self.ids)):
            answers = {m: section(rng, m, found) for m, found in findings[index].items() if found is not None}
            answers["diagnosis"] = chain_of_evidence(rng, findings[index], self.names(index))
            for kind, answer in answers.items():
                yield (
                    index,
                    kind,
                    [
                        {"role": "user", "content": question(rng, kind)},
                        {"role": "assistant", "content": answer},
                    ],
                )


class Layout(Protocol):
    """Names of files, and what is in them."""

    def paths(self, plan: Plan, index: int) -> dict[str, str]:
        """Paths of ECG (without suffix) and film below the cohort's folder; empty where the modality is missing."""

    def write(
        self, root: Path, plans: Sequence[Plan], findings: Sequence[Sequence[Findings]], table: PercentileTable
    ) -> None:
        """Writes tables and questions of all splits.

        Args:
            findings: of each plan, for each of its studies.
            table: of the training split.
        """
