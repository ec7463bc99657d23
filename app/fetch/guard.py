"""Checks the addresses that a transfer connects to, at the last moment: when a socket connects.

An audit hook sees the peer address of every library written in Python, after DNS and after each redirect. So a name
that resolves differently the second time gains nothing. The hook does not see libraries with their own sockets (Rust,
C), so a transfer uses none. A proxy from the environment is a peer like any other: a private one must be allow-listed,
and is itself responsible for the addresses behind it.
"""

import ipaddress
import socket
import sys
from collections.abc import Sequence
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NEVER_PUBLIC: tuple[Network, ...] = (
    ipaddress.IPv4Network("0.0.0.0/8"),
    ipaddress.IPv4Network("100.64.0.0/10"),
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's host, as seen from its machines
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv6Network("2001::/23"),  # Teredo and other special purposes
    ipaddress.IPv6Network("2001:db8::/32"),
    ipaddress.IPv6Network("2002::/16"),  # 6to4: leads to any IPv4 address
    ipaddress.IPv6Network("3fff::/20"),
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg")


class AddressRefused(Exception):
    """A connection to an address that the operator does not allow.

    Not an OSError: libraries would take it for a network error and retry.
    """


def install(private_networks: Sequence[str]) -> None:
    """Refuse connections of this process to addresses that are neither public nor in `private_networks`."""
    networks = parse_networks(private_networks)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # sendmsg on a connected socket has no address; its connect was checked.
        if event in _EVENTS and arguments[1] is not None:
            check(arguments[0].family, arguments[1], networks)

    sys.addaudithook(hook)


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Parse addresses and networks as the operator writes them. Raises ValueError."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def check(family: int, address: Any, networks: Sequence[Network]) -> None:
    """Check the address of a peer. Raises AddressRefused."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        raise AddressRefused("refused a connection that is not IPv4 or IPv6")
    try:
        peer = ipaddress.ip_address(address[0])
    except ValueError:  # a name would be resolved only after this check
        raise AddressRefused("refused a connection to a name that was not resolved first") from None
    if not is_permitted(peer, networks):
        raise AddressRefused(
            f"{peer} is not a public address: add it to XINGLIN_PRIVATE_NETWORKS to fetch from it"
        )


def refusal(error: BaseException | None) -> AddressRefused | None:
    """Return the AddressRefused behind an error that a library may have wrapped, or None."""
    while error is not None:
        if isinstance(error, AddressRefused):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_permitted(address: Address, networks: Sequence[Network]) -> bool:
    """Whether `address`, or the IPv4 address inside it, is public or in one of `networks`."""
    peer = _unwrapped(address)
    return is_public(peer) or any(
        candidate.version == network.version and candidate in network
        for network in networks
        for candidate in (address, peer)
    )


def is_public(address: Address) -> bool:
    """Whether `address` is a public address on the internet."""
    if any(network.version == address.version and address in network for network in _NEVER_PUBLIC):
        return False
    if address.version == 6 and address not in _PUBLIC_V6:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _unwrapped(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address maps or reaches through NAT64, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
