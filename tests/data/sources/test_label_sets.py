"""Images with several labels: the drawings' objects, and MLRSNet's tables of labels."""

import numpy as np
import pytest
from PIL import Image

from fedprompt.config.schema import PartitionConfig
from fedprompt.data import aerial_scenes as scenes
from fedprompt.data.aerial_scenes.canvas import Canvas
from fedprompt.data.aerial_scenes.domains import DOMAINS
from fedprompt.data.aerial_scenes.objects import Scene
from fedprompt.data.dataset import TEST, withheld
from fedprompt.data.label_sets import rarest_labels
from fedprompt.data.partition import make_partition
from fedprompt.data.sources import aerial_objects
from fedprompt.data.sources.aerial_objects import AerialObjects, AerialObjectsConfig
from fedprompt.data.sources.aerial_scenes import AerialScenes, AerialScenesConfig
from fedprompt.data.sources.label_tables import LabelTables, LabelTablesConfig
from fedprompt.errors import UserError


def test_rarest_label_is_that_of_the_fewest_images_and_of_equals_the_first():
    targets_NC = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    assert rarest_labels(targets_NC).tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("scene", "there", "absent"),
    [
        ("sea ice", {"ice", "water"}, {"trees", "cars", "road"}),
        ("runway", {"runway"}, {"road", "water"}),  # its asphalt is no road
        ("harbor", {"boats", "water"}, {"trees", "sand"}),
        ("circular farmland", {"farmland"}, {"trees", "houses"}),
        ("tennis court", {"sports ground", "trees"}, {"farmland", "road"}),
    ],
)
def test_a_drawing_has_the_labels_of_what_it_shows(scene, there, absent):
    shown = set(scenes.labelled(scene, "delta", 0)[1])
    assert there <= shown
    assert not absent & shown


def test_what_is_painted_over_is_no_label():
    rng = np.random.default_rng(0)
    scene = Scene(Canvas(rng, step=1.0), DOMAINS["delta"], rng)
    scene.open_ground()
    assert scene.shown() == ()
    scene.tree(0.0, 0.0, 4.0)
    assert scene.shown() == ("trees",)
    scene.house(0.0, 0.0, 20.0)
    assert scene.shown() == ("houses",)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    config = AerialObjectsConfig(images_per_class=2, domains=["delta"])
    return AerialObjects.load(config, 1, tmp_path_factory.mktemp("cache")), config


def test_objects_are_on_the_images_of_aerial_scenes(drawings):
    objects, _ = drawings
    plain = AerialScenes.load(AerialScenesConfig(images_per_class=2, domains=["delta"]), 1)
    assert objects.fingerprint == plain.fingerprint  # the features are shared
    assert objects.image_names == plain.image_names
    assert objects.class_names == scenes.LABELS
    assert objects.targets_NC.any(axis=1).all()
    rows = np.arange(len(objects))
    assert objects.targets_NC[rows, objects.labels_N].all()
    same = [np.asarray(dataset.open_image(3)) for dataset in (objects, plain)]
    np.testing.assert_array_equal(*same)


def test_labels_of_drawings_are_drawn_once_and_a_torn_file_again(drawings, tmp_path, monkeypatch):
    objects, config = drawings
    AerialObjects.load(config, 1, tmp_path)
    (path,) = (tmp_path / "labels").glob("*.npy")
    monkeypatch.setattr(aerial_objects, "remembered", None)  # whoever draws fails
    again = AerialObjects.load(config, 2, tmp_path)
    np.testing.assert_array_equal(again.targets_NC, objects.targets_NC)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TypeError):
        AerialObjects.load(config, 1, tmp_path)


def test_other_names_of_drawn_things_are_refused():
    with pytest.raises(UserError, match="class_names"):
        AerialObjectsConfig(class_names=["a", "b"]).check()


def test_withheld_images_have_no_labels(drawings):
    objects, _ = drawings
    readable_N = np.arange(len(objects)) % 2 == 0
    left = withheld(objects, readable_N)
    assert not left.targets_NC[~readable_N].any()
    np.testing.assert_array_equal(left.targets_NC[readable_N], objects.targets_NC[readable_N])


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_partitions_go_by_the_rarest_label(drawings, scheme):
    objects, _ = drawings
    config = PartitionConfig(clients=2, scheme=scheme, min_images=1, alpha=1)
    partition = make_partition(objects, config, 1)
    held = np.concatenate([partition.train_flat, partition.test_flat])
    assert len(held) == (objects.split_N != TEST).sum()


# MLRSNet's format

