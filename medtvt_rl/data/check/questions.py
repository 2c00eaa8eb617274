"""Whether questions and answers belong to studies, name known diseases, and fit the model's limits in tokens.

Owns: these judgements. Does not own: how an entry is read and joined (data/medtvt_qa.py), or prompts (data/task.py).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtvt_rl.config import Config
from medtvt_rl.data.check.report import Report
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.medtvt_qa import REFUSED, QAExample, parse_diagnoses, read_qa
from medtvt_rl.data.study_build import Tables, qa_files, question_index
from medtvt_rl.data.study_rows import StudyRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOINS, LABELS, TOKENS = "questions", "diagnoses", "token lengths"
RARE_SHARE, RARE_COUNT = 0.01, 5
_REASONED = re.compile(r"<think>.*\S.*</think>\s*<answer>", re.DOTALL)
_UNKNOWN = re.compile(r"diagnosis '(?P<name>.*)' is unknown; ")
PhaseProgress = Callable[[str, int, int], None]


def check_questions(
    report: Report, config: Config, tables: Tables, usable: Mapping[str, StudyRow], study_problems: Sequence[Problem]
) -> list[QAExample]:
    """Reads and joins every file of questions; returns the usable entries."""
    data = config.data
    check = report.open(JOINS, "entries")
    examples: list[QAExample] = []
    num_bad = 0
    for split, kind, file in qa_files(data):
        index, unread = question_index(data, tables, split, usable, study_problems)
        try:
            found, bad = read_qa(Path(data.root), file, kind, index, unread)
        except DataError as error:
            said = f"{file}: missing or no list of entries; put it there, or mend data.qa and data.qa_files"
            report.stop(JOINS, said, str(error), split=split, file=file)
            continue
        check.looked_at += len(found) + len(bad)
        num_bad += sum(REFUSED not in problem.reason for problem in bad)
        report.add_problems(JOINS, (problem for problem in bad if not _UNKNOWN.search(problem.reason)), split)
        _check_unknown(report, split, [problem for problem in bad if _UNKNOWN.search(problem.reason)])
        examples += found
    total = check.looked_at
    if num_bad > data.max_unusable_share * total:
        report.stop(
            JOINS,
            f"{num_bad} of {total} question-answer entries are unusable, more than "
            f"data.max_unusable_share={data.max_unusable_share:g}",
        )
    _check_asked(report, config, usable, examples)
    _check_answers(report, usable, examples)
    _check_vocabulary(report, usable, examples)
    return examples


def _check_unknown(report: Report, split: str, problems: Sequence[Problem]) -> None:
    """Answers with an unknown diagnosis are left out; the nearest known name says how to mend them."""
    report.open(LABELS, "answers")
    names = {name.lower(): name for name in DISEASES}
    for problem in problems:
        match = _UNKNOWN.search(problem.reason)
        name = match["name"] if match else ""
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"the nearest known is {names[near[0]]!r}" if near else f"known are {'; '.join(DISEASES)}"
        report.add(
            LABELS,
            "left out",
            f"diagnosis {name!r} is unknown; {hint}",
            split=split,
            file=problem.file,
            study=problem.study_id,
            field="messages",
        )


def _check_asked(report: Report, config: Config, usable: Mapping[str, StudyRow], examples: Sequence[QAExample]) -> None:
    """Counts questions by split and kind, and studies without one; a stage without any cannot run."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        counts[usable[example.study_id].split][example.kind] += 1
    for split, by_kind in counts.items():
        report.splits.setdefault(split, Counter()).update({f"questions: {kind}": n for kind, n in by_kind.items()})
    asked = {example.study_id for example in examples if example.kind == "diagnosis"}
    for row in usable.values():
        if row.study_id not in asked:
            report.splits.setdefault(row.split, Counter())["without a diagnosis question"] += 1
            reason = "no diagnosis question speaks of this study: it takes no part in SFT, GRPO and evaluation"
            report.add(JOINS, "look", reason, split=row.split, file=row.location, study=row.study_id, field="messages")
    for stage, split, kinds in _needs(config):
        if not any(counts[split][kind] for kind in kinds):
            report.stop(JOINS, f"{stage} needs questions ({', '.join(kinds)}) about the {split} split: there are none")


def _check_answers(report: Report, usable: Mapping[str, StudyRow], examples: Sequence[QAExample]) -> None:
    """Answers that training would take as they are, and that teach something odd."""
    asked: Counter[tuple[str, str, str]] = Counter((e.study_id, e.kind, e.question) for e in examples)
    named: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for example in examples:
        if example.kind == "diagnosis":
            named[example.study_id].add(parse_diagnoses(example.answer))
            if not _REASONED.search(example.answer):
                reason = "the answer has no <think> ... </think> before <answer>; the format reward wants it"
                _look(report, usable, example.study_id, reason)
    for study_id, sets in named.items():
        if len(sets) > 1:
            told = " against ".join(sorted("; ".join(names) for names in sets))
            _look(report, usable, study_id, f"the answers to this study contradict each other: {told}")
    for (study_id, kind, _), times in asked.items():
        if times > 1:
            _look(report, usable, study_id, f"the same {kind} question stands {times} times; keep one")


def _look(report: Report, usable: Mapping[str, StudyRow], study_id: str, reason: str) -> None:
    row = usable[study_id]
    report.add(JOINS, "look", reason, split=row.split, file=row.location, study=study_id, field="messages")


