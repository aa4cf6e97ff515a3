"""Two nodes on one machine: network namespaces joined by a virtual cable. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

INTERFACE = "eth0"


@dataclass(frozen=True)
class Nodes:
    """Two namespaces; in each, `INTERFACE` has one of the addresses."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def command(self, node: int, *command: str) -> list[str]:
        """Wrap a command so that it runs on a node."""
        return ["ip", "netns", "exec", self.names[node], *command]


def run_as_root(*command: str) -> None:
    """Run a command that needs root; skip the test if root or the command is missing."""
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    if shutil.which(command[0]) is None:
        pytest.skip(f"missing: {command[0]} ({'iproute2' if command[0] == 'ip' else 'util-linux'})")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        pytest.skip(f"missing: the right to run {' '.join(command)} ({done.stderr.strip()})")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Create two namespaces and their cable; remove them on exit."""
    mark = f"{os.getpid() % 100000}"
    nodes = Nodes((f"apb-{mark}-a", f"apb-{mark}-b"), ("10.213.7.1", "10.213.7.2"))
    made = []
    try:
        for name in nodes.names:
            run_as_root("ip", "netns", "add", name)
            made.append(name)
        first, second = nodes.names
        run_as_root(
            *("ip", "link", "add", INTERFACE, "netns", first, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", second),
        )
        for name, address in zip(nodes.names, nodes.addresses, strict=True):
            run_as_root("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            run_as_root("ip", "-n", name, "link", "set", INTERFACE, "up")
            run_as_root("ip", "-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False, timeout=20)
