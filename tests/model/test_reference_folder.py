"""The folder that the importer writes: whole or absent, in shards, and with the low-rank pairs as an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_model import TOKENS, golden_arrays, golden_inputs, golden_state, write_files
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from medtvt_rl.model import reference_folder
from medtvt_rl.model.build import build_model
from medtvt_rl.model.config import LoraSettings, ModelConfig
from medtvt_rl.model.kept_adapter import ADAPTER_FOLDER, WEIGHTS, read_adapter
from medtvt_rl.model.medtvt import MedTVTForCausalLM
from medtvt_rl.model.policy import load_policy
from medtvt_rl.model.reference_folder import Imported, import_reference

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return write_files(tmp_path_factory.mktemp("files"), golden_state())


def imported(
    files: dict[str, Path],
    out: Path,
    keep_adapter: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    return import_reference(
        files["checkpoint"],
        files["params"],
        files["vit_config"],
        out,
        special_tokens=TOKENS,
        keep_adapter=keep_adapter,
        progress=progress,
    )


@torch.no_grad()
def distance(model: object) -> float:
    """From the golden logits."""
    golden = golden_arrays()
    logits = model(input_ids=torch.from_numpy(golden["tokens"]), **golden_inputs()).logits[:, :-1]  # type: ignore[operator]
    return float(np.abs(logits.numpy() - golden["logits"]).max())


def test_large_models_come_in_shards_and_progress_reaches_its_end(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(files, tmp_path / "one")
    monkeypatch.setattr(reference_folder, "SHARD_BYTES", 20_000_000)
    steps: list[tuple[int, int]] = []
    result = imported(files, tmp_path / "several", progress=lambda done, total: steps.append((done, total)))
    shards = sorted((tmp_path / "several").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 20_200_000 for shard in shards)
    assert steps[-1] == (result.num_bytes, result.num_bytes)
    several = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    assert distance(load_policy(tmp_path / "several")) < TOLERANCE


def test_the_adapter_loads_here_and_through_peft(files: dict[str, Path], tmp_path: Path) -> None:
    imported(files, tmp_path / "out", keep_adapter=True)
    folder = tmp_path / "out"
    base = MedTVTForCausalLM.from_pretrained(folder, merge_adapter=False)
    assert distance(base) > 0.1, "the pairs must matter"
    assert distance(PeftModel.from_pretrained(base, str(folder / ADAPTER_FOLDER))) < TOLERANCE
    assert distance(load_policy(folder)) < TOLERANCE
    assert distance(MedTVTForCausalLM.from_pretrained(folder)) < TOLERANCE, "the pairs are not left out silently"
    assert distance(AutoModelForCausalLM.from_pretrained(str(folder))) < TOLERANCE
    policy = load_policy(folder, lora=LoraSettings(rank=16, alpha=16.0))
    assert distance(policy) < TOLERANCE
    learning = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in learning) and not any("base_layer" in name for name in learning)
    assert not any("lora" in name for name in learning if "study_tower" in name)
    policy.save(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved") is None and distance(load_policy(tmp_path / "saved")) < TOLERANCE
    with pytest.raises(ValueError, match=r"rank 16 with scale 1; set model\.lora\.rank=16 and model\.lora\.alpha=16"):
        load_policy(folder, lora=LoraSettings(rank=8, alpha=8.0))


def test_a_model_built_on_the_folder_has_its_adapter(files: dict[str, Path], tmp_path: Path) -> None:
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def get_vocab(self) -> dict[str, int]:
            return TOKENS

        def __len__(self) -> int:
            return 320

    imported(files, tmp_path / "out", keep_adapter=True)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    config = ModelConfig(init=str(tmp_path / "out"))
    for section in ("ecg", "cxr", "lab", "perception"):
        setattr(config, section, type(getattr(config, section))(**found[section]))
    assert distance(build_model(config, Tokenizer()).eval()) < TOLERANCE


def test_a_damaged_adapter_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    imported(files, tmp_path / "out", keep_adapter=True)
    (tmp_path / "out" / ADAPTER_FOLDER / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="not what was written"):
        load_policy(tmp_path / "out")


def test_the_folder_is_whole_or_absent(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        assert not (tmp_path / "deep" / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported(files, tmp_path / "deep" / "out", progress=interrupt)
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / "out").mkdir()
    imported(files, tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    before = (tmp_path / "deep" / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="it exists; remove it"):
        imported(files, tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "config.json").stat().st_mtime_ns == before


def test_a_long_list_of_wrong_entries_lies_beside_the_folder(files: dict[str, Path], tmp_path: Path) -> None:
    torch.save({f"stray.{number}": torch.zeros(1) for number in range(70)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"and 20 more.* listed in .*deep/out\.entries\.txt") as caught:
        imported({**files, "checkpoint": tmp_path / "other.pth"}, tmp_path / "deep" / "out")
    listed = (tmp_path / "deep" / "out.entries.txt").read_text().splitlines()
    assert "stray.69" not in str(caught.value) and "unknown: stray.69" in listed
    assert len(listed) == 70 + 1391 and not (tmp_path / "deep" / "out").exists()


def test_stops_and_stand_ins_are_told_in_the_folder(files: dict[str, Path], tmp_path: Path) -> None:
    ends = {"<|end_of_text|>": 300, "<|eot_id|>": 301}
    (tmp_path / "tokens.json").write_text(json.dumps(TOKENS | ends))
    result = import_reference(
        files["checkpoint"],
        files["params"],
        files["vit_config"],
        tmp_path / "out",
        special_tokens=TOKENS | ends,
    )
    model = MedTVTForCausalLM.from_pretrained(tmp_path / "out")
    assert result.tokens_left_out is None and model.config.untrained_stand_ins
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (300, [300, 301])


@pytest.mark.parametrize("padding", [0, 317])
@torch.no_grad()
def test_masked_positions_and_ignored_labels_do_not_count(files: dict[str, Path], tmp_path: Path, padding: int) -> None:
    imported(files, tmp_path / "out")
    model = MedTVTForCausalLM.from_pretrained(tmp_path / "out")
    study = {name: values[:1] for name, values in golden_inputs().items()}
    ids: Tensor = torch.from_numpy(golden_arrays()["tokens"])[:1]
    labels = ids.clone()
    labels[:, :12] = 0
    alone = model(input_ids=ids, **study, labels=labels)
    pad = torch.full((1, 3), padding)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    padded = model(
        torch.cat([pad, ids], dim=1), *study.values(), mask, torch.cat([torch.full((1, 3), -100), labels], dim=1)
    )
    torch.testing.assert_close(padded.loss, alone.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.logits[:, 3:], alone.logits, atol=1e-4, rtol=1e-4)
