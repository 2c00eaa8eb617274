"""Damaged copies of cluster.yaml: each fault is one line that names the place; and the forecast of who lands where."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.bundles import grpo_bundles, logical_cpus
from actors.cluster_faults import overlooked_faults, ray_faults
from actors.cluster_file import matches, max_workers, node_types, read_cluster, read_machines
from actors.cluster_layout import hourly_cost, lay_out, placement_faults
from actors.placement import grpo_roles, plan
from medtvt_rl.config import Config, load_config
from medtvt_rl.config_checks import ConfigError
from pipelines.cli import main

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ROOT / "configs/cluster/machines.yaml"
CONFIG = ROOT / "configs/on_cluster.yaml"
TABLE = read_machines(MACHINES)


@pytest.fixture
def cluster() -> dict[str, Any]:
    """cluster.yaml, filled in."""
    text = (ROOT / "cluster.yaml").read_text()
    filled = text.replace("ami-FILL-IN-BEFORE-THE-FIRST-START", "ami-0123456789abcdef0").replace(
        "FILL-IN.efs", "fs-1.efs"
    )
    return yaml.safe_load(filled)


@pytest.fixture
def config() -> Config:
    return load_config(CONFIG)


def types_of(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    return cluster["available_node_types"][name]


def test_a_filled_in_file_has_no_fault(cluster: dict[str, Any], config: Config) -> None:
    assert ray_faults(cluster) == [] and overlooked_faults(cluster, TABLE) == []
    assert placement_faults(config, node_types(cluster), cluster["max_workers"]) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: types_of(c, "rollout")["labels"].update(role="a b!"), "rollout.labels.role: "),
        (lambda c: types_of(c, "rollout").update(min_workers=9), "rollout.min_workers: 9 exceeds max_workers = 8"),
        (lambda c: types_of(c, "rollout").update(max_workers=30), "rollout.max_workers: 30 exceeds"),
        (lambda c: c.pop("max_workers"), "rollout.max_workers: 8 exceeds max_workers = 2 of the whole cluster, Ray's"),
        (lambda c: types_of(c, "learner")["node_config"].pop("ImageId"), "learner.node_config.ImageId: missing"),
        (lambda c: types_of(c, "learner")["node_config"].update(ImageId="ubuntu"), "'ubuntu' is no machine image"),
        (lambda c: types_of(c, "learner")["node_config"].update(InstnceType="x"), "did you mean 'InstanceType'?"),
        (lambda c: types_of(c, "learner")["node_config"].update(InstanceType="g6e.13xlarge"), "did you mean 'g6e."),
        (lambda c: types_of(c, "rollout")["node_config"].pop("InstanceMarketOptions"), "asks for on-demand machines"),
        (lambda c: types_of(c, "learner")["labels"].pop("ray.io/accelerator-type"), "learner.labels: "),
        (lambda c: types_of(c, "learner")["labels"].update({"ray.io/accelerator-type": "L4"}), "g6e.12xlarge has L40S"),
        (lambda c: types_of(c, "learner")["labels"].update({"ray.io/accelerator-type": "L40"}), "Ray knows no 'L40'"),
        (lambda c: types_of(c, "learner")["resources"].update(GPU=8), "resources.GPU: 8, but a g6e.12xlarge has 4"),
        (lambda c: c["provider"].update(region="us-east-1"), "provider.availability_zone: us-west-2a"),
        (lambda c: c["worker_start_ray_commands"].append("ray start --address=$RAY_HEAD_IP:6379"), "without token"),
        (
            lambda c: c["file_mounts"].pop("~/.ray/auth_token"),
            "file_mounts: no node gets ~/.ray/auth_token, the token that head_start_ray_commands names",
        ),
        (
            lambda c: c["worker_start_ray_commands"].append(
                'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="/etc/token"; ray start --address=$RAY_HEAD_IP:6379'
            ),
            'worker_start_ray_commands names (RAY_AUTH_TOKEN_PATH); add "/etc/token": "~/.ray/auth_token"',
        ),
        (
            lambda c: c["docker"].update(head_image="rayproject/ray:2.9.0-py311"),
            "docker.head_image: it holds Ray 2.9.0",
        ),
    ],
)
def test_what_ray_overlooks_is_one_line(cluster: dict[str, Any], change: Any, expected: str) -> None:
    change(cluster)
    faults = ray_faults(cluster) + overlooked_faults(cluster, TABLE)
    assert len(faults) == 1 and expected in faults[0] and "\n" not in faults[0], faults


@pytest.mark.parametrize("mount", ["~/.ray", "${HOME}/.ray/", "$HOME/.ray/auth_token"])
def test_a_token_may_be_sent_with_its_folder(cluster: dict[str, Any], mount: str) -> None:
    cluster["file_mounts"] = {mount: "~/.ray"}
    assert overlooked_faults(cluster, TABLE) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(max_wrkers=1), "max_wrkers"),
        (lambda c: c.update(head_node_type="hed"), "head_node_type"),
        (lambda c: types_of(c, "rollout")["resources"].update(GPU=0.5), "GPU"),
        (lambda c: c["provider"].update(type="awz"), "awz"),
        (lambda c: (c.update(max_workers=1), types_of(c, "scoring").update(min_workers=2)), "global `max_workers`"),
    ],
)
def test_what_ray_refuses_is_one_line(cluster: dict[str, Any], change: Any, expected: str) -> None:
    change(cluster)
    (fault,) = ray_faults(cluster)
    assert expected in fault and "\n" not in fault


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["placement.rollout.labels.zone=a"], "placement.rollout: labels ask for zone a, which no node type has (none"),
        (["placement.rollout.labels.role=rolout"], "they carry head, learner, rollout, scoring"),
        (["placement.reward.gpus=1"], "placement.reward: an actor asks for 1 CPU, 1 GPU, more than a node with its"),
        (["rollout.num_generators=8"], "placement.reference: 1 of 1 actors of grpo find no place beside the others"),
        (["placement.learner.market=spot"], "no single node type carries all of its labels"),
        (
            ["placement.rollout.accelerator=[B200]"],
            "placement.rollout: accelerator is B200, which no node type has (they carry L4, L40S)",
        ),
    ],
)
def test_a_role_without_a_place_is_named(cluster: dict[str, Any], overrides: list[str], expected: str) -> None:
    config = load_config(CONFIG)
    for override in overrides:
        config = load_config(CONFIG, [override])
    faults = placement_faults(config, node_types(cluster), cluster["max_workers"])
    assert len(faults) == 1 and expected in faults[0], faults


def test_each_role_lands_where_it_is_declared(cluster: dict[str, Any], config: Config) -> None:
    layout = lay_out(plan(config, grpo_roles(config)), node_types(cluster), cluster["max_workers"])
    where = {(node.node_type.name, bundle.role) for node in layout.nodes for bundle in node.bundles}
    assert where == {("learner", "learner"), ("rollout", "rollout"), ("rollout", "reference"), ("scoring", "reward")}
    assert layout.homeless == [] and layout.idle_gpus == 0 and layout.gpus == 4 + 4 + 1


def test_what_has_no_room_on_its_first_kind_of_node_is_forecast_on_the_next(cluster: dict[str, Any]) -> None:
    types_of(cluster, "rollout")["max_workers"] = 2
    fallbacks = "[{labels: {role: learner}, accelerator: [L40S], market: on-demand}]"
    overrides = [
        "placement.rollout={gpus: 1, accelerator: [L4, A10G], market: spot, fallbacks: " + fallbacks + "}",
        "placement.learner={gpus: 1, accelerator: [L4, L40S]}",
        "learner.num_workers=2",
    ]
    config = load_config(CONFIG, overrides)
    config.grpo.loss.kl.coefficient = 0.0
    layout = lay_out(plan(config, grpo_roles(config)), node_types(cluster), cluster["max_workers"])
    where = [(node.node_type.name, bundle.role) for node in layout.nodes for bundle in node.bundles]
    assert where.count(("learner", "learner")) + where.count(("rollout", "learner")) == 2
    assert len({name for name, role in where if role == "learner"}) == 1, "the learners are alike"
    assert layout.homeless == [] and where.count(("learner", "rollout")) >= 2


def test_an_accelerator_that_ray_does_not_know_is_refused_with_the_nearest(
    cluster: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    wrong = ["placement.rollout={accelerator: [a10g], gpus: 1}", "placement.learner={accelerator: [H10O], gpus: 1}"]
    for override, expected in zip(wrong, ("'a10g'; did you mean 'A10G'?", "'H10O'; did you mean 'H100'?")):
        arguments = ["check-cluster", str(path), "-c", str(CONFIG), override, "--machines", str(MACHINES)]
        assert main(arguments) == 2
        assert main(["grpo", "-c", str(CONFIG), "--dry-run", override]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and all(expected in line for line in said), said
    assert main(["grpo", "-c", str(CONFIG), "--dry-run", "placement.rollout={accelerator: [A10G], gpus: 1}"]) == 0
    assert (
        "rollout 0: 1 CPU, 1 GPU on a node with role rollout, ray.io/accelerator-type A10G" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("{role: 'in(a'}", "{'role': 'in(a'}"),
        ("{role: 'a b'}", "{'role': 'a b'}"),
        ("{role: 'in(a,)'}", "{'role': 'in(a,)'}"),
        ("{role: '(a, b)'}", "{'role': '(a, b)'}"),
        ("{role: ' '}", "{'role': ' '}"),
        ("{zone: b, 'bad key!': x}", "{'bad key!': 'x'}"),
    ],
)
def test_a_label_selector_that_ray_would_refuse_is_refused_before_anything_starts(
    labels: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in (("placement.reward.labels", labels), ("placement.reward.fallbacks", f"[{{labels: {labels}}}]")):
        assert main(["grpo", "-c", str(CONFIG), "--dry-run", f"{key}={value}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        key = key.replace("fallbacks", "fallbacks[0].labels")
        assert line.startswith(f"medtvt-rl: {key} is {said}: Ray takes no such label selector; expected "), line
    good = "placement.reward.labels={role: '!in(a , b)', zone: in(c), ray.io/region: '!x'}"
    assert main(["grpo", "-c", str(CONFIG), "--dry-run", good]) == 0


def test_gpus_that_idle_are_counted(cluster: dict[str, Any], config: Config) -> None:
    two_ranks = [bundle for bundle in plan(config, grpo_roles(config)) if bundle.role != "learner" or bundle.index < 2]
    layout = lay_out(two_ranks, node_types(cluster), cluster["max_workers"])
    # The reference policy takes one of the learner's GPUs instead of a node of its own.
    assert (layout.gpus, layout.idle_gpus) == (4 + 4, 1)


def test_the_cost_is_a_sum_over_nodes(cluster: dict[str, Any]) -> None:
    types = node_types(cluster)
    counts = {"head": 1, "learner": 1, "rollout": 8}
    assert hourly_cost(counts, types, TABLE, "aws") == pytest.approx(0.192 + 10.493 + 8 * 0.40)
    on_demand = [dataclasses.replace(one, is_spot=False) for one in types]
    assert hourly_cost(counts, on_demand, TABLE, "aws") == pytest.approx(0.192 + 10.493 + 8 * 0.978)


def test_machines_of_one_s_own_have_no_forecast(
    cluster: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {key: cluster[key] for key in ("cluster_name", "head_start_ray_commands", "worker_start_ray_commands")}
    own["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    own["auth"] = {"ssh_user": "me"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own))
    assert main(["check-cluster", str(path), "-c", str(CONFIG), "--machines", str(MACHINES)]) == 0
    said = capsys.readouterr().out
    assert "no forecast: " in said and f"{path}: no fault found" in said


def test_what_ray_asks_aws_for_is_taken_from_the_table(cluster: dict[str, Any], config: Config) -> None:
    for name in ("learner", "rollout", "scoring"):
        types_of(cluster, name).pop("resources")
    assert overlooked_faults(cluster, TABLE) == []
    types = {one.name: (one.cpus, one.gpus) for one in node_types(cluster, TABLE)}
    assert types["learner"] == (48, 4) and types["rollout"] == (8, 1) and types["head"][0] == 0
    assert placement_faults(config, node_types(cluster, TABLE), cluster["max_workers"]) == []


@pytest.mark.parametrize(("total", "expected"), [(7, 7), (None, 2)])
def test_a_node_type_without_a_maximum_has_that_of_the_cluster(
    cluster: dict[str, Any], config: Config, total: int | None, expected: int
) -> None:
    for name in ("learner", "rollout", "scoring"):
        types_of(cluster, name).pop("max_workers")
    types_of(cluster, "rollout").update(min_workers=1)
    del cluster["max_workers"]
    if total is not None:
        cluster["max_workers"] = total
    assert ray_faults(cluster) == [] and overlooked_faults(cluster, TABLE) == []
    most = {one.name: one.max_nodes for one in node_types(cluster)}
    assert most == {"head": 1, "learner": expected, "rollout": expected, "scoring": expected}
    assert max_workers(cluster) == expected
    homeless = placement_faults(config, node_types(cluster), max_workers(cluster))
    assert (homeless == []) == (total is not None)


OWN_LAYOUT = """
from actors.bundles import Bundle, grpo_roles, plan


