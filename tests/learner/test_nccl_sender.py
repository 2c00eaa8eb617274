"""The learner's side of a broadcast with a fake group: deadlines, and that nothing is left open."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medtvt_rl.learner.nccl_sender import NcclChannel, WeightGroupError, WeightSender
from medtvt_rl.rollout.config import RolloutConfig
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import pack_weights

CPU = torch.device("cpu")
BUFFER = pack_weights(3, [("w", torch.arange(5.0))])


def group(port: int) -> WeightGroup:
    return WeightGroup(address="10.0.0.1", port=port, world_size=4)


class FakeChannel:
    """Keeps what is broadcast; `hold` keeps joining or broadcasting from returning until it is set."""

    def __init__(self, hold: threading.Event | None = None) -> None:
        self.sent: list[bytes] = []
        self.destroyed = threading.Event()
        self.hold = hold

    def broadcast(self, data: np.ndarray) -> None:
        if self.hold is not None:
            self.hold.wait(20)
        self.sent.append(data.tobytes())

    def destroy(self) -> None:
        self.destroyed.set()


def sender_of(join: Callable[[WeightGroup, torch.device], Any], timeout_s: float = 0.1) -> WeightSender:
    return WeightSender(CPU, RolloutConfig(update_timeout_s=timeout_s), join)


def test_the_bytes_go_out_and_a_new_group_ends_the_one_before() -> None:
    channels = {1: FakeChannel(), 2: FakeChannel()}
    sender = sender_of(lambda group, device: channels[group.port], timeout_s=20)
    sender.open(group(1))
    sender.send(BUFFER)
    sender.send(BUFFER)
    assert channels[1].sent == [BUFFER.data.tobytes()] * 2 and not channels[1].destroyed.is_set()
    sender.open(group(2))
    assert channels[1].destroyed.is_set()
    sender.close()
    sender.close()
    assert channels[2].destroyed.is_set()
    with pytest.raises(WeightGroupError, match="no weight group is open"):
        sender.send(BUFFER)


def test_engines_that_do_not_come_are_named_and_a_group_that_is_built_too_late_is_ended() -> None:
    hold, late = threading.Event(), FakeChannel()

    def join(group: WeightGroup, device: torch.device) -> FakeChannel:
        hold.wait(20)
        return late

    sender = sender_of(join)
    with pytest.raises(WeightGroupError, match=r"0\.1 s \(rollout\.update_timeout_s\) for 3 workers .* 10\.0\.0\.1:1"):
        sender.open(group(1))
    hold.set()
    assert late.destroyed.wait(10)
    with pytest.raises(WeightGroupError, match="no weight group is open"):
        sender.send(BUFFER)


def test_a_group_that_comes_too_late_does_not_take_the_place_of_its_successor() -> None:
    hold, channels = threading.Event(), {1: FakeChannel(), 2: FakeChannel()}

    def join(group: WeightGroup, device: torch.device) -> FakeChannel:
        if group.port == 1:
            hold.wait(20)
        return channels[group.port]

    sender = sender_of(join)
    with pytest.raises(WeightGroupError):
        sender.open(group(1))
    sender.open(group(2))
    hold.set()
    assert channels[1].destroyed.wait(10)
    sender.send(BUFFER)
    assert channels[2].sent and not channels[2].destroyed.is_set()


def test_a_broadcast_that_hangs_is_ended_at_its_deadline() -> None:
    channel = FakeChannel(threading.Event())
    sender = sender_of(lambda group, device: channel)
    sender.open(group(1))
    started = time.monotonic()
    with pytest.raises(WeightGroupError, match="for the workers of the engines to receive weights of version 3"):
        sender.send(BUFFER)
    assert time.monotonic() - started < 10 and channel.destroyed.is_set()


def test_engines_that_finish_first_have_the_time_of_a_generation_besides() -> None:
    channel = FakeChannel(threading.Event())
    config = RolloutConfig(on_update="finish", update_timeout_s=0.05, generate_timeout_s=20.0)
    sender = WeightSender(CPU, config, lambda group, device: channel)
    sender.open(group(1))
    threading.Timer(0.3, lambda: channel.hold and channel.hold.set()).start()
    sender.send(BUFFER)
    assert channel.sent and not channel.destroyed.is_set()


def test_a_group_that_fails_is_given_up_with_its_own_error() -> None:
    channel = FakeChannel()
    sender = sender_of(lambda group, device: channel)
    sender.open(group(1))
    channel.broadcast = lambda data: (_ for _ in ()).throw(RuntimeError("NCCL error: remote process exited"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="remote process exited"):
        sender.send(BUFFER)
    assert channel.destroyed.is_set()


class FakeCommunicator:
    """vLLM's communicator, as far as the channel uses it."""

    def __init__(self, disabled: bool = False) -> None:
        self.disabled = disabled
        self.calls: list[Any] = []

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.calls.append((tensor.clone(), src, stream))

    def destroy(self) -> None:
        self.calls.append("destroyed")


def opened(monkeypatch: pytest.MonkeyPatch, communicator: FakeCommunicator) -> tuple[NcclChannel, list[Any]]:
    """A channel over a fake communicator, and what happened in which order."""
    from vllm.distributed.weight_transfer import nccl_common

    told: list[Any] = []
    stream = SimpleNamespace(synchronize=lambda: told.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)

    def trainer_init(init_info: dict[str, Any], rank: int) -> FakeCommunicator:
        told.append((init_info["master_address"], init_info["master_port"], init_info["world_size"], rank))
        return communicator

    monkeypatch.setattr(nccl_common, "trainer_init", trainer_init)
    return NcclChannel(group(7), CPU), told


def test_the_channel_is_rank_0_of_vllms_group_and_waits_for_its_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = FakeCommunicator()
    channel, told = opened(monkeypatch, communicator)
    frozen = BUFFER.data.copy()
    frozen.flags.writeable = False
    channel.broadcast(frozen)
    assert told == [CPU, ("10.0.0.1", 7, 4, 0), CPU, "synchronized"]
    ((tensor, source, stream),) = communicator.calls
    assert tensor.dtype == torch.uint8 and tensor.numpy().tobytes() == BUFFER.data.tobytes()
    assert source == 0 and stream is torch.cuda.current_stream()
    channel.destroy()
    assert communicator.calls[-1] == "destroyed"


def test_a_communicator_without_nccl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no NCCL library"):
        opened(monkeypatch, FakeCommunicator(disabled=True))
