"""`medtvt-rl build-qa` as a user runs it: on a simulated cohort's tables, by templates, by servers, with mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "qa"))
from chat_server import chat_server
from tiny_llama import tiny_llama

from medtvt_rl.config import load_config
from medtvt_rl.data.config import CohortConfig, DataConfig
from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.qa.build import MANIFEST, REJECTED, make_items
from medtvt_rl.data.qa.labels import LabelSources, read_labels
from medtvt_rl.data.qa.templates import chat_messages, template_answer
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.simulate.label_tables import CXR_TABLE, ECG_TABLE, ICD_TABLE
from medtvt_rl.data.simulate.layout_plain import LABELS
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.tokenizer import train_tokenizer
from pipelines import cli

COHORT = CohortConfig(num_train=16, num_validation=4, num_test=5, seed=3, film_size=48, missing_share=0.2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(COHORT, tmp_path_factory.mktemp("qa") / "cohort")


@pytest.fixture
def command(cohort: Path, tmp_path: Path) -> Iterator[list[str]]:
    """A whole command that writes to a folder of this test."""
    yaml = tmp_path / "my.yaml"
    yaml.write_text(
        f"run: {{name: qa, root: {tmp_path}/runs}}\n"
        f"data: {{root: {cohort}, qa: '{tmp_path.name}/{{kind}}_{{split}}.json', store: {tmp_path}/store}}\n"
        "rewards: {jaccard: {function: 'medtvt_rl.rewards.jaccard:jaccard_reward'}}\n"
    )
    tables = {"--ecg-table": ECG_TABLE, "--cxr-table": CXR_TABLE, "--icd-table": ICD_TABLE}
    named = [word for option, name in tables.items() for word in (option, str(cohort / LABELS / name))]
    yield ["build-qa", "-c", str(yaml), *named]


@pytest.fixture
def folder(cohort: Path, tmp_path: Path) -> Path:
    return cohort / tmp_path.name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_templates_give_a_set_that_the_study_store_reads(
    command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "build-qa: answers come from templates on this machine; nothing is sent anywhere"
    assert rest[-1] == f"written: {folder}"
    config = load_config(str(tmp_path / "my.yaml"), [])
    store = StudyStore.build(config.data)
    assert store.problems == ()
    manifest = json.loads((folder / MANIFEST).read_text())
    patients: dict[str, set[str]] = {}
    for split in store.splits:
        ids = store.study_ids(split)
        patients[split] = {store.patient_id(study_id) for study_id in ids}
        counted = manifest["splits"][split]
        assert counted["studies"] == len(ids) == len(store.qa(split, "diagnosis"))
        for kind, place in (("ecg", 0), ("cxr", 1), ("lab", 2)):
            examples = store.qa(split, kind)  # type: ignore[arg-type]
            assert {e.study_id for e in examples} == {i for i in ids if store.study(i).present[place]}
            assert counted["entries"][kind] == len(examples)
            assert counted["entries"][kind] + sum(counted["without_labels"][kind].values()) == len(ids)
    assert not patients["train"] & patients["test"] and not patients["train"] & patients["validation"]
    # The same diseases as those of the questions that the cohort itself came with.
    config.data.qa, config.data.store = "qa/{kind}_{split}.json", str(tmp_path / "own")
    own = StudyStore.build(config.data)
    assert all(store.diagnoses(i) == own.diagnoses(i) for split in store.splits for i in store.study_ids(split))
    assert set(manifest["diseases"]) == set(DISEASES) and manifest["rejected_answers"] == 0


def test_the_same_command_gives_the_same_bytes_and_another_seed_other_words(command: list[str], folder: Path) -> None:
    assert cli.main(command) == 0
    first = contents(folder)
    assert cli.main(command) == 0
    assert contents(folder) == first and not list(folder.parent.glob(f".{folder.name}*"))
    assert cli.main([*command, "--seed", "1"]) == 0
    assert contents(folder) != first


def test_a_server_s_answers_are_kept_and_asked_once(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    with chat_server(("say", "It is all in your head."), 500) as server:
        told = [*command, "--endpoint", server.url, "--model", "m", "--key-variable", "MY_KEY", "--price-in", "2"]
        assert cli.main(told) == 0
        out = capsys.readouterr().out
        asked = len(server.prompts)
        assert out.splitlines()[0] == (
            "build-qa: sends the labels of patients (ECG statements, CXR labels, laboratory values, diagnoses; no ids, "
            f"no paths) to {server.url}, model m"
        )
        assert "1 rejected, 0 items left out" in out and "1 calls failed and were tried again" in out and "cost" in out
        first = contents(folder)
        assert cli.main(told) == 0
        assert len(server.prompts) == asked and contents(folder) == first
    rejected = json.loads((folder / REJECTED).read_text())
    assert rejected["answer"] == "It is all in your head." and rejected["attempt"] == 1 and rejected["reason"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["tokens"] == {"in": 100 * (asked - 1), "out": 50 * (asked - 1)}
    sent = "".join(server.prompts)
    assert "4000" not in sent and "1000000" not in sent and "very-secret" not in out + str(first)


def test_an_interrupted_run_goes_on_without_paying_twice(command: list[str], folder: Path) -> None:
    with chat_server() as server:
        server.delay_s = 0.3
        told = [*command, "--endpoint", server.url, "--model", "m", "--concurrency", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(server.prompts) >= 5, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command goes on from there" in error, error
        assert not folder.exists()
        server.delay_s = 0.0
        assert cli.main(told) == 0
        entries = [e for path in folder.glob("*_*.json") for e in json.loads(path.read_text())]
        assert len(server.prompts) == len(entries)


def wait_for(done: object, process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_dry_run_sends_and_writes_nothing(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server() as server:
        assert cli.main([*command, "--endpoint", server.url, "--model", "m", "--dry-run", "--price-out", "3"]) == 0
        assert server.prompts == [] and not folder.exists()
    out = capsys.readouterr().out
    assert "a model would be asked " in out and "would cost at most about" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "m"], "--model: needs --endpoint"),
        (["--endpoint", "http://localhost/v1"], "--endpoint: needs --model"),
        (["--endpoint", "localhost", "--model", "m"], "--endpoint: 'localhost' is no base address"),
        (["--endpoint", "http://h/v1", "--model", "m", "--request", "{"], "--request: not valid json"),
        (
            ["--endpoint", "http://h/v1", "--model", "m", "--call-timeout-s", "0"],
            "--call-timeout-s: 0.0 is out of range",
        ),
        (["--kinds", "ecg,mri"], "--kinds: 'mri' is unknown"),
        (["--icd-table", "absent.csv"], "--icd-table: there is no file absent.csv"),
        (["data.qa='{kind}_{split}.json'"], "names no folder of its own"),
        (["data.qa=qa/{kind}_{split}.json"], "holds something that build-qa did not write"),
        (["data.qa=../x/{kind}_{split}.json"], "climbs with '..'"),
        (["data.qaa=x"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    more: list[str], message: str, command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not folder.exists()


def test_kinds_that_need_no_table_ask_for_none(command: list[str], folder: Path) -> None:
    assert cli.main([*command[:3], "--kinds", "lab", "--limit", "2"]) == 0
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST, REJECTED, "lab_train.json", "lab_validation.json", "lab_test.json"}  # fmt: skip


def test_tables_of_other_patients_are_told(
    command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text("subject_id,study_id,report_0\n1,2,Sinus rhythm\n")
    assert cli.main([*command, "--kinds", "ecg", "--ecg-table", str(tmp_path / "other.csv")]) == 1
    captured = capsys.readouterr()
    assert "no study has labels for any of the questions" in captured.err and "ECG without statements" in captured.out
    assert not folder.exists()


def save_model_of_one_answer(cohort: Path, folder: Path) -> tuple[str, str]:
    """Writes a tiny Llama that has learnt the template's answer to one ECG question by heart, and little else.

    Returns:
        The study that the question is about, and the answer.
    """
    sources = LabelSources(ecg=cohort / LABELS / ECG_TABLE, cxr=None, icd=None)
    (item,) = make_items(read_labels(DataConfig(root=str(cohort)), sources, ("ecg",)).studies[:1], ("ecg",), seed=0)
    answer = template_answer(item)
    tokenizer = train_tokenizer([answer, *(message["content"] for message in chat_messages(item))], 600)
    model = tiny_llama(len(tokenizer), 32, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8192)
    prompt = tokenizer.apply_chat_template(chat_messages(item), add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + tokenizer.eos_token)]
    tokens, labels = torch.tensor([ids[0] + ids[1]]), torch.tensor([[-100] * len(ids[0]) + ids[1]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        loss = model(input_ids=tokens, labels=labels).loss
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return item.labels.study_id, answer


@dataclass(frozen=True)
class VllmServer:
    """A server, and the one question that its model can answer."""

    url: str
    study_id: str
    answer: str


@pytest.fixture(scope="module")
def vllm_server(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """vLLM's own OpenAI-compatible server, with a tiny Llama that knows one answer."""
    model = tmp_path_factory.mktemp("vllm") / "tiny"
    study_id, answer = save_model_of_one_answer(cohort, model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = f"--served-model-name tiny --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager "
    settings += "--max-model-len 4096 --max-num-seqs 8 --block-size 32"
    log = model.parent / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *settings.split()],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        server = VllmServer(f"http://127.0.0.1:{port}/v1", study_id, answer)
        wait_for(lambda: is_up(f"{server.url}/models"), process, 400)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def is_up(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False


@pytest.mark.engine
def test_of_vllm_s_server_a_right_answer_is_taken_and_the_others_are_refused(
    vllm_server: VllmServer, command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [*command, "--limit", "2", "--attempts", "2", "--max-tokens", "120", "--request", '{"temperature": 0}']
    told += ["--endpoint", vllm_server.url]
    assert cli.main([*told, "--model", "absent"]) == 1
    assert "status 404; check --endpoint" in capsys.readouterr().err
    assert cli.main([*told, "--model", "tiny"]) == 0, capsys.readouterr()
    first = contents(folder)
    entries = json.loads(first["ecg_train.json"])
    (right,) = [entry for entry in entries if entry["study_id"] == vllm_server.study_id]
    assert right["messages"][1] == {"role": "assistant", "content": vllm_server.answer}
    manifest = json.loads(first[MANIFEST])
    rejected = [json.loads(line) for line in first[REJECTED].decode().splitlines()]
    num_left_out = sum(n for split in manifest["splits"].values() for n in split["without_accepted_answer"].values())
    assert len(rejected) == manifest["rejected_answers"] >= 2 * num_left_out > 20
    assert all(line["reason"] for line in rejected)
    assert manifest["tokens"]["out"] > 0 and manifest["tokens"]["in"] > 100 * len(rejected)
    capsys.readouterr()
    assert cli.main([*told, "--model", "tiny"]) == 0
    assert " taken from " in capsys.readouterr().out and contents(folder) == first
    assert cli.main([*told, "--model", "tiny", "--kinds", "cxr"]) == 1
    assert f"no answer was accepted; the reasons are in {folder / REJECTED}" in capsys.readouterr().err