class Layout:
    @staticmethod
    def bundles(config):
        cpus = config.rewards["format"].weight
        return [*plan(config, grpo_roles(config)), Bundle(role="memory", index=0, cpus=cpus, gpus=0, labels={})]


def without_bundles(config, reporter, stop):
    raise NotImplementedError
"""


def test_the_roles_of_one_s_own_layout_are_placed_too(
    cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_layout.py").write_text(OWN_LAYOUT)
    monkeypatch.syspath_prepend(str(tmp_path))
    path, layout = tmp_path / "cluster.yaml", "grpo.layout=own_layout:Layout"
    path.write_text(yaml.safe_dump(cluster))
    arguments = ["check-cluster", str(path), "-c", str(CONFIG), layout, "--machines", str(MACHINES)]
    assert main([*arguments[:5], "rewards.format.weight=3", *arguments[5:]]) == 0
    assert "1 memory" in capsys.readouterr().out
    assert main([*arguments[:5], "rewards.format.weight=64", *arguments[5:]]) == 1
    said = capsys.readouterr()
    assert "  nowhere: 1 memory" in said.out and "grpo.layout: memory: an actor asks for 64 CPU, more than" in said.err
    usual, own = load_config(CONFIG, ["rollout.max=7"]), load_config(CONFIG, ["rollout.max=7", layout])
    own.rewards["format"].weight = 64
    assert logical_cpus(own) - logical_cpus(usual) == 64
    own.grpo.layout = "own_layout:without_bundles"
    assert grpo_bundles(own) == plan(usual, grpo_roles(usual))


def test_selectors_mean_what_ray_means() -> None:
    labels = {"role": "rollout", "ray.io/accelerator-type": "L4"}
    assert matches({"ray.io/accelerator-type": "in(L4, A10G)", "role": "!learner"}, labels)
    assert not matches({"ray.io/accelerator-type": "!in(L4,A10G)"}, labels)
    assert not matches({"role": "learner"}, labels) and not matches({"zone": "a"}, labels)


def test_a_file_for_kubectl_is_refused_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-cluster", str(ROOT / "configs/cluster/kuberay.yaml"), "-c", str(CONFIG)]) == 2
    assert "kuberay.yaml: a file for kubectl; expected one that `ray up` takes" in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    two = tmp_path / "two.yaml"
    two.write_text("a: 1\n---\nb: 2\n")
    wrong = {tmp_path / "none.yaml": "cannot be read", broken: "not valid YAML", two: "expected a mapping with"}
    for path, expected in wrong.items():
        with pytest.raises(ConfigError, match=expected):
            read_cluster(path)


def test_the_command_prints_the_forecast_and_its_verdict(
    cluster: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    arguments = ["check-cluster", str(path), "-c", str(CONFIG), "supervision.silence_s=50", "--machines", str(MACHINES)]
    path.write_text(yaml.safe_dump(cluster))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "4 x rollout (g6.2xlarge spot): 1 rollout each" in said
        and "1 x learner (g6e.12xlarge on-demand): 4 learner" in said
    )
    assert f"prices of {TABLE.as_of}" in said and "no fault found" in said and "rollout.max" not in said
    assert main([*arguments[:-2], "rollout.max=20", *arguments[-2:]]) == 0
    # Of 20, the nodes that cluster.yaml may start have room for 8.
    assert "  grown to 8 generators (rollout.max=20): GPUs: " in capsys.readouterr().out
    types_of(cluster, "rollout").update(min_workers=9)
    path.write_text(yaml.safe_dump(cluster))
    assert main(arguments) == 1
    assert f"medtvt-rl: {path}: available_node_types.rollout.min_workers" in capsys.readouterr().err
    assert main(["check-cluster", str(path), "-c", str(CONFIG), "no.such=1"]) == 2
    assert main(["check-cluster", "-c", str(CONFIG), str(path), *arguments[-3:]]) == 1
    assert f"medtvt-rl: {path}: available_node_types.rollout.min_workers" in capsys.readouterr().err
    assert main(["check-cluster", str(path), "-c", str(CONFIG), "other.yaml"]) == 2
    assert "name one cluster file" in capsys.readouterr().err
