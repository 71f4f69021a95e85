"""Which hosts and ports are accepted, and that mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedprompt.deploy.addresses import check_host, check_port, check_server
from fedprompt.deploy.folders import SETTINGS, read_node_folder, read_server_folder
from fedprompt.deploy.new_federation import create_federation
from fedprompt.errors import UserError


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("fed.example.org", "fed.example.org"),
        ("FED-1", "FED-1"),
        ("a_b.local", "a_b.local"),
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "::1"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("3com", "3com"),
    ],
)
def test_names_and_addresses_are_hosts(text: str, host: str) -> None:
    assert check_host(text, "--host") == host


@pytest.mark.parametrize(
    "text",
    [
        "", "a b; rm", "10.0.0", "10.0.0.300", "1.2.3.4.5", "-a", "a-", "a..b", "a.", "é.org",
        "a" * 64, "a.b" * 100, ":9092", "fe80::1%eth0", "[::1", "https://fed.org", "a\n", "0.0.0.0",
        "::", "[a]:9092",
    ],
)  # fmt: skip
def test_anything_else_is_not(text: str) -> None:
    with pytest.raises(UserError, match="--host"):
        check_host(text, "--host")


def test_a_host_with_a_port_is_explained() -> None:
    with pytest.raises(UserError, match="--port 9092"):
        check_host("10.0.0.7:9092", "--host")


def test_all_addresses_can_be_listened_on() -> None:
    assert [check_host(x, "--host", listens=True) for x in ("0.0.0.0", "::")] == ["0.0.0.0", "::"]


@pytest.mark.parametrize("port", [0, -1, 65536, 99999, True, "80", 1.5, None])
def test_impossible_ports_are_refused(port: object) -> None:
    with pytest.raises(UserError, match="65535"):
        check_port(port, "--port")


def test_a_servers_address_has_a_host_and_a_port() -> None:
    for text in ("fed:9092", "10.0.0.7:1", "[::1]:65535"):
        assert check_server(text, "--server") == text
    for text in ("fed", "fed:", ":9092", "fed:0", "fed:65536", "fed:x", "::1:9092", "fed:1:2"):
        with pytest.raises(UserError, match="--server"):
            check_server(text, "--server")


def test_a_federation_can_have_an_ipv6_address(tmp_path: Path) -> None:
    create_federation(tmp_path / "f", ["::1"], nodes=1, port=9092, days=1)
    assert read_node_folder(tmp_path / "f" / "node-0").server == "[::1]:9092"


@pytest.mark.parametrize(
    ("host", "port", "days", "named"),
    [
        ("10.0.0.7:9092", 9092, 1, "--host"),
        ("fed", 65536, 1, "--port"),
        ("fed", 8000, 1, "8000"),
        ("fed", 9092, 4_000_000, "--days"),
        ("fed", 9092, 0, "--days"),
    ],
)
def test_an_impossible_federation_is_not_begun(
    tmp_path: Path, host: str, port: int, days: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        create_federation(tmp_path / "f", [host], 1, port, days)
    assert not (tmp_path / "f").exists()


def test_a_folder_with_impossible_addresses_is_named(tmp_path: Path) -> None:
    path = tmp_path / SETTINGS
    path.write_text(json.dumps({"port": 9092, "superlink_port": 99999}))
    with pytest.raises(UserError, match=rf"{SETTINGS}: superlink_port is 99999"):
        read_server_folder(tmp_path)
    path.write_text(json.dumps({"server": "fed", "client": 0}))
    with pytest.raises(UserError, match=f"{SETTINGS}: server"):
        read_node_folder(tmp_path)
