"""Latte: memories of unlabelled images, and prototypes of the clients that are most similar.

Source: Latte: Collaborative Test-Time Adaptation of Vision-Language Models in Federated Learning
(Bao, Deng, Qiu, Wei, Tong, He, ICCV 2025, arXiv 2507.21494; public code baowenxuan/Latte at
7c2e025). With CLIP's class features t_c, an image v belongs to the class of its largest v . t_c,
and H(v) is the entropy of softmax(exp(logit_scale) v . t_c) / log C. A client remembers the n
images of each class with the smallest H, and uploads one prototype per class with its entropy:

    p_c = normalise(sum_s exp(-gamma H_cs) f_cs)        h_c = H(p_c)

The server sends each client, class by class, the prototypes of the E other clients whose p_c is the
most similar to its own. Of its own n and these E, a class keeps the n with the smallest H, and

    a_s = exp(beta (v . f_cs - 1)) exp(-gamma H_cs)      w_c = normalise(sum_s a_s f_cs)
    logits_c = exp(logit_scale) (v . t_c + alpha v . w_c)

Nothing is trained and no label is read. What is shared: the prototypes and their entropies, (C, D)
and (C,), which the strategy `similar_prototypes` sends on to other clients. What is kept: the
memory. One round is all it takes: `federation.rounds=1 federation.fraction=1`.

How we differ: in the code, test images arrive one by one, and each is remembered before it is
classified. Here a memory is filled once, from the training images without their labels, so results
are inductive; the images are those of view 0, where the code can take augmented ones. A tie between
equal entropies is settled by the order of images. The paper has no global model; ours is zero-shot
CLIP. The code multiplies cosines by 100, which is exp(logit_scale) of OpenAI's models; we take the
backbone's own. v . w_c is computed from products of v and the f_cs, without a sum of rows for every
image.

On the embedded scenes, where half of the pseudo-labels are wrong, personal models are worse than
zero-shot CLIP's: 44.5 against 48.8 %, by `fedprompt run benchmark method=latte federation.rounds=1
federation.fraction=1`.

Fault of the code that is not reproduced: it sorts all clients by similarity and drops the first as
the client itself, which it need not be where the client has no image of a class, since all
similarities are then 0.

Suffixes: K clients, B images of a batch, N images of a client, M rows of a memory, C classes, S
places of a class, D joint embedding, E peers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.sentences import described_classes

PROTOTYPES, ENTROPY = "prototypes", "entropy"
EMPTY = 1e-3
"""The public code's length of sum_s a_s f_cs up to which a class has no vote."""
FREE = 2.0
"""The entropy of a place without an image: after every image in the order."""


@dataclass(frozen=True)
class LatteConfig(MethodConfig):
    """Defaults: the public code's for VLCS; others are in its folder `configs`."""

    lr_space = None
    learns_without_labels = True
    reveals_classes = True
    default_strategy = MappingProxyType({"name": "similar_prototypes"})
    supported_strategies = frozenset({"similar_prototypes"})

    shots: int = option(15, "images of each class in a memory, at most", ge=1)
    peers: int = option(12, "prototypes of each class from other clients, at most", ge=1)
    alpha: float = option(0.3, "weight of the memory", ge=0, search=log_range(0.05, 5))
    beta: float = option(6.0, "sharpness of the memory", gt=0, search=log_range(1, 100))
    gamma: float = option(
        6.0, "how much less uncertain images and prototypes count", ge=0, search=log_range(0.5, 20)
    )


