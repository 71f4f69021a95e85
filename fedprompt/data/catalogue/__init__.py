"""The catalogue of published data sets: one YAML file of facts per data set, `<name>.yaml` here.

An entry states what the data set contains (images, pixel size, classes in label order), who made it
and under which licence, where its split comes from, where it is on the Hugging Face hub, and how
the authors' folder is laid out. It is the only place for these facts: `data=<name>` selects an
entry, and the loaders in `data/sources` read it before the first round. Where a copy of the data
set defines the classes itself (`classes_from`), the loader reads them from the copy.

A fact that could not be checked against its source is marked `verified: false` or has a remark.
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
    """The publication to cite."""

    authors: str
    title: str
    venue: str
    year: int


@dataclass(frozen=True)
class Split:
    """Where training and test images come from, and their numbers where these are known.

    Attributes:
        kind: `official` for the authors' split; `hold-out` where there is none, so that a seeded
            `data.test_fraction` of each class is held out; `test only` where all images are test
            images.
        source: where the split is documented.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
    """

    kind: Literal["official", "hold-out", "test only"]
    source: str
    train: int | None = None
    val: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Hub:
    """A copy on the Hugging Face hub: its id, splits and columns.

    Attributes:
        id: the data set's id, `owner/name`.
        config: the data set's configuration on the hub, if it has several.
        revision: a branch, tag or commit; None for the default.
        train: name of the split with training images, or None.
        test: name of the split with test images, or None.
        image: name of the column with images.
        label: name of the column with labels.
        domain: name of the column with domains, or None.
        ignore: classes whose rows are skipped.
        verified: whether id and columns were read from a stored copy of the data set card. No entry
            was tried on the live hub.
        remark: what a user should know about this copy.
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

    Attributes:
        name: name of the entry and of its file.
        title: the data set's name as its authors write it.
        kind: `remote sensing` or `natural`.
        images: number of images.
        size: width and height in pixels, as text.
        num_classes: number of classes.
        templates: hand-written prompts with `{}` in place of the class name.
        templates_source: where the templates come from.
        split: where training and test images come from.
        licence: the licence of the images.
        cite: the publication to cite.
        homepage: the authors' page.
        download: what to download, for the user.
        layout: how the unpacked folder is read.
        classes: from the authors' name of a class (usually a folder) to the name used in prompts,
            in label order. It is empty where `classes_from` is given.
        spellings: other names of class folders in copies that are in circulation, and the authors'.
        classes_from: what in the copy defines the classes.
        class_style: how names that the copy defines are made readable.
        metres_per_pixel: ground resolution, as text.
        domains: from the authors' names of the domains to ours.
        superclasses: from a superclass to the names of its classes.
        hub: the copy on the Hugging Face hub, if there is one.
        coop_split: the split file of CoOp, if there is one.
        verified: whether the facts were checked against their source.
        remarks: what a user should know about the data set.
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
    spellings: Mapping[str, str] = field(default_factory=dict)
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
    """Return the names of all entries, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


@cache
def entry(name: str) -> Entry:
    """Read the entry of a data set.

    Args:
        name: name of the entry, e.g. `eurosat`.

    Returns:
        The entry. It is cached and shared by all callers.

    Raises:
        UserError: there is no such entry; the message contains the nearest name.
    """
    if name not in names():
        raise UserError(f"data: no '{name}' in the catalogue.{did_you_mean(name, names())}")
    raw = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return parse(name, raw)


def parse(name: str, raw: Mapping[str, Any]) -> Entry:
    """Build an `Entry` from the plain mapping of its file.

    Args:
        name: name of the entry.
        raw: content of its YAML file.

    Raises:
        KeyError: `split` or `cite` is missing.
        TypeError: another key is missing, or a key is unknown.
    """
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
        # YAML reads a key such as 3 as a number, and a name that stays as it is has no value.
        values[key] = {str(theirs): str(ours or theirs) for theirs, ours in pairs}
    groups = values.get("superclasses", {}).items()
    values["superclasses"] = {str(group): tuple(members) for group, members in groups}
    return Entry(name=name, **values)


def data_keys(name: str) -> dict[str, Any]:
    """Return the keys of a config's `data` section that select this entry."""
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
    """Convert an entry to nested dicts and lists for display; empty fields are omitted."""
    plain: dict[str, Any] = _filled(dataclasses.asdict(found))
    return plain


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        filled = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item not in ("", [], {}, None)}
    return list(value) if isinstance(value, tuple) else value
