# SPDX-License-Identifier: Apache-2.0
"""What boundaries add to the device memory of one pipeline process, at most.

In bytes, with d, r, r_a and V as everywhere, N tokens in a micro-batch, w bytes a number of the
model's dtype, and F micro-batches between their forward and their backward pass (counted once for
each chunk of the model that they passed):

    projectors    12·d·r      a side of a boundary: A, momentum and gradient, fp32
    operands      ((d + r_a)·r)·w + 4·r_a·r    a chunk that sends: [A; −PA], the sum before Pᵀ
                  (r + r_a)·d·w                a chunk that receives: [Aᵀ; P]
    anchors       (V + m)·r_a·o + 4·r_a·d    a chunk: the tables, o bytes with all of their state
                                       (m rows of bigrams, or 0); the basis
                  (V + m)·r_a·w        once: what stands for the tables' gradients in autograd
                  4·(V + m)·r_a        once under sequence parallelism: Megatron's copy of gradients
                                       that are summed over tensor-parallel ranks, each of which
                                       holds the whole table
    coordinates   F·N·(r_a·w + 24)     a chunk with a bigram anchor: C, and the order of the bigrams
    activations   F·N·d·w     a chunk that sends: X, which dA needs; plain Megatron frees it
    latents       F·N·r·w     a chunk that receives: Ẑ, which dA needs
    ids           F·N·20      a chunk: the ids, and their order for the table's gradient, at most
    payloads      (2a + 2)·(N·(r·w + 4) + 64)    a side: under way in both directions, a ahead
    work          N·((r + 3·r_a)·w + 16·r) + 8·d·r    of the one micro-batch that is at work; its
                  encoder's dC waits there for its decoder's

Codecs with fewer bits only make payloads smaller. What a residual vector quantiser needs for its
search and its codebooks is not in it, nor what the projector's step needs, which comes when the
activations are gone. Over gloo each payload under way also takes up to twice its size of pinned
host memory, which torch keeps.
"""

from dataclasses import dataclass

#: Bytes of a parameter in half precision: itself 2, gradient 4, master copy 4, Adam's moments 8.
MIXED_PRECISION_ADAM = 18


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of the pipeline.

    Attributes:
        tokens: N, of a micro-batch.
        sending, receiving: its chunks of the model that send to, and receive from, a boundary.
        in_flight: F.
        ahead: a, payloads of each direction that are received or sent ahead.
        itemsize: w.
        buckets: m, 0 without a bigram anchor.
        sequence_parallel: over more than one tensor-parallel rank.
        table_bytes: o, of a parameter with all that belongs to it.
    """

    hidden_size: int
    rank: int
    anchor_rank: int
    vocab_size: int
    tokens: int
    sending: int
    receiving: int
    in_flight: int
    ahead: int = 2
    itemsize: int = 2
    buckets: int = 0
    sequence_parallel: bool = False
    table_bytes: int = MIXED_PRECISION_ADAM


def added(stage: Stage) -> dict[str, int]:
    """Bytes by what they are for."""
    d, r, k, n = stage.hidden_size, stage.rank, stage.anchor_rank, stage.tokens
    sides, chunks = stage.sending + stage.receiving, max(stage.sending, stage.receiving)
    kept = stage.in_flight * n
    sends, receives = stage.sending > 0, stage.receiving > 0
    table = (stage.vocab_size + stage.buckets) * k
    return {
        "projectors": sides * 12 * d * r,
        "operands": stage.sending * ((d + k) * r * stage.itemsize + 4 * k * r)
        + stage.receiving * (r + k) * d * stage.itemsize,
        "anchors": chunks * (table * stage.table_bytes + 4 * k * d)
        + table * (stage.itemsize + 4 * stage.sequence_parallel),
        "coordinates": (stage.buckets > 0) * kept * (k * stage.itemsize + 24),
        "activations": sends * kept * d * stage.itemsize,
        "latents": receives * kept * r * stage.itemsize,
        "ids": kept * 20,
        "payloads": sides * (2 * stage.ahead + 2) * (n * (r * stage.itemsize + 4) + 64),
        "work": n * ((r + 3 * k) * stage.itemsize + 16 * r) + 8 * d * r,
    }


def in_flight(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> int:
    """F of Megatron's schedules with one forward and one backward pass in turn.

    Args:
        stages: P, processes.
        stage: p, from 0.
        micro_batches: M, of a step.
        chunks: v, virtual stages in each process.

    Returns:
        P − p, or with virtual stages 2(P − p − 1) + (v − 1)P + 1; never more than v·M.
    """
    if chunks == 1:
        return min(stages - stage, micro_batches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * micro_batches)
