# SPDX-License-Identifier: Apache-2.0
"""What carries tensors between the stages of a job, where `torch.distributed` alone does not."""

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from megatron.core import parallel_state

from mapl.config import EmulationConfig
from megatron.mapl.emulation import LinkEmulation
from megatron.mapl.runtime import MaplRuntime
from megatron.mapl.staging import Gloo, StagedTransport
from megatron.mapl.transport import MegatronTransfers, Transport


class Links:
    """What carries tensors between stages, from the time on when there are process groups.

    With NCCL `torch.distributed` does by itself, and in CPU mode unless links are emulated.

    Attributes:
        staged: whether tensors of GPUs go through the host.
    """

    def __init__(
        self, config: EmulationConfig, runtime: MaplRuntime | None, args: Any, *, staged: bool
    ) -> None:
        self._config, self._runtime, self.staged = config, runtime, staged
        self._timeout = timedelta(minutes=args.distributed_timeout_minutes)
        self._closing = ExitStack()

    def start(self, chunks: list[Any]) -> list[Any]:
        """Pre-wrap hook on every process, of plain jobs too."""
        transport: Transport | None = None
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        bandwidth, latency = self._config.emulate_bandwidth, self._config.emulate_latency
        if bandwidth is not None or latency:
            transport = emulation = LinkEmulation.start(
                bandwidth_mbit=bandwidth,
                latency_ms=latency or 0.0,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                stages=stages,
                timeout=self._timeout,
            )
            self._closing.callback(emulation.close)
        if self.staged and stages > 1:
            transport = staged = StagedTransport(transport or Gloo(), self._timeout)
            self._closing.callback(staged.close)  # before the links that it sends over
        if transport is not None:
            self._closing.callback(MegatronTransfers(transport).undo)
            if self._runtime is not None:
                self._runtime.transport = transport
        return chunks

    def close(self) -> None:
        """Waits until all is sent and received; to be called before the process group's end.

        Raises:
            RuntimeError: a transfer failed, or not all is over in time.
        """
        self._closing.close()
