"""vLLM as the rollout engine uses it: start, add, step, load weights in place, drop caches.

Owns: every touch of vLLM's own objects, in one place, and the environment that they need. Runs in one thread.
Does not own: groups, versions, threads (vllm_engine.py). Importing this module imports no vLLM.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtvt_rl.config_init import check_heads
from medtvt_rl.model import vllm_plugin
from medtvt_rl.model.kept_adapter import read_adapter
from medtvt_rl.model.seal import check_model_folder
from medtvt_rl.rollout.base_weights import merged_weights
from medtvt_rl.rollout.config import EngineConfig, SamplingConfig
from medtvt_rl.rollout.counters import Totals
from medtvt_rl.types import FinishReason, Prompt
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer, pack_weights


def prepare_environment(threads: int, cpu: bool) -> None:
    """Sets what vLLM reads from the environment; call before the first import of vllm in the process.

    Args:
        threads: OpenMP threads of the engine. More than the idle cores makes an engine many times slower.
        cpu: the engine runs on the CPU.
    """
    # One process: weights enter as tensors, and an update falls between two steps of the engine's own loop.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # When a step fails, vLLM would log the items of the requests at hand: values of patients.
    logging.getLogger("vllm.logging_utils.dump_input").addFilter(lambda record: False)
    if cpu:
        # Several engines on one machine must not all be bound to its first cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Compiling the sampler takes longer on a CPU than it ever gives back.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """One finished request.

    Attributes:
        token_ids: [T] int32.
        logprobs: [T] float32, at the sampling temperature.
        prompt_logprobs: [P - 1] float32 of the prompt's tokens but the first, at temperature 1; None unless asked for.
        num_prompt, num_shared: tokens of the prompt, and those whose keys and values another request had computed.
    """

    request_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    prompt_logprobs: np.ndarray | None = None
    num_prompt: int = 0
    num_shared: int = 0

    @property
    def totals(self) -> Totals:
        """What it adds to the engine's counters."""
        generated, prompt, shared = len(self.token_ids), self.num_prompt, self.num_shared
        return Totals(tokens_generated=generated, prompt_tokens=prompt, prompt_tokens_shared=shared)


def receive(worker: Any, header: WeightBuffer) -> int:
    """Runs on each vLLM worker: takes part in the broadcast of a buffer and keeps it; the checksum of what arrived."""
    worker.start_weight_update()
    worker.update_weights({"num_bytes": header.num_bytes})
    worker.finish_weight_update()
    return worker.weight_transfer_engine.complete(header)


def load_in_place(worker: Any, folder: str, buffer: WeightBuffer) -> int:
    """Runs on each vLLM worker: copies named weights into its live model, adapters merged there into the weights of
    `folder`, one at a time; how many parameters took them. Of a header, the worker has received the data.
    """
    if buffer.is_header:
        buffer = worker.weight_transfer_engine.take(buffer)
    whole, low_ranks = buffer.tensors(), list(buffer.low_ranks())
    with torch.no_grad():
        merged = merged_weights(folder, low_ranks, worker.device) if low_ranks else ()
        return len(worker.model_runner.get_model().load_weights(chain(whole, merged)))


def count_packed(worker: Any) -> int:
    """Runs on each vLLM worker: parameters that were emptied because the layer computes with a packed copy."""
    return sum(parameter.numel() == 0 for parameter in worker.model_runner.get_model().parameters())


def count_encoded(worker: Any) -> int:
    """Runs on each vLLM worker: multimodal items encoded since the start, 0 for a text model."""
    return getattr(worker.model_runner.get_model(), "num_studies_encoded", 0)


