"""Reads question-answer json and joins each entry to its study.

Owns: the published form {"messages": [...], "ECG": [path], "image": [path]}, the join by study id or by path, and the
diagnoses at the end of an answer. Does not own: scoring of answers (rewards/answer.py). An entry that cannot be used
becomes a Problem; a file that is not json is a DataError.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.labs import read_json
from medtvt_rl.data.paths import inside_root
from medtvt_rl.data.raw_ecg import record_path
from medtvt_rl.data.study_rows import StudyRow, plain_id

QAKind = Literal["ecg", "cxr", "lab", "diagnosis"]
QA_KINDS: tuple[QAKind, ...] = get_args(QAKind)

REFUSED = "was refused itself"

_ANSWER = re.compile(r"<answer>([^<]*)</answer>\s*\Z")
_PLACEHOLDER_NAME = re.compile(r"<(?:ecg|cxr|lab|labs|image|ECG|CXR|LAB)>")
_PLACEHOLDER = re.compile(rf"{_PLACEHOLDER_NAME.pattern}[ \t]*\n?")
_IN_FRONT = ("<ecg>", "<cxr>", "<lab>")
_BY_NAME = {name.lower(): name for name in DISEASES}


@dataclass(frozen=True, slots=True, kw_only=True)
class QAExample:
    """One question about a study and its answer; the question holds <ecg>, <cxr> and <lab> once each, or none."""

    study_id: str
    kind: QAKind
    question: str
    answer: str


class StudyIndex:
    """Finds the study that an entry speaks of, by id or by the path of its ECG or film.

    Args:
        rows: of the table that belongs to the entries.
        refused: location of a row that cannot be used -> the reason.
    """

    def __init__(self, rows: Iterable[StudyRow], refused: Mapping[str, str] | None = None) -> None:
        self._refused = refused or {}
        self._by_id: dict[str, StudyRow] = {}
        self._by_path: dict[str, list[StudyRow]] = {}
        for row in rows:
            self._by_id[row.study_id] = row
            for path in (row.ecg_path, row.cxr_path):
                if path:
                    self._by_path.setdefault(plain_path(path), []).append(row)

    def find(self, study_id: str | None, paths: Mapping[str, str]) -> StudyRow:
        """The study of an entry with paths {"ECG": ..., "image": ...}.

        Raises:
            DataError: there is none, id and paths speak of different studies, or the paths of several, or the study
                was refused itself.
        """
        found: list[StudyRow] | None = None
        if study_id is not None:
            if study_id not in self._by_id:
                raise DataError(
                    f"study_id: no usable study {study_id!r} in this split; add it to the table or drop the entry"
                )
            found = [self._by_id[study_id]]
        for field, path in paths.items():
            with_path = self._by_path.get(plain_path(path))
            if with_path is None:
                raise DataError(
                    f"{field}: no usable study of this split has the path {path!r}; mend it or drop the entry"
                )
            both = with_path if found is None else [row for row in found if any(row is other for other in with_path)]
            if not both:
                raise DataError(
                    f"{field}: {path!r} is of study {with_path[0].study_id}, the entry speaks of "
                    f"{found[0].study_id if found else None}; mend one"
                )
            found = both
        if found is None:
            raise DataError("study_id: neither a study_id nor an ECG or image path is given; add one")
        if len(found) > 1:
            raise DataError(
                f"study_id: studies {found[0].study_id} and {found[1].study_id} share this file; add a study_id"
            )
        reason = self._refused.get(found[0].location)
        if reason is not None:
            raise DataError(f"study_id: study {found[0].study_id} {REFUSED}: {reason}")
        return found[0]


def plain_path(path: str) -> str:
    """One spelling of a path: "./ecg//1.hea" -> "ecg/1"."""
    return str(record_path(Path(posixpath.normpath(path))))


def parse_diagnoses(answer: str) -> tuple[str, ...]:
    """The diseases of an answer that ends in <answer>A; B</answer>, in the order of DISEASES.

    Raises:
        DataError: the answer ends otherwise, or names an unknown disease, or one twice, or none.
    """
    match = _ANSWER.search(answer)
    if match is None:
        raise DataError("messages: the answer does not end in <answer>A; B</answer>; add the diagnoses there")
    names = [name.strip() for name in match.group(1).split(";")]
    for name in names:
        if name.lower() not in _BY_NAME:
            raise DataError(f"messages: diagnosis {name!r} is unknown; use {'; '.join(DISEASES)}")
    known = {_BY_NAME[name.lower()] for name in names}
    if len(known) != len(names):
        raise DataError("messages: a diagnosis is named twice in <answer>; keep one")
    return tuple(name for name in DISEASES if name in known)


def qa_entry(question: str, answer: str, study_id: str, ecg_path: str, cxr_path: str) -> dict[str, Any]:
    """One entry of the published form; a path is empty where that modality was not taken."""
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "ECG": [ecg_path] if ecg_path else [],
        "image": [cxr_path] if cxr_path else [],
        "study_id": study_id,
    }


def read_qa(
    root: Path, file: str, kind: QAKind, studies: StudyIndex, refused: Mapping[str, str]
) -> tuple[list[QAExample], list[Problem]]:
    """The entries of one file and those that were set aside.

    Args:
        refused: ids of studies that are themselves unusable and of which `studies` has no row, with the reason.

    Raises:
        DataError: the file is missing, is not json, or is not a list.
    """
    content = read_json(inside_root(root, file, "data.qa"))
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a list of entries, found {type(content).__name__}")
    examples: list[QAExample] = []
    problems: list[Problem] = []
    for number, entry in enumerate(content):
        study_id = _study_id(entry)
        try:
            if study_id is not None and study_id in refused:
                raise DataError(f"study_id: study {study_id} {REFUSED}: {refused[study_id]}")
            examples.append(_example(entry, kind, studies))
        except DataError as error:
            field, reason = str(error).split(": ", 1)
            problems.append(Problem(file=f"{file}[{number}]", study_id=study_id or "", field=field, reason=reason))
    return examples, problems


def _study_id(entry: Any) -> str | None:
    value = entry.get("study_id") if isinstance(entry, dict) else None
    return plain_id(str(value)) if isinstance(value, str | int | float) else None


def _example(entry: Any, kind: QAKind, studies: StudyIndex) -> QAExample:
    if not isinstance(entry, dict):
        raise DataError(f"entry: expected an object, found {type(entry).__name__}; write messages, ECG and image")
    question, answer = _question_and_answer(entry.get("messages"))
    paths = {field: path for field in ("ECG", "image") if (path := _single_path(entry, field))}
    study = studies.find(_study_id(entry), paths)
    if kind == "diagnosis":
        parse_diagnoses(answer)
    if not _PLACEHOLDER.sub("", question).strip():
        raise DataError("messages: the question is empty but for placeholders; write one")
    return QAExample(study_id=study.study_id, kind=kind, question=_with_places(question), answer=answer)


def _with_places(question: str) -> str:
    """The question with its placeholders where they are, if it holds those of each modality once; else without any.

    Those right before the first word are left out, too: a prompt begins with them anyhow.
    """
    if sorted(_PLACEHOLDER_NAME.findall(question)) != sorted(_IN_FRONT):
        return _PLACEHOLDER.sub("", question).strip()
    behind = question.removeprefix("".join(_IN_FRONT))
    return question if behind == question or behind[:1].isspace() else behind


def _question_and_answer(messages: Any) -> tuple[str, str]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError("messages: expected a list of {role, content}")
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"messages: roles are {roles}, expected ['user', 'assistant']; write one question and one answer"
        )
    question, answer = (message.get("content") for message in messages)
    for text in (question, answer):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"messages: content is {str(text)[:40]!r}, expected a text that is not empty")
    return question.strip(), answer.strip()


def _single_path(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], str):
        raise DataError(f"{field}: is {str(value)[:60]!r}, expected a list of one path")
    path = value[0]
    if posixpath.isabs(path) or ".." in path.split("/"):
        raise DataError(f"{field}: {path!r} leaves the data root; write it relative to the root")
    return path
