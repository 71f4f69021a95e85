"""Using a run: images in, classes out; embeddings for plain open_clip."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fedprompt.backbone.tiny import tiny_model_config, tiny_state_dict
from fedprompt.cli.predictions import show_predictions
from fedprompt.data import open_dataset
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.predict import Classifier
from fedprompt.experiment.run import run
from fedprompt.experiment.run_folder import RunFolder
from tests.support.builders import small_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]}, federation={"rounds": 2}
    )
    target = str(tmp_path_factory.mktemp("predict") / "run")
    return run(replace(config, output=replace(config.output, dir=target)), QuietDisplay())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = small_config(data={"images_per_class": 8, "domains": ["savanna"]})
    dataset = open_dataset(config.data, config.seed)
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i in (0, 40, 100):
        paths.append(folder / f"{i}.png")
        dataset.open_image(i).save(paths[-1])
    return paths


@pytest.mark.parametrize("client", [None, 2])
def test_exported_embeddings_give_the_same_predictions_in_plain_open_clip(
    run_dir: Path, images: list[Path], tmp_path: Path, client: int | None
) -> None:
    classifier = Classifier(run_dir, client)
    predictions = classifier.predict(images, top=3)
    classifier.export(tmp_path / "classes.safetensors")

    model = CLIP(**tiny_model_config()).eval()
    model.load_state_dict(tiny_state_dict())
    preprocess = open_clip.image_transform(
        64,
        is_train=False,
        mean=classifier.clip.preprocess.transforms[-1].mean,  # type: ignore[attr-defined]
        std=classifier.clip.preprocess.transforms[-1].std,  # type: ignore[attr-defined]
    )
    learned = load_file(tmp_path / "classes.safetensors")
    pixels = torch.stack([preprocess(Image.open(p).convert("RGB")) for p in images])
    with torch.no_grad():
        features = F.normalize(model.encode_image(pixels), dim=-1)
    logits = learned["logit_scale"] * features @ learned["class_embeddings"].T
    with safe_open(tmp_path / "classes.safetensors", "pt") as reader:
        names = json.loads(reader.metadata()["class_names"])
    for prediction, probabilities in zip(predictions, logits.softmax(-1), strict=True):
        best = probabilities.topk(3)
        assert prediction.classes == tuple(names[i] for i in best.indices)
        assert torch.allclose(torch.tensor(prediction.probabilities), best.values, atol=1e-5)


def test_images_are_classified_in_batches_as_they_are_asked_for(
    run_dir: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(run_dir)
    encode, batches = classifier.clip.encode_images, []

    def counted(images_B3HW: torch.Tensor) -> torch.Tensor:
        batches.append(len(images_B3HW))
        return encode(images_B3HW)

    expected = classifier.predict(images)
    monkeypatch.setattr(classifier.clip, "image_batch", 2)
    monkeypatch.setattr(classifier.clip, "encode_images", counted)
    results = classifier.predictions([*images, *images])
    assert next(results).classes == expected[0].classes
    assert batches == [2]
    for found, before in zip(results, [*expected[1:], *expected], strict=True):
        assert (found.image, found.classes) == (before.image, before.classes)
        assert found.probabilities == pytest.approx(before.probabilities, rel=1e-5)
    assert batches == [2, 2, 2]
    # A missing file is said before anything is encoded.
    with pytest.raises(UserError, match=r"nowhere\.png"):
        next(classifier.predictions([*images, tmp_path / "nowhere.png"]))
    assert batches == [2, 2, 2]


def test_predictions_go_to_a_file(run_dir: Path, images: list[Path], tmp_path: Path) -> None:
    expected = Classifier(run_dir).predict(images, top=2)
    out = tmp_path / "found.csv"
    show_predictions(iter(expected), out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(p) for p in images for _ in range(2)]
    assert [row["class"] for row in rows] == [name for p in expected for name in p.classes]
    assert float(rows[0]["probability"]) == pytest.approx(expected[0].probabilities[0], abs=1e-6)
    (tmp_path / "mine.csv").write_text("my notes")
    with pytest.raises(UserError, match=r"mine\.csv exists"):
        show_predictions(iter(expected), tmp_path / "mine.csv")
    with pytest.raises(UserError, match=r"cannot write .*no/x\.csv"):
        show_predictions(iter(expected), tmp_path / "no" / "x.csv")


def test_personal_and_global_models_differ(run_dir: Path, images: list[Path]) -> None:
    top = len(json.loads((run_dir / "partition.json").read_text())["class_names"])
    everyone, own = (Classifier(run_dir, c).predict(images, top) for c in (None, 1))
    assert everyone[0].probabilities != own[0].probabilities
    assert sum(own[0].probabilities) == pytest.approx(1, abs=1e-5)


def test_prompts_are_read_from_the_run_folder_alone(
    run_dir: Path, images: list[Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "moved" / "run")
    expected = [p.probabilities for p in Classifier(run_dir, 2).predict(images)]
    assert [p.probabilities for p in Classifier(copy, 2).predict(images)] == expected
    assert not [n for n in load_file(copy / "prompts.safetensors") if not n.startswith("shared/")]
    (private,) = (copy / "private").iterdir()
    private.unlink()
    with pytest.raises(UserError, match="missing or were changed"):
        Classifier(copy, 2)
    Classifier(copy)


def test_private_prompts_of_real_nodes_are_not_invented(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    folder, _ = RunFolder.resume(copy)
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    folder.save_checkpoint(replace(checkpoint, private=""))
    folder.close()
    with pytest.raises(UserError, match="client 2 are on its own node"):
        Classifier(copy, 2)


def test_unusable_runs_and_images(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        Classifier(tmp_path)
    with pytest.raises(UserError, match="no client 9; the run has 4"):
        Classifier(run_dir, 9)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    classifier = Classifier(run_dir)
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image"):
        classifier.predict([tmp_path / "broken.jpg"])
    with pytest.raises(UserError, match=r"cannot read image .*missing\.jpg"):
        classifier.predict([tmp_path / "missing.jpg"])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    with pytest.raises(UserError, match="--resume"):
        Classifier(tmp_path / "unfinished")
