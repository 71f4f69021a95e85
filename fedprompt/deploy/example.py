"""Image folders for trying out a federation. Runs on the administrator's terminal.

The images are the embedded aerial scenes. Every node gets the images of one domain.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from fedprompt.data.dataset import TEST
from fedprompt.data.sources.aerial_scenes import AerialScenes, AerialScenesConfig
from fedprompt.errors import UserError

EXPERIMENT = "experiment.yaml"


def write_example(folder: Path, nodes: int, images_per_class: int) -> Path:
    """Write `client-<k>/<class>/*.png`, `server/<class>/*.png` and an experiment that uses them.

    Node k gets training images of domain k modulo the number of domains. Nodes with the same domain
    share its images evenly. The server gets the test images of all domains.

    Args:
        folder: the folder to fill; it must be empty or not exist.
        nodes: number of client folders.
        images_per_class: images per class and domain, training and test images together.

    Returns:
        The path of the experiment file.

    Raises:
        UserError: the folder is not empty, or a node would get no image.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder.")
    dataset = AerialScenes.load(AerialScenesConfig(images_per_class=images_per_class), 1)
    domains = len(dataset.domain_names)
    images_of_client = [0] * nodes
    for i in range(len(dataset)):
        label, domain = int(dataset.labels_N[i]), int(dataset.domains_N[i])
        # With fewer nodes than domains, the training images of the remaining domains are not used.
        owners = range(domain, nodes, domains)
        if dataset.split_N[i] == TEST:
            owner = "server"
        elif owners:
            client = owners[i % len(owners)]
            images_of_client[client] += 1
            owner = f"client-{client}"
        else:
            continue
        # Class folders are matched without regard to spaces and underscores.
        class_folder = folder / owner / dataset.class_names[label].replace(" ", "_")
        class_folder.mkdir(parents=True, exist_ok=True)
        dataset.open_image(i).save(class_folder / f"{i:05d}.png")
    if not all(images_of_client):
        raise UserError(
            f"{images_per_class} images per class are too few for {nodes} nodes; set --images "
            "higher or --nodes lower."
        )
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
        # Every node is a process on this machine, so each of them gets one thread.
        "simulation": {"threads": 1, "clients_per_block": 1},
        "evaluation": {"local_only": False, "personal_on_global": False},
    }
    text = yaml.safe_dump(experiment, sort_keys=False, width=100)
    (folder / EXPERIMENT).write_text(text, encoding="utf-8")
