"""Containers that consist of parts, and the flat names under which they leave a method.

Only wrappers (such as FedProx and SCAFFOLD) use this module, on the server as well as on
clients. A wrapper adds tensors to those of the method that it wraps. Inside the wrapper a container
is nested: it maps the name of a part to the tensors of that part, for example `{"base": {"ctx":
...}, "control": {"ctx": ...}}`. Training, messages, private stores and checkpoints hold flat
containers, and `Layout` is the only place that translates between them.

A layout looks names up in a table that is fixed when the method is built. It never derives a part
from the way a name begins, so a tensor cannot end up in the wrong part by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedprompt.methods.batch import Tensors

Parts = dict[str, Tensors]
"""A nested container: tensors by part and name."""


@dataclass(frozen=True)
class Layout:
    """The table of a nested container.

    Attributes:
        flat_names: for each part, the flat name of each of its tensors.
    """

    flat_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_part(self, part: str, names: Iterable[str], prefix: str = "") -> Layout:
        """This layout with one more part.

        Args:
            part: the name of the part.
            names: names of its tensors within the part.
            prefix: text that precedes these names in the flat container.

        Returns:
            A new layout; this one does not change.

        Raises:
            ValueError: a flat name already belongs to another part.
        """
        added = {name: prefix + name for name in names}
        # Messages and stores know tensors by their flat names, so two parts cannot share one.
        taken = {flat for names in self.flat_names.values() for flat in names.values()}
        if clash := taken & set(added.values()):
            raise ValueError(f"part '{part}': the names {sorted(clash)} belong to another part")
        return Layout({**self.flat_names, part: added})

    def nest(self, flat: Tensors) -> Parts:
        """Divide a flat container into its parts, in new dicts.

        Tensors of the table may be missing: the extras, which only the server sends, are not part
        of every container.

        Raises:
            KeyError: the table does not list one of the names.
        """
        nested = {
            part: {name: flat[flat_name] for name, flat_name in names.items() if flat_name in flat}
            for part, names in self.flat_names.items()
        }
        # Flat names are unique in the table, so a smaller count means that one was not listed.
        if sum(map(len, nested.values())) < len(flat):
            listed = {name for names in self.flat_names.values() for name in names.values()}
            raise KeyError(f"tensors {sorted(set(flat) - listed)} belong to no part")
        return nested

    def flatten(self, nested: Parts) -> Tensors:
        """The flat container of these parts; the inverse of `nest`."""
        return {
            self.flat_names[part][name]: tensor
            for part, tensors in nested.items()
            for name, tensor in tensors.items()
        }
