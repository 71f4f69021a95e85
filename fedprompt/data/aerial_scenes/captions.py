"""Captions for pre-training the tiny CLIP: facts about an image, and sentences that state some.

Only `scripts/pretrain_tiny_clip.py` uses this module; no federated run does.

An image has *facts*: its class, attributes ("circular", "residential", "ice"), season, region,
sensor and ground resolution. A caption states some of them. An image and a caption match if every
fact in the caption is true of the image, even if the caption was made for another image; the
contrastive loss needs no other notion of a pair. A held-out class is never named, but its words
occur, because other classes share its attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.aerial_scenes.domains import COARSE, DOMAINS, FINE
from fedprompt.data.aerial_scenes.scenes import CLASSES, EXTRA_CLASSES, HELD_OUT_CLASSES

NAMES: dict[str, tuple[str, ...]] = {
    "baseball diamond": ("baseball diamond", "baseball field", "ballpark"),
    "beach": ("beach", "sandy beach", "coast with sand"),
    "football field": ("football field", "soccer pitch"),
    "forest": ("forest", "woods", "wooded area"),
    "freeway": ("freeway", "highway", "motorway"),
    "harbor": ("harbor", "port with boats", "marina"),
    "intersection": ("intersection", "crossroads", "street crossing"),
    "island": ("island", "small island"),
    "lake": ("lake", "pond"),
    "mobile home park": ("mobile home park", "trailer park", "caravans in rows"),
    "orchard": ("orchard", "fruit trees in rows"),
    "parking lot": ("parking lot", "parking area", "parked cars"),
    "railway": ("railway", "train tracks", "railway tracks"),
    "rectangular farmland": ("rectangular farmland", "rectangular fields", "rectangular farmland"),
    "river": ("river", "stream"),
    "roundabout": ("roundabout", "traffic circle"),
    "runway": ("runway", "airport runway", "landing strip"),
    "sparse residential": ("sparse residential", "sparse residential area", "lonely houses"),
    "storage tanks": ("storage tanks", "oil tanks", "storage tank"),
    "tennis court": ("tennis court", "tennis courts"),
    "village": ("village", "residential street", "village street"),
    "warehouse": ("warehouse", "large hall", "factory"),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "beach": ("sea", "water"),
    "football field": ("sport", "rectangular"),
    "baseball diamond": ("sport",),
    "forest": ("trees",),
    "freeway": ("road", "cars"),
    "harbor": ("sea", "water", "boats"),
    "intersection": ("road",),
    "island": ("sea", "water"),
    "lake": ("water",),
    "mobile home park": ("residential", "houses", "dense"),
    "orchard": ("farmland", "trees"),
    "parking lot": ("cars",),
    "rectangular farmland": ("farmland", "rectangular"),
    "river": ("water",),
    "roundabout": ("road", "circular"),
    "sparse residential": ("residential", "houses", "sparse"),
    "storage tanks": ("circular", "industrial"),
    "tennis court": ("sport", "rectangular"),
    "village": ("residential", "houses"),
    "warehouse": ("industrial",),
}
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "circular": ("circular", "round"),
    "dense": ("dense",),
    "ice": ("icy", "frozen"),
    "industrial": ("industrial",),
    "rectangular": ("rectangular",),
    "residential": ("residential",),
    "sparse": ("sparse",),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "boats": ("boats", "ships"),
    "cars": ("cars", "traffic"),
    "circular": ("circular shapes", "circles"),
    "farmland": ("farmland", "crop fields", "agricultural farmland"),
    "houses": ("houses", "homes"),
    "ice": ("ice", "floating ice"),
    "industrial": ("industrial buildings", "industrial site"),
    "residential": ("residential houses", "residential buildings", "residential homes"),
    "road": ("road", "street"),
    "sea": ("sea", "the sea", "sea water"),
    "sport": ("sports ground", "playing field"),
    "trees": ("trees",),
    "water": ("water",),
}
DETAILS: dict[str, tuple[str, ...]] = {
    "boats": ("with boats", "with ships"),
    "cars": ("with cars", "with traffic"),
    "circular": ("of circular shape", "with circular shapes"),
    "clearing": ("with a clearing",),
    "dense": ("densely packed", "dense and crowded"),
    "fields": ("through fields", "between fields"),
    "houses": ("with houses", "with some buildings"),
    "ice": ("with ice", "with ice on the water", "with drifting ice"),
    "industrial": ("in an industrial zone", "with industrial halls"),
    "parasols": ("with parasols",),
    "rectangular": ("of rectangular shape",),
    "road": ("with a road",),
    "sea": ("by the sea", "in the sea"),
    "sparse": ("with much empty space", "sparse and scattered"),
    "taxiway": ("with a taxiway",),
    "train": ("with a train",),
    "trees": ("with trees",),
    "water": ("with water",),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "white": ("white", "with white colours"),
    "grey": ("grey", "with grey colours"),
    "dark": ("dark", "with dark colours"),
    "green": ("green", "with green colours"),
    "blue": ("blue", "with blue colours"),
    "brown": ("brown", "with brown colours"),
    "yellow": ("yellow", "with yellow colours"),
}
ANY_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of {}.",
    "a picture of {}",
    "an overhead view of the {}.",
    "{} seen from the air",
    "this is a {}.",
    "{}",
    "{}.",
    "a remote sensing image of {}.",
    "in this picture, which was taken from above, there is a {}.",
)
# "Satellite" describes images with a coarse ground resolution, "aerial" those with a fine one. Such
# a template states a fact about the resolution, so it does not match every image.
ZOOM_TEMPLATES: dict[str, tuple[str, ...]] = {
    FINE[0]: (
        "an aerial photo of a {}.",
        "a detailed aerial photo of {}.",
        "aerial view of a {}.",
        "a good photo of a {} taken from a plane for a survey of the land.",
    ),
    COARSE[0]: (
        "a satellite image of a {}.",
        "a satellite photo of {}.",
        "a small {} on a satellite image.",
    ),
}


@dataclass(frozen=True)
class Caption:
    """A sentence and the facts it states."""

    text: str
    facts: frozenset[str]


def colours(image_HW3: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the names of the colours that cover at least 30 % of an image."""
    # int64, because differences and sums of uint8 would wrap around.
    red, green, blue = np.moveaxis(image_HW3.astype(np.int64), 2, 0)
    bright, spread = (red + green + blue) / 3, image_HW3.max(2).astype(np.int64) - image_HW3.min(2)
    tinted = spread > 28
    shares = {
        "white": (bright > 170) & ~tinted,
        "grey": (bright > 75) & (bright <= 170) & ~tinted,
        "dark": bright <= 75,
        "green": tinted & (bright > 75) & (green > red) & (green > blue),
        "blue": tinted & (bright > 75) & (blue >= green) & (blue > red),
        "brown": tinted & (bright > 75) & (bright <= 140) & (red >= green) & (red > blue),
        "yellow": tinted & (bright > 140) & (red >= green) & (red > blue),
    }
    return tuple(name for name, covered in shares.items() if covered.mean() >= 0.3)