class Latte(Method):
    """`prototypes` (C, D) and `entropy` (C,) are shared, a memory of features is private."""

    name = "latte"
    source = "Bao et al., ICCV 2025"
    Config = LatteConfig
    fixed_global = True
    no_transfer_reason = "its memory has pseudo-labels of the classes that it was filled for"
    reads_descriptions = True
    frozen = frozenset(
        {f"shared.{PROTOTYPES}", f"shared.{ENTROPY}"}
        | {f"private.{n}" for n in ("keys", "owners", "entropy")}
    )
    images_at_once = 1024

    def __init__(self, config: LatteConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.classes_1CD = described_classes(clip, task)
        # Memories are filled on the CPU.
        self.text_CD = self.classes_1CD[0].cpu()

    def init_shared(self, seed: int) -> Tensors:
        """No prototype of any class: zeros, which are as uncertain as can be."""
        count, width = len(self.task.class_names), self.clip.embed_dim
        return {PROTOTYPES: torch.zeros(count, width), ENTROPY: torch.ones(count)}

    def init_private(self, seed: int, client: int) -> Tensors:
        """An empty memory: `keys` (0, D), `owners` (0,), 1 + their class, and `entropy` (0,)."""
        keys = torch.zeros(0, self.clip.embed_dim)
        return {"keys": keys, "owners": torch.zeros(0), "entropy": torch.zeros(0)}

    def init_extras(self, seed: int) -> Tensors:
        """No peers: `peers.prototypes` (E, C, D) and `peers.entropy` (E, C)."""
        peers = self.cfg.peers
        return {
            f"peers.{n}": t.expand(peers, *t.shape).clone()
            for n, t in self.init_shared(seed).items()
        } | {"peers.known": torch.zeros(peers)}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The memory of the client's own images."""
        return private | self._memory(data)

    def shared_from_data(self, data: ClientData) -> Tensors:
        """One prototype per class, and its entropy."""
        own = self._memory(data)
        keys_CSD, entropy_CS = self._by_class(
            own["keys"][None], own["owners"][None], own["entropy"][None]
        )
        weights_CS1 = (-self.cfg.gamma * entropy_CS[0]).exp()[..., None]
        prototypes_CD = F.normalize((weights_CS1 * keys_CSD[0]).sum(1), dim=-1)
        entropy_C = self._entropy(prototypes_CD)
        return {PROTOTYPES: prototypes_CD, ENTROPY: entropy_C}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features (1, C, D), and the rows (K, C, n, D) that are remembered."""
        encoded = {"classes": self.classes_1CD}
        if private is None:
            return encoded
        keys_KCSD, entropy_KCS = self._by_class(
            private["keys"], private["owners"], private["entropy"]
        )
        keys_KECD, entropy_KEC = shared["peers.prototypes"], shared["peers.entropy"]
        # Where all clients hold the same, there is one row for all of them.
        clients = max(len(keys_KCSD), len(keys_KECD))
        rows = torch.cat([_each(keys_KCSD, clients), _each(keys_KECD, clients).transpose(1, 2)], 2)
        entropy_KCS = torch.cat(
            [_each(entropy_KCS, clients), _each(entropy_KEC, clients).transpose(1, 2)], 2
        )
        chosen_KCS = entropy_KCS.argsort(dim=-1, stable=True)[..., : self.cfg.shots]
        where = chosen_KCS[..., None].expand(*chosen_KCS.shape, rows.shape[-1])
        return encoded | {
            "rows": rows.gather(2, where), "entropy": entropy_KCS.gather(2, chosen_KCS)
        }  # fmt: skip

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """CLIP's logits plus the memory's, (K, B, C)."""
        logits_KBC = cosine_logits(self.clip, inputs.features, encoded["classes"])
        if "rows" not in encoded:
            return logits_KBC  # the global model has no memory
        cosines_KBC = memory_cosines(
            inputs.features, encoded["rows"], encoded["entropy"], self.cfg.beta, self.cfg.gamma
        )
        return logits_KBC + self.cfg.alpha * self.clip.logit_scale * cosines_KBC

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """CLIP's class features (C, D) without a memory; None with one."""
        return None if "rows" in encoded else super().class_embeddings(encoded)

    def _entropy(self, features_ND: Tensor) -> Tensor:
        """H of each feature (N,): 0 for a certain class, 1 for none."""
        log_p_NC = (self.clip.logit_scale * features_ND @ self.text_CD.T).log_softmax(-1)
        # With a single class, nothing is uncertain.
        return -(log_p_NC.exp() * log_p_NC).sum(-1) / math.log(max(len(self.text_CD), 2))

    def _memory(self, data: ClientData) -> Tensors:
        """The images that a client remembers, by class and with the most certain first."""
        features_ND = data.plain().features.cpu()
        entropy_N = self._entropy(features_ND)
        class_N = (features_ND @ self.text_CD.T).argmax(-1)
        # By class, and within a class the most certain first.
        order_N = entropy_N.argsort(dim=-1, stable=True)
        order_N = order_N[class_N[order_N].argsort(dim=-1, stable=True)]
        is_of_NC = F.one_hot(class_N[order_N], len(self.task.class_names))
        rows = order_N[(is_of_NC.cumsum(0) * is_of_NC).sum(-1) <= self.cfg.shots]
        return {
            "keys": features_ND[rows],
            "owners": (class_N[rows] + 1).float(),
            "entropy": entropy_N[rows],
        }

    def _by_class(
        self, keys_KMD: Tensor, owners_KM: Tensor, entropy_KM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Memories as (K, C, S, D) and (K, C, S); a free place is zero, with the entropy FREE."""
        shape = (len(keys_KMD), len(self.task.class_names) + 1, self.cfg.shots)
        is_of_KMC = F.one_hot(owners_KM.long(), shape[1])
        # Places of a class are counted from its first row on. Padding is of class 0, whose places
        # are cut off in the end; all of it beyond S is put at the last one.
        place_KM = (is_of_KMC.cumsum(1) * is_of_KMC).sum(-1) - 1
        where_KM = owners_KM.long() * shape[2] + place_KM.clamp(max=shape[2] - 1)
        keys_KRD = keys_KMD.new_zeros(shape[0], shape[1] * shape[2], keys_KMD.shape[-1])
        entropy_KR = entropy_KM.new_full((shape[0], shape[1] * shape[2]), FREE)
        keys_KRD = keys_KRD.scatter(
            1, where_KM[..., None].expand(*where_KM.shape, keys_KMD.shape[-1]), keys_KMD
        )
        entropy_KR = entropy_KR.scatter(1, where_KM, entropy_KM)
        return keys_KRD.view(*shape, -1)[:, 1:], entropy_KR.view(shape)[:, 1:]


def memory_cosines(
    features_KBD: Tensor, rows_KCSD: Tensor, entropy_KCS: Tensor, beta: float, gamma: float
) -> Tensor:
    """v . w_c of the module's docstring.

    Args:
        features_KBD: L2-normalised image features; a client axis of 1 broadcasts.
        rows_KCSD: the remembered features of each class; zeros where there is none.
        entropy_KCS: their H.
        beta: sharpness.
        gamma: how much less uncertain rows count.

    Returns:
        Cosines (K, B, C); 0 for a class without a vote.
    """
    cosines_KBR = features_KBD @ rows_KCSD.flatten(1, 2).transpose(-1, -2)
    cosines_KBCS = cosines_KBR.unflatten(-1, rows_KCSD.shape[1:3])
    votes_KBCS = (beta * (cosines_KBCS - 1) - gamma * entropy_KCS[:, None]).exp()
    # |sum_s a_s f_s|^2 is a quadratic form in the products of a class's rows.
    gram_KCSS = rows_KCSD @ rows_KCSD.transpose(-1, -2)
    square_KBC = (torch.einsum("kbcs,kcst->kbct", votes_KBCS, gram_KCSS) * votes_KBCS).sum(-1)
    length_KBC = square_KBC.clamp(min=0).sqrt()
    along_KBC = (votes_KBCS * cosines_KBCS).sum(-1)
    there_KBC = length_KBC > EMPTY
    return torch.where(there_KBC, along_KBC / length_KBC.clamp(min=EMPTY), 0.0)


def _each(tensor: Tensor, clients: int) -> Tensor:
    """A tensor with one row per client."""
    return tensor.expand(clients, *tensor.shape[1:])
