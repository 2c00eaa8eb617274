"""Configuration: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtvt_rl.config import TaskConfig, load_config, to_yaml
from medtvt_rl.config_bounds import numbers
from medtvt_rl.config_checks import ConfigError
from pipelines import cli

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("placement.rollout.accelerator=L4", "placement.rollout.accelerator: expected a list, e.g. [a, b]"),
        ("placement.rollout.fallbacks={market: spot}", "placement.rollout.fallbacks: expected a list, e.g. [a, b]"),
        ("placement.rollout.fallbacks=[{markt: spot}]", "unknown key 'markt'; did you mean 'market'?"),
        (
            "placement={timeout_s: 40, fallback_after_s: 20, rollout: {fallbacks: [{cpus: 2}, {cpus: 1}]}}",
            "placement.timeout_s is 40.0: the last kind of node of rollout is tried after 40 s (fallback_after_s)",
        ),
        ("placement.rollout=[1]", "placement.rollout: expected a mapping, e.g. {a: b}"),
        ("rewards=3", "rewards: expected a mapping"),
        ("grpo.grop_size=3", "did you mean 'grpo.group_size'"),
        ("rewards.jaccard.functin=a:b", "did you mean 'rewards.jaccard.function'"),
        ("rewards.new.functin=a:b", "did you mean 'rewards.new.function'"),
        ("cohort.num_trian=5", "did you mean 'cohort.num_train'"),
        ("grpo.group_size=1", "grpo.group_size is 1: a group of one has no advantage"),
        ("grpo.group_size=many", "grpo.group_size: Value 'many'"),
        ("grpo.loss.kind=ppo", "grpo.loss.kind"),
        ("sft.batch_size=33", "sft.batch_size is 33: it does not divide"),
        ("learner.num_workers=3", "does not divide by learner.num_workers = 3"),
        ("rollout.sampling.top_p=0.9", "would bias the importance ratio"),
        ("rollout.sampling.temperature=0", "rollout.sampling.temperature"),
        ("rollout.num_generators=0", "rollout.num_generators is 0: "),
        ("rollout.sampling.temperature=0.005", "vLLM samples at 0.01 where less is asked for"),
        ("data.film.size=64", "data.film.size is 64"),
        ("num_references=0", "needs a reference policy"),
        ("run.stages=[cohort,pretrian]", "run.stages is 'pretrian'"),
        ("run.stages=[sft,pretrain]", "run.stages is ['sft', 'pretrain']: each stage stands once, in the order"),
        ("run.stages=[sft,sft]", "each stage stands once"),
        ("pretrain.epochs=0", "pretrain.epochs is 0"),
        ("sft.batch_size=0", "sft.batch_size is 0"),
        ("rollout.sampling.max_new_tokens=0", "rollout.sampling.max_new_tokens is 0"),
        (
            "rollout.tensor_parallel=3",
            "rollout.tensor_parallel is 3: model.backbone.num_heads = 4 does not divide by it",
        ),
        ("rollout.tensor_parallel=0", "rollout.tensor_parallel is 0"),
        ("model.backbone.max_positions=128", "rollout.engine.max_model_len is 256"),
        ("data.findings_csv=null", "encoders.ecg_steps is 300"),
        ("model.lora.dropout=0.1", "model.lora.dropout is 0.1"),
        ("evaluation.split=holdout", "evaluation.split is 'holdout'"),
        ("grpo.overlong.weight=-1", "grpo.overlong.weight is -1.0: it weighs a penalty"),
        ("weights.send=everything", "weights.send"),
        ("weights.send=adapter", "model.lora.rank is 0, so there are none; set a rank, or send 'trainable'"),
        ("weights.transport=nccl", "placement.rollout.gpus is 0.0: weights.transport=nccl needs a whole GPU"),
        ("weights.transport=gloo", "weights.transport"),
        ("supervision.max_restarts=-1", "supervision.max_restarts is -1"),
        ("supervision.restart_window_s=0", "supervision.restart_window_s is 0"),
        ("learner.spares=2", "learner.spares is 2"),
        ("rollout.max_completions_per_engine=-1", "rollout.max_completions_per_engine is -1"),
        ("grpo.held_out.split=valid", "grpo.held_out.split is 'valid': data.labs_csv has the splits"),
        ("grpo.loss.importance.cap=0", "grpo.loss.importance.cap is 0.0: set more than 0"),
        ("grpo.loss.importance.floor=2", "grpo.loss.importance.floor is 2.0: it must be below cap = 2.0"),
        ("grpo.learning_rate=-1", "grpo.learning_rate is -1.0: set more than 0"),
        ("grpo.final_lr_share=1.5", "grpo.final_lr_share is 1.5: it is a share; set 0 to 1"),
        ("rollout.generate_timeout_s=0", "rollout.generate_timeout_s is 0.0: set more than 0"),
        ("evaluation.bootstrap_resamples=0", "evaluation.bootstrap_resamples is 0: set at least 1"),
        ("sft.adam_betas=[0.9]", "sft.adam_betas is [0.9]: set two numbers, each from 0 to below 1"),
        ("pretrain.adam_betas=[0.9,1]", "pretrain.adam_betas is [0.9, 1.0]: set two numbers"),
        ("learner.adam_betas=[-0.1,0.9]", "learner.adam_betas is [-0.1, 0.9]: set two numbers"),
        ("steps", "not of the form key=value"),
    ],
)
def test_a_mistake_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_number_may_be_negative_but_those_that_mean_something_then() -> None:
    accepted = set()
    for key, _ in numbers(load_config(QUICKSTART)):
        try:
            load_config(QUICKSTART, [f"{key}=-7"])
        except ConfigError as error:
            assert key.rpartition(".")[0] in str(error), f"{key}: {error}"
        else:
            accepted.add(key.rpartition(".")[2])
    assert accepted == {"seed", "weight", "low"}


def test_a_model_to_go_on_from_brings_its_own_positions_and_encoders() -> None:
    load_config(QUICKSTART, ["model.init=m", "model.backbone.max_positions=128", "data.findings_csv=null"])


@pytest.mark.parametrize("model_type", ["llama", "medtvt"])
def test_an_engine_is_spread_over_as_many_gpus_as_divide_the_heads(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "num_attention_heads": 6}}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    given = [f"model.init={tmp_path}", "data.findings_csv=null"]
    with pytest.raises(ConfigError, match=r"tensor_parallel is 4: the model in .* has 6 attention heads.* 1, 2, 3, 6$"):
        load_config(QUICKSTART, [*given, "rollout.tensor_parallel=4"])
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel is 0"):
        load_config(QUICKSTART, [*given, "rollout.tensor_parallel=0"])
    load_config(QUICKSTART, [*given, "rollout.tensor_parallel=3"])


@pytest.mark.parametrize("buffer", [0, 96])
def test_the_overlong_buffer_lies_within_the_limit_where_it_counts(buffer: int) -> None:
    overrides = ["rollout.sampling.max_new_tokens=96", f"grpo.overlong.buffer_tokens={buffer}"]
    with pytest.raises(ConfigError, match=rf"grpo\.overlong\.buffer_tokens is {buffer}: .*max_new_tokens = 96"):
        load_config(QUICKSTART, [*overrides, "grpo.overlong.weight=0.5"])
    assert load_config(QUICKSTART, overrides).grpo.overlong.weight == 0
    ok = [overrides[0], "grpo.overlong.buffer_tokens=95", "grpo.overlong.weight=0.5"]
    assert load_config(QUICKSTART, ok).grpo.overlong.buffer_tokens == 95


@pytest.mark.parametrize(
    ("send", "rank", "train_embeddings", "sent"),
    [
        ("auto", 0, True, "trainable"),
        ("auto", 4, True, "trainable"),
        ("auto", 4, False, "adapter"),
        ("adapter", 4, False, "adapter"),
        ("merged", 4, True, "merged"),
        ("full", 0, True, "full"),
    ],
)
def test_what_is_sent_follows_from_what_learns(send: str, rank: int, train_embeddings: bool, sent: str) -> None:
    lora = f"model.lora={{rank: {rank}, train_embeddings: {str(train_embeddings).lower()}}}"
    config = load_config(QUICKSTART, [f"weights.send={send}", lora])
    assert config.weights.resolved(config.model.lora) == sent


def test_adapters_alone_are_refused_where_the_embeddings_learn() -> None:
    with pytest.raises(ConfigError, match=r"train_embeddings is true .* set it false, or send 'trainable'"):
        load_config(QUICKSTART, ["weights.send=adapter", "model.lora.rank=4"])


@pytest.mark.parametrize(("rollout", "learner", "refused"), [(0, 1, "rollout"), (1, 0, "learner"), (1, 0.5, "learner")])
def test_a_broadcast_is_refused_without_a_gpu_on_either_side(rollout: float, learner: float, refused: str) -> None:
    gpus = [f"placement.rollout.gpus={rollout}", f"placement.learner.gpus={learner}"]
    with pytest.raises(ConfigError, match=rf"placement\.{refused}\.gpus is .* or weights\.transport=object_store"):
        load_config(QUICKSTART, ["weights.transport=nccl", *gpus])
    load_config(QUICKSTART, gpus)
    both = ["placement.rollout.gpus=2", "placement.learner.gpus=1"]
    assert load_config(QUICKSTART, ["weights.transport=nccl", *both]).weights.transport == "nccl"


def test_a_missing_file_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [unclosed")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(broken)


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["run.name=again", "grpo.group_size=4"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


TEXT = QUICKSTART.with_name("text_task.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stages=[pretrain,sft,grpo]", "task.items is null, and pretrain need studies"),
        ("task.examples=null", "task.items is null, so sft has no studies to learn from"),
        ("rollout.engine.max_model_len=96", "the model has model.backbone.max_positions = 64"),
        ("model.backbone.num_heads=3", "it does not divide by num_heads = 3"),
        (
            f"task.evaluate={TaskConfig.evaluate}",
            "about studies, and task.items is null; name your own or set null",
        ),
        (f"task.prompts={TaskConfig.prompts}", "it is about studies, and task.items is null; name your own"),
        ("metrics=paper", "task.evaluate is null, and the mean reward has no published form"),
        ("grpo.advantage=best", "grpo.advantage is 'best': name one of group, mean_only, rloo, or your own as"),
    ],
)
def test_a_text_task_that_cannot_run_is_refused(override: str, message: str) -> None:
    config = load_config(TEXT)
    assert not config.task.medical and config.best_by == "reward"
    with pytest.raises(ConfigError, match=message):
        load_config(TEXT, [override])


def test_a_file_may_deviate_from_another(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "first.yaml").write_text(
        "run: {name: first, seed: 3}\nrewards: {jaccard: {function: 'a:b'}}\n"
        "placement: {learner: {labels: {role: learner}}, rollout: {labels: {role: rollout}}}\n"
    )
    second = tmp_path / "second.yaml"
    second.write_text("base: below/first.yaml\nrun: {name: second}\nplacement: {learner: {gpus: 1, labels: {}}}\n")
    config = load_config(second, ["run.root=r"])
    assert (config.run.name, config.run.seed, config.run.root) == ("second", 3, "r")
    # An empty mapping takes out what stood there, and nothing beside it.
    assert config.placement.learner.labels == {} and config.placement.learner.gpus == 1
    assert config.placement.rollout.labels == {"role": "rollout"}
    assert load_config(second, ["placement.rollout.labels={}"]).placement.rollout.labels == {}
    (tmp_path / "below" / "first.yaml").write_text("base: ../second.yaml\n")
    with pytest.raises(ConfigError, match=r"base is '.*yaml': expected another file"):
        load_config(second)
    second.write_text("base: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist \(.*second\.yaml names it as its base\)"):
        load_config(second)


def test_the_recipe_fits_one_machine_of_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = QUICKSTART.with_name("medtvt_r1.yaml")
    one = load_config(recipe.with_name("medtvt_r1_one_machine.yaml"))
    roles = {"learner": one.learner.num_workers, "rollout": one.rollout.num_generators, "reference": one.num_references}
    assert sum(getattr(one.placement, role).gpus * count for role, count in roles.items()) == 8
    assert one.cluster.address is None and not any(getattr(one.placement, r).labels for r in (*roles, "reward"))
    # What is learnt, and how, is the recipe's.
    one.run.name, one.rollout.num_generators = "medtvt_r1", 4
    one.placement, one.cluster = load_config(recipe).placement, load_config(recipe).cluster
    assert one == load_config(recipe)
    command = ["run", "-c", str(recipe.with_name("medtvt_r1_one_machine.yaml")), "data.root=/d", "--dry-run"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "32 completions" in shown and "role: learner" not in shown
