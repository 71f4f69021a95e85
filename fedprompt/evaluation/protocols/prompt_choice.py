"""Which prompts for which images: global, personal or zero-shot, chosen without labels.

Source: COTE, Controllable Federated Prompt Learning at Test Time (Zhu et al., CVPR 2026; no public
code). A client has some images without labels, and three models: the global one, its own, and
zero-shot CLIP, whose answers are the pseudo-labels. With psi of their histogram
(`fedprompt/evaluation/alignment.py`), and zero-shot CLIP's largest probability c of an image,

    psi > 0, c > confident      the global model answers
    psi > 0, c <= confident     zero-shot CLIP
    psi <= 0                    the client's own model

Nothing is sent, and no label is read to choose. The images of a client are its own test images
(`own`), those of the next client that has any (`other`), a draw from those of all other clients
(`others`), or half own and half such a draw (`mixed`): an own model is best on its own images and
often of no use on others (`cross_client`), and the choice does not know which ones it is given.
`best` chooses the best of the three for each client's images by their labels: no rule that gives
all images of a client to one model can exceed it.

How we differ: RECONSTRUCTED like psi. COTE goes on training the chosen prompts on the images:
confident ones by the cross-entropy of their pseudo-labels, the others one by one on the entropy of
64 views. Here models answer as they are, so the choice itself is measured, and it works with every
method; the protocol `at_test_time` measures adaptation. COTE's clients see one batch at a time;
here all images of a client have one psi. psi = 0 counts as psi < 0.

On the embedded scenes the choice is no better than the personal model (docs/protocols.md): with few
classes per client, psi is hardly ever positive.

The results are TRANSDUCTIVE: the answer to an image depends on the client's other images. Every
client counts alike, however many images it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.alignment import STABILITY, signal
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, encode_personal, logits_of, model_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

Index = NDArray[np.int64]
MODELS = ("zero-shot", "global", "personal")
CHOICE, BEST = "choice", "best"
IMAGES = {
    "own": "own",
    "other": "another client's",
    "others": "all others'",
    "mixed": "own and all others'",
}


@dataclass(frozen=True)
class PromptChoiceOptions:
    """Defaults: the paper's thresholds."""

    confident: float = option(
        0.7, "zero-shot CLIP's probability above which an image is confident", ge=0, le=1
    )
    stability: float = option(STABILITY, "factor of M_ideal in psi", ge=0, le=1)
    images: int = option(256, "most images of each kind and client", ge=2)


