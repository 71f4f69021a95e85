"""GPR-NIAM: a context that reads the words but is not read by them, refined on the server.

Source: Global Prompt Refinement with Non-Interfering Attention Masking for One-Shot Federated
Learning (Qi, Yu, Meng, Zhou, Yu, Li, Meng, 2025, arXiv 2509.22700; public code
qizhuang-qz/GPR-NIAM at 0b13f20), the variant with PromptFL's context. Class c has the text
`[SOS][v_1 .. v_M] a photo of a c. [EOT]` under an attention mask (eqs. 1, 2): a context token reads
[SOS], the words and [EOT]; the words do not read the context; [EOT] reads everything, with
`reweight` added to its scores of the words and of itself (`backbone/isolated_text.py`). Clients
train the context by cross-entropy (eqs. 3, 4) among the classes of their own images. A client also
uploads prototypes of each class, randomly weighted means of its image features (eq. 5):

    p = sum_i a_i f_i / sum_i a_i      a_i ~ U(0, 1)

`prototypes` of them for a class of more than 10 images; for other classes one mean, with noise of a
hundredth of each entry. The server averages the contexts, and refines the mean by SGD on the
cross-entropy of the prototypes of all clients (eqs. 6 to 8). Zero rows of an upload are no
prototypes. One round is all it takes: `federation.rounds=1 federation.fraction=1`; the paper trains
10 epochs on clients at the rate 0.001, with a weight decay of 0.001 and batches of 32 images.

What is shared: `ctx` and the prototypes, M d + C P D numbers. A PROTOTYPE OF FEW IMAGES IS NEARLY
THEIR MEAN FEATURE, and that of one image its feature (`reveals_classes`). The server needs the
upload of every client, so that secure aggregation is impossible; and no strategy but FedAvg, whose
guarantees the refinement on single uploads would undo.

How we differ:
- The paper's eq. (1) also hides the words from the context, and its eq. (7) has a sigmoid in it; we
  follow the code. Eq. (3) sums over all classes; so does ours with `own_classes=false`.
- Prototypes are those of view 0, where the code takes augmented images, and are drawn once per
  client, where the code draws them in every round. With `privacy.noise`, every row is a prototype.
- The rate falls by 0.1 every 15 epochs of the server in the code, which has 10, so that it is
  constant. The paper has batches of 32 prototypes there, the code and ours of 64.

Faults of the code that are not reproduced: it repeats the masks of C classes head by head, where
PyTorch wants the h masks of each class in a row, so that unless all texts are equally long a class
is masked by the length of another one; in each epoch of the server the prototypes after the last
full batch of 64 are left out, while that batch is trained on twice, and fewer than 64 raise a
NameError. `GPR-NIAM_T.py` is the paper's variant P, and `GPR-NIAM_P.py` its variant T with TCP.

Suffixes: K clients, U uploads, P prototypes of a class, N images of a client, I prototypes of all
clients, C classes, M tokens, d text width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.isolated_text import IsolatedText
from fedprompt.config.fields import option
from fedprompt.config.search import Choices, Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts.adapters import check_template
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.normalised import normalised
from fedprompt.methods.parts.prompts import RandomPromptConfig
from fedprompt.rng import generator, normal

FEW = 10
"""Images of a class up to which its client uploads one prototype, as in the public code."""
NOISE = 0.01
"""Standard deviation of the noise on such a prototype, relative to each entry."""
ABSENT = -1e4
"""Logit of a class of which a client has no image."""
PROTOTYPES = "prototypes"


@dataclass(frozen=True)
class GPRNIAMConfig(RandomPromptConfig):
    """Defaults: the public code's."""

    refines = True
    reveals_classes = True
    supported_strategies = frozenset({"fedavg"})

    context_tokens: int = option(10, "context tokens M", ge=1)
    template: str = option("a photo of a {}.", "words around the class name")
    reweight: float = option(
        0.0, "added to the end of text's scores of the words", search=Range(0, 1)
    )
    own_classes: bool = option(True, "clients train among the classes of their own images only")
    prototypes: int = option(
        5, "prototypes of a class with more than 10 images", ge=1, search=Choices((3, 5, 10, 20))
    )
    server_epochs: int = option(10, "the server's passes over all prototypes", ge=0)
    server_lr: float = option(0.001, "the server's rate", gt=0, search=log_range(1e-4, 0.1))
    server_weight_decay: float = option(0.001, "the server's weight decay", ge=0)
    server_batch_size: int = option(64, "prototypes in each step of the server", ge=1)

    def check(self) -> None:
        """Refuse a template without a place for the class name."""
        check_template(self.template)


