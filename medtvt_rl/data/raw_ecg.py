"""Reads recordings as their files have them: WFDB records and DICOM waveforms.

Owns: the two formats, and that a header names only files beside it. Does not own: leads, units and rates (ecg.py). The
layout of the published records, format 16 in one file, is read directly, which takes a tenth of the time; anything else
goes through the wfdb package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.errors import DataError, one_line
from medtvt_rl.data.silence import silent_readers

_INVALID_SAMPLE = -32768
_MAX_HEADER_BYTES, _MAX_LEADS, _MAX_SAMPLES, _MAX_FIELD = 1 << 16, 64, 10_000_000, 200
_DEFAULT_GAIN = 200.0
_PARSER_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    MemoryError,
)
_RECORD_LINE = re.compile(r"(?P<name>[^\s/]+)\s+(?P<leads>\d+)\s+(?P<rate>[\d.]+)\s+(?P<samples>\d+)(?:\s.*)?")
_SIGNAL_LINE = re.compile(
    r"(?P<file>\S+)\s+16\s+(?P<gain>[\d.]+)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?"
    r"\s+\d+\s+(?P<zero>-?\d+)\s+-?\d+\s+(?P<checksum>-?\d+)\s+0\s+(?P<lead>\S.*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawEcg:
    """A recording as its file has it.

    Attributes:
        signal: [N, L] float64 in `units`; NaN where invalid.
        leads: [L] names as written.
        units: [L] as written.
    """

    signal: NDArray[np.float64]
    rate_hz: float
    leads: Sequence[str]
    units: Sequence[str]


def read_raw_ecg(path: Path) -> RawEcg:
    """Reads a DICOM file (.dcm) or a WFDB record. Raises DataError if it is missing or unreadable."""
    with silent_readers():
        return _read_dicom(path) if path.suffix.lower() == ".dcm" else _read_wfdb(record_path(path))


def record_path(path: Path) -> Path:
    """A WFDB record's path without .hea or .dat."""
    return path.with_suffix("") if path.suffix.lower() in {".hea", ".dat"} else path


def ecg_files(path: Path) -> list[Path]:
    """The files that a recording consists of, whether or not they exist."""
    if path.suffix.lower() == ".dcm":
        return [path]
    record = record_path(path)
    return [record.parent / (record.name + suffix) for suffix in (".hea", ".dat")]


