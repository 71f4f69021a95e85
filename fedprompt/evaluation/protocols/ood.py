"""Out-of-distribution detection: does a model notice images of classes that it has no name for?

Scores: MSP, MCM, energy and NegLabel, see `fedprompt/evaluation/ood_scores.py`; GL-MCM (Miyai et
al., IJCV 2025, arXiv 2304.04521): MCM plus `local_weight` times the highest such probability of any
patch. The settings are those of the authors' codes. How we differ: MCM's and GL-MCM's code takes
FPR95 where the recall is nearest to 95 %; we take it at the highest threshold that keeps 95 % of
the known images, as is usual. A method with a head of its own for novelty (`Method.novelty`) has a
further score.

Known images are the server's test images. The other images are those of the data sets in `out`, by
name or as `{use: name, key: value}`. If `out` is empty, they are test images of held-out classes:
the new classes of base_to_new if that protocol runs too, otherwise the last `held_share` of the
classes. Known images are the positives of AUROC and AUPR. The server measures zero-shot and the
global model after the last round; personal models are not measured.

Shape suffixes: N or n images, P patches, D joint embedding, B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.negative_words import TEMPLATE, negative_words
from fedprompt.backbone.patch_features import local_encoder
from fedprompt.config.fields import option
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import Encoding
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.rows import Rows
from fedprompt.data.held_out import HeldOut
from fedprompt.evaluation.held_classes import hold_out_last
from fedprompt.evaluation.metrics import Floats, auroc, average_precision, fpr_at_tpr
from fedprompt.evaluation.ood_scores import energy, highest_probability, neg_label, novelty_head
from fedprompt.evaluation.other_data_sets import TestSet, complete, open_others
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Axis, Curve, Figure, Lines, palette
from fedprompt.reports.figure_parts import stairs
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, logits_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

BINS = 40
NO_PATCHES = "the backbone's image tower gives no patch features"
NEEDS_MORE = "the method's logits need more than one feature vector per image"


@dataclass(frozen=True)
class OodOptions:
    """Which images are out of distribution, and the settings of the scores."""

    out: list[Any] = option([], "data sets, by name or {use: name, ...}; empty = held-out classes")
    held_share: float = option(0.25, "share of classes held out for it, the last ones", gt=0, lt=1)
    temperature: float = option(1.0, "softmax temperature of the cosines", gt=0)
    local: bool = option(True, "also GL-MCM, where the backbone gives patch features")
    local_weight: float = option(1.0, "GL-MCM: weight of the local score", ge=0)
    negatives: int = option(100, "NegLabel: words far from all class names; 0 = no NegLabel", ge=0)


@dataclass(frozen=True, eq=False)
class _Images:
    """Images of one kind.

    Attributes:
        name: name of the kind, for tables.
        inputs_N: what the method needs of the images (n, ...).
        dataset: the data set of the images, from which local features are encoded.
        index_N: indices of the images in the data set (n,).
    """

    name: str
    inputs_N: Inputs
    dataset: ImageDataset
    index_N: NDArray[np.int64]


class Ood(Reported):
    """AUROC, FPR95 and AUPR of every score."""

    name = "ood"
    title = "Out-of-distribution detection"
    needs_global = True
    caption = "MCM score of known images and of images whose class the model has no name for."
    Options = OodOptions
    options: OodOptions
    _others: list[TestSet]
    _words_WD: Tensor

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Expand the data sets to complete `data` sections; see `Protocol.prepare`."""
        where = f"protocol_options.{cls.name}.out"
        return {**options, "out": complete(options.get("out") or [], where)}

    @property
    def holds_out(self) -> Literal["classes"] | None:
        """Classes are held out if no other data set is given."""
        return None if self.options.out else "classes"

    @property
    def takes_held_out(self) -> bool:
        """The new classes of base_to_new can serve as the unknown classes."""
        return True

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Hold out the last classes; see `Protocol.hold_out`."""
        share, or_else = self.options.held_share, ", or name data sets in protocol_options.ood.out"
        return hold_out_last(dataset, share, self.name, or_else)

    def open(self, workspace: Workspace) -> None:
        """Open the other data sets, and encode what no cache holds, including patch features."""
        cache_dir = default_cache_dir(self.config.output.cache)
        self._others = open_others(
            self.options.out,
            self.config.seed,
            workspace.clip,
            cache_dir,
            workspace.method,
            workspace.config.data,
        )
        clip, names = workspace.clip, workspace.task.class_names
        if self.options.negatives:
            key = f"protocol_options.{self.name}.negatives"
            words = negative_words(clip, names, self.options.negatives, key)
            self._words_WD = clip.zero_shot_classifier(words, [TEMPLATE])
        # Patches are encoded now, so that an unreadable image ends the run before training.
        if self._why_not_local(workspace) is None:
            for images in self._images(workspace):
                self._local_features(workspace, images)

    def measure(self, run: Finished) -> dict[str, Any]:
        """AUROC, FPR95 and AUPR of each model, score and kind of other images."""
        workspace = run.workspace
        reference = zero_shot(workspace.clip, workspace.task)
        models = {"zero-shot": (reference, encode_global(reference, {}))}
        if workspace.method.has_global:
            encoded = encode_global(workspace.method, run.shared, workspace.memo)
            models["global"] = (workspace.method, encoded)
        why_not = self._why_not_local(workspace)
        known, *others = self._images(workspace)
        rows, histogram = [], {}
        for model, (method, encoded) in models.items():
            scores = [
                self._scores(workspace, method, encoded, images, why_not is None)
                for images in (known, *others)
            ]
            rows += [
                {"model": model, "score": score, "out": other.name}
                | _numbers(scores[0][score], of_other)
                for other, found in zip(others, scores[1:], strict=True)
                for score, of_other in found.items()
            ]
            histogram[model] = _histogram(
                [images.name for images in (known, *others)], [s["MCM"] for s in scores]
            )
        return {
            "known_images": len(known.index_N),
            "out_images": {images.name: len(images.index_N) for images in others},
            "temperature": self.options.temperature,
            "local_weight": self.options.local_weight,
            "no_local": why_not,
            "rows": rows,
            "histogram": histogram,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model, score and kind of other images."""
        several = len(part["out_images"]) > 1
        rows = tuple(
            (
                f"{row['model']}, {row['score']}" + (f", {row['out']}" if several else ""),
                *(percent(row[key]) for key in ("auroc", "fpr95", "aupr")),
            )
            for row in part["rows"]
        )
        out = ", ".join(f"{n:,} of {name}" for name, n in part["out_images"].items())
        note = f"{part['known_images']:,} known test images against {out}; known images positive."
        if part["no_local"]:
            note += f" No GL-MCM: {part['no_local']}."
        return Table(cls.title, ("model, score", "AUROC", "FPR95", "AUPR"), rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Histograms of the MCM score of the global model, or of zero-shot if there is none."""
        model = "global" if "global" in part["histogram"] else "zero-shot"
        histogram = part["histogram"][model]
        curves = []
        for i, (name, share) in enumerate(histogram["share"].items()):
            x, y = stairs(histogram["edges"], share)
            curves.append(Curve(name=name, color=palette(i), x=x, y=y, width=1.6))
        panel = Lines(
            curves=curves,
            x=Axis(label="Score"),
            y=Axis(label="Images", format="percent", low=0),
            nearest=True,
        )
        return Figure(
            name=cls.name, title=f"MCM of the {model} model", caption=cls.caption, panels=[panel]
        )

    def _images(self, workspace: Workspace) -> list[_Images]:
        """The known images first, then each kind of other images."""
        dataset, index_N = workspace.dataset, workspace.partition.server_test
        kinds = [_Images("known classes", workspace.server_test()[0], dataset, index_N)]
        if not self.options.out:
            held = workspace.held_out
            assert held is not None
            inputs_N, _ = workspace.held_out_test()
            kinds.append(_Images("held-out classes", inputs_N, dataset, held.index_N))
        kinds += [_Images(o.name, o.inputs_N, o.dataset, o.index_N) for o in self._others]
        return kinds

    def _why_not_local(self, workspace: Workspace) -> str | None:
        if not self.options.local:
            return "protocol_options.ood.local is false"
        # A patch is scored as if it were an image, and a patch has nothing but one feature vector.
        if workspace.method.needs != {"features"}:
            return NEEDS_MORE
        return NO_PATCHES if local_encoder(workspace.clip) is None else None

    def _local_features(self, workspace: Workspace, images: _Images) -> Rows:
        """Local features (n, P, D), cached in half precision, which suffices for cosines."""
        found = local_encoder(workspace.clip)
        assert found is not None
        encode, patches = found
        clip, open_image = workspace.clip, images.dataset.open_image

        def load(index: int) -> Tensor:
            return clip.preprocess(open_image(index))

        encoding = Encoding("local", (patches, clip.embed_dim), load, encode, "<f2")
        cache_dir = default_cache_dir(self.config.output.cache)
        (rows,) = cached(clip, images.dataset, cache_dir, [encoding], index_R=images.index_N)
        return rows

    def _negative_logits(self, workspace: Workspace, images: _Images) -> Tensor:
        """CLIP's own logits of the negative words (n, W)."""
        clip = workspace.clip
        features_ND = images.inputs_N.features.to(clip.device).float()
        return clip.logit_scale * (features_ND @ self._words_WD.T)

    def _scores(
        self, workspace: Workspace, method: Method, encoded: Tensors, images: _Images, local: bool
    ) -> dict[str, Floats]:
        """The scores of every image (n,) by name; GL-MCM if `local` is true."""
        # A method's logits are cosines times CLIP's logit scale, which MCM does not use.
        at = self.options.temperature * workspace.clip.logit_scale
        logits_NC = torch.cat(list(logits_of(method, encoded, images.inputs_N, workspace.memo)))
        whole_N = highest_probability(logits_NC, at)
        scores = {
            "MCM": whole_N,
            "MSP": highest_probability(logits_NC),
            "energy": energy(logits_NC),
            **novelty_head(method, encoded, images.inputs_N),
        }
        if self.options.negatives:
            scores["NegLabel"] = neg_label(logits_NC, self._negative_logits(workspace, images))
        if not local:
            return scores
        local_NPD = self._local_features(workspace, images)
        # In batches, which bounds the memory for float32 features of all patches.
        parts = []
        for first in range(0, len(local_NPD), 64):
            some = torch.from_numpy(local_NPD[first : first + 64].astype(np.float32))
            # To the method, every patch is an image with one feature vector.
            flat = torch.cat(list(logits_of(method, encoded, Inputs(some.flatten(0, 1)))))
            parts.append(highest_probability(flat, at).reshape(some.shape[:2]).max(-1))
        scores["GL-MCM"] = whole_N + self.options.local_weight * np.concatenate(parts)
        return scores


def _numbers(known_N: Floats, other_N: Floats) -> dict[str, float]:
    return {
        "auroc": auroc(known_N, other_N),
        "fpr95": fpr_at_tpr(known_N, other_N),
        "aupr": average_precision(known_N, other_N),
    }


def _histogram(names: list[str], scores: list[Floats]) -> dict[str, Any]:
    """The fraction of each kind's images per bin, with common bin edges."""
    low, high = min(s.min() for s in scores), max(s.max() for s in scores)
    # Equal scores everywhere would give bins of width 0.
    edges = np.linspace(low, high if high > low else low + 1e-6, BINS + 1)
    share = {
        name: (np.histogram(s, edges)[0] / len(s)).tolist()
        for name, s in zip(names, scores, strict=True)
    }
    return {"edges": edges.tolist(), "share": share}
