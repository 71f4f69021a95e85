"""What the multi-label task excludes, refused before any work."""

from __future__ import annotations

from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.config.schema import Config
from fedprompt.errors import UserError, any_of
from fedprompt.evaluation.registry import all_protocols, protocol_class
from fedprompt.methods.base import takes_label_sets
from fedprompt.methods.registry import all_methods, method_class


def check_multi_label(config: Config) -> None:
    """Refuse what has no meaning for images with several labels each, and their loss elsewhere.

    Args:
        config: the whole experiment.

    Raises:
        UserError: method, protocol, attack or partition need one class per image; or the keys of
            `multi_label` are set where there is one.
    """
    source = config.data.source
    if not config.data.multi_label:
        if config.multi_label != MultiLabelConfig():
            raise UserError(
                f"config: the keys of multi_label have no effect with data.source={source}, where "
                "an image has one class; leave them out, or use data=aerial_objects."
            )
        return
    several = f"data.source={source}, where an image has several labels"
    if not takes_label_sets(method_class(config.method.name)):
        able = sorted(name for name, cls in all_methods().items() if takes_label_sets(cls))
        raise UserError(
            f"config: method '{config.method.name}' cannot be used with {several}; use "
            f"{any_of(able)}."
        )
    for name in config.protocols:
        if not protocol_class(name).multi_label:
            able = [n for n, cls in all_protocols().items() if cls.multi_label]
            raise UserError(
                f"config: protocol '{name}' cannot be used with {several}; leave it out. "
                f"{', '.join(sorted(able))} can."
            )
    if config.partition.labels_per_round:
        raise UserError(
            f"config: partition.labels_per_round cannot be used with {several}; leave it out."
        )
    if config.attack.kind in ("label_flip", "backdoor"):
        raise UserError(
            f"config: attack.kind={config.attack.kind} cannot be used with {several}; use another "
            "attack."
        )
