"""Completions of any shape: a reward in its range, the reading that the plain definition gives, linear time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hostile import CASES
from hypothesis import example, given
from hypothesis import strategies as st

from medtvt_rl.data.labels import DISEASES, PHRASES, named_findings
from medtvt_rl.rewards.answer import normalise, parse_answer
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rewards.evidence import evidence_reward
from medtvt_rl.rewards.format import format_reward
from medtvt_rl.rewards.jaccard import jaccard_reward
from medtvt_rl.rewards.scorer import Scorer

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = [
    *TAGS,
    "<THINK>",
    "<think",
    ">",
    ";",
    " ",
    "\n",
    "\t",
    "ECG:",
    "LAB:",
    *DISEASES[:3],
    PHRASES["afib"][0],
    "no ",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=14).map("".join)
EVIDENCE = {"study_id": "s", "findings": {"afib": True, "lvh": False}}
# The definitions that the fast readings stand for; they take the square of the length.
STRICT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
PUBLISHED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
FIRST_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@CASES
@given(text=TEXTS, truth=TEXTS)
@example(text="<think></think><answer></answer>", truth="")
@example(text="<think></think><answer></think><answer></answer>", truth="<answer>")
def test_every_text_has_a_reward_and_the_defined_reading(text: str, truth: str) -> None:
    match = STRICT.fullmatch(text)
    tagged = match and any(tag in match["think"] + "\0" + match["answer"] for tag in TAGS)
    parsed = parse_answer(text)
    assert (parsed is None) == (match is None or bool(tagged))
    if parsed is not None and match is not None:
        assert parsed.reasoning == match["think"].strip()
    assert format_reward(text) == float(PUBLISHED.fullmatch(text) is not None)
    for matching in ("normalised", "exact"):
        assert 0 <= jaccard_reward(text, truth, matching) <= 1  # type: ignore[arg-type]
    found = FIRST_ANSWER.search(text)
    names = {name.strip() for name in found[1].split(";") if name.strip()} if found else set()
    truth = f"<answer>{'; '.join(names)}</answer>"
    assert jaccard_reward(text, truth, "exact") == float(bool(names))
    assert 0 <= evidence_reward(text, truth, evidence=EVIDENCE) <= 1


@CASES
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), truth=TEXTS)
def test_a_group_is_always_scored(texts: list[str], truth: str) -> None:
    scorer = Scorer(
        {
            "jaccard": RewardConfig(function="medtvt_rl.rewards.jaccard:jaccard_reward"),
            "format": RewardConfig(function="medtvt_rl.rewards.format:format_reward"),
            "evidence": RewardConfig(function="medtvt_rl.rewards.evidence:evidence_reward"),
        }
    )
    rewards = scorer.score(texts, truth, EVIDENCE)
    assert not rewards.failed.any() and len(rewards.total) == len(texts)


@CASES
@given(name=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_a_normalised_name_stays_as_it_is(name: str) -> None:
    assert normalise(normalise(name)) == normalise(name)


# Each is made longer and longer; what is quadratic in one of them takes minutes for a megabyte.
SHAPES: dict[str, Callable[[int], str]] = {
    "open think": lambda n: "<think>" * n,
    "open answer": lambda n: "<think></think>" + "<answer>" * n,
    "middles": lambda n: "<think>" + "</think><answer>" * n + "</answer>" * n,
    "middles and a tail": lambda n: "<think>" + "</think><answer></answer>" * n + "x",
    "spaces": lambda n: "<think></think>" + " " * n + "x<answer></answer>",
    "spaces behind": lambda n: "<think></think><answer></answer>" + " " * n + "x",
    "closings and spaces": lambda n: "<think>" + ("</think>" + " " * 50) * n,
    "accents": lambda n: "<think></think><answer>" + "\u0315\u0300" * n + "</answer>",
    "names": lambda n: "<think></think><answer>" + "a;" * n + "</answer>",
    "sections": lambda n: "<think>" + "ECG :" * n + "</think><answer></answer>",
    "section spaces": lambda n: "<think>ECG" + " " * n + "</think><answer></answer>",
    "clauses": lambda n: "<think>ECG: " + "no, and " * n + "</think><answer></answer>",
    "negations": lambda n: "<think>ECG: " + " " * n + "no</think><answer></answer>",
    "half phrases": lambda n: "<think>ECG: " + "irregular rhythm without P " * n + "</think><answer></answer>",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_time_follows_the_length(shape: str) -> None:
    """From 60 thousand repeats to eight times as many, time may grow by far less than the 64 of a square."""

    def seconds(n: int) -> float:
        text = SHAPES[shape](n)
        started = time.process_time()
        parse_answer(text)
        format_reward(text)
        jaccard_reward(text, "Sepsis")
        jaccard_reward(text, text, "exact")
        evidence_reward(text, "", evidence=EVIDENCE)
        named_findings(text)
        return time.process_time() - started

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(16_000) < 30 * max(short, 0.005)
    assert seconds(120_000) < 20
