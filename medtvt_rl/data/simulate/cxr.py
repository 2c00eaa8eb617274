"""Simulates a frontal chest film with chosen findings.

Owns: a phantom of the thorax and its projection. Does not own: which findings a patient has, or files. A map of
attenuation is summed from tissue, air, heart, bones, vessels and disease, then exposed by Beer-Lambert's law.
Coordinates run from 0 to 1 downwards and -0.5 to 0.5 from the image's left, which is the patient's right, to its
right. All maps are [S, S] float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Map = NDArray[np.float32]

_NUM_RIBS = 10
_SIDES = (-1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmFindings:
    """What the film shows; strengths are 0 where the finding is absent.

    Attributes:
        cardiothoracic_ratio: width of the heart over that of the thorax; above 0.5 it counts as enlarged.
        consolidation: density of one focal opacity, 0..1.
        effusion: height of the fluid on one side, 0..1.
        edema: density of the haze around both hila, 0..1.
    """

    cardiothoracic_ratio: float = 0.45
    consolidation: float = 0.0
    effusion: float = 0.0
    edema: float = 0.0


@dataclass(frozen=True, slots=True)
class _Thorax:
    """One patient's geometry: coordinates, the lungs by side, their union, and textures of rising smoothness."""

    x: Map
    y: Map
    half_width: float
    lungs: dict[int, Map]
    both_lungs: Map
    domes: dict[int, float]
    fine: Map
    medium: Map
    coarse: Map


def simulate_film(rng: np.random.Generator, findings: FilmFindings, size: int) -> NDArray[np.uint8]:
    """[size, size] uint8, air black."""
    thorax = _draw_thorax(rng, size)
    attenuation = _tissue(thorax)
    attenuation += _heart(thorax, findings.cardiothoracic_ratio)
    _add_bones(attenuation, thorax, rng)
    attenuation += _hila(thorax, findings.edema)
    if findings.consolidation:
        attenuation += findings.consolidation * _consolidation(thorax, rng)
    if findings.effusion:
        attenuation = np.maximum(attenuation, _effusion(thorax, rng, findings.effusion))
    return _expose(attenuation, thorax, rng)


def _inside(distance: Map, softness: float) -> Map:
    """1 where the signed distance is negative, 0 where positive, smooth over `softness`."""
    return np.float32(0.5) - np.float32(0.5) * np.tanh(distance * np.float32(0.5 / softness))


@cache
def _frequencies(size: int) -> Map:
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    return frequency.astype(np.float32)


def _textures(rng: np.random.Generator, size: int, slopes: tuple[float, ...]) -> list[Map]:
    """One random field of mean 0 and deviation 1 per slope; its power falls as frequency to the minus slope."""
    spectra = scipy.fft.rfft2(rng.standard_normal((len(slopes), size, size), dtype=np.float32))
    fields = []
    for spectrum, slope in zip(spectra, slopes):
        field = scipy.fft.irfft2(spectrum * _frequencies(size) ** np.float32(-slope / 2), (size, size))
        fields.append((field - field.mean()) / field.std())
    return fields


def _draw_thorax(rng: np.random.Generator, size: int) -> _Thorax:
    """A patient who stands a little off centre and turned, with lungs of his own shape."""
    fine, medium, coarse = _textures(rng, size, (1.2, 2.0, 2.9))
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    x0, y0 = columns - np.float32(0.5 + rng.normal(0, 0.012)), rows + np.float32(rng.normal(0, 0.012))
    turn, scale = rng.normal(0, 0.025), rng.uniform(0.93, 1.05)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x, y = (x0 * cos - (y0 - 0.5) * sin) / np.float32(scale), x0 * sin + (y0 - 0.5) * cos + np.float32(0.5)
    domes = {side: float(0.80 + rng.normal(0, 0.015) + (0.025 if side > 0 else 0.0)) for side in _SIDES}
    lungs = {}
    for side in _SIDES:
        top = 0.055 + 0.02 * rng.random()
        height = (y - np.float32(top)) / np.float32(domes[side] - top)
        half = np.float32(0.162) * np.clip(height, 0, 1) ** np.float32(0.36) * (1 + np.float32(0.06) * height)
        lateral = np.abs(x - side * (np.float32(0.200) + np.float32(0.028) * height)) - half
        lung = _inside(lateral + np.float32(0.012) * coarse, 0.008)
        bulge = np.cos(np.clip((x - np.float32(side * 0.2)) / np.float32(0.16), -1, 1) * np.float32(np.pi / 2))
        lung *= _inside(y - (np.float32(domes[side] + 0.045) - np.float32(0.055) * bulge), 0.006)
        lungs[side] = lung * _inside(np.float32(top) - y, 0.012)
    return _Thorax(
        x=x,
        y=y,
        half_width=0.36 * rng.uniform(0.96, 1.04),
        lungs=lungs,
        both_lungs=np.maximum(lungs[-1], lungs[1]),
        domes=domes,
        fine=fine,
        medium=medium,
        coarse=coarse,
    )


