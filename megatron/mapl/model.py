# SPDX-License-Identifier: Apache-2.0
"""Puts boundaries on Megatron's model chunks.

A chunk is one stage of the pipeline (with virtual stages, a process holds several). Each gets a
`StageBoundaries`: one token anchor, the end of the boundary that it receives from (inlet) and the
end of the one that it sends to (outlet). Two hooks around the chunk's forward pass do the rest:

1. before: the inlet decodes the payload that arrived into a leaf Ẑ and hands X̂ to the decoder;
2. after: the outlet encodes the decoder's output X into Z, with the payload that is to be sent.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import nn

from mapl.anchors import build_anchor
from mapl.boundary import decode, encode, energy_kept
from mapl.channel import WHOLE, Channel, Share
from mapl.coordinates import Coordinates
from mapl.ngrams import predecessors_of
from megatron.mapl.geometry import Probe
from megatron.mapl.port import PAYLOAD, Place, Port, private_generator, take_payload
from megatron.mapl.projector_start import StepMoment
from megatron.mapl.runtime import MaplRuntime

#: The anchors' states with one row for each token.
VOCABULARY_TABLES = (".E", ".table")

#: The attribute by which the optimizer knows an anchor table.
ANCHOR_TAG = "is_mapl_anchor"


@dataclass
class _MicroBatch:
    """The one that is in a stage; kept apart, since `nn.Module` is slow to set attributes."""

    ids: torch.Tensor | None = None
    coordinates: Coordinates | None = None


class StageBoundaries(nn.Module):
    """The boundaries of one model chunk, with the anchor table that both of its ends share.

    Attributes:
        first_layer, last_layer: the layers [first, last) of the model that the chunk holds.
        energy: ‖Z‖²/‖X − anchor‖² of the last micro-batch, when `measure_energy` is set.
        probe: measures the geometry at the outlet, if `--mapl-geometry-interval` asks for it.
        moment: sums the outlet's second moment, if `--mapl-projector-start-step` asks for it.
        load_sources: while a checkpoint is loaded, the key to read for each state (checkpoint.py).
        table_readers: key of an anchor table → how many earlier stages read it in this load.
    """

    def __init__(
        self,
        runtime: MaplRuntime,
        config: Any,
        groups: Any,
        *,
        stage: int,
        layers: range,
        receives: bool,
        sends: bool,
    ) -> None:
        """
        Args:
            config, groups: the chunk's.
            stage: number of the chunk in the pipeline.
            layers: of the model that the chunk holds.
            receives, sends: whether there is a boundary before and behind it.
        """
        super().__init__()
        self.first_layer, self.last_layer = layers.start, layers.stop
        port = partial(
            Port,
            runtime,
            place=_place(runtime, config, groups),
            virtual=config.virtual_pipeline_model_parallel_size is not None,
        )
        self.inlet = self.outlet = None
        if receives:
            self.inlet = port(stage - 1, self.first_layer, is_outlet=False)
        if sends:
            self.outlet = port(stage, self.last_layer, is_outlet=True)
        self.anchor = build_anchor(
            runtime.config.anchor,
            vocab_size=runtime.vocab_size,
            hidden_size=runtime.plan.hidden_size,
            anchor_rank=runtime.plan.anchor_rank,
            # A static table is the same on both sides of a boundary; the basis of a factorised one
            # is the stage's own.
            generator=private_generator(
                runtime.seed, "anchor", 0 if runtime.config.anchor == "static" else self.first_layer
            ),
            static_std=runtime.config.static_anchor_std,
            buckets=runtime.config.anchor_buckets,
        )
        tags = {
            "is_embedding_or_output_parameter": True,  # Adam, where matrices get Muon
            "sequence_parallel": config.sequence_parallel,  # gradients are summed over TP
            ANCHOR_TAG: True,
        }
        for parameter in self.anchor.parameters():
            for tag, value in tags.items():
                setattr(parameter, tag, value)
        self.groups = groups
        self.sequence_parallel: bool = config.sequence_parallel
        self.measure_energy = False
        self.energy: torch.Tensor | None = None
        interval = runtime.config.geometry_interval
        projects = self.outlet is not None and self.outlet.projector is not None
        self.probe = Probe(interval) if interval is not None and projects else None
        step = runtime.plan.projector_starts[stage] if projects else None
        self.moment = StepMoment(step) if step is not None else None
        self.load_sources: dict[str, str] | None = None
        self.table_readers: dict[str, int] = {}
        self._runtime = runtime
        #: Bytes of one token's activation without MAPL.
        self._token_bytes = runtime.plan.hidden_size * runtime.pipeline_dtype.itemsize
        self._micro_batch = _MicroBatch()

    def local_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [b, s] as activations are: int32 [s, b], s shared over TP under SP."""
        if self.sequence_parallel:
            input_ids = input_ids.chunk(self.groups.tp.size(), dim=1)[self.groups.tp.rank()]
        ids = input_ids.t().to(torch.int32, memory_format=torch.contiguous_format)
        return ids.contiguous()  # which those that were int32 before need not be

    def start(self, input_ids: torch.Tensor) -> None:
        """First stage: keeps the micro-batch's ids for the outlet."""
        self._enter(self.local_ids(input_ids))

    def receive(self, latent: torch.Tensor) -> torch.Tensor:
        """Decodes what arrived at the inlet.

        Args:
            latent: Ẑ [s, b, width], not yet filled, which carries its payload.

        Returns:
            X̂ [s, b, d].
        """
        port = self.inlet
        assert port is not None
        payload = take_payload(latent, f"boundary {port.boundary}, forward")
        channel, tokens = port.forward_channel, latent.shape[:2]
        payloads = self._gathered(channel, payload)
        projector, basis = port.projector, self.anchor.basis
        if projector is None or basis is None:
            self._enter(channel.unpack(payloads, latent, self._runtime.guard))
            if projector is None:
                return latent
            return decode(latent, self._coordinates(), None, projector)
        bodies, ids = channel.check(payloads, tokens, self._runtime.guard)
        self._enter(ids)
        product = partial(channel.codec.product_from, bodies, channel.received - 1)
        return decode(latent, self._coordinates(), basis, projector, product)

    def send(self, hidden: torch.Tensor) -> torch.Tensor:
        """Encodes the stage's output for the outlet.

        Args:
            hidden: X [s, b, d].

        Returns:
            Z [s, b, width], which carries its payload.
        """
        port = self.outlet
        assert port is not None
        channel, tokens = port.forward_channel, hidden.shape[:2]
        projector, basis = port.projector, self.anchor.basis
        booked = self._runtime.ledger, tokens[0] * tokens[1] * self._token_bytes
        ids = self._micro_batch.ids
        if projector is not None and self.measure_energy:
            self.energy = energy_kept(hidden, self._coordinates(), basis, projector)
        if projector is not None and self.probe is not None:
            self.probe.observe(hidden, self._coordinates(), basis, projector.A)
        if self.moment is not None:
            self.moment.observe(hidden, self._coordinates(), basis)
        latent = hidden
        if projector is None or basis is None or channel.share != WHOLE:
            if projector is not None:
                latent = encode(hidden, self._coordinates(), basis, projector)
            payload = channel.pack(latent, ids, *booked)
        else:

            def fill(body: torch.Tensor) -> None:
                nonlocal latent
                product = partial(channel.codec.product_into, body, channel.sent)
                latent = encode(hidden, self._coordinates(), basis, projector, product)

            payload = channel.pack_body(fill, tokens, hidden.device, ids, *booked)
        setattr(latent, PAYLOAD, payload)
        self._enter(None)
        return latent

    def _coordinates(self) -> Coordinates | None:
        """Those of the micro-batch that is in this stage; its decoder and encoder share them."""
        anchor, current = self.anchor, self._micro_batch
        if current.coordinates is None and anchor.uses_ids:
            assert current.ids is not None
            predecessors = self._predecessors(current.ids) if anchor.uses_predecessors else None
            # Called, not asked: Megatron waits for gathered parameters in a hook of the module.
            current.coordinates = anchor(current.ids, predecessors)
        return current.coordinates

    def _predecessors(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids [s, b] one place earlier; the first ones' are at another rank if s is shared."""
        group = self.groups.tp
        if not self.sequence_parallel or group.size() == 1:
            return predecessors_of(ids)
        last = [torch.empty_like(ids[-1]) for _ in range(group.size())]
        torch.distributed.all_gather(last, ids[-1].contiguous(), group=group)
        return predecessors_of(ids, last[group.rank() - 1] if group.rank() else None)

    def _enter(self, ids: torch.Tensor | None) -> None:
        """Begins a micro-batch, whose ids are given, or ends the last one."""
        self._micro_batch.ids, self._micro_batch.coordinates = ids, None

    def pack_gradient(self, gradient: torch.Tensor) -> None:
        """Has dẐ [s, b, width], at the inlet, carry its payload."""
        port = self.inlet
        assert port is not None
        uncompressed = gradient.shape[0] * gradient.shape[1] * self._token_bytes
        payload = port.backward_channel.pack(gradient, None, self._runtime.ledger, uncompressed)
        setattr(gradient, PAYLOAD, payload)

    def unpack_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """dZ [s, b, width], at the outlet, of the payload that a tensor of that shape carries."""
        port = self.outlet
        assert port is not None
        payload = take_payload(gradient, f"boundary {port.boundary}, backward")
        received = torch.empty_like(gradient)
        payloads = self._gathered(port.backward_channel, payload)
        port.backward_channel.unpack(payloads, received, self._runtime.guard)
        return received

    def _gathered(self, channel: Channel, payload: torch.Tensor) -> list[torch.Tensor]:
        """The payloads of all tensor-parallel ranks that sent a part of this micro-batch."""
        count = channel.share.count
        if count == 1:
            return [payload]
        pieces = [torch.empty_like(payload) for _ in range(count)]
        torch.distributed.all_gather(pieces, payload, group=self.groups.tp)
        return pieces

    def states(self) -> dict[str, tuple[str, torch.Tensor]]:
        """What a checkpoint keeps: name in this module → (key, tensor).

        Keys name layers, not stages, so that another pipeline size finds the cuts that it shares.
        """
        states = {}
        for side, port in (("inlet", self.inlet), ("outlet", self.outlet)):
            if port is not None:
                for name, tensor in _tensors(port):
                    key = f"mapl.cut_{port.cut}.{name.removeprefix('projector.')}"
                    states[f"{side}.{name}"] = (key, tensor)
        stage = f"mapl.stage_{self.first_layer}_{self.last_layer}"
        for name, tensor in _tensors(self.anchor):
            states[f"anchor.{name}"] = (f"{stage}.{name}", tensor)
        return states

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's distributed checkpoint of the boundaries.

        What both sides hold is written by the one that sends activations, and a codec's state by
        the one that encodes.
        """
        dp_cp = (metadata or {}).get("dp_cp_group") or self.groups.dp_cp
        sharded = {}
        for name, (key, tensor) in self.states().items():
            replica = int(name.startswith("inlet.") != (".backward_codec." in name))
            if self.load_sources is not None:
                if name not in self.load_sources:
                    continue
                key = self.load_sources[name]
                replica += self.table_readers.get(key, 0)
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(
                key,
                tensor,
                replica_id=(replica, get_pg_rank(self.groups.tp), get_pg_rank(dp_cp)),
                # Another tensor parallel size may pad the vocabulary otherwise.
                allow_shape_mismatch=name.endswith(VOCABULARY_TABLES),
            )
        return sharded


def _place(runtime: MaplRuntime, config: Any, groups: Any) -> Place:
    """Where this process stands among the tensor-parallel ranks and replicas of its stage."""
    tp, replicas = groups.tp, groups.dp_cp
    split = runtime.split_ranks > 1
    differ = split or config.sequence_parallel  # do tensor-parallel ranks send other tokens?
    return Place(
        tokens=Share(tp.rank(), tp.size()) if split else WHOLE,
        step=Share(replicas.rank() * tp.size() + tp.rank(), replicas.size() * tp.size()),
        sender=replicas.rank() * tp.size() + tp.rank() if differ else replicas.rank(),
    )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.state_dict(keep_vars=True).items())


def attach(chunks: list[Any], runtime: MaplRuntime) -> list[Any]:
    """Megatron's pre-wrap hook: gives every chunk its boundaries before it is cast and wrapped."""
    runtime.stages.clear()
    for chunk in chunks:
        config, groups = chunk.config, chunk.pg_collection
        rank, vp_stage = groups.pp.rank(), chunk.vp_stage
        first = get_transformer_layer_offset(config, vp_stage, rank)
        stage = StageBoundaries(
            runtime,
            config,
            groups,
            stage=(vp_stage or 0) * runtime.pipeline_size + rank,
            layers=range(first, first + len(chunk.decoder.layers)),
            receives=not chunk.pre_process,
            sends=not chunk.post_process,
        )
        chunk.mapl = stage
        runtime.stages.append(stage)
        chunk.register_forward_pre_hook(_before_forward, with_kwargs=True)
        chunk.register_forward_hook(_after_forward, with_kwargs=True)
    return chunks


def input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The token ids among the arguments of a chunk's forward pass."""
    ids: torch.Tensor = args[0] if args else kwargs["input_ids"]
    return ids


def _before_forward(chunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if chunk.pre_process:
        chunk.mapl.start(input_ids(args, kwargs))
        return
    latent = chunk.decoder.input_tensor  # a leaf, from the communicator
    chunk.decoder.set_input_tensor(chunk.mapl.receive(latent))
    if latent.requires_grad and torch.is_grad_enabled():
        latent.register_post_accumulate_grad_hook(lambda z: chunk.mapl.pack_gradient(z.grad))


def _after_forward(chunk: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
    # Otherwise the decoder would keep X̂ of the last micro-batch until the next one.
    chunk.decoder.set_input_tensor(None)
    if chunk.post_process:
        return output
    latent: torch.Tensor = chunk.mapl.send(output)
    if latent.requires_grad:
        latent.register_hook(chunk.mapl.unpack_gradient)
    return latent
