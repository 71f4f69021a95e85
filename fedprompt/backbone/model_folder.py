"""Models in the layout of the Hugging Face hub: one folder with settings, weights and tokenizer.

`backbone.model=local-dir:FOLDER` names such a folder on this machine, and `hf-hub:OWNER/NAME` one
on the hub, as in open_clip. `open_clip_config.json` holds the settings of the model and of its
images. Weights are one file, or several with an index. A text tower of Hugging Face needs its
`config.json` besides, which is taken from the folder if it is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from open_clip.hf_configs import arch_dict

from fedprompt.config.schema import LOCAL_FOLDER, ON_HUB
from fedprompt.errors import UserError
from fedprompt.hub import stay_offline_if_unreachable

SETTINGS = "open_clip_config.json"
INDEX = ".safetensors.index.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    f"open_clip_model{INDEX}",
    f"model{INDEX}",
    "pytorch_model.bin",
)
"""Names of weights in the order in which they are looked for; open_clip's come first."""


@dataclass(frozen=True)
class ModelFolder:
    """A model in the hub's layout.

    Attributes:
        name: `OWNER/NAME` on the hub, or the name of the local folder.
        path: the folder on this machine; that of the hub's cache for a model on the hub.
        hub_id: `OWNER/NAME`, or None for a local folder.
    """

    name: str
    path: Path
    hub_id: str | None

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's settings and those of its images, in open_clip's format.

        Raises:
            UserError: the file is damaged or holds something else.
        """
        file = self.path / SETTINGS
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"backbone: cannot read {file}: {error}") from None
        model_cfg = content.get("model_cfg") if isinstance(content, dict) else None
        if not isinstance(model_cfg, dict) or not {"vision_cfg", "text_cfg"} <= model_cfg.keys():
            raise UserError(
                f"backbone: {file} does not describe a CLIP model: it needs 'model_cfg' with "
                "'embed_dim', 'vision_cfg' and 'text_cfg', as open_clip writes it."
            )
        return model_cfg, dict(content.get("preprocess_cfg") or {})

    def weights(self) -> Path:
        """The file of weights, or the index of several.

        Raises:
            UserError: there is none, or it cannot be downloaded.
        """
        files = self._files()
        found = next((name for name in WEIGHTS if name in files), None)
        if found is None:
            raise UserError(
                f"backbone: {self.name} has no file of weights ({', '.join(WEIGHTS[:3])}, ...); "
                "name one by backbone.checkpoint."
            )
        source = self._fetch(found)
        if found.endswith(INDEX):
            for shard in shards(source):
                self._fetch(shard.name)
        return source

    def text_config(self) -> str | None:
        """The folder, if it holds the `config.json` of a text tower that open_clip knows."""
        try:
            content = json.loads((self.path / "config.json").read_bytes())
        except (OSError, ValueError):
            return None
        known = isinstance(content, dict) and content.get("model_type") in arch_dict
        return str(self.path) if known else None

    def _files(self) -> set[str]:
        if self.hub_id is None or constants.HF_HUB_OFFLINE:
            return {file.name for file in self.path.iterdir()}
        try:
            return set(HfApi().list_repo_files(self.hub_id))
        except Exception as error:  # the hub's errors have no common parent
            raise _unreachable(self.hub_id, error) from None

    def _fetch(self, name: str) -> Path:
        return self.path / name if self.hub_id is None else _download(self.hub_id, name)


def find_folder(model: str) -> ModelFolder | None:
    """The folder that `backbone.model` names; None if it is the name of an architecture.

    Raises:
        UserError: there is no such folder or model, or it has no settings.
    """
    if model.startswith(LOCAL_FOLDER):
        path = Path(model.removeprefix(LOCAL_FOLDER)).expanduser()
        if not (path / SETTINGS).is_file():
            what = "has no" if path.is_dir() else "is no folder with"
            raise UserError(f"backbone: {path} {what} {SETTINGS}; see backbone.model.")
        return ModelFolder(path.resolve().name, path, None)
    if model.startswith(ON_HUB):
        hub_id = model.removeprefix(ON_HUB)
        stay_offline_if_unreachable()
        return ModelFolder(hub_id, _download(hub_id, SETTINGS).parent, hub_id)
    return None


def shards(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, beside it.

    Raises:
        UserError: the index is damaged, or names a file elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"backbone: {index} is no index of sharded weights.") from None
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"backbone: {index} names files that are not beside it.")
    return [index.parent / name for name in names]


def _download(hub_id: str, name: str) -> Path:
    """A file of a model on the hub, downloaded or from the hub's cache."""
    try:
        return Path(hf_hub_download(hub_id, name))
    except Exception as error:  # the hub's errors have no common parent
        raise _unreachable(hub_id, error, name) from None


def _unreachable(hub_id: str, error: Exception, name: str = "the list of files") -> UserError:
    return UserError(
        f"backbone: {name} of {hub_id} could not be downloaded from the hub "
        f"({type(error).__name__}); check the name, or download the model on a machine with a "
        "connection and name its folder: backbone.model=local-dir:FOLDER."
    )
