"""Objects of a framework that is not here, in a pickle. The module itself is a `pickle_module` for torch.save."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any


class Foreign:
    """An object of a framework: its class by name, the arguments that make it, and what it holds."""

    def __init__(self, name: str, *arguments: Any, state: Mapping[str, Any] | None = None) -> None:
        self.name, self.arguments, self.state = name, arguments, dict(state or {})


class _Name(str):
    """The dotted name of a class. Callable, as pickle wants it of what makes an object."""

    def __call__(self) -> None:
        raise TypeError(f"{self} is not here")


class Pickler(pickle._Pickler):
    """Writes such objects by the names of their classes."""

    def reducer_override(self, held: Any) -> Any:
        if not isinstance(held, Foreign):
            return NotImplemented
        made = (_Name(held.name), held.arguments)
        return (*made, held.state) if held.state else made

    def save(self, held: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(held, _Name):
            super().save(held, save_persistent_id)  # type: ignore[misc]
            return
        module, _, name = held.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())  # type: ignore[attr-defined]
