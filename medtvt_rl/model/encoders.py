"""The modality encoders: one study's ECG, film or laboratory values to one feature vector.

Owns: the small convolutional encoders, the laboratory MLP and the choice among kinds. Every encoder is an nn.Module
with `num_features` and forward([B, ...]) -> [B, num_features].
Does not own: the published encoders (published_encoders.py), what becomes of the features (perception.py), or weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medtvt_rl.model.config import CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig
from medtvt_rl.model.published_encoders import Encoder, LabNormalisedMlp, VitFilmEncoder, Xresnet1d101

NUM_LEADS = 12
NUM_ECG_SAMPLES = 1000
NUM_LABS = 50
# Standard deviation of a uniform percentile is 1/sqrt(12); dividing by it gives the MLP inputs of unit variance.
PERCENTILE_SCALE = 12**0.5


def _conv_block(dimensions: int, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU, in one or two dimensions."""
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dimensions - 1]
    return nn.Sequential(conv(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm(outputs), nn.ReLU())


class EcgConv(Encoder):
    """Strided 1-D convolutions over [B, 12, 1000] mV; mean and maximum over time.

    Rhythm shows in the mean over beats, a rare beat or a tall wave in the maximum: both are kept.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        kernels = [9, 7] + [5] * (len(widths) - 2)
        inputs = [NUM_LEADS, *widths[:-1]]
        self.blocks = nn.Sequential(*(_conv_block(1, i, o, k, 2) for i, o, k in zip(inputs, widths, kernels)))
        self.num_features = 2 * widths[-1]

    def forward(self, ecg: Tensor) -> Tensor:
        """[B, 12, 1000] -> [B, 2 * widths[-1]]."""
        hidden = self.blocks(ecg)
        return torch.cat([hidden.mean(-1), hidden.amax(-1)], dim=-1)


class CxrConv(Encoder):
    """Strided 2-D convolutions over a film; global mean and maximum, and with the flat head a coarse map as well."""

    FLAT_CHANNELS = 24

    def __init__(self, config: CxrEncoderConfig) -> None:
        super().__init__()
        widths = config.widths
        kernels = [5] + [3] * (len(widths) - 1)
        inputs = [config.num_channels, *widths[:-1]]
        self.blocks = nn.Sequential(*(_conv_block(2, i, o, k, 2) for i, o, k in zip(inputs, widths, kernels)))
        self.num_features = 2 * widths[-1]
        self.flat: nn.Sequential | None = None
        if config.head == "flat":
            side = config.image_size
            for _ in widths:
                side = -(-side // 2)
            self.flat = _conv_block(2, widths[-1], self.FLAT_CHANNELS, 1, 1)
            self.num_features += self.FLAT_CHANNELS * side * side

    def forward(self, cxr: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, num_features]."""
        hidden = self.blocks(cxr)
        features = [hidden.mean((2, 3)), hidden.amax((2, 3))]
        if self.flat is not None:
            features.append(self.flat(hidden).flatten(1))
        return torch.cat(features, dim=-1)


class LabMlp(Encoder):
    """An MLP with GELU over 50 percentiles (0..1) and 50 measured-flags."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        inputs = [2 * NUM_LABS, *widths[:-1]]
        layers = [layer for i, o in zip(inputs, widths) for layer in (nn.Linear(i, o), nn.GELU())]
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1]

    def forward(self, lab: Tensor) -> Tensor:
        """[B, 100] -> [B, widths[-1]]."""
        percentiles, measured = lab.split(NUM_LABS, dim=-1)
        return self.layers(torch.cat([(percentiles - 0.5) * PERCENTILE_SCALE, measured], dim=-1))


def _check_widths(field: str, widths: list[int], least: int) -> None:
    if len(widths) < least or min(widths) < 1:
        raise ValueError(f"{field}: {widths}, expected at least {least} positive widths")


def build_ecg_encoder(config: EcgEncoderConfig) -> Encoder:
    """The ECG encoder of this configuration. Raises ValueError for an unknown kind or impossible widths."""
    if config.kind == "xresnet1d101":
        return Xresnet1d101()
    if config.kind != "conv":
        raise ValueError(f"model.ecg.kind: {config.kind!r}, expected 'conv' or 'xresnet1d101'")
    _check_widths("model.ecg.widths", config.widths, 2)
    return EcgConv(config.widths)


def build_cxr_encoder(config: CxrEncoderConfig) -> Encoder:
    """The film encoder of this configuration. Raises ValueError for an unknown kind or impossible widths."""
    if config.kind == "vit":
        return VitFilmEncoder(config)
    if config.kind != "conv":
        raise ValueError(f"model.cxr.kind: {config.kind!r}, expected 'conv' or 'vit'")
    _check_widths("model.cxr.widths", config.widths, 1)
    return CxrConv(config)


def build_lab_encoder(config: LabEncoderConfig) -> Encoder:
    """The laboratory encoder of this configuration. Raises ValueError for an unknown kind or impossible widths."""
    _check_widths("model.lab.widths", config.widths, 1)
    if config.kind == "normalised":
        return LabNormalisedMlp(2 * NUM_LABS, config.widths)
    if config.kind != "mlp":
        raise ValueError(f"model.lab.kind: {config.kind!r}, expected 'mlp' or 'normalised'")
    return LabMlp(config.widths)
