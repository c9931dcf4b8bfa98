# SPDX-License-Identifier: Apache-2.0
"""Tensors of a GPU over gloo, whose send and receive take host memory alone: through pinned memory.

    sender    stream ── event ─┐                                       ┌─ event ── stream   receiver
                      copy out └─ pinned ── send … receive ── pinned ──┘ copy in

The thread that computes starts all of it and waits for none of it:

1. a send is copied out on a stream of its own, behind what the tensor's stream has been given. A
   thread waits for the copy and hands the bytes to gloo: until then there is nothing to send.
2. a receive is posted into pinned memory at once. A thread waits for the bytes and copies them in
   on a stream of its own, so that they are on the device before the stage asks for them.
3. `wait()` of either returns when gloo is done, as for tensors on a CPU; the stream that the caller
   is on then waits for the copy, the host does not.

Lifetimes: what is copied out is recorded on the copying stream, so its memory is not used again
before; nothing else keeps it, since Megatron frees what it has sent; what is copied in is written
behind all that its stream had been given when the receive was posted, so whoever had its memory
before is done. Pinned memory comes from torch's caching host allocator: it pools blocks by size,
and gives none out again while a copy of it is under way. What gloo reads or writes is held by the
message until gloo is done.

Messages of one direction keep their order. The two directions are told apart by tags, so in a
pipeline of two stages, too, each may be ahead of the other.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mapl.transport import SWITCH_SECONDS, Operation, Transport

#: Who waits for a message has a timeout; the threads wait for as long as it takes.
_FOREVER = timedelta(days=365)
#: Seconds that a thread with nothing left to do may take to end, when time is up.
_MOMENT = 0.1


def needed(backend: str, *, cpu_mode: bool) -> bool:
    """Whether stages exchange tensors of GPUs over `backend` through the host."""
    return backend == "gloo" and not cpu_mode


class Gloo:
    """`torch.distributed` with a tag for each way through the pipeline; tensors on the CPU."""

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """See `Transport.transfer`."""
        works: list[Any] = []
        for op in operations:
            forward = (op.kind == "send") == (op.direction == "next")
            start = dist.isend if op.kind == "send" else dist.irecv
            works.append(start(op.tensor, op.peer, op.group, 1 if forward else 2))
        return works


class StagedTransport:
    """Transfers of tensors on any device by a transport that takes those on the CPU."""

    def __init__(self, inner: Transport, timeout: timedelta) -> None:
        """
        Args:
            inner: carries tensors on the CPU; called from this process's threads, one at a time
                for sends and one at a time for receives.
            timeout: how long `wait()` of a work waits by default.
        """
        self._inner, self._timeout = inner, timeout
        self._copies: dict[torch.device, _Copies] = {}
        self._lanes: dict[tuple[str, str], _Lane] = {}
        # One for both directions: an emulated link counts the messages of a connection.
        self._starting = _Lane("staged sends", self._start_sending)
        self._closed = False
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))

    def transfer(self, operations: Sequence[Operation]) -> list[Any]:
        """See `Transport.transfer`; the caller may free what it sends at once, and change it once
        it has waited.

        Raises:
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("staged transfers are closed: nothing is sent or received any more")
        return [self._transfer(op) for op in operations]

    def close(self) -> None:
        """Waits until all is sent and received; to be called before the process group's end.

        Raises:
            RuntimeError: a transfer failed, or not all is over in time.
        """
        if self._closed:
            return
        self._closed = True
        sys.setswitchinterval(self._switch_seconds)
        deadline = time.monotonic() + self._timeout.total_seconds()
        self._starting.end()
        self._starting.join(deadline)  # it hands its messages on to the others
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.end()
        for lane in lanes:
            lane.join(deadline)
        lanes.append(self._starting)
        if failures := [lane.failure for lane in lanes if lane.failure is not None]:
            raise RuntimeError(str(failures[0])) from failures[0]
        if late := [lane.name for lane in lanes if lane.alive]:
            seconds = self._timeout.total_seconds()
            raise RuntimeError(f"timed out after {seconds:g} s: {', '.join(late)} did not end")

    def _transfer(self, op: Operation) -> "StagedWork":
        data = op.tensor.detach()
        copies = self._copies_of(data.device)
        host = copies.host(data.nbytes)
        staged = op._replace(tensor=host)
        message = _Message(staged, copies, self._timeout)
        if op.kind == "send":
            message.copied = copies.out(data, host)
            message.start = lambda: self._inner.transfer([staged])[0]
            self._starting.put(message)
        else:
            message.data = data
            message.copied = copies.now()
            message.transfer = self._inner.transfer([staged])[0]
            self._lane(op, self._finish_receiving).put(message)
        return message.work

    def _copies_of(self, device: torch.device) -> "_Copies":
        if device not in self._copies:
            self._copies[device] = _DeviceCopies(device) if device.type == "cuda" else _Copies()
        return self._copies[device]

    def _lane(self, op: Operation, handle: Callable[["_Message"], None]) -> "_Lane":
        """One for each kind and direction: none waits for messages of another."""
        key = (op.kind, op.direction)
        if key not in self._lanes:
            self._lanes[key] = _Lane(f"staged {op.kind} {op.direction}", handle)
        return self._lanes[key]

    def _start_sending(self, message: "_Message") -> None:
        message.copies.wait(message.copied)
        message.transfer = message.start()
        self._lane(message.op, self._finish_sending).put(message)

    def _finish_sending(self, message: "_Message") -> None:
        message.transfer.wait(_FOREVER)
        message.work.settle(message.copied)

    def _finish_receiving(self, message: "_Message") -> None:
        message.transfer.wait(_FOREVER)
        copied = message.copies.into(message.data, message.op.tensor, message.copied)
        message.work.settle(copied)


