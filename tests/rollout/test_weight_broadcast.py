"""A real engine that receives its weights from a group: fake is only the communicator, and with it the GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import random_item, small_config, small_model, small_tokenizer, study_prompt
from test_vllm_engine import ENGINE, SAMPLING, TOLERANCE, difference

from medtvt_rl.model.named_weights import named_weights
from medtvt_rl.rollout.vllm_core import prepare_environment
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import RolloutGroup
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer, WeightBufferError, pack_weights

pytestmark = pytest.mark.engine
GROUP = WeightGroup(address="10.0.0.1", port=7, world_size=2)
ITEM = random_item(0)


class FakeCommunicator:
    """Brings `data`; joining and broadcasting fail with `error` if there is one."""

    disabled = False
    data: Any = None
    error: Exception | None = None

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.error is not None:
            raise self.error
        tensor.copy_(torch.from_numpy(self.data))

    def destroy(self) -> None: ...


def attach_receiver(worker: Any) -> None:
    """What vLLM's GPU worker does at its start and its CPU worker does not."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from medtvt_rl.model.vllm_plugin import RECEIVER

    # An RPC meets the worker inside a wrapper, which passes on what is read, not what is set.
    worker.worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=RECEIVER), worker.vllm_config, worker.device, worker.model_runner.get_model()
    )


def copy_of_weights(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.model_runner.get_model().state_dict().items()}


def on_worker(engine: VllmEngine, function: Any) -> Any:
    core: Any = engine._core._engine
    return core.collective_rpc(function)[0]


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> FakeCommunicator:
    from vllm.distributed.weight_transfer import nccl_engine

    communicator = FakeCommunicator()
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda init_info, parallel: communicator)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    return communicator


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    torch.set_num_threads(1)
    prepare_environment(1, cpu=True)
    folder = tmp_path_factory.mktemp("model")
    small_model(small_config(), small_tokenizer(), 0).save(folder)
    small_tokenizer().save_pretrained(folder)
    with VllmEngine(folder, ENGINE) as engine:
        on_worker(engine, attach_receiver)
        yield engine


def packed(seed: int, version: int) -> WeightBuffer:
    return pack_weights(version, named_weights(small_model(small_config(), small_tokenizer(), seed)))


def answer(engine: VllmEngine) -> RolloutGroup:
    return engine.submit(study_prompt(0), ITEM, 0, 4, 0, SAMPLING).result(60)


def test_broadcast_weights_serve_and_faults_leave_the_engine_as_it_was(
    engine: VllmEngine, communicator: FakeCommunicator
) -> None:
    first, second = packed(1, 1), packed(2, 2)
    engine.update_weights(first)
    whole = on_worker(engine, copy_of_weights)
    with pytest.raises(RuntimeError, match="has not joined a weight group"):
        engine.update_weights(first.header())
    engine.join_weight_group(GROUP, 1)

    communicator.data = second.data
    assert engine.update_weights(second.header()) == second.checksum and engine.version == 2
    group = answer(engine)
    assert group.oldest_version == 2
    assert difference(small_model(small_config(), small_tokenizer(), 2), group, ITEM) < TOLERANCE

    communicator.data = first.data
    engine.update_weights(first.header())
    received = on_worker(engine, copy_of_weights)
    assert received.keys() == whole.keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in whole.items())

    communicator.data = np.roll(second.data, 1)
    with pytest.raises(WeightBufferError, match="weights of version 2: checksum"):
        engine.update_weights(second.header())
    communicator.error = RuntimeError("NCCL error: remote process exited")
    with pytest.raises(RuntimeError, match="remote process exited"):
        engine.update_weights(second.header())
    assert engine.broken is None and engine.version == 1
    assert difference(small_model(small_config(), small_tokenizer(), 1), answer(engine), ITEM) < TOLERANCE
    communicator.error, communicator.data = None, second.data
    assert engine.update_weights(second.header()) == second.checksum
