"""`medtvt-rl import-reference` as a user calls it, and the settings of a run that starts from its folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from golden_model import golden_state, write_files
from pydicom.data import get_testdata_file

from medtvt_rl.config import load_config, to_yaml
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.data.labs import LAB_IDS, PERCENTILES_FILE
from medtvt_rl.data.tokenizer import train_tokenizer
from medtvt_rl.model.config import UNTRAINED_STAND_INS
from pipelines import cli
from pipelines.diagnose import DEFAULT_QUESTION, diagnose, load_model, render

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
FILM = "data.film.size=224"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    train_tokenizer([DEFAULT_QUESTION] * 3, 310).save_pretrained(root / "tokenizer")
    return {**write_files(root, golden_state()), "tokenizer": root / "tokenizer"}


def run(files: dict[str, Path], out: Path, *more: str, leave_out: tuple[str, ...] = ()) -> int:
    given = {name: path for name, path in files.items() if name not in leave_out}
    words = [word for name, path in given.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    threads = torch.get_num_threads()
    try:
        return cli.main(["import-reference", *words, "--out", str(out), *more])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(files: dict[str, Path]) -> Path:
    out = files["checkpoint"].parent / "out"
    assert run(files, out) == 0
    return out


def test_without_a_tokenizer_it_says_so_and_no_run_starts(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, tmp_path / "out", "--adapter", leave_out=("tokenizer",)) == 0
    said = capsys.readouterr().out
    assert "1391 entries" in said and "rank 16 kept in adapter/" in said and "model.lora.rank=16" in said
    assert "no tokenizer: the stages and diagnose need one" in said
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="it has no tokenizer"):
        load_config(QUICKSTART, [f"model.init={tmp_path / 'out'}", FILM])


def test_what_cannot_be_used_is_one_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, tmp_path / "out", leave_out=("special_tokens",)) == 2
    assert run({**files, "params": tmp_path / "absent.json"}, tmp_path / "out") == 2
    assert run({**files, "checkpoint": files["params"]}, tmp_path / "out") == 2
    damaged = shutil.copytree(files["tokenizer"], tmp_path / "tokenizer")
    (damaged / "tokenizer.json").write_text((damaged / "tokenizer.json").read_text()[:99])
    assert run({**files, "tokenizer": damaged}, tmp_path / "out") == 2
    shutil.rmtree(damaged)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("medtvt-rl: import-reference: ") for line in errors)
    assert "is 128000, and the checkpoint's embedding table has 320 rows; give --special-tokens" in errors[0]
    assert "absent.json: not a readable json file" in errors[1]
    assert "no tokenizer can be loaded from" in errors[3] and "tokenizer.json (" in errors[3]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medtvt_rl.model.reference_folder._write_weights", interrupted)
    assert run(files, tmp_path / "out") == 130
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"medtvt-rl: import-reference: interrupted; {tmp_path / 'out'} was not written"
    assert list(tmp_path.iterdir()) == []


def test_a_run_takes_the_tower_of_its_folder(folder: Path, tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"model.init={folder}", FILM])
    assert (config.model.ecg.kind, config.model.cxr.kind, config.model.lab.kind) == (
        "xresnet1d101",
        "vit",
        "normalised",
    )
    assert (config.model.cxr.num_channels, config.model.perception.residual_scale) == (3, 0.01)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"data\.film\.size is 96: the film encoder takes model\.cxr\.image_size = 224"),
        ([FILM, "model.cxr.num_layers=6"], r"model\.cxr\.num_layers is 6: .* was built with 2; leave it out"),
        ([FILM, "model.perception.tokens_per_modality=4"], r"tokens_per_modality is 4: .* was built with 1"),
        ([FILM, "rollout.engine.max_model_len=4096"], r"max_model_len is 4096: .* has 2048 positions"),
    ],
)
def test_settings_that_contradict_the_folder_are_refused(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [f"model.init={folder}", "learner.token_budget=8192", *overrides])


def test_it_reads_laboratory_values_by_the_table_of_the_training_patients(
    files: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.linspace(0.5, 4, 30)
    rows = [",".join(["subject", *LAB_IDS]), *(",".join(["p", *[f"{value:.2f}"] * 50]) for value in values)]
    table, labs = tmp_path / "train.csv", tmp_path / "labs.json"
    table.write_text("\n".join([*rows, "p" + "," * 50]))
    labs.write_text('{"50912": 2.9}')
    asked = ["--labs", str(labs), "--max-new-tokens", "2", "--json"]
    capsys.readouterr()
    assert cli.main(["diagnose", "--model", str(folder), *asked]) == 2
    error = capsys.readouterr().err
    assert "labs_percentiles.json: it is not there" in error and "--percentiles" in error and "--labs-csv" in error

    assert run(files, tmp_path / "out", "--labs-csv", str(table)) == 0
    assert "no percentiles" not in capsys.readouterr().out
    assert cli.main(["diagnose", "--model", str(tmp_path / "out"), *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["ecg", "cxr"] and found["remarks"] == [UNTRAINED_STAND_INS]
    given = ["--percentiles", str(tmp_path / "out" / PERCENTILES_FILE)]
    assert cli.main(["diagnose", "--model", str(folder), *asked, *given]) == 0
    assert json.loads(capsys.readouterr().out) == found

    table.write_text("\n".join(rows).replace("subject,50802", "subject,x"))
    assert run(files, tmp_path / "other", "--labs-csv", str(table)) == 2
    assert "train.csv: no column of 50802 (Base Excess)" in capsys.readouterr().err


def test_an_answer_ends_at_any_of_the_models_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    model, tokenizer = load_model(folder)
    model.generation_config.eos_token_id = [310, 311]
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: (seen.append(given["eos_token_id"]), generate(**given))[1], raising=False
    )
    monkeypatch.setattr("pipelines.diagnose.load_model", lambda path: (model, tokenizer))
    film = Path(get_testdata_file("RG1_UNCR.dcm", download=False))
    diagnose(folder, cxr=film, max_new_tokens=2)
    assert seen == [sorted({310, 311, tokenizer.eos_token_id})]


def test_the_folder_diagnoses(folder: Path) -> None:
    model, _ = load_model(folder)
    assert (model.config.film_crop, model.config.max_answer_tokens) == ("published", 600)
    ecg, film = (Path(get_testdata_file(name, download=False)) for name in ("waveform_ecg.dcm", "RG1_UNCR.dcm"))
    found = diagnose(folder, ecg=ecg, cxr=film, max_new_tokens=4)
    assert (
        found.missing == ("lab",)
        and UNTRAINED_STAND_INS in render(found)
        and all(0 < gate < 1 for gate in found.gates.values())
    )
