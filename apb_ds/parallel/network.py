"""The network interface that reaches the other nodes."""

from __future__ import annotations

import os
import socket

import psutil

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
ANY_PORT = 9  # nothing is sent there


def choose_gloo_interface() -> None:
    """Set ``GLOO_SOCKET_IFNAME`` to the interface that reaches ``MASTER_ADDR``, unless it is set.

    By default gloo takes the interface that the hostname resolves to. That is often the loopback device, which does not
    reach other nodes.
    """
    master = os.environ.get("MASTER_ADDR")
    if not master or os.environ.get(GLOO_INTERFACE):
        return
    interface = interface_to(master)
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface


def interface_to(address: str) -> str | None:
    """Return the name of the interface through which this node reaches `address`, a hostname or an IP address.

    For one of the node's own addresses that is the interface with this address. None if the address cannot be resolved
    or reached.
    """
    try:
        candidates = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in candidates:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # a datagram socket: consults the routing table, sends nothing
                own = probe.getsockname()[0]
        except OSError:
            continue
        interface = _interface_with(own)
        if interface is not None:
            return interface
    return None


def _interface_with(own: str) -> str | None:
    plain = own.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == plain for address in addresses):
            return name
    # All of 127.0.0.0/8 belongs to the loopback device, which lists one address.
    return "lo" if plain.startswith("127.") and "lo" in psutil.net_if_addrs() else None
