"""The sections of an experiment on attacks and on privacy.

`attack` makes clients of a simulation malicious, `privacy` adds noise on the clients, and
`secure_aggregation` hides single updates from the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedprompt.config.fields import option
from fedprompt.errors import UserError


@dataclass(frozen=True)
class AttackConfig:
    """Malicious or faulty clients of a simulation."""

    kind: Literal[
        "none",
        "sign_flip",
        "scaling",
        "label_flip",
        "random_noise",
        "many_examples",
        "backdoor",
        "nan",
        "inf",
        "wrong_name",
        "wrong_shape",
        "wrong_type",
        "giant",
        "crash",
    ] = option("none", "what attackers send, see fedprompt/simulation/attacks.py")
    share: float = option(
        0.3, "share of the clients that may train; who attacks is drawn from the seed", ge=0, le=1
    )
    scale: float = option(1.0, "size of an attack, in sizes of an honest change", gt=0)
    target: int = option(0, "backdoor: number of the class that triggered images get", ge=0)
    eps: float = option(
        2.0, "backdoor: largest change of a pixel by the trigger, of 255", gt=0, le=255
    )
    steps: int = option(
        3, "backdoor: steps of the trigger in each round, before the prompts'", ge=1
    )
    poison: float = option(
        0.5, "backdoor: share of an attacker's images with the trigger and the target's label",
        gt=0, le=1,
    )  # fmt: skip
    images: int = option(
        128, "backdoor: server's test images on which its success is measured", ge=1
    )


@dataclass(frozen=True)
class PrivacyConfig:
    """Noise that clients add to their updates, or to the gradients that they compute.

    Strategy dp_fedavg adds noise on the server.
    """

    noise: float = option(0.0, "noise multiplier z: standard deviation over clip; 0 = off", ge=0)
    clip: float = option(1.0, "largest L2 norm S of a client's change", gt=0)
    delta: float = option(1e-5, "delta that epsilon is given for", gt=0, lt=1)
    image_noise: float = option(
        0.0,
        "noise multiplier of DP-SGD, which hides single images: standard deviation over "
        "image_clip; 0 = off",
        ge=0,
    )
    image_clip: float = option(
        1.0, "largest L2 norm of one image's gradient, over all trained tensors", gt=0
    )
    image_sampling: Literal["shuffled", "poisson"] = option(
        "shuffled",
        "batches of DP-SGD: each image once per epoch, and no amplification is claimed; or each "
        "image with the same probability in every step, drawn in secret",
    )
    noise_seed: int | None = option(
        None, "fixes the noise, which is then no secret; null = from the operating system"
    )


@dataclass(frozen=True)
class SecureAggregationConfig:
    """SecAgg+: the server learns the sum of the clients' updates but no single update."""

    enabled: bool = option(False, "whether updates are masked")
    shares: int = option(
        0, "clients among whom each splits its keys, itself included; 0 = all of the round", ge=0
    )
    threshold: float = option(
        0.7, "part of the shares that recovers a key, and of a client's peers that must stay and "
        "agree who is in the sum; above two thirds", gt=0.5, le=1,
    )  # fmt: skip
    clip: float = option(
        1.0, "largest change of a shared number in a round; more is cut off and counted", gt=0
    )
    max_weight: int = option(1000, "most training images that a client may hold", ge=1)

    def check(self) -> None:
        """Refuse a low threshold, and an even or too small number of shares."""
        if 3 * self.threshold <= 2:
            raise UserError(
                f"'threshold' is {self.threshold:g}; it must be above two thirds, so that clients "
                "cannot be shown different lists of who is in the sum."
            )
        # A client shares its keys with itself and with as many peers on its left as on its right in
        # SecAgg+'s ring, which makes an odd number.
        if self.shares and (self.shares < 3 or self.shares % 2 == 0):
            raise UserError(f"'shares' is {self.shares}; it must be odd and at least 3, or 0.")
