"""The receiver inside vLLM's own worker methods, with a fake communicator; and what of vLLM it is built on."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medtvt_rl.model import vllm_plugin
from medtvt_rl.rollout.vllm_core import VllmCore, load_in_place, prepare_environment, receive
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBufferError, pack_weights

prepare_environment(1, cpu=True)
BUFFER = pack_weights(5, [("w", torch.arange(6.0)), ("v", torch.ones(3, 2).bfloat16())])
GROUP = WeightGroup(address="10.0.0.1", port=7, world_size=3)


class FakeCommunicator:
    """Brings the bytes it was made with."""

    def __init__(self, data: Any = BUFFER.data, disabled: bool = False) -> None:
        self.data, self.disabled, self.destroyed = data, disabled, False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0 and tensor.dtype == torch.uint8
        tensor.copy_(torch.from_numpy(self.data))

    def destroy(self) -> None:
        self.destroyed = True


class Model:
    """Keeps what is loaded."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> set[str]:
        self.loaded = dict(weights)
        return set(self.loaded)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's GPU worker, but only its methods for weights, with the receiver that its factory makes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, nccl_engine
    from vllm.v1.worker import gpu_worker

    vllm_plugin.register()
    joins: list[Any] = []

    def join(init_info: Any, parallel_config: Any) -> Any:
        joins.append(init_info)
        return joins_give[0]

    joins_give = [FakeCommunicator()]
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    model = Model()
    vllm_config = SimpleNamespace(parallel_config=None, model_config=None, compilation_config=None)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: SimpleContext())
    worker: Any = object.__new__(gpu_worker.Worker)
    worker.vllm_config, worker.device = vllm_config, torch.device("cpu")
    worker._weight_update_active = worker._weight_update_is_draft = False
    worker.model_runner = SimpleNamespace(get_model=lambda: model, reset_lora_state=lambda: None)
    config: Any = SimpleNamespace(backend=vllm_plugin.RECEIVER)
    made: Any = vllm_config
    worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(config, made, worker.device, model)  # type: ignore[arg-type]
    worker.model, worker.joins, worker.joins_give = model, joins, joins_give
    return worker


class SimpleContext:
    """In place of vLLM's own, which needs a whole configuration."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def core_of(workers: list[Any]) -> VllmCore:
    """A core whose RPC runs on these workers, as vLLM's executor would."""

    def collective_rpc(method: Any, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(w, method)(*args) if isinstance(method, str) else method(w, *args) for w in workers]

    core = object.__new__(VllmCore)
    core._engine, core._folder = SimpleNamespace(collective_rpc=collective_rpc), "folder"
    return core


def test_registration_may_come_twice() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    vllm_plugin.register()
    vllm_plugin.register()
    with pytest.raises(ValueError, match="already registered"):
        WeightTransferEngineFactory.register_engine(vllm_plugin.RECEIVER, "somewhere", "Other")


def test_what_is_broadcast_is_loaded_as_if_it_had_come_whole(worker: Any) -> None:
    core, header = core_of([worker]), BUFFER.header()
    core.join_weight_group(GROUP, 2)
    (told,) = worker.joins
    assert (told.master_address, told.master_port, told.rank_offset, told.world_size) == ("10.0.0.1", 7, 2, 3)
    for _ in range(2):
        assert core.verify(header) == BUFFER.checksum
        core.load(header)
        received = worker.model.loaded
        core.load(BUFFER)
        assert received.keys() == worker.model.loaded.keys() == {"w", "v"}
        assert all(torch.equal(received[name], tensor) for name, tensor in worker.model.loaded.items())
    with pytest.raises(RuntimeError, match="version 5 were not received"):
        core.load(header)


def test_damaged_bytes_on_any_worker_are_refused_before_anything_is_loaded(worker: Any) -> None:
    core = core_of([worker])
    damaged = BUFFER.data.copy()
    damaged[0] ^= 1
    worker.joins_give[0] = FakeCommunicator(damaged)
    core.join_weight_group(GROUP, 1)
    with pytest.raises(WeightBufferError, match="weights of version 5: checksum"):
        core.verify(BUFFER.header())
    assert worker.model.loaded == {}
    worker.joins_give[0] = FakeCommunicator()
    core.join_weight_group(GROUP, 1)
    core.verify(BUFFER.header())


