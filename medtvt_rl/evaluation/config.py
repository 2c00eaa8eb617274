"""Settings of the held-out evaluation and of the alarms during training. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class EvaluationConfig:
    """Held-out evaluation by the rollout generators.

    Attributes:
        num_generators: rollout generators that answer, where no learner needs the machine; 0: as many as in training.
            `rollout.min` of them are enough to begin.
        num_samples: answers sampled per study at the training temperature; one greedy answer is added.
        max_studies: 0 takes the whole split.
        bootstrap_resamples: of patients, for the 95 % intervals.
        ablations: repeat the greedy evaluation with each modality withheld.
        metrics: what is shown first; `metrics=paper` on the command line is short for `evaluation.metrics=paper`.
            "honest" counts an answer that breaks the format as wrong; "paper" is the published evaluation, and adds its
            comparison of texts. A finished evaluation is judged anew from its answers when this, bootstrap_resamples or
            what BERTScore uses has changed.
        bertscore_model: a name in the Hugging Face cache, or a folder; nothing is downloaded.
        bertscore_layer: which of its layers is compared.
    """

    metrics: Literal["honest", "paper"] = "honest"
    split: str = "test"
    num_generators: int = 0
    num_samples: int = 4
    max_studies: int = 0
    bootstrap_resamples: int = 2000
    ablations: bool = True
    bertscore_model: str = "roberta-large"
    bertscore_layer: int = 17


@dataclass
class AlarmConfig:
    """When a training run is called sick. An infinite upper threshold, or a lower one of 0, silences its sign.

    Attributes:
        first_steps: steps whose mean is what entropy and length are compared with; also how many values of a reward,
            at first and of late, its rise is judged by.
        max_ratio_p99: 99th percentile of the importance ratio proximal / behaviour before truncation.
        min_ess_share: effective sample size of the importance weights, as a share of their number.
        min_entropy_share: of the mean entropy of the first steps.
        max_equal_share, equal_steps: share of groups whose advantages are all 0, those that dynamic sampling replaced
            among them, and for how many steps in a row.
        max_length_factor: mean length of a completion, times that of the first steps.
        max_cut_share: completions that ended at the length limit.
        max_sync_gap: largest log-prob difference of engine and learner after a sync, and mean difference of the tokens
            that the newest version sampled; for float32, which differs by about 1e-5. With bfloat16 on either side
            about 0.1.
        max_fall: of held-out Jaccard or findings F1 below their best, while a reward rose since; of means of
            held_out_window measurements, and sqrt(held_out_window / n) times as much of means of n.
        max_findings_fall: of the F1 of the findings named below its best, whatever the reward did.
        held_out_window: held-out scores are compared by means of a quarter of their measurements, at most so many: a
            single one, of 50 prompts, moves by 0.02 to 0.03 by chance.
        noise_deviations: a reward has risen if its mean did by so many standard errors.
    """

    first_steps: int = 10
    max_ratio_p99: float = 2.0
    min_ess_share: float = 0.5
    min_entropy_share: float = 0.3
    max_equal_share: float = 0.8
    equal_steps: int = 5
    max_length_factor: float = 2.0
    max_cut_share: float = 0.3
    max_sync_gap: float = 1e-4
    max_fall: float = 0.05
    max_findings_fall: float = 0.1
    held_out_window: int = 5
    noise_deviations: float = 2.0
