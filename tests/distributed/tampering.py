# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: each function is called in every process of a job before it starts.

All but one damage a single payload, number `VICTIM` of its boundary and direction, in the process
that sends it.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch

from mapl.channel import Channel
from mapl.parcel import ParcelChannel
from mapl.payload import HEADER_WORDS, WORD, Direction

#: The number of the damaged activation or gradient; of the projector's gradients it is the first.
VICTIM = 2
#: The step, from 0, whose projector gradient is not a number.
NAN_STEP = 1


def _victim(direction: Direction) -> int:
    return 0 if direction is Direction.PROJECTOR else VICTIM


#: What packs payloads.
AnyChannel = Channel | ParcelChannel


def _sends(channel: AnyChannel, direction: Direction) -> bool:
    """Whether `channel` is about to pack the payload to damage, on one side of the boundary."""
    side = "1" if direction is Direction.BACKWARD else "0"
    return (
        os.environ["RANK"] == side
        and channel.layout.direction is direction
        and channel.sent == _victim(direction)
    )


def _damage(
    record: dict[str, Any],
    *,
    direction: Direction,
    before: Callable[[AnyChannel], None] = lambda channel: None,
    after: Callable[[AnyChannel, torch.Tensor], torch.Tensor] = lambda channel, payload: payload,
) -> None:
    """Patches what packs: `before` may change the channel, `after` the payload."""
    parcel = direction is Direction.PROJECTOR
    owner: Any = ParcelChannel if parcel else Channel
    name = "pack" if parcel else "pack_body"  # by which all of a channel's payloads go
    pack = getattr(owner, name)

    def pack_damaged(self: AnyChannel, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _sends(self, direction):
            return pack(self, *args, **kwargs)
        layout = self.layout
        before(self)
        payload = pack(self, *args, **kwargs)
        self.layout = layout
        return after(self, payload)

    setattr(owner, name, pack_damaged)


def _flip(channel: AnyChannel, payload: torch.Tensor, *, byte: int) -> torch.Tensor:
    payload[byte] ^= 16
    return payload


def _cut(channel: AnyChannel, payload: torch.Tensor) -> torch.Tensor:
    return payload[:-WORD].clone()


def _skip_a_number(channel: AnyChannel) -> None:
    channel.sent += 1


def _take_the_next_boundary(channel: AnyChannel) -> None:
    channel.layout = replace(channel.layout, boundary=channel.layout.boundary + 1)


_FIRST_ID = HEADER_WORDS * WORD
_LAST_LATENT = -WORD - 1
_CHECKSUM = -WORD

magic = partial(_damage, direction=Direction.FORWARD, after=partial(_flip, byte=0))
token_id = partial(_damage, direction=Direction.FORWARD, after=partial(_flip, byte=_FIRST_ID))
latent = partial(_damage, direction=Direction.FORWARD, after=partial(_flip, byte=_LAST_LATENT))
checksum = partial(_damage, direction=Direction.FORWARD, after=partial(_flip, byte=_CHECKSUM))
truncated = partial(_damage, direction=Direction.FORWARD, after=_cut)
lost = partial(_damage, direction=Direction.FORWARD, before=_skip_a_number)
gradient = partial(_damage, direction=Direction.BACKWARD, after=partial(_flip, byte=_LAST_LATENT))
lost_gradient = partial(_damage, direction=Direction.BACKWARD, before=_skip_a_number)
other_boundary = partial(_damage, direction=Direction.BACKWARD, before=_take_the_next_boundary)
projector = partial(_damage, direction=Direction.PROJECTOR, after=partial(_flip, byte=_LAST_LATENT))


def projector_nan(record: dict[str, Any]) -> None:
    """One side's term of the projector's gradient is not a number in step `NAN_STEP`."""
    pack = ParcelChannel.pack

    def pack_nan(self: ParcelChannel, data: torch.Tensor, *args: Any) -> torch.Tensor:
        if (
            os.environ["RANK"] == "0"
            and self.layout.direction is Direction.PROJECTOR
            and self.sent == NAN_STEP
        ):
            data[:4].view(torch.float32)[0] = float("nan")  # a view of the gradient itself
        return pack(self, data, *args)

    ParcelChannel.pack = pack_nan


def nudge_projector_after_load(record: dict[str, Any]) -> None:
    """One process changes the last bit of one number of its projector after a load."""
    from megatron.mapl import checkpoint

    check_sides = checkpoint.check_sides

    def nudge_and_check(runtime: Any) -> None:
        record["checks"] = record.get("checks", 0) + 1
        if record["checks"] == 2 and os.environ["RANK"] == "1":  # the first is at start
            first = runtime.projectors()[0].A.data.view(torch.int32)
            first[0, 0] ^= 1
        check_sides(runtime)

    checkpoint.check_sides = nudge_and_check


def ops_of_one_process(record: dict[str, Any]) -> None:
    """MAPL_OPS is set in one environment alone."""
    if os.environ["RANK"] == "1":
        os.environ["MAPL_OPS"] = "reference"


def unbatched_transfers(record: dict[str, Any]) -> None:
    """No fault: a setting that Megatron's flags reach for interleaved schedules alone."""
    from megatron.training import argument_utils

    config_from_args = argument_utils.gpt_config_from_args

    def unbatched(args: Any) -> Any:
        config = config_from_args(args)
        config.transformer.batch_p2p_comm = False
        return config

    argument_utils.gpt_config_from_args = unbatched  # before the script imports it


def _signal_in_step_3(signal_number: int) -> None:
    """In the process `VICTIM_RANK`, while it packs the payload in the middle of the third step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    pack = Channel.pack_body
    if os.environ["RANK"] != os.environ["VICTIM_RANK"]:
        return

    def pack_and_fall(self: Channel, *args: Any, **kwargs: Any) -> torch.Tensor:
        micro_batches = get_num_microbatches()
        if self.sent == 2 * micro_batches + micro_batches // 2:
            os.kill(os.getpid(), signal_number)
        return pack(self, *args, **kwargs)

    Channel.pack_body = pack_and_fall  # type: ignore[method-assign]


def die_in_step_3(record: dict[str, Any]) -> None:
    """The process is gone, as when its machine fails."""
    _signal_in_step_3(signal.SIGKILL)


def stop_in_step_3(record: dict[str, Any]) -> None:
    """The process is there and does nothing, as when its machine hangs."""
    _signal_in_step_3(signal.SIGSTOP)


def staged_transfers(record: dict[str, Any]) -> None:
    """No fault: what stages exchange goes the way of a GPU's tensors, through other memory."""
    from megatron.mapl import staging

    staging.needed = lambda backend, *, cpu_mode: True
    record["staged"] = 0
    start = staging.StagedTransport._transfer

    def noting_transfer(self: staging.StagedTransport, op: Any) -> Any:
        record["staged"] += 1
        return start(self, op)

    staging.StagedTransport._transfer = noting_transfer  # type: ignore[method-assign]


def torch_attention(record: dict[str, Any]) -> None:
    """No fault: attention as on a GPU without Transformer Engine."""
    from megatron.core.models.backends import LocalSpecProvider

    from megatron.mapl import attention

    LocalSpecProvider.core_attention = attention.core_attention


def unbatched_and_staged_transfers(record: dict[str, Any]) -> None:
    """No fault: both."""
    unbatched_transfers(record)
    staged_transfers(record)


def staged_transfers_and_die_in_step_3(record: dict[str, Any]) -> None:
    """The process is gone, and its peers' threads hear of it."""
    staged_transfers(record)
    die_in_step_3(record)


def count_emulated_sends(record: dict[str, Any]) -> None:
    """No fault: notes how many messages a process has sent over an emulated link."""
    from megatron.mapl.emulated_connection import EmulatedConnection

    record["emulated_sends"] = 0
    send = EmulatedConnection.send

    def noting_send(self: EmulatedConnection, tensor: torch.Tensor, peer: int) -> Any:
        record["emulated_sends"] += 1
        return send(self, tensor, peer)

    EmulatedConnection.send = noting_send  # type: ignore[method-assign]


def count_posted_receives(record: dict[str, Any]) -> None:
    """No fault: notes how many receives a process has posted when it first waits for one."""
    from megatron.mapl.transfers import InFlight

    record["posted_first"] = 0
    receive = InFlight.receive

    def noting_receive(self: InFlight, side: str, what: str) -> torch.Tensor:
        record["posted_first"] = record["posted_first"] or len(self._receiving[side])
        return receive(self, side, what)

    InFlight.receive = noting_receive  # type: ignore[method-assign]


def count_reduced_bytes(record: dict[str, Any]) -> None:
    """No fault: counts the bytes that replicas reduce."""
    from megatron.core import parallel_state

    record["reduced"] = 0
    all_reduce = torch.distributed.all_reduce

    def counting_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if group is not None and group is parallel_state.get_data_parallel_group(
            with_context_parallel=True
        ):
            record["reduced"] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting_all_reduce


def record_wandb(record: dict[str, Any]) -> None:
    """No fault: a stand-in for the package `wandb` that notes (step, figures)."""
    noted = record["wandb"] = []
    standin = ModuleType("wandb")
    standin.config = {}  # type: ignore[attr-defined]
    standin.init = lambda **_: None  # type: ignore[attr-defined]
    standin.finish = lambda: None  # type: ignore[attr-defined]
    standin.log = lambda data, step=None: noted.append((step, data))  # type: ignore[attr-defined]
    sys.modules["wandb"] = standin


def whole_mock_data(record: dict[str, Any]) -> None:
    """As many mock samples as Megatron has where nobody cuts them down."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 100000


def note_subspace(record: dict[str, Any]) -> None:
    """No fault: notes activations at boundaries, and how far weights are outside of span U."""
    import subspace_notes

    subspace_notes.install(record)


def note_what_is_sent(record: dict[str, Any]) -> None:
    """No fault: notes (boundary, step) → how many tokens were sent in training, ΣRᵀR, and A."""
    from megatron.training import get_args

    from megatron.mapl.model import StageBoundaries

    send, record["sent"] = StageBoundaries.send, {}

    def noting_send(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self.training and self.outlet.projector is not None:
            rows = hidden.detach().double().flatten(0, 1)
            coordinates, basis = self._coordinates(), self.anchor.basis
            if coordinates is not None:
                c = coordinates.rows().detach().double()
                rows = rows - (c if basis is None else c @ basis.double())
            place = self.outlet.boundary, get_args().curr_iteration + 1
            tokens, moment, _ = record["sent"].get(place, (0, 0.0, None))
            a = self.outlet.projector.A.detach().clone()
            record["sent"][place] = (tokens + len(rows), moment + rows.T @ rows, a)
        return send(self, hidden)

    StageBoundaries.send = noting_send  # type: ignore[method-assign]


def note_logits(record: dict[str, Any]) -> None:
    """No fault: evaluations note their micro-batches' ids [b, s] and logits [s, b, V]."""
    from megatron.core.models.gpt import GPTModel

    record["ids"], record["logits"] = [], []
    forward, loss = GPTModel.forward, GPTModel.compute_language_model_loss

    def noting_forward(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.pre_process and not self.training:
            record["ids"].append(input_ids.clone())
        return forward(self, input_ids, *args, **kwargs)

    def noting_loss(self: Any, labels: Any, logits: Any) -> Any:
        if not self.training:
            record["logits"].append(logits.detach().clone())
        return loss(self, labels, logits)

    GPTModel.forward, GPTModel.compute_language_model_loss = noting_forward, noting_loss


def note_messages(record: dict[str, Any]) -> None:
    """No fault: notes the bytes of each message that this process sends to another stage."""
    from torch.distributed import distributed_c10d

    send, record["messages"] = torch.distributed.isend, []

    def noting_send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        record["messages"].append(tensor.numpy().tobytes())
        return send(tensor, *args, **kwargs)

    # P2POp looks for the function under the second of these names.
    torch.distributed.isend = noting_send
    distributed_c10d.isend = noting_send
