"""One patient through a trained model: a small model, a real ECG, a real chest film."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from medtvt_rl.data.ecg import LEADS
from medtvt_rl.data.labs import LAB_IDS, NUM_LABS, PercentileTable
from medtvt_rl.data.simulate.render import write_wfdb
from medtvt_rl.data.tokenizer import train_tokenizer
from medtvt_rl.model.build import build_model
from medtvt_rl.model.config import BackboneConfig, CxrEncoderConfig, EcgEncoderConfig, LabEncoderConfig, ModelConfig
from pipelines import cli
from pipelines.diagnose import (
    DEFAULT_QUESTION,
    PERCENTILES_FILE,
    Diagnosis,
    _read_answer,
    add_arguments,
    command,
    diagnose,
    load_model,
    render,
)

REAL_ECG = Path(get_testdata_file("waveform_ecg.dcm", download=False))
CROPS = ("whole", "published")
REAL_FILM = Path(get_testdata_file("RG1_UNCR.dcm", download=False))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model: what it says is noise, and still must come out whole."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([DEFAULT_QUESTION, "ECG: normal. <answer>Sepsis</answer>"], 320)
    config = ModelConfig(
        backbone=BackboneConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=48),
        ecg=EcgEncoderConfig(widths=[4, 4, 4, 4]),
        cxr=CxrEncoderConfig(widths=[4, 4], image_size=32),
        lab=LabEncoderConfig(widths=[8]),
    )
    config.backbone.vocab_size = len(tokenizer)
    config.backbone.max_positions = 200
    config.perception.tokens_per_modality = 2
    build_model(config, tokenizer).save(folder)
    tokenizer.save_pretrained(folder)
    samples = np.random.default_rng(0).normal(10.0, 2.0, (40, NUM_LABS))
    PercentileTable.fit(samples).save(folder / PERCENTILES_FILE)
    return folder


@pytest.fixture
def labs(tmp_path: Path) -> Path:
    path = tmp_path / "labs.json"
    path.write_text(json.dumps({"Creatinine": 11.5, LAB_IDS[2]: 9.0}))
    return path


def parsed(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_a_real_ecg_a_real_film_and_labs(model_folder: Path, labs: Path) -> None:
    first = diagnose(model_folder, ecg=REAL_ECG, cxr=REAL_FILM, labs=labs, max_new_tokens=12)
    assert list(first.gates) == ["ecg", "cxr", "lab"] and first.missing == ()
    assert all(0.0 <= gate <= 1.0 for gate in first.gates.values())
    assert first == diagnose(model_folder, ecg=REAL_ECG, cxr=REAL_FILM, labs=labs, max_new_tokens=12)  # greedy


def test_the_same_patient_as_wfdb_and_jpeg(model_folder: Path, labs: Path, tmp_path: Path) -> None:
    waveform = dcmread(REAL_ECG).WaveformSequence[0]
    leads = [channel.ChannelSourceSequence[0].CodeMeaning for channel in waveform.ChannelDefinitionSequence]
    order = [next(i for i, name in enumerate(leads) if name.split()[1] == lead) for lead in LEADS]
    millivolts = dcmread(REAL_ECG).waveform_array(0) / 1000
    assert waveform.SamplingFrequency == 1000
    write_wfdb(tmp_path / "record", millivolts[::2, order].T.astype(np.float32))
    film = dcmread(REAL_FILM).pixel_array.astype(np.float64)
    film = (film - film.min()) / (film.max() - film.min()) * 255
    Image.fromarray(film.astype(np.uint8)).save(tmp_path / "film.jpg", quality=95)
    from_dicom = diagnose(model_folder, ecg=REAL_ECG, labs=labs, max_new_tokens=1)
    from_wfdb = diagnose(model_folder, ecg=tmp_path / "record", labs=labs, max_new_tokens=1)
    assert from_wfdb.gates == pytest.approx(from_dicom.gates, abs=0.02)
    both = diagnose(model_folder, ecg=tmp_path / "record", cxr=tmp_path / "film.jpg", labs=labs, max_new_tokens=1)
    assert both.missing == () and both.gates != from_wfdb.gates


@pytest.mark.parametrize("kept", ["ecg", "cxr", "labs"])
def test_one_modality_is_enough(model_folder: Path, labs: Path, kept: str) -> None:
    given = {"ecg": REAL_ECG, "cxr": REAL_FILM, "labs": labs}
    found = diagnose(model_folder, **{kept: given[kept]}, max_new_tokens=4)
    assert set(found.missing) == {"ecg", "cxr", "lab"} - {"lab" if kept == "labs" else kept}


def test_crop_and_length_are_by_default_those_of_the_training(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(model_folder)
    monkeypatch.setattr("pipelines.diagnose.load_model", lambda path: (model, tokenizer))
    assert (model.config.film_crop, model.config.max_answer_tokens) == ("whole", 256)
    whole, cut_out = (diagnose(model_folder, cxr=REAL_FILM, crop=crop, max_new_tokens=3) for crop in CROPS)
    assert whole.gates != cut_out.gates and whole.cut_at == 3
    model.config.film_crop, model.config.max_answer_tokens = "published", 5
    found = diagnose(model_folder, cxr=REAL_FILM)
    assert found.gates == cut_out.gates and found.cut_at == 5
    # An answer that ends at the last token that it may have was not cut.
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    assert diagnose(model_folder, cxr=REAL_FILM, max_new_tokens=1).cut_at is None


def test_the_input_matters(model_folder: Path, labs: Path) -> None:
    one = diagnose(model_folder, ecg=REAL_ECG, max_new_tokens=1)
    other = diagnose(model_folder, ecg=REAL_ECG, labs=labs, max_new_tokens=1)
    assert one.gates != other.gates


def test_input_that_cannot_be_used(model_folder: Path, tmp_path: Path, labs: Path) -> None:
    with pytest.raises(ValueError, match="at least one file"):
        diagnose(model_folder)
    with pytest.raises(ValueError, match=r"absent\.dcm"):
        diagnose(model_folder, ecg=tmp_path / "absent.dcm")
    with pytest.raises(ValueError, match="Troponin"):
        unknown = tmp_path / "unknown.json"
        unknown.write_text('{"Troponin": 1}')
        diagnose(model_folder, labs=unknown)
    with pytest.raises(ValueError, match="question"):
        diagnose(model_folder, ecg=REAL_ECG, question=" ")
    with pytest.raises(ValueError, match="ask a shorter question"):
        diagnose(model_folder, ecg=REAL_ECG, question="why? " * 200)
    with pytest.raises(ValueError, match="model folder"):
        diagnose(tmp_path, ecg=REAL_ECG)
    table = (model_folder / PERCENTILES_FILE).read_text()
    (model_folder / PERCENTILES_FILE).unlink()
    try:
        with pytest.raises(ValueError, match="leave the labs out"):
            diagnose(model_folder, labs=labs)
        diagnose(model_folder, ecg=REAL_ECG, max_new_tokens=1)  # needs no table
    finally:
        (model_folder / PERCENTILES_FILE).write_text(table)


def test_the_command(model_folder: Path, labs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diagnose", "--model", model_folder, "--ecg", REAL_ECG, "--labs", labs, "--max-new-tokens", "3", "--json"]
    assert cli.main([str(word) for word in words]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"reasoning", "diagnoses", "gates", "missing", "well_formed", "cut_at", "remarks"}
    assert content["missing"] == ["cxr"] and content["remarks"] == []
    with pytest.raises(SystemExit, match="2"):
        parsed("--model", model_folder, "--max-new-tokens", "0")
    assert "'0' is not a number from 1 up" in capsys.readouterr().err
    assert command(parsed("--model", model_folder, "--cxr", labs)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("medtvt-rl: diagnose: ") and captured.err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> Diagnosis:
        raise PermissionError(13, "Permission denied", "film.jpg")

    monkeypatch.setattr("pipelines.diagnose.diagnose", refuse)
    assert cli.main(["diagnose", "--model", "m", "--cxr", "film.jpg"]) == 2
    assert capsys.readouterr().err == "medtvt-rl: diagnose: [Errno 13] Permission denied: 'film.jpg'\n"


def test_the_model_is_asked_for_and_the_module_runs() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diagnose", "--ecg", "e"])
    command = [sys.executable, "-m", "pipelines.diagnose", "--help"]
    assert "--model" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_is_printed() -> None:
    good = Diagnosis(
        reasoning="ECG: atrial fibrillation.",
        diagnoses=("Atrial Fibrillation", "Sepsis"),
        gates={"ecg": 0.5, "cxr": 0.25, "lab": 1.0},
        missing=("cxr",),
        well_formed=True,
    )
    lines = render(good).splitlines()
    assert lines[:5] == ["reasoning", "  ECG: atrial fibrillation.", "diagnoses", "  Atrial Fibrillation", "  Sepsis"]
    assert lines[6:9] == [
        "  ECG  0.500  ##########",
        "  film 0.250  #####                 not given",
        "  labs 1.000  ####################",
    ]
    assert "not a medical device" in lines[-1]


def test_an_answer_that_breaks_the_format_names_nothing() -> None:
    from medtvt_rl.types import Study

    study = Study(
        study_id="s",
        patient_id="p",
        ecg=None,
        cxr=None,
        lab_percentiles=np.full(NUM_LABS, 0.5, dtype=np.float32),
        lab_measured=np.ones(NUM_LABS, dtype=bool),
    )
    gates = {"ecg": 0.1, "cxr": 0.2, "lab": 0.3}
    broken = _read_answer("<think> LAB: high lactate. <answer> Sepsis", gates, study)
    assert broken.diagnoses == () and not broken.well_formed and broken.missing == ("ecg", "cxr")
    assert "breaks the format" in render(broken) and "LAB: high lactate" in render(broken)
    cut = _read_answer("<think> LAB: high", gates, study, cut_at=4)
    assert "was cut after 4 tokens" in render(cut) and "breaks the format" not in render(cut)
    good = _read_answer("<think> LAB: high lactate. </think><answer> Sepsis; Hypertension </answer>", gates, study)
    assert good.diagnoses == ("Sepsis", "Hypertension") and good.reasoning == "LAB: high lactate."
