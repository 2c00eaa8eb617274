"""The Arrow file of validated studies: raw fixed-size columns that every process memory-maps.

Owns: the columns and their types. Does not own: validation (study_build.py) or the store's other files
(study_store.py). The ECG is kept as float16, whose step is below 0.001 mV for amplitudes below 2 mV; the film as its
bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtvt_rl.data.labels import ALL_FINDINGS
from medtvt_rl.data.labs import NUM_LABS
from medtvt_rl.types import Study

ECG_SHAPE = (12, 1000)
_ECG_BYTES = 2 * ECG_SHAPE[0] * ECG_SHAPE[1]
_STUDIES_PER_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStudy:
    """One row of the file.

    Attributes:
        ecg: the bytes of [12, 1000] float16, mV at 100 Hz; None if not taken.
        film: the bytes of [S, S] uint8; None if not taken.
        percentiles: [50] float32, NaN where not measured.
        findings: [20] bool in the order of ALL_FINDINGS; None where unknown.
    """

    study_id: str
    patient_id: str
    split: str
    ecg: bytes | None
    film: bytes | None
    percentiles: NDArray[np.float32]
    findings: NDArray[np.bool_] | None


def _schema(film_size: int) -> pa.Schema:
    return pa.schema(
        [
            ("study_id", pa.string()),
            ("patient_id", pa.string()),
            ("split", pa.string()),
            ("ecg", pa.binary(_ECG_BYTES)),
            ("film", pa.binary(film_size * film_size)),
            ("percentiles", pa.binary(4 * NUM_LABS)),
            ("findings", pa.binary(len(ALL_FINDINGS))),
        ]
    )


def write_studies(path: Path, studies: Iterable[StoredStudy], film_size: int) -> int:
    """Writes studies in batches, so that memory doesn't follow their number; returns how many."""
    schema, count = _schema(film_size), 0
    stream = iter(studies)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(stream, _STUDIES_PER_BATCH)):
            writer.write_batch(pa.record_batch(_columns(batch, schema), schema=schema))
            count += len(batch)
    return count


def join_studies(path: Path, files: Iterable[Path], film_size: int) -> None:
    """Writes the batches of several files, in their order, into one."""
    schema = _schema(film_size)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for file in files:
            reader = pa.ipc.open_file(pa.memory_map(str(file), "r"))
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number))


def _columns(batch: list[StoredStudy], schema: pa.Schema) -> list[pa.Array]:
    cells = {
        name: [getattr(study, name) for study in batch]
        for name in schema.names
        if name not in ("percentiles", "findings")
    }
    cells["percentiles"] = [study.percentiles.astype(np.float32).tobytes() for study in batch]
    cells["findings"] = [None if study.findings is None else study.findings.tobytes() for study in batch]
    return [pa.array(cells[field.name], type=field.type) for field in schema]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Views [N, ...] on one record batch in the memory map, and which rows hold an ECG, a film, findings."""

    ecg: NDArray[np.float16]
    film: NDArray[np.uint8]
    percentiles: NDArray[np.float32]
    findings: NDArray[np.bool_]
    has_ecg: NDArray[np.bool_]
    has_film: NDArray[np.bool_]
    has_findings: NDArray[np.bool_]


class StudyFile:
    """Random access to a studies file; ids, patients and splits are in memory, the rest stays on disk."""

    def __init__(self, path: Path, film_size: int) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._batches = [_views(batch, film_size) for batch in batches]
        self._place: dict[str, tuple[int, int]] = {}
        self._patients: dict[str, str] = {}
        self._splits: dict[str, str] = {}
        for number, batch in enumerate(batches):
            columns = (batch.column(name).to_pylist() for name in ("study_id", "patient_id", "split"))
            for row, (study_id, patient_id, split) in enumerate(zip(*columns)):
                self._place[study_id] = number, row
                self._patients[study_id] = patient_id
                self._splits[study_id] = split

    def __contains__(self, study_id: str) -> bool:
        return study_id in self._place

    def ids(self, split: str) -> Iterator[str]:
        """Study ids of one split, in the order of its table."""
        return (study_id for study_id, its_split in self._splits.items() if its_split == split)

    def study(self, study_id: str) -> Study:
        """One study; the film is a read-only view on the memory map."""
        number, row = self._place[study_id]
        batch = self._batches[number]
        percentiles = batch.percentiles[row]
        return Study(
            study_id=study_id,
            patient_id=self._patients[study_id],
            ecg=batch.ecg[row].astype(np.float32) if batch.has_ecg[row] else None,
            cxr=batch.film[row] if batch.has_film[row] else None,
            lab_percentiles=percentiles,
            lab_measured=~np.isnan(percentiles),
        )

    def patient(self, study_id: str) -> str:
        """The study's patient."""
        return self._patients[study_id]

    def findings(self, study_id: str) -> dict[str, bool] | None:
        """Finding -> whether it shows; None where unknown."""
        number, row = self._place[study_id]
        batch = self._batches[number]
        return dict(zip(ALL_FINDINGS, batch.findings[row].tolist())) if batch.has_findings[row] else None


def _views(batch: pa.RecordBatch, film_size: int) -> _Batch:
    def view(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray:
        return np.frombuffer(batch.column(name).buffers()[1], dtype=dtype)[
            : batch.num_rows * int(np.prod(shape))
        ].reshape(batch.num_rows, *shape)

    def valid(name: str) -> NDArray[np.bool_]:
        return np.asarray(batch.column(name).is_valid().to_numpy(zero_copy_only=False))

    return _Batch(
        ecg=view("ecg", np.float16, ECG_SHAPE),
        film=view("film", np.uint8, (film_size, film_size)),
        percentiles=view("percentiles", np.float32, (NUM_LABS,)),
        findings=view("findings", np.bool_, (len(ALL_FINDINGS),)),
        has_ecg=valid("ecg"),
        has_film=valid("film"),
        has_findings=valid("findings"),
    )
