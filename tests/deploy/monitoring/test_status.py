"""The state of a federation, as text, page and metrics; the page is looked at in a real browser."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.folders import ServerFolder, read_server_folder
from fedprompt.deploy.joining.node_side import make_request
from fedprompt.deploy.joining.server_side import approve
from fedprompt.deploy.monitoring import collect as module
from fedprompt.deploy.monitoring.collect import NodeStatus, RunStatus, Status, collect
from fedprompt.deploy.monitoring.serve import StatusSite
from fedprompt.deploy.monitoring.views import as_metrics, as_page, as_text
from fedprompt.deploy.new_federation import create_federation
from tests.support.federations import config_for

STATUS = Status(
    time="2026-11-29T12:00:00+00:00",
    running=True,
    nodes=[
        NodeStatus(0, "University of X", "online", "", "2027-11-29", "ab" * 32, {"flwr": "1.41"}),
        NodeStatus(1, "<script>alert(1)</script>", "offline", "2026-11-28 09:00", None, None, {}),
        NodeStatus(2, "", "registered", "", None, "none", {}),
    ],
    run=RunStatus(
        "/srv/runs/three_folders-fedrsclip-seed1", "three_folders", "fedrsclip", 50, 3, False, 7, 2,
        {
            "loss": [(1, 2.5), (2, 1.5), (3, 1.0)],
            "global accuracy": [(0, 0.5), (1, 0.6), (2, 0.7), (3, 0.8)],
            "personal accuracy": [],
        },
    ),
    disk_free_bytes=12_300_000_000,
    gpus=[],
)  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    create_federation(tmp_path / "federation", ["127.0.0.1"], nodes=1, port=9555, days=40)
    return read_server_folder(tmp_path / "federation" / "server")


def test_the_state_is_collected_from_what_others_write(
    server: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve(server, make_request(tmp_path / "node", "site"), tmp_path / "package.json")
    (server.path / "nodes.json").write_text(
        json.dumps({"0": {"key": "k", "node": 11}, "1": {"key": "l", "node": 12}})
    )
    rows = [
        {"node-id": "11", "status": "offline", "offline-at": "2026-11-28 09:00"},
        {"node-id": "12", "status": "online", "offline-at": "N/A"},
    ]
    monkeypatch.setattr(module, "listens", lambda _: True)
    listing = f"Listing...\n{json.dumps({'success': True, 'nodes': rows})}"
    monkeypatch.setattr(module, "run_flwr", lambda *_: listing)
    before = collect(server)
    assert before.run is None
    assert [(n.name, n.state, n.last_seen) for n in before.nodes] == [
        ("", "offline", "2026-11-28 09:00"),
        ("site", "online", ""),
    ]
    run = tmp_path / "run"
    run.mkdir()
    (server.path / "submitted").mkdir()
    submission = {"config": to_yaml(config_for(tmp_path, run)), "resume": ""}
    (server.path / "submitted" / "aa.json").write_text(json.dumps(submission))
    assert collect(server).run == RunStatus(
        str(run), "folders", "fedrsclip", 3, 0, False, 0, 0,
        {"loss": [], "global accuracy": [], "personal accuracy": []},
    )  # fmt: skip
    lines = [
        {"kind": "round", "round": 0, "clients": None, "train": None, "global": {"accuracy": 0.5}},
        {"kind": "round", "round": 1, "clients": {"sampled": 3, "accepted": 2},
         "train": {"loss": 2.0}, "global": None},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "rou'
    (run / "metrics.jsonl").write_text(text)
    site = {"policy": "ab" * 32, "audit": "cd" * 32, "round": 1, "versions": {"flwr": "1.41"}}
    (run / "sites.json").write_text(json.dumps({"1": site}))
    after = collect(server)
    assert after.run is not None
    assert (after.run.round, after.run.accepted, after.run.dropped) == (1, 2, 1)
    assert after.run.curves["global accuracy"] == [(0, 0.5)]
    assert after.run.curves["loss"] == [(1, 2.0)]
    assert after.nodes[1].policy == "ab" * 32
    assert after.nodes[1].versions == {"flwr": "1.41"}


def test_without_a_running_server_nothing_is_known_of_connections(server: ServerFolder) -> None:
    status = collect(replace(server, superlink_port=1))
    assert not status.running
    assert [n.state for n in status.nodes] == ["unknown"]


def test_text_names_everything() -> None:
    text = as_text(STATUS)
    for word in ("University of X", "offline since 2026-11-28", "2027-11-29", "round 3 of 50",
                 "7 updates accepted, 2 dropped", "12.3 GB", "flwr 1.41"):  # fmt: skip
        assert word in text


def test_metrics_are_in_prometheus_format() -> None:
    lines = as_metrics(STATUS).splitlines()
    assert 'fedprompt_node_online{client="0",name="University of X"} 1' in lines
    assert "fedprompt_up 1" in lines
    assert lines.count("# TYPE fedprompt_node_online gauge") == 1
    assert any(line.startswith("fedprompt_global_accuracy{") for line in lines)
    for line in lines:
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2
        if not line.startswith("# "):
            float(line.rsplit(" ", 1)[1])


def asked(site: StatusSite, path: str, method: str = "GET", host: str = "127.0.0.1:99") -> Any:
    """Status, headers and body of an answer."""
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"host", host.encode())]}
    asyncio.run(site(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


def test_the_site_only_shows_and_only_to_this_machine() -> None:
    site = StatusSite(lambda: STATUS)
    status, headers, body = asked(site, "/")
    assert status == 200
    assert b"default-src 'none'" in headers[b"content-security-policy"]
    assert "<script>alert" not in body
    assert json.loads(asked(site, "/status.json")[2])["run"]["round"] == 3
    assert asked(site, "/metrics")[0] == 200
    assert asked(site, "/", "HEAD")[2] == ""
    assert asked(site, "/", "POST")[0] == 405
    assert asked(site, "/other")[0] == 404
    assert asked(site, "/", host="evil.example.org")[0] == 403
    assert asked(site, "/", host="[::1]:99")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_into_a_window(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    # The browser tells the width of the content by the title, with the only script that it runs.
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    page.write_text(as_page(STATUS).replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    dumped = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True
    )
    shown = int(dumped.stdout.partition("<title>")[2].partition("</title>")[0])
    assert shown <= max(width, 500), "the page must not scroll sideways"  # Chromium's least: 500
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True)
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20, "the page is blank"
