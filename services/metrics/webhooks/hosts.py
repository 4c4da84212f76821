"""Where webhooks may lead: DETFLOW_WEBHOOK_HOSTS, held against the address that is connected to.

Whoever may create webhooks must not reach what only this machine can reach. A check of the URL
alone does not do: a name may resolve to something else the next time it is asked for. So every
address is judged once more at the moment a socket is made for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import yarl

from detflow.errors import InvalidArgument, bad_field

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_RESOLVE_SECONDS = 3.0
_HOST = re.compile(r"([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def _networks(*texts: str) -> tuple[_Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
_LOOPBACK = _networks("127.0.0.0/8", "::1/128")
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL = _networks("192.0.0.0/24", "192.88.99.0/24")
"""Which some releases of Python count as global."""
_NEVER = _networks(
    "169.254.0.0/16", "fe80::/10",  # link-local, where clouds serve the credentials of a machine
    "fd00:ec2::254/128", "100.100.100.200/32", "168.63.129.16/32",  # and where else they do
)  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_KINDS = ("external", "private", "loopback")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedHosts:
    """The hosts that webhooks may be sent to.

    Attributes:
        kinds: Of external, private and loopback.
        networks: Addresses allowed by name, whatever they are.
        hosts: Names allowed, lower case; "*.x" stands for all below x. They may have private
            addresses.
    """

    kinds: frozenset[str]
    networks: tuple[_Network, ...]
    hosts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the setting.

        Raises:
            InvalidArgument: BAD_SETTING.
        """
        kinds, networks, hosts = set(), [], []
        for part in (part.strip().lower() for part in text.split(",")):
            if part in _KINDS:
                kinds.add(part)
            elif network := _parse_network(part):
                networks.append(network)
            elif _HOST.fullmatch(part.removeprefix("*.")) and not _is_number(part):
                hosts.append(part.rstrip("."))
            elif part:
                raise InvalidArgument(
                    f"DETFLOW_WEBHOOK_HOSTS: {part!r} is none of external, private, loopback, an"
                    " address or network such as 10.1.0.0/16, a host such as hooks.example.com or"
                    " *.example.com",
                    reason="BAD_SETTING",
                )
        return cls(kinds=frozenset(kinds), networks=tuple(networks), hosts=tuple(hosts))

    def allows(self, host: str, address: str) -> bool:
        """Says whether a connection for the sake of `host` may be made to `address`."""
        ip = ipaddress.ip_address(address)
        inner = _inner(ip)
        if any(one in network for one in (ip, inner) for network in self.networks):
            return True
        if any(inner in network for network in _NEVER):
            return False
        return self._names(host) or not self.kinds.isdisjoint(_kinds_of(inner))

    def _names(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        return any(
            host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed
            for allowed in self.hosts
        )

    async def check_url(self, text: str, field: str) -> str:
        """Checks what a webhook is to be sent to; returns the host.

        A name that cannot be resolved now is taken: it may come later.

        Args:
            text: The URL.
            field: Its path in the request.

        Raises:
            InvalidArgument: BAD_URL, HOST_NOT_ALLOWED.
        """
        host = check_form(text, field)
        addresses = [host] if _is_address(host) else await _resolve(host)
        if addresses and not any(self.allows(host, address) for address in addresses):
            whose = "" if addresses[0] == host else f" of {host}"
            raise bad_field(
                field,
                "HOST_NOT_ALLOWED",
                f"webhooks may not be sent to the address {addresses[0]}{whose}; take another, or"
                " let who runs detflow add it to DETFLOW_WEBHOOK_HOSTS",
            )
        return host


def check_form(text: str, field: str) -> str:
    """Checks all of a URL that needs no network; returns its host.

    Raises:
        InvalidArgument: BAD_URL.
    """
    problem = ""
    try:
        url = yarl.URL(text)
        host, port = url.raw_host or "", url.port  # the port is parsed here
    except ValueError:
        problem = "is no URL; give one such as https://example.com/hook"
    else:
        if not text.isprintable() or " " in text:
            problem = "must not contain spaces or control characters"
        elif url.scheme not in ("http", "https"):
            problem = "must begin with http:// or https://"
        elif not host:
            problem = "names no host; give a URL such as https://example.com/hook"
        elif url.raw_user is not None or url.raw_password is not None:
            problem = "must not hold a user or password: the signature says who sends"
        elif port == 0:
            problem = "must not have port 0"
        elif not _HOST.fullmatch(host) and not _is_address(host):
            problem = f"{host!r} is no host name; give a URL such as https://example.com/hook"
        elif _is_number(host) and not _is_address(host):
            problem = f"{host} is no host name; write an IPv4 address as four decimal numbers"
    if problem:
        raise bad_field(field, "BAD_URL", problem)
    return host


class Gate:
    """Makes the sockets of one exchange, only to addresses that are allowed.

    Args:
        allowed: The hosts that webhooks may be sent to.
        host: Host of the URL.

    Attributes:
        refused: Addresses that were not.
    """

    def __init__(self, allowed: AllowedHosts, host: str) -> None:
        self._allowed = allowed
        self._host = host
        self.refused: list[str] = []

    def make_socket(
        self, info: tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
    ) -> socket.socket:
        """Makes the socket for an address, as getaddrinfo describes it.

        Raises:
            PermissionError: The address is not allowed.
        """
        family, kind, proto, _, (address, *_) = info
        if not self._allowed.allows(self._host, address):
            self.refused.append(address)
            raise PermissionError(f"{address} is not allowed")
        return socket.socket(family, kind, proto)


def _kinds_of(ip: _Address) -> Sequence[str]:
    if any(ip in network for network in _LOOPBACK):
        return ("loopback",)
    if any(ip in network for network in _PRIVATE):
        return ("private",)
    is_external = (
        ip.is_global
        and not ip.is_multicast
        and not any(ip in network for network in _NOT_GLOBAL)
        and (ip.version == 4 or ip in _GLOBAL_V6)
    )
    return ("external",) if is_external else ()


def _inner(ip: _Address) -> _Address:
    """Returns the IPv4 address that an IPv6 address leads to by translation, else the address."""
    if not isinstance(ip, ipaddress.IPv6Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


def _parse_network(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_number(host: str) -> bool:
    """Says whether resolvers may take a host for an IPv4 address, in one of its odd spellings."""
    return _NUMBER.fullmatch(host.lower().rstrip(".").rsplit(".", 1)[-1]) is not None


async def _resolve(host: str) -> list[str]:
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError):
        return []
    return [str(address[0]) for *_, address in found]
