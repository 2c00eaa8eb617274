"""A published checkpoint through the importer, against numbers read off the published implementation."""

from __future__ import annotations

import argparse
import io
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
import pytest
import torch
from golden_model import DESCRIPTION, TOKENS, golden_arrays, golden_inputs, golden_state, write_files
from torch import Tensor, _weights_only_unpickler

from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.published_layout import published_layout
from medtvt_rl.model.published_sizes import PublishedSizes
from medtvt_rl.model.reference_checkpoint import PLAIN_VALUES, PublishedCheckpoint, read_published
from medtvt_rl.model.reference_folder import import_reference

TOLERANCE = 2e-4
SIZES = PublishedSizes.of(DESCRIPTION["llama_params"], DESCRIPTION["vit"])
GATE = "DynamicWeighting.gate.bias"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return golden_state()


@pytest.fixture(scope="module")
@torch.no_grad()
def found(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the imported model computes, under the names of the golden arrays."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("golden")
    files = write_files(root, state)
    import_reference(files["checkpoint"], files["params"], files["vit_config"], root / "out", special_tokens=TOKENS)
    model = MedTVTForCausalLM.from_pretrained(root / "out")
    golden, inputs = golden_arrays(), golden_inputs()
    tower = model.study_tower
    features = [encoder(values) for encoder, values in zip(tower.encoders, inputs.values())]
    projected = tower.perception.project(features, torch.ones(DESCRIPTION["batch"], 3, dtype=torch.bool))
    fused = tower.perception.fuse(projected)
    tokens, gates = model.perceive(*inputs.values())
    ids, labels = (torch.from_numpy(golden[name]) for name in ("tokens", "labels"))
    output = model(ids, *inputs.values(), torch.ones_like(ids), labels)
    result = {
        "ecg_encoder_mean": tower.ecg_encoder.sequence(inputs["ecg"]).mean(dim=1),
        "gates_cxr_ecg_lab": gates[:, [1, 0, 2]][:, None],
        "logits": output.logits[:, :-1],
        "loss": output.loss,
    }
    for m, name in enumerate(inputs):
        result[f"{name}_token"], result[f"fused_{name}"] = projected[m], fused[m]
        result[f"weighted_{name}"] = tokens[:, m : m + 1]
    return result


ARRAYS = sorted(set(golden_arrays()) - {"tokens", "labels"})


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_of_the_published_model_is_reproduced(found: dict[str, Tensor], name: str) -> None:
    np.testing.assert_allclose(found[name].numpy(), golden_arrays()[name], atol=TOLERANCE, rtol=0)


def test_the_layout_is_the_published_one() -> None:
    layout = published_layout(SIZES, DESCRIPTION["llama_params"]["vocab_size"], rank=16)
    assert {name: list(entry.shape) for name, entry in layout.items()} == {
        name: shape for name, (shape, _) in DESCRIPTION["state_dict"].items()
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_both_published_files_are_read(
    state: dict[str, Tensor], tmp_path: Path, wrapped: bool, prefix: str, zipped: bool
) -> None:
    some = {name: tensor for name, tensor in state.items() if name.startswith("lab_")}
    content = {f"{prefix}{name}": tensor for name, tensor in some.items()}
    path = tmp_path / "file.pth"
    torch.save({"model": content} if wrapped else content, path, _use_new_zipfile_serialization=zipped)
    read = read_published(path)
    assert read.keys() == some.keys() and all(torch.equal(read[name], some[name]) for name in some)


def test_what_the_published_training_keeps_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    model, path = {"module.weight": torch.ones(2)}, tmp_path / "file.pth"
    arguments = argparse.Namespace(lr=1e-4, output_dir="out", resume=None, betas=[0.9, 0.95])
    torch.save({"model": model, "optimizer": {"state": {0: torch.ones(1)}}, "epoch": 7, "args": arguments}, path)
    read = read_published(path)
    assert list(read) == ["weight"] and torch.equal(read["weight"], torch.ones(2))


def lightning(state: dict[str, Tensor]) -> dict[str, object]:
    """What Lightning saves beside a state_dict."""
    settings = {"lr": 1e-3, "ckpt_save_dir": Path("/runs/1"), "data_dir": PureWindowsPath("C:/data"), "bias": None}
    checkpoints = {"monitor": "val_loss", "best_model_path": "/runs/1/best.ckpt", "best_model_score": torch.ones(())}
    return {
        "epoch": 49,
        "global_step": 3900,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"completed": 49}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": checkpoints},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "lr_schedulers": [],
        "hparams_name": "args",
        "hyper_parameters": settings,
    }


def test_paths_beside_the_weights_of_a_lightning_file_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "epoch=49.ckpt"
    torch.save(lightning({"labs_encoder.fc1.weight": torch.ones(2)}), path)
    read = read_published(path)
    assert list(read) == ["labs_encoder.fc1.weight"] and torch.equal(read["labs_encoder.fc1.weight"], torch.ones(2))


@pytest.mark.parametrize("name", ["pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"])
def test_paths_of_every_system_and_python_become_pure_ones(name: str) -> None:
    # Protocol 2, as torch saves: GLOBAL, a tuple of parts, REDUCE.
    module, _, kind = name.rpartition(".")
    pickled = b"\x80\x02c" + f"{module}\n{kind}\n".encode() + b"X\x01\x00\x00\x00a\x85R."
    with torch.serialization.safe_globals(PLAIN_VALUES):
        found = _weights_only_unpickler.load(io.BytesIO(pickled))
    assert isinstance(found, PurePath) and not isinstance(found, Path) and found.parts == ("a",)


class OwnSettings:
    """A class of user code, which a checkpoint must not bring along."""


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with pytest.raises(ValueError, match=r"file\.pth: not a readable"):
        read_published(path)
    path.write_bytes(b"nothing that torch saved")
    with pytest.raises(ValueError, match=r"file\.pth: not a"):
        read_published(path)
    torch.save({"model": {"weight": 3}}, path)
    with pytest.raises(ValueError, match="expected a state_dict of tensors"):
        read_published(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        ValueError, match=r"file\.pth: not a readable .*pointer of git-lfs.*; fetch it with git lfs pull"
    ):
        read_published(path)
    torch.save({"model": {}, "args": OwnSettings()}, path)
    with pytest.raises(ValueError, match=r"\(it holds [\w.]+\.OwnSettings\).*save its state_dict alone") as caught:
        read_published(path)
    assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_missing_unknown_and_misshapen_entries_are_listed_together(state: dict[str, Tensor]) -> None:
    wrong = {name: tensor for name, tensor in state.items() if name not in (GATE, "vit_model.pooler.dense.bias")}
    wrong |= {"sonar.weight": torch.zeros(1), "llama.norm.weight": torch.zeros(65)}
    wrong["lab_fc_proj.bias"] = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:
        PublishedCheckpoint(wrong, SIZES)
    text = str(caught.value)
    assert f"2 missing: vit_model.pooler.dense.bias, {GATE}; 1 unknown: sonar.weight; 2 of another shape" in text
    assert "llama.norm.weight [65] float32 (expected [64] float)" in text
    assert "lab_fc_proj.bias [64] int64 (expected [64] float)" in text


@pytest.mark.parametrize("name", [GATE, "llama.tok_embeddings.weight", "llama.layers.1.attention.lora_wk_l2.weight"])
def test_any_one_entry_is_missed(state: dict[str, Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=rf"1 missing: {name}"):
        PublishedCheckpoint({other: tensor for other, tensor in state.items() if other != name}, SIZES)


def test_something_else_altogether_is_refused_without_a_flood() -> None:
    with pytest.raises(ValueError, match=r"entries \d+ missing: .* and \d+ more; 1 unknown: weight\. Is it a MedTVT"):
        PublishedCheckpoint({"weight": torch.zeros(2, 2)}, SIZES)


def test_what_is_stored_twice_must_be_the_same(state: dict[str, Tensor]) -> None:
    name = "ecg_encoder.5.0.convpath.0.1.0.weight"
    with pytest.raises(ValueError, match=rf"different values: {name}"):
        PublishedCheckpoint(state | {name: state[name] + 1}, SIZES)


def test_weights_keep_their_type_and_merged_ones_take_the_wider(state: dict[str, Tensor]) -> None:
    def narrow(name: str, tensor: Tensor) -> Tensor:
        return tensor.half() if name.startswith("llama.") and "lora" not in name else tensor

    mixed = {name: narrow(name, tensor) for name, tensor in state.items()}
    weights = {weight.name: weight for weight in PublishedCheckpoint(mixed, SIZES).weights(merge=True)}
    layer = "language_model.model.layers.0"
    assert weights["language_model.lm_head.weight"].dtype == torch.float16
    assert weights[f"{layer}.self_attn.o_proj.bias"].dtype == torch.float16
    merged = weights[f"{layer}.mlp.down_proj.weight"]
    source = "llama.layers.0.feed_forward"
    pair = mixed[f"{source}.lora_w2_l2.weight"] @ mixed[f"{source}.lora_w2_l1.weight"]
    expected = mixed[f"{source}.w2.weight"].float() + pair
    assert merged.dtype == torch.float32
    torch.testing.assert_close(torch.cat(list(merged.blocks())), expected, atol=1e-6, rtol=1e-6)
    plain = {weight.name: weight for weight in PublishedCheckpoint(mixed, SIZES).weights(merge=False)}
    assert plain[merged.name].dtype == torch.float16


@pytest.mark.parametrize(
    ("params", "vit", "message"),
    [
        ({"dim": "64"}, {}, "dim is '64', expected a number"),
        ({"n_heads": 5}, {}, "dim 64 and n_heads 5"),
        ({}, {"hidden_act": "relu"}, r"hidden_act.*relu.*expected.*gelu"),
        ({}, {"patch_size": 15}, "patch_size 15 image_size 224"),
    ],
)
def test_parameter_files_that_describe_another_model_are_refused(
    params: dict[str, object], vit: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PublishedSizes.of(DESCRIPTION["llama_params"] | params, DESCRIPTION["vit"] | vit)


def test_the_published_size() -> None:
    llama = {"dim": 2048, "n_layers": 16, "n_heads": 32, "vocab_size": -1, "multiple_of": 256}
    sizes = PublishedSizes.of(
        {**llama, "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0}, DESCRIPTION["vit"]
    )
    assert (sizes.ffn_size, sizes.vocab_size, sizes.max_positions) == (8192, None, 2048)
