"""Writes the instruction set: a json file per kind and split in the published layout, what was refused, and a manifest.

Owns: the folder and its atomic appearance, entries, the manifest. Does not own: labels, answers or checks. The folder
is written beside its place and renamed, so that it is whole or as it was; the same labels, seed and answers give the
same bytes. Entries stand in the files of the split whose table holds their study, as the study store reads them: those
of a validation split that is taken out of the training patients in the training files. A patient of two splits stays
in the later one only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.medtvt_qa import QAKind, qa_entry
from medtvt_rl.data.parallel import Progress
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.qa.concepts import mentions
from medtvt_rl.data.qa.labels import Labelled, StudyLabels, gap_counts
from medtvt_rl.data.qa.templates import Item, make_item, template_answer
from medtvt_rl.data.qa.validation import refusal

FORMAT_VERSION = 1
MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"
_SHOWN_STATEMENTS = 20


@dataclass(slots=True, kw_only=True)
class Answers:
    """Place of an item -> its answer, and the lines of the answers that were refused, reason included."""

    accepted: Mapping[int, str]
    rejected: list[dict[str, Any]] = field(default_factory=list)


def qa_folder(config: DataConfig) -> Path:
    """The folder that data.qa names before its first placeholder; it holds nothing but what build-qa writes.

    Raises:
        DataError: there is no such folder in data.qa, it leaves data.root, something else lies there, or other files of
            questions would be read in its stead.
    """
    if config.qa_files and config.questions == "given":
        raise DataError(
            "data.qa_files: names the questions that are read, so that those written here never would be; add "
            "data.questions=built, here and to every later command"
        )
    parts = Path(config.qa).parts
    own = parts[: next((place for place, part in enumerate(parts) if "{" in part), len(parts))]
    if not own or len(own) == len(parts) or not all(name in config.qa for name in ("{kind}", "{split}")):
        raise DataError(
            f"data.qa: {config.qa!r} names no folder of its own; write one such as qa/{{kind}}_{{split}}.json"
        )
    folder = inside_root(Path(config.root), str(Path(*own)), "data.qa")
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"data.qa: {folder} holds something that build-qa did not write; move it, or choose another folder, "
            "data.qa=NAME/{kind}_{split}.json"
        )
    return folder


def answers_file(folder: Path) -> Path:
    """Where the answers of endpoints are kept, beside the folder."""
    return folder.parent / f"{folder.name}.answers.jsonl"


def make_items(studies: Iterable[StudyLabels], kinds: Sequence[QAKind], seed: int) -> list[Item]:
    """One item for each study and kind that the labels can answer."""
    return [make_item(study, kind, seed) for study in studies for kind in kinds if kind not in study.gaps]


def answer_by_templates(items: Sequence[Item], progress: Progress | None = None) -> Answers:
    """Every item answered from its labels; the answers are checked as those of a model are.

    Args:
        progress: called with (items answered, items in all).
    """
    accepted, rejected = {}, []
    for place, item in enumerate(items):
        answer = template_answer(item)
        reason = refusal(item, answer)
        if reason is None:
            accepted[place] = answer
        else:
            rejected.append(rejected_line(item, 1, answer, reason))
        if progress is not None:
            progress(place + 1, len(items))
    return Answers(accepted=accepted, rejected=rejected)


def rejected_line(item: Item, attempt: int, answer: str, reason: str) -> dict[str, Any]:
    """A line of the file of refused answers."""
    known = {"study_id": item.labels.study_id, "split": item.labels.split, "kind": item.kind}
    return {**known, "attempt": attempt, "reason": reason, "answer": answer}


def write_qa(
    config: DataConfig,
    labelled: Labelled,
    kinds: Sequence[QAKind],
    items: Sequence[Item],
    answers: Answers,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the folder and returns its manifest.

    Args:
        source: what the manifest says of how the answers were made.
    """
    folder = qa_folder(config)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        entries: dict[tuple[str, str], list[dict[str, Any]]]
        entries = {(kind, split): [] for split in config.tables for kind in kinds}
        written: Counter[tuple[str, str]] = Counter()
        for place, item in enumerate(items):
            if place in answers.accepted:
                split = item.labels.split
                entries[item.kind, config.table_split(split)].append(_entry(item, answers.accepted[place]))
                written[item.kind, split] += 1
        digests = {}
        for (kind, split), rows in entries.items():
            path = inside_root(Path(config.root), config.qa.format(kind=kind, split=split), "data.qa")
            name = path.relative_to(folder)
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(rows, indent=0, ensure_ascii=False).encode()
            (partial / name).write_bytes(content)
            digests[str(name)] = hashlib.sha256(content).hexdigest()
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in answers.rejected]
        (partial / REJECTED).write_text("".join(lines), encoding="utf-8")
        manifest = _manifest(config, labelled, kinds, written, answers, {**source, "sha256": digests})
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        _swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _entry(item: Item, answer: str) -> dict[str, Any]:
    labels = item.labels
    return qa_entry(item.question, answer, labels.study_id, labels.ecg_path, labels.cxr_path)


def _swap_in(partial: Path, folder: Path) -> None:
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest(
    config: DataConfig,
    labelled: Labelled,
    kinds: Sequence[QAKind],
    written: Mapping[tuple[str, str], int],
    answers: Answers,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    splits = {}
    for split in config.splits:
        studies = [study for study in labelled.studies if study.split == split]
        gaps = gap_counts(studies, kinds)
        splits[split] = {
            "studies": len(studies),
            "patients": len({study.patient_id for study in studies}),
            "entries": {kind: written[kind, split] for kind in kinds},
            "without_labels": {kind: dict(sorted(gaps[kind].items())) for kind in kinds},
            "without_accepted_answer": {
                kind: len(studies) - sum(gaps[kind].values()) - written[kind, split] for kind in kinds
            },
        }
    return {
        "format_version": FORMAT_VERSION,
        **source,
        "splits": splits,
        "diseases": dict(Counter(name for study in labelled.studies for name in study.diseases).most_common()),
        "labels": {table: dict(sorted(counts.items())) for table, counts in labelled.counts.items()},
        "statements_outside_the_vocabulary": _unknown_statements(labelled.studies),
        "rejected_answers": len(answers.rejected),
        "studies_set_aside": Counter(problem.field for problem in labelled.problems),
    }


def _unknown_statements(studies: Iterable[StudyLabels]) -> dict[str, Any]:
    """How many machine statements name nothing that validation knows, and the most frequent of them."""
    unknown = Counter(
        text for study in studies for text in study.statements if not (found := mentions(text)).named | found.denied
    )
    return {"statements": unknown.total(), "most_frequent": dict(unknown.most_common(_SHOWN_STATEMENTS))}
