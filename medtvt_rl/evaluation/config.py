"""Settings of the held-out evaluation. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvaluationConfig:
    """Held-out evaluation by the rollout generators.

    Attributes:
        num_generators: rollout generators that answer, where no learner needs the machine; 0: as many as in training.
        num_samples: answers sampled per study at the training temperature; one greedy answer is added.
        max_studies: 0 takes the whole split.
        bootstrap_resamples: of patients, for the 95 % intervals.
        ablations: repeat the greedy evaluation with each modality withheld.
    """

    split: str = "test"
    num_generators: int = 0
    num_samples: int = 4
    max_studies: int = 0
    bootstrap_resamples: int = 2000
    ablations: bool = True
