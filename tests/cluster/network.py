"""Hosts that are network namespaces on one bridge, and what cuts them from each other. Needs root and `ip`.

A cut is a wrong hardware address in a host's neighbour table: what it sends to the other is lost without a word, as on
a broken switch.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

SUBNET = "198.18.{}.{}"
"""Of the block that is reserved for benchmarks of networks: nobody routes to it."""

NOBODY = "02:00:00:00:00:ff"
_networks = count()


class Network:
    """Names and numbers are of this process and this network alone. `close` removes everything."""

    def __init__(self) -> None:
        number = next(_networks)
        self._name = f"mg{os.getpid()}n{number}"
        self._subnet = os.getpid() * 7 + number
        self._hosts: dict[str, int] = {}
        self._bridge = f"{self._name}b"
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("address", "add", f"{self._address(1)}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise

    def add(self, host: str) -> str:
        """A host with a network of its own, connected to all others; returns its address."""
        number = len(self._hosts) + 2
        namespace, outside = self._namespace(host), f"{self._name}v{number}"
        _ip("netns", "add", namespace)
        self._hosts[host] = number
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", outside, "master", self._bridge, "up")
        _ip("-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        return self.address(host)

    def address(self, host: str) -> str:
        return self._address(self._hosts[host])

    def inside(self, host: str) -> list[str]:
        """What to put before a command that is to run in this host. It stays one process."""
        return ["ip", "netns", "exec", self._namespace(host)]

    @contextmanager
    def cut(self, one: str, others: Sequence[str]) -> Iterator[None]:
        """Nothing goes between this host and those, in either direction, while this lasts."""
        with self._lost([pair for other in others for pair in ((one, other), (other, one))]):
            yield

    @contextmanager
    def cut_one_way(self, senders: Sequence[str], receivers: Sequence[str]) -> Iterator[None]:
        """Nothing that these hosts send to those arrives while this lasts; what those send to them does."""
        with self._lost([(sender, receiver) for sender in senders for receiver in receivers]):
            yield

    @contextmanager
    def _lost(self, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
        for sender, receiver in pairs:
            self._lose(sender, receiver)
        try:
            yield
        finally:
            for sender, receiver in pairs:
                namespace, address = self._namespace(sender), self.address(receiver)
                _ip("-n", namespace, "neighbour", "delete", address, "dev", "eth0")

    def _lose(self, sender: str, receiver: str) -> None:
        namespace, address = self._namespace(sender), self.address(receiver)
        _ip("-n", namespace, "neighbour", "replace", address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")

    def close(self) -> None:
        """Twice is fine."""
        for host, number in self._hosts.items():
            _ip("link", "delete", f"{self._name}v{number}", check=False)
            _ip("netns", "delete", self._namespace(host), check=False)
        self._hosts.clear()
        _ip("link", "delete", self._bridge, check=False)

    def _namespace(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _address(self, number: int) -> str:
        return SUBNET.format(self._subnet % 256, number)


def _ip(*arguments: str, check: bool = True) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
