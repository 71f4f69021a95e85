"""Mistakes in experiment files and overrides are refused in one line that names the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedprompt.experiment.compose import compose
from tests.support.refusals import refused

REFUSED_OVERRIDES = {
    # misspelt keys name the nearest
    "training.optimiser=sgd": "unknown key 'training.optimiser'. Did you mean 'optimizer'?",
    "trainin.lr=1": "unknown key 'trainin.lr'. Did you mean 'training.lr'?",
    "sed=1": "unknown key 'sed'. Did you mean 'seed'?",
    "rounds=3": "unknown key 'rounds'. Did you mean 'federation.rounds'?",
    "federatoin.rouns=3": "unknown key 'federatoin.rouns'. Did you mean 'federation.rounds'?",
    "training.optimizer=sgdd": "training.optimizer is 'sgdd'; it must be one of sgd, adam, adamw. "
    "Did you mean 'sgd'?",
    "method.tetha=0.5": "unknown key 'method.tetha'. Did you mean 'theta'?",
    "strategy.max_nrm=1": "unknown key 'strategy.max_nrm'. Did you mean 'max_norm'?",
    "backbone.presicion=bf16": "unknown key 'backbone.presicion'. Did you mean 'precision'?",
    "method.context_tokens=4": "unknown key 'method.context_tokens'.",
    "federation[rounds]=4": "unknown key 'federation[rounds]'. Did you mean 'federation.rounds'?",
    "federation..rounds=4": "unknown key 'federation.'.",
    "a..b=1": "unknown key 'a..b'. Known: ",
    # wrong types
    "federation.rounds=ten": "federation.rounds is 'ten'; it must be a whole number.",
    "federation.rounds=2.5": "federation.rounds is 2.5; it must be a whole number.",
    "federation.rounds=true": "federation.rounds is true; it must be a whole number.",
    "federation.rounds=[1]": "federation.rounds is [1]; it must be a whole number.",
    "federation.rounds=": "federation.rounds is None; it must be a whole number.",
    "federation.rounds.x=5": "federation.rounds is {'x': 5}; it must be a whole number.",
    "federation.rounds=5\nseed=3": "federation.rounds is '5 seed=3'; it must be a whole number.",
    "training.lr=fast": "training.lr is 'fast'; it must be a number.",
    "training.lr=true": "training.lr is true; it must be a number.",
    "evaluation.local_only=maybe": "evaluation.local_only is 'maybe'; it must be true or false.",
    "data.title=null": "data.title is None; it must be text.",
    "data.templates=x": "data.templates is 'x'; it must be a list of texts.",
    "data.class_names={a: b}": "data.class_names is {'a': 'b'}; it must be a list of texts.",
    "partition.shots=few": "partition.shots is 'few'; it must be a whole number or null.",
    "simulation.kind=slurm": "simulation.kind is 'slurm'; it must be one of inline, ray.",
    "method.dpa=l2": "method.dpa is 'l2'; it must be one of none, cosine, mse, kl, contrastive.",
    "federation=5": "'federation' must hold keys, got 5.",
    "federation=[1]": "'federation' must hold keys, got [1].",
    "backbone.model.x=1": "'backbone.model.x': 'model' has no keys of its own.",
    "seed.x=1": "seed is {'x': 1}; it must be a whole number, 0 or more",
    # out of range
    "federation.fraction=0": "federation.fraction is 0.0; it must be greater than 0.",
    "federation.fraction=1.01": "federation.fraction is 1.01; it must be at most 1.",
    "training.momentum_state=kept": "training.momentum_state is 'kept'; it must be one of reset, "
    "keep. Did you mean 'keep'?",
    "training.momentum=1": "training.momentum is 1.0; it must be less than 1.",
    "federation.rounds=-1": "federation.rounds is -1; it must be at least 0.",
    "partition.shots=0": "partition.shots is 0; it must be at least 1.",
    "method.theta=2": "method.theta is 2.0; it must be at most 1.",
    "training.lr=nan": "training.lr is nan; it must be a finite number.",
    'training.lr="nan"': "training.lr is nan; it must be a finite number.",
    "training.lr=.inf": "training.lr is inf; it must be a finite number.",
    "federation.timeout_s=inf": "federation.timeout_s is inf; it must be a finite number.",
    "seed=999999999999999999999": "seed is 999999999999999999999; it must be a whole number",
    "seed=-1": "seed is -1; it must be a whole number, 0 or more",
    "seed=1.5": "seed is 1.5; it must be a whole number, 0 or more",
    "seed=true": "seed is True; it must be a whole number, 0 or more",
    # no key=value, no YAML
    "federation.rounds": "'federation.rounds' is not key=value, e.g. federation.rounds=20.",
    "--seed 3": "'--seed 3' is not key=value",
    "=3": "'=3' is not key=value",
    "": "'' is not key=value",
    "training.lr=[": "cannot read 'training.lr=[': ",
    "training.lr={a": "cannot read 'training.lr={a': ",
    # names select, paths do not
    "method=fedrsclp": "no method 'fedrsclp'. Did you mean 'fedrsclip'?",
    "method=": "'method=' has no value.",
    "method=5": "no method '5'. Known: ",
    "method=[promptfl]": "no method \"['promptfl']\".",
    "strategy=fedavgg": "no strategy 'fedavgg'. Did you mean 'fedavg'?",
    "backbone=openai_vitb16": "no backbone 'openai_vitb16'. Did you mean 'openai_vit_b16'?",
    "data=cifar": "no data 'cifar'.",
    "method=../strategy/fedavg": "no method '../strategy/fedavg'. ",
    "data=/etc/hostname": "no data '/etc/hostname'. ",
    "experiment=../../etc": "experiment is '../../etc'; it names the run folder",
    "experiment=a/b": "experiment is 'a/b'; it names the run folder",
    "experiment=": "experiment is None; it names the run folder",
    # nothing is filled in behind the user's back
    "output.root=${oc.env:HOME}": "output.root is '${oc.env:HOME}'; write the value itself.",
    "training.lr=${seed}": "training.lr is '${seed}'; write the value itself.",
    "training.lr=???": "training.lr is '???'; write the value itself.",
    'data.templates=["a ${x} {}"]': "data.templates is 'a ${x} {}'; write the value itself.",
    # combinations without meaning
    "backbone.model=ViT-B-16": "backbone: 'ViT-B-16' needs weights: set backbone.pretrained",
    "data.source=hub": "data: source 'hub' needs 'hub_id'.",
    "data.templates=[a photo]": "data: template 'a photo' must contain {} exactly once.",
    "data.templates=[]": "data: 'templates' is empty",
    "method.prompts=shared": "method: 'dpa' aligns two prompts",
}


@pytest.mark.parametrize("override", REFUSED_OVERRIDES)
def test_a_bad_override_is_one_line(base: Path, override: str) -> None:
    line = refused(lambda: compose(base, [override]))
    assert line.startswith("config: ")
    assert line.removeprefix("config: ").startswith(REFUSED_OVERRIDES[override])


REFUSED_FILES: dict[str, str | bytes] = {
    "not valid YAML: while parsing": "training: [1,\n",
    "not valid YAML: mapping values": "training:\tlr: 1\n",
    "found duplicate key seed": "seed: 1\nseed: 2\n",
    "could not determine a constructor": "x: !!python/object/apply:os.getcwd []\n",
    "is not text in UTF-8": b"\xff\xfe\x00",
    "control characters are not allowed": b"seed: \x00",
    "must hold 'key: value' lines": "- seed\n- 1\n",
    "unknown key 'experimnt'. Did you mean 'experiment'?": "experimnt: x\n",
    "unknown key '1'": "1: 2\n",
    r"unknown key 'new\nline'": '"new\\nline": 2\n',
    "unknown key 'training.1'": "training: {1: 2}\n",
    "'training' must hold keys, got 3": "training: 3\n",
    "mine.yaml extends itself": "extends: mine.yaml\n",
    "'extends' must name one experiment, got ['a']": "extends: [a]\n",
    "no experiment 'quickstar'. Did you mean 'quickstart'?": "extends: quickstar\n",
    "no file": "extends: nowhere.yaml\n",
    "no method 'None'": "method: {use: }\n",
    "backbone.device is 'tpu'; it must be one of auto, cpu, cuda, mps": (
        "backbone: {use: tiny, device: tpu}\n"
    ),
    "training.lr is '${seed}'": "training: {lr: '${seed}'}\n",
    "seed is '${x}'": "seed: ${x}\n",
}


@pytest.mark.parametrize("match", REFUSED_FILES)
def test_a_bad_file_is_one_line(write: Callable[..., Path], match: str) -> None:
    path = write(REFUSED_FILES[match])
    assert match in refused(lambda: compose(path))


def test_files_that_extend_each_other_are_refused(write: Callable[..., Path]) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert "extends itself" in refused(lambda: compose(write("extends: a.yaml\n")))


def test_missing_experiments_are_refused(tmp_path: Path) -> None:
    assert refused(lambda: compose("quickstar")) == (
        "config: no experiment 'quickstar'. Did you mean 'quickstart'?"
    )
    assert refused(lambda: compose("../method/promptfl")).startswith("config: no experiment '../")
    assert refused(lambda: compose("")).startswith("config: no experiment ''. Known: ")
    assert refused(lambda: compose(tmp_path / "x.yaml")) == f"config: no file {tmp_path}/x.yaml."
    (tmp_path / "folder.yaml").mkdir()
    assert "no file" in refused(lambda: compose(tmp_path / "folder.yaml"))


def test_a_file_that_cannot_be_read_is_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert refused(lambda: compose(base)) == f"config: cannot read {base}: Permission denied."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("grid.kind=ray", "'grid.kind' is now 'simulation.kind'"),
        ("grid.cohort_size=4", "'grid.cohort_size' is now 'simulation.clients_per_block'"),
        ("simulation.cohort_timeout_s=9", "is now 'simulation.block_timeout_s'"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    assert new in refused(lambda: compose("quickstart", [old]))


def test_an_old_section_in_a_file_is_refused_with_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("extends: quickstart\ngrid: {threads: 1}\n")
    assert "'grid' is now 'simulation'" in refused(lambda: compose(path))
