"""Reads a chest film from JPEG, PNG or DICOM.

Owns: the one form in which the rest sees a film, [S, S] uint8 with air black, and the checks on the way there. Does
not own: normalisation for a model. By default the whole film is kept and padded to a square, so that no lung field is
cut away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medtvt_rl.data.config import FilmConfig
from medtvt_rl.data.errors import DataError, one_line
from medtvt_rl.data.silence import silent_readers

PUBLISHED_SHARE = 224 / 400
"""What the published loader of MedTVT-R1 keeps of the shorter side: it resizes that to 400 pixels and cuts out 224."""
FORMATS = ("JPEG", "PNG")
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I", "F"}
_STRETCH_PERCENTILES = (0.5, 99.5)


def read_film(path: Path, config: FilmConfig) -> NDArray[np.uint8]:
    """Reads a film as [S, S] uint8, S = config.size, 0 = black.

    Raises:
        DataError: the file is missing, truncated or not a film, or the film is blank.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the film path")
    wanted = round(config.size / PUBLISHED_SHARE) if config.crop == "published" else config.size
    with silent_readers():
        image = _read_dicom(path) if is_dicom(path) else _read_image(path, wanted)
    low, high = image.getextrema()
    if low == high:
        raise DataError(f"{path}: the film is blank, every pixel is {low}; leave it out or export it again")
    return np.asarray(_square(image, config), dtype=np.uint8)


def is_dicom(path: Path) -> bool:
    """By suffix, or by the first bytes."""
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _square(image: Image.Image, config: FilmConfig) -> Image.Image:
    """Pads ("whole") or cuts ("center", "published") a grey image to a square of the configured side."""
    width, height = image.size
    size = (config.size, config.size)
    if config.crop != "whole":
        side = min(width, height) * (PUBLISHED_SHARE if config.crop == "published" else 1)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    scale = config.size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("L", size)
    offset = ((config.size - inner[0]) // 2, (config.size - inner[1]) // 2)
    square.paste(image.resize(inner, Image.Resampling.BILINEAR), offset)
    return square


def _read_image(path: Path, size: int) -> Image.Image:
    """A grey 8-bit image; a JPEG much larger than `size` is decoded at a fraction of its resolution."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("L", (2 * size, 2 * size))
            image.load()
            if image.mode in _SIXTEEN_BIT:
                return _stretch(np.asarray(image, dtype=np.float32))
            return image.convert("L")
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{path}: not a readable JPEG or PNG ({one_line(error)}); copy the file again") from error


def _stretch(pixels: NDArray[np.float32], windowed: bool = False) -> Image.Image:
    """Maps [H, W] to 0..255: by its whole range after a display window, by robust percentiles otherwise."""
    low, high = (pixels.min(), pixels.max()) if windowed else np.percentile(pixels, _STRETCH_PERCENTILES)
    if high <= low:
        low, high = pixels.min(), max(pixels.max(), pixels.min() + 1)
    return Image.fromarray((np.clip((pixels - low) / (high - low), 0, 1) * 255).round().astype(np.uint8))


def _read_dicom(path: Path) -> Image.Image:
    """A grey 8-bit image: rescale, then the display window if the file gives one, then MONOCHROME1 turned over."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        dataset = pydicom.dcmread(path)
        photometric = str(dataset.get("PhotometricInterpretation"))
        if photometric not in {"MONOCHROME1", "MONOCHROME2"}:
            raise DataError(f"{path}: PhotometricInterpretation is {photometric}, expected MONOCHROME1 or MONOCHROME2")
        pixels = dataset.pixel_array
        if pixels.ndim != 2:
            raise DataError(
                f"{path}: pixels have shape {pixels.shape}, expected one frame (H, W); export one film per file"
            )
        windowed = "WindowCenter" in dataset or "VOILUTSequence" in dataset
        shown = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset)
        image = _stretch(np.asarray(shown, dtype=np.float32), windowed)
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{path}: not a readable DICOM film ({one_line(error)}); export it again") from error
    return Image.eval(image, lambda value: 255 - value) if photometric == "MONOCHROME1" else image
