"""Files of common labels: several sources of images, and how their classes map to one label list.

    sources: [patternnet, resisc45]      names of the catalogue; or, for any other source of images,
                                         a mapping from a name to a `data` section
    if_present: [resisc45]               of these, those used only where their folder exists
    on_request: [resisc45]               of these, those used only if `data.domains` names them
    labels:
      parking area: {patternnet: [parking lot, parking space], resisc45: [parking lot]}
    left_out: {resisc45: [palace]}       classes without a label; their images are not used

Every class of a source must stand under exactly one label or under `left_out`, so that a class is
never forgotten. A file is checked against the class lists that are known without reading anything,
before a run opens a folder, and against those of the opened sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprompt.config.as_typed import typed_text
from fedprompt.config.schema import DataConfig
from fedprompt.config.shipped import load_yaml, merge, refuse_unknown
from fedprompt.data.catalogue import entry
from fedprompt.data.class_names import refuse_invisible
from fedprompt.data.images import name_key
from fedprompt.data.sections import resolve_group
from fedprompt.data.sources.registry import build_data, source_class, source_keys
from fedprompt.errors import UserError, did_you_mean

HERE = Path(__file__).parents[1] / "common_labels"
KEYS = ("sources", "if_present", "on_request", "labels", "left_out")
Classes = Mapping[str, tuple[str, ...]]
"""Classes by source."""


@dataclass(frozen=True)
class CommonLabels:
    """A file of common labels.

    Attributes:
        file: the file, for messages.
        sources: the sources in order, each with the keys of its `data` section. An entry of the
            catalogue that is only named has none.
        classes: the classes that each common label stands for, `classes[label][source]`.
        if_present: the sources that are used only where their folder exists.
        on_request: the sources that are used only if `data.domains` names them.
        left_out: the classes of each source whose images are not used.
    """

    file: Path
    sources: Mapping[str, Mapping[str, Any]]
    classes: Mapping[str, Classes]
    if_present: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()
    left_out: Classes = field(default_factory=dict)

    def labels_of(self, sources: Sequence[str]) -> tuple[str, ...]:
        """The labels, in order, under which at least one of these sources has a class."""
        return tuple(n for n, by_source in self.classes.items() if set(sources) & set(by_source))

    def label_of(self, source: str) -> dict[str, str]:
        """The label of each class of a source that has one."""
        return {theirs: n for n, of in self.classes.items() for theirs in of.get(source, ())}

    def check_classes(self, source: str, class_names: Sequence[str]) -> None:
        """Refuse a source whose classes are not the ones that the file assigns.

        Args:
            source: name of the source.
            class_names: all its classes.

        Raises:
            UserError: the file names a class that the source does not have, or the source has one
                that the file does not mention; the message names it and the file.
        """
        mentioned = [*self.label_of(source), *self.left_out.get(source, ())]
        for name in mentioned:
            if name not in class_names:
                hint = did_you_mean(name, class_names)
                raise _problem(self.file, f"source '{source}' has no class '{name}'.{hint}")
        missing = [name for name in class_names if name not in mentioned]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise _problem(
                self.file,
                f"class '{missing[0]}'{more} of source '{source}' has no label; put it under a "
                f"label, or under left_out.{source}.",
            )


def names() -> list[str]:
    """The names of all shipped files of common labels, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def read(name: str) -> CommonLabels:
    """Read and check a file of common labels.

    Args:
        name: one of `names()`, or the path of a file that ends in `.yaml` or `.yml`.

    Returns:
        The file's content.

    Raises:
        UserError: there is no such file, or it is wrong; the message names the file and the key,
            source or class.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
    elif name in names():
        file = HERE / f"{name}.yaml"
    else:
        raise UserError(f"no list of common labels '{name}'.{did_you_mean(name, names())}")
    raw = load_yaml(file, "common labels")
    refuse_unknown(raw, KEYS, f"common labels {file}")
    sources = _sources(raw.get("sources"), file)
    labels = raw.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise _problem(file, "'labels' must list labels, each with the classes of its sources.")
    common = CommonLabels(
        file,
        sources,
        {_text(n): _classes(of, f"label '{_text(n)}'", sources, file) for n, of in labels.items()},
        _chosen(raw, "if_present", sources, file),
        _chosen(raw, "on_request", sources, file),
        _classes(raw.get("left_out", {}), "left_out", sources, file),
    )
    _check_unique(common)
    if set(sources) <= {*common.if_present, *common.on_request}:
        raise _problem(file, "no source is always used: all are in if_present or on_request.")
    for source, section in sources.items():
        known = _known_classes(source, section)
        if known is not None:
            common.check_classes(source, known)
    return common


def _problem(file: Path, what: str) -> UserError:
    return UserError(f"common labels {file}: {what}")


def _text(value: Any) -> str:
    """A name as typed; YAML alone would read a class called `yes` or `001` as something else."""
    return str(value)


def _sources(value: Any, file: Path) -> dict[str, Mapping[str, Any]]:
    """The sources with the complete keys of their `data` sections."""
    if isinstance(value, Mapping):
        sections = {_text(name): section or {} for name, section in value.items()}
    elif isinstance(value, list):
        sections = {_text(name): {} for name in value}
        if len(sections) < len(value):
            raise _problem(file, "'sources' names a source twice.")
    else:
        sections = {}
    if not sections:
        raise _problem(file, "'sources' must be a list of names of the catalogue, or a mapping.")
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise _problem(file, f"source '{name}' is {typed_text(section)}, not a data section.")
        if not section:
            entry(name)  # refuses a name that the catalogue does not have
            continue
        sections[name] = merge({"title": name}, resolve_group("data", section))
        if str(sections[name].get("source")) == "multi":
            raise _problem(file, f"source '{name}' has common labels itself; list its sources.")
        try:
            config = _config(name, sections[name])
        except UserError as error:
            raise _problem(file, str(error).removeprefix("config: ")) from None
        if config.multi_label:
            raise _problem(
                file,
                f"images of source '{name}' have several labels each, and a common label is one "
                "per image; leave the source out.",
            )
    return sections


def _chosen(
    raw: Mapping[str, Any], key: str, sources: Mapping[str, Any], file: Path
) -> tuple[str, ...]:
    """A list of some of the sources."""
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise _problem(file, f"'{key}' is {typed_text(value)}; it must be a list of sources.")
    chosen = tuple(map(_text, value))
    for name in chosen:
        _check_source(name, f"'{key}'", sources, file)
    return chosen


def _classes(
    value: Any, where: str, sources: Mapping[str, Any], file: Path
) -> dict[str, tuple[str, ...]]:
    """The classes of each source, of one label or of `left_out`."""
    if not isinstance(value, Mapping):
        raise _problem(file, f"{where} is {typed_text(value)}; it must be {{source: [classes]}}.")
    found = {}
    for source, theirs in value.items():
        _check_source(_text(source), where, sources, file)
        if not isinstance(theirs, list) or not theirs:
            raise _problem(
                file, f"{where}: '{source}' is {typed_text(theirs)}; it must be a list of classes."
            )
        found[_text(source)] = tuple(map(_text, theirs))
    if where != "left_out" and not found:
        raise _problem(file, f"{where} stands for no class.")
    return found


def _check_source(name: str, where: str, sources: Mapping[str, Any], file: Path) -> None:
    if name not in sources:
        hint = did_you_mean(name, list(sources))
        raise _problem(file, f"{where} names '{name}', which is not in 'sources'.{hint}")


def _check_unique(common: CommonLabels) -> None:
    """Refuse labels that differ in spelling only, and a class that is mentioned twice."""
    refuse_invisible(tuple(common.classes), f"common labels {common.file}")
    spelled: dict[str, str] = {}
    for label in common.classes:
        other = spelled.setdefault(name_key(label), label)
        if other != label:
            raise _problem(common.file, f"labels '{other}' and '{label}' differ in spelling only.")
    places = [(f"label '{label}'", of) for label, of in common.classes.items()]
    seen: dict[tuple[str, str], str] = {}
    for where, by_source in [*places, ("left_out", common.left_out)]:
        for source, theirs in by_source.items():
            for name in theirs:
                if (source, name) in seen:
                    raise _problem(
                        common.file,
                        f"class '{name}' of source '{source}' stands twice: under "
                        f"{seen[source, name]} and under {where}.",
                    )
                seen[source, name] = where


def _config(name: str, section: Mapping[str, Any]) -> DataConfig:
    """The config of a source, of which the folder below `data.root` is not known yet."""
    has_root = "root" in source_keys(str(section.get("source")))
    placeholder = {"root": name} if has_root and not section.get("root") else {}
    return build_data({**section, **placeholder}, f"source '{name}'")


def _known_classes(name: str, section: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes of a source, if they are known before it is opened."""
    if not section:
        return tuple(entry(name).classes.values()) or None
    config = _config(name, section)
    return source_class(config.source).known_classes(config)
