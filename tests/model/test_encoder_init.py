"""Pre-trained encoders in a fresh model: what is found in a file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_model import DESCRIPTION, golden_state
from safetensors.torch import save_file
from small_model import small_tokenizer
from torch import Tensor

from medtvt_rl.model.build import build_model
from medtvt_rl.model.config import (
    BackboneConfig,
    EcgEncoderConfig,
    LabEncoderConfig,
    ModelConfig,
    PerceptionConfig,
)
from medtvt_rl.model.encoder_init import read_encoder
from medtvt_rl.model.published_layout import encoder_layout
from medtvt_rl.model.published_sizes import PublishedSizes


def published_config() -> ModelConfig:
    """The published encoders, at the golden sizes, in front of a small language model."""
    film = PublishedSizes.of(DESCRIPTION["llama_params"], DESCRIPTION["vit"]).film
    return ModelConfig(
        backbone=BackboneConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=32),
        ecg=EcgEncoderConfig(kind="xresnet1d101"),
        cxr=film,
        lab=LabEncoderConfig(kind="normalised", widths=[256, 1024, 1024]),
        perception=PerceptionConfig(projector="gated"),
    )


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return golden_state()


def part(state: dict[str, Tensor], prefix: str, instead: str) -> dict[str, Tensor]:
    return {instead + name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def test_encoders_are_found_under_any_prefix(state: dict[str, Tensor], tmp_path: Path) -> None:
    config = published_config()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "whole.pth")
    (tmp_path / "vit").mkdir()
    # As Hugging Face keeps a ViT with a classifier; the pooling of its tokens is MedTVT-R1's own.
    save_file(part(state, "vit_model.", "vit."), tmp_path / "vit" / "model.safetensors")
    torch.save(part(state, "lab_encoder.", ""), tmp_path / "lab.pt")
    config.ecg.init, config.cxr.init = str(tmp_path / "whole.pth"), str(tmp_path / "vit")
    config.lab.init = str(tmp_path / "lab.pt")
    model = build_model(config, small_tokenizer())
    own = model.state_dict()
    for modality in ("ecg", "cxr", "lab"):
        for name, entry in encoder_layout(modality, config.cxr).items():
            if entry.kind == "copied" and entry.target is not None:
                copied = torch.equal(own[entry.target], state[name])
                assert copied != name.startswith("cxr_vit_agg"), name
    # A folder of this model says what the encoders are, not where their weights once lay, and goes on without them.
    model.save(tmp_path / "medtvt")
    assert "init" not in model.config.ecg
    again = published_config()
    again.init = str(tmp_path / "medtvt")
    build_model(again, small_tokenizer())
    again.ecg.init = config.ecg.init
    with pytest.raises(ValueError, match=r"model\.ecg\.init: .* brings its encoders along; leave it out"):
        build_model(again, small_tokenizer())


def test_the_files_of_the_paper_s_own_training_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    config, ckpt, pt = published_config(), tmp_path / "epoch=49-val_loss=0.4944.ckpt", tmp_path / "epoch_3.pt"
    labs = part(state, "lab_encoder.", "labs_encoder.") | {"logit_scale": torch.ones(())}
    torch.save({"epoch": 49, "state_dict": labs, "hyper_parameters": {"ckpt_save_dir": Path("/runs")}}, ckpt)
    torch.save({"ecg_model": part(state, "ecg_encoder.", ""), "epoch": 3}, pt)
    config.lab.init, config.ecg.init = str(ckpt), str(pt)
    for modality in ("ecg", "lab"):
        found = read_encoder(config, modality)
        taken = {n: e.target for n, e in encoder_layout(modality, config.cxr).items() if e.kind == "copied"}
        trunk = [name for name in taken if name.startswith(f"{modality}_encoder.")]
        assert trunk and all(torch.equal(found[str(taken[name])], state[name]) for name in trunk)
    assert read_encoder(config, "cxr") == {}


def test_a_damaged_safetensors_file_is_named(tmp_path: Path) -> None:
    config, path = published_config(), tmp_path / "vit.safetensors"
    config.cxr.init = str(path)
    save_file({"weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.cxr\.init: .*vit\.safetensors: not a readable safetensors file \("):
        read_encoder(config, "cxr")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"vit\.safetensors: .*\(it is a pointer of git-lfs, not the file itself\)"):
        read_encoder(config, "cxr")


def test_what_does_not_fit_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    config = published_config()
    config.lab.init = str(tmp_path / "lab.pt")
    with pytest.raises(ValueError, match=r"model\.lab\.init: there is no .*lab\.pt"):
        build_model(config, small_tokenizer())
    labs = part(state, "lab_encoder.", "net.")
    torch.save({name: tensor for name, tensor in labs.items() if "fc2" not in name}, tmp_path / "lab.pt")
    with pytest.raises(ValueError, match=r"of 8 entries 2 are missing: net\.fc2\.weight, net\.fc2\.bias"):
        build_model(config, small_tokenizer())
    torch.save({**labs, "net.fc1.bias": torch.zeros(3)}, tmp_path / "lab.pt")
    with pytest.raises(
        ValueError, match=r"1 entries of another shape: lab_encoder\.fc1\.bias \[3\] \(expected \[256\]\)"
    ):
        build_model(config, small_tokenizer())
    config.lab.widths = [256, 1024]
    with pytest.raises(ValueError, match=r"needs model\.lab\.widths=\[256, 1024, 1024\], not \[256, 1024\]"):
        build_model(config, small_tokenizer())
    config.lab = LabEncoderConfig(init=config.lab.init)
    with pytest.raises(ValueError, match=r"model\.lab\.init: needs model\.lab\.kind=normalised, not 'mlp'"):
        build_model(config, small_tokenizer())
