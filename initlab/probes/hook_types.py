"""A hook that copies of its module do not inherit, and what a hook remembers of the layer below an activation."""

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from initlab.probes.torch_private import CALL, ignore_functions


class Hook(partial[None]):
    """A hook that its module's copies do not inherit: what is copied or pickled in its place does nothing.

    What it computes is none of the network's work: a mode that sees the functions of torch does not see its own.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if is_compiling():
            return
        with ignore_functions():
            super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return do_nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return partial, (do_nothing,)


def do_nothing(*args: Any) -> None:
    """What stands in a copy of a watched module where its hook was."""


class Preactivation(NamedTuple):
    """The latest output of a layer, how often it had been overwritten, and its row."""

    x: Tensor
    version: int
    axis: int
    row: int

    def is_input(self, args: tuple[Any, ...], overwritten: bool = False) -> bool:
        """Whether a module was called with these very values, which it has perhaps overwritten itself since."""
        if not args or not (args[0] is self.x or is_same_memory(args[0], self.x)):
            return False
        return count_writes(self.x) == self.version + (overwritten and not self.x.is_inference())


def find_call() -> FrameType | None:
    """The innermost call of a module that is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CALL:
        frame = frame.f_back
    return frame


def is_inside(frame: FrameType | None, outer: FrameType) -> bool:
    """Whether a call was made in another one, which has not ended."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer


def count_writes(x: Tensor) -> int:
    """How often x has been overwritten; torch does not count that in inference mode."""
    return 0 if x.is_inference() else x._version


def is_same_memory(given: Any, x: Tensor) -> bool:
    """Whether an argument is another object for the tensor x, as a backward hook of a module makes one."""
    alike = isinstance(given, Tensor) and type(given) is type(x) and given.shape == x.shape and given.dtype == x.dtype
    return alike and given.stride() == x.stride() and given.data_ptr() == x.data_ptr()
