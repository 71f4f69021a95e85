"""Reads images, split and class names of a published data set from its authors' folder.

Used by the source `catalogue` and by `fedprompt data check`. If CoOp's split file lies beside the
images and `data.split` allows it, it decides split and label order; otherwise the authors' split
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fedprompt.data.catalogue import Entry
from fedprompt.data.images import name_key, readable_name
from fedprompt.data.sources.parts import coop_split
from fedprompt.data.sources.parts.layouts import Copy, Listing, capitals, read_layout
from fedprompt.errors import UserError, did_you_mean


def open_copy(entry: Entry, root: str | Path, domains: Sequence[str] = ()) -> Copy:
    """Describe a folder as a copy of a published data set, without reading it.

    Args:
        entry: the catalogue's entry of the data set.
        root: the folder; `~` stands for the home folder.
        domains: the domains to read, by the catalogue's names or the authors'; empty = all.

    Returns:
        The copy.

    Raises:
        UserError: the data set has no such domain.
    """
    return Copy(entry, Path(root).expanduser(), _domains(entry, domains))


def list_copy(copy: Copy, split: str = "auto") -> tuple[Listing, str, bool]:
    """List the images of a copy without opening them.

    Args:
        copy: the folder.
        split: `coop` requires CoOp's split file, `official` ignores it, and `auto` uses it if it
            is in the folder.

    Returns:
        The listing, a description of the split for messages, and whether it is CoOp's split.

    Raises:
        UserError: the folder is not laid out as published, or a required split file is missing.
    """
    entry = copy.entry
    path = None if split == "official" else _coop_file(copy, split == "coop")
    if path is None:
        listing = read_layout(copy)
    else:
        listing = coop_split.read_split(path, copy.images_folder(entry.layout["images"]))
    _check_paths(listing, copy)
    return listing, entry.split.kind if path is None else f"CoOp's {path.name}", path is not None


def number_classes(
    listing: Listing, copy: Copy, *, by_name: bool
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Decide the label of each class of a listing.

    Args:
        listing: the images of the copy.
        copy: the folder that was listed.
        by_name: whether classes are numbered in the order of the catalogue's class list, if it has
            one, instead of the order of the listing.

    Returns:
        Class names in label order, and the label of each class key.

    Raises:
        UserError: a class is unknown or missing, or there are too many or too few.
    """
    entry = copy.entry
    if not (entry.classes and by_name):
        if len(listing.keys) != entry.num_classes:
            raise copy.problem(f"{len(listing.keys)} classes instead of {entry.num_classes}")
        names = tuple(_spelled(key, listing, entry) for key in listing.keys)
        return names, {key: label for label, key in enumerate(listing.keys)}
    by_key = {name_key(theirs): label for label, theirs in enumerate(entry.classes)}
    by_key |= {name_key(other): by_key[name_key(own)] for other, own in entry.spellings.items()}
    label_of: dict[str, int] = {}
    for key in listing.keys:
        label = by_key.get(name_key(key))
        if label is None:
            hint = did_you_mean(key, list(entry.classes))
            raise copy.problem(f"class '{key}' is not one of the {entry.num_classes}.{hint}")
        label_of[key] = label
    present = set(label_of.values())
    missing = [name for label, name in enumerate(entry.classes) if label not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise copy.problem(f"class '{missing[0]}'{more} missing")
    return tuple(entry.classes.values()), label_of


def class_name(theirs: str, entry: Entry) -> str:
    """Make the authors' name of a class readable, in the style that the entry states.

    Args:
        theirs: the authors' name.
        entry: the catalogue's entry; its `class_style` says how the authors write names.

    Returns:
        The name used in prompts.
    """
    if entry.class_style == "readable":
        return readable_name(theirs)
    if entry.class_style == "capitals":
        return " ".join(capitals(theirs))
    if entry.class_style == "place" and "/" in theirs:  # 'a/apse/indoor' -> 'indoor apse'
        return " ".join(reversed(theirs.split("/")[1:])).replace("_", " ")
    # As in CoOp's prompts: 'Audi TT RS Coupe 2012' -> '2012 Audi TT RS Coupe'.
    if entry.class_style == "year first":
        model, _, year = theirs.rpartition(" ")
        return f"{year} {model}".strip()
    return theirs.replace("_", " ")


def _spelled(key: str, listing: Listing, entry: Entry) -> str:
    """The name of a class: the entry's if it lists the class, else the copy's, made readable."""
    theirs = listing.names.get(key, key)
    # CoOp's split files contain names for prompts, the authors' folders the authors' names.
    spellings = {name_key(name): name for name in entry.classes.values()}
    spellings |= {name_key(name): ours for name, ours in entry.classes.items()}
    if name_key(theirs) in spellings:
        return spellings[name_key(theirs)]
    return theirs.replace("_", " ") if key in listing.names else class_name(theirs, entry)


def _coop_file(copy: Copy, required: bool) -> Path | None:
    coop = copy.entry.coop_split
    if coop is None:
        if required:
            raise UserError(
                f"data: data.split=coop: CoOp has no split file for {copy.entry.name}; leave "
                "data.split out."
            )
        return None
    images = copy.images_folder(copy.entry.layout["images"])
    # CoOp's instructions put the file beside the folder of images. Users may set `data.root` to
    # either of the two folders.
    path = coop_split.find_split(coop.file, (copy.root, images, images.parent))
    if path is None and required:
        raise UserError(
            f"data: data.split=coop: no {coop.file} in {copy.root}; download it from "
            f"{coop_split.SOURCE} and put it there."
        )
    return path


def _check_paths(listing: Listing, copy: Copy) -> None:
    """Refuse paths that leave the folder, and a listing of which no image exists."""
    for item in listing.listed:
        # Lists are downloaded: a path in one must not make this machine read other files.
        path = PurePosixPath(item.path)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"data: {copy.entry.name}: a list names {item.path}, outside the data.")
    # A single missing image is left to `on_bad_image`; if all are missing, the archive of images
    # was not unpacked.
    if not any((listing.images / item.path).is_file() for item in listing.listed):
        first = listing.listed[0].path if listing.listed else "any"
        raise copy.problem(
            f"none of the {len(listing.listed)} listed images is in {listing.images}, e.g. {first}"
        )


def _domains(entry: Entry, names: Sequence[str]) -> tuple[str, ...]:
    """Translate names of domains into the authors' names, in the order of the entry."""
    by_key = {name_key(ours): theirs for theirs, ours in entry.domains.items()}
    by_key |= {name_key(theirs): theirs for theirs in entry.domains}
    for name in names:
        if name_key(name) not in by_key:
            hint = did_you_mean(name, list(entry.domains.values()))
            raise UserError(f"data: data.domains: {entry.name} has no domain '{name}'.{hint}")
    selected = {by_key[name_key(name)] for name in names}
    return tuple(theirs for theirs in entry.domains if theirs in selected or not names)
