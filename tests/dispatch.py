"""What a function asks of torch's dispatcher, operation by operation: the cost of a step that does not need a clock."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Reading a number from a tensor: on a GPU the whole queue is waited for.
WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")


class _Counting(TorchDispatchMode):
    def __init__(self, views: bool) -> None:
        super().__init__()
        self.views, self.found = views, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.views or not func.is_view:
            self.found[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def count_ops(fn: Callable[[], object], views: bool = False) -> Counter[str]:
    """Operations by name, autograd's and the optimizer's too, that one call of fn dispatches; views move no number."""
    with _Counting(views) as mode:
        fn()
    return mode.found