def _read_wfdb(record: Path) -> RawEcg:
    header_path = record.parent / (record.name + ".hea")
    try:
        if header_path.exists() and not header_path.is_file():
            raise DataError(f"{header_path}: no plain file; check the ECG path")
        with header_path.open("rb") as file:
            content = file.read(_MAX_HEADER_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{header_path}: no such file; check the ECG path") from None
    except OSError as error:
        raise DataError(f"{header_path}: cannot be read ({error}); check its permissions") from error
    if len(content) > _MAX_HEADER_BYTES:
        raise DataError(f"{header_path}: larger than {_MAX_HEADER_BYTES} bytes, which no header is; copy it again")
    text = content.decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    _check_header(header_path, lines)
    try:
        return _read_format_16(record.parent, lines) or _read_by_package(record)
    except FileNotFoundError as error:
        missing = Path(error.filename or record).name
        raise DataError(f"{record.parent / missing}: no such file; copy the record again") from None
    except _PARSER_FAULTS as error:
        raise DataError(f"{record}: not a readable WFDB record ({one_line(error)}); copy the record again") from error


def _check_header(header: Path, lines: list[str]) -> None:
    """Raises DataError, before anything is read by it, for a header that names files elsewhere or absurd sizes."""
    fields = lines[0].split() if lines else []
    if not fields:
        raise DataError(f"{header}: empty; copy the record again")
    if "/" in fields[0]:
        raise DataError(f"{header}: a record of several segments; export one of a single segment")
    for what, place, most in (("leads", 1, _MAX_LEADS), ("samples", 3, _MAX_SAMPLES)):
        given = fields[place] if place < len(fields) else "1"
        if not given.isascii() or not given.isdigit() or len(given) > 12 or int(given) > most:
            raise DataError(f"{header}: {given[:20]!r} {what}, expected a number up to {most}; mend the header")
    for line in lines[1:]:
        if any(len(field) > _MAX_FIELD for field in line.split()):
            raise DataError(f"{header}: a field of more than {_MAX_FIELD} characters; mend the header")
        name = line.split()[0]
        path = header.parent / name
        if Path(name).name != name or path.is_symlink() or (path.exists() and not path.is_file()):
            raise DataError(f"{header}: signal file {name[:60]!r} is no plain file beside the header; mend it")


def _read_format_16(folder: Path, lines: list[str]) -> RawEcg | None:
    """Reads the published layout, one file of little-endian int16 frames; None where the header says otherwise."""
    head = _RECORD_LINE.fullmatch(lines[0]) if lines else None
    signals = [_SIGNAL_LINE.fullmatch(line) for line in lines[1:]]
    if head is None or len(signals) != int(head["leads"]):
        return None
    found = [signal for signal in signals if signal is not None]
    if len(found) != len(signals) or len({signal["file"] for signal in found}) != 1:
        return None
    shape = int(head["samples"]), len(found)
    samples = np.fromfile(folder / found[0]["file"], dtype="<i2")
    if samples.size != shape[0] * shape[1]:
        raise ValueError(f"{found[0]['file']} holds {samples.size} samples, the header says {shape[0]} x {shape[1]}")
    _check_sums(samples.reshape(shape), found)
    gain = np.array([float(signal["gain"]) or _DEFAULT_GAIN for signal in found])
    baseline = np.array([float(signal["baseline"] or signal["zero"]) for signal in found])
    frames = samples.reshape(shape)
    signal = (frames - baseline) / gain
    signal[frames == _INVALID_SAMPLE] = np.nan
    leads, units = [match["lead"] for match in found], [match["unit"] or "mV" for match in found]
    return RawEcg(signal=signal, rate_hz=float(head["rate"]), leads=leads, units=units)


def _check_sums(frames: NDArray[np.int16], signals: Sequence[re.Match[str]]) -> None:
    """Raises ValueError where the samples [N, L] are not those that were written: a lead's checksum is the sum of its
    samples, modulo 2^16 (header(5) of the WFDB applications guide). Where all are 0 the writer has left them out."""
    written = np.array([int(signal["checksum"]) for signal in signals]) % 65536
    if written.any():
        found = frames.sum(axis=0, dtype=np.int64) % 65536
        wrong = [signal["lead"] for signal, is_wrong in zip(signals, found != written) if is_wrong]
        if wrong:
            raise ValueError(f"the checksum of {', '.join(wrong)} differs: the samples are not those that were written")


def _read_by_package(record: Path) -> RawEcg:
    import wfdb

    content = wfdb.rdrecord(str(record))
    if content.p_signal is None or not content.sig_name or not content.units:
        raise ValueError("the header describes no signals")
    signal = np.asarray(content.p_signal, dtype=np.float64)
    leads, units = [str(name) for name in content.sig_name], [str(unit) for unit in content.units]
    return RawEcg(signal=signal, rate_hz=float(content.fs), leads=leads, units=units)


def _read_dicom(path: Path) -> RawEcg:
    import pydicom

    try:
        dataset = pydicom.dcmread(path)
        groups = dataset.get("WaveformSequence") or []
        lengths = [int(group.NumberOfWaveformSamples) for group in groups]
        if not lengths:
            raise DataError(f"{path}: the DICOM file holds no waveform; give a 12-lead ECG")
        longest = int(np.argmax(lengths))
        group, signal = groups[longest], dataset.waveform_array(longest)
        channels = group.ChannelDefinitionSequence
        leads = [str(channel.ChannelSourceSequence[0].CodeMeaning) for channel in channels]
        units = [str(channel.ChannelSensitivityUnitsSequence[0].CodeValue) for channel in channels]
        rate_hz = float(group.SamplingFrequency)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the ECG path") from None
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{path}: not a readable DICOM waveform ({one_line(error)}); export it again") from error
    return RawEcg(signal=np.asarray(signal, dtype=np.float64), rate_hz=rate_hz, leads=leads, units=units)
