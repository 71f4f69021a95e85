"""The config of a method: its keys, and what a run must know of it before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from fedprompt.config.fields import option
from fedprompt.config.search import Range, Space, log_range

UNIFORM_AVERAGE: Mapping[str, Any] = MappingProxyType({"name": "fedavg", "weights": "uniform"})
"""The strategy of papers in which every client counts the same, whatever its number of images."""


@dataclass(frozen=True)
class MethodConfig:
    """The keys of a method, which stand under `method:` in an experiment file.

    A method's file derives its own config from this class and adds its hyper-parameters, with the
    paper's defaults. The strategies that suit a method belong to its config, because they may
    depend on it: a wrapper answers with its base's strategies. A subclass replaces the properties
    by plain class attributes (without an annotation, which would make them config keys):

        default_strategy = UNIFORM_AVERAGE

    An option with `search=...` is one that `fedprompt tune` searches. The space must contain the
    paper's value. The learning rate is searched in `lr_space`.
    """

    name: str = option("", "method name")

    @property
    def lr_space(self) -> Range | None:
        """Where `fedprompt tune` looks for `training.lr`: around the 0.002 of CoOp, with SGD.

        None if the method trains nothing.
        """
        return log_range(0.0005, 0.5)

    @property
    def search_spaces(self) -> Mapping[str, Space]:
        """The declared spaces by key: where `fedprompt tune` looks for the method's own options."""
        declared = {f.name: f.metadata.get("search") for f in fields(self)}
        return {key: space for key, space in declared.items() if space is not None}

    @property
    def default_strategy(self) -> Mapping[str, Any]:
        """The keys of the paper's strategy, which `strategy: auto` stands for."""
        return {"name": "fedavg"}

    @property
    def supported_strategies(self) -> frozenset[str] | None:
        """Names of the only strategies that the method works with; None if all of them do."""
        return None

    @property
    def keeps_momentum(self) -> bool:
        """Whether the method is also right if SGD's momentum does not start a round at zero."""
        return True

    @property
    def lr_cycles(self) -> int:
        """How often the cosine of `training.schedule` runs through in a run; 1 never restarts."""
        return 1

    @property
    def needs_sgd(self) -> bool:
        """Whether the method is about SGD's steps, so that no other optimiser may replace it."""
        return False

    @property
    def needs_float64(self) -> bool:
        """Whether training computes in float64 on the device, which MPS cannot."""
        return False

    @property
    def reveals_classes(self) -> bool:
        """Whether the method sends sums over a client's images of single classes."""
        return False

    @property
    def refines(self) -> bool:
        """Whether the server goes on training, on the uploads of single clients (`refine`)."""
        return False

    @property
    def learns_without_labels(self) -> bool:
        """Whether clients without labels train as well, on labels that are all `UNLABELLED`."""
        return False

    @property
    def relabel_every(self) -> int:
        """What `partition.relabel_every: null` stands for: rounds between pseudo-labels, or 0."""
        return 0

    @property
    def token_space(self) -> bool:
        """Whether all that is shared are prompts among the text tower's tokens.

        Clients may then have other image towers beside the same text tower. Read by
        `allows_other_image_towers`: every method declares it for itself.
        """
        return False

    @property
    def supports_image_noise(self) -> bool:
        """Whether `privacy.image_noise` covers all that a client's images change.

        The loss must be a mean over images of what one image and the tensors alone decide, and
        nothing else of the images may reach a tensor: no number of images per class, no gradient of
        the method's own, no `init_private_from_data`. Read by `allows_image_noise`: every method
        declares it for itself.
        """
        return False

    @property
    def companions(self) -> tuple[str, ...]:
        """Backbone configs of further frozen models, which are `clip.companion(name)`."""
        return ()

    def __post_init__(self) -> None:
        """Take the name of the file that defines the config, unless a name is given."""
        if not self.name:
            # The dataclass is frozen, so plain assignment would raise.
            object.__setattr__(self, "name", type(self).__module__.rpartition(".")[2].rstrip("_"))


def allows_other_image_towers(config: MethodConfig) -> bool:
    """Whether clients may have other image towers beside the same text tower.

    `token_space` is not inherited: a method that derives from another one may share more.

    Args:
        config: the `method` section.
    """
    return "token_space" in vars(type(config)) and config.token_space


def allows_image_noise(config: MethodConfig) -> bool:
    """Whether `privacy.image_noise` covers all that a client's images change.

    `supports_image_noise` is not inherited: a method that derives from another one may have other
    loss terms.

    Args:
        config: the `method` section.
    """
    return "supports_image_noise" in vars(type(config)) and config.supports_image_noise
