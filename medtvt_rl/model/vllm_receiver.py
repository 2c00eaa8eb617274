"""What a vLLM worker does with weights that the learner broadcasts: takes all of them as one tensor of bytes.

Owns: vLLM's weight transfer engine of this name, the bytes until they are loaded. Does not own: the group's meeting
place (weight_group.py), the form of the bytes (weights.py), or their way into the model (rollout/vllm_core.py).
Imported by vLLM's factory of such engines alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from medtvt_rl.weights import WeightBuffer


@dataclass
class FlatUpdateInfo(WeightTransferUpdateInfo):
    """What one broadcast brings."""

    num_bytes: int


class FlatReceiver(NCCLWeightTransferEngine):
    """vLLM's NCCL engine, but for what is received, and that receiving does not touch the model.

    vLLM's own reload, layer by layer, would leave the statistics of BatchNorm undefined.
    """

    update_info_cls = FlatUpdateInfo  # type: ignore[assignment]
    _received: torch.Tensor | None = None
    _buffer: WeightBuffer | None = None

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Joins a group of the learner and all workers, and leaves the one before.

        Raises:
            RuntimeError: vLLM did not find NCCL; its communicator would do nothing, silently.
        """
        self.shutdown()
        super().init_transfer_engine(init_info)
        if self.model_update_group is None or self.model_update_group.disabled:
            raise RuntimeError("vLLM found no NCCL library to receive weights with; set weights.transport=object_store")

    def start_weight_update(self) -> None:
        """Nothing is to be prepared."""

    def finish_weight_update(self) -> None:
        """Nothing is to be finished: loading is a step of its own."""

    def receive_weights(self, update_info: FlatUpdateInfo) -> None:  # type: ignore[override]
        """Takes part in the broadcast of `num_bytes` bytes."""
        if self.model_update_group is None:
            raise RuntimeError("this worker has not joined a weight group; call init_weight_transfer_engine first")
        self._received = self._buffer = None
        received = torch.empty(update_info.num_bytes, dtype=torch.uint8, device=self.device)
        self.model_update_group.broadcast(received, src=0, stream=torch.cuda.current_stream())
        self._received = received

    def complete(self, header: WeightBuffer) -> int:
        """Puts what was received behind its header, on the host; returns the checksum of what arrived.

        Raises:
            WeightBufferError: the header is of another number of bytes.
        """
        if self._received is None:
            raise RuntimeError(f"no bytes were received for the weights of version {header.version}")
        received, self._received = self._received, None
        self._buffer = header.with_data(received.cpu().numpy())
        return zlib.crc32(self._buffer.data.data)

    def take(self, header: WeightBuffer) -> WeightBuffer:
        """The buffer that `complete` made for this header; it is handed out once."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or buffer.version != header.version:
            raise RuntimeError(f"the weights of version {header.version} were not received")
        return buffer
