"""Miniature copies of published data sets: their true folder structure, names and annotation files.

`make(name, root)` writes a copy and says what is in it. Sets with hundreds of classes are cut to a
few true ones (`FEWER`); a test then expects that number of classes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from fedprompt.data.catalogue import entry

SYNSETS = {  # the first of ImageNet, with CLIP's names, in label order
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n01484850": "great white shark",
    "n01491361": "tiger shark",
    "n01494475": "hammerhead shark",
}
SUN = (
    "a/abbey",
    "a/apartment_building/outdoor",
    "a/apse/indoor",
    "c/church/outdoor",
    "z/zen_garden",
)
UCF = ("ApplyEyeMakeup", "Archery", "HandstandPushups", "TaiChi", "YoYo")
CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")
AIRCRAFT = ("707-320", "727-200", "A300B4", "F-16A/B", "Yak-42")
FOOD = ("apple_pie", "baby_back_ribs", "creme_brulee", "waffles")
DOMAINNET = ("aircraft_carrier", "The_Eiffel_Tower", "zigzag")
DOMAINNET_NUMBERS = (0, 303, 344)
HOME = ("Alarm_Clock", "Desk_Lamp", "TV", "ToothBrush")
FEWER = {
    "imagenet": 5,
    "imagenet_v2": 5,
    "imagenet_sketch": 5,
    "imagenet_a": 3,
    "imagenet_r": 3,
    "sun397": len(SUN),
    "ucf101": len(UCF),
    "stanford_cars": len(CARS),
    "fgvc_aircraft": len(AIRCRAFT),
    "food101": len(FOOD),
    "domainnet": len(DOMAINNET),
    "office_home": len(HOME),
}


@dataclass(frozen=True)
class Made:
    """One image of a copy: its file, the authors' name of its class, split and domain."""

    path: Path
    key: str
    split: str | None = None
    domain: str = ""


def picture(number: int, suffix: str = "jpg") -> bytes:
    """A flat 8 x 8 image whose red tells `number`."""
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix)
    Image.new("RGB", (8, 8), ((number * 7) % 256, 60, 200)).save(buffer, kind)
    return buffer.getvalue()


def write(made: Sequence[Made]) -> list[Made]:
    """Write the image files; the i-th is `picture(i)`."""
    for number, item in enumerate(made):
        item.path.parent.mkdir(parents=True, exist_ok=True)
        item.path.write_bytes(picture(number, item.path.suffix[1:]))
    return list(made)


