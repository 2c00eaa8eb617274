"""From three feature vectors to the soft tokens that stand for a study in the prompt (arXiv 2506.18512, section 3).

Owns: projectors, the learned stand-in for a missing modality, cyclic cross-modal attention, contribution gates.
Does not own: the encoders, or where the tokens go in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medtvt_rl.model.config import PerceptionConfig
from medtvt_rl.types import MODALITIES

# Indices into MODALITIES of (query, key, value): every modality is asked about, and looked at, once.
ROTATIONS = ((1, 0, 2), (0, 2, 1), (2, 1, 0))
# The order in which the published layout concatenates modalities for the gates.
GATE_ORDER = (1, 0, 2)
STAND_IN_STD = 0.02


class MlpProjector(nn.Module):
    """LayerNorm, linear, GELU, linear: features to K tokens."""

    def __init__(self, num_features: int, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.shape = (num_tokens, hidden_size)
        self.layers = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, num_tokens * hidden_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, K, D]."""
        return self.layers(features).unflatten(-1, self.shape)


class GatedBlock(nn.Module):
    """h + f2(silu(f1(norm(h))) * f3(norm(h))), RMSNorm, no biases."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.f1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.f2 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.f3 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        normed = self.norm(hidden)
        return hidden + self.f2(functional.silu(self.f1(normed)) * self.f3(normed))


class GatedProjector(nn.Module):
    """The published projector: one linear layer, then three residual gated blocks."""

    NUM_BLOCKS = 3

    def __init__(self, num_features: int, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.shape = (num_tokens, hidden_size)
        self.linear = nn.Linear(num_features, num_tokens * hidden_size)
        self.blocks = nn.Sequential(*(GatedBlock(hidden_size) for _ in range(self.NUM_BLOCKS)))

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, K, D]."""
        return self.blocks(self.linear(features).unflatten(-1, self.shape))


class Perception(nn.Module):
    """Fuses the three modalities and weighs them.

    One MultiheadAttention is shared by the three rotations (query, key, value) = (cxr, ecg, lab), (ecg, lab, cxr),
    (lab, cxr, ecg); their mean, scaled, is added to each modality's tokens, then one shared LayerNorm. Gates: a sigmoid
    of a linear layer over the concatenated modality means, one scalar per modality.
    """

    def __init__(self, config: PerceptionConfig, num_features: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        if config.tokens_per_modality < 1:
            raise ValueError(
                f"model.perception.tokens_per_modality: {config.tokens_per_modality}, expected at least 1; "
                "to leave a modality out mark it as missing"
            )
        if hidden_size % config.num_heads:
            raise ValueError(
                f"model.perception.num_heads: {config.num_heads} does not divide the hidden size {hidden_size}; "
                "choose a divisor"
            )
        projectors = {"mlp": MlpProjector, "gated": GatedProjector}
        if config.projector not in projectors:
            raise ValueError(f"model.perception.projector: {config.projector!r}, expected one of {sorted(projectors)}")
        self.residual_scale = config.residual_scale
        num_tokens = config.tokens_per_modality
        self.projectors = nn.ModuleDict(
            {
                name: projectors[config.projector](size, hidden_size, num_tokens)
                for name, size in zip(MODALITIES, num_features)
            }
        )
        self.stand_in = nn.Parameter(STAND_IN_STD * torch.randn(len(MODALITIES), num_tokens, hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden_size)
        self.gate = nn.Linear(len(MODALITIES) * hidden_size, len(MODALITIES))

    def project(self, features: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """Three [B, F_m] and present [B, 3] bool -> three [B, K, D], the stand-in where a modality is missing."""
        return [
            torch.where(present[:, m, None, None], self.projectors[name](features[m]), self.stand_in[m])
            for m, name in enumerate(MODALITIES)
        ]

    def fuse(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Three [B, K, D] -> three [B, K, D] after cyclic attention and the shared LayerNorm."""
        fused = torch.stack(
            [self.attention(tokens[q], tokens[k], tokens[v], need_weights=False)[0] for q, k, v in ROTATIONS]
        ).mean(dim=0)
        return [self.norm(each + self.residual_scale * fused) for each in tokens]

    def gates(self, tokens: Sequence[Tensor]) -> Tensor:
        """Three [B, K, D] -> [B, 3] in 0..1, in the order of MODALITIES."""
        means = torch.cat([tokens[m].mean(dim=1) for m in GATE_ORDER], dim=-1)
        # GATE_ORDER is its own inverse, so indexing with it again gives the order of MODALITIES.
        return torch.sigmoid(self.gate(means))[:, GATE_ORDER]

    def forward(self, features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
        """Three [B, F_m], present [B, 3] bool -> tokens [B, 3K, D], gates [B, 3], both in the order of MODALITIES."""
        fused = self.fuse(self.project(features, present))
        gates = self.gates(fused)
        weighted = [gates[:, m, None, None] * each for m, each in enumerate(fused)]
        return torch.cat(weighted, dim=1), gates
