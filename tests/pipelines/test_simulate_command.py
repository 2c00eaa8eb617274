"""`medtvt-rl simulate` as a user calls it: table, page and JSON; and what it says of bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "simulation"))
from timing_models import timings

from medtvt_rl.config import load_config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.rollout.elastic import ElasticPolicy, Signals
from pipelines.cli import main
from pipelines.simulate import policy_of

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


class AtOnce:
    """One more at once, then none any more, and at last a mistake."""

    def __init__(self, config: object) -> None:
        self._asked = 0

    def decide(self, now: float, signals: Signals) -> int | None:
        self._asked += 1
        if self._asked > 3:
            raise KeyError("mistake")
        return 1 if self._asked == 1 else None


def test_a_sweep_leaves_a_table_a_page_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "timings.json"
    timings(reward_s=0.01, learner_step_s=0.5, start_s=5.0).write(measured)
    options = ["--timings", str(measured), "--generators", "1,2,4", "--learners", "1", "--steps", "4"]
    settings = [f"run.root={tmp_path}", "grpo.groups_per_step=4", "grpo.group_size=4", "rollout.max=3"]
    settings += ["rollout.scaling=need"]
    settings += ["rollout.elastic.window_s=5", "rollout.elastic.cooldown_s=5"]
    given = ["simulate", "-c", CONFIG, *options, "--loss-minutes", "0.2", "--out", str(tmp_path / "out"), *settings]
    assert main(given) == 0
    said = capsys.readouterr().out
    for words in (
        "as configured, all on one machine of 2 cores",
        "limited by the",
        "straggler:",
        "loss:",
        "elastic, rollout.scaling need,",
    ):
        assert words in said
    found = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert [row["setting"]["generators"] for row in found["by_generators"]] == [1, 2, 4]
    assert found["by_generators"][0]["step_s"] > 0 and found["ratios"][0]["learners"] == 1
    page = (tmp_path / "out" / "simulation.html").read_text()
    assert page.count("<svg") == 5 and "Simulation of quickstart" in page


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ("room", ["elastic: rollout.scaling is room, so the nodes decide"]),
        (
            f"{__name__}:AtOnce",
            [
                "elastic: no more generators come or go: ",
                ":AtOnce raised KeyError",
                "elastic, rollout.scaling",
                ":AtOnce, rollout.min 1 to rollout.max 3: 1 at 0 s, 2",
            ],
        ),
    ],
)
def test_who_decides_in_a_run_decides_in_the_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scaling: str, said: list[str]
) -> None:
    timings(reward_s=0.01, learner_step_s=0.5, start_s=5.0).write(tmp_path / "timings.json")
    given = ["--timings", str(tmp_path / "timings.json"), "--generators", "1", "--learners", "1", "--steps", "4"]
    given += ["--loss-minutes", "0.2", f"run.root={tmp_path}", "grpo.groups_per_step=4", "grpo.group_size=4"]
    assert main(["simulate", "-c", CONFIG, *given, "rollout.max=3", f"rollout.scaling={scaling}"]) == 0
    lines = capsys.readouterr().out
    assert all(words in lines for words in said) and lines.count("elastic") == sum(
        "elastic" in words for words in said
    ), lines


def test_the_policy_is_what_the_configuration_names() -> None:
    def named(*settings: str) -> object:
        return policy_of(load_config(CONFIG, list(settings)))

    assert named("rollout.scaling=need") is None, "none may come or go"
    assert named("rollout.max=3") is None
    assert isinstance(named("rollout.max=3", "rollout.scaling=need"), ElasticPolicy)
    assert isinstance(named("rollout.max=3", f"rollout.scaling={__name__}:AtOnce"), AtOnce)
    with pytest.raises(ConfigError, match="makes no policy"):
        named("rollout.max=3", "rollout.scaling=builtins:repr")
    with pytest.raises(ConfigError, match="has no 'nothing'"):
        named("rollout.max=3", "rollout.scaling=json:nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generators", "1,zero"], "--generators is '1,zero'"),
        (["--learners", "0"], "--learners is '0'"),
        (["--steps", "1"], "--steps 2 or more"),
        ([], "timings: there is no"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["simulate", "-c", CONFIG, *options, f"run.root={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_bench_without_a_model_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-c", CONFIG, f"run.root={tmp_path}"]) == 2
    assert "run.stages=[cohort,pretrain,sft]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("rollout.min=2", "rollout.num_generators"),
        ("rollout.min=0", "rollout.min"),
        ("rollout.elastic.spare=2", "spare"),
    ],
)
def test_bounds_that_contradict_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, key: str
) -> None:
    assert main(["simulate", "-c", CONFIG, setting, f"run.root={tmp_path}"]) == 2
    assert key in capsys.readouterr().err
