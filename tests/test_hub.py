"""The hub is probed once; without a connection, its libraries are told so and the user too."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import httpx
import pytest
from huggingface_hub import constants

from fedprompt import hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A process that has not been told to stay offline, and the addresses that it probes."""
    probed: list[str] = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    hub.stay_offline_if_unreachable.cache_clear()
    yield probed
    hub.stay_offline_if_unreachable.cache_clear()


def test_a_hub_out_of_reach_is_probed_and_said_once(
    online: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(url: str, timeout: float) -> None:
        online.append(url)
        assert timeout <= 10
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", refuse)
    caplog.set_level(logging.WARNING)
    assert all(hub.stay_offline_if_unreachable() for _ in range(3))
    assert online == ["https://mirror.example"]
    assert constants.is_offline_mode()
    (record,) = caplog.records
    assert "https://mirror.example cannot be reached (ConnectError: no route)" in record.message


def test_a_hub_that_answers_anything_is_used(
    online: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(httpx, "head", lambda url, timeout: httpx.Response(403))
    assert not hub.stay_offline_if_unreachable()
    assert not constants.is_offline_mode()
    assert not caplog.records


def test_the_users_own_setting_costs_no_probe(
    online: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(httpx, "head", lambda *_, **__: pytest.fail("probed"))
    assert hub.stay_offline_if_unreachable()
