"""Starts a process with few imports: packages that only the terminal's output needs are loaded with the first output."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Let imports in the body fail for these packages, and let the garbage collector wait until they are done.

    structlog loads Rich for coloured tracebacks, and httpx loads Click for a command of its own, each only if it is
    installed: a third of a service's start. Neither is used here. Packages that are already loaded stay so.
    """
    kept = {name: sys.modules.get(name) for name in names}
    collects = gc.isenabled()
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: the import is refused
    gc.disable()  # an import makes many objects and few of them are garbage
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        if collects:
            gc.enable()


class AtFirstUse:
    """Stands for an object that is made when an attribute of it is read or set, or a `with` enters it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """`make` imports what the object needs."""
        object.__setattr__(self, "_made", cache(make))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_made")(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(object.__getattribute__(self, "_made")(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(object.__getattribute__(self, "_made")(), name)

    def __enter__(self) -> Any:
        return object.__getattribute__(self, "_made")().__enter__()

    def __exit__(self, *error: object) -> Any:
        return object.__getattribute__(self, "_made")().__exit__(*error)
