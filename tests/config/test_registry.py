"""Things of other distributions are found by name, and cannot replace or break those of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.config.registry import Registry
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols import PROTOCOLS
from fedprompt.federation.registry import STRATEGIES
from fedprompt.methods.registry import METHODS
from tests.support.distributions import write_distribution

CODE = """
from fedprompt.methods.promptfl import PromptFL


class Ours(PromptFL):
    name = "paper_method"


class Other(PromptFL):
    name = "another"


class Nothing:
    name = "nothing"
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A paper's distribution, with good and bad entry points."""
    references = {
        "paper_method": "paper_code:Ours",
        "wrong_name": "paper_code:Other",
        "nothing": "paper_code:Nothing",
        "broken": "paper_code_that_is_missing:Method",
        "promptfl": "paper_code:Ours",
    }
    write_distribution(
        tmp_path, "paper-code", {"paper_code.py": CODE}, {"fedprompt.methods": references}
    )
    monkeypatch.syspath_prepend(tmp_path)
    return


def test_an_entry_point_is_found_by_its_name(packages: None) -> None:
    assert "paper_method" in METHODS.names()
    assert METHODS.get("paper_method").__module__ == "paper_code"
    assert "paper_method" in METHODS.added()


def test_an_entry_point_cannot_replace_a_shipped_method(packages: None) -> None:
    assert METHODS.get("promptfl").__module__ == "fedprompt.methods.promptfl"
    assert METHODS.names().count("promptfl") == 1
    assert "promptfl" not in METHODS.added()


@pytest.mark.parametrize("name", ["wrong_name", "nothing", "broken"])
def test_a_bad_entry_point_is_named(packages: None, name: str) -> None:
    with pytest.raises(UserError, match=name):
        METHODS.get(name)


@pytest.mark.parametrize("registry", [METHODS, STRATEGIES, PROTOCOLS], ids=lambda r: r.kind)
def test_names_agree_with_the_classes(registry: Registry[object]) -> None:
    for name, item in registry.all().items():
        assert item.__dict__["name"] == name
    with pytest.raises(UserError, match="no_such_thing"):
        registry.get("no_such_thing")