class VllmCore:
    """An in-process vLLM engine that is stepped by hand. Not thread-safe.

    Args:
        by_broadcast: weights may come over NCCL, see `join_weight_group`.
        tensor_parallel: processes that the model is spread over, each with a GPU of this node.

    Raises:
        ValueError: the folder is not a model folder with its tokenizer, or its heads do not divide.
        RuntimeError: this vLLM keeps packed copies of weights, which updates in place cannot reach.
    """

    def __init__(
        self,
        model_folder: str | Path,
        config: EngineConfig,
        item_modality: str,
        by_broadcast: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        for name in ("config.json", "tokenizer_config.json"):
            if not (Path(model_folder) / name).is_file():
                raise ValueError(
                    f"model folder: {model_folder} holds no {name}; save model and tokenizer into it (save_pretrained)"
                )
        check_model_folder(model_folder)
        heads = json.loads((Path(model_folder) / "config.json").read_text(encoding="utf-8")).get("num_attention_heads")
        check_heads(heads, tensor_parallel, f"the model in {model_folder}")
        self.item_modality = item_modality
        self._folder = str(model_folder)
        self.max_model_len = config.max_model_len
        self._engine = _start_engine(model_folder, config, by_broadcast, tensor_parallel)
        packed = self._engine.collective_rpc(count_packed)[0]
        if packed:
            raise RuntimeError(
                f"vLLM keeps {packed} weights as packed copies that an update in place cannot reach; is the plug-in of "
                "medtvt_rl registered (VLLM_PLUGINS), and this vLLM version among those it patches?"
            )
        kept = read_adapter(model_folder)
        if kept is not None:
            self.load(pack_weights(0, kept.low_ranks().items()))

    def render(self, prompt: Prompt, item: dict[str, Any] | None) -> Any:
        """vLLM's form of a prompt and its item, made once for all completions of a group."""
        from vllm.inputs import TokensPrompt
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        raw = TokensPrompt(prompt_token_ids=prompt.token_ids.tolist())
        if item is not None:
            raw["multi_modal_data"] = {self.item_modality: item}
            raw["multi_modal_uuids"] = {self.item_modality: [_item_key(item)]}
        renderer = self._engine.renderer
        (rendered,) = renderer.render_cmpl([parse_model_prompt(self._engine.model_config, raw)])
        return rendered

    def add(
        self,
        request_id: str,
        rendered: Any,
        sampling: SamplingConfig,
        max_tokens: int,
        seed: int | None,
        with_prompt: bool = False,
    ) -> str:
        """Queues one completion; `seed` None is greedy, `with_prompt` asks for the prompt's log-probs, too.

        Returns vLLM's own id of the request.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0 if seed is None else sampling.temperature,
            top_p=1.0 if seed is None else sampling.top_p,
            top_k=-1 if seed is None else sampling.top_k,
            seed=seed,
            max_tokens=max_tokens,
            logprobs=0,
            prompt_logprobs=0 if with_prompt else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._engine.add_request(request_id, rendered, params)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests by the ids that were given to `add`."""
        self._engine.abort_request(list(request_ids))

    def step(self) -> list[SampledTokens]:
        """One forward pass; the requests that it finished."""
        return [_sampled(output) for output in self._engine.step() if output.finished]

    def num_generated(self, internal_id: str) -> int:
        """Tokens sampled so far for a request that is in flight, by vLLM's own id."""
        request = self._core.scheduler.requests.get(internal_id)
        return 0 if request is None else request.num_output_tokens

    def join_weight_group(self, group: WeightGroup, rank_offset: int) -> None:
        """Every worker joins a group; returns when all of its ranks, the learner's too, have come."""
        self._engine.collective_rpc("init_weight_transfer_engine", args=(group.init_info(rank_offset),))

    def verify(self, buffer: WeightBuffer) -> int:
        """The checksum of a buffer; of a header, every worker receives the data from the weight group first.

        Raises:
            WeightBufferError: it is not the one that was sent.
        """
        if not buffer.is_header:
            return buffer.verify()
        for checksum in self._engine.collective_rpc(receive, args=(buffer,)):
            buffer.check(checksum)
        return buffer.checksum

    def load(self, buffer: WeightBuffer) -> None:
        """Copies weights, once verified, into the live model; raises whatever vLLM raises for a wrong name or shape."""
        # Tied names are stored once, so fewer may be loaded than sent; none at all is a fault.
        loaded = self._engine.collective_rpc(load_in_place, args=(self._folder, buffer))
        names = [*(entry.name for entry in buffer.index), *(entry.name for entry in buffer.adapters)]
        if names and not all(loaded):
            raise RuntimeError(f"vLLM took none of {len(names)} weights, beginning with {names[0]!r}")

    def drop_caches(self) -> None:
        """Forgets keys, values and encoder outputs of earlier weights; requests in flight are computed again.

        There is no processor cache to drop (mm_processor_cache_gb=0): an item is processed once per group.
        """
        core = self._core
        if not core.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(
                "vLLM did not drop its prefix cache; the engine would go on with keys and values of before"
            )
        core.scheduler.reset_encoder_cache()
        core.model_executor.reset_encoder_cache()

    def num_encoded(self) -> int:
        """Multimodal items encoded since the start."""
        return self._engine.collective_rpc(count_encoded)[0]

    def close(self) -> None:
        """Ends vLLM's workers and frees its memory."""
        self._engine.engine_core.shutdown()

    @property
    def _core(self) -> Any:
        return self._engine.engine_core.engine_core


def _start_engine(model_folder: str | Path, config: EngineConfig, by_broadcast: bool, tensor_parallel: int) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    # vLLM finds the plug-in by its entry point; this serves a checkout that is not installed, too.
    vllm_plugin.register()
    special: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if current_platform.is_cpu():
        torch.set_num_threads(config.num_threads)
        special = {"kv_cache_memory_bytes": config.kv_cache_bytes}
    if by_broadcast:
        special["weight_transfer_config"] = {"backend": vllm_plugin.RECEIVER}
    if tensor_parallel > 1:
        # Inside a placement group vLLM would start Ray workers in bundles of their own; the actor holds all the GPUs.
        special["distributed_executor_backend"] = "mp"
    arguments = EngineArgs(
        model=str(model_folder),
        dtype=config.dtype,
        load_format="safetensors",
        trust_remote_code=False,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        tensor_parallel_size=tensor_parallel,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        # A step's tokens must be known when the next begins, or tokens could not be told apart by policy version.
        async_scheduling=False,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
        **special,
    )
    set_num_threads = torch.set_num_threads
    try:
        return LLMEngine.from_engine_args(arguments)
    finally:
        # vLLM's CPU worker replaces this function by one that only warns, at every item that it then processes.
        torch.set_num_threads = set_num_threads


def _sampled(output: Any) -> SampledTokens:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"request {output.request_id}: vLLM ended it with {completion.finish_reason!r}")
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    logprobs = [position[token].logprob for position, token in zip(completion.logprobs, completion.token_ids)]
    return SampledTokens(
        request_id=output.request_id,
        token_ids=token_ids,
        logprobs=np.asarray(logprobs, dtype=np.float32),
        finish_reason=completion.finish_reason,
        prompt_logprobs=_prompt_logprobs(output),
        num_prompt=len(output.prompt_token_ids),
        num_shared=output.num_cached_tokens or 0,
    )


def _prompt_logprobs(output: Any) -> np.ndarray | None:
    if output.prompt_logprobs is None:
        return None
    pairs = list(zip(output.prompt_logprobs, output.prompt_token_ids))[1:]
    return np.array([position[token].logprob for position, token in pairs], dtype=np.float32)


def _item_key(item: dict[str, Any]) -> str:
    """A digest of an item's contents: equal items share encoder output and prefix, different ones never do."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(item):
        array = np.ascontiguousarray(item[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
