"""What is withheld from an example, and what its answer then says."""

from __future__ import annotations

import numpy as np
import pytest

from medtvt_rl.data.labels import named_findings
from medtvt_rl.data.medtvt_qa import QAExample
from medtvt_rl.learner.examples import QaExamples, TaskExamples, Withholding, without_sections
from medtvt_rl.types import Example, Prompt

COT = (
    "<think> ECG: regular sinus rhythm, peaked T waves. CXR: normal heart size, pleural effusion. "
    "LAB: creatinine high, potassium high. </think><answer> Acute Renal Failure </answer>"
)


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def _examples(kind: str, probability: float = 0.5, count: int = 40) -> QaExamples:
    examples = [QAExample(study_id=f"s{i}", kind=kind, question="Why?", answer=COT) for i in range(count)]  # type: ignore[arg-type]
    return QaExamples(
        examples,
        lambda question: np.array([1, 2, 3], dtype=np.int32),
        Letters(),
        Withholding(probability=probability, seed=3),
    )


def _text(ids: np.ndarray) -> str:
    return "".join(map(chr, ids[:-1]))


def test_a_withheld_section_says_so_and_the_others_stay() -> None:
    text = without_sections(COT, ["cxr"])
    assert "CXR: not available. LAB:" in text and "effusion" not in text
    assert named_findings(text) == {"peaked_t", "creatinine_high", "potassium_high"}
    last = without_sections(COT, ["ecg", "lab"])
    assert last.startswith("<think> ECG: not available. CXR:")
    assert "LAB: not available. </think><answer> Acute" in last
    assert without_sections(COT, []) == COT


def test_answers_end_with_the_end_token() -> None:
    example = _examples("ecg").complete()[0]
    assert example.completion_ids[-1] == Letters.eos_token_id and _text(example.completion_ids) == COT
    assert example.item_id == "s0" and example.prompt_ids.tolist() == [1, 2, 3]


def test_a_diagnosis_loses_sections_with_its_modalities_but_never_all() -> None:
    for example in _examples("diagnosis", probability=0.9).epoch(0):
        study_id, _, withheld = (example.item_id or "").partition("|without=")
        named = withheld.split("+") if withheld else []
        assert study_id.startswith("s") and len(named) < 3
        for modality, heading in (("ecg", "ECG"), ("cxr", "CXR"), ("lab", "LAB")):
            assert (f"{heading}: not available." in _text(example.completion_ids)) == (modality in named)


def test_a_single_modality_question_is_asked_alone_half_of_the_time() -> None:
    items = [example.item_id for example in _examples("cxr", count=200).epoch(0)]
    alone = [item for item in items if item and item.endswith("|without=ecg+lab")]
    assert 70 < len(alone) < 130
    assert all("|" not in (item or "") for item in items if item not in alone)


def test_choices_follow_seed_and_epoch_alone() -> None:
    first, again, later = ([example.item_id for example in _examples("diagnosis").epoch(epoch)] for epoch in (0, 0, 1))
    assert first == again != later


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples: there are none"):
        QaExamples([], lambda q: np.zeros(1, dtype=np.int32), Letters(), Withholding(probability=0.0, seed=0))


def test_the_examples_of_a_task_are_the_same_each_time() -> None:
    prompt = Prompt(prompt_id="p", token_ids=np.array([5, 6], np.int32), item_id="i", ground_truth="no")
    examples = TaskExamples([Example(prompt=prompt, answer="yes")], Letters(), "task.examples m:f")
    for (sequence,) in (examples.epoch(0), examples.epoch(1), examples.complete()):
        assert sequence.prompt_ids.tolist() == [5, 6] and sequence.item_id == "i"
        assert sequence.completion_ids.tolist() == [*map(ord, "yes"), 0]


@pytest.mark.parametrize(("given", "said"), [([], "gave no example"), (["a", "b"], "gave a str, expected .*Example")])
def test_what_is_no_example_is_refused_with_who_gave_it(given: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"task.examples m:f: it {said}"):
        TaskExamples(given, Letters(), "task.examples m:f")  # type: ignore[arg-type]
