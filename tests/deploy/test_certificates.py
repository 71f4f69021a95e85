"""Dates of certificates and clocks: said weeks before, named at the start, and renewed."""

from __future__ import annotations

import datetime
import shutil
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedprompt.cli.main import app
from fedprompt.deploy import diagnosis
from fedprompt.deploy.credentials import hosts_of, validity, write_authority
from fedprompt.deploy.credentials import write_server_certificate as issue
from fedprompt.deploy.diagnosis import find_fault
from fedprompt.deploy.expiry import Expiry, expires_soon
from fedprompt.deploy.folders import read_node_folder, read_server_folder
from fedprompt.deploy.local import LocalFederation
from fedprompt.deploy.new_federation import AUTHORITY_DAYS, create_federation
from fedprompt.deploy.processes import free_port
from fedprompt.deploy.supervise import run_node, serve
from fedprompt.errors import UserError

HOSTS = ["fed.example.org", "localhost", "127.0.0.1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificates") / "federation"
    create_federation(path, HOSTS[:1], nodes=2, port=free_port(), days=40)
    return path


@pytest.fixture
def federation(made: Path, tmp_path: Path) -> Path:
    """A federation that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "federation"))


class Clock:
    """A clock that a test sets, in days from now."""

    days = 0.0

    def __call__(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=self.days)


def test_a_certificate_that_expires_soon_is_mentioned_once_a_day(made: Path) -> None:
    clock, lines = Clock(), list[str]()
    expiry = Expiry([made / "server" / "server.crt"], lines.append, clock)
    expiry.check()
    assert lines == []
    for clock.days in (20.0, 20.5, 21.1):
        expiry.mention()
    assert [line.partition(", in ")[2][:2] for line in lines] == ["19", "18"]
    assert all("server.crt" in line and "deploy renew" in line for line in lines)


@pytest.mark.parametrize(("days", "words"), [(41.0, "deploy renew"), (-1.0, "clock")])
def test_a_certificate_is_refused_outside_its_dates(made: Path, days: float, words: str) -> None:
    clock = Clock()
    clock.days = days
    with pytest.raises(UserError, match=rf"server\.crt.*{words}"):
        Expiry([made / "server" / "server.crt"], print, clock).check()


def test_neither_side_starts_with_an_expired_certificate(federation: Path) -> None:
    issue(federation / "authority", federation / "server", HOSTS, days=0)
    with pytest.raises(UserError, match=r"server\.crt has expired"):
        serve(read_server_folder(federation / "server"), "127.0.0.1")
    write_authority(federation / "node-0", 0)
    with pytest.raises(UserError, match=r"ca\.crt has expired"):
        run_node(read_node_folder(federation / "node-0"), {}, None)
    assert not list(federation.rglob("*.log"))


def test_a_local_federation_renews_its_own_certificate(federation: Path) -> None:
    path = federation / "server" / "server.crt"
    before = path.read_bytes()
    with LocalFederation(federation, 2):
        assert path.read_bytes() == before
    issue(federation / "authority", federation / "server", HOSTS, days=0)
    with LocalFederation(federation, 2):
        assert not expires_soon(path)


def test_a_damaged_certificate_is_named(federation: Path) -> None:
    path = federation / "server" / "server.crt"
    path.write_text("nothing")
    for read in (validity, hosts_of):
        with pytest.raises(UserError, match=r"server\.crt"):
            read(path)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_renew_issues_the_same_certificate_with_new_dates(federation: Path) -> None:
    server, authority = federation / "server", federation / "authority" / "ca.crt"
    before, old_authority = certificate(server / "server.crt"), authority.read_bytes()
    done = CliRunner().invoke(app, ["deploy", "renew", str(federation), "--days", "500"])
    assert done.exit_code == 0, done.output
    assert "server.crt" in done.output
    after = certificate(server / "server.crt")
    assert (after.not_valid_after_utc - before.not_valid_after_utc).days >= 459
    assert hosts_of(server / "server.crt") == HOSTS
    after.verify_directly_issued_by(certificate(authority))
    assert authority.read_bytes() == old_authority
    assert "node" not in done.output
    assert (server / "server.key").stat().st_mode & 0o777 == 0o600


def test_renew_issues_the_authority_again_when_it_would_expire_first(federation: Path) -> None:
    authority = federation / "authority" / "ca.crt"
    before = certificate(authority)
    days = str(AUTHORITY_DAYS + 100)
    done = CliRunner().invoke(app, ["deploy", "renew", str(federation), "--days", days])
    assert done.exit_code == 0, done.output
    assert "every node's folder" in " ".join(done.output.split())
    after = certificate(authority)
    assert after.public_key() == before.public_key()
    assert after.not_valid_after_utc > before.not_valid_after_utc
    for folder in ("server", "node-0", "node-1"):
        assert certificate(federation / folder / "ca.crt") == after
    certificate(federation / "server" / "server.crt").verify_directly_issued_by(after)


@pytest.mark.parametrize("missing", ["authority/ca.key", "server/server.crt"])
def test_renew_needs_the_authority_and_the_certificate(federation: Path, missing: str) -> None:
    (federation / missing).unlink()
    done = CliRunner().invoke(app, ["deploy", "renew", str(federation)])
    assert isinstance(done.exception, UserError)
    assert str(federation / missing.partition("/")[0]) in str(done.exception)
    done = CliRunner().invoke(app, ["deploy", "renew", str(federation), "--days", "4000000"])
    assert "--days" in str(done.exception)


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)  # this writes the date, as the fleet proxy does
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class _Quiet(HTTPServer):
    def handle_error(self, *_: object) -> None: ...


@contextmanager
def listening(folder: Path) -> Iterator[str]:
    """A server with the certificate in this folder; yields its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with _Quiet(("127.0.0.1", 0), _Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [(0, None), (30, "30 s ahead"), (-200, None), (-400, "400 s behind")],
)
def test_clocks_that_differ_are_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: int, words: str | None
) -> None:
    with listening(made / "server") as address:
        # The server's date has whole seconds, so the two differ by up to a second more.
        clock = SimpleNamespace(time=lambda: theirs + ahead_s)
        theirs = 0.0

        def parsed(date: str) -> datetime.datetime:
            assert date
            return datetime.datetime.fromtimestamp(theirs, datetime.UTC)

        monkeypatch.setattr(diagnosis, "parsedate_to_datetime", parsed)
        monkeypatch.setattr(diagnosis, "time", clock)
        fault = find_fault(address, made / "node-0" / "ca.crt")
    assert (fault is None) if words is None else (fault is not None and words in fault)


@pytest.mark.parametrize("why", ["expired", "other host", "other authority"])
def test_the_reason_of_a_rejected_certificate_is_named(federation: Path, why: str) -> None:
    if why == "expired":
        issue(federation / "authority", federation / "server", HOSTS, days=0)
    elif why == "other host":
        issue(federation / "authority", federation / "server", ["fed"], days=1)
    else:
        write_authority(federation / "node-0", 1)
    words = {"expired": "renew", "other host": "127.0.0.1", "other authority": "ca.crt"}[why]
    with listening(federation / "server") as address:
        fault = find_fault(address, federation / "node-0" / "ca.crt")
    assert fault is not None
    assert words in fault


def test_a_server_that_does_not_answer_is_no_fault(made: Path) -> None:
    assert find_fault(f"127.0.0.1:{free_port()}", made / "node-0" / "ca.crt") is None
