"""Aerial scenes: determinism, pinned pixels, coverage, splits, captions."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from fedprompt.data import aerial_scenes as scenes
from fedprompt.data.aerial_scenes.captions import all_facts, caption, colours, image_facts
from fedprompt.data.aerial_scenes.domains import DOMAINS
from fedprompt.data.dataset import TEST, TRAIN
from fedprompt.data.sources.aerial_scenes import AerialScenes, AerialScenesConfig
from fedprompt.errors import UserError
from fedprompt.rng import generator

ALL = scenes.CLASSES + scenes.EXTRA_CLASSES


def load(seed=1, **values):
    config = AerialScenesConfig(**{"images_per_class": 4, **values})
    return AerialScenes.load(config, seed)


def test_an_image_depends_on_class_domain_index_and_seed_only():
    first = scenes.render("river", "delta", 3)
    scenes.render("lake", "savanna", 9)
    np.testing.assert_array_equal(first, scenes.render("river", "delta", 3))
    for other in (
        scenes.render("lake", "delta", 3),
        scenes.render("river", "savanna", 3),
        scenes.render("river", "delta", 4),
        scenes.render("river", "delta", 3, seed=1),
    ):
        assert np.abs(first.astype(int) - other).mean() > 3


@pytest.mark.parametrize("name", ALL)
def test_every_class_in_every_federated_domain_is_a_picture(name):
    for domain in scenes.FEDERATED_DOMAINS:
        image = scenes.render(name, domain, 0)
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert image.std() > 6, domain


def test_pinned_pixels():
    """A change here is a new data set: raise VERSION, pin again, train the tiny CLIP again."""
    digest = hashlib.sha256()
    for name, domain in itertools.product(ALL, ("delta", "metropolis", "countryside", "fjord")):
        digest.update(scenes.render(name, domain, 0).tobytes())
    assert scenes.VERSION == 1
    assert digest.hexdigest()[:16] == "c1ecb7cfcb0101fa"


def test_domains_are_disjoint_and_differ():
    assert len(scenes.CLASSES) >= 16
    assert len(scenes.FEDERATED_DOMAINS) >= 4
    assert len(scenes.PRETRAINING_DOMAINS) >= 4
    assert not set(scenes.FEDERATED_DOMAINS) & set(scenes.PRETRAINING_DOMAINS)
    assert set(scenes.HELD_OUT_CLASSES) < set(scenes.CLASSES)
    looks = {(d.season.words, d.region.words, d.sensor.words) for d in DOMAINS.values()}
    assert len(looks) == len(DOMAINS)
    means = [
        np.mean([scenes.render("forest", d, i) for i in range(4)], axis=(0, 1, 2))
        for d in scenes.FEDERATED_DOMAINS
    ]
    for a, b in itertools.combinations(means, 2):
        assert np.abs(a - b).max() > 15


def test_load_covers_and_splits():
    data = load(test_fraction=0.25)
    assert len(data) == 20 * 4 * 4
    assert data.class_names == scenes.CLASSES
    assert data.domain_names == scenes.FEDERATED_DOMAINS
    for domain in range(4):
        for label in range(20):
            here = (data.domains_N == domain) & (data.labels_N == label)
            assert data.split_N[here].tolist() == [TRAIN, TRAIN, TRAIN, TEST]
    image = data.open_image(7)
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(
        np.asarray(image), scenes.render(scenes.CLASSES[1], scenes.FEDERATED_DOMAINS[0], 3)
    )


def test_every_row_opens_its_own_image_also_after_pickling():
    data = load(domains=["delta", "savanna"])
    copy = pickle.loads(pickle.dumps(data))
    for i in (0, 3, 4, 79, 80, 159):
        name, domain = data.class_names[data.labels_N[i]], data.domain_names[data.domains_N[i]]
        expected = scenes.render(name, domain, i % 4)
        np.testing.assert_array_equal(np.asarray(data.open_image(i)), expected)
        np.testing.assert_array_equal(np.asarray(copy.open_image(i)), expected)


def test_a_split_never_empties_either_side():
    for fraction, expected in ((0.01, 1), (0.5, 1), (0.99, 1)):
        data = load(images_per_class=2, test_fraction=fraction)
        assert (data.split_N == TEST).sum() == expected * 80


def test_the_experiment_seed_changes_nothing_and_the_settings_do():
    one, two = load(), load(seed=2)
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(np.asarray(one.open_image(5)), np.asarray(two.open_image(5)))
    changes = ({"images_per_class": 5}, {"domains": ["delta"]}, {"class_names": ["river"]})
    prints = {load(**change).fingerprint for change in changes}
    assert len(prints | {one.fingerprint}) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": ["detla"]}, "no domain 'detla'. Did you mean 'delta'?"),
        ({"domains": ["delta", "delta"]}, "listed twice"),
        ({"class_names": ["rivr"]}, "no class 'rivr'. Did you mean 'river'?"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(UserError) as error:
        load(**values)
    assert message in str(error.value)


def test_captions_never_name_a_held_out_class_but_hold_its_words():
    text = ""
    for name, domain in itertools.product(ALL, scenes.PRETRAINING_DOMAINS):
        if name in scenes.HELD_OUT_CLASSES:
            continue
        notes = ("dense", "ice", "circular", "industrial")
        rng = generator(0, "test", name, domain)
        for _ in range(60):
            text += caption(rng, name, domain, notes).text.lower() + "\n"
    for held in scenes.HELD_OUT_CLASSES:
        assert held not in text
        for word in held.split():
            assert word in text


def test_captions_state_facts_of_their_own_image_only():
    known = set(all_facts())
    for name, domain in itertools.product(ALL, ("boreal", "oasis")):
        if name in scenes.HELD_OUT_CLASSES:
            continue
        image, notes = scenes.draw(name, domain, 1)
        notes += colours(image)
        true = image_facts(name, domain, notes)
        assert true <= known
        rng = generator(0, "test", name, domain)
        for _ in range(10):
            assert caption(rng, name, domain, notes).facts <= true


def test_colours_are_named_as_a_person_would():
    for colour, name in (
        ((250, 250, 250), "white"),
        ((120, 120, 120), "grey"),
        ((20, 20, 20), "dark"),
        ((60, 140, 60), "green"),
        ((60, 110, 200), "blue"),
        ((140, 100, 60), "brown"),
        ((220, 190, 90), "yellow"),
    ):
        assert colours(np.full((64, 64, 3), colour, dtype=np.uint8)) == (name,)
