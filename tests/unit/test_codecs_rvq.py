# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantisation: search, learning, and two copies that never differ."""

import dataclasses
import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mapl.codecs import CodecSettings, ResidualVQCodec, check_rvq, default_rvq_groups
from mapl.codecs import residual_search as search_module
from mapl.codecs.codebook_learning import initial_codebook, revived
from mapl.codecs.codebook_stream import CodebookStream
from mapl.codecs.residual_search import normalised, reconstructed, search

CPU = torch.device("cpu")
WIRES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> CodecSettings:
    return dataclasses.replace(
        CodecSettings(rvq_groups=2, rvq_rounds=2, rvq_codes=8, rvq_decay=0.9), **changes
    )


def build(config: CodecSettings, width: int = 6, wire=torch.float32, **more) -> ResidualVQCodec:
    return ResidualVQCodec(width, wire, config, seed=11, **more)


def rows_of(count: int, width: int, seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(count, width, generator=seeded(seed)).to(dtype)


def entries(codec: ResidualVQCodec) -> Tensor:
    """The master, in plain words."""
    return torch.where(
        codec.counts[..., None] > 0, codec.sums / codec.counts[..., None], codec.codebook
    )


def codes_of(codec: ResidualVQCodec, body: Tensor, rows: int) -> Tensor:
    """[n, G, R] of a body, by reading it as one long number."""
    number = int.from_bytes(bytes(codec.split(body, rows)["latents"].tolist()), "little")
    count = rows * codec.groups * codec.rounds
    bits = codec.code_bits
    codes = [(number >> (bits * place)) & (2**bits - 1) for place in range(count)]
    return torch.tensor(codes).view(rows, codec.groups, codec.rounds)


def train(codec: ResidualVQCodec, batches: list[Tensor], *, sync: bool = True) -> None:
    for number, batch in enumerate(batches):
        codec.encode(batch, number)
        codec.update(codec.statistics())
        if sync:
            codec.whole()


def relative_error(codec: ResidualVQCodec, rows: Tensor) -> float:
    out = torch.empty_like(rows)
    codec.decode_rows(codec.eval().encode(rows, 0), out)
    codec.train()
    return float((out - rows).norm() / rows.norm())


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "size"), [(2, 1), (8, 3), (64, 8), (256, 4)])
def test_each_round_takes_the_nearest_entry(codes, size):
    vectors = torch.randn(40, 3, size, generator=seeded())
    codebook = initial_codebook(3, 3, codes, size, torch.float32, seed=1)
    got = search(vectors, codebook)
    assert got.shape == (40, 3, 3)
    residual = vectors.double()
    clear = 0
    for number in range(3):
        # [n, G, K] distances one by one
        distances = (residual[:, :, None] - codebook[:, number].double()).norm(dim=3)
        best = distances.sort(dim=2).values
        taken = distances.gather(2, got[..., number, None])[..., 0]
        assert (taken <= best[..., 0] + 1e-5).all()
        sure = best[..., 1] - best[..., 0] > 1e-5
        assert torch.equal(distances.argmin(2)[sure], got[..., number][sure])
        clear += int(sure.sum())
        residual = residual - codebook[torch.arange(3), number, got[..., number]].double()
    assert clear > 0.95 * got.numel()
    expected = vectors.double() - residual
    torch.testing.assert_close(reconstructed(codebook, got).double(), expected)


def test_the_search_may_go_piece_by_piece(monkeypatch):
    vectors = torch.randn(50, 2, 4, generator=seeded())
    codebook = initial_codebook(2, 3, 16, 4, torch.float32, seed=1)
    at_once = search(vectors, codebook)
    for limit in (1, 4 * 2 * 16 * 7):
        monkeypatch.setattr(search_module, "_SCORE_BYTES", limit)
        assert torch.equal(search(vectors, codebook), at_once)