def text(path: Path, lines: Iterable[str]) -> None:
    """A text file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def split_json(
    path: Path, images: Path, made: Sequence[Made], names: Mapping[str, str], order: Sequence[str]
) -> Path:
    """A `split_zhou` file in which the images of each class go to train, val and test in turn."""
    rows: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    seen: dict[str, int] = {}
    for item in made:
        count = seen[item.key] = seen.get(item.key, 0) + 1
        split = ("train", "val", "test")[(count - 1) % 3]
        where = item.path.relative_to(images).as_posix()
        rows[split].append((where, order.index(item.key), names[item.key]))
    path.write_text(json.dumps(rows))
    return path


def class_folders(
    pattern: str, count: int = 4, first: int = 1
) -> Callable[[str, Path], list[Made]]:
    """A maker of `<pattern>` for every class of the entry; {c} is the folder."""

    def maker(name: str, root: Path) -> list[Made]:
        return write(
            [
                Made(root / pattern.format(c=c, low=c.lower(), bare=c.replace("_", ""), i=i), c)
                for c in entry(name).classes
                for i in range(first, first + count)
            ]
        )

    return maker


def caltech101(name: str, root: Path) -> list[Made]:
    top = root / "101_ObjectCategories"
    write(
        [Made(top / extra / "image_0001.jpg", "") for extra in ("BACKGROUND_Google", "Faces_easy")]
    )
    return class_folders("101_ObjectCategories/{c}/image_{i:04d}.jpg", 3)(name, root)


def rsscn7(name: str, root: Path) -> list[Made]:
    return write(
        [
            Made(root / "RSSCN7-master" / c / f"{c[0]}{i:03d}.jpg", c)
            for c in entry(name).classes
            for i in range(1, 5)
        ]
    )


def millionaid(name: str, root: Path) -> list[Made]:
    """A tree of three levels, in which some classes stand on the second."""
    groups = {"dry_field": "agriculture_land/arable_land", "desert": "unutilized_land"}
    return write(
        [
            Made(root / "train" / groups.get(c, "land/area") / c / f"P{i:07d}.jpg", c)
            for c in entry(name).classes
            for i in range(1, 5)
        ]
    )


def cifar(folder: str, names_file: str, train: Sequence[str], test: str, coarse: bool):
    """A maker of the binary version: two records per class and file, labels backwards."""

    def maker(name: str, root: Path) -> list[Made]:
        classes = list(entry(name).classes)
        text(root / folder / names_file, [*classes, ""])
        made = []
        for file in (*train, test):
            path = root / folder / file
            labels = [label for label in reversed(range(len(classes))) for _ in range(2)]
            records = b""
            for label in labels:
                pixels = np.zeros((3, 32, 32), dtype=np.uint8)
                pixels[0], pixels[1, 0], pixels[2, :, 0] = label, 50, 70
                records += bytes([label // 5, label] if coarse else [label]) + pixels.tobytes()
                made.append(Made(path, classes[label], "test" if file == test else "train"))
            path.write_bytes(records)
        return made

    return maker


def oxford_pets(name: str, root: Path) -> list[Made]:
    cats = {"abyssinian", "bengal", "birman", "bombay", "british_shorthair", "egyptian_mau",
            "maine_coon", "persian", "ragdoll", "russian_blue", "siamese", "sphynx"}  # fmt: skip
    made, lists = [], {"trainval": [], "test": []}
    for number, breed in enumerate(entry(name).classes, start=1):
        written = "_".join(w.capitalize() for w in breed.split("_")) if breed in cats else breed
        for i, file in ((1, "trainval"), (2, "trainval"), (100, "test")):
            lists[file].append(f"{written}_{i} {number} {1 if breed in cats else 2} 1")
            split = "train" if file == "trainval" else "test"
            made.append(Made(root / "images" / f"{written}_{i}.jpg", breed, split))
    for file, lines in lists.items():
        text(root / "annotations" / f"{file}.txt", lines)
    text(root / "annotations/list.txt", ["#Image CLASS-ID SPECIES BREED ID"])
    return write(made)


def flowers102(name: str, root: Path) -> list[Made]:
    numbers = [c for c in range(1, 103) for _ in range(3)]  # image 1, 2, 3 are of class 1, ...
    splits = {"trnid": range(1, 307, 3), "valid": range(2, 307, 3), "tstid": range(3, 307, 3)}
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": np.array([numbers], dtype=np.uint8)})
    savemat(root / "setid.mat", {k: np.array([list(v)]) for k, v in splits.items()})
    of = {"trnid": "train", "valid": "val", "tstid": "test"}
    made = [
        Made(root / "jpg" / f"image_{i:05d}.jpg", str(numbers[i - 1]), of[variable])
        for variable, ids in splits.items()
        for i in ids
    ]
    return write(made)


def food101(name: str, root: Path) -> list[Made]:
    made = []
    for split, ids in (("train", (1005649, 1014775)), ("test", (1011328,))):
        text(root / "meta" / f"{split}.txt", [f"{c}/{i}" for c in FOOD for i in ids])
        made += [Made(root / "images" / c / f"{i}.jpg", c, split) for c in FOOD for i in ids]
    text(root / "meta/classes.txt", FOOD)
    return write(made)


def fgvc_aircraft(name: str, root: Path) -> list[Made]:
    made = []
    for offset, split in enumerate(("train", "val", "test")):
        ids = {c: f"{1025794 + 10 * k + offset:07d}" for k, c in enumerate(AIRCRAFT)}
        text(root / "data" / f"images_variant_{split}.txt", [f"{i} {c}" for c, i in ids.items()])
        made += [Made(root / "data/images" / f"{i}.jpg", c, split) for c, i in ids.items()]
    text(root / "data/variants.txt", AIRCRAFT)
    return write(made)


def stanford_cars(name: str, root: Path) -> list[Made]:
    made = []
    tables = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    (root / "devkit").mkdir(parents=True)
    savemat(
        root / "devkit/cars_meta.mat",
        {"class_names": np.array([[*CARS]], dtype=object)},
    )
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    for split, file in tables.items():
        rows = []
        for i in range(2 * len(CARS)):
            label, image = len(CARS) - i % len(CARS), f"{i + 1:05d}.jpg"
            rows.append((39, label, image))
            made.append(Made(root / f"cars_{split}" / image, CARS[label - 1], split))
        savemat(root / file, {"annotations": np.array([rows], dtype=kind).reshape(1, -1)})
    return write(made)


def dtd(name: str, root: Path) -> list[Made]:
    made = []
    for i, split in ((2, "train"), (4, "val"), (5, "test")):
        paths = {c: f"{c}/{c}_{i:04d}.jpg" for c in entry(name).classes}
        text(root / "labels" / f"{split}1.txt", paths.values())
        made += [Made(root / "images" / path, c, split) for c, path in paths.items()]
    return write(made)


def sun397(name: str, root: Path) -> list[Made]:
    made = []
    for letter, split, file in (("a", "train", "Training"), ("b", "test", "Testing")):
        paths = {c: f"{c}/sun_{letter}xcvbn.jpg" for c in SUN}
        text(root / f"{file}_01.txt", [f"/{path}" for path in paths.values()])
        made += [Made(root / "SUN397" / path, c, split) for c, path in paths.items()]
    text(root / "ClassName.txt", [f"/{c}" for c in SUN])
    return write(made)


def ucf101(name: str, root: Path) -> list[Made]:
    made, folder = [], root / "ucfTrainTestlist"
    spelled = {"HandstandPushups": "HandStandPushups"}  # of its files, not of its class
    for group, split in (("g08", "train"), ("g01", "test")):
        lines = []
        for number, c in enumerate(UCF, start=1):
            stem = f"v_{spelled.get(c, c)}_{group}_c01"
            lines.append(f"{c}/{stem}.avi" + (f" {number}" if split == "train" else ""))
            snake = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "HandstandPushups": "Handstand_Pushups",
                     "TaiChi": "Tai_Chi", "YoYo": "Yo_Yo"}.get(c, c)  # fmt: skip
            made.append(Made(root / "UCF-101-midframes" / snake / f"{stem}.jpg", c, split))
        text(folder / f"{split}list01.txt", lines)
    text(folder / "classInd.txt", [f"{n} {c}" for n, c in enumerate(UCF, start=1)])
    return write(made)


def imagenet(name: str, root: Path) -> list[Made]:
    text(root / "classnames.txt", [f"{s} {n}" for s, n in SYNSETS.items()])
    made = []
    for folder, split, stem in (
        ("train", "train", "{s}_10026.JPEG"),
        ("val", "test", "ILSVRC2012_val_{i:08d}.JPEG"),
    ):
        for i, s in enumerate(SYNSETS, start=1):
            for k in range(2):
                file = stem.format(s=f"{s}_{k}", i=10 * i + k)
                made.append(Made(root / "images" / folder / s / file, s, split))
    return write_jpeg(made)


def write_jpeg(made: Sequence[Made]) -> list[Made]:
    """As `write`, for files with the suffix .JPEG."""
    for number, item in enumerate(made):
        item.path.parent.mkdir(parents=True, exist_ok=True)
        item.path.write_bytes(picture(number))
    return list(made)


def imagenet_variant(top: str, synsets: Sequence[str], folder: str = "{s}"):
    """A maker of a test-only variant."""

    def maker(name: str, root: Path) -> list[Made]:
        text(root / "classnames.txt", [f"{s} {n}" for s, n in SYNSETS.items()])
        text(root / top / "README.txt", ["not a class"])
        return write_jpeg(
            [
                Made(root / top / folder.format(s=s, n=n) / f"{s}_{k}.JPEG", s, "test")
                for n, s in enumerate(synsets)
                for k in range(2)
            ]
        )

    return maker


def domainnet(name: str, root: Path) -> list[Made]:
    made = []
    for domain in entry(name).domains:
        for k, split in ((1, "train"), (2, "train"), (18, "test")):
            paths = {
                c: f"{domain}/{c}/{domain}_{n + 1:03d}_{k:06d}.jpg"
                for c, n in zip(DOMAINNET, DOMAINNET_NUMBERS, strict=True)
            }
            made += [Made(root / path, c, split, domain) for c, path in paths.items()]
        for split in ("train", "test"):
            lines = [
                f"{m.path.relative_to(root).as_posix()} {DOMAINNET_NUMBERS[DOMAINNET.index(m.key)]}"
                for m in made
                if m.domain == domain and m.split == split
            ]
            text(root / f"{domain}_{split}.txt", lines)
    return write(made)


def domain_folders(top: str, keys: Sequence[str], stem: str) -> Callable[[str, Path], list[Made]]:
    """A maker of `<top>/<domain>/<class>/<stem>.jpg`."""

    def maker(name: str, root: Path) -> list[Made]:
        return write(
            [
                Made(root / top / domain / c / f"{stem.format(i=i)}.jpg", c, None, domain)
                for domain in entry(name).domains
                for c in keys
                for i in range(1, 5)
            ]
        )

    return maker


A = tuple(SYNSETS)[1:4]
MAKERS: dict[str, Callable[[str, Path], list[Made]]] = {
    "eurosat": class_folders("2750/{c}/{c}_{i}.jpg"),
    "ucmerced": class_folders("UCMerced_LandUse/Images/{c}/{c}{i:02d}.tif", first=0),
    "resisc45": class_folders("NWPU-RESISC45/{c}/{c}_{i:03d}.jpg"),
    "optimal31": class_folders("OPTIMAL-31/Images/{c}/{c}_{i}.jpg"),
    "aid": class_folders("AID/{c}/{low}_{i}.jpg"),
    "patternnet": class_folders("PatternNet/images/{c}/{bare}{i:03d}.jpg"),
    "whu_rs19": class_folders("WHU-RS19/{c}/{c}_{i:02d}.jpg"),
    "rsscn7": rsscn7,
    "mlrsnet": class_folders("Images/{c}/{c}_{i:05d}.jpg"),
    "millionaid": millionaid,
    "cifar10": cifar(
        "cifar-10-batches-bin",
        "batches.meta.txt",
        [f"data_batch_{k}.bin" for k in range(1, 6)],
        "test_batch.bin",
        coarse=False,
    ),
    "cifar100": cifar(
        "cifar-100-binary", "fine_label_names.txt", ["train.bin"], "test.bin", coarse=True
    ),
    "caltech101": caltech101,
    "oxford_pets": oxford_pets,
    "flowers102": flowers102,
    "food101": food101,
    "fgvc_aircraft": fgvc_aircraft,
    "stanford_cars": stanford_cars,
    "dtd": dtd,
    "sun397": sun397,
    "ucf101": ucf101,
    "imagenet": imagenet,
    "imagenet_v2": imagenet_variant(
        "imagenetv2-matched-frequency-format-val", tuple(SYNSETS), folder="{n}"
    ),
    "imagenet_sketch": imagenet_variant("images", tuple(SYNSETS)),
    "imagenet_a": imagenet_variant("imagenet-a", A),
    "imagenet_r": imagenet_variant("imagenet-r", A),
    "domainnet": domainnet,
    "office_home": domain_folders("OfficeHomeDataset_10072016", HOME, "{i:05d}"),
    "pacs": domain_folders("kfold", tuple(entry("pacs").classes), "pic_{i:03d}"),
    "office_caltech10": domain_folders(
        "office_caltech_10", tuple(entry("office_caltech10").classes), "frame_{i:04d}"
    ),
}  # fmt: skip


def make(name: str, root: Path) -> list[Made]:
    """Write a miniature copy of the data set into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    return MAKERS[name](name, root)
