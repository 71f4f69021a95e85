"""What workers of a simulation take from the process that started them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.experiment.workspaces import ResourceCache, open_workspace, opener_for
from tests.support.builders import small_config
from tests.support.fake_data import truncated, write_image_folder


def test_a_worker_takes_the_verdicts_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickled copy opens the images, and a workspace that is given one does not scan."""
    root = write_image_folder(tmp_path / "root", {"a": 6, "b": 6})
    (root / "a" / "000.png").write_bytes(truncated())
    config = small_config(
        data={"source": "folder", "root": str(root), "title": "t", "on_bad_image": "skip"},
        partition={"scheme": "iid", "clients": 2},
    )
    config = replace(config, output=replace(config.output, cache=str(tmp_path / "cache")))
    resources = ResourceCache()
    expected = open_workspace(config, resources=resources)
    sent = pickle.dumps(opener_for(config, resources))
    monkeypatch.delattr("fedprompt.data.sources.parts.image_files.scan")
    monkeypatch.delattr("fedprompt.data.sources.folder.read_folder")
    opened = pickle.loads(sent)(config)
    assert opened.dataset.labels_N.tolist() == expected.dataset.labels_N.tolist()
    assert opened.dataset.hashes == expected.dataset.hashes
    for client in range(2):
        rows = opened.partition.train(client)
        assert rows.tolist() == expected.partition.train(client).tolist()
        theirs = expected.views[0].rows(rows).features
        assert opened.views[0].rows(rows).features.equal(theirs)
    # A data set that is held in memory, or that refers to files of this machine's caches, is
    # opened by every worker itself.
    assert opener_for(small_config(), resources) is open_workspace
