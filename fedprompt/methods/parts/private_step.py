"""A local step of DP-SGD: every image's gradient is clipped, and noise is added to their sum.

Source: Deep Learning with Differential Privacy (Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar,
Zhang, CCS 2016, arXiv 1607.00133). With C = `privacy.image_clip` and z = `privacy.image_noise`, a
client replaces the gradient of its mean loss over a batch by

    (sum_i g_i min(1, C / |g_i|) + N(0, z^2 C^2 I)) / b

where g_i is the gradient of image i's loss with respect to ALL trained tensors of the client, the
private ones included, |g_i| the norm over them together, and b the expected size of a batch, which
says nothing about the images in this one. One image changes the sum by at most C. Everything that a
client computes from it - momentum, weight decay, further steps, private tensors and the shared ones
that it uploads - is post-processing. Noise on the shared tensors alone would protect nothing,
because later gradients of the shared tensors depend on the private ones. What epsilon this gives is
computed in `fedprompt/privacy/image_epsilon.py`.

A gradient that is not finite counts as zero, as does a row of padding.

The graph of `encode` is kept, and for each image in turn one backward pass gives the gradients of
all A clients. Autograd's batched gradients (`is_grads_batched`) have no rule for operations of the
text tower. A step of B images thus costs one forward pass and B backward passes.

Shape suffixes: A clients that are still training, B images of a batch, T loss terms and their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.config.protection import PrivacyConfig
from fedprompt.methods.base import Batch, Method, Tensors
from fedprompt.methods.parts.local_step import Computed, LocalStep
from fedprompt.rng import secret_generator


class PrivateStep(LocalStep):
    """Computes the steps of A clients with differential privacy for their images.

    Args:
        method: supplies encoding and loss; its config supports `privacy.image_noise`.
        leaves: the trained tensors (A, ...), as in `LocalStep`.
        fixed: tensors (A, ...) that are used and not changed, as in `LocalStep`.
        privacy: clip, noise and, for tests, the seed of the noise.
        expected_A: the expected number of images in a batch of each client.
    """

    def __init__(
        self,
        method: Method,
        leaves: Tensors,
        fixed: Tensors,
        privacy: PrivacyConfig,
        expected_A: Tensor,
    ) -> None:
        super().__init__(method, leaves, fixed)
        self._privacy, self._expected_A = privacy, expected_A

    def __call__(self, batch: Batch) -> Computed:
        """Compute one step.

        Args:
            batch: the images of the step.

        Returns:
            The noisy gradients, and loss terms without noise, which must not leave the client.
        """
        encoded = self.method.encode(self._shared, self._private)
        sums: Tensors = {}
        columns: list[Tensor] = []
        for column in range(batch.mask_KB.shape[1]):
            image = batch.image(column)
            terms = self.method.loss_terms(self._shared, self._private, encoded, image)
            minimised = [t for n, t in terms.items() if n not in self.method.measured]
            total_A = torch.stack(minimised).sum(0)
            values_TA = torch.stack([*(t.detach() for t in terms.values()), total_A.detach()])
            real_A = batch.mask_KB[:, column]
            columns.append(torch.where(real_A, values_TA, 0.0))
            for name, clipped in self._clipped(total_A, real_A).items():
                sums[name] = sums[name] + clipped if name in sums else clipped
        noise = self._noise(sums, batch)
        gradients = {
            name: _divided(sums[name] + noise[name], self._expected_A) if name in sums else None
            for name in self.leaves
        }
        values_TA = torch.stack(columns).sum(0) / batch.mask_KB.sum(1).clamp(min=1)
        return Computed((*terms, "loss"), values_TA, gradients)

    def _clipped(self, loss_A: Tensor, real_A: Tensor) -> Tensors:
        """One image's gradients (A, ...) of each client, of norm C at most, over all tensors.

        A tensor that the loss does not reach is missing.
        """
        leaves = list(self.leaves.values())
        ones_A = torch.ones_like(loss_A)
        # The graph of `encode` serves the next image too.
        all_gradients = torch.autograd.grad(
            loss_A, leaves, ones_A, retain_graph=True, allow_unused=True
        )
        reached = {n: g for n, g in zip(self.leaves, all_gradients, strict=True) if g is not None}
        squares = [g.reshape(len(g), -1).square().sum(1) for g in reached.values()]
        norm_A = torch.stack(squares).sum(0).sqrt()
        clip = self._privacy.image_clip
        factor_A = clip / norm_A.clamp(min=clip)
        counts_A = real_A & norm_A.isfinite()
        return {
            n: torch.where(_as(counts_A, g), g * _as(factor_A, g), 0.0) for n, g in reached.items()
        }

    def _noise(self, sums: Tensors, batch: Batch) -> Tensors:
        """Noise (A, ...) of standard deviation z C for every tensor, of each client its own."""
        info, privacy = batch.round_info, self._privacy
        std = privacy.image_noise * privacy.image_clip
        rows: dict[str, list[Tensor]] = {name: [] for name in sums}
        for client in info.clients:
            draw = secret_generator(
                privacy.noise_seed, "image noise", info.server_round, client, batch.step
            )
            # Sorted, so that a fixed seed gives every tensor the same noise in every process.
            for name in sorted(sums):
                shape = tuple(sums[name].shape[1:])
                rows[name].append(torch.from_numpy(std * draw.standard_normal((1, *shape))))
        return {n: torch.cat(r).to(sums[n]) for n, r in rows.items()}


def _as(values_A: Tensor, like: Tensor) -> Tensor:
    """Values (A,) with as many axes as `like`."""
    return values_A.view(-1, *[1] * (like.dim() - 1))


def _divided(gradient: Tensor, by_A: Tensor) -> Tensor:
    return gradient / _as(by_A, gradient)