def test_every_worker_of_an_engine_receives_and_loads(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("medtvt_rl.rollout.vllm_core.receive", lambda w, header: calls.append(w) or BUFFER.checksum)
    core = core_of(["first", "second"])
    assert core.verify(BUFFER.header()) == BUFFER.checksum and calls == ["first", "second"]
    checksums = iter([BUFFER.checksum, 1])
    monkeypatch.setattr("medtvt_rl.rollout.vllm_core.receive", lambda w, header: next(checksums))
    with pytest.raises(WeightBufferError):
        core.verify(BUFFER.header())


def test_a_new_group_ends_the_one_before_and_no_group_is_an_error(worker: Any) -> None:
    core, first = core_of([worker]), worker.joins_give[0]
    with pytest.raises(RuntimeError, match="has not joined a weight group"):
        core.verify(BUFFER.header())
    core.join_weight_group(GROUP, 1)
    core.join_weight_group(GROUP, 1)
    assert first.destroyed
    worker.joins_give[0] = FakeCommunicator(disabled=True)
    with pytest.raises(RuntimeError, match="no NCCL library"):
        core.join_weight_group(GROUP, 1)


def test_the_worker_is_ready_for_the_next_update_after_one_that_failed(worker: Any) -> None:
    with pytest.raises(RuntimeError):
        receive(worker, BUFFER.header())
    worker.init_weight_transfer_engine(GROUP.init_info(1))
    receive(worker, BUFFER.header())
    assert load_in_place(worker, "folder", BUFFER.header()) == 2


def test_vllm_has_what_the_broadcast_is_built_on(tmp_path: Path) -> None:
    """Fails where an upgrade of vLLM changes it: then read its sources, and mend both sides together."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, base, nccl_common, nccl_engine
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_worker import Worker

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(nccl_common.trainer_init) == ["init_info", "rank"]
    assert parameters(nccl_common.worker_init_process_group) == ["init_info", "parallel_config"]
    assert 'init_info["master_address"]' in inspect.getsource(nccl_common.trainer_init), "it takes a dictionary"
    info = nccl_common.NCCLWeightTransferInitInfo(**GROUP.init_info(1))  # type: ignore[arg-type]
    assert (info.rank_offset, info.world_size, info.packed) == (1, 3, False)
    assert parameters(PyNcclCommunicator.broadcast) == ["self", "tensor", "src", "stream"]
    assert parameters(PyNcclCommunicator.destroy) == ["self"]
    assert "self.disabled = True" in inspect.getsource(PyNcclCommunicator.__init__)
    engine = nccl_engine.NCCLWeightTransferEngine
    assert engine.init_transfer_engine is not base.WeightTransferEngine.init_transfer_engine
    assert parameters(engine.__init__) == ["self", "config", "vllm_config", "device", "model"]
    assert parameters(engine.receive_weights) == ["self", "update_info"]
    assert parameters(engine.shutdown) == parameters(engine.start_weight_update) == ["self"]
    assert parameters(base.WeightTransferEngine.update_weights) == ["self", "update_info"]
    assert dataclasses.is_dataclass(base.WeightTransferUpdateInfo)
    assert parameters(WeightTransferEngineFactory.register_engine) == ["name", "module_path_or_cls", "class_name"]
    assert parameters(Worker.init_weight_transfer_engine) == ["self", "init_info"]
    assert parameters(Worker.update_weights) == ["self", "update_info"]
    assert "weight_transfer_engine" in inspect.getsource(Worker.load_model)
    arguments = EngineArgs(model=str(tmp_path), weight_transfer_config={"backend": vllm_plugin.RECEIVER})  # type: ignore[arg-type]
    assert isinstance(arguments.weight_transfer_config, WeightTransferConfig)
    assert arguments.weight_transfer_config.backend == vllm_plugin.RECEIVER