class GPRNIAM(Method):
    """`ctx` (M, d) and `prototypes` (C, P, D) are shared; the client's own prototypes are kept."""

    name = "gpr_niam"
    source = "Qi et al., 2025"
    Config = GPRNIAMConfig
    frozen = frozenset({f"shared.{PROTOTYPES}", f"private.own.{PROTOTYPES}"})

    def __init__(self, config: GPRNIAMConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        texts = [config.template.format(n.replace("_", " ")) for n in task.class_names]
        self.tower = IsolatedText(clip, texts, config.context_tokens, config.reweight)

    def init_shared(self, seed: int) -> Tensors:
        """A random context, and no prototypes."""
        shape = (self.cfg.context_tokens, self.clip.text.width)
        context = normal(shape, self.cfg.init_std, seed, "init", "shared")
        return {"ctx": context, PROTOTYPES: self._none()}

    def init_private(self, seed: int, client: int) -> Tensors:
        """No prototypes."""
        return {f"own.{PROTOTYPES}": self._none()}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The prototypes of the client's labelled images."""
        features_ND, labels_N = data.plain().features.float().cpu(), data.labels_N.cpu()
        found = self._none()
        for c in labels_N[labels_N >= 0].unique().tolist():
            draws = generator(seed, "prototypes", data.client, c)
            of_class_ND = features_ND[labels_N == c]
            images = len(of_class_ND)
            if images > FEW:
                weights = torch.from_numpy(draws.random((self.cfg.prototypes, images))).float()
                found[c] = weights / weights.sum(1, keepdim=True) @ of_class_ND
            else:
                mean_D = of_class_ND.mean(0)
                noise_D = torch.from_numpy(draws.standard_normal(len(mean_D))).float()
                found[c, 0] = mean_D + NOISE * mean_D.abs() * noise_D
        return {f"own.{PROTOTYPES}": found}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add the prototypes to the upload."""
        return {**shared, PROTOTYPES: private[f"own.{PROTOTYPES}"]}, private

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the contexts (K, M, d)."""
        return {"classes": normalised(self.tower(shared["ctx"]))}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The cross-entropy, among the client's own classes."""
        logits_KBC = self.logits(encoded, batch.inputs)
        if self.cfg.own_classes:
            # Finite, because the padding may have a label of another class.
            absent_KC = batch.round_info.class_counts_KC == 0
            logits_KBC = logits_KBC.masked_fill(absent_KC[:, None], ABSENT)
        return {"ce": cross_entropy(logits_KBC, batch)}

    def refine(
        self, shared: Tensors, uploads: Sequence[Tensors], *, seed: int, server_round: int
    ) -> Tensors:
        """Go on training the mean context on the prototypes of all clients."""
        pool_UCPD = torch.stack([upload[PROTOTYPES] for upload in uploads])
        there_UCP = (pool_UCPD != 0).any(-1)
        features_ID = pool_UCPD[there_UCP].to(self.clip.device)
        if not len(features_ID):
            return shared
        labels_I = there_UCP.nonzero()[:, 1].to(self.clip.device)
        context = shared["ctx"].to(self.clip.device, copy=True).requires_grad_()
        sgd = torch.optim.SGD(
            [context], lr=self.cfg.server_lr, weight_decay=self.cfg.server_weight_decay
        )
        for epoch in range(self.cfg.server_epochs):
            order = generator(seed, "refine", server_round, epoch).permutation(len(labels_I))
            for rows in torch.from_numpy(order).split(self.cfg.server_batch_size):
                rows = rows.to(labels_I.device)
                with torch.enable_grad():
                    encoded = self.encode({"ctx": context[None]}, None)
                    logits_1BC = self.logits(encoded, Inputs(features_ID[None, rows]))
                    loss = F.cross_entropy(logits_1BC[0], labels_I[rows])
                    (context.grad,) = torch.autograd.grad(loss, context)
                sgd.step()
        return {**shared, "ctx": context.detach().cpu()}

    def _none(self) -> Tensor:
        """Zeros (C, P, D)."""
        return torch.zeros(len(self.task.class_names), self.cfg.prototypes, self.clip.embed_dim)
