# SPDX-License-Identifier: Apache-2.0
"""What a slow link carries besides headers and acknowledgements."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from shaped_hosts import ShapedHosts


def goodput(hosts: ShapedHosts, one: int, other: int, count: int) -> float:
    """Sends `count` bytes each way at once over one TCP connection, as gloo uses it, twice.

    The first time TCP looks for the bandwidth, the second time counts.

    Returns:
        10⁶ bits of payload a second, in the direction that was done last.
    """
    address = hosts.addresses[other]
    listener = hosts.socket_on(other, lambda: socket.create_server((address, 0)))
    port = listener.getsockname()[1]
    near = hosts.socket_on(one, lambda: socket.create_connection((address, port)))
    with listener, near, listener.accept()[0] as far, ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            start = time.perf_counter()
            sending = [threads.submit(end.sendall, bytes(count)) for end in (near, far)]
            receiving = [threads.submit(_receive, end, count) for end in (near, far)]
            for work in (*receiving, *sending):
                work.result()
        return count * 8 / (time.perf_counter() - start) / 1e6


def _receive(end: socket.socket, count: int) -> None:
    while count > 0:
        if not (got := len(end.recv(min(count, 1 << 20)))):
            raise ConnectionError("the other end has closed the connection")
        count -= got