class StagedWork:
    """A transfer under way, in place of a `torch.distributed.Work`."""

    def __init__(self, what: str, copies: "_Copies", timeout: timedelta) -> None:
        self._what, self._copies, self._timeout = what, copies, timeout
        self._settled = threading.Event()
        self._copied: Any = None
        self._error: Exception | None = None

    def settle(self, copied: Any = None, error: Exception | None = None) -> None:
        """Called once, by the thread that saw the end of it."""
        self._copied, self._error = copied, error
        self._settled.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As torch's, for gloo: the transfer is over; the current stream waits for the copy.

        Raises:
            RuntimeError: it failed, or was not over in time.
        """
        seconds = (timeout or self._timeout).total_seconds()
        if not self._settled.wait(seconds):
            raise RuntimeError(f"timed out after {seconds:g} s: {self._what}")
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        self._copies.order(self._copied)
        return True


class _Message:
    """What the threads hand on to each other.

    Attributes:
        op: with the bytes of the tensor, where gloo sees them, in its place.
        data: of a receive, the tensor without its history.
        copied: of a send, when it was copied out; of a receive, when its memory was free.
        start, transfer: of the inner transport.
    """

    data: Tensor
    copied: Any
    start: Callable[[], Any]
    transfer: Any

    def __init__(self, op: Operation, copies: "_Copies", timeout: timedelta) -> None:
        does = "receive" if op.kind == "send" else "send"
        self.op, self.copies = op, copies
        self.work = StagedWork(f"rank {op.peer} does not {does}", copies, timeout)


class _Copies:
    """Between tensors on the CPU and other memory of the host: at once."""

    def enter(self) -> None:
        """Called by a thread before it handles the first message that uses these."""

    def host(self, size: int) -> Tensor:
        """Memory for a message of `size` bytes."""
        return torch.empty(size, dtype=torch.uint8)

    def now(self) -> Any:
        """What `into` has to wait for."""

    def out(self, data: Tensor, host: Tensor) -> Any:
        """Copies `data` out; what `wait` and `order` take."""
        host.copy_(_bytes_of(data))

    def into(self, data: Tensor, host: Tensor, free: Any) -> Any:
        """Copies `host` in, not before `free`; what `order` takes."""
        _bytes_of(data).copy_(host)

    def wait(self, copied: Any) -> None:
        """Until a copy is made, by a thread that has nothing else to do."""

    def order(self, copied: Any) -> None:
        """Has the current stream wait for a copy."""


class _DeviceCopies(_Copies):
    """Between a GPU and pinned memory: on two streams, so that no way holds up the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outward, self._inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def enter(self) -> None:
        torch.cuda.set_device(self._device)  # a thread starts on the first GPU, whoever starts it

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def now(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def out(self, data: Tensor, host: Tensor) -> torch.cuda.Event:
        copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        self._outward.wait_event(self.now())
        with torch.cuda.stream(self._outward):
            host.copy_(_bytes_of(data), non_blocking=True)
            copied.record(self._outward)
        data.record_stream(self._outward)
        return copied

    def into(self, data: Tensor, host: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        self._inward.wait_event(free)
        with torch.cuda.stream(self._inward):
            _bytes_of(data).copy_(host, non_blocking=True)
            copied = self._inward.record_event()
        data.record_stream(self._inward)
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()

    def order(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)


class _Lane:
    """A thread that handles messages in their order. After a failure it fails all later ones too:
    they would arrive in the place of those before them."""

    def __init__(self, name: str, handle: Callable[[_Message], None]) -> None:
        self._handle = handle
        self.failure: Exception | None = None
        self._messages: SimpleQueue[_Message | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, message: _Message) -> None:
        """Has a message handled after those before it."""
        self._messages.put(message)

    def end(self) -> None:
        """Has the thread end after the messages before."""
        self._messages.put(None)

    def join(self, deadline: float) -> None:
        """Waits for the thread's end until `time.monotonic()` is `deadline`."""
        self._thread.join(max(deadline - time.monotonic(), _MOMENT))

    @property
    def name(self) -> str:
        """Of the thread."""
        return self._thread.name

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        copies: _Copies | None = None
        while (message := self._messages.get()) is not None:
            try:
                if self.failure is not None:
                    raise self.failure
                if message.copies is not copies:
                    copies = message.copies
                    copies.enter()
                self._handle(message)
            except Exception as error:
                self.failure = error
                message.work.settle(error=error)
            del message  # not kept alive until the next one comes


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [n] uint8, in its memory."""
    return tensor.view(-1).view(torch.uint8)
