"""Which calls of the SuperLink the fleet proxy forwards."""

from __future__ import annotations

import pytest

from fedprompt.deploy.fleet_proxy import is_fleet_call


@pytest.mark.parametrize(
    ("path", "forwarded"),
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
def test_only_calls_of_the_fleet_api_are_forwarded(path: str, forwarded: bool) -> None:
    assert is_fleet_call(path) is forwarded