def _tissue(thorax: _Thorax) -> Map:
    """Soft tissue of the trunk, narrow at the neck, less the air of the lungs, which thins towards the bases."""
    neck = np.float32(0.22) * np.exp(-((thorax.y / np.float32(0.07)) ** 2))
    body = _inside(np.abs(thorax.x) - (np.float32(0.50) - neck), 0.02)
    air = thorax.both_lungs * (1 - np.float32(0.12) * np.clip((thorax.y - 0.6) / np.float32(0.3), 0, 1))
    return np.float32(1.15) * body - np.float32(0.98) * air


def _heart(thorax: _Thorax, ratio: float) -> Map:
    """Heart, mediastinum and aortic knob. The heart's half width is `ratio` of the thorax's."""
    x, y = thorax.x, thorax.y
    half = ratio * thorax.half_width * 1.02
    across, down = x - np.float32(0.045 + 0.05 * (ratio - 0.45)), y - np.float32(0.655)
    cos, sin = np.float32(np.cos(0.5)), np.float32(np.sin(0.5))
    along, beside = across * cos + down * sin, down * cos - across * sin
    radius = np.sqrt((along / np.float32(half * 1.10)) ** 2 + (beside / np.float32(half * 0.82)) ** 2)
    heart = _inside(radius - 1 + np.float32(0.003) * thorax.coarse, 0.05)
    width = np.float32(0.055) + np.float32(0.02) * np.exp(-(((y - np.float32(0.1)) / np.float32(0.12)) ** 2))
    mediastinum = _inside(np.abs(x - np.float32(0.005)) - width, 0.008) * _inside(y - np.float32(0.82), 0.05)
    knob = _inside(np.hypot(x - np.float32(0.055), (y - np.float32(0.30)) * np.float32(0.9)) - np.float32(0.038), 0.006)
    shadow = np.maximum(np.maximum(heart, np.float32(0.85) * mediastinum), np.float32(0.75) * knob)
    return np.float32(0.62) * shadow * np.maximum(thorax.both_lungs, np.float32(0.25))


def _add_bones(attenuation: Map, thorax: _Thorax, rng: np.random.Generator) -> None:
    """Adds spine, clavicles, and the posterior and anterior ribs of both sides, in place."""
    x, y = thorax.x, thorax.y
    vertebrae = 1 + np.float32(0.18) * np.sin(np.float32(2 * np.pi * 17) * y)
    attenuation += np.float32(0.22) * _inside(np.abs(x) - np.float32(0.028), 0.006) * vertebrae
    outward = np.abs(x)
    beyond = (outward - np.float32(0.03)) / np.float32(0.33)
    arch = np.float32(0.155) - np.float32(0.13) * beyond
    arch += np.float32(0.035) * np.sin(np.float32(np.pi) * np.clip(beyond, 0, 1))
    on_clavicle = (beyond > 0) & (beyond < 1)
    attenuation += np.float32(0.16) * _inside(np.abs(y - arch) - np.float32(0.013), 0.003) * on_clavicle
    along = np.clip((outward - np.float32(0.03)) / np.float32(0.36), 0, 1.15)
    visible = (along > 0.02) & (along < 1.04) & (y < 0.87)
    for rib in range(_NUM_RIBS):
        slope = 0.02 + 0.012 * rib
        _add_rib(attenuation, y, along, visible, 0.15 * rng.uniform(0.8, 1.2), 0.045 + 0.070 * rib, slope, 0.15)
        _add_rib(attenuation, y, along, visible, 0.06 * rng.uniform(0.8, 1.2), 0.20 + 0.074 * rib, 0.20, -0.10)


