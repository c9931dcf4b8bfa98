# SPDX-License-Identifier: Apache-2.0
"""The simulated pipeline: closed forms, floors, and small cases worked out by hand."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from event_messages import WORD_BYTES, Process, Way
from event_simulation import Simulation
from pipeline_simulation import BACK, ONWARD, simulate
from pipeline_step import Boundary, Chunk, Direction, Link, Step

INF = math.inf
FREE = Direction(INF, 0.0)
NOTHING = Boundary(0, 0)


def step(
    processes: int,
    micro_batches: int,
    *,
    virtual: int = 1,
    forward: float = 1.0,
    backward: float = 2.0,
    boundary: Boundary = NOTHING,
    way: Direction = FREE,
    ahead: int = 0,
    devices: float | None = None,
    backend: str = "gloo",
) -> Step:
    """Equal stages, boundaries and links; `forward` and `backward` are of all chunks together."""
    chunks = processes * virtual
    return Step(
        processes=processes,
        chunks=(Chunk(forward / virtual, backward / virtual),) * chunks,
        boundaries=(boundary,) * (chunks - 1),
        links=(Link(way, way),) * (processes if virtual > 1 and processes > 2 else processes - 1),
        micro_batches=micro_batches,
        receive_ahead=ahead,
        devices=devices,
        backend=backend,
    )


@st.composite
def steps(draw: st.DrawFn, *, free: bool) -> Step:
    processes = draw(st.integers(2, 6))
    virtual = draw(st.integers(1, 3))
    micro_batches = draw(st.integers(1, 9)) * (processes if virtual > 1 else 1)
    ahead = draw(st.integers(0, 3)) if virtual == 1 else 0
    backend = draw(st.sampled_from(["gloo", "nccl"]))
    seconds = st.floats(0.01, 3.0)
    size = st.integers(1, 1000)
    way = FREE
    if not free:
        way = Direction(draw(st.floats(100.0, 1e5)), draw(st.floats(0.0, 1.0)))
    boundary = Boundary(draw(size), draw(size), draw(size), draw(size))
    return step(
        processes, micro_batches, virtual=virtual, forward=draw(seconds), backward=draw(seconds),
        boundary=boundary, way=way, ahead=ahead, backend=backend,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(steps(free=True))
def test_links_that_cost_nothing_leave_the_bubble_of_the_schedule(one: Step) -> None:
    """(P − 1 + m) (t_f + t_b), and with V chunks ((P − 1) / V + m) (t_f + t_b)."""
    virtual, m = one.virtual_stages, one.micro_batches
    work = virtual * (one.chunks[0].forward + one.chunks[0].backward)
    course = simulate(one)
    assert course.seconds == pytest.approx(((one.processes - 1) / virtual + m) * work)
    assert course.bubble == pytest.approx((one.processes - 1) / (m * virtual))


@settings(deadline=None, max_examples=100)
@given(steps(free=False))
def test_no_step_is_shorter_than_its_parts(one: Step) -> None:
    """Each process computes, and each way of a link carries all bytes, within the step."""
    course = simulate(one)
    free = dataclasses.replace(one, links=tuple(Link(FREE, FREE) for _ in one.links))
    assert course.seconds >= simulate(free).seconds * (1 - 1e-9)
    assert course.seconds >= max(course.busy.values()) * (1 - 1e-9)
    carried: dict[tuple[int, str], float] = {}
    for number, boundary in enumerate(one.boundaries):
        link = number % one.processes
        m = one.micro_batches
        for name, size in (
            (ONWARD, m * boundary.forward + boundary.step_onward),
            (BACK, m * boundary.backward + boundary.step_back),
        ):
            if one.processes == 2 and link == 1:  # the same link, the other way round
                key = (0, BACK if name == ONWARD else ONWARD)
            else:
                key = (link, name)
            bits = one.links[0].onward.bits_a_second  # all are alike
            carried[key] = carried.get(key, 0.0) + 8 * size / bits
    for key, seconds in carried.items():
        assert course.busy[key] >= seconds * (1 - 1e-9)
        if one.backend == "nccl":  # whose words take no room
            assert course.busy[key] == pytest.approx(seconds)


@settings(deadline=None, max_examples=40)
@given(steps(free=False), st.floats(1.1, 8.0))
def test_a_faster_link_and_a_faster_device_make_no_step_longer_with_nccl(
    one: Step, factor: float
) -> None:
    one = dataclasses.replace(one, backend="nccl", receive_ahead=0)
    side = one.links[0].onward
    faster = Direction(side.bits_a_second * factor, side.latency / factor)
    links = (Link(faster, faster),) * len(one.links)
    base = simulate(one).seconds
    assert simulate(dataclasses.replace(one, links=links)).seconds <= base * (1 + 1e-9)


def test_one_micro_batch_over_one_link() -> None:
    """t_f, the word behind nothing, the payload, latency, and the same back."""
    way = Direction(8.0, 0.5)  # a byte a second
    course = simulate(step(2, 1, boundary=Boundary(10, 4), way=way, backend="nccl"))
    # The receives have been posted long before, so no word is waited for.
    assert course.seconds == pytest.approx(1 + 10 + 0.5 + 1 + 2 + 4 + 0.5 + 2)


def test_what_is_exchanged_once_a_step_comes_after_it() -> None:
    way = Direction(8.0, 0.5)
    without = simulate(step(2, 1, boundary=Boundary(1, 1), way=way, backend="nccl")).seconds
    boundary = Boundary(1, 1, 20, 20)
    once = simulate(step(2, 1, boundary=boundary, way=way, backend="nccl")).seconds
    # Stage 1 is done sooner and waits; the last word is stage 0's, a latency before its bytes.
    assert once == pytest.approx(without + 0.5 + 20 + 0.5)


def test_a_receiver_that_waits_late_is_heard_a_latency_later() -> None:
    forth, back = Way(1.0, 2.0), Way(1.0, 3.0)
    simulation = Simulation({"c": (forth, back)}, 2, words_queue=False)

    def sender() -> Process:
        yield simulation.send("c", 5)

    def receiver() -> Process:
        yield 10.0
        yield simulation.receive("c")

    assert simulation.run([sender(), receiver()]) == [10 + 3 + 5, 10 + 3 + 5 + 2]


def test_with_gloo_a_word_waits_behind_what_is_on_its_way() -> None:
    forth, back = Way(1.0, 0.0), Way(1.0, 0.0)
    ways = {"there": (forth, back), "back": (back, forth)}
    simulation = Simulation(ways, 2, words_queue=True)

    def one() -> Process:
        wanted = simulation.receive("back")
        yield 1000.0  # its word has arrived by now
        yield wanted

    def other() -> Process:
        sent = simulation.send("back", 500)  # starts after the word of the other, 64 bytes
        yield 100.0
        received = simulation.receive("there")  # behind the 500
        yield sent
        yield received

    def third() -> Process:
        yield simulation.send("there", 7)

    ends = simulation.run([one(), other(), third()])
    assert ends[2] == pytest.approx(WORD_BYTES + 500 + WORD_BYTES + 7)


def test_two_processes_share_one_device_evenly() -> None:
    simulation = Simulation({}, 1, words_queue=False)

    def busy(seconds: float) -> Process:
        yield seconds

    # Both at half speed until the short one is done.
    assert simulation.run([busy(1.0), busy(3.0)]) == [2.0, 4.0]


def test_a_pipeline_on_one_device_takes_all_of_its_work() -> None:
    course = simulate(step(4, 8, devices=1))
    assert course.seconds == pytest.approx(4 * 8 * 3)
    assert course.bubble == pytest.approx(0)


def test_messages_of_one_way_follow_each_other() -> None:
    way = Way(1.0, 0.0)
    simulation = Simulation({c: (way, Way(0, 0)) for c in "ab"}, 2, words_queue=False)

    def end(channel: str) -> Process:
        sent, received = simulation.send(channel, 5), simulation.receive(channel)
        yield sent
        yield received

    assert simulation.run([end("a"), end("b")]) == [5.0, 10.0]
    assert way.busy == 10.0


def test_receiving_ahead_hides_transfers() -> None:
    way = Direction(8.0, 0.0)
    seconds = [
        simulate(step(4, 8, boundary=Boundary(1, 1), way=way, ahead=ahead)).seconds
        for ahead in (0, 2)
    ]
    assert seconds[1] < 0.9 * seconds[0]


def test_a_message_that_nobody_sends_is_an_error() -> None:
    simulation = Simulation({"c": (Way(0, 0), Way(0, 0))}, 1, words_queue=False)

    def waits() -> Process:
        yield simulation.receive("c")

    with pytest.raises(RuntimeError, match="nobody sends"):
        simulation.run([waits()])
