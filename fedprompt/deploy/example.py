"""Image folders to try a federation on: the embedded drawings, a domain for each node."""

from __future__ import annotations

from pathlib import Path

import yaml

from fedprompt.config.schema import DataConfig
from fedprompt.data.aerial_scenes import load
from fedprompt.data.dataset import TEST
from fedprompt.errors import UserError

EXPERIMENT = "experiment.yaml"


def write_example(folder: Path, nodes: int, images_per_class: int) -> Path:
    """Write `client-<k>/<class>/*.png`, `server/<class>/*.png` and an experiment on them.

    Node k gets the training images of domain k, modulo their number, and of equal domains each node
    every n-th image; the server gets all test images.

    Raises:
        UserError: the folder is in use, or there are too few images for so many nodes.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder.")
    dataset = load(DataConfig(images_per_class=images_per_class), 1)
    domains = len(dataset.domain_names)
    given = [0] * nodes
    for i in range(len(dataset)):
        label, domain = int(dataset.labels_N[i]), int(dataset.domains_N[i])
        owners = range(domain, nodes, domains)
        if dataset.split_N[i] == TEST:
            owner = "server"
        elif owners:
            client = owners[i % len(owners)]
            given[client] += 1
            owner = f"client-{client}"
        else:
            continue
        place = folder / owner / dataset.class_names[label].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        dataset.open_image(i).save(place / f"{i:05d}.png")
    if not all(given):
        raise UserError(f"{images_per_class} images per class are too few for {nodes} nodes.")
    _write_experiment(folder.resolve(), dataset.class_names, nodes)
    return folder / EXPERIMENT


def _write_experiment(folder: Path, class_names: tuple[str, ...], nodes: int) -> None:
    experiment = {
        "experiment": "three_folders" if nodes == 3 else "client_folders",
        "backbone": "tiny",
        "data": {
            "source": "client_folders",
            "title": "drawn scenes in folders",
            "class_names": list(class_names),
            "folders": [str(folder / f"client-{k}") for k in range(nodes)],
            "root": str(folder / "server"),
        },
        "partition": {"clients": nodes},
        "method": "fedrsclip",
        "training": {"lr": 0.02},
        "federation": {"rounds": 5, "timeout_s": 600},
        "simulation": {"threads": 1, "clients_per_block": 1},
        "evaluation": {"local_only": False, "personal_on_global": False},
    }
    text = yaml.safe_dump(experiment, sort_keys=False, width=100)
    (folder / EXPERIMENT).write_text(text, encoding="utf-8")
