"""The records as the published evaluation reads them (https://arxiv.org/abs/2506.18512), for comparison only.

Owns: the published rules. Does not own: the comparison of texts, which is the other half of that evaluation
(text_metrics.py).
They differ from the default (honest.py) in four ways, all of which flatter or blur: an answer without
`<answer>...</answer>` is left out of every mean; names must be equal to the letter; precision, recall and F1 are means
over answers, whatever the disease; AUC is that of the answers' 0 and 1, all diseases in one pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.evaluation.bootstrap import Floats, Measure, mean_measure
from medtvt_rl.evaluation.metrics import f1_measures
from medtvt_rl.evaluation.records import NO_NAMES, StudyRecord
from medtvt_rl.rewards.answer import first_answer, split_names
from medtvt_rl.rewards.overlap import divide, membership


def paper_measures(records: Sequence[StudyRecord]) -> dict[str, Measure]:
    """precision, recall, f1 and auc of the greedy answers; f1_micro and f1_macro by the same rules.

    All are NaN where no answer is left.
    """
    named = [_published_names(record) for record in records]
    keep = np.array([names is not None for names in named])
    said = membership([names or NO_NAMES for names in named], DISEASES)
    true = membership([frozenset(record.diagnoses) for record in records], DISEASES)
    # [n, 7, 4]: true and false positives, misses, and what was rightly not named; an answer left out adds nothing.
    table = np.stack([said & true, said & ~true, ~said & true, ~said & ~true], axis=-1) * keep[:, None, None]
    table = table.astype(np.float64)
    micro, macro = f1_measures(table[..., :3])
    each = np.array([_of_one(names, frozenset(r.diagnoses)) for names, r in zip(named, records)])
    means = {name: mean_measure(each[:, i]) for i, name in enumerate(("precision", "recall", "f1"))}
    auc = Measure(rows=table.sum(axis=1), statistic=_auc_of_answers)
    return {**means, "auc": auc, "f1_micro": micro, "f1_macro": macro}


def num_dropped(records: Sequence[StudyRecord]) -> int:
    """How many answers the published evaluation leaves out."""
    return sum(_published_names(record) is None for record in records)


def _published_names(record: StudyRecord) -> frozenset[str] | None:
    """The names of the greedy answer as written; None where the published pattern finds no answer."""
    answer = first_answer(record.answers.greedy)
    return None if answer is None else frozenset(split_names(answer))


def _of_one(names: frozenset[str] | None, true: frozenset[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one answer, 0 where nothing was named or nothing is true; NaN for one left out."""
    if names is None:
        return np.nan, np.nan, np.nan
    hits = len(names & true)
    precision = hits / len(names) if names else 0.0
    recall = hits / len(true) if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def _auc_of_answers(sums: Floats) -> Floats:
    """[..., 4] hits, false alarms, misses, rightly not named -> area under the ROC curve of 0/1 answers, which is the
    mean of sensitivity and specificity; NaN where either is undefined."""
    hits, false_alarms, misses, rest = (sums[..., i] for i in range(4))
    return 0.5 * (divide(hits, hits + misses) + divide(rest, rest + false_alarms))
