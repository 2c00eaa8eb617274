"""The study tower: encoders and perception as one module, the same in training and inside the rollout engine.

Owns: running each encoder on what is present, and freezing the encoders. Does not own: the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medtvt_rl.model.config import CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig, PerceptionConfig
from medtvt_rl.model.encoders import (
    NUM_ECG_SAMPLES,
    NUM_LABS,
    NUM_LEADS,
    build_cxr_encoder,
    build_ecg_encoder,
    build_lab_encoder,
)
from medtvt_rl.model.perception import Perception
from medtvt_rl.types import MODALITIES


class StudyTower(nn.Module):
    """Reads ECG, film and laboratory values of a study and gives its soft tokens.

    While `encoders_trainable` is False the encoders stay in evaluation mode whatever train() is called: the
    statistics of a BatchNorm would otherwise drift inside an encoder that no optimizer touches.
    """

    def __init__(
        self,
        ecg: EcgEncoderConfig,
        cxr: CxrEncoderConfig,
        lab: LabEncoderConfig,
        perception: PerceptionConfig,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.item_shapes: dict[str, tuple[int, ...]] = {
            "ecg": (NUM_LEADS, NUM_ECG_SAMPLES),
            "cxr": (cxr.num_channels, cxr.image_size, cxr.image_size),
            "lab": (2 * NUM_LABS,),
            "present": (len(MODALITIES),),
        }
        self.ecg_encoder = build_ecg_encoder(ecg)
        self.cxr_encoder = build_cxr_encoder(cxr)
        self.lab_encoder = build_lab_encoder(lab)
        num_features = [self.ecg_encoder.num_features, self.cxr_encoder.num_features, self.lab_encoder.num_features]
        self.perception = Perception(perception, num_features, hidden_size)
        self.encoders_trainable = True

    @property
    def encoders(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The three encoders in the order of MODALITIES."""
        return self.ecg_encoder, self.cxr_encoder, self.lab_encoder

    def set_encoders_trainable(self, trainable: bool) -> None:
        """Whether the encoders learn; frozen ones have no gradients and stay in evaluation mode."""
        self.encoders_trainable = trainable
        for encoder in self.encoders:
            encoder.requires_grad_(trainable)
        self.train(self.training)

    def train(self, mode: bool = True) -> StudyTower:
        """Training or evaluation mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        if not self.encoders_trainable:
            for encoder in self.encoders:
                encoder.eval()
        return self

    def forward(self, ecg: Tensor, cxr: Tensor, lab: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Soft tokens of U studies.

        Args:
            ecg: [U, 12, 1000] mV.
            cxr: [U, C, S, S], normalised.
            lab: [U, 100], percentiles and measured-flags.
            present: [U, 3] bool in the order of MODALITIES; None means that all are present.

        Returns:
            tokens [U, 3K, D] and gates [U, 3].

        Raises:
            ValueError: a modality has another shape than the model was built for.
        """
        items = {"ecg": ecg, "cxr": cxr, "lab": lab}
        if present is None:
            present = torch.ones(len(ecg), len(MODALITIES), dtype=torch.bool, device=ecg.device)
        for name, tensor in (*items.items(), ("present", present)):
            if tuple(tensor.shape[1:]) != self.item_shapes[name]:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, expected [studies, *{self.item_shapes[name]}]; "
                    "build the items for this model's sizes"
                )
        present = present.to(torch.bool)
        features = [
            self._encode(encoder, items[name], present[:, m])
            for m, (name, encoder) in enumerate(zip(MODALITIES, self.encoders))
        ]
        return self.perception(features, present)

    def _encode(self, encoder: nn.Module, values: Tensor, present: Tensor) -> Tensor:
        """Features [U, F]; rows of a missing modality are replaced later, so their values do not matter.

        A learning encoder sees only rows that exist, so that blank inputs never enter BatchNorm statistics.
        """
        dtype = next(encoder.parameters()).dtype
        if not encoder.training or bool(present.all()) or not bool(present.any()):
            return encoder(values.to(dtype))
        existing = encoder(values[present].to(dtype))
        return existing.new_zeros(len(values), existing.shape[-1]).index_put((present,), existing)


def set_encoders_trainable(model: nn.Module, trainable: bool) -> None:
    """Applies StudyTower.set_encoders_trainable to the tower in `model`; a model without a tower has no encoders."""
    for module in model.modules():
        if isinstance(module, StudyTower):
            module.set_encoders_trainable(trainable)
