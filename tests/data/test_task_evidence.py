"""What prompts carry of the findings, and what the evidence reward of a configuration makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from medtvt_rl.config import Config, load_config
from medtvt_rl.data.labels import ALL_FINDINGS, FINDINGS, PHRASES, SECTIONS
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.task import diagnosis_prompts, qa_prompts
from medtvt_rl.data.tokenizer import build_tokenizer
from medtvt_rl.privacy import hashed
from medtvt_rl.rewards.scorer import Scorer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def tokenizer(config: Config, store: StudyStore) -> PreTrainedTokenizerFast:
    return build_tokenizer(config, store)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """As `rewards.evidence` names it, and nothing else."""
    config = load_config(QUICKSTART, ["rewards.evidence.function=medtvt_rl.rewards.evidence:evidence_reward"])
    return Scorer({"evidence": config.rewards["evidence"]})


def texts(store: StudyStore, split: str) -> dict[str, str]:
    return {example.study_id: example.answer for example in store.qa(split, "diagnosis")}


def test_diagnosis_prompts_carry_the_findings_of_their_study(
    config: Config, store: StudyStore, tokenizer: PreTrainedTokenizerFast
) -> None:
    for prompt in diagnosis_prompts(config, tokenizer, "train"):
        assert prompt.evidence == {"study_id": prompt.item_id, "findings": store.findings(str(prompt.item_id))}
        assert set(prompt.evidence["findings"]) == set(ALL_FINDINGS)
    assert all(prompt.evidence is None for prompt in qa_prompts(config, tokenizer, "train", "ecg"))


def test_true_reasoning_earns_everything_and_anothers_less(
    config: Config, store: StudyStore, tokenizer: PreTrainedTokenizerFast, scorer: Scorer
) -> None:
    answers = texts(store, "train")
    crossed = []
    for prompt in diagnosis_prompts(config, tokenizer, "train"):
        rewards = scorer.score(list(answers.values()), prompt.ground_truth, prompt.evidence)
        assert rewards.reasons == (None,) * len(answers)
        own = list(answers).index(str(prompt.item_id))
        assert rewards.total[own] == 1.0, prompt.item_id
        crossed += [value for index, value in enumerate(rewards.total) if index != own]
    assert sum(crossed) / len(crossed) < 0.6


@pytest.mark.parametrize("modality", list(FINDINGS))
def test_an_invented_finding_lowers_it_even_where_the_modality_is_missing(
    modality: str, config: Config, store: StudyStore, tokenizer: PreTrainedTokenizerFast, scorer: Scorer
) -> None:
    answers, present = texts(store, "train"), set()
    for prompt in diagnosis_prompts(config, tokenizer, "train"):
        assert prompt.evidence is not None and prompt.item_id is not None
        findings = prompt.evidence["findings"]
        absent = next(key for key in FINDINGS[modality] if not findings[key])
        heading = f"{SECTIONS[modality]}:"
        true = answers[prompt.item_id]
        assert true.count(heading) == 1
        false = true.replace(heading, f"{heading} {PHRASES[absent][0]},")
        hits = sum(findings.values())
        found = scorer.score([true, false], prompt.ground_truth, prompt.evidence).total.tolist()
        assert found == [1.0, pytest.approx(2 * hits / (2 * hits + 1))]
        present.add(store.study(prompt.item_id).present[list(FINDINGS).index(modality)])
    assert present == ({True} if modality == "lab" else {True, False}), "the cohort leaves out some ECGs and films"


def test_a_study_without_labels_fails_by_name(
    config: Config, tokenizer: PreTrainedTokenizerFast, scorer: Scorer, tmp_path: Path
) -> None:
    unlabelled = Config()
    unlabelled.data = replace(config.data, findings_csv=None, store=str(tmp_path / "store"))
    answers = texts(StudyStore.build(unlabelled.data), "test")
    prompt = diagnosis_prompts(unlabelled, tokenizer, "test")[0]
    assert prompt.evidence == {"study_id": prompt.item_id, "findings": None}
    rewards = scorer.score([answers[str(prompt.item_id)], "broken"], prompt.ground_truth, prompt.evidence)
    assert rewards.failed.all() and rewards.total.tolist() == [0.0, 0.0]
    assert f"{hashed(str(prompt.item_id))}: its findings are unknown" in str(rewards.reasons[0])
