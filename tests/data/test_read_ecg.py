"""The ECG reader: formats, orders, rates, units, and every bad recording."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import wfdb
from scipy.ndimage import uniform_filter1d
from wfdb_files import read_samples, write_samples

from medtvt_rl.data.ecg import LEADS, read_ecg, standard_ecg
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.raw_ecg import RawEcg, read_raw_ecg
from medtvt_rl.data.simulate.ecg import EcgFindings, simulate_ecg
from medtvt_rl.data.simulate.render import write_wfdb


def recording(seed: int = 0) -> np.ndarray:
    return simulate_ecg(np.random.default_rng(seed), EcgFindings())


def raw(signal: np.ndarray, rate_hz: float = 500.0, leads: tuple[str, ...] = LEADS, unit: str = "mV") -> RawEcg:
    return RawEcg(signal=signal.T.astype(float), rate_hz=rate_hz, leads=leads, units=[unit] * len(leads))


def written(folder: Path, seed: int = 0) -> Path:
    write_wfdb(folder / "rec", recording(seed))
    return folder / "rec"


def test_round_trip_through_wfdb(tmp_path: Path) -> None:
    signal = recording()
    ecg = read_ecg(written(tmp_path))
    assert ecg.shape == (12, 1000) and ecg.dtype == np.float32
    slow = uniform_filter1d(signal, 5)[:, ::5]
    assert all(np.corrcoef(a, b)[0, 1] > 0.95 for a, b in zip(ecg, slow))
    np.testing.assert_allclose(ecg, standard_ecg(raw(signal)), atol=0.01)


def test_own_reader_agrees_with_the_wfdb_package(tmp_path: Path) -> None:
    record = written(tmp_path)
    samples = read_samples(record)
    samples.flat[[5, 77]] = -32768
    write_samples(record, samples)
    ours, theirs = read_raw_ecg(record), wfdb.rdrecord(str(record))
    np.testing.assert_array_equal(ours.signal, theirs.p_signal)
    assert (list(ours.leads), list(ours.units), ours.rate_hz) == (theirs.sig_name, theirs.units, theirs.fs)
    assert np.isnan(ours.signal).sum() == 2


def test_samples_that_are_not_those_that_were_written_are_refused_where_the_header_knows_them(tmp_path: Path) -> None:
    record = written(tmp_path)
    samples = read_samples(record)
    samples[100, 3] += 1
    samples.tofile(record.with_suffix(".dat"))
    with pytest.raises(DataError, match="the checksum of aVR differs"):
        read_ecg(record)
    header = record.with_suffix(".hea")
    header.write_text(re.sub(r" -?\d+ 0 (\S+)\n", r" 0 0 \1\n", header.read_text()))
    assert read_ecg(record).shape == (12, 1000), "writers that know no sums write 0"


def test_another_wfdb_format_is_read_by_the_package(tmp_path: Path) -> None:
    signal = recording()
    wfdb.wrsamp("rec", 500, ["mV"] * 12, list(LEADS), signal.T.astype(float), fmt=["212"] * 12, write_dir=str(tmp_path))
    np.testing.assert_allclose(read_ecg(tmp_path / "rec"), standard_ecg(raw(signal)), atol=0.02)


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
def test_a_record_may_be_named_with_or_without_suffix(tmp_path: Path, suffix: str) -> None:
    assert read_ecg(tmp_path / f"{written(tmp_path).name}{suffix}").shape == (12, 1000)


def test_a_dot_in_a_record_name_is_no_suffix(tmp_path: Path) -> None:
    write_wfdb(tmp_path / "rec.v1", recording())
    assert read_ecg(tmp_path / "rec.v1").shape == (12, 1000)


def test_leads_are_ordered_by_name() -> None:
    signal = recording()
    order = np.random.default_rng(1).permutation(12)
    names = tuple(f"Lead {LEADS[i].upper()}" for i in order)
    np.testing.assert_array_equal(standard_ecg(raw(signal[order], leads=names)), standard_ecg(raw(signal)))


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1e3), ("µV", 1e3), ("V", 1e-3), ("MV", 1.0)])
def test_units_become_millivolts(unit: str, factor: float) -> None:
    signal = recording()
    np.testing.assert_allclose(standard_ecg(raw(signal * factor, unit=unit)), standard_ecg(raw(signal)), atol=1e-4)


@pytest.mark.parametrize("rate_hz", [100, 250, 257, 500, 1000])
def test_rates_are_brought_to_100_hz(rate_hz: int) -> None:
    time_s = np.arange(10 * rate_hz) / rate_hz
    wave = np.stack([np.sin(2 * np.pi * (1 + lead / 4) * time_s) for lead in range(12)])
    expected = np.stack([np.sin(2 * np.pi * (1 + lead / 4) * np.arange(1000) / 100) for lead in range(12)])
    np.testing.assert_allclose(standard_ecg(raw(wave, rate_hz))[:, 20:-20], expected[:, 20:-20], atol=0.01)


def test_frequencies_above_the_new_rate_do_not_fold_back() -> None:
    time_s = np.arange(5000) / 500
    wave = np.tile(np.sin(2 * np.pi * 90 * time_s), (12, 1))
    assert np.abs(standard_ecg(raw(wave))[:, 20:-20]).max() < 0.02


def test_an_invalid_sample_is_interpolated_and_spoils_nothing_else() -> None:
    signal = recording()
    broken = signal.copy()
    broken[3, 2000:2010] = np.nan
    mended = standard_ecg(raw(broken))
    assert np.isfinite(mended).all()
    clean = standard_ecg(raw(signal))
    np.testing.assert_array_equal(np.delete(mended, 3, axis=0), np.delete(clean, 3, axis=0))
    np.testing.assert_allclose(np.delete(mended[3], range(380, 425)), np.delete(clean[3], range(380, 425)), atol=0.02)


def bad_recordings() -> dict[str, tuple[RawEcg, str]]:
    signal = recording()
    gap = signal.copy()
    gap[6, 4400:] = np.nan
    return {
        "eleven leads": (raw(signal[:11], leads=LEADS[:11]), "11 leads.*missing V6.*expected the 12 leads"),
        "thirteen leads": (raw(signal[[*range(12), 0]], leads=(*LEADS, "V7")), "13 leads"),
        "a lead twice": (raw(signal, leads=(*LEADS[:11], "V5")), "missing V6"),
        "a gap too long": (raw(gap), "lead V1 is 12% invalid.*at most 10% is interpolated"),
        "all invalid": (raw(np.full_like(signal, np.nan)), "lead I is 100% invalid"),
        "wrong rate": (raw(signal, 360), "5000 samples at 360 Hz are 13.89 s, expected 10 s"),
        "no rate": (raw(signal, 0), "sampling rate is 0 Hz"),
        "too short": (raw(signal[:, :4000]), "8 s, expected 10 s"),
        "slow": (raw(signal[:, :500], 50), "50 Hz, expected at least 100"),
        "unknown unit": (raw(signal, unit="mmHg"), "lead I has unit 'mmHg', expected mV"),
        "wrong unit": (raw(signal * 1000), "check the unit in the header"),
        "flat": (raw(np.zeros_like(signal)), "every lead is flat"),
    }


@pytest.mark.parametrize("name", bad_recordings())
def test_a_bad_recording_is_one_clear_line(name: str) -> None:
    recording, message = bad_recordings()[name]
    with pytest.raises(DataError, match=message) as error:
        standard_ecg(recording)
    assert "\n" not in str(error.value)


def test_bad_files_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.hea: no such file"):
        read_ecg(tmp_path / "nothing")
    record = written(tmp_path)
    data = record.with_suffix(".dat").read_bytes()
    record.with_suffix(".dat").write_bytes(data[:-1000])
    with pytest.raises(DataError, match=r"rec: .*59500 samples, the header says 5000 x 12"):
        read_ecg(record)
    record.with_suffix(".dat").unlink()
    with pytest.raises(DataError, match=r"rec\.dat: no such file"):
        read_ecg(record)


@pytest.mark.parametrize("target", ["../secret.dat", "/etc/passwd"])
def test_a_header_cannot_name_a_file_elsewhere(tmp_path: Path, target: str) -> None:
    header = written(tmp_path).with_suffix(".hea")
    header.write_text(header.read_text().replace("rec.dat", target))
    with pytest.raises(DataError, match="no plain file beside the header"):
        read_ecg(tmp_path / "rec")


def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    header = written(tmp_path).with_suffix(".hea")
    original = header.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(original)
        for position in rng.integers(0, len(spoilt), 3):
            spoilt[position] = rng.integers(9, 127)
        header.write_bytes(bytes(spoilt[: rng.integers(1, len(spoilt) + 1)]))
        try:
            assert read_ecg(tmp_path / "rec").shape == (12, 1000)
        except DataError as error:
            assert "\n" not in str(error)


def test_a_real_dicom_ecg() -> None:
    ecg = read_ecg(Path(str(pydicom.data.get_testdata_file("waveform_ecg.dcm", download=False))))
    assert ecg.shape == (12, 1000) and 0.5 < np.abs(ecg).max() < 5
    lead = dict(zip(LEADS, ecg))
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=0.02)
    np.testing.assert_allclose(lead["aVF"], lead["II"] - lead["I"] / 2, atol=0.02)


def test_a_dicom_file_without_waveform_is_refused() -> None:
    path = Path(str(pydicom.data.get_testdata_file("CT_small.dcm", download=False)))
    with pytest.raises(DataError, match="holds no waveform"):
        read_ecg(path)
