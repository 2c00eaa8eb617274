"""WFDB headers and signals, DICOM waveforms, films: read right, or refused with one line that names the file."""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from hostile import CASES, any_spoiled, assert_clear, spoiled
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtvt_rl.data.config import CohortConfig, FilmConfig
from medtvt_rl.data.cxr import read_film
from medtvt_rl.data.ecg import read_ecg
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.simulate.cohort import write_cohort

FILM = FilmConfig(size=32)
FORMATS = ["16", "16x3", "16:2", "16+8", "212", "80", "8", "24", "32", "516", "61"]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of a few studies."""
    root = tmp_path_factory.mktemp("fuzz") / "data"
    return write_cohort(CohortConfig(num_train=3, num_validation=1, num_test=1, film_size=48, missing_share=0.0), root)


def check_ecg(path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ecg = read_ecg(path)
    except DataError as error:
        assert_clear(error, path.parent.name)
        return
    assert ecg.shape == (12, 1000) and ecg.dtype == np.float32
    assert np.isfinite(ecg).all() and np.abs(ecg).max() < 100


def check_film(path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            film = read_film(path, FILM)
    except DataError as error:
        assert_clear(error, path.name)
        return
    assert film.shape == (32, 32) and film.dtype == np.uint8


@CASES
@given(data=st.data())
def test_wfdb_headers(samples: Path, tmp_path: Path, data: st.DataObject) -> None:
    source = next((samples / "ecg" / "train").glob("*.hea"))
    header = source.read_text()
    (tmp_path / f"{source.stem}.dat").write_bytes(source.with_suffix(".dat").read_bytes())
    changed = data.draw(st.one_of(any_spoiled(header.encode(), " "), any_spoiled(header.encode(), "\n")))
    (tmp_path / source.name).write_bytes(changed)
    check_ecg(tmp_path / source.stem)


@CASES
@given(data=st.data())
def test_wfdb_signals(samples: Path, tmp_path: Path, data: st.DataObject) -> None:
    source = next((samples / "ecg" / "train").glob("*.hea"))
    (tmp_path / source.name).write_bytes(source.read_bytes())
    changed = data.draw(spoiled(source.with_suffix(".dat").read_bytes()))
    (tmp_path / f"{source.stem}.dat").write_bytes(changed)
    check_ecg(tmp_path / source.stem)


@CASES
@given(place=st.integers(0, 2**40), bit=st.integers(0, 7))
def test_one_flipped_bit_of_a_signal_is_found(samples: Path, tmp_path: Path, place: int, bit: int) -> None:
    source = next((samples / "ecg" / "train").glob("*.hea"))
    (tmp_path / source.name).write_bytes(source.read_bytes())
    content = bytearray(source.with_suffix(".dat").read_bytes())
    content[place % len(content)] ^= 1 << bit
    (tmp_path / f"{source.stem}.dat").write_bytes(content)
    with pytest.raises(DataError, match=r"the checksum of \w+ differs"):
        read_ecg(tmp_path / source.stem)


@CASES
@given(
    data=st.data(), format=st.sampled_from(["16", "16x3", "16:2", "16+8", "212", "80", "8", "24", "32", "516", "61"])
)
def test_other_wfdb_formats(samples: Path, tmp_path: Path, data: st.DataObject, format: str) -> None:
    """They go through the wfdb package."""
    source = next((samples / "ecg" / "train").glob("*.hea"))
    header = source.read_text().replace(".dat 16 ", f".dat {format} ")
    (tmp_path / source.name).write_bytes(data.draw(any_spoiled(header.encode(), " ")))
    (tmp_path / f"{source.stem}.dat").write_bytes(source.with_suffix(".dat").read_bytes())
    check_ecg(tmp_path / source.stem)


@CASES
@given(data=st.data())
def test_dicom_waveforms(tmp_path: Path, data: st.DataObject) -> None:
    content = Path(pydicom.data.get_testdata_file("waveform_ecg.dcm")).read_bytes()  # type: ignore[arg-type]
    path = tmp_path / "ecg.dcm"
    path.write_bytes(data.draw(spoiled(content)))
    check_ecg(path)


@CASES
@given(data=st.data(), form=st.sampled_from(["JPEG", "PNG", "progressive", "16 bit", "palette"]))
def test_films(samples: Path, tmp_path: Path, data: st.DataObject, form: str) -> None:
    image = Image.open(next((samples / "cxr" / "train").glob("*.jpg"))).convert("L")
    buffer = io.BytesIO()
    if form == "16 bit":
        Image.fromarray(np.asarray(image).astype(np.uint16) * 200).save(buffer, "PNG")
    elif form == "palette":
        image.convert("P").save(buffer, "PNG")
    else:
        image.save(buffer, "PNG" if form == "PNG" else "JPEG", progressive=form == "progressive")
    path = tmp_path / "film.jpg"
    path.write_bytes(data.draw(spoiled(buffer.getvalue())))
    check_film(path)


@CASES
@given(data=st.data())
def test_dicom_films(tmp_path: Path, data: st.DataObject) -> None:
    content = Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes()  # type: ignore[arg-type]
    path = tmp_path / "film.dcm"
    path.write_bytes(data.draw(spoiled(content)))
    check_film(path)


@pytest.mark.parametrize(
    "head", ["x/3 12 500 5000", "x 12 500 999999999999", "x 999999 500 5000", "x 12 500 " + "9" * 5000, "", "\0"]
)
def test_headers_that_ask_for_too_much_are_refused(tmp_path: Path, head: str) -> None:
    (tmp_path / "x.hea").write_text(head + "\n" + "x.dat 212 200 16 0 0 0 0 I\n" * 12)
    (tmp_path / "x.dat").write_bytes(b"\0" * 1000)
    with pytest.raises(DataError, match=r"x"):
        read_ecg(tmp_path / "x")


@pytest.mark.parametrize("name", ["x.hea", "x.dat"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.hea").write_text("x 12 500 5000\n" + "x.dat 16 200 16 0 0 0 0 I\n" * 12)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    said: list[str] = []

    def read() -> None:
        try:
            read_ecg(tmp_path / "x")
        except DataError as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert said and "no plain file" in said[0]
