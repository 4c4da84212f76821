"""Where webhooks may lead: the setting, the URLs, and every spelling of an address inside."""

import asyncio
import socket

import pytest

from detflow.errors import InvalidArgument
from services.metrics.webhooks.hosts import AllowedHosts, Gate, check_form

INSIDE = """
    127.0.0.1 127.9.9.9 ::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::1 10.0.0.1 172.16.0.1
    192.168.1.1 fc00::1 fd12::1 ::ffff:10.0.0.1 169.254.169.254 ::ffff:169.254.169.254
    64:ff9b::a9fe:a9fe fe80::1 fe80::1%1 fd00:ec2::254 100.100.100.200 168.63.129.16 100.64.0.1
    0.0.0.0 0.1.2.3 :: ::7f00:1 255.255.255.255 224.0.0.1 239.1.1.1 240.0.0.1 192.0.0.192
    192.0.2.1 198.18.0.1 203.0.113.1 192.88.99.1 ff02::1 fec0::1 2001:db8::1 2001::1 100::1
    2002:a00:1::
""".split()
OUTSIDE = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
METADATA = ["169.254.169.254", "fe80::1", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"]


def allows(setting: str, address: str, host: str = "example.com") -> bool:
    return AllowedHosts.parse(setting).allows(host, address)


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_not_external(address: str) -> None:
    assert not allows("external", address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_addresses_of_the_internet_are_external_and_nothing_else(address: str) -> None:
    assert allows("external", address)
    assert not allows("private,loopback", address)
    assert not allows("", address)


@pytest.mark.parametrize(
    ("setting", "address", "expected"),
    [
        ("loopback", "127.0.0.1", True),
        ("loopback", "::1", True),
        ("loopback", "10.0.0.1", False),
        ("private", "10.0.0.1", True),
        ("private", "fd12::1", True),
        ("private", "127.0.0.1", False),
        ("private", "100.64.0.1", False),
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16", "10.2.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("169.254.169.254", "169.254.169.254", True),
        ("169.254.0.0/16", "::ffff:169.254.169.254", True),
        ("0.0.0.0/0", "::ffff:127.0.0.1", True),
        ("0.0.0.0/0", "::1", False),
    ],
)
def test_setting_allows_what_it_names(setting: str, address: str, expected: bool) -> None:
    assert allows(f" {setting} ,", address) is expected


@pytest.mark.parametrize(
    ("setting", "host", "expected"),
    [
        ("hooks.example.com", "hooks.example.com", True),
        ("Hooks.Example.com.", "HOOKS.example.com", True),
        ("hooks.example.com", "hooks.example.com.", True),
        ("hooks.example.com", "evil-hooks.example.com", False),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("ci_receiver", "ci_receiver", True),
    ],
)
def test_named_hosts_may_have_private_addresses(setting: str, host: str, expected: bool) -> None:
    assert allows(setting, "10.0.0.1", host) is expected
    assert allows(setting, "127.0.0.1", host) is expected


@pytest.mark.parametrize("address", METADATA)
def test_credentials_of_a_cloud_machine_are_reached_by_no_kind_and_no_name(address: str) -> None:
    assert not allows("external,private,loopback,example.com,*.example.com", address)
    assert not allows("external,private,loopback,example.com", address, "a.example.com")
    assert allows(f"{address}/{128 if ':' in address else 32}", address)


@pytest.mark.parametrize("part", ["*", "*.", "http://x", "10.1.2.3/16", "a b", "300.1.2.3", "x:80"])
def test_bad_setting_is_named(part: str) -> None:
    with pytest.raises(InvalidArgument, match="DETFLOW_WEBHOOK_HOSTS") as caught:
        AllowedHosts.parse(f"external,{part}")
    assert caught.value.reason == "BAD_SETTING" and repr(part) in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        *["", "example.com", "//example.com", "ftp://example.com", "file:///etc/passwd", "http://"],
        *["http:///path", "https://user@example.com", "https://:pw@example.com", "javascript:x"],
        *["http://example.com:0/", "http://example.com:99999/", "http://example.com:x/"],
        *["http://exa mple.com/", "http://exa\nmple.com/", "http://a..b/", "http://exa%6dple.com/"],
        *["http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/"],
        *[
            "http://127.1/",
            "http://127.0.0.1./",
            "http://[::1/",
            "http://[::1]x/",
            "http://-a.com/",
        ],
    ],
)
def test_what_is_no_url_to_post_to_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_form(url, "webhook.url")
    assert caught.value.reason == "BAD_URL"
    assert [violation.field for violation in caught.value.violations] == ["webhook.url"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.com/hook?token=1#x", "example.com"),
        ("HTTP://EXAMPLE.com:8080", "example.com"),
        ("http://[::1]:80/", "::1"),
        ("http://127.0.0.1/", "127.0.0.1"),
        ("http://①②⑦.0.0.1/", "127.0.0.1"),
        ("http://예시.한국/", "xn--vv4b11d.xn--3e0b707e"),
        ("http://my_service:9000/", "my_service"),
    ],
)
def test_host_is_read_as_the_sender_reads_it(url: str, host: str) -> None:
    assert check_form(url, "webhook.url") == host


@pytest.mark.parametrize("url", ["http://①②⑦.0.0.1/", "http://localhost/", "http://[::1]/"])
async def test_url_that_leads_inside_is_refused_with_the_setting(url: str) -> None:
    with pytest.raises(InvalidArgument, match="DETFLOW_WEBHOOK_HOSTS") as caught:
        await AllowedHosts.parse("external").check_url(url, "webhook.url")
    assert caught.value.reason == "HOST_NOT_ALLOWED"
    assert caught.value.violations[0].field == "webhook.url"
    await AllowedHosts.parse("loopback").check_url(url, "webhook.url")


async def test_name_that_does_not_resolve_yet_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    await AllowedHosts.parse("external").check_url("http://later.example.com/", "webhook.url")


def test_gate_makes_no_socket_for_an_address_inside() -> None:
    gate = Gate(AllowedHosts.parse("external"), "example.com")
    with pytest.raises(PermissionError):
        gate.make_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)))
    gate.make_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))).close()
    assert gate.refused == ["10.0.0.1"]
