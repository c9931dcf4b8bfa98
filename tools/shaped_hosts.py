# SPDX-License-Identifier: Apache-2.0
"""Hosts on one machine, in a row, with slow links between neighbours: Linux network namespaces.

    host 0 ══ slow ══ host 1 ══ slow ══ host 2 ══ slow ══ host 3
       └────────────────┴─ control, fast ─┴────────────────┘

Each host has one address. Neighbours reach each other's over a veth pair of their own, with a token
bucket (`tc tbf`) at either end, so that the link is full duplex and each direction has the whole
bandwidth. All other traffic goes over a bridge in a namespace of its own. The machine's own network
is not touched.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slow_network_cleanup import Watchdog, leftovers, own_prefix, remove

#: TCP's on the links: Linux's default, whatever the machine's is.
CONGESTION_CONTROL = "cubic"

#: Bytes that pass at once: two packets, next to a payload nothing.
_BURST = 4096

_CLONE_NEWNET = 0x40000000
_NETNS = Path("/run/netns")


class NetworkError(RuntimeError):
    """The machine cannot build the network; the message says what is missing."""


class ShapedHosts:
    """A context in which the hosts exist.

    Leaving it removes them and kills what runs in them; so does a watchdog when this process dies.

    Attributes:
        names: the hosts' namespaces, in order.
        addresses: their IPv4 addresses.
        device: the interface that has a host's address.
    """

    device = "control"

    def __init__(self, count: int, mbit: float | None = None) -> None:
        """
        Args:
            count: of hosts, 2 or more.
            mbit: bandwidth of each link in each direction, 10⁶ bits a second on the wire, headers
                included; None: as fast as the machine is.
        """
        prefix = own_prefix()
        self.names = [f"{prefix}host{p}" for p in range(count)]
        self.addresses = [f"10.83.0.{p + 1}" for p in range(count)]
        self._hub = f"{prefix}control"
        self._prefix = prefix
        self._mbit = mbit
        self._shaped = False

    def __enter__(self) -> "ShapedHosts":
        remove(leftovers())
        self._watchdog = Watchdog(self._prefix)
        try:
            self._build()
            self.shape(self._mbit)
        except BaseException:
            self._watchdog.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.close()

    def run_on(self, host: int | None, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host, or beside them all if `host` is None."""
        name = self._hub if host is None else self.names[host]
        return ["ip", "netns", "exec", name, *command]

    def shape(self, mbit: float | None) -> None:
        """Sets the bandwidth of all links; None: unlimited. TCP sends again what waited there."""
        for name, devices in self._links():
            # Not changed in place: a packet that waits for the old bucket and does not fit into the
            # new one would block the link for good.
            commands = [f"qdisc delete dev {d} root" for d in devices] if self._shaped else []
            if mbit is not None:
                shaper = f"tbf rate {round(mbit * 1e6)}bit burst {_BURST}b latency 50ms"
                commands += [f"qdisc add dev {d} root {shaper}" for d in devices]
            if commands:
                _batch("tc", name, commands)
        self._shaped = mbit is not None

    def bytes_sent(self) -> dict[tuple[int, str], int]:
        """(host, device) → bytes that left by it, headers included, since the hosts exist.

        The devices are "next" and "previous", the links to the neighbours, and `device`.
        """
        sent = {}
        for host, name in enumerate(self.names):
            for entry in json.loads(_run(["ip", "-n", name, "-json", "-statistics", "link"])):
                if entry["ifname"] != "lo":
                    sent[host, entry["ifname"]] = int(entry["stats64"]["tx"]["bytes"])
        return sent

    def socket_on(self, host: int, make: Callable[[], socket.socket]) -> socket.socket:
        """The socket that `make` makes, on a host."""
        return _in_namespace(self.names[host], make)

    def _links(self) -> list[tuple[str, list[str]]]:
        last = len(self.names) - 1
        return [
            (name, ["previous"] * (host > 0) + ["next"] * (host < last))
            for host, name in enumerate(self.names)
        ]

    def _build(self) -> None:
        for name in (self._hub, *self.names):
            _run(["ip", "netns", "add", name])
        hub = ["link set lo up", "link add bridge type bridge", _up("bridge")]
        for host, name in enumerate(self.names):
            hub += [
                f"link add host{host} type veth peer name {self.device} netns {name}",
                f"link set host{host} master bridge",
                _up(f"host{host}"),
            ]
        _batch("ip", self._hub, hub)
        count = len(self.names)
        for host, name in enumerate(self.names):
            commands = [
                "link set lo up",
                f"address add {self.addresses[host]}/24 dev {self.device}",
            ]
            commands.append(_up(self.device))
            if host + 1 < count:
                peer = self.names[host + 1]
                commands += [
                    f"link add next type veth peer name previous netns {peer}",
                    f"address add {_link_address(host, 1)}/30 dev next",
                    _up("next"),
                ]
            if host > 0:
                commands += [
                    f"address add {_link_address(host - 1, 2)}/30 dev previous",
                    _up("previous"),
                ]
            _batch("ip", name, commands)
        for host, name in enumerate(self.names):
            routes = [(host + 1, _link_address(host, 2))] if host + 1 < count else []
            routes += [(host - 1, _link_address(host - 1, 1))] if host else []
            _batch("ip", name, [
                f"route add {self.addresses[other]}/32 via {gateway} src {self.addresses[host]} "
                f"congctl {CONGESTION_CONTROL}"
                for other, gateway in routes
            ])  # fmt: skip


def check_machine() -> None:
    """Tries what the hosts need.

    Raises:
        NetworkError: naming what is missing and what to do.
    """
    if not sys.platform.startswith("linux"):
        raise NetworkError("needs Linux, for its network namespaces")
    if os.geteuid() != 0:
        raise NetworkError("needs root, to make network namespaces; run it with sudo")
    name = f"{own_prefix()}trial"
    try:
        _run(["ip", "netns", "add", name])
        try:
            _batch("ip", name, ["link add bridge type bridge", "link add one type veth peer two"])
            _batch("tc", name, ["qdisc add dev one root tbf rate 1mbit burst 4096b latency 50ms"])
        finally:
            remove([name])
    except FileNotFoundError as error:
        raise NetworkError(f"needs {error.filename}; install iproute2") from None
    except NetworkError as error:
        raise NetworkError(
            "needs a kernel and rights for network namespaces, bridge, veth and tc's tbf (in a "
            f"container: --privileged): {error}"
        ) from None


def _link_address(link: int, end: int) -> str:
    return f"10.83.{link + 1}.{end}"


def _up(device: str) -> str:
    """Without an IPv6 address, which could be taken for the host's."""
    return f"link set {device} addrgenmode none up"


def _batch(tool: str, name: str, commands: Sequence[str]) -> None:
    """Runs several `ip` or `tc` commands in a namespace, in one process."""
    _run([tool, "-n", name, "-batch", "-"], "\n".join(commands) + "\n")


def _run(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _in_namespace(name: str, make: Callable[[], socket.socket]) -> socket.socket:
    """What `make` makes in a namespace; a socket stays where it was made."""
    made: list[Any] = []

    def enter_and_make() -> None:  # a thread is in a namespace by itself, and ends there
        try:
            with (_NETNS / name).open() as namespace:
                os.setns(namespace.fileno(), _CLONE_NEWNET)
            made.append(make())
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=enter_and_make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    assert isinstance(made[0], socket.socket)
    return made[0]
