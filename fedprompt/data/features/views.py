"""Feature tables of all views of a data set, with a second model's features if asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.token_routing import TokenRouting
from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable, open_feature_table


def open_views(
    clip: FrozenCLIP,
    dataset: ImageDataset,
    config: DataConfig,
    cache_dir: Path,
    needs: Collection[str],
    teacher: FrozenCLIP | None = None,
    *,
    routing: TokenRouting | None = None,
    progress: bool = False,
) -> tuple[FeatureTable, ...]:
    """Open one feature table per view of `data.views`.

    Args:
        clip: the frozen backbone.
        dataset: the images.
        config: the experiment's `data` section.
        cache_dir: the cache folder.
        needs: what the method needs beside features.
        teacher: another frozen model whose features of the same crops the method reads, or None.
        routing: how tokens are routed, if that is needed.
        progress: whether to show a bar while images that no cache holds are encoded.

    Raises:
        UserError: the backbone lacks what is needed, an image cannot be read, or the cache cannot
            be written.
    """

    def view(model: FrozenCLIP, number: int, columns: Collection[str]) -> FeatureTable:
        return open_feature_table(
            model,
            dataset,
            cache_dir,
            columns,
            view=number,
            crop_scale=config.crop_scale,
            routing=routing if "routing" in columns else None,
            progress=progress,
        )

    views = tuple(view(clip, number, needs) for number in range(config.views))
    if teacher is None:
        return views
    # The same crops of the same images, as the teacher sees them.
    return tuple(
        replace(table, teacher_NT=view(teacher, number, {"features"}).features_ND)
        for number, table in enumerate(views)
    )