@pytest.mark.parametrize("wire", WIRES)
def test_the_body_to_the_letter(wire):
    """Decoded by the description alone: entries, scales, codes."""
    config = small(rvq_sync_entries=3)
    codec = build(config, wire=wire)
    train(codec, [rows_of(200, 6, seed) for seed in range(3)])
    rows = rows_of(9, 6, 7)
    rows[4] = 0
    number = 5
    body = codec.encode(rows, number)
    sizes = {"codebook": 2 * 2 * 3 * 3 * wire.itemsize, "scales": 18, "latents": 9 * 4 * 3 // 8 + 1}
    assert list(codec.parts(9).items()) == list(sizes.items())
    parts = codec.split(body, 9)
    # positions 15, 16 and 17 of the cycle over 8 codes
    carried = parts["codebook"].view(wire).view(2, 2, 3, 3)
    assert torch.equal(carried, entries(codec)[:, :, [7, 0, 1]].to(wire))
    scales = parts["scales"].view(torch.bfloat16)
    assert torch.equal(scales, rows.double().square().mean(1).sqrt().to(torch.bfloat16))
    codes = codes_of(codec, body, 9)
    out = torch.empty_like(rows)
    codec.decode_rows(body, out)
    for row in range(9):
        for group in range(2):
            total = sum(codec.codebook[group, r, codes[row, group, r]] for r in range(2))
            expected = total * scales[row].float()
            assert torch.equal(out[row, 3 * group : 3 * group + 3], expected)


def test_scales():
    rows = torch.tensor([[0, 0, 0, 0], [3, -3, 3, -3], [1e30, 1e30, 0, 0], [1e-42, 0, 0, 0.0]])
    bad = torch.tensor([[1, float("nan"), 1, 1], [float("inf"), 1, 1, 1]])
    scales, quotients = normalised(torch.cat([rows, bad]))
    expected = torch.tensor([0, 3, 1e30 / math.sqrt(2), 2.0**-126], dtype=torch.bfloat16)
    assert torch.equal(scales[:4], expected) and scales[4:].isnan().all()
    assert (quotients[[0, 4, 5]] == 0).all() and quotients.isfinite().all()
    assert quotients[1].tolist() == [1, -1, 1, -1]


# --- the start ------------------------------------------------------------------------------------


def test_the_first_codebook_fits_what_each_round_finds():
    codebook = initial_codebook(4, 4, 256, 8, torch.float32, seed=3)
    # 256 codes for 8 numbers: a bit for each, which leaves a quarter of the energy.
    energy = codebook.square().mean((0, 2, 3))
    expected = torch.tensor([0.75 / 4**number for number in range(4)])
    torch.testing.assert_close(energy, expected, rtol=0.05, atol=0)
    assert torch.equal(codebook, initial_codebook(4, 4, 256, 8, torch.float32, seed=3))
    assert not torch.equal(codebook, initial_codebook(4, 4, 256, 8, torch.float32, seed=4))
    assert relative_error(build(CodecSettings(), 64), rows_of(50, 64, 0)) < 0.25


@pytest.mark.parametrize("wire", WIRES)
def test_both_ends_start_alike_with_numbers_of_the_wire(wire):
    sender, receiver = (build(small(), wire=wire, sends=sends) for sends in (True, False))
    assert torch.equal(sender.codebook, receiver.codebook)
    assert torch.equal(sender.codebook.to(wire).float(), sender.codebook)
    train(sender, [rows_of(50, 6, 0)])
    assert torch.equal(sender.codebook.to(wire).float(), sender.codebook)
    assert torch.equal(sender.codebook.to(wire), entries(sender).to(wire))


# --- learning -------------------------------------------------------------------------------------


def test_learning_is_a_moving_average():
    """Against a loop over single vectors."""
    config = small(rvq_codes=4)
    codec, steps, decay = build(config), 5, 0.9
    shape = codec.codebook.shape
    counts = torch.zeros(shape[:3], dtype=torch.float64)
    sums = torch.zeros(shape, dtype=torch.float64)
    for step in range(steps):
        new_counts, new_sums = torch.zeros_like(counts), torch.zeros_like(sums)
        for number in range(2):
            rows = rows_of(150, 6, 10 * step + number)
            body = codec.encode(rows, number)
            codes = codes_of(codec, body, 150)
            scales = codec.split(body, 150)["scales"].view(torch.bfloat16).double()
            copy = codec.codebook.double()
            for row, vector in enumerate((rows.double() / scales[:, None]).view(150, 2, 3)):
                for group in range(2):
                    left = vector[group]
                    for place, code in enumerate(codes[row, group].tolist()):
                        new_counts[group, place, code] += 1
                        new_sums[group, place, code] += left
                        left = left - copy[group, place, code]
        keep = min(decay, 1 - 1 / (step + 1))
        counts = keep * counts + (1 - keep) * new_counts
        sums = keep * sums + (1 - keep) * new_sums
        assert (counts > 0.02 * counts.mean(-1, keepdim=True)).all(), "no code is revived here"
        codec.update(codec.statistics())
        codec.whole()
        torch.testing.assert_close(codec.counts.double(), counts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codec.sums.double(), sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(codec.codebook, entries(codec), rtol=0, atol=0)
    assert codec.updates == steps


def test_statistics_of_replicas_add_up():
    parts = [rows_of(60, 6, seed) for seed in range(3)]
    replicas = [build(small()) for _ in parts]
    for replica, part in zip(replicas, parts, strict=True):
        replica.encode(part, 0)
    total = torch.stack([replica.statistics() for replica in replicas]).sum(0)
    for replica in replicas:
        replica.statistics().copy_(total)  # what an all-reduce in place does
        replica.update(replica.statistics())
    alone = build(small())
    alone.encode(torch.cat(parts), 0)
    alone.update(alone.statistics())
    for replica in replicas:
        assert torch.equal(replica.sums, replicas[0].sums)
        assert torch.equal(replica.counts, alone.counts)
        torch.testing.assert_close(replica.sums, alone.sums)


def test_what_does_not_count():
    def state(codec):
        return [codec.counts.clone(), codec.sums.clone(), codec.codebook.clone()]

    codec = build(small())
    train(codec, [rows_of(100, 6, 0)])
    before = state(codec)
    codec.eval().encode(rows_of(100, 6, 1), 1)
    codec.train()
    bad = rows_of(4, 6, 2)
    bad[0, 0], bad[1, 5], bad[2], bad[3, 2] = float("nan"), float("inf"), 0, -float("inf")
    codec.encode(bad, 2)
    assert not codec.statistics().any()
    codec.update(codec.statistics())
    assert all(torch.equal(a, b) for a, b in zip(before, state(codec), strict=True))
    assert codec.updates == 2
    # One good row among the bad ones counts, once for each group and round.
    codec.encode(torch.cat([bad, rows_of(1, 6, 3)]), 3)
    assert float(codec.statistics()[: codec.counts.numel()].sum()) == 4
    codec.update(codec.statistics())
    assert not torch.equal(before[0], codec.counts) and not codec.statistics().any()
    assert codec.sums.isfinite().all()


def test_a_step_without_data_before_any_other_is_harmless():
    codec = build(small())
    start = codec.codebook.clone()
    codec.update(codec.statistics())
    assert codec.usage() == {"perplexity": 1.0, "dead": 0.0}
    codec.whole()
    assert torch.equal(codec.codebook, start)
    train(codec, [rows_of(100, 6, 0)])
    assert codec.codebook.isfinite().all() and codec.counts.sum() > 0


def test_revival_by_hand():
    counts = torch.tensor([[[100.0, 0, 40, 0.1, 60, 0, 0, 0]]])
    sums = counts[..., None] * torch.arange(8.0).view(1, 1, 8, 1) * torch.ones(2)
    new_counts, new_sums = revived(counts, sums, key=1)
    # Dead, least used first: 1, 5, 6, 7, of which four may be revived (j < 4). The most used are
    # 0, 4 and 2; the fourth, code 3, is dead itself and gives nothing.
    assert new_counts[0, 0].tolist() == [50, 50, 20, pytest.approx(0.1), 30, 30, 20, 0]
    means = new_sums / new_counts[..., None]
    for code, donor in {1: 0, 5: 4, 6: 2}.items():
        assert torch.equal(means[0, 0, donor], torch.full((2,), float(donor)))
        moved = (means[0, 0, code] - donor).abs()
        assert (moved > 0).all() and (moved <= 4 * 2**-6 + 1e-6).all()  # 4: the largest number
    assert torch.equal(new_sums[0, 0, [3, 7]], sums[0, 0, [3, 7]])
    assert torch.equal(revived(counts, sums, key=1)[1], new_sums)
    assert not torch.equal(revived(counts, sums, key=2)[1], new_sums)
    alive = torch.tensor([[[5.0, 1, 3, 2]]])
    unchanged = revived(alive, torch.ones(1, 1, 4, 2), key=1)
    assert torch.equal(unchanged[0], alive) and torch.equal(unchanged[1], torch.ones(1, 1, 4, 2))


def test_dead_codes_come_back_and_all_are_used_alike():
    config = small(rvq_rounds=1, rvq_codes=16)
    codec = build(config)
    codec.codebook[:, :, 1:] = 100.0  # all but one of them out of reach
    rows = [torch.rand(400, 6, generator=seeded(seed)) - 0.5 for seed in range(25)]
    train(codec, rows[:1])
    first = codec.usage()
    train(codec, rows[1:])
    last = codec.usage()
    assert first["dead"] > 0.8 and first["perplexity"] < 2.5
    assert last["dead"] == 0 and last["perplexity"] > 12


def test_usage_is_that_before_the_dead_codes_were_revived():
    codec = build(small(rvq_groups=1, rvq_rounds=1, rvq_codes=16))
    codec.codebook[:, :, 12:] = 100.0  # a quarter of them out of reach
    rows = torch.randn(4000, 6, generator=seeded(1))
    train(codec, [rows])
    assert codec.usage()["dead"] == 0.25
    assert (codec.counts > 0).all()


@pytest.mark.parametrize("sync", ["streaming", "full"])
def test_clusters_are_learned(sync):
    centres = torch.randn(12, 16, generator=seeded(5))
    config = CodecSettings(rvq_rounds=2, rvq_codes=32, rvq_sync=sync)
    sender, receiver = (build(config, 16, torch.bfloat16, sends=s) for s in (True, False))

    def batch(seed: int) -> Tensor:
        which = torch.randint(0, 12, (256,), generator=seeded(seed))
        scale = torch.rand(256, 1, generator=seeded(seed + 1)) + 0.5
        return (centres[which] + 0.02 * rows_of(256, 16, seed)) * scale

    assert relative_error(sender, batch(99)) > 0.3
    for step in range(20):
        rows, out = batch(step), torch.empty(256, 16)
        receiver.decode([sender.encode(rows, step)], out, step)
        sender.update(sender.statistics())
        receiver.update(None)
        if sender.whole_due():
            receiver.take_whole(sender.whole())
    error = (out - rows).norm() / rows.norm()
    assert error < 0.08, float(error)


# --- how entries cross ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["round-robin", "random"])
@pytest.mark.parametrize(("each", "shards"), [(1, 1), (3, 1), (2, 3), (8, 1), (5, 2)])
def test_the_cycle_visits_all_codes(order, each, shards):
    streams = [CodebookStream(16, each, shards, shard, order, seed=4) for shard in range(shards)]
    visited = []
    for number in range(48):
        due = streams[0].due(number, CPU)
        assert due.dtype == torch.int64 and len(due) == each * shards
        assert all(torch.equal(due, other.due(number, CPU)) for other in streams)
        assert torch.equal(torch.cat([due[stream.mine] for stream in streams]), due)
        visited += due.tolist()
    cycles = [visited[start : start + 16] for start in range(0, len(visited) - 15, 16)]
    assert all(sorted(cycle) == list(range(16)) for cycle in cycles)
    if order == "round-robin":
        assert visited == [place % 16 for place in range(len(visited))]
    else:
        assert len({tuple(cycle) for cycle in cycles}) == len(cycles)
        other = dataclasses.replace(streams[0], seed=5)
        assert other.due(0, CPU).tolist() != visited[: each * shards] or each * shards == 1


@pytest.mark.parametrize("order", ["round-robin", "random"])
@pytest.mark.parametrize(("each", "shards"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("wire", WIRES)
def test_a_cycle_of_payloads_carries_the_whole_codebook(order, each, shards, wire):
    config = small(rvq_order=order, rvq_sync_entries=each)
    senders = [build(config, wire=wire, shards=shards, shard=shard) for shard in range(shards)]
    receiver = build(config, wire=wire, shards=shards, sends=False)
    for sender in senders:
        train(sender, [rows_of(300, 6, 0)], sync=False)
        sender.codebook.copy_(receiver.codebook)  # as if the training had used no payloads
        sender.eval()
    expected = senders[0].whole_bytes(), entries(senders[0]).to(wire)
    for number in range(-(-8 // (each * shards))):
        assert not torch.equal(receiver.codebook.to(wire), expected[1])
        out = torch.empty(4 * shards, 6)
        receiver.decode([s.encode(rows_of(4, 6, 1), number) for s in senders], out, number)
    assert torch.equal(receiver.codebook.to(wire), expected[1])
    assert expected[0] == expected[1].numel() * wire.itemsize


@pytest.mark.parametrize(
    ("sync", "after"),
    [
        ("streaming", [1, 2, 4, 8, 16]),
        ("frozen", [1, 2, 4, 8, 16]),
        ("full", list(range(1, 21))),
    ],
)
@pytest.mark.parametrize("sends", [True, False])
def test_when_the_whole_codebook_crosses(sync, after, sends):
    codec = build(small(rvq_sync=sync), sends=sends)
    assert not codec.whole_due()
    due = []
    for step in range(1, 21):
        codec.update(codec.statistics() if sends else None)
        if codec.whole_due():
            due.append(step)
        again = build(small(rvq_sync=sync), sends=sends)
        again.load_state_dict(codec.state_dict())
        assert again.whole_due() == codec.whole_due()
        again.update(again.statistics() if sends else None)
        assert again.updates == step + 1
    assert due == after
    assert ("codebook" in codec.parts(3)) == (sync == "streaming")


class Link:
    """Both ends of one direction, and what is under way between them."""

    def __init__(self, config: CodecSettings, shards: int, wire: torch.dtype) -> None:
        self.config, self.shards, self.wire = config, shards, wire
        self.senders = [self._end(shard=shard) for shard in range(shards)]
        self.receiver = self._end(sends=False)
        self.under_way: deque[tuple[int, list[Tensor], Tensor]] = deque()
        self.sent, self.draws, self.training = 0, 0, True

    def _end(self, **more) -> ResidualVQCodec:
        return build(self.config, wire=self.wire, shards=self.shards, **more)

    def _rows(self) -> Tensor:
        self.draws += 1
        return (rows_of(3, 6, self.draws) * 2.0 ** (self.draws % 5)).to(self.wire)

    def send(self, spoil: float | None = None) -> None:
        bodies, expected = [], []
        for sender in self.senders:
            rows = self._rows()
            if spoil is not None:
                rows[self.draws % 3 :, 1] = spoil
            bodies.append(sender.encode(rows, self.sent))
        # Decoded with the sender's copy as it stands now, before later payloads change it.
        for sender, body in zip(self.senders, bodies, strict=True):
            out = torch.empty(3, 6, dtype=self.wire)
            sender.decode_rows(body, out)
            expected.append(out)
        self.under_way.append((self.sent, bodies, torch.cat(expected)))
        self.sent += 1

    def receive(self) -> None:
        if self.under_way:
            number, bodies, expected = self.under_way.popleft()
            out = torch.full_like(expected, 7.0)
            self.receiver.decode(bodies, out, number)
            assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))

    def step(self) -> None:
        self.drain()
        total = torch.stack([sender.statistics() for sender in self.senders]).sum(0)
        for sender in self.senders:
            sender.statistics().copy_(total)
            sender.update(sender.statistics())
        self.receiver.update(None)
        assert {sender.whole_due() for sender in self.senders} == {self.receiver.whole_due()}
        if self.receiver.whole_due():
            data = [sender.whole() for sender in self.senders]
            assert all(torch.equal(other, data[0]) for other in data)
            self.receiver.take_whole(data[-1])
        self.check()

    def drain(self) -> None:
        while self.under_way:
            self.receive()
        self.check()

    def check(self) -> None:
        for sender in self.senders:
            assert torch.equal(sender.codebook, self.receiver.codebook)
            assert torch.equal(sender.updates, self.receiver.updates)
        assert self.receiver.codebook.isfinite().all()

    def reload(self, *, senders: bool, receiver: bool) -> None:
        """As a restart from a checkpoint: built anew, then loaded; statistics are lost."""

        def again(old: ResidualVQCodec, **more) -> ResidualVQCodec:
            new = self._end(**more).train(old.training)
            new.load_state_dict({name: value.clone() for name, value in old.state_dict().items()})
            return new

        if senders:
            self.senders = [again(old, shard=i) for i, old in enumerate(self.senders)]
        if receiver:
            self.receiver = again(self.receiver, sends=False)

    def switch(self) -> None:
        """From training to evaluation, or back."""
        self.training = not self.training
        for codec in (*self.senders, self.receiver):
            codec.train(self.training)


#: Several of some, so that runs with many payloads and steps are likely.
ACTIONS = {
    "send": Link.send,
    "send more": Link.send,
    "receive": Link.receive,
    "step": Link.step,
    "another step": Link.step,
    "skipped step": lambda link: (link.drain(), link.send(float("nan")), link.step()),
    "send inf": lambda link: link.send(float("inf")),
    "send zeros": lambda link: link.send(0.0),
    "train or evaluate": Link.switch,
    "load sender": lambda link: link.reload(senders=True, receiver=False),
    "load receiver": lambda link: link.reload(senders=False, receiver=True),
    "load both": lambda link: link.reload(senders=True, receiver=True),
}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    ("sync", "order"),
    [
        ("streaming", "round-robin"),
        ("streaming", "random"),
        ("full", "round-robin"),
        ("frozen", "round-robin"),
    ],
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=5, max_size=40),
    wire=st.sampled_from(WIRES),
    each=st.integers(1, 2),
    codes=st.sampled_from([8, 16]),
)
def test_both_copies_are_equal_whatever_happens(sync, order, shards, actions, wire, each, codes):
    each = each if sync == "streaming" else 1
    config = small(rvq_sync=sync, rvq_order=order, rvq_sync_entries=each, rvq_codes=codes)
    link = Link(config, shards, wire)
    for action in actions:
        ACTIONS[action](link)
        assert len({s.codebook.double().sum().item() for s in link.senders}) == 1
    link.drain()
    link.step()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_pipeline_with_payloads_under_way(depth):
    """One forward, one backward, after `depth` payloads of warm-up; 20 steps, so all updates."""
    link = Link(small(rvq_order="random", rvq_sync_entries=2), 2, torch.bfloat16)
    moved = []
    for _ in range(20):
        before = link.receiver.codebook.clone()
        for _ in range(depth):
            link.send()
        for _ in range(6 - depth):
            link.send()
            assert len(link.under_way) == depth + 1
            link.receive()
        link.step()
        moved.append(not torch.equal(before, link.receiver.codebook))
    # A step after the whole codebook has crossed first repeats it, and ends without it.
    assert moved == [step not in (3, 5, 9, 17) for step in range(1, 21)]


# --- state and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
    ],
)
def test_a_cast_of_the_model_changes_no_bit(sends, cast):
    codec = build(small(), sends=sends)
    if sends:
        train(codec, [rows_of(50, 6, 0)])
        codec.encode(rows_of(50, 6, 1), 1)
    before = {name: value.clone() for name, value in codec.named_buffers()}
    assert cast(nn.ModuleList([codec]))[0] is codec
    for name, value in codec.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    saved = {"codebook", "updates"} | ({"counts", "sums"} if sends else set())
    assert set(codec.state_dict()) == saved


