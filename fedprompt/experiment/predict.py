"""Using a trained model: classify image files, or export class embeddings for plain open_clip.

Everything comes from a finished run folder and the backbone's weights; no data set is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import Config, DataConfig
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.features.table import encode_inputs
from fedprompt.data.images import PLAIN, decode_rgb
from fedprompt.data.sources.base import StoredImagesConfig
from fedprompt.data.threads import in_threads
from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import read_checkpoint, read_tensors
from fedprompt.experiment.companions import with_companions
from fedprompt.experiment.logs import StrategyLog, load_client_states
from fedprompt.experiment.resuming import read_config
from fedprompt.federation.registry import strategy_class
from fedprompt.files import read_regular, refuse_foreign, write_bytes
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.registry import method_class
from fedprompt.optimizer import without_momentum
from fedprompt.reports.run_data import (
    CHECKPOINT,
    PARTITION,
    PRIVATE,
    PROMPTS,
    STRATEGY,
    check_partition,
    read_object,
)
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import check_private


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: the image file.
        classes: names of the classes, most probable first.
        probabilities: their softmax probabilities.
    """

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class PromptModel:
    """The frozen CLIP with learned prompts.

    Args:
        clip: the frozen backbone.
        method: the method that learned the prompts.
        shared: its shared tensors and extras by name.
        private: a client's private tensors by name; empty if the method has none, and None for the
            global model.
        data: the config's `data` section; images are read as the run has read its own.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        method: Method,
        shared: Tensors,
        private: Tensors | None,
        data: DataConfig,
    ) -> None:
        if data.multi_label:
            raise UserError(
                f"the model was trained on images with several labels (data.source={data.source}), "
                "and predictions and exports name one class per image; use the run's own tests."
            )
        self.clip, self.method, self.task = clip, method, method.task
        self.whose = "global" if private is None else "personal"
        self.pixels = data.pixels if isinstance(data, StoredImagesConfig) else PLAIN

        def one_client(tensors: Tensors) -> Tensors:
            return {n: t[None].to(clip.device) for n, t in tensors.items()}

        # Encoded once: the class prompts do not depend on the images.
        with torch.no_grad():
            self.encoded = method.encode(
                one_client(shared), None if private is None else one_client(private)
            )

    def predict(self, paths: Sequence[Path], top: int = 3) -> list[Prediction]:
        """Classify images; see `predictions`.

        Returns:
            One prediction per image, in order.
        """
        return list(self.predictions(paths, top))

    def predictions(self, paths: Sequence[Path], top: int = 3) -> Iterator[Prediction]:
        """Classify images batch by batch, as the predictions are asked for.

        Images are encoded in batches of `backbone.image_batch`, while threads decode the next two
        batches. The memory does not depend on the number of images.

        Args:
            paths: image files.
            top: number of classes per image.

        Yields:
            One prediction per image, in order.

        Raises:
            UserError: a file is missing, which is found before the first batch, or is not a
                readable image.
        """
        for path in paths:
            with _reading(path):
                path.stat()
        size = self.clip.image_batch
        with closing(in_threads(self._load, paths, ahead=2 * size)) as images:
            for first in range(0, len(paths), size):
                batch = paths[first : first + size]
                images_B3HW = torch.stack(list(islice(images, len(batch))))
                yield from self._classify(batch, images_B3HW, top)

    def _load(self, path: Path) -> Tensor:
        with _reading(path):
            return self.clip.preprocess(decode_rgb(read_regular(path), self.pixels))

    @torch.no_grad()
    def _classify(self, paths: Sequence[Path], images_B3HW: Tensor, top: int) -> list[Prediction]:
        """The predictions of one batch."""
        inputs_B = encode_inputs(self.clip, images_B3HW, self.method.needs, self.method.routing)
        inputs_1B = inputs_B.of_one().on(self.clip.device)
        probabilities_BC = self.method.logits(self.encoded, inputs_1B)[0].softmax(-1)
        best = probabilities_BC.topk(min(top, len(self.task.class_names)), dim=-1)
        return [
            Prediction(p, tuple(self.task.class_names[i] for i in ids), tuple(values))
            for p, ids, values in zip(
                paths, best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]

    def export(self, path: Path, *, mode: int = 0o666) -> None:
        """Write `class_embeddings` (C, D) and `logit_scale` as safetensors.

        With image features v from plain open_clip, the logits of this model are
        `logit_scale * v/|v| @ class_embeddings.T`. The file's header holds the class names and the
        name of the backbone, and `model`: `global`, or whose model it is.

        Args:
            path: the file to write.
            mode: permissions of the file.

        Raises:
            UserError: the method's logits are not products with fixed class embeddings, or the
                file cannot be written.
        """
        classes_CD = self.method.class_embeddings(self.encoded)
        if classes_CD is None:
            raise UserError(f"method '{self.method.name}' has no fixed class embeddings to export.")
        header = {
            "class_names": json.dumps(self.task.class_names),
            "backbone": self.clip.name,
            "model": self.whose,
        }
        tensors = {
            "class_embeddings": classes_CD.float().cpu().contiguous(),
            "logit_scale": torch.tensor(self.clip.logit_scale),
        }
        refuse_foreign(path, b"class_embeddings")
        try:
            write_bytes(path, save(tensors, metadata=header), mode=mode)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}.") from None


class Classifier(PromptModel):
    """The model of a finished run: the global model, or the personal model of one client.

    Args:
        run_dir: the run folder.
        client: id of the client whose personal model is loaded; None loads the global model.

    Raises:
        UserError: the folder holds no finished run, there is no such client, the method has no
            global model, or the private prompts are not in the run folder.
    """

    def __init__(self, run_dir: Path, client: int | None = None) -> None:
        config = read_config(run_dir)
        if not (run_dir / PROMPTS).is_file():
            raise UserError(
                f"{run_dir} is not finished; 'fedprompt run --resume {run_dir}' goes on."
            )
        # The cheap reads come before the weights.
        names = _class_names(run_dir / PARTITION)
        tensors, _ = read_tensors(run_dir / PROMPTS)
        cache_dir = default_cache_dir(config.output.cache)
        backbone = config.backbone
        if client is not None:
            backbone = replace(backbone, weights=backbone.weights_of(client))
        clip = with_companions(load_clip(backbone, cache_dir), config, cache_dir)
        task = Task(tuple(names), tuple(config.data.templates))
        method: Method = method_class(config.method.name)(config.method, clip, task)
        shared = {n.removeprefix("shared/"): t for n, t in tensors.items()}
        if client is not None:
            if not 0 <= client < config.partition.clients:
                raise UserError(f"no client {client}; the run has {config.partition.clients}.")
            start = method.init_private(config.seed, client)
            # A client that never trained has the values that it would start from.
            kept = _trained(run_dir, client, config.partition.clients) if start else None
            if kept:
                check_private(method, kept, config.seed)
            private: Tensors | None = kept or start
            # Some strategies send each client shared tensors of its own.
            shared |= _sent_to(run_dir, config, method, client)
        elif method.has_global:
            private = None
        else:
            raise UserError(
                f"method '{method.name}' has no global model; choose one with --client."
            )
        super().__init__(clip, method, shared, private, config.data)
        if client is not None:
            self.whose = f"client {client}"


def _class_names(path: Path) -> list[str]:
    partition = read_object(path)
    check_partition(partition, path)
    return list(partition["class_names"])


def _sent_to(run_dir: Path, config: Config, method: Method, client: int) -> Tensors:
    """The tensors that the server would send to this client alone, after the last round."""
    # The strategy is restored from the checkpoint as on a resume; it alone knows what it sends.
    checkpoint = read_checkpoint(run_dir / CHECKPOINT)
    strategy = strategy_class(config.strategy.name)(
        config.strategy,
        shapes={n: tuple(t.shape) for n, t in checkpoint.shared.items()},
        seed=config.seed,
        extras={n: t.numpy() for n, t in method.init_extras(config.seed).items()},
        rounds=config.federation.rounds,
    )
    strategy.load_state({n: t.numpy() for n, t in checkpoint.strategy.items()})
    if checkpoint.clients:
        known = StrategyLog(run_dir / STRATEGY, config.partition.clients)
        known.read(checkpoint.server_round, checkpoint.clients)
        load_client_states(strategy, known)
    own = strategy.client_shared(client) or {}
    sent = own | strategy.client_extras(checkpoint.server_round, client)
    return {n: torch.from_numpy(np.array(a)) for n, a in sent.items()}


def _trained(run_dir: Path, client: int, clients: int) -> Tensors | None:
    """A client's private tensors at the end of the run, or None if it never trained.

    Raises:
        UserError: the run was a deployment, so private tensors are on the nodes, or the files of
            the run folder are damaged.
    """
    checkpoint = read_checkpoint(run_dir / CHECKPOINT)
    if not checkpoint.private:
        raise UserError(
            f"the private prompts of client {client} are on its own node, not in this run folder; "
            "without --client the global model is used."
        )
    states = PrivateLog(run_dir / PRIVATE, clients)
    states.read(checkpoint.server_round, checkpoint.private)
    stored = states.get(client)
    return None if stored is None else without_momentum(stored)[0]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with an image file in the block into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not a readable image: {error}.") from None