def _needs(config: Config) -> list[tuple[str, str, tuple[str, ...]]]:
    """(stage, split, kinds of which one must be there)."""
    explained, diagnosis = ("ecg", "cxr", "lab"), ("diagnosis",)
    every = [
        ("pretrain", "train", explained),
        ("pretrain", "validation", explained),
        ("sft", "train", diagnosis),
        ("sft", "validation", diagnosis),
        ("grpo", "train", diagnosis),
        ("evaluate", config.evaluation.split, diagnosis),
    ]
    return [need for need in every if need[0] in config.run.stages]


def _check_vocabulary(report: Report, usable: Mapping[str, StudyRow], examples: Sequence[QAExample]) -> None:
    """Counts diseases by split; one that a split hardly has is neither learnt nor measured."""
    check = report.open(LABELS, "answers")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for example in examples:
        if example.kind == "diagnosis":
            split = usable[example.study_id].split
            totals[split] += 1
            counts[split].update(parse_diagnoses(example.answer))
    check.looked_at += totals.total()
    for split, total in totals.items():
        report.splits[split].update({f"with {name}": counts[split][name] for name in DISEASES})
        for name in DISEASES:
            if counts[split][name] < max(RARE_COUNT, RARE_SHARE * total):
                reason = f"{name} is named in {counts[split][name]} of {total} answers; its scores will say little"
                report.add(LABELS, "look", reason, split=split, field="messages")


def check_tokens(
    report: Report,
    config: Config,
    usable: Mapping[str, StudyRow],
    examples: Sequence[QAExample],
    progress: PhaseProgress | None = None,
) -> None:
    """Measures prompts and answers in tokens against the limits of engine and learner."""
    check = report.open(TOKENS, "entries")
    try:
        tokenizer, check.note = _tokenizer(config, usable, examples)
    except ValueError as error:
        report.stop(TOKENS, str(error), field="model.init")
        check.note = "not measured: there is no tokenizer to measure with"
        return
    if tokenizer is None:
        return
    from medtvt_rl.data.task import prompt_token_ids

    per_modality, sampling = config.model.perception.tokens_per_modality, config.rollout.sampling
    # As GRPO has it: one token more than prompt and completion.
    room = config.rollout.engine.max_model_len - sampling.max_new_tokens - 1
    prompts: dict[str, int] = {}
    longest: Counter[str] = Counter()
    too_long: Counter[str] = Counter()
    for done, example in enumerate(examples, 1):
        split = usable[example.study_id].split
        if example.question not in prompts:
            prompts[example.question] = len(prompt_token_ids(tokenizer, example.question, per_modality))
        prompt = prompts[example.question]
        answer = len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]) + 1
        longest["prompt"] = max(longest["prompt"], prompt)
        longest["answer"] = max(longest["answer"], answer)
        where = {"split": split, "study": example.study_id, "field": "messages"}
        if example.kind == "diagnosis" and prompt > room:
            too_long["prompt"] += 1
            reason = (
                f"the prompt has {prompt} tokens, and rollout.engine.max_model_len - rollout.sampling.max_new_tokens "
                f"- 1 leaves {room}; shorten the question, or raise the former"
            )
            report.add(TOKENS, "stop", reason, **where)
        if prompt + answer > config.learner.token_budget:
            too_long["example"] += 1
            reason = (
                f"prompt and answer have {prompt + answer} tokens, and learner.token_budget is "
                f"{config.learner.token_budget}; raise it, or shorten the answer"
            )
            report.add(TOKENS, "stop", reason, **where)
        if example.kind == "diagnosis" and answer > sampling.max_new_tokens:
            reason = (
                f"the answer has {answer} tokens, rollout.sampling.max_new_tokens is {sampling.max_new_tokens}: the "
                "policy could not give it whole"
            )
            report.add(TOKENS, "look", reason, **where)
        if progress:
            progress("tokens", done, len(examples))
    check.looked_at = len(examples)
    check.note = f"{check.note}longest prompt {longest['prompt']}, longest answer {longest['answer']} tokens"
    if too_long["prompt"]:
        report.stops.append(f"{too_long['prompt']} diagnosis prompts are longer than the engine's {room} tokens")
    if too_long["example"]:
        report.stops.append(f"{too_long['example']} examples are longer than learner.token_budget")


def _tokenizer(
    config: Config, usable: Mapping[str, StudyRow], examples: Sequence[QAExample]
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer that training would use, or None, and what to say of it. Raises ValueError for a damaged one."""
    from medtvt_rl.data.tokenizer import adapt_tokenizer, load_tokenizer, train_tokenizer

    init = config.model.init
    if init is None:
        own = [example for example in examples if usable[example.study_id].split == "train"]
        texts = [text for example in own for text in (example.question, example.answer)]
        if not texts:
            return None, "not measured: there is no training text to make a tokenizer from"
        return train_tokenizer(texts, config.model.backbone.vocab_size), "tokenizer made from the training texts; "
    if not (Path(init) / "tokenizer_config.json").is_file():
        return None, f"not measured: model.init={init} has no tokenizer here; run it again where it is"
    loaded: Any = load_tokenizer(init, "model.init")
    return adapt_tokenizer(loaded), ""
