# SPDX-License-Identifier: Apache-2.0
"""Notes what `--mapl-projector subspace` promises: activations on both sides, weights each step."""

from typing import Any

import torch


def install(record: dict[str, Any]) -> None:
    """Has this process note, in a job with a projector and a static anchor:

    - record["sent"][boundary]: (X, F[t]) of each micro-batch;
    - record["received"][boundary]: X̂ of each;
    - record["outside"]: for each step, name → ‖W − U Uᵀ W‖/‖W‖ of the model's copy and of the one
      that the optimizer steps. Names are "embedding" and (projection, number of the layer from 1).
    """
    from megatron.mapl import optimizer, pretraining

    record |= {"sent": {}, "received": {}, "outside": []}
    _note_crossings(record)
    held: list[Any] = []
    for module in (pretraining.model, pretraining.virtual_stages):
        module.attach = _keeping(module.attach, held)  # type: ignore[attr-defined]
    step = optimizer._WithProjectors.step_with_ready_grads

    def noting_step(self: Any) -> bool:
        success = step(self)
        record["outside"].append(_outside(held, self._mapl.projectors()[0].A))
        return success

    optimizer._WithProjectors.step_with_ready_grads = noting_step  # type: ignore[method-assign]


def _note_crossings(record: dict[str, Any]) -> None:
    from megatron.mapl.model import StageBoundaries

    send, receive = StageBoundaries.send, StageBoundaries.receive

    def noting_send(self: StageBoundaries, hidden: torch.Tensor) -> torch.Tensor:
        assert self.outlet is not None and self._micro_batch.ids is not None
        anchor = self.anchor.table[self._micro_batch.ids.long()]
        noted = hidden.detach().double(), anchor.double()
        record["sent"].setdefault(self.outlet.boundary, []).append(noted)
        return send(self, hidden)

    def noting_receive(self: StageBoundaries, latent: torch.Tensor) -> torch.Tensor:
        decoded = receive(self, latent)
        assert self.inlet is not None
        noted = decoded.detach().double()
        record["received"].setdefault(self.inlet.boundary, []).append(noted)
        return decoded

    StageBoundaries.send = noting_send  # type: ignore[method-assign]
    StageBoundaries.receive = noting_receive  # type: ignore[method-assign]


def _keeping(attach: Any, held: list[Any]) -> Any:
    def keep(chunks: Any, runtime: Any) -> Any:
        held[:] = chunks
        return attach(chunks, runtime)

    return keep


def _outside(chunks: list[Any], a: torch.Tensor) -> dict[Any, tuple[float, float]]:
    noted = {}
    for chunk in chunks:
        if chunk.pre_process:
            noted["embedding"] = _ratios(chunk.embedding.word_embeddings.weight, a, rows=True)
        for layer in chunk.decoder.layers:
            for name, projection in (
                ("attention", layer.self_attention.linear_proj),
                ("mlp", layer.mlp.linear_fc2),
            ):
                noted[name, layer.layer_number] = _ratios(projection.weight, a, rows=False)
    return noted


def _ratios(weight: Any, a: torch.Tensor, *, rows: bool) -> tuple[float, float]:
    main = getattr(weight, "main_param", None)
    copies = weight, weight if main is None else main.view_as(weight)
    u = a.detach().double()
    ratios = []
    for copy in copies:
        columns = copy.detach().double()
        columns = columns.mT if rows else columns
        ratios.append(float((columns - u @ (u.mT @ columns)).norm() / columns.norm()))
    return ratios[0], ratios[1]
