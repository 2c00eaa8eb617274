"""The learner's side of broadcasting weights to the engines' GPUs: rank 0 of a weight group.

Owns: the communicator, the deadline of every call on it, and giving it up. Does not own: which weights (export.py), or
when a group is built (actors/weight_transfer.py). vLLM is imported when a group is joined, and only then: both sides
have to speak through the communicator that its workers use.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medtvt_rl.rollout.config import RolloutConfig
from medtvt_rl.weight_group import WeightGroup
from medtvt_rl.weights import WeightBuffer

T = TypeVar("T")


class WeightGroupError(RuntimeError):
    """The group could not be built or used, and is given up."""


class Channel(Protocol):
    """One group, once all of its ranks are there."""

    def broadcast(self, data: NDArray[np.uint8]) -> None:
        """Returns when every rank has taken part."""

    def destroy(self) -> None:
        """Ends the group, and a broadcast that hangs, from any thread."""


class NcclChannel:
    """A group through vLLM's communicator.

    Raises:
        RuntimeError: vLLM did not find NCCL; its communicator would do nothing, silently.
    """

    def __init__(self, group: WeightGroup, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._device = device
        # The device is a setting of each thread.
        torch.cuda.set_device(device)
        self._communicator: Any = trainer_init(group.init_info(0), rank=0)
        if self._communicator.disabled:
            raise RuntimeError("vLLM found no NCCL library to send weights with; set weights.transport=object_store")

    def broadcast(self, data: NDArray[np.uint8]) -> None:
        """Sends [N] bytes by way of this rank's GPU."""
        torch.cuda.set_device(self._device)
        with warnings.catch_warnings():
            # Bytes in the object store are read-only, and they are only read.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            sent = torch.from_numpy(data).to(self._device)
        stream = torch.cuda.current_stream()
        self._communicator.broadcast(sent, src=0, stream=stream)
        stream.synchronize()

    def destroy(self) -> None:
        """See Channel."""
        self._communicator.destroy()


class WeightSender:
    """Rank 0 of one weight group after another. What it waits for in vain, it leaves behind in a thread.

    Args:
        config: has the deadlines of `open` and `send`.
        join: makes the channel of a group; returns when all ranks have come.
    """

    def __init__(
        self,
        device: torch.device,
        config: RolloutConfig,
        join: Callable[[WeightGroup, torch.device], Channel] = NcclChannel,
    ) -> None:
        self._device, self._config, self._join = device, config, join
        self._channel: Channel | None = None
        self._expected: WeightGroup | None = None
        self._lock = threading.Lock()

    def open(self, group: WeightGroup) -> None:
        """Leaves the group before, and builds this one.

        Raises:
            WeightGroupError: not all engines came in time.
        """
        self.close()
        self._expected = group
        engines = f"{group.world_size - 1} workers of the engines to join at {group.address}:{group.port}"
        self._within(lambda: self._enter(group), engines, self._config.update_timeout_s, "rollout.update_timeout_s")

    def send(self, weights: WeightBuffer) -> None:
        """Broadcasts the data of a buffer.

        Raises:
            WeightGroupError: there is no group, or not all engines took part in time.
        """
        channel = self._channel
        if channel is None:
            raise WeightGroupError(f"weights of version {weights.version}: no weight group is open; build one first")
        what = f"the workers of the engines to receive weights of version {weights.version}"
        timeout_s, setting = self._config.publication_timeout_s, self._config.publication_timeout
        self._within(lambda: channel.broadcast(weights.data), what, timeout_s, setting)

    def close(self) -> None:
        """Leaves the group, if there is one."""
        with self._lock:
            channel, self._channel, self._expected = self._channel, None, None
        if channel is not None:
            channel.destroy()

    def _enter(self, group: WeightGroup) -> None:
        channel = self._join(group, self._device)
        with self._lock:
            late = self._expected is not group
            if not late:
                self._channel = channel
        if late:
            channel.destroy()

    def _within(self, call: Callable[[], T], what: str, timeout_s: float, setting: str) -> T:
        """The result of a call that may hang for good; the group is given up where it does, or fails."""
        result: Future[T] = Future()
        threading.Thread(target=_run, args=(call, result), name="weight-group", daemon=True).start()
        try:
            return result.result(timeout_s)
        except FutureTimeoutError as error:
            self.close()
            raise WeightGroupError(
                f"waited {timeout_s:g} s ({setting}) for {what}; the weight group is given up"
            ) from error
        except Exception:
            self.close()
            raise


def _run(call: Callable[[], T], result: Future[T]) -> None:
    try:
        result.set_result(call())
    except BaseException as error:
        result.set_exception(error)
