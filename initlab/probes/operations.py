"""Functions of torch that a network calls without a module: activations, products, norms, softmax and sums.

A mode sees every function of torch that is called inside a forward pass, by its name in `OPERATIONS`. What is seen
there is measured by `hooks.py`; a module of torch's own has its row from its output, and what it calls is not reported.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.probes.probed_modules import MOST_LOOKS, RELU, look_at_function


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


PRODUCTS = (
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "tensordot",
    "inner",
)  # layers where one factor is a parameter
CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
OPERATIONS: dict[Any, Operation] = {
    **_table(
        "activation", ["relu", "tanh", "sigmoid", "leaky_relu", "gelu", "silu", "selu", "elu", "softplus", "mish"]
    ),
    **_table(
        "activation", ["hardswish", "relu6", "celu", "hardtanh", "hardsigmoid", "logsigmoid", "softsign", "prelu"]
    ),
    **_table("activation", ["clamp_min", "clamp", "clip"]),
    **_table("preactivation", ["linear", "bilinear", *PRODUCTS, *CONVOLUTIONS]),
    **_table("norm", ["layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"]),
    **_table("embedding", ["embedding", "embedding_bag"]),
    **_table("attention", ["softmax", "scaled_dot_product_attention"]),
    **_table("stream", ["add"]),
    # Where numbers are lost: these have a row only if not all of what they give is finite.
    **_table("other", ["sqrt", "rsqrt", "log", "log2", "log10", "log1p", "exp", "pow", "div", "truediv", "reciprocal"]),
    **_table("other", ["acos", "asin", "acosh", "atanh", "logit", "erfinv", "logsumexp"]),
}


# Functions that another library has wrapped are known by their names.
_BY_NAME = {getattr(function, "__name__", ""): operation for function, operation in OPERATIONS.items()}


class OperationMode(TorchFunctionMode):
    """Calls `before()` before every function of torch, and `see(function, arguments, named ones, output)` after it.

    What is seen may be measured up to the next `before`, which comes before anything can overwrite it.
    """

    def __init__(
        self, before: Callable[[], None], see: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
    ) -> None:
        super().__init__()
        self._before, self._see = before, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._before()
        output = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, output)
        return output


# Functions that have other uses than as an activation.
RARE = ("sin", "cos", "atan", "arctan", "asinh", "erf", "threshold", "rrelu", "hardshrink", "softshrink", "tanhshrink")
FACTORS = set(_functions("mul") + _functions("div") + _functions("truediv"))  # functions that multiply
# Functions of two tensors by which a ReLU is written out, and whose output may be one.
WRITTEN_OUT = ("where", "maximum", "max", "fmax", "mul", "__mul__", "__rmul__")
_LOOKED_AT: dict[tuple[Any, str, str], Activation | None] = {}  # functions with their arguments


def find_operation(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
    """What a function computes by the table, an activation with its arguments."""
    operation = OPERATIONS.get(func) or _BY_NAME.get(getattr(func, "__name__", ""))
    if operation is not None and operation.name in ("clamp", "clamp_min", "clip"):
        return operation._replace(activation=RELU) if (*args[1:], *kwargs.values()) == (0,) else None
    if operation is None or operation.activation is RELU or operation.word != "activation":
        return operation
    if operation.activation is not None and len(args) == 1 and not kwargs:
        return operation
    plain = getattr(F, operation.name, None) or getattr(torch, operation.name)  # what is not in place
    return operation._replace(activation=look_at_call(plain, args[1:], kwargs))


def look_at_call(func: Any, more: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """A function of one tensor and further numbers as an activation; looked at once for each choice of these."""
    named = {name: value for name, value in kwargs.items() if name != "inplace"}
    if any(isinstance(value, Tensor) for value in (*more, *named.values())):
        return None
    key = (func, repr(more), repr(named))
    if key not in _LOOKED_AT:
        if sum(known[0] is func for known in _LOOKED_AT) >= MOST_LOOKS:
            return None
        _LOOKED_AT[key] = look_at_function(lambda z: func(z, *more, **named))
    return _LOOKED_AT[key]


def guess_operation(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], z: Tensor) -> Operation | None:
    """A function of the latest preactivations z that has other uses too: one of RARE, or a ReLU written out."""
    name = getattr(func, "__name__", "").strip("_")
    if not any(arg is z for arg in args):
        return None
    if func.__name__ in WRITTEN_OUT:
        return Operation(name, "activation", RELU)
    found = look_at_call(func, args[1:], kwargs) if args[0] is z and name in RARE else None
    return None if found is None else Operation(name, "activation", found)


def refine_operation(
    operation: Operation, args: tuple[Any, ...], output: Tensor, is_weight: Callable[[Tensor], object]
) -> Operation | None:
    """What a call computes, by its arguments: None where it is no layer, no activation and no sum of two streams."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if operation.word == "stream":
        alike = [t for t in tensors if t.shape == output.shape and not is_weight(t)]
        return operation if len(alike) == 2 and output.ndim > 1 else None
    if operation.name in PRODUCTS:
        return operation if any(map(is_weight, tensors)) else None
    return operation


def find_axis(operation: Operation, x: Tensor) -> int | None:
    """Which dimension of an output counts units: channels of convolutions and norms, else the last; None: as below."""
    if operation.name in CONVOLUTIONS:
        return x.ndim - 1 - int(operation.name[-2])
    if operation.name in ("batch_norm", "group_norm", "instance_norm"):
        return min(1, x.ndim - 1)
    return None if operation.word in ("activation", "stream") else x.ndim - 1
