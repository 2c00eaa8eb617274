"""The evidence reward: whether the findings that the reasoning names are those of the study.

Owns: which findings a completion names, which a study has, and their F1 for one completion; evaluation/diagnosis.py
takes the first two from here. Does not own: the vocabulary and how a text names a finding (data/labels.py), the labels
themselves (data/study_store.py).
This project's own, not from a paper: beside a reward for the answer alone, it keeps the answers from rising while the
reasoning rots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medtvt_rl.data.labels import ALL_FINDINGS, named_findings
from medtvt_rl.privacy import hashed
from medtvt_rl.rewards.answer import ParsedAnswer, parse_answer
from medtvt_rl.rewards.overlap import confusion_counts, micro_f1


def asserted_findings(answer: ParsedAnswer | None) -> frozenset[str]:
    """The findings that the reasoning of an answer names; none for a completion that breaks the format."""
    return frozenset(named_findings(answer.reasoning)) if answer else frozenset()


def labelled_findings(findings: Mapping[str, bool] | None) -> frozenset[str]:
    """The findings that a study has; none where they are unknown."""
    return frozenset(key for key, there in (findings or {}).items() if there)


def evidence_reward(completion: str, ground_truth: str, *, evidence: Mapping[str, Any] | None) -> float:
    """F1 of the findings named in the reasoning against those of the study, all modalities together, 0 to 1.

    A completion that breaks the format earns 0. A modality that was not taken shows no finding, so one named in it is
    invented, and wrong. Where the study has no finding and none is named, the two agree: 1. The answer and the ground
    truth are not looked at.

    Args:
        evidence: {"study_id": str, "findings": {finding: bool} or None}, as the prompts of data/task.py carry it.

    Raises:
        ValueError: no evidence, or a study whose findings are unknown; its completions count as failed.
    """
    if evidence is None or "findings" not in evidence:
        raise ValueError(
            "evidence: the prompt carries no findings; use this reward with prompts of medtvt_rl.data.task, "
            "or leave it out"
        )
    if evidence["findings"] is None:
        raise ValueError(
            f"{hashed(str(evidence.get('study_id')))}: its findings are unknown; add it to data.findings_csv, "
            "or leave this reward out"
        )
    answer = parse_answer(completion)
    if answer is None:
        return 0.0
    counts = confusion_counts([asserted_findings(answer)], [labelled_findings(evidence["findings"])], ALL_FINDINGS)
    f1 = float(micro_f1(counts.reshape(-1)))
    return 1.0 if np.isnan(f1) else f1
