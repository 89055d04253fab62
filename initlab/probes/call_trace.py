"""The functions of torch that a module has called, as one function that can be called again with other numbers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]  # a function, its arguments, named ones, and what it gave


class CallTrace:
    """Notes the calls from one tensor on. The module itself is never called again: only functions of torch are."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._given = args
        self.calls: list[Call] = []

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A function was called."""
        if isinstance(output, Tensor):
            self.calls.append((func, args, kwargs, output))

    def as_function(self, output: Any) -> Callable[[Tensor], Tensor] | None:
        """What the calls have made of the tensor; None where anything else than it and single numbers went in."""
        if len(self._given) != 1 or not isinstance(self._given[0], Tensor) or not self.calls:
            return None
        made = {id(self._given[0]): -1} | {id(call[3]): k for k, call in enumerate(self.calls)}
        inputs = [
            one for _, args, kwargs, _ in self.calls for one in (*args, *kwargs.values()) if isinstance(one, Tensor)
        ]
        if made.get(id(output), -1) < 0 or any(id(one) not in made and one.numel() != 1 for one in inputs):
            return None
        steps = [
            (
                func,
                [_find_argument(one, made) for one in args],
                {name: _find_argument(one, made) for name, one in kwargs.items()},
            )
            for func, args, kwargs, _ in self.calls
        ]
        last = made[id(output)]

        def function(z: Tensor) -> Tensor:
            values: list[Any] = []
            for func, args, kwargs in steps:
                named = {name: find(z, values) for name, find in kwargs.items()}
                values.append(func(*[find(z, values) for find in args], **named))
            value: Tensor = values[last]
            return value

        return function


def _find_argument(given: Any, made: dict[int, int]) -> Callable[[Tensor, list[Any]], Any]:
    """How an argument is found when the calls are made again: the tensor, what an earlier call gave, or itself."""
    place = made.get(id(given)) if isinstance(given, Tensor) else None
    if place is None:
        fixed = given.item() if isinstance(given, Tensor) else given
        return lambda z, values: fixed
    return (lambda z, values: z) if place < 0 else (lambda z, values: values[place])
