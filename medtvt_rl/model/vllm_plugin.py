"""The vLLM plug-in (entry point group `vllm.general_plugins`): makes the tri-modal model known to vLLM.

Owns: registration, and the patches of vLLM that weight updates in place need. Does not own: the model (vllm_model.py),
the receiver of broadcast weights (vllm_receiver.py), or the engine (rollout/vllm_engine.py). Importing this module
imports no vLLM: vLLM itself calls `register`.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

ARCHITECTURE = "MedTVTForCausalLM"
RECEIVER = "medtvt_nccl"
PATCHED_VERSIONS = ("0.32.",)

logger = logging.getLogger(__name__)


def register() -> None:
    """Registers model, configuration and receiver of weights, and patches vLLM. May be called any number of times, in
    any process.
    """
    import vllm
    from vllm import ModelRegistry

    import medtvt_rl.model.medtvt  # noqa: F401  (registers the configuration with transformers)

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"medtvt_rl.model.vllm_model:{ARCHITECTURE}")
    if vllm.__version__.startswith(PATCHED_VERSIONS):
        _register_receiver()
        _keep_weights_live()
        _keep_item_payloads()
        _withhold_generators_of_partial_prompts()
    else:
        logger.warning(
            "vLLM %s: weight updates in place were proven with versions %s only; run `pytest -m engine` before "
            "trusting them, then add the version to %s.PATCHED_VERSIONS",
            vllm.__version__,
            ", ".join(f"{version}*" for version in PATCHED_VERSIONS),
            __name__,
        )


def _register_receiver() -> None:
    """Makes the receiver of broadcast weights known by name; its module is imported where an engine asks for it."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # what the factory says to a name that it has
        WeightTransferEngineFactory.register_engine(RECEIVER, "medtvt_rl.model.vllm_receiver", "FlatReceiver")


def _keep_weights_live() -> None:
    """On a CPU, linear layers compute with their parameters, not with packed copies.

    vLLM packs the weights of CPU linears at load and empties the parameters, so that an update in place has nothing to
    write to, and a tied output layer would keep its old weights.
    """
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layer_utils

    custom_ops._supports_onednn = False

    def never_packs(n: int, k: int, dtype: Any) -> bool:
        return False

    layer_utils.check_cpu_sgl_kernel = never_packs


def _keep_item_payloads() -> None:
    """A request that goes back to the queue at a weight update can be encoded again.

    vLLM strips the tensors of an item that the prefix cache covers; when the caches are dropped with the request in
    flight, its item has to be encoded anew and "Encoder cache miss" would end the engine.
    """
    import vllm.v1.core.sched.output as scheduler_output

    def keep(features: list[Any], *_args: Any, **_options: Any) -> list[Any]:
        return features

    scheduler_output.strip_covered_mm_data = keep  # type: ignore[assignment]


def _withhold_generators_of_partial_prompts() -> None:
    """On a CPU, a seeded request whose prompt is not through yet draws nothing.

    vLLM samples for every row of a step and rewinds the generators of rows whose prompt is only partly computed, which
    a CPU generator cannot do: the engine would end with "CPU Generator does not use offset".
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens = CPUModelRunner.sample_tokens
    if getattr(sample_tokens, "withholds_generators", False):
        return

    def sample_withholding(runner: Any, *arguments: Any, **options: Any) -> Any:
        generators = runner.input_batch.generators
        partial = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
        withheld = {row: generators.pop(row) for row in partial if row in generators}
        try:
            return sample_tokens(runner, *arguments, **options)
        finally:
            generators.update(withheld)

    sample_withholding.withholds_generators = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_withholding  # type: ignore[method-assign, assignment]