class PromptChoice(Reported):
    """Accuracy of the choice, of each model alone, and of the best one."""

    name = "prompt_choice"
    title = "Choice of prompts without labels"
    caption = (
        "Mean accuracy over clients on four kinds of images: of the model that is chosen without "
        "labels, of each model alone, and of the best one for each client."
    )
    Options = PromptChoiceOptions
    asks_clients = True
    needs_global = True
    transductive = True
    simulation_only = "tests a client's model on the images of others"
    options: PromptChoiceOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether clients have models of their own beside a global one."""
        return super().suits(method) and bool(method.init_private(0, 0))

    def open(self, workspace: Workspace) -> None:
        """Refuse methods without the models to choose from; see `Protocol.open`."""
        if not self.suits(workspace.method):
            raise UserError(
                "protocol prompt_choice chooses between a global model and the client's own, and "
                f"method '{workspace.method.name}' does not have both; leave the protocol out, or "
                "use a method with private prompts, such as fedpgp."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Right answers of each model and of the choice; see `Protocol.measure_clients`."""
        method, memo = workspace.method, workspace.memo
        plain = zero_shot(workspace.clip, workspace.task)
        own = encode_personal(method, shared, private, memo)
        rows: list[Numbers] = []
        for k, client in enumerate(clients):
            models = (
                (plain, encode_global(plain, {}, memo)),
                (method, encode_global(method, shared[k], memo)),
                (method, model_of(own, k)),
            )
            row: Numbers = {}
            for kind, index in self._images(workspace, client).items():
                row |= {f"{kind}-{n}": v for n, v in self._counts(workspace, models, index).items()}
            rows.append(row)
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Counts for each kind of images; see `Protocol.client_numbers`."""
        ranges: dict[str, tuple[float, float | str]] = {}
        for kind in IMAGES:
            tested = f"{kind}-tested"
            ranges[tested], ranges[f"{kind}-aligned"] = (0, MAX_EXAMPLES), (0, 1)
            for name in (*MODELS, CHOICE, "confident"):
                ranges[f"{kind}-{name}"] = (0, tested)
        return ranges

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies for each kind of images, over the clients that have any."""
        rows = []
        for kind, title in IMAGES.items():
            of_kind = [
                {n: float(row[f"{kind}-{n}"]) for n in (*MODELS, CHOICE, "confident", "aligned")}
                | {"tested": float(row[f"{kind}-tested"])}
                for _, row in sorted(run.clients.items())
                if row[f"{kind}-tested"]
            ]
            if not of_kind:
                continue
            for row in of_kind:
                row[BEST] = max(row[n] for n in MODELS)
            rows.append(
                {
                    "images": title,
                    "clients": len(of_kind),
                    "accuracy": {
                        n: float(np.mean([row[n] / row["tested"] for row in of_kind]))
                        for n in (*MODELS, CHOICE, BEST)
                    },
                    "aligned": float(np.mean([row["aligned"] for row in of_kind])),
                    "confident": float(
                        np.mean([row["confident"] / row["tested"] for row in of_kind])
                    ),
                }
            )
        return {"rows": rows}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per kind of images."""
        rows = tuple(
            (
                row["images"],
                str(row["clients"]),
                *(percent(row["accuracy"][n]) for n in (*MODELS, CHOICE, BEST)),
                percent(row["aligned"]),
                percent(row["confident"]),
            )
            for row in part["rows"]
        )
        note = (
            "Every client counts alike. Choice: psi > 0 gives confident images to the global "
            "model and others to zero-shot CLIP, psi <= 0 gives all to the personal one; no label "
            "is read, but all images of a client are (transductive). Best: the best of the three "
            "for each client, by labels. Aligned: clients with psi > 0."
        )
        columns = ("images", "clients", *MODELS, CHOICE, BEST, "aligned", "confident")
        return Table(cls.title, columns, rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """A group of bars for each kind of images."""
        kinds = [row["images"] for row in part["rows"]]
        models = {n: [row["accuracy"][n] for row in part["rows"]] for n in (*MODELS, CHOICE, BEST)}
        return model_bars(cls.name, cls.title, cls.caption, kinds, models)

    def _images(self, workspace: Workspace, client: int) -> dict[str, Index]:
        """Indices of the images of each kind; none of others if no other client has any."""
        partition = workspace.partition
        order = [(client + i) % partition.num_clients for i in range(1, partition.num_clients)]
        tests = [partition.test(c) for c in order]
        own = self._drawn(workspace, partition.test(client), client, "own")
        nothing = own[:0]
        other = next((index for index in tests if len(index)), nothing)
        others = self._drawn(workspace, np.concatenate([nothing, *tests]), client, "others")
        half = min(len(own), len(others), self.options.images // 2)
        return {
            "own": own,
            "other": self._drawn(workspace, other, client, "other"),
            "others": others,
            "mixed": np.concatenate([own[:half], others[:half]]),
        }

    def _drawn(self, workspace: Workspace, index: Index, client: int, kind: str) -> Index:
        """At most `images` of some images, in random order."""
        draws = generator(workspace.config.seed, "prompt choice", kind, client)
        order = draws.permutation(len(index))[: self.options.images]
        return np.asarray(index[order], dtype=np.int64)

    def _counts(
        self, workspace: Workspace, models: Sequence[tuple[Method, Tensors]], index: Index
    ) -> Numbers:
        """Right answers of each model and of the choice among them, on the same images."""
        if not len(index):
            zeros = dict.fromkeys(("tested", *MODELS, CHOICE, "confident", "aligned"), 0)
            return {**zeros}
        labels_N = torch.from_numpy(workspace.dataset.labels_N[index])
        answers = [self._logits(workspace, *model, index) for model in models]
        sure_N, pseudo_N = answers[0].softmax(-1).max(-1)
        psi = signal(
            np.bincount(pseudo_N.numpy(), minlength=answers[0].shape[1]), self.options.stability
        )
        confident_N = sure_N > self.options.confident
        right = [logits.argmax(-1) == labels_N for logits in answers]
        chosen_N = torch.where(confident_N, right[1], right[0]) if psi > 0 else right[2]
        return {
            "tested": len(index),
            **{n: int(r.sum()) for n, r in zip(MODELS, right, strict=True)},
            CHOICE: int(chosen_N.sum()),
            "confident": int(confident_N.sum()),
            "aligned": int(psi > 0),
        }

    def _logits(
        self, workspace: Workspace, method: Method, encoded: Tensors, index: Index
    ) -> Tensor:
        inputs = workspace.views[0].rows(index, method.needs)
        return torch.cat(list(logits_of(method, encoded, inputs)))
