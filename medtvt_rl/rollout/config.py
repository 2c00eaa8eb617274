"""Settings of sampling, of the rollout engines, and of the weights that they are sent. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medtvt_rl.model.config import LoraSettings

Sent = Literal["adapter", "trainable", "merged", "full"]
ROOM, NEED = SCALINGS = "room", "need"
"""What `rollout.scaling` may be besides a dotted path."""


@dataclass
class SamplingConfig:
    """How a completion is drawn. Sampling and scoring describe one distribution: top_p = 1 and top_k = -1.

    Attributes:
        temperature: divides the logits, in the engine and wherever log-probs are computed.
        max_new_tokens: a completion longer than this is cut, and marked so.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 96


@dataclass
class EngineConfig:
    """Settings handed to vLLM.

    Attributes:
        dtype: of weights and activations; float32 where engine and learner must agree to 1e-4.
        kv_cache_bytes: KV cache on a CPU; on GPUs `gpu_memory_utilization` rules.
        block_size: tokens per KV block; a multiple of 32 on a CPU.
        num_threads: OpenMP threads of one engine; `placement.rollout.cpus` only reserves them.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 128
    block_size: int = 32
    kv_cache_bytes: int = 268435456
    gpu_memory_utilization: float = 0.85
    enforce_eager: bool = True
    num_threads: int = 1


@dataclass
class ElasticConfig:
    """When generators are added and removed while a run lasts, see elastic.py. Shares are of time, over a window.

    Attributes:
        window_s: both shares are taken over so long, and over at least `min_steps` steps.
        cooldown_s: after the number of generators has changed nothing is decided for so long.
        add_above: one is added where the learner waits for groups for a larger share, and the generators less.
        remove_below: one is removed where the learner waits for a smaller share, and the others would still be left
            without work for a share of `spare`.
    """

    window_s: float = 120.0
    min_steps: int = 3
    cooldown_s: float = 120.0
    add_above: float = 0.1
    remove_below: float = 0.05
    spare: float = 0.15


@dataclass
class RolloutConfig:
    """The rollout generators.

    Attributes:
        num_generators: that a run asks for when it starts.
        min, max: with how many it begins, and keeps, and up to how many join while it lasts; None: num_generators.
        scaling: `room`: a generator is added wherever a node has room for one, up to `max`. `need`: one more while the
            learner waits for groups, one less while generators are idle, as `elastic` says. Or the dotted path of a
            policy, see actors/elastic.py. What was decided is carried out every `scaling_interval_s`.
        tensor_parallel: GPUs of one node that one engine is spread over.
        balance: `speed`: work in proportion to each generator's measured tokens a second. `even`: to each alike, so
            that two runs of one seed hand out the same. `auto`: `even` with grpo.max_staleness 0, else `speed`.
        make_engine: dotted path of f(model_folder, config, version) -> RolloutEngine (rollout/engine.py).
        on_update: what happens to requests in flight when new weights arrive.
        spares: 1 keeps, beside each generator, a process that has vLLM imported and takes its place when it is lost; 0
            none; None one where the node has memory to spare.
        max_completions_per_engine: a larger group is spread over several generators; 0 never does; None takes
            engine.max_num_seqs, more than which an engine can only compute one after the other.
        start_timeout_s, generate_timeout_s, update_timeout_s: deadlines of the calls, seconds. With on_update `finish`
            a publication has generate_timeout_s besides, for the requests in flight.
    """

    num_generators: int = 1
    min: int | None = None
    max: int | None = None
    scaling: str = ROOM
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    scaling_interval_s: float = 10.0
    tensor_parallel: int = 1
    balance: Literal["auto", "speed", "even"] = "auto"
    make_engine: str = "medtvt_rl.rollout.engine:vllm_engine"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    on_update: Literal["continue", "finish", "restart"] = "continue"
    spares: int | None = None
    max_completions_per_engine: int | None = None
    start_timeout_s: float = 300.0
    generate_timeout_s: float = 300.0
    update_timeout_s: float = 60.0

    @property
    def least(self) -> int:
        """Generators that a run begins with, and keeps."""
        return self.num_generators if self.min is None else self.min

    @property
    def most(self) -> int:
        """Generators that a run has at most."""
        return self.num_generators if self.max is None else self.max

    def by_speed(self, max_staleness: int) -> bool:
        """`balance` with `auto` decided: whether work goes by measured speed."""
        return self.balance == "speed" or (self.balance == "auto" and max_staleness > 0)

    @property
    def publication_timeout_s(self) -> float:
        """How long an engine that serves may take until it holds new weights, and the learner until it has sent them:
        with on_update `finish` the requests in flight come first."""
        return self.update_timeout_s + (self.generate_timeout_s if self.on_update == "finish" else 0.0)

    @property
    def publication_timeout(self) -> str:
        """The settings that make it."""
        return "rollout.update_timeout_s" + (" + generate_timeout_s" if self.on_update == "finish" else "")

    @property
    def engine_share(self) -> int | None:
        """Completions of one group that one engine takes at most; None: any number."""
        share = self.max_completions_per_engine
        return self.engine.max_num_seqs if share is None else share or None


@dataclass
class WeightsConfig:
    """What of the policy the engines are sent after every step. BatchNorm statistics go with the modules that learn.

    Attributes:
        send: `adapter`: the adapters, unmerged, and the small modules that learn; refused where more than that learns.
            `trainable`: everything that learns, adapters unmerged. `merged`: the same, adapters merged by the learner.
            `full`: every weight, frozen ones too, merged. `auto`: `adapter` where it is not refused, else `trainable`.
            An engine merges what comes unmerged into the weights of its model folder, with the learner's own formula.
        transport: `object_store`: through Ray's object store, to engines anywhere. `nccl`: one broadcast from the
            learner's GPU to those of all engines; each side needs room there for the whole buffer, and one engine that
            fails in it costs the others a restart. The store keeps a copy, too, for engines that start later.
    """

    send: Literal["auto", "adapter", "trainable", "merged", "full"] = "auto"
    transport: Literal["object_store", "nccl"] = "object_store"

    def resolved(self, lora: LoraSettings) -> Sent:
        """`send` with `auto` decided. Raises ValueError where `adapter` would leave out something that learns."""
        if self.send == "auto":
            return "adapter" if lora.rank > 0 and not lora.train_embeddings else "trainable"
        if self.send == "adapter" and lora.rank == 0:
            raise ValueError(
                "weights.send is 'adapter': model.lora.rank is 0, so there are none; set a rank, or send 'trainable'"
            )
        if self.send == "adapter" and lora.train_embeddings:
            raise ValueError(
                "weights.send is 'adapter': model.lora.train_embeddings is true and the embeddings would not be sent; "
                "set it false, or send 'trainable'"
            )
        return self.send