def test_each_end_does_its_part_alone():
    sender, receiver = (build(small(), sends=sends) for sends in (True, False))
    rows = rows_of(2, 6, 0)
    body = sender.encode(rows, 0)
    with pytest.raises(RuntimeError, match="sending end of a codebook cannot decode"):
        sender.decode([body], rows, 0)
    for call in (
        lambda: receiver.encode(rows, 0),
        receiver.statistics,
        receiver.whole,
        receiver.usage,
    ):
        with pytest.raises(RuntimeError, match="receiving end of a codebook cannot"):
            call()
    for codec, wrong in ((sender, None), (receiver, sender.statistics())):
        with pytest.raises(ValueError, match="for the sending end"):
            codec.update(wrong)
    with pytest.raises(ValueError, match="2 bodies arrived from 1 sending"):
        receiver.decode([body, body], rows, 0)


@pytest.mark.parametrize(
    ("width", "groups"),
    [(1, 1), (7, 1), (8, 1), (28, 2), (64, 8), (65, 5), (96, 12), (127, 1), (128, 16)],
)
def test_default_groups(width, groups):
    assert default_rvq_groups(width) == groups == build(CodecSettings(), width).groups


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rvq_groups": 0}, "--mapl-rvq-groups 0 must be at least 1"),
        ({"rvq_groups": 4}, "--mapl-rvq-groups 4 does not divide the 6 numbers.*such as 1"),
        ({"rvq_rounds": 0}, "--mapl-rvq-rounds 0 must"),
        ({"rvq_codes": 1}, "--mapl-rvq-codes 1 must be a power of two from 2 to 65536"),
        ({"rvq_codes": 12}, "--mapl-rvq-codes 12 must"),
        ({"rvq_codes": 131072}, "--mapl-rvq-codes 131072 must"),
        ({"rvq_decay": 1.0}, "--mapl-rvq-decay 1.0 must be at least 0 and below 1"),
        ({"rvq_decay": -0.1}, "--mapl-rvq-decay -0.1 must"),
        ({"rvq_decay": math.nan}, "--mapl-rvq-decay nan must"),
        ({"rvq_sync": "often"}, "--mapl-rvq-sync often is unknown; use one of streaming, full"),
        ({"rvq_order": "up"}, "--mapl-rvq-order up is unknown; use one of round-robin, random"),
        ({"rvq_sync_entries": 0}, "--mapl-rvq-sync-entries 0 must be from 1 to"),
        ({"rvq_sync_entries": 9}, "--mapl-rvq-sync-entries 9 must be from 1 to .* 8"),
        ({"rvq_sync_entries": 3}, "sync-entries 3: 3 processes .* the 8 codes .* at most 2"),
        ({"rvq_codes": 2}, "sync-entries 1: 3 processes .* use --mapl-rvq-codes 4 or more"),
        ({"rvq_sync": "full", "rvq_sync_entries": 2}, "sync-entries 2 has no effect.* full"),
        ({"rvq_sync": "frozen", "rvq_order": "random"}, "order random has no effect.* frozen"),
    ],
)
def test_errors_name_flag_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        build(small(**changes), shards=3)
    with pytest.raises(ValueError, match=message):
        check_rvq(small(**changes), width=6, shards=3)


def test_settings_that_fit():
    check_rvq(CodecSettings())
    for codes in (2, 65536):
        check_rvq(small(rvq_codes=codes, rvq_decay=0.0), width=6)
    codec = build(small(rvq_codes=2, rvq_decay=0.0), width=6)
    train(codec, [rows_of(20, 6, seed) for seed in range(3)])
    assert codec.parts(3)["latents"] == 2  # 12 bits
