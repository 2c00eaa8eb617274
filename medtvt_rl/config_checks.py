"""Checks of a configuration across fields: what no single field can know.

Owns: the checks, and the form of their errors: the key, its value, what was expected, and the mend. Does not own: types
and unknown keys, which loading refuses (config.py). Importable without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medtvt_rl.algorithm.config import ADVANTAGES, LOSSES
from medtvt_rl.config_bounds import are_betas, fault, numbers
from medtvt_rl.roles import check_placement, node_kinds
from medtvt_rl.rollout.config import SCALINGS

if TYPE_CHECKING:
    from medtvt_rl.config import Config

LOWEST_TEMPERATURE = 0.01
"""vLLM takes it in the place of a lower one (SamplingParams); the learner would divide by the lower one."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value, what was expected, and the mend."""


def check_config(config: Config) -> None:
    """Checks across fields. Raises ConfigError naming the key, the value, what was expected, and the mend."""
    for key, value in numbers(config):
        expected = fault(key, value)
        _require(expected is None, key, value, str(expected))
    checks = (_check_task, _check_algorithm, _check_counts, _check_batches, _check_sampling, _check_model, _check_sync)
    others = (_check_placement, _check_elastic, _check_supervision, _check_rewards, _check_stages, _check_checkpoints)
    for check in (*checks, *others, _check_data):
        check(config)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value!r}: {expected}")


def _check_task(config: Config) -> None:
    task = config.task
    for name in ("prompts", "evaluate"):
        path = getattr(task, name)
        _require(
            task.items is not None or path != getattr(type(task), name),
            f"task.{name}",
            path,
            f"it is about studies, and task.items is null; name your own{' or set null' if name == 'evaluate' else ''}",
        )
    _require(
        config.evaluation.metrics != "paper" or task.evaluate is not None,
        "evaluation.metrics",
        config.evaluation.metrics,
        "task.evaluate is null, and the mean reward has no published form; set honest, or name an evaluator that has",
    )


def _check_algorithm(config: Config) -> None:
    for key, kind, known in (
        ("grpo.advantage", config.grpo.advantage, ADVANTAGES),
        ("grpo.loss.kind", config.grpo.loss.kind, LOSSES),
    ):
        expected = f"name one of {', '.join(known)}, or your own as 'package.module:function'"
        _require(kind in known or ":" in kind, key, kind, expected)


def _check_counts(config: Config) -> None:
    grpo, rollout = config.grpo, config.rollout
    for name in ("learner", "pretrain", "sft"):
        betas = getattr(config, name).adam_betas
        _require(are_betas(betas), f"{name}.adam_betas", list(betas), "set two numbers, each from 0 to below 1")
    _require(
        grpo.group_size >= 2, "grpo.group_size", grpo.group_size, "a group of one has no advantage; set at least 2"
    )
    _require(
        config.learner.zero_stage in (0, 1, 2, 3),
        "learner.zero_stage",
        config.learner.zero_stage,
        "ZeRO has stages 0 to 3",
    )
    importance = grpo.loss.importance
    _require(
        importance.floor < importance.cap,
        "grpo.loss.importance.floor",
        importance.floor,
        f"it must be below cap = {importance.cap}; 0 drops no small ratio",
    )
    weight, buffer, limit = grpo.overlong.weight, grpo.overlong.buffer_tokens, rollout.sampling.max_new_tokens
    _require(weight >= 0, "grpo.overlong.weight", weight, "it weighs a penalty; set 0 (off) or more")
    _require(
        weight == 0 or 0 < buffer < limit,
        "grpo.overlong.buffer_tokens",
        buffer,
        f"set 1 or more, and less than rollout.sampling.max_new_tokens = {limit}",
    )
    needs_reference = grpo.loss.kl.coefficient > 0
    _require(
        config.num_references >= 1 or not needs_reference,
        "num_references",
        config.num_references,
        f"grpo.loss.kl.coefficient = {grpo.loss.kl.coefficient} needs a reference policy; set 1, or the coefficient 0",
    )


def _check_elastic(config: Config) -> None:
    rollout, (low, high) = config.rollout, (config.rollout.least, config.rollout.most)
    count, elastic = rollout.num_generators, rollout.elastic
    _require(low >= 1, "rollout.min", low, "set at least 1; a run without a generator ends")
    _require(low <= count, "rollout.min", low, f"it exceeds rollout.num_generators = {count}; lower it")
    _require(high >= count, "rollout.max", high, f"it is below rollout.num_generators = {count}; raise it")
    _require(
        rollout.scaling in SCALINGS or ":" in rollout.scaling,
        "rollout.scaling",
        rollout.scaling,
        "write room, need, or the dotted path of a policy, 'package.module:function'",
    )
    _require(
        0 <= elastic.remove_below <= elastic.add_above < 1,
        "rollout.elastic.add_above",
        elastic.add_above,
        f"set it from rollout.elastic.remove_below = {elastic.remove_below} to less than 1",
    )
    _require(0 < elastic.spare < 1, "rollout.elastic.spare", elastic.spare, "set it between 0 and 1")


def _check_batches(config: Config) -> None:
    completions = config.grpo.groups_per_step * config.grpo.group_size
    workers = config.learner.num_workers
    _require(
        completions % workers == 0,
        "grpo.groups_per_step * grpo.group_size",
        completions,
        f"it does not divide by learner.num_workers = {workers}; change one of the three",
    )
    for name, stage in (("pretrain", config.pretrain), ("sft", config.sft)):
        _require(
            stage.batch_size % stage.num_workers == 0,
            f"{name}.batch_size",
            stage.batch_size,
            f"it does not divide by {name}.num_workers = {stage.num_workers}; change one of the two",
        )


def _check_sampling(config: Config) -> None:
    sampling, engine = config.rollout.sampling, config.rollout.engine
    _require(
        sampling.temperature >= LOWEST_TEMPERATURE,
        "rollout.sampling.temperature",
        sampling.temperature,
        f"training samples, and vLLM samples at {LOWEST_TEMPERATURE} where less is asked for; set that or more "
        "(evaluation adds the greedy answer by itself)",
    )
    _require(
        sampling.top_p == 1.0,
        "rollout.sampling.top_p",
        sampling.top_p,
        "scoring does not truncate, so a truncated sample would bias the importance ratio; set 1.0",
    )
    _require(
        sampling.top_k == -1,
        "rollout.sampling.top_k",
        sampling.top_k,
        "scoring does not truncate, so a truncated sample would bias the importance ratio; set -1",
    )
    _require(
        sampling.max_new_tokens < engine.max_model_len,
        "rollout.sampling.max_new_tokens",
        sampling.max_new_tokens,
        f"no room for a prompt in rollout.engine.max_model_len = {engine.max_model_len}; lower it, or raise that",
    )
    _require(engine.block_size % 32 == 0, "rollout.engine.block_size", engine.block_size, "set a multiple of 32")
    longest = engine.max_model_len
    _require(
        config.learner.token_budget >= longest,
        "learner.token_budget",
        config.learner.token_budget,
        f"one sequence can have rollout.engine.max_model_len = {longest} tokens; set at least that",
    )


def _check_model(config: Config) -> None:
    model = config.model
    _require(
        model.lora.dropout == 0,
        "model.lora.dropout",
        model.lora.dropout,
        "the learner would score another policy than the engine samples; set 0",
    )
    _require(
        model.init_from is None or model.init is not None,
        "model.init",
        model.init,
        f"name the folder where model.init_from = {model.init_from} is to be kept, e.g. runs/models/NAME",
    )
    width, heads = model.backbone.hidden_size, model.backbone.num_heads
    if model.init is None:
        _require(width % heads == 0, "model.backbone.hidden_size", width, f"it does not divide by num_heads = {heads}")
        _require(
            heads % config.rollout.tensor_parallel == 0,
            "rollout.tensor_parallel",
            config.rollout.tensor_parallel,
            f"model.backbone.num_heads = {heads} does not divide by it; change one of the two",
        )
        _require(
            config.rollout.engine.max_model_len <= model.backbone.max_positions,
            "rollout.engine.max_model_len",
            config.rollout.engine.max_model_len,
            f"the model has model.backbone.max_positions = {model.backbone.max_positions}; lower it, or raise that",
        )
    if not config.task.medical:
        return
    if model.init is None:
        for name in ("ecg_steps", "cxr_steps", "lab_steps"):
            steps = getattr(config.encoders, name)
            _require(
                steps <= 0 or config.data.findings_csv is not None,
                f"encoders.{name}",
                steps,
                "the encoders learn findings, and data.findings_csv is null; name their table, or set 0",
            )
        _require(
            width % model.perception.num_heads == 0,
            "model.perception.num_heads",
            model.perception.num_heads,
            f"model.backbone.hidden_size = {width} does not divide by it",
        )
    _require(
        config.data.film.size == model.cxr.image_size,
        "data.film.size",
        config.data.film.size,
        f"the film encoder takes model.cxr.image_size = {model.cxr.image_size}; set both alike",
    )

    _require(
        model.cxr.normalise != "imagenet" or model.cxr.num_channels == 3,
        "model.cxr.num_channels",
        model.cxr.num_channels,
        "model.cxr.normalise = imagenet speaks of three channels; set 3",
    )


def _check_sync(config: Config) -> None:
    try:
        config.weights.resolved(config.model.lora)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for role in ("rollout", "learner"):
        gpus = min(kind.gpus for kind in node_kinds(role, getattr(config.placement, role)))
        _require(
            config.weights.transport != "nccl" or gpus >= 1,
            f"placement.{role}.gpus",
            gpus,
            "weights.transport=nccl needs a whole GPU in each of its processes; set 1 or more, or "
            "weights.transport=object_store",
        )


def _check_placement(config: Config) -> None:
    try:
        check_placement(config.placement, config.rollout.tensor_parallel)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_supervision(config: Config) -> None:
    for key, spares in (("rollout.spares", config.rollout.spares), ("learner.spares", config.learner.spares)):
        _require(spares in (None, 0, 1), key, spares, "set 0 or 1, or null to let free memory decide")


def _check_rewards(config: Config) -> None:
    judged = config.task.evaluate is None and "evaluate" in config.run.stages
    if "grpo" in config.run.stages or judged:
        _require(
            bool(config.rewards),
            "rewards",
            {},
            "name at least one, e.g. rewards.jaccard.function=medtvt_rl.rewards.jaccard:jaccard_reward",
        )
    for name, reward in config.rewards.items():
        _require(
            ":" in reward.function,
            f"rewards.{name}.function",
            reward.function,
            "give a dotted path 'package.module:function'",
        )
        _require(reward.low < reward.high, f"rewards.{name}.low", reward.low, f"it must be below high = {reward.high}")


def _check_stages(config: Config) -> None:
    known = ["cohort", "pretrain", "sft", "grpo", "evaluate"]
    for stage in config.run.stages:
        _require(stage in known, "run.stages", stage, f"known stages are {', '.join(known)}")
    _require(
        config.run.stages == [stage for stage in known if stage in config.run.stages],
        "run.stages",
        config.run.stages,
        f"each stage stands once, in the order {', '.join(known)}",
    )
    splits = config.data.splits
    of_studies = [stage for stage in ("cohort", "pretrain") if stage in config.run.stages]
    _require(
        config.task.items is not None or not of_studies,
        "run.stages",
        config.run.stages,
        f"task.items is null, and {' and '.join(of_studies)} need studies; set [sft, grpo, evaluate], or fewer",
    )
    _require(
        config.task.items is not None or config.task.examples is not None or "sft" not in config.run.stages,
        "task.examples",
        None,
        "task.items is null, so sft has no studies to learn from; name f(config, tokenizer, split) -> list[Example], "
        "or take sft out of run.stages and set model.init",
    )
    used = {"evaluation.split": config.evaluation.split}
    if config.grpo.held_out.every_steps > 0:
        used["grpo.held_out.split"] = config.grpo.held_out.split
    for key, split in used.items():
        _require(
            not config.task.medical or split in splits,
            key,
            split,
            f"data.labs_csv has the splits {', '.join(splits)}",
        )


def _check_checkpoints(config: Config) -> None:
    """The file system behind a URL must be known, and its package installed."""
    grpo = config.grpo
    protocol, separator, _ = (grpo.checkpoint_root or "").partition("://")
    if not separator:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"grpo.checkpoint_root is {grpo.checkpoint_root!r}: {error}; "
            "install what it names, or set a folder that every learner reaches"
        ) from error
    _require(
        protocol != "memory",
        "grpo.checkpoint_root",
        grpo.checkpoint_root,
        "the learners are processes of their own and do not share it; set a folder, or s3://, gs://, ...",
    )


def _check_data(config: Config) -> None:
    data = config.data
    share = data.validation_share
    _require(0 <= share < 1, "data.validation_share", share, "it is a share of the training patients; set 0 to below 1")
    known = {f"{kind}_{split}" for kind in ("ecg", "cxr", "lab", "diagnosis") for split in data.tables}
    for key in data.qa_files:
        _require(key in known, "data.qa_files", key, f"write KIND_SPLIT, one of {', '.join(sorted(known))}")
