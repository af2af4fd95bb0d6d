"""Many cases of one pure test, in one test: pytest needs some milliseconds for each case of `parametrize`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest
from _pytest.mark.structures import ParameterSet

_F = TypeVar("_F", bound=Callable[..., None])


def looped(names: str | Sequence[str], cases: Iterable[Any], ids: object = None) -> Callable[[_F], _F]:
    """Run a test once for each case, as `pytest.mark.parametrize` does, but in one test; `ids` is ignored.

    The cases share the fixtures, so it is for tests without side effects. The note of a failure names its case.
    """
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    listed = list(cases)

    def decorate(test: _F) -> _F:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            if not listed:
                pytest.fail("no case")
            for case in listed:
                values = case.values if isinstance(case, ParameterSet) else case if len(keys) > 1 else (case,)
                try:
                    test(**dict(zip(keys, values, strict=True)), **fixtures)
                except BaseException as error:
                    error.add_note(
                        ", ".join(f"{key} = {value!r:.300}" for key, value in zip(keys, values, strict=True))
                    )
                    raise

        rest = [each for name, each in inspect.signature(test).parameters.items() if name not in keys]
        run.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate
