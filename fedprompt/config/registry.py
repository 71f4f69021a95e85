"""Finds methods, strategies, protocols and data sources by name.

Each of these packages has one class per module, and the class has the name of its module. A
trailing underscore of the module's name is dropped, so that a name may be a Python keyword:
`global_.py` defines the protocol `global`. Other distributions add classes through entry points.

Listing names imports neither the modules nor the base class: most of them need PyTorch, whose
import takes seconds, while commands such as `fedprompt list` only print names.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from fedprompt.errors import UserError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes that the modules of one package and the entry points of one group define.

    Args:
        kind: what messages call such a class, e.g. `method`.
        package: the package with one module per class.
        base: the class from which all of them derive, as `module:Class`. It is text, so that a
            registry can list names without importing the class.
        helpers: modules of the package that do not define such a class.
        group: the group of entry points through which other distributions add classes; empty means
            the package's name. A distribution adds a method with
            `[project.entry-points."fedprompt.methods"]`.
    """

    kind: str
    package: str
    base: str
    helpers: Collection[str] = field(default_factory=frozenset)
    group: str = ""

    def names(self) -> list[str]:
        """All names in alphabetical order; no module of the package is imported."""
        return sorted({*self._modules(), *self._entry_points()})

    def get(self, name: str) -> type[T]:
        """The class with this name.

        Args:
            name: a module of the package, or an entry point of the group.

        Returns:
            The class; its `name` attribute equals `name`.

        Raises:
            UserError: the name is unknown, its module defines no such class, or its entry point
                cannot be loaded or is not a subclass of the base class.
        """
        modules = self._modules()
        # Only the module that is asked for is imported, which keeps start-up fast.
        if name in modules:
            module = importlib.import_module(f"{self.package}.{modules[name]}")
            for item in vars(module).values():
                if self._is_named(item, name):
                    return cast("type[T]", item)
            raise UserError(f"{module.__file__} has no {self.kind} called '{name}'.")
        point = self._entry_points().get(name)
        if point is None:
            raise UserError(f"config: no {self.kind} '{name}'.{did_you_mean(name, self.names())}")
        return self._load(point)

    def all(self) -> dict[str, type[T]]:
        """Every class by name. This imports all modules of the package."""
        return {name: self.get(name) for name in self.names()}

    def described(self, name: str) -> str:
        """The first sentence of the docstring of a module of the package, which is not imported.

        Args:
            name: a name. Classes of other distributions are not described.
        """
        module = self._modules().get(name)
        spec = importlib.util.find_spec(f"{self.package}.{module}") if module else None
        if spec is None or spec.origin is None:
            return ""
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        return text.partition("\n\n")[0].replace("\n", " ")

    def added(self) -> list[str]:
        """The names that other distributions add through entry points, in alphabetical order."""
        return sorted(self._entry_points())

    def _modules(self) -> dict[str, str]:
        """A mapping from the names that the package defines to its modules."""
        # `iter_modules` lists files without importing them; only the package itself is imported.
        path = importlib.import_module(self.package).__path__
        return {
            module.name.rstrip("_"): module.name
            for module in pkgutil.iter_modules(path)
            if not module.ispkg and module.name not in self.helpers
        }

    def _entry_points(self) -> dict[str, EntryPoint]:
        """A mapping from the names that other distributions add to their entry points.

        An entry point cannot replace a class of the package: the meaning of `method=promptfl` must
        not depend on which other distributions happen to be installed.
        """
        ours = self._modules()
        group = self.group or self.package
        return {p.name: p for p in _installed(group, tuple(sys.path)) if p.name not in ours}

    def _load(self, point: EntryPoint) -> type[T]:
        where = f"the entry point '{point.name} = {point.value}' of group {point.group}"
        try:
            item = point.load()
        except Exception as error:  # code of another distribution may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{where} cannot be loaded: {reason}.") from None
        base = self._base_class()
        if not (isinstance(item, type) and issubclass(item, base)):
            raise UserError(f"{where} is not a subclass of {self.base}.")
        if not self._is_named(item, point.name):
            raise UserError(
                f"{where} has the name {getattr(item, 'name', None)!r}; the class and its entry "
                "point must have the same name."
            )
        return cast("type[T]", item)

    def _is_named(self, item: object, name: str) -> bool:
        """Whether `item` is a class of this registry that defines this name itself.

        An inherited name does not count, because a module may import the class that it extends.
        """
        if not (isinstance(item, type) and issubclass(item, self._base_class())):
            return False
        return vars(item).get("name") == name

    def _base_class(self) -> type[Any]:
        module, _, name = self.base.partition(":")
        return cast("type[Any]", getattr(importlib.import_module(module), name))


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group; `path` is where distributions are looked for.

    Looking reads the metadata of every installed distribution, which took a fifth of the time in
    which a config was composed.
    """
    return tuple(entry_points(group=group))