def _add_rib(
    attenuation: Map,
    y: Map,
    along: Map,
    visible: NDArray[np.bool_],
    density: float,
    start: float,
    slope: float,
    curve: float,
) -> None:
    """Adds one pair of ribs: bands at y = start + slope u + curve u^2, where u runs outwards."""
    size = len(y)
    end = start + slope + curve
    first = int(max(0.0, min(start, end) - 0.09) * size)
    last = int(min(1.0, max(start, end) + 0.09) * size)
    if last <= first:
        return
    u = along[first:last]
    square = (y[first:last] - (start + u * (slope + curve * u))).astype(np.float32) * np.float32(1 / 0.0135)
    square *= square
    band = np.exp(np.float32(-0.8) * np.minimum(square, 6) ** 2)
    attenuation[first:last] += np.float32(density) * band * visible[first:last]


def _hila(thorax: _Thorax, edema: float) -> Map:
    """The roots of the lungs, their vessels, and the haze of oedema around them."""
    distance_squared = ((np.abs(thorax.x) - np.float32(0.085)) / np.float32(0.8)) ** 2 + (
        thorax.y - np.float32(0.45)
    ) ** 2
    density = np.float32(0.20) * np.exp(distance_squared * np.float32(-1 / 0.07**2))
    vessels = np.clip(thorax.fine, 0, 3) * np.exp(np.sqrt(distance_squared) * np.float32(-1 / 0.14))
    density += np.float32(0.08) * vessels
    if edema:
        haze = np.exp(distance_squared * np.float32(-1 / 0.22**2)) * (1 + np.float32(0.35) * thorax.medium)
        density += np.float32(0.38 * edema) * haze
    return density * thorax.both_lungs


def _consolidation(thorax: _Thorax, rng: np.random.Generator) -> Map:
    """One ragged opacity in one lung, more often below than above."""
    side = int(rng.choice(_SIDES))
    level = float(rng.choice([0.30, 0.50, 0.68], p=[0.2, 0.3, 0.5]))
    centre, radius = side * rng.uniform(0.16, 0.25), rng.uniform(0.07, 0.12)
    wide, high = radius * rng.uniform(0.9, 1.3), radius * rng.uniform(0.8, 1.3)
    across, down = (thorax.x - np.float32(centre)) / np.float32(wide), (thorax.y - np.float32(level)) / np.float32(high)
    edge = np.sqrt(across**2 + down**2) + np.float32(0.28) * np.roll(thorax.coarse, len(thorax.x) // 2, axis=0)
    density = np.float32(0.62) * _inside(edge - 1, 0.16) * (np.float32(0.85) + np.float32(0.22) * thorax.medium)
    return density * thorax.lungs[side]


def _effusion(thorax: _Thorax, rng: np.random.Generator, height: float) -> Map:
    """Fluid at one base that climbs along the chest wall and hides the costophrenic angle."""
    side = int(rng.choice(_SIDES))
    level = thorax.domes[side] - 0.05 - 0.22 * height
    inner = 1 - np.clip((side * thorax.x - np.float32(0.05)) / np.float32(0.3), 0, 1)
    surface = np.float32(level) + np.float32(0.10) * inner
    beside = np.abs(thorax.x - np.float32(0.22 * side)) - np.float32(0.22)
    return np.float32(0.95) * _inside(surface - thorax.y, 0.02) * _inside(beside, 0.01)


def _expose(attenuation: Map, thorax: _Thorax, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Beer-Lambert's law, display contrast, and quantum noise, strongest where least light arrived."""
    blurred = gaussian_filter(np.maximum(attenuation, 0), 0.7)
    image = 1 - np.exp(np.float32(-1.25) * blurred) + np.float32(0.012) * thorax.medium[::-1]
    low, high = np.percentile(image[::2, ::2], (0.5, 99.7))
    image = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1) ** np.float32(rng.uniform(0.9, 1.2))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += np.float32(0.016) * noise * np.sqrt(np.float32(1.2) - image)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