def image_facts(class_name: str, domain: str, notes: tuple[str, ...]) -> frozenset[str]:
    """Return all facts about an image that captions can state.

    Args:
        class_name: the image's class.
        domain: the image's domain.
        notes: what `draw` and `colours` returned for the image.
    """
    return frozenset((class_name, *ATTRIBUTES.get(class_name, ()), *notes, *_domain_words(domain)))


def caption(
    rng: np.random.Generator, class_name: str, domain: str, notes: tuple[str, ...]
) -> Caption:
    """Draw a random caption of an image: a subject, and perhaps attributes and facts of the domain.

    One caption in five omits the class and names an attribute instead. No caption contains the name
    of a held-out class.

    Args:
        rng: the generator of the caption.
        class_name: the image's class.
        domain: the image's domain.
        notes: what `draw` and `colours` returned for the image.

    Returns:
        The sentence and the facts that it states.
    """
    # Independent words can combine to the name of a held-out class ("dense" and "residential").
    # Such a caption would leak the name into pre-training, so it is drawn again.
    while True:
        drawn = _draw_caption(rng, class_name, domain, notes)
        if not any(name in drawn.text.lower() for name in HELD_OUT_CLASSES):
            return drawn


def all_facts() -> tuple[str, ...]:
    """Return every fact that an image can have, sorted."""
    facts = {*CLASSES, *EXTRA_CLASSES, *ADJECTIVES, *NOUNS, *DETAILS}
    facts |= {*COLOURS}
    facts |= {word for domain in DOMAINS for word in _domain_words(domain)}
    return tuple(sorted(facts))


