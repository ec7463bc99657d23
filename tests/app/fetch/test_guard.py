import ipaddress
import json
import socket
import subprocess
import sys

import pytest

from app.fetch.guard import AddressRefused, check, is_permitted, parse_networks

_REFUSED = """
    127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.1.1
    169.254.169.254 169.254.170.2 100.64.0.1 100.100.100.200 100.127.255.255 192.0.0.192 192.0.2.1 192.88.99.1
    198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
    64:ff9b::7f00:1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: 2002:808:808::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 3fff::1 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00::1
    fd00:ec2::254 ff02::1 ff0e::1 100::1 4000::1
"""
_PERMITTED = "8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"


@pytest.mark.parametrize("address", _REFUSED.split())
def test_private_addresses_are_refused_in_every_spelling(address: str) -> None:
    assert not is_permitted(ipaddress.ip_address(address), ())


@pytest.mark.parametrize("address", _PERMITTED.split())
def test_public_addresses_are_permitted(address: str) -> None:
    assert is_permitted(ipaddress.ip_address(address), ())


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("10.2.0.1", False), ("fd00::5", True), ("::1", False)],
)
def test_the_operator_allows_networks(address: str, is_allowed: bool) -> None:
    networks = parse_networks(["10.1.0.0/16", "fd00::/64"])
    assert is_permitted(ipaddress.ip_address(address), networks) is is_allowed


@pytest.mark.parametrize("host", ["localhost", "0x7f.1", "2130706433", "127.1", "0177.0.0.1", ""])
def test_peers_that_are_not_ip_addresses_are_refused(host: str) -> None:
    with pytest.raises(AddressRefused):
        check(socket.AF_INET, (host, 80), parse_networks(["127.0.0.0/8"]))


ATTEMPTS = {
    "socket": "socket.create_connection(('127.0.0.1', PORT))",
    "connect_ex": "socket.socket().connect_ex(('127.0.0.1', PORT))",
    "name": "socket.socket().connect(('localhost', PORT))",
    "udp": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "unix": "socket.socket(socket.AF_UNIX).connect('/tmp/none')",
    "asyncio": "asyncio.run(asyncio.open_connection('localhost', PORT))",
    "httpx2": "import httpx2; httpx2.get('http://localhost:%d/' % PORT)",
    "requests": "import requests; requests.get('http://localhost:%d/' % PORT)",
    "aiohttp": (
        "import aiohttp\nasync def get():\n async with aiohttp.ClientSession() as session:\n"
        "  await session.get('http://localhost:%d/' % PORT)\nasyncio.run(get())"
    ),
    "s3fs": (
        "import s3fs; s3fs.S3FileSystem(key='k', secret='s', endpoint_url='http://localhost:%d' % PORT).ls('b')"
    ),
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_the_guard_sees_every_library(attempt: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        program = (
            "import asyncio, json, socket, sys\nfrom app.fetch import guard\nguard.install([])\n"
            f"PORT = {server.getsockname()[1]}\ntry:\n exec({attempt!r})\n"
            "except Exception as error:\n print(json.dumps(str(guard.refusal(error))))\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert "refused" in json.loads(run.stdout) or "XINGLIN_PRIVATE_NETWORKS" in run.stdout, run.stderr
        with pytest.raises(BlockingIOError):
            server.accept()
