"""Domains of clients, for methods that tell them apart: the numbers that clients keep.

Client k belongs to the domain numbered k modulo the number of domains. This is what the partition
schemes `domain` and `domain_dirichlet` give with `partition.domain_clients=equal`, and with as many
domains as clients each client is a domain of its own. FedAPT and FedDEAP use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.batch import Batch
from fedprompt.methods.parts.losses import masked_mean

DOMAIN = "domain"
"""Name of the private tensor."""


def own_domain(client: int, domains: int) -> Tensor:
    """The client's domain (D,): 1 for its own and 0 for the others."""
    return F.one_hot(torch.tensor(client % domains), domains).float()


def domain_cross_entropy(logits_KBD: Tensor, domain_KD: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy (K,) of a client's images with its domain as their class."""
    loss_KB = -(logits_KBD.log_softmax(-1) * domain_KD[:, None]).sum(-1)
    return masked_mean(loss_KB, batch.mask_KB)
