"""The network interface that reaches the master node."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from apb_ds.parallel.network import GLOO_INTERFACE, choose_gloo_interface, interface_to


def own_addresses() -> list[tuple[str, str]]:
    return [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "127.3.2.1"])
def test_loopback(address: str) -> None:
    assert interface_to(address) == "lo"


def test_an_address_of_this_node() -> None:
    addresses = own_addresses()
    assert addresses
    for name, address in addresses:
        assert interface_to(address) == name


def test_an_unknown_address() -> None:
    assert interface_to("no-such-node.invalid") is None


@pytest.mark.parametrize(
    ("master", "before", "after"),
    [
        ("127.0.0.1", None, "lo"),
        ("127.0.0.1", "eth7", "eth7"),
        (None, None, None),
        ("no-such-node.invalid", None, None),
    ],
)
def test_the_users_choice_is_kept(
    monkeypatch: pytest.MonkeyPatch, master: str | None, before: str | None, after: str | None
) -> None:
    for name, value in (("MASTER_ADDR", master), (GLOO_INTERFACE, before)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if before is None:
        monkeypatch.setenv(GLOO_INTERFACE, "")  # so that monkeypatch restores it
    choose_gloo_interface()
    assert (os.environ.get(GLOO_INTERFACE) or None) == after
