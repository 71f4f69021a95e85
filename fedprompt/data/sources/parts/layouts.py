"""Readers of the folder layouts in which authors publish data sets.

A reader lists the images of a copy with their classes and splits, without opening them. An entry of
the catalogue names its reader and the reader's parameters under `layout:`.

Parameters of every reader:
    images: folders below `data.root`, of which the first that exists is used; `.` is `data.root`
        itself. Paths in a listing, and in CoOp's split files, are relative to this folder.
    markers: names of files or folders, one of which must be in `.` for it to be accepted.
class_folders  <images>/[<split>/ | <domain>/]<class>/**.jpg
    splits: {train: folder, test: folder}; without it, all images are of one split.
    ignore: class folders that are left out.
    names: text file with 'key name' per line; a folder called n stands for the key in line n,
        counted from 0.
    beside: further folders in which text files are looked for.
    nested: true where class folders lie below folders of groups, at any depth; the class of an
        image is then the folder that holds it.
list_files     text files that list the images of each split
    lists: {train: file, val: file, test: file}, each read once per domain if it contains {domain}.
    line: regular expression of one line, with the groups that `image` and the labels use:
        class, label (a number) and domain.
    image: path below <images> as a template of these groups; {snake} stands for the words of the
        class joined by '_'.
    order: {file, line}: text file with all classes in label order.
    beside: as for class_folders.
mat_index      MATLAB files with a label per image and the image numbers of each split
mat_table      MATLAB files with a table of file names and classes per split

A class key is the authors' name of a class, before it is made readable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprompt.data.catalogue import Entry
from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.images import name_key
from fedprompt.data.sources.parts.walk import images_below, subfolders
from fedprompt.errors import UserError

SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}


@dataclass(frozen=True)
class Listed:
    """One image of a copy.

    Attributes:
        path: relative to the folder of images, with forward slashes.
        key: key of the image's class.
        split: `TRAIN`, `VAL` or `TEST`; None if the authors define no split.
        domain: the authors' name of the domain; empty if there is one domain.
    """

    path: str
    key: str
    split: int | None = None
    domain: str = ""


@dataclass(frozen=True)
class Listing:
    """All images of a copy.

    Attributes:
        images: the folder to which the paths are relative.
        listed: the images.
        keys: the class keys in label order.
        names: class names that the copy itself defines, by class key.
    """

    images: Path
    listed: tuple[Listed, ...]
    keys: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """A folder that should contain a published data set.

    Attributes:
        entry: the catalogue's entry of the data set.
        root: the folder, `data.root`.
        domains: the domains to read, by the authors' names.
    """

    entry: Entry
    root: Path
    domains: tuple[str, ...] = ()

    def problem(self, what: str) -> UserError:
        """An error for the user: what is wrong, what to download and where to put it."""
        entry = self.entry
        return UserError(
            f"data: {entry.name}: {what} (found: {_contents(self.root)}). Download "
            f"{entry.download} from {entry.homepage} ({_first_author(entry)}), unpack it and set "
            f"data.root to the folder that holds {' or '.join(self._tops())}."
        )

    def images_folder(self, candidates: Sequence[str]) -> Path:
        """Find the folder of images.

        Args:
            candidates: folders relative to the root, in order of preference; `.` is the root.

        Returns:
            The first candidate that exists. The root itself must also contain something that the
            entry expects.

        Raises:
            UserError: there is none.
        """
        if not self.root.is_dir():
            is_file = self.root.is_file()
            what = "is a file, not a folder" if is_file else "does not exist"
            raise self.problem(f"{self.root} {what}")
        for candidate in candidates:
            folder = self.root / candidate
            # The root always exists, so its content must show that it is not some other folder.
            if folder.is_dir() and (candidate != "." or self._looks_right(folder)):
                return folder
        tops = " or ".join(self._tops())
        raise self.problem(f"{self.root} holds no folder {tops}")

    def file(self, name: str, beside: Sequence[str] = ()) -> Path:
        """Find an annotation file.

        Args:
            name: name of the file.
            beside: folders below the root in which the file may be, besides the root itself.

        Returns:
            Path of the file.

        Raises:
            UserError: there is no such file.
        """
        for folder in (".", *beside):
            path = self.root / folder / name
            if path.is_file():
                return path
        raise self.problem(f"no file {name} in {self.root}")

    def _tops(self) -> list[str]:
        layout = self.entry.layout
        named = [name for name in layout["images"] if name != "."]
        # If only the root itself is accepted, the message names something that it must contain.
        inner = layout.get("markers") or list(self.entry.domains) or list(self.entry.classes)
        return [f"'{name}'" for name in named or inner[:1]]

    def _looks_right(self, folder: Path) -> bool:
        expected = set(map(name_key, self.entry.domains or self.entry.classes))
        # One match is enough here; a missing class or domain gets a message of its own later.
        markers = self.entry.layout.get("markers", ())
        if markers:
            return any((folder / marker).exists() for marker in markers)
        return any(name_key(name) in expected for name in subfolders(folder))


def read_layout(copy: Copy) -> Listing:
    """List the images of a copy with the reader that its entry names.

    Args:
        copy: the folder.

    Returns:
        The listing, sorted by path.

    Raises:
        UserError: the folder is not laid out as the entry says; the message says what to do.
    """
    parameters = dict(copy.entry.layout)
    reader = READERS[parameters.pop("reader")]
    images = copy.images_folder(parameters.pop("images"))
    parameters.pop("markers", None)
    listing = reader(copy, images, **parameters)
    if not listing.listed:
        raise copy.problem(f"no images in {images}")
    # File systems list folders in different orders, but images must have the same indices.
    ordered = tuple(sorted(listing.listed, key=lambda item: item.path))
    return Listing(listing.images, ordered, listing.keys, listing.names)


def class_folders(
    copy: Copy,
    images: Path,
    splits: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    names: str | None = None,
    beside: Sequence[str] = (),
    nested: bool = False,
) -> Listing:
    """List class folders, which may lie below one folder per split or per domain.

    Args:
        copy: the folder.
        images: its folder of images.
        splits: the folder of each split; None = there are no such folders.
        ignore: class folders that are left out.
        names: text file with 'key name' per line; it names the classes and, where folders are
            numbers, identifies them.
        beside: folders in which the text file may be, besides the root.
        nested: whether class folders lie below folders of groups, at any depth.

    Returns:
        The listing; class keys are sorted.

    Raises:
        UserError: folders or the text file are missing, or a class is not in the text file.
    """
    order = _key_names(copy.file(names, beside)) if names else {}
    by_number = list(order)
    listed: list[Listed] = []
    found: set[str] = set()
    # None = no split: the source holds out a share of the images.
    whole = TEST if copy.entry.split.kind == "test only" else None
    for place, split, domain in _places(copy, images, splits or {}, whole):
        folders = [name for name in subfolders(images / place) if name not in ignore]
        if not folders:
            raise copy.problem(f"{images / place} holds no class folders")
        for folder in folders:
            # The folders of ImageNetV2 are label numbers: they index the authors' list of classes.
            key = by_number[int(folder)] if _is_number(folder, by_number) else folder
            if order and key not in order:
                raise copy.problem(f"class folder '{folder}' in {images} is not in {names}")
            there = [
                Listed(
                    path.relative_to(images).as_posix(),
                    path.parent.name if nested else key,
                    split,
                    domain,
                )
                for path in images_below(images / place / folder)
            ]
            found |= {item.key for item in there} if nested else {key}
            listed += there
    return Listing(images, tuple(listed), tuple(sorted(found)), order)


def list_files(
    copy: Copy,
    images: Path,
    lists: Mapping[str, str],
    line: str,
    image: str,
    order: Mapping[str, str] | None = None,
    beside: Sequence[str] = (),
) -> Listing:
    """List the images that text files name for each split.

    Args:
        copy: the folder.
        images: its folder of images.
        lists: the text file of each split; `{domain}` stands for the authors' name of a domain.
        line: regular expression of one line, with the groups class, label and domain.
        image: template of an image's path below `images`, from the groups of its line and `snake`.
        order: `file` and `line` of a text file with all classes in label order; None = classes are
            ordered by their labels in the lists, or by name if the lists have none.
        beside: folders in which the text files may be, besides the root.

    Returns:
        The listing, in the order of the files.

    Raises:
        UserError: a text file is missing, has unexpected lines, or contradicts another.
    """
    listed: list[Listed] = []
    number_of: dict[str, int] = {}
    for split, file in lists.items():
        for domain in copy.domains or ("",):
            path = copy.file(file.replace("{domain}", domain), beside)
            for groups in _matches(path, line):
                key = groups["class"]
                if groups.get("label") is not None:
                    # The label order follows these numbers, so a class must have one of them only.
                    number = number_of.setdefault(key, int(groups["label"]))
                    if number != int(groups["label"]):
                        raise UserError(
                            f"data: {path}: class '{key}' has the labels {number} and "
                            f"{groups['label']}; the list is damaged, fetch it again."
                        )
                where = image.format(**groups, snake="_".join(capitals(key)))
                listed.append(Listed(where, key, SPLITS[split], groups.get("domain") or domain))
    if order is not None:
        path = copy.file(order["file"], beside)
        keys = [groups["class"] for groups in _matches(path, order["line"])]
        unknown = sorted({item.key for item in listed} - set(keys))
        if unknown:
            raise UserError(
                f"data: class '{unknown[0]}' is not in {path}; the lists do not fit together, "
                "fetch them again."
            )
    else:
        keys = sorted({item.key for item in listed}, key=lambda key: (number_of.get(key, 0), key))
    return Listing(images, tuple(listed), tuple(keys))


def mat_index(
    copy: Copy, images: Path, labels: str, index: str, image: str, splits: Mapping[str, str]
) -> Listing:
    """List images from a MATLAB file of labels and one of image numbers.

    Args:
        copy: the folder.
        images: its folder of images.
        labels: file with the class number of each image, in its variable `labels`.
        index: file with the image numbers of each split, counted from 1.
        image: template of an image's path below `images`, from its `number`.
        splits: the variable of `index` for each split.

    Returns:
        The listing; class keys are the class numbers, in ascending order.

    Raises:
        UserError: a file is missing or unreadable, or the files do not fit together.
    """
    numbers = [int(number) for number in _mat(copy.file(labels), "labels")]
    path = copy.file(index)
    listed: list[Listed] = []
    for split, variable in splits.items():
        for i in map(int, _mat(path, variable)):
            if not 1 <= i <= len(numbers):
                raise UserError(
                    f"data: {path} names image {i}, {labels} has {len(numbers)} labels; fetch both "
                    "again."
                )
            listed.append(Listed(image.format(number=i), str(numbers[i - 1]), SPLITS[split]))
    # Sorted as numbers: as text, class 10 would come before class 2.
    return Listing(images, tuple(listed), tuple(map(str, sorted(set(numbers)))))


def mat_table(
    copy: Copy, images: Path, tables: Mapping[str, str], folders: Mapping[str, str], names: str
) -> Listing:
    """List images from MATLAB tables.

    Args:
        copy: the folder.
        images: its folder of images.
        tables: for each split, a file with the fields fname and class (counted from 1) per image.
        folders: for each split, the folder below `images` that contains the images.
        names: file with the class names, in label order.

    Returns:
        The listing; class keys are the class names.

    Raises:
        UserError: a file is missing or unreadable, or the files do not fit together.
    """
    keys = [str(cell.item()) for cell in _mat(copy.file(names), "class_names")]
    listed: list[Listed] = []
    for split, file in tables.items():
        path = copy.file(file)
        rows = _mat(path, "annotations")
        # The authors also publish annotations of the test images without classes.
        if not {"fname", "class"} <= set(rows.dtype.names or ()):
            raise UserError(
                f"data: {path} has no class of each image; take the file with labels "
                f"({', '.join(tables.values())})."
            )
        for row in rows:
            number = int(row["class"].item())
            if not 1 <= number <= len(keys):
                raise UserError(
                    f"data: {path} has class {number}, {names} lists {len(keys)}; fetch both again."
                )
            where = f"{folders[split]}/{row['fname'].item()}"
            listed.append(Listed(where, keys[number - 1], SPLITS[split]))
    return Listing(images, tuple(listed), tuple(keys))


READERS: dict[str, Callable[..., Listing]] = {
    "class_folders": class_folders,
    "list_files": list_files,
    "mat_index": mat_index,
    "mat_table": mat_table,
}


def capitals(name: str) -> list[str]:
    """Split a name before each capital letter: 'ApplyEyeMakeup' -> ['Apply', 'Eye', 'Makeup']."""
    return re.findall("[A-Z][^A-Z]*", name) or [name]


def _places(
    copy: Copy, images: Path, splits: Mapping[str, str], whole: int | None
) -> Iterator[tuple[str, int | None, str]]:
    """(folder below `images`, split, domain) of every folder that contains class folders."""
    if splits:
        for split, folder in splits.items():
            if not (images / folder).is_dir():
                raise copy.problem(f"{images} holds no folder '{folder}'")
            yield folder, SPLITS[split], ""
    elif copy.entry.domains:
        # Copies differ in the case and separators of domain folders.
        there = {name_key(name): name for name in subfolders(images)}
        for domain in copy.domains:
            if name_key(domain) not in there:
                raise copy.problem(f"{images} holds no folder '{domain}'")
            yield there[name_key(domain)], whole, domain
    else:
        yield ".", whole, ""


def _is_number(folder: str, by_number: Sequence[str]) -> bool:
    return folder.isdigit() and int(folder) < len(by_number)


def _key_names(path: Path) -> dict[str, str]:
    """Read a text file with 'key name' per line, in the order of the file."""
    return {
        groups["key"]: groups["name"] for groups in _matches(path, r"(?P<key>\S+)\s+(?P<name>.+)")
    }


def _matches(path: Path, pattern: str) -> Iterator[dict[str, str]]:
    """The groups of `pattern` in each line of a text file; empty lines and comments are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: cannot read {path}: {error}.") from None
    for number, text in enumerate(lines, start=1):
        stripped = text.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = re.fullmatch(pattern, stripped)
        if match is None:
            raise UserError(
                f"data: {path}, line {number}: '{stripped[:60]}' is not what this data set's list "
                "holds; fetch the file again."
            )
        yield match.groupdict()


def _mat(path: Path, variable: str) -> Any:
    """Read one variable of a MATLAB file, flattened: MATLAB stores vectors as matrices."""
    from scipy.io import loadmat  # slow to import, and needed by two data sets only

    try:
        return loadmat(str(path))[variable].ravel()
    except KeyError:
        raise UserError(f"data: {path} holds no '{variable}'; fetch it again.") from None
    except Exception as error:  # scipy raises anything from ValueError to struct.error
        reason = " ".join(str(error).split())
        raise UserError(
            f"data: {path} is no MATLAB file that can be read: {reason}; fetch it again."
        ) from None


def _contents(root: Path) -> str:
    """The content of a folder for a message, at most six names."""
    try:
        names = sorted(p.name + ("/" if p.is_dir() else "") for p in root.iterdir())
    except OSError:
        return "nothing"
    shown = ", ".join(names[:6]) or "an empty folder"
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def _first_author(entry: Entry) -> str:
    first, comma, _ = entry.cite.authors.partition(",")
    return f"{first} et al." if comma else first
