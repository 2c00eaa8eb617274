"""The encoders of the published MedTVT-R1 model (arXiv 2506.18512): the same functions, at the published sizes.

Owns: xresnet1d-101 with its recurrent pooling, the Vision Transformer with its token pooling, the normalised
laboratory MLP. Does not own: their projections into the language model (perception.py), or pre-trained weights.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from medtvt_rl.model.config import CxrEncoderConfig

EXPANSION = 4


class Encoder(nn.Module):
    """What all encoders share: the length of their feature vector."""

    num_features: int


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, activation: bool = True) -> nn.Sequential:
    """Convolution without bias and BatchNorm, with ReLU unless told otherwise."""
    layers: list[nn.Module] = [
        nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm1d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if activation else nn.Sequential(*layers)


class Bottleneck1d(nn.Module):
    """1x1, k5, 1x1 convolutions beside a shortcut: average pooling and, where the width changes, a 1x1 convolution."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * inner
        self.convs = nn.Sequential(
            _conv_norm(inputs, inner, 1),
            _conv_norm(inner, inner, 5, stride),
            _conv_norm(inner, outputs, 1, activation=False),
        )
        pool = [nn.AvgPool1d(2, ceil_mode=True)] if stride != 1 else []
        match = [_conv_norm(inputs, outputs, 1, activation=False)] if inputs != outputs else []
        self.shortcut = nn.Sequential(*pool, *match)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, T] -> [B, 4 * inner, ceil(T / stride)]."""
        return functional.relu(self.convs(x) + self.shortcut(x))


class Xresnet1d101(Encoder):
    """xresnet1d-101 over 12 leads, then a tanh RNN over time and attention pooling.

    [B, 12, 1000] mV -> [B, 768, 32] -> [B, 1024].
    """

    STAGES = ((3, 64), (4, 128), (23, 128), (3, 192))
    NUM_CHANNELS = 768
    num_features = 1024

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_norm(12, 32, 5, 2), _conv_norm(32, 32, 5), _conv_norm(32, 64, 5))
        self.pool = nn.MaxPool1d(3, 2, 1)
        stages, inputs = [], 64
        for stage, (depth, inner) in enumerate(self.STAGES):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck1d(inputs, inner, 2 if stage > 0 and block == 0 else 1))
                inputs = EXPANSION * inner
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.rnn = nn.RNN(self.NUM_CHANNELS, self.num_features, batch_first=True)
        self.attention = nn.Linear(self.num_features, 1)

    def sequence(self, ecg: Tensor) -> Tensor:
        """[B, 12, 1000] -> [B, 768, 32], before pooling."""
        return self.stages(self.pool(self.stem(ecg)))

    def forward(self, ecg: Tensor) -> Tensor:
        """[B, 12, 1000] -> [B, 1024]."""
        steps = functional.normalize(self.sequence(ecg).transpose(1, 2), dim=-1)
        hidden, _ = self.rnn(steps)
        weights = self.attention(hidden).softmax(dim=1)
        return (weights * hidden).sum(dim=1)


class VitFilmEncoder(Encoder):
    """A Vision Transformer whose tokens are mixed by one learned weight per position, L2-normalised.

    [B, 3, S, S] -> [B, hidden_size].
    """

    def __init__(self, config: CxrEncoderConfig) -> None:
        super().__init__()
        vit = ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(vit, add_pooling_layer=False)
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.aggregate = nn.Conv1d(num_tokens, 1, 1)
        self.num_features = config.hidden_size

    def forward(self, cxr: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, hidden_size]."""
        tokens = self.vit(pixel_values=cxr).last_hidden_state
        return functional.normalize(self.aggregate(tokens).squeeze(1), dim=-1)


class LabNormalisedMlp(Encoder):
    """Linear layers with GELU between, LayerNorm at the end, L2-normalised. [B, inputs] -> [B, widths[-1]]."""

    def __init__(self, inputs: int, widths: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in zip([inputs, *widths[:-1]], widths):
            layers += [nn.Linear(i, o), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.norm = nn.LayerNorm(widths[-1])
        self.num_features = widths[-1]

    def forward(self, lab: Tensor) -> Tensor:
        """[B, inputs] -> [B, widths[-1]]."""
        return functional.normalize(self.norm(self.layers(lab)), dim=-1)
