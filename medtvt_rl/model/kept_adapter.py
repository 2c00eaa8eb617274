"""Low-rank pairs that a model folder keeps beside its weights, as a peft adapter in FOLDER/adapter.

Owns: writing and reading it, and merging it into a model. Does not own: which layers a run adapts (policy.py), or the
formula (weights.py). A policy saved by training has none: its pairs are merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medtvt_rl.weights import LowRank

ADAPTER_FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The Vision Transformer of the study tower has layers of these names, too.
BACKBONE_LAYERS = r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAdapter:
    """What the folder holds.

    Attributes:
        scale: of the product of each pair.
        pairs: name of the adapted weight -> what is applied first [r, in], and second [out, r].
    """

    folder: Path
    rank: int
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    def low_ranks(self, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
        """The same, as weights travel; `dtype` is that in which they are merged."""
        return {
            name: LowRank(down=down, up=up, scale=self.scale, dtype=dtype) for name, (down, up) in self.pairs.items()
        }

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Adds every pair to its weight. Raises ValueError where the model has no such weight."""
        parameters = dict(model.named_parameters())
        for name, (down, up) in self.pairs.items():
            weight = self._of(parameters, name)
            weight.copy_(LowRank(down=down, up=up, scale=self.scale, dtype=weight.dtype).added_to(weight))

    @torch.no_grad()
    def load_into(self, model: nn.Module, rank: int, scale: float, name: str) -> None:
        """Gives the pairs to a model that has adapters `name` of this rank and scale.

        Raises:
            ValueError: rank or scale are others, or a layer has no adapter.
        """
        if (rank, scale) != (self.rank, self.scale):
            raise ValueError(
                f"model.lora.rank: {rank} with scale {scale:g}, and the adapter in {self.folder} has rank {self.rank} "
                f"with scale {self.scale:g}; set model.lora.rank={self.rank} and "
                f"model.lora.alpha={self.rank * self.scale:g}, or rank 0, which merges it"
            )
        parameters = dict(model.named_parameters())
        for weight, (down, up) in self.pairs.items():
            layer = weight.removesuffix(".weight")
            self._of(parameters, f"{layer}.lora_A.{name}.weight").copy_(down)
            self._of(parameters, f"{layer}.lora_B.{name}.weight").copy_(up)

    def _of(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in parameters:
            raise ValueError(f"model folder: the adapter in {self.folder} is for {name!r}, which the model has not")
        return parameters[name]


def write_adapter(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, base: Path) -> None:
    """Writes folder/adapter, which `peft.PeftModel.from_pretrained` reads upon the model in `base`; its scale is 1."""
    from peft import LoraConfig

    target = folder / ADAPTER_FOLDER
    target.mkdir()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=BACKBONE_LAYERS,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(str(target))
    tensors = {}
    for name, (down, up) in pairs.items():
        layer = PREFIX + name.removesuffix(".weight")
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down.contiguous(), up.contiguous()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: str | Path) -> KeptAdapter | None:
    """The adapter that a model folder keeps, or None. Raises ValueError where it is damaged."""
    source = Path(folder) / ADAPTER_FOLDER
    if not (source / CONFIG).is_file():
        return None
    try:
        config = json.loads((source / CONFIG).read_text())
        tensors = load_file(source / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / max(rank, 1)
        layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        pairs = {
            f"{layer.removeprefix(PREFIX)}.weight": (
                tensors[f"{layer}.lora_A.weight"],
                tensors[f"{layer}.lora_B.weight"],
            )
            for layer in layers
        }
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{source}: not a whole peft adapter ({error!r}); import the checkpoint again") from error
    return KeptAdapter(folder=source, rank=rank, scale=scale, pairs=pairs)
