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

from medtvt_rl.data.errors import DataError

_INVALID_SAMPLE = -32768
_DEFAULT_GAIN = 200.0
_PARSER_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, NotImplementedError)
_RECORD_LINE = re.compile(r"(?P<name>[^\s/]+)\s+(?P<leads>\d+)\s+(?P<rate>[\d.]+)\s+(?P<samples>\d+)(?:\s.*)?")
_SIGNAL_LINE = re.compile(
    r"(?P<file>\S+)\s+16\s+(?P<gain>[\d.]+)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?"
    r"\s+\d+\s+(?P<zero>-?\d+)\s+-?\d+\s+-?\d+\s+0\s+(?P<lead>\S.*)"
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
        lines = header_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise DataError(f"{header_path}: no such file; check the ECG path") from None
    except OSError as error:
        raise DataError(f"{header_path}: cannot be read ({error}); check its permissions") from error
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for line in lines[1:]:
        name = line.split()[0]
        if Path(name).name != name or (record.parent / name).is_symlink():
            raise DataError(f"{header_path}: signal file {name!r} is no plain file beside the header; mend the header")
    try:
        return _read_format_16(record.parent, lines) or _read_by_package(record)
    except FileNotFoundError as error:
        missing = Path(error.filename or record).name
        raise DataError(f"{record.parent / missing}: no such file; copy the record again") from None
    except _PARSER_FAULTS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{record}: not a readable WFDB record ({reason}); copy the record again") from error


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
    gain = np.array([float(signal["gain"]) or _DEFAULT_GAIN for signal in found])
    baseline = np.array([float(signal["baseline"] or signal["zero"]) for signal in found])
    frames = samples.reshape(shape)
    signal = (frames - baseline) / gain
    signal[frames == _INVALID_SAMPLE] = np.nan
    leads, units = [match["lead"] for match in found], [match["unit"] or "mV" for match in found]
    return RawEcg(signal=signal, rate_hz=float(head["rate"]), leads=leads, units=units)


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
    except (*_PARSER_FAULTS, pydicom.errors.InvalidDicomError) as error:
        raise DataError(f"{path}: not a readable DICOM waveform ({error}); export it again") from error
    return RawEcg(signal=np.asarray(signal, dtype=np.float64), rate_hz=rate_hz, leads=leads, units=units)
