"""Certificates, keys, the app that is handed over, and the gate's rule."""

from __future__ import annotations

import ipaddress
import json
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.cli.config_utils import load_and_validate

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.bundle import write_bundle, write_run_config
from fedprompt.deploy.fleet_proxy import passes
from fedprompt.deploy.folders import init, public_keys, read_node_site, read_server
from fedprompt.deploy.node_config import Node, on_node
from fedprompt.deploy.submit import new_run
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from tests.support.builders import small_config
from tests.support.doc_pages import DOCS, blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site") / "federation"
    init(path, ["fed.example.org", "10.0.0.7"], nodes=3, port=9555, days=40)
    return path


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_servers_certificate_is_the_authoritys(folder: Path) -> None:
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


def test_every_node_has_a_key_and_the_server_its_public_half(folder: Path) -> None:
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


def test_settings_come_back_and_the_text_has_no_gap(folder: Path) -> None:
    assert read_server(folder / "server").port == 9555
    node = read_node_site(folder / "node-2")
    assert (node.server, node.client) == ("fed.example.org:9555", 2)
    text = (folder / "README.md").read_text()
    assert "@" not in text
    assert text.count("fedprompt deploy node federation/node-") == 3


def test_folders_that_are_not_ours_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a federation"):
        init(folder, ["a"], 1, 1, 1)
    with pytest.raises(UserError, match="is no host name or address"):
        init(tmp_path / "new", ["a b; rm"], 1, 1, 1)
    with pytest.raises(UserError, match="from 'fedprompt deploy init'"):
        read_server(tmp_path)
    (tmp_path / "federation.json").write_text('{"server": 3}')
    with pytest.raises(UserError, match="is damaged"):
        read_node_site(tmp_path)


def test_the_app_that_is_handed_over_has_no_code_of_its_own(tmp_path: Path) -> None:
    write_bundle(tmp_path / "app")
    config, warnings = load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert warnings == []
    components = config["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}
    code = [p.read_text() for p in (tmp_path / "app").rglob("*.py")]
    statements = {line for text in code for line in text.splitlines() if line and '"""' not in line}
    assert statements == {
        "from fedprompt.deploy.client_app import app",
        "from fedprompt.deploy.server_app import app",
        '__all__ = ["app"]',
    }


def test_an_experiment_survives_the_way_through_flowers_run_config(tmp_path: Path) -> None:
    config = small_config(
        data={"templates": ['an "aerial" image\\of a {}, ünïcödé 🛰'], "title": "t"}
    )
    path = tmp_path / "run.toml"
    write_run_config(path, {"config": to_yaml(config), "run": "r"})
    read = tomllib.loads(path.read_text(encoding="utf-8"))
    assert parse(read["config"]) == config


def test_what_is_no_experiment_is_one_line() -> None:
    for text in ("a: [", "- 1", "method: {name: nothing}", "data: !!python/object:os.system {}"):
        with pytest.raises(UserError, match="config:"):
            parse(text)


def test_the_documentations_experiment_is_one_for_nodes(tmp_path: Path) -> None:
    (text,) = (b.text for b in blocks(DOCS / "deployment.md") if b.language == "yaml")
    (tmp_path / "experiment.yaml").write_text(text)
    config = compose(str(tmp_path / "experiment.yaml"), [])
    there = on_node(new_run(config), Node(2, "/srv/images"))
    assert there.data.folders == ["", "", "/srv/images"]
    assert there.data.root is None


@pytest.mark.parametrize(
    ("path", "let_through"),
    [
        ("/v1/fleet/pull-messages", True),
        ("/v1/fleet/push-object", True),
        ("/v1/control/start-run", False),
        ("/v1/control/register-node", False),
        ("/v1/runtime/acquire-task", False),
        ("/v1/fleet/../control/start-run", False),
        ("/v1/fleet/%2e%2e/control/start-run", False),
        ("/v1/fleet//control", False),
        ("/v1/fleet/", False),
        ("/docs", False),
        ("/", False),
    ],
)
def test_the_gate_lets_through_what_nodes_ask(path: str, let_through: bool) -> None:
    assert passes(path) is let_through


def test_a_key_is_registered_for_one_client(folder: Path) -> None:
    from fedprompt.deploy.submit import KEYED, keyed

    site = read_server(folder / "server")
    assert keyed(site) == {}
    (site.folder / KEYED).write_text(json.dumps({"1": {"key": "k", "node": 77}}))
    assert keyed(site) == {77: 1}
    (site.folder / KEYED).unlink()
