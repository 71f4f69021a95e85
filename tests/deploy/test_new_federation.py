"""Certificates, keys, settings and instructions of a new federation."""

from __future__ import annotations

import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedprompt.deploy.folders import public_keys, read_node_folder, read_server_folder
from fedprompt.deploy.new_federation import create_federation
from fedprompt.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("new") / "federation"
    create_federation(path, ["fed.example.org", "10.0.0.7"], nodes=3, port=9555, days=40)
    return path


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_authority_issues_the_servers_certificate(folder: Path) -> None:
    authority = certificate(folder / "authority" / "ca.crt")
    server = certificate(folder / "server" / "server.crt")
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.7"),
        ipaddress.ip_address("127.0.0.1"),
    ]
    assert 40 <= (server.not_valid_after_utc - server.not_valid_before_utc).days <= 41
    for k in range(3):
        assert certificate(folder / f"node-{k}" / "ca.crt") == authority
    constraints = server.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca


def test_every_node_has_a_key_pair_and_the_server_the_public_key(folder: Path) -> None:
    publics = public_keys(folder / "server")
    assert list(publics) == [0, 1, 2]
    seen = set()
    for client, path in publics.items():
        private = load_ssh_private_key((folder / f"node-{client}" / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key() == load_ssh_public_key(path.read_bytes())
        seen.add(path.read_text())
    assert len(seen) == 3


def test_secrets_are_readable_by_their_owner_only(folder: Path) -> None:
    secrets = [*folder.rglob("*.key")]
    assert len(secrets) == 5
    assert {stat.S_IMODE(p.stat().st_mode) for p in secrets} == {0o600}
    others = [p for p in folder.rglob("*") if p.is_file() and p not in secrets]
    assert not any(b"PRIVATE KEY" in p.read_bytes() for p in others)


def test_settings_are_read_back_and_the_instructions_are_complete(folder: Path) -> None:
    assert read_server_folder(folder / "server").port == 9555
    node = read_node_folder(folder / "node-2")
    assert (node.server, node.client) == ("fed.example.org:9555", 2)
    text = (folder / "README.md").read_text()
    assert "@" not in text
    assert text.count("fedprompt deploy node federation/node-") == 3


def test_other_folders_and_hosts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already contains"):
        create_federation(folder, ["a"], 1, 1, 1)
    with pytest.raises(UserError, match="--host"):
        create_federation(tmp_path / "new", ["a b; rm"], 1, 1, 1)
    with pytest.raises(UserError, match="fedprompt deploy init"):
        read_server_folder(tmp_path)
    (tmp_path / "federation.json").write_text('{"server": 3}')
    with pytest.raises(UserError, match=r"federation\.json is damaged"):
        read_node_folder(tmp_path)
