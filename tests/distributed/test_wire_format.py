# SPDX-License-Identifier: Apache-2.0
"""docs/wire-format.md, who sends what when: a job's messages are read by the page alone."""

import numpy as np
import pytest

from cluster import Cluster, Result
from layouts import HIDDEN, LAYOUTS, SEQUENCE
from tests.unit import independent_reader as page

LAYOUT = LAYOUTS["pp2"]
RANK, VOCABULARY, STEPS, MICRO_BATCHES = 16, 256, 4, LAYOUT.micro_batches
TOKENS, RATE = 2 * SEQUENCE, 3e-3
GROUPS, ROUNDS, CODES, ENTRIES = 4, 2, 16, 3
#: Bytes of a body of rvq in fp32: entries, scales, codes of 4 bits.
RVQ = GROUPS * ROUNDS * ENTRIES * (RANK // GROUPS) * 4 + 2 * TOKENS + TOKENS * GROUPS * ROUNDS // 2
BODIES = {
    0: (TOKENS, RVQ),
    1: (0, 2 * TOKENS + TOKENS * RANK),  # int8, one group a token
    2: (0, HIDDEN * RANK * 4),
    3: (0, GROUPS * ROUNDS * CODES * (RANK // GROUPS) * 4),
}
FLAGS = (
    f"--mapl-rank {RANK} --mapl-forward-codec rvq --mapl-backward-codec int8 "
    f"--mapl-rvq-groups {GROUPS} --mapl-rvq-rounds {ROUNDS} --mapl-rvq-codes {CODES} "
    f"--mapl-rvq-sync-entries {ENTRIES} --mapl-rvq-order random --mapl-receive-ahead 0"
)


@pytest.fixture(scope="module")
def result(cluster: Cluster) -> Result:
    return cluster.run(2, LAYOUT.command(FLAGS), tamper="note_messages")


def payloads(result: Result, rank: int) -> list[page.Payload]:
    """What a process sent to the other stage, in order."""
    found = []
    for message in result.records[rank]["messages"]:
        if message[:4] == page.MAGIC:
            found.append(page.read(message, *_sizes(message)))
    return found


def _sizes(message: bytes) -> tuple[int, int, int]:
    count, size = BODIES[message[8]]
    return count, VOCABULARY, size


def test_who_sends_what_when(result: Result) -> None:
    first, second = payloads(result, 0), payloads(result, 1)
    assert {one.boundary for one in [*first, *second]} == {0}
    # After the micro-batches of each step the projector, then whole codebooks, after 1, 2, 4 steps.
    training = ([0] * MICRO_BATCHES + [2, 3]) * 2 + [0] * MICRO_BATCHES + [2]
    training += [0] * MICRO_BATCHES + [2, 3]
    directions = [one.direction for one in first]
    assert directions[: len(training)] == training
    assert {*directions[len(training) :]} == {0}, "evaluations go forward alone"
    assert [one.direction for one in second] == ([1] * MICRO_BATCHES + [2]) * STEPS
    for sent in (first, second):
        for direction in (0, 1, 2, 3):
            numbers = [one.sequence for one in sent if one.direction == direction]
            assert numbers == list(range(len(numbers)))


def test_the_receivers_codebook_follows_by_the_page(result: Result) -> None:
    """From the seed, by all entries and whole codebooks, to the bits that both sides hold."""
    seed = page.seed(1234, "codec FORWARD", 0)
    ours = page.Codebooks(GROUPS, ROUNDS, CODES, ENTRIES, 1, True, seed, RANK, "fp32")
    for one in payloads(result, 0):
        if one.direction == 0:
            latents = ours.decode([one.body], TOKENS, one.sequence)
            assert np.isfinite(latents).all()
        elif one.direction == 3:
            ours.table = page.numbers(one.body, "fp32").reshape(ours.table.shape).copy()
    for record in result.records:
        (held,) = [book for books in record["codebooks"].values() for book in books]
        assert np.array_equal(held.numpy(), ours.table)


def test_both_sides_step_by_the_sum_of_what_they_sent(result: Result) -> None:
    """The formulae of docs/method.md in float64, from the A that was drawn to the last one."""
    sent = [[one for one in payloads(result, rank) if one.direction == 2] for rank in (0, 1)]
    (start,) = result.records[0]["start"].values()
    (end,) = result.records[1]["projectors"].values()
    a, m = start["A"].double().numpy(), np.zeros((HIDDEN, RANK))
    for own, other in zip(*sent, strict=True):
        terms = [page.numbers(one.body, "fp32").astype(np.float64) for one in (own, other)]
        assert all(np.abs(term).max() > 0 for term in terms)
        g = (terms[0] + terms[1]).reshape(HIDDEN, RANK)
        inner = a.T @ g
        m = 0.9 * m + 0.1 * (g - a @ (inner + inner.T) / 2)
        a = msign(a - 0.1 * RATE * msign(m))
    moved = np.abs(a - start["A"].numpy()).max()
    # The job reckons in fp32, by PolarExpress.
    assert np.abs(end["momentum"].numpy() - m).max() < 1e-4 * np.abs(m).max()
    assert np.abs(end["A"].numpy() - a).max() < 1e-2 * moved


def msign(x: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(x, full_matrices=False)
    return left @ right
