"""The validated studies of a data root, memory-mapped: what every process reads patients from.

Owns: access to a built store. Does not own: building it (study_build.py) or what a model makes of a study (task.py).
A store is opened by path in each process and pickles as its path; the operating system shares its pages.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtvt_rl.data.config import DataConfig
from medtvt_rl.data.errors import DataError, Problem
from medtvt_rl.data.labs import PercentileTable
from medtvt_rl.data.medtvt_qa import QA_KINDS, QAExample, QAKind, parse_diagnoses
from medtvt_rl.data.parallel import Progress
from medtvt_rl.data.study_build import FORMAT_VERSION, META, PERCENTILES, PROBLEMS, QUESTIONS, STUDIES, build_store
from medtvt_rl.data.study_files import StudyFile
from medtvt_rl.data.validation import read_problems
from medtvt_rl.privacy import hashed
from medtvt_rl.types import Study


class StudyStore:
    """Validated studies, their questions and answers, and what was set aside. Make one with `build` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            meta = json.loads((path / META).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path}: no study store; build it with the cohort or data stage first") from None
        if meta.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: store format {meta.get('format_version')}, expected {FORMAT_VERSION}; build it again"
            )
        self.splits: tuple[str, ...] = tuple(meta["splits"])
        self.film_size: int = meta["film_size"]
        self.fingerprint: str = meta["fingerprint"]
        self.num_unusable_studies: int = meta["num_unusable_studies"]
        self.lab_mean_percentiles: NDArray[np.float32] = np.array(meta["lab_mean_percentiles"], dtype=np.float32)
        self._file = StudyFile(path / STUDIES, self.film_size)

    @classmethod
    def build(cls, config: DataConfig, progress: Progress | None = None) -> StudyStore:
        """Validates the data root and writes the store, unless an up-to-date one is there; then opens it.

        Args:
            progress: called with (studies read, studies in all); not called where the store is up to date.

        Raises:
            DataError: a table is missing or malformed, or too many studies are unusable.
        """
        return cls(build_store(config, progress))

    @classmethod
    def open(cls, path: str | Path) -> StudyStore:
        """Opens a built store. Raises DataError if there is none."""
        return cls(Path(path))

    def __reduce__(self) -> tuple[type[StudyStore], tuple[Path]]:
        return type(self), (self.path,)

    def study_ids(self, split: str) -> list[str]:
        """Usable studies of a split, in the order of its table. Raises DataError for an unknown split."""
        if split not in self.splits:
            raise DataError(f"split {split!r} is not in the store {self.path}; it has {', '.join(self.splits)}")
        return list(self._file.ids(split))

    def study(self, study_id: str) -> Study:
        """One study; raises DataError for an unknown id."""
        return self._file.study(self._known(study_id))

    def patient_id(self, study_id: str) -> str:
        """The patient of a study."""
        return self._file.patient(self._known(study_id))

    def diagnoses(self, study_id: str) -> tuple[str, ...]:
        """The study's diseases in the order of labels.DISEASES; empty where no diagnosis answer names them."""
        return self._diagnoses.get(self._known(study_id), ())

    def reference(self, study_id: str) -> str:
        """The whole answer to the study's first diagnosis question; "" where there is none."""
        return self._references.get(self._known(study_id), "")

    def findings(self, study_id: str) -> dict[str, bool] | None:
        """Finding key -> whether it was rendered; None where unknown. A missing modality shows none of its findings."""
        return self._file.findings(self._known(study_id))

    def qa(self, split: str, kind: QAKind) -> list[QAExample]:
        """Questions and answers of one kind about the usable studies of a split; empty if the split has none."""
        if split not in self.splits or kind not in QA_KINDS:
            raise DataError(
                f"no split {split!r} or kind {kind!r} in {self.path}; splits {self.splits}, kinds {QA_KINDS}"
            )
        return self._questions.get((split, kind), [])

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """Every study and question-answer entry that was set aside, with the reason."""
        return read_problems(self.path / PROBLEMS)

    @cached_property
    def percentile_table(self) -> PercentileTable:
        """Turns raw laboratory values into percentiles of the training split."""
        return PercentileTable.load(self.path / PERCENTILES)

    @cached_property
    def _questions(self) -> dict[tuple[str, str], list[QAExample]]:
        table = pa.ipc.open_file(pa.memory_map(str(self.path / QUESTIONS), "r")).read_all().to_pydict()
        questions: dict[tuple[str, str], list[QAExample]] = defaultdict(list)
        for split, study_id, kind, question, answer in zip(
            *(table[name] for name in ("split", "study_id", "kind", "question", "answer"))
        ):
            example = QAExample(study_id=study_id, kind=cast(QAKind, kind), question=question, answer=answer)
            questions[split, kind].append(example)
        return questions

    @cached_property
    def _diagnoses(self) -> dict[str, tuple[str, ...]]:
        examples = (example for split in self.splits for example in self.qa(split, "diagnosis"))
        return {example.study_id: parse_diagnoses(example.answer) for example in examples}

    @cached_property
    def _references(self) -> dict[str, str]:
        examples = [example for split in self.splits for example in self.qa(split, "diagnosis")]
        return {example.study_id: example.answer for example in reversed(examples)}

    def _known(self, study_id: str) -> str:
        if study_id not in self._file:
            raise DataError(
                f"{hashed(study_id)} is not in the store {self.path}; see {PROBLEMS} there for refused studies"
            )
        return study_id