COLUMNS = ("airplane", "bare soil", "habor")
ROWS = {
    "airplane": {"airplane_00001.jpg": "1,0,0", "airplane_00002.jpg": "1,1,0"},
    "harbor&port": {"harbor_port_00001.jpg": "0,1,1", "harbor_port_00002.jpg": "0,0,1"},
}


def write(root, rows=None, header=None, labels="Labels", images="Images"):
    header = header or "image," + ",".join(COLUMNS)
    (root / labels).mkdir(parents=True)
    for i, (group, listed) in enumerate((rows or ROWS).items()):
        folder = root / images / group
        folder.mkdir(parents=True)
        text = "\r\n".join([header, *(f"{name},{cells}" for name, cells in listed.items())])
        (root / labels / f"{group}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
        for j, name in enumerate(listed):
            Image.new("RGB", (8, 8), (40 * i, 60 * j, 90)).save(folder / name)
    return root


def load(root, tmp_path, **keys):
    config = LabelTablesConfig(root=str(root), title="tables", **keys)
    config.check()
    return LabelTables.load(config, 1, tmp_path / "cache")


@pytest.mark.parametrize("spelling", [("Labels", "Images"), ("labels", "images")])
def test_tables_in_the_format_of_mlrsnet(tmp_path, spelling):
    root = write(tmp_path / "data", header="image,airplane,bare soil,habor,,", labels=spelling[0],
                 images=spelling[1])  # fmt: skip
    dataset = load(root, tmp_path)
    assert dataset.class_names == COLUMNS
    assert dataset.image_names == (
        "airplane/airplane_00001.jpg",
        "airplane/airplane_00002.jpg",
        "harbor&port/harbor_port_00001.jpg",
        "harbor&port/harbor_port_00002.jpg",
    )
    assert dataset.targets_NC.astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert dataset.labels_N.tolist() == [0, 0, 1, 2]
    assert "at most 2" in dataset.notes[0]
    assert dataset.open_image(2).getpixel((0, 0))[2] > 50


def test_names_replace_the_columns_in_their_order(tmp_path):
    root = write(tmp_path / "data")
    assert load(root, tmp_path, class_names=["a", "b", "harbor"]).class_names[2] == "harbor"
    with pytest.raises(UserError, match="class_names has 2"):
        load(root, tmp_path, class_names=["a", "b"])


def test_an_image_that_cannot_be_read_takes_its_labels_with_it(tmp_path):
    root = write(tmp_path / "data")
    (root / "Images" / "airplane" / "airplane_00002.jpg").unlink()
    with pytest.raises(UserError, match=r"airplane_00002\.jpg"):
        load(root, tmp_path)
    dataset = load(root, tmp_path, on_bad_image="skip")
    assert dataset.targets_NC.astype(int).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ({"a": {"1.png": "0,0,0"}}, None, ["line 2", "1.png", "no label"]),
        ({"a": {"1.png": "1,0"}}, None, ["line 2", "3 numbers"]),
        ({"a": {"1.png": "1,0,yes"}}, None, ["line 2", "0 or 1"]),
        ({"a": {"1.png": "1,0,0,1"}}, None, ["line 2", "3 numbers"]),
        ({"a": {"./1.png": "1,0,0"}}, None, ["line 2", "'./1.png'"]),
        ({"a": {"../1.png": "1,0,0"}}, None, ["line 2", "'../1.png'"]),
        ({"a": {"1.png": "1"}}, "image,one", ["two labels or more"]),
        (ROWS, "image,one,two,One", ["'one'"]),
    ],
)
def test_damaged_tables_are_refused_in_one_line(tmp_path, rows, header, words):
    root = write(tmp_path / "data", rows, header)
    with pytest.raises(UserError) as refusal:
        load(root, tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_tables_of_other_columns_and_images_listed_twice_are_refused(tmp_path):
    root = write(tmp_path / "data")
    table = root / "Labels" / "airplane.csv"
    whole = table.read_text(encoding="utf-8-sig")
    table.write_text(whole + "airplane_00001.jpg,0,1,0\n")
    with pytest.raises(UserError, match=r"airplane_00001\.jpg.*twice"):
        load(root, tmp_path)
    table.write_text(whole.replace("airplane_00001", "air\0plane"))
    with pytest.raises(UserError, match="line 2"):
        load(root, tmp_path)
    table.write_text(whole.replace("bare soil", "soil"))
    with pytest.raises(UserError, match="columns"):
        load(root, tmp_path)


def test_folders_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.root"):
        LabelTablesConfig().check()
    with pytest.raises(UserError, match="Labels"):
        load(tmp_path, tmp_path)
