"""The catalogue of published data sets: one YAML file of facts per set, `<name>.yaml` here.

An entry says what the set holds (images, pixels, classes in label order), who made it and under
which licence, how its split came about, where it is on the Hugging Face hub, and how the authors'
folder is laid out. It is the only place for these facts: `data=<name>` selects it, and the loaders
read it. Class lists that a copy of the set defines itself (`classes_from`) are read from there.

What could not be checked against the source says `verified: false` or has a remark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from fedprompt.errors import UserError, did_you_mean

HERE = Path(__file__).parent
Kind = Literal["remote sensing", "natural"]


@dataclass(frozen=True)
class Citation:
    """What to cite."""

    authors: str
    title: str
    venue: str
    year: int


@dataclass(frozen=True)
class Split:
    """Where train and test come from, and how many images each has, where that is known.

    `official`: the authors' own; `hold-out`: there is none, `data.test_fraction` of each class is
    held out, seeded; `test only`: all images are test images.
    """

    kind: Literal["official", "hold-out", "test only"]
    source: str
    train: int | None = None
    val: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Hub:
    """A copy on the Hugging Face hub: its id, splits and columns.

    Rows of the classes in `ignore` are left out. `verified` is true where the id and its columns
    were read from a stored copy of the data set card; no entry was tried on the live hub.
    """

    id: str
    config: str | None = None
    revision: str | None = None
    train: str | None = "train"
    test: str | None = None
    image: str = "image"
    label: str = "label"
    domain: str | None = None
    ignore: tuple[str, ...] = ()
    verified: bool = False
    remark: str = ""


@dataclass(frozen=True)
class CoopSplit:
    """The split file of CoOp (K. Zhou et al., IJCV 2022), with its counts from the paper."""

    file: str
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Entry:
    """The facts about one data set.

    `classes` maps the authors' name of a class (a folder, mostly) to the name used in prompts, in
    label order; it is empty where `classes_from` says what in the copy defines them. `class_style`
    then tells how such names are made readable. `domains` maps the authors' names of the domains
    to ours. `superclasses` groups class names. `size` is in pixels, `metres_per_pixel` on the
    ground. `download` says what to fetch, `layout` how the unpacked folder is read.
    """

    name: str
    title: str
    kind: Kind
    images: int
    size: str
    num_classes: int
    templates: tuple[str, ...]
    templates_source: str
    split: Split
    licence: str
    cite: Citation
    homepage: str
    download: str
    layout: Mapping[str, Any]
    classes: Mapping[str, str] = field(default_factory=dict)
    classes_from: str = ""
    class_style: Literal["plain", "readable", "capitals", "place", "year first"] = "plain"
    metres_per_pixel: str = ""
    domains: Mapping[str, str] = field(default_factory=dict)
    superclasses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hub: Hub | None = None
    coop_split: CoopSplit | None = None
    verified: bool = True
    remarks: tuple[str, ...] = ()


def names() -> list[str]:
    """Names of all entries, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


@cache
def entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UserError: no such entry.
    """
    if name not in names():
        raise UserError(f"data: no '{name}' in the catalogue.{did_you_mean(name, names())}")
    raw = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return parse(name, raw)


def parse(name: str, raw: Mapping[str, Any]) -> Entry:
    """An `Entry` from the plain mapping of its file; a `TypeError` for a missing or unknown key."""
    values = dict(raw)
    values["split"] = Split(**values["split"])
    values["cite"] = Citation(**values["cite"])
    for key in ("templates", "remarks"):
        values[key] = tuple(values.get(key, ()))
    if "hub" in values:
        hub = dict(values["hub"])
        values["hub"] = Hub(**{**hub, "ignore": tuple(hub.get("ignore", ()))})
    if "coop_split" in values:
        values["coop_split"] = CoopSplit(**values["coop_split"])
    for key in ("classes", "domains"):
        pairs = values.get(key, {}).items()
        values[key] = {str(theirs): str(ours or theirs) for theirs, ours in pairs}
    groups = values.get("superclasses", {}).items()
    values["superclasses"] = {str(group): tuple(members) for group, members in groups}
    return Entry(name=name, **values)


def data_keys(name: str) -> dict[str, Any]:
    """The `data` section of a config that selects this entry."""
    found = entry(name)
    hub = found.hub
    keys: dict[str, Any] = {
        "source": "catalogue",
        "dataset": name,
        "title": name,
        "templates": list(found.templates),
    }
    if hub is not None:
        keys |= {
            "hub_id": hub.id,
            "hub_config": hub.config,
            "hub_revision": hub.revision,
            "train_split": hub.train,
            "test_split": hub.test,
            "image_column": hub.image,
            "label_column": hub.label,
            "domain_column": hub.domain,
        }
    return keys


def facts(found: Entry) -> dict[str, Any]:
    """The entry as plain nested dicts and lists without what is empty, for display."""
    plain: dict[str, Any] = _filled(dataclasses.asdict(found))
    return plain


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        filled = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item not in ("", [], {}, None)}
    return list(value) if isinstance(value, tuple) else value
