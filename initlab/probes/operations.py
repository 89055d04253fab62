"""Functions of torch that a network calls without a module: activations, products, norms, softmax and sums.

A mode sees every function of torch that is called inside a forward pass, by its name in `OPERATIONS`. What is seen
there is measured by `hooks.py`; a module of torch's own has its row from its output, and what it calls is not reported.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from initlab.nn.activations import ACTIVATIONS, Activation


class Operation(NamedTuple):
    """What a function computes: its name, the word for its output in the column `tensor`, and phi if it is one."""

    name: str
    word: str
    activation: Activation | None = None


def _functions(name: str) -> list[Callable[..., Any]]:
    """All functions of torch by this name: a method, one in place, an operator."""
    names = (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
    return [f for home in (torch, Tensor, F) for one in names if (f := getattr(home, one, None)) is not None]


def _table(word: str, names: Iterable[str]) -> dict[Any, Operation]:
    rows = {name: ACTIVATIONS.get(name) if word == "activation" else None for name in names}
    return {f: Operation(name, word, row) for name, row in rows.items() for f in _functions(name)}


PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")  # layers where one factor is a parameter
CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
OPERATIONS: dict[Any, Operation] = {
    **_table(
        "activation", ["relu", "tanh", "sigmoid", "leaky_relu", "gelu", "silu", "selu", "elu", "softplus", "mish"]
    ),
    **_table(
        "activation", ["hardswish", "relu6", "celu", "hardtanh", "hardsigmoid", "logsigmoid", "softsign", "prelu"]
    ),
    **_table("activation", ["clamp_min", "clamp"]),
    **_table("preactivation", ["linear", "bilinear", *PRODUCTS, *CONVOLUTIONS]),
    **_table("norm", ["layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"]),
    **_table("embedding", ["embedding", "embedding_bag"]),
    **_table("attention", ["softmax", "scaled_dot_product_attention"]),
    **_table("stream", ["add"]),
}


class OperationMode(TorchFunctionMode):
    """Calls `before()` before every function of torch, and `see(operation, arguments, output)` after one of OPERATIONS.

    The output is handed over when the function is done; it may be measured up to the next `before`, which comes before
    anything can overwrite it.
    """

    def __init__(self, before: Callable[[], None], see: Callable[[Operation, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self._before, self._note_function = before, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._before()
        output = func(*args, **(kwargs or {}))
        operation = OPERATIONS.get(func)
        if operation is not None:
            self._note_function(operation, (*args, *(kwargs or {}).values()), output)
        return output


def refine_operation(operation: Operation, args: tuple[Any, ...], output: Tensor) -> Operation | None:
    """What a call computes, by its arguments: None where it is no layer, no activation and no sum of two streams."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if operation.word == "stream":
        alike = [t for t in tensors if t.shape == output.shape and not is_parameter(t)]
        return operation if len(alike) == 2 and output.ndim > 1 else None
    if operation.name in ("clamp", "clamp_min"):
        return operation._replace(activation=ACTIVATIONS["relu"]) if args[1:] == (0,) else None
    if operation.name in PRODUCTS:
        return operation if any(map(is_parameter, tensors)) else None
    return operation


def is_parameter(x: Tensor) -> bool:
    """A parameter, or a view of one such as its transpose."""
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


def find_axis(operation: Operation, x: Tensor) -> int | None:
    """Which dimension of an output counts units: channels of convolutions and norms, else the last; None: as below."""
    if operation.name in CONVOLUTIONS:
        return x.ndim - 1 - int(operation.name[-2])
    if operation.name in ("batch_norm", "group_norm", "instance_norm"):
        return min(1, x.ndim - 1)
    return None if operation.word in ("activation", "stream") else x.ndim - 1
