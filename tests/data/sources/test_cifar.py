"""The binary files of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from fedprompt.data.catalogue import entry
from tests.support.published_copies import make
from tests.support.published_loading import load, one_line

pytestmark = pytest.mark.usefixtures("few_classes")


@pytest.mark.parametrize(("name", "train"), [("cifar10", 100), ("cifar100", 200)])
def test_cifar_records(name: str, train: int, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make(name, root)
    dataset = load(name, root)
    classes = list(entry(name).classes)
    assert [classes[label] for label in dataset.labels_N] == [item.key for item in made]
    assert np.bincount(dataset.split_N).tolist() == [
        train,
        train // 5 if name == "cifar10" else 200,
    ]
    for i in (0, 7, len(dataset) - 1):
        image = np.asarray(dataset.open_image(i))
        assert image.shape == (32, 32, 3)
        assert (image[..., 0] == dataset.labels_N[i]).all()  # the plane of red
        assert (image[0, :, 1] == 50).all()  # green: the first row
        assert (image[:, 0, 2] == 70).all()  # blue: the first column
        assert image[1:, 1:, 1:].sum() == 0
    assert pickle.loads(pickle.dumps(dataset)).open_image(3).size == (32, 32)
    if name == "cifar100":
        assert dataset.superclass_names[classes.index("whale")] == "aquatic mammals"
        assert len(set(dataset.superclass_names)) == 20


def test_cifar_refuses_pickles_and_cut_files(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    line = one_line("cifar10", root)
    assert "Python version" in line
    assert "cifar-10-binary.tar.gz" in line
    make("cifar10", root)
    batch = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert "data_batch_3.bin is cut short" in one_line("cifar10", root)
    batch.unlink()
    assert "no file data_batch_3.bin" in one_line("cifar10", root)
    assert "lists other classes" in one_line("cifar10", _renamed_names(root))


def _renamed_names(root: Path) -> Path:
    names = root / "cifar-10-batches-bin" / "batches.meta.txt"
    names.write_text(names.read_text().replace("airplane", "plane"))
    return root
