"""What a plain text task starts from, and what its report shows of the configuration. Nothing here starts an actor."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from medtvt_rl.config import load_config
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.dotted import resolve
from medtvt_rl.model.llm_source import LlmSource
from medtvt_rl.model.policy import TextPolicy, load_policy
from pipelines import cli, sft
from pipelines.command import check_named, write_init
from pipelines.reporter import Reporter
from pipelines.run import shown_settings
from pipelines.stages import start_model
from tests.tiny_llama import tiny_llama

PROJECT = Path(__file__).parents[2]
TEXT = str(PROJECT / "configs" / "text_task.yaml")


def write(folder: Path, progress: Callable[[int, int], None]) -> None:
    tokenizer = byte_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress(1, 1)


def unavailable() -> None:
    raise ValueError("its package is not installed")


SOURCE = LlmSource(name="tiny", version="1", check=lambda: None, write=write)
UNAVAILABLE = LlmSource(name="tiny", version="1", check=unavailable, write=write)


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize("stages", ["[sft,grpo,evaluate]", "[grpo,evaluate]"])
def test_a_model_that_comes_in_a_package_is_written_once_and_taken_by_the_first_stage(
    tmp_path: Path, stages: str
) -> None:
    folder = tmp_path / "models" / "tiny"
    given = [
        f"run.root={tmp_path}",
        f"run.stages={stages}",
        f"model.init={folder}",
        f"model.init_from={__name__}:SOURCE",
    ]
    config = load_config(TEXT, given)
    check_named(config)
    config.folder.mkdir(parents=True)
    shown = io.StringIO()
    with Reporter(config.folder, stream=shown) as reporter:
        for _ in range(2):
            write_init(config, reporter)
    assert shown.getvalue().count("writing tiny to") == 1
    start = sft._start_folder(config) if "sft" in stages else start_model(config)
    assert start == folder
    assert isinstance(load_policy(start), TextPolicy)
    prompts = resolve(config.task.prompts, "task.prompts")(config, AutoTokenizer.from_pretrained(start), "test")
    assert len(prompts) == 300


def test_without_one_it_starts_from_a_fresh_llama_over_bytes(tmp_path: Path) -> None:
    config = load_config(TEXT, [f"run.root={tmp_path}"])
    policy = load_policy(sft._start_folder(config))
    assert policy.config.hidden_size == 64 and policy.config.vocab_size == len(byte_tokenizer())


def test_a_folder_that_holds_no_model_or_no_tokenizer_is_one_line_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "-c", TEXT, f"run.root={tmp_path / 'runs'}", f"model.init={tmp_path / 'llama'}"]
    assert cli.main(given) == 2
    assert "llama' holds no config.json and no tokenizer_config.json; expected a Hugging" in capsys.readouterr().err
    tiny_llama(20).save_pretrained(tmp_path / "llama")
    capsys.readouterr()
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert "llama' holds no tokenizer_config.json; expected" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_job_may_name_a_model_that_the_cluster_alone_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("token")
    given = ["submit", "-c", "configs/text_task.yaml", "--address", "http://127.0.0.1:9", "--exclude", "tests/"]
    given += ["--token-file", str(tmp_path / "token"), "model.init=/models/of/the/cluster"]
    assert cli.main(given) == 2
    assert "no job server answers" in capsys.readouterr().err
    assert cli.main([*given, "rewards.right.function=configs.text_task:wrong"]) == 2
    assert "module 'configs.text_task' has no 'wrong'" in capsys.readouterr().err
    with_source = [*given, f"model.init_from={__name__}:UNAVAILABLE"]
    assert cli.main(with_source) == 2
    assert "no job server answers" in capsys.readouterr().err
    assert cli.main([*given, "model.init_from=json:dumps"]) == 2
    assert "names no LlmSource" in capsys.readouterr().err


def test_the_report_of_a_text_task_leaves_out_the_settings_of_studies() -> None:
    config = load_config(TEXT)
    shown = yaml.safe_load(shown_settings(config))
    assert not {"cohort", "data", "encoders", "pretrain"} & set(shown)
    assert set(shown["model"]) == {"init", "init_from", "backbone", "lora"}
    assert shown["rewards"]["right"]["function"] == "configs.text_task:right"
    study = yaml.safe_load(shown_settings(load_config(PROJECT / "configs" / "quickstart.yaml")))
    assert {"cohort", "data", "encoders", "pretrain"} <= set(study) and "ecg" in study["model"]
