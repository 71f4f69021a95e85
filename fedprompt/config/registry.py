"""Methods, strategies, protocols and data sources by name.

A package holds one thing per module, and the module's name is the thing's name; a trailing
underscore keeps a Python keyword importable (`global_.py` holds `global`). Packages of others add
things through entry points. Names are listed without importing a module, since most of them need
PyTorch, which takes seconds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fedprompt.errors import UserError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes that a package and the entry points of its name offer.

    Args:
        kind: what the things are called in messages, e.g. `method`.
        package: the package with one module per thing; it is also the entry points' group, so that
            a distribution adds a method with `[project.entry-points."fedprompt.methods"]`.
        base: the class that all of them derive from.
        helpers: modules of the package that hold no such thing.
    """

    kind: str
    package: str
    base: type[Any]
    helpers: Collection[str] = field(default_factory=frozenset)

    def names(self) -> list[str]:
        """All names, sorted; no module of the package is imported."""
        return sorted({*self._modules(), *self._entry_points()})

    def get(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            UserError: there is none, or what an entry point names cannot be used.
        """
        modules = self._modules()
        if name in modules:
            module = importlib.import_module(f"{self.package}.{modules[name]}")
            for item in vars(module).values():
                if isinstance(item, type) and issubclass(item, self.base):
                    if vars(item).get("name") == name:
                        return item
            raise UserError(f"{module.__file__} has no {self.kind} called '{name}'.")
        point = self._entry_points().get(name)
        if point is None:
            raise UserError(f"config: no {self.kind} '{name}'.{did_you_mean(name, self.names())}")
        return self._load(point)

    def all(self) -> dict[str, type[T]]:
        """Every class by name; imports all modules."""
        return {name: self.get(name) for name in self.names()}

    def _modules(self) -> dict[str, str]:
        """Module by name of the thing that it holds."""
        path = importlib.import_module(self.package).__path__
        return {
            module.name.rstrip("_"): module.name
            for module in pkgutil.iter_modules(path)
            if not module.ispkg and module.name not in self.helpers
        }

    def _entry_points(self) -> dict[str, EntryPoint]:
        """Entry points of other distributions by name; ours cannot be replaced by them."""
        ours = self._modules()
        return {p.name: p for p in entry_points(group=self.package) if p.name not in ours}

    def _load(self, point: EntryPoint) -> type[T]:
        where = f"the entry point '{point.name} = {point.value}' of group {self.package}"
        try:
            item = point.load()
        except Exception as error:  # foreign code raises whatever it likes
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{where} cannot be loaded: {reason}.") from None
        if not (isinstance(item, type) and issubclass(item, self.base)):
            raise UserError(f"{where} is no {self.base.__name__}.")
        if getattr(item, "name", None) != point.name:
            raise UserError(f"{where} is called {getattr(item, 'name', None)!r}; names must agree.")
        return item
