"""The film reader: formats, crops, and every bad film."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image

from medtvt_rl.data.config import FilmConfig
from medtvt_rl.data.cxr import read_film
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.simulate.cxr import FilmFindings, simulate_film

WHOLE = FilmConfig(size=64)


def film(size: int = 128) -> np.ndarray:
    return simulate_film(np.random.default_rng(0), FilmFindings(), size)


def similar(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel().astype(float), second.ravel().astype(float))[0, 1])


@pytest.mark.parametrize("name", ["film.jpg", "film.png"])
def test_a_square_film_keeps_its_content(tmp_path: Path, name: str) -> None:
    Image.fromarray(film()).save(tmp_path / name)
    read = read_film(tmp_path / name, WHOLE)
    assert read.shape == (64, 64) and read.dtype == np.uint8
    assert similar(read, film().reshape(64, 2, 64, 2).mean(axis=(1, 3))) > 0.99


def test_a_large_jpeg_is_read_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    big = np.kron(film(), np.ones((16, 16), np.uint8))
    Image.fromarray(big).save(tmp_path / "big.jpg")
    assert similar(read_film(tmp_path / "big.jpg", WHOLE), film().reshape(64, 2, 64, 2).mean(axis=(1, 3))) > 0.99


def test_a_wide_film_is_padded_whole_or_cut(tmp_path: Path) -> None:
    wide = np.full((100, 200), 90, np.uint8)
    wide[:, :10] = 250
    Image.fromarray(wide).save(tmp_path / "wide.png")
    whole = read_film(tmp_path / "wide.png", WHOLE)
    assert (whole[:16] == 0).all() and (whole[48:] == 0).all() and whole[32, 0] == 250 and whole[32, 40] == 90
    Image.fromarray(np.where(np.arange(200) < 100, 90, 200).astype(np.uint8)[None].repeat(100, 0)).save(
        tmp_path / "two.png"
    )
    centre = read_film(tmp_path / "two.png", FilmConfig(size=64, crop="center"))
    assert centre[32, 5] == 90 and centre[32, 60] == 200 and centre.min() > 0


def test_the_published_cut_keeps_the_middle(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:400, :500]
    rings = np.maximum(abs(rows - 199.5), abs(columns - 249.5)).astype(np.uint8)
    Image.fromarray(rings).save(tmp_path / "rings.png")
    cut = read_film(tmp_path / "rings.png", FilmConfig(size=112, crop="published"))
    assert cut.shape == (112, 112) and abs(int(cut[56, 0]) - 111) <= 2 and abs(int(cut[0, 56]) - 111) <= 2
    assert cut[56, 56] <= 2


def test_sixteen_bits_are_stretched(tmp_path: Path) -> None:
    Image.fromarray(film().astype(np.uint16) * 16).save(tmp_path / "deep.png")
    read = read_film(tmp_path / "deep.png", WHOLE)
    assert read.max() > 230 and similar(read, film().reshape(64, 2, 64, 2).mean(axis=(1, 3))) > 0.98


def test_a_colour_film_becomes_grey(tmp_path: Path) -> None:
    Image.fromarray(film()).convert("RGB").save(tmp_path / "rgb.jpg")
    assert read_film(tmp_path / "rgb.jpg", WHOLE).shape == (64, 64)


def test_bad_films_are_one_clear_line(tmp_path: Path) -> None:
    Image.fromarray(film()).save(tmp_path / "film.jpg")
    data = (tmp_path / "film.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no film")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("L", (80, 80), 7).save(tmp_path / "blank.png")
    (tmp_path / "dir.jpg").mkdir()
    expected = {
        "cut.jpg": "truncated",
        "text.jpg": "not a readable JPEG or PNG",
        "empty.jpg": "not a readable JPEG or PNG",
        "blank.png": "every pixel is 7",
        "gone.jpg": "no such file",
        "dir.jpg": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message) as error:
            read_film(tmp_path / name, WHOLE)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["film.jpg", "film.png"])
def test_damaged_films_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    Image.fromarray(film(64)).save(tmp_path / name)
    original = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(80):
        spoilt = bytearray(original)
        for position in rng.integers(0, len(spoilt), 4):
            spoilt[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(bytes(spoilt[: rng.integers(1, len(spoilt) + 1)]))
        with contextlib.suppress(DataError):
            assert read_film(tmp_path / name, WHOLE).shape == (64, 64)


def test_a_real_dicom_film_shows_air_dark(tmp_path: Path) -> None:
    path = Path(str(pydicom.data.get_testdata_file("RG1_UNCR.dcm", download=False)))
    read = read_film(path, FilmConfig(size=128))
    assert read.shape == (128, 128)
    spine, lungs = read[40:70, 60:66].mean(), np.concatenate([read[35:60, 34:44], read[35:60, 80:90]]).mean()
    assert spine - lungs > 40
    dataset = pydicom.dcmread(path)
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.save_as(tmp_path / "turned.dcm")
    inside = np.s_[:, 10:118]
    np.testing.assert_array_equal(
        read_film(tmp_path / "turned.dcm", FilmConfig(size=128))[inside][60], 255 - read[inside][60]
    )


def test_a_dicom_that_is_no_grey_film_is_refused(tmp_path: Path) -> None:
    path = Path(str(pydicom.data.get_testdata_file("waveform_ecg.dcm", download=False)))
    with pytest.raises(DataError, match="PhotometricInterpretation"):
        read_film(path, WHOLE)
    (tmp_path / "not.dcm").write_bytes(b"x" * 500)
    with pytest.raises(DataError, match="not a readable DICOM film"):
        read_film(tmp_path / "not.dcm", WHOLE)