def _domain_words(domain: str) -> dict[str, tuple[str, ...]]:
    """Return the facts of a domain and the words for each."""
    look = DOMAINS[domain]
    groups = (look.season.words, look.region.words, look.sensor.words, look.zoom_words)
    # The prefix distinguishes a sensor's "dark" from the colour of that name.
    return {f"look:{words[0]}": words for words in groups}


def _draw_caption(
    rng: np.random.Generator, class_name: str, domain: str, notes: tuple[str, ...]
) -> Caption:
    """Draw a caption, which may contain the name of a held-out class; arguments as in `caption`.

    Every word that states something about the image adds a fact. A missing fact would let the
    caption match images that it does not describe.
    """
    attributes = [*ATTRIBUTES.get(class_name, ()), *notes]
    facts: set[str] = set()
    if attributes and rng.random() < 0.2:
        subject = _one(rng, [a for a in attributes if a in NOUNS])
        # If no attribute has a noun, the subject is "place", which states nothing.
        facts |= {subject} - {""}
        words = _one(rng, NOUNS.get(subject, ("place",)))
    else:
        facts.add(class_name)
        words = _one(rng, NAMES[class_name])
    describing = [a for a in attributes if a in ADJECTIVES and a not in facts]
    if describing and rng.random() < 0.35:
        adjective = _one(rng, describing)
        if adjective not in words:
            words = f"{_one(rng, ADJECTIVES[adjective])} {words}"
            facts.add(adjective)
    detailed = [a for a in attributes if a in DETAILS and a not in facts]
    if detailed and rng.random() < 0.3:
        detail = _one(rng, detailed)
        words = f"{words} {_one(rng, DETAILS[detail])}"
        facts.add(detail)
    look = _domain_words(domain) | {note: COLOURS[note] for note in notes if note in COLOURS}
    before, after = "", ""
    for fact in look:
        if rng.random() < 0.25:
            facts.add(fact)
            word = _one(rng, look[fact])
            if " " in word or rng.random() < 0.3:
                after = f"{after}, {word}" if rng.random() < 0.5 else f"{after} {word}"
            else:
                before = f"{before}{word} "
    if before and rng.random() < 0.4:
        words, before = f"{before}{words}", ""
    zoom = DOMAINS[domain].zoom_words[0]
    templates = ANY_TEMPLATES
    if zoom in ZOOM_TEMPLATES and rng.random() < 0.5:
        templates = ZOOM_TEMPLATES[zoom]
        facts.add(f"look:{zoom}")
    text = _one(rng, templates).format(words)
    if after:
        text = text.rstrip(".") + after
    if before:
        text = f"{before.strip()}: {text}" if rng.random() < 0.5 else f"{before}{text}"
    return Caption(_drop_words(rng, text), frozenset(facts))


def _drop_words(rng: np.random.Generator, text: str) -> str:
    """Remove articles and other small words from 15 % of the sentences."""
    if rng.random() < 0.15:
        kept = [w for w in text.split() if w not in ("a", "an", "the", "of", "is", "this")]
        return " ".join(kept)
    return text


def _one(rng: np.random.Generator, words: list[str] | tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))] if words else ""
