# SPDX-License-Identifier: Apache-2.0
"""Emulated links: the model with a clock that the test turns, then threads, then processes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mapl.link import DelayedSender, EmulatedLink, LinkClock, sleep_until

REPO = Path(__file__).resolve().parents[2]
BYTES = 125_000  # one second at 1 Mbit/s


class Now:
    """A clock that stands still unless it is set."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def now():
    return Now()


def link(now, bandwidth=1.0, latency=250.0, clock=None):
    return EmulatedLink(bandwidth, latency, clock or LinkClock(), now)


def test_a_message_takes_its_bytes_over_the_bandwidth_and_the_latency(now):
    assert link(now).schedule(BYTES) == (1001.0, 1001.25)
    assert link(now, bandwidth=20).schedule(BYTES) == (1000.05, 1000.3)
    assert link(now, latency=0).schedule(BYTES) == (1001.0, 1001.0)
    assert link(now).seconds(BYTES // 2) == 0.5


def test_messages_follow_one_another_and_latency_is_not_added_up(now):
    slow = link(now)
    assert [slow.schedule(BYTES) for _ in range(3)] == [
        (1001.0, 1001.25),
        (1002.0, 1002.25),
        (1003.0, 1003.25),
    ]


def test_an_idle_link_saves_nothing_up(now):
    slow = link(now)
    slow.schedule(BYTES)
    now.time = 1000.5
    assert slow.schedule(BYTES) == (1002.0, 1002.25)
    now.time = 1010.0
    assert slow.schedule(BYTES) == (1011.0, 1011.25)


def test_without_a_bandwidth_there_is_the_latency_alone(now):
    fast = link(now, bandwidth=None)
    assert [fast.schedule(BYTES) for _ in range(2)] == [(1000.0, 1000.25)] * 2


def test_who_shares_a_link_shares_its_bandwidth(now):
    path = LinkClock.create_file()
    one, other = (link(now, clock=LinkClock(path)) for _ in range(2))
    Path(path).unlink()
    assert one.schedule(BYTES) == (1001.0, 1001.25)
    assert other.schedule(BYTES) == (1002.0, 1002.25)
    now.time = 1001.5
    assert one.schedule(BYTES) == (1003.0, 1003.25)


def test_links_of_their_own_share_nothing(now):
    assert link(now).schedule(BYTES) == link(now).schedule(BYTES)


RESERVE = "import sys; from mapl.link import LinkClock; clock = LinkClock(sys.argv[1])\n"
RESERVE += "for _ in range(5000): clock.reserve(1.0, 0.0)"


def test_no_reservation_of_a_process_is_lost():
    path = LinkClock.create_file()
    command = [sys.executable, "-c", RESERVE, path]
    processes = [subprocess.Popen(command, cwd=REPO) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    clock = LinkClock(path)
    Path(path).unlink()
    assert clock.reserve(0.0, 0.0) == (15000.0, 15000.0)
    clock.close()
    clock.close()


def test_no_reservation_of_a_thread_is_lost():
    clock = LinkClock()

    def reserve():
        for _ in range(2000):
            clock.reserve(1.0, 0.0)

    threads = [threading.Thread(target=reserve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.reserve(0.0, 0.0) == (8000.0, 8000.0)


@pytest.mark.parametrize("bandwidth", [0, -5, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_is_refused(bandwidth):
    with pytest.raises(ValueError, match=rf"bandwidth .* {bandwidth} Mbit/s"):
        EmulatedLink(bandwidth, 0, LinkClock())


@pytest.mark.parametrize("latency", [-1, float("nan"), float("inf")])
def test_a_latency_that_is_none_is_refused(latency):
    with pytest.raises(ValueError, match=rf"latency .* {latency} ms"):
        EmulatedLink(1, latency, LinkClock())


class Transfer:
    """What a transfer does; `failure` is what its `wait()` raises."""

    def __init__(self, failure=None, done=None):
        self.failure, self.done = failure, done

    def wait(self):
        if self.done is not None:
            self.done.wait()
        if self.failure is not None:
            raise self.failure


def test_transfers_start_in_order_and_none_before_its_time():
    sender = DelayedSender("a link")
    started = []
    begin = time.monotonic()
    # The third is due before the second: it waits for it.
    for number, delay in enumerate((0.01, 0.04, 0.02)):

        def start(number=number):
            started.append((number, time.monotonic()))
            return Transfer()

        sender.submit(begin + delay, start)
    assert time.monotonic() < begin + 5, "nothing of this waits"
    sender.close()
    assert [number for number, _ in started] == [0, 1, 2]
    for (_, when), due in zip(started, (0.01, 0.04, 0.04), strict=True):
        assert when >= begin + due


def test_a_transfer_under_way_holds_up_no_other():
    sender = DelayedSender("a link")
    slow = threading.Event()
    sender.submit(0.0, lambda: Transfer(done=slow))
    sender.wait_for_start(sender.submit(0.0, Transfer))
    slow.set()
    sender.close()


def test_close_waits_for_what_is_due_and_for_what_is_under_way():
    sender = DelayedSender("a link")
    done = []

    class Slow(Transfer):
        def wait(self):
            time.sleep(0.02)
            done.append(True)

    for _ in range(3):
        sender.submit(time.monotonic() + 0.02, Slow)
    sender.close()
    assert len(done) == 3
    sender.close()


def fail():
    raise OSError("no such host")


@pytest.mark.parametrize(
    "start", [fail, lambda: Transfer(OSError("no such host"))], ids=["at start", "under way"]
)
def test_a_failure_reaches_every_later_call_and_nothing_more_is_sent(start):
    sender = DelayedSender("a link")
    sender.submit(0.0, start)
    deadline = time.monotonic() + 60
    with pytest.raises(RuntimeError, match="a link: sending failed: no such host") as raised:
        while time.monotonic() < deadline:
            sender.raise_if_failed()
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="no such host"):
        sender.submit(0.0, lambda: pytest.fail("sent after a failure"))
    with pytest.raises(RuntimeError, match="no such host"):
        sender.close()


def test_a_failure_reaches_who_waits_for_its_start_and_for_later_ones():
    sender = DelayedSender("a link")
    when = time.monotonic() + 0.05
    started = []
    deliveries = [sender.submit(when, fail), sender.submit(when, lambda: started.append(True))]
    for delivery in deliveries:
        with pytest.raises(RuntimeError, match="no such host"):
            sender.wait_for_start(delivery)
    assert not started


def test_sleep_until():
    when = time.monotonic() + 0.01
    sleep_until(when)
    assert time.monotonic() >= when
    sleep_until(0.0)


SCENARIOS = [
    "both_ways",
    "late_receiver",
    "reused_buffer",
    "without_emulation",
    "megatron",
    "shared",
    "ring",
    "dead_peer",
    "bad_settings",
]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Scenario of link_peers.py → what failed in it."""
    folder = tmp_path_factory.mktemp("peers")
    command = [sys.executable, str(Path(__file__).with_name("link_peers.py")), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    results = folder / "results.json"
    assert results.exists(), done.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_between_processes(scenario, peers):
    assert not peers[scenario], peers[scenario]


def test_no_scenario_is_left_out(peers):
    assert set(peers) == set(SCENARIOS)
