"""Functions of torch that a network calls without a module: activations, products, norms, softmax and sums.

A mode sees every function of torch that is called inside a forward pass, by its name in `OPERATIONS`. What is seen
there is measured by `hooks.py`; a module of torch's own has its row from its output, and what it calls is not reported.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.probes.probed_modules import MOST_LOOKS, RELU, look_at_function
from initlab.probes.torch_private import ignore_functions


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


# Functions whose value may be a residual sum; `sum` and `mean` of what `stack` has put side by side.
_SUMS = ("add", "sub", "subtract", "lerp", "addcmul", "stack", "sum", "mean")
SUMS = {function: name for name in _SUMS for function in _functions(name)}

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
        with ignore_functions():  # another mode around this one hears the network's functions only
            self._before()
        output = func(*args, **(kwargs or {}))
        with ignore_functions():
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
    operation: Operation, args: tuple[Any, ...], is_weight: Callable[[Tensor], object]
) -> Operation | None:
    """What a call computes, by its arguments: None where it is a product without a weight."""
    tensors = [a for a in args if isinstance(a, Tensor)]
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


class _Origin(NamedTuple):
    """Of which measured tensors another is made, a bit for each: by functions without a row, and by whatever path."""

    near: int = 0
    deep: int = 0


NOISE = 1  # the bit of random numbers
_RANDOM = ("randn", "randn_like", "rand_like", "normal", "normal_")
_PRODUCTS = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")


class Origins:
    """What each tensor of a pass is made of, by which a residual sum is told from a formula.

    x + f(x) is a sum of what was measured and of something else made of it. All that is elementwise is one formula
    with what it was given, as z + tanh(z); what no gradient goes through, and noise, is nothing else.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ReferenceType[Tensor], _Origin]] = {}
        self._factors: dict[int, tuple[ReferenceType[Tensor], list[ReferenceType[Tensor]]]] = {}
        self._stacks: dict[int, tuple[ReferenceType[Tensor], int]] = {}  # of residual summands, along which dimension
        self._bit, self._deep = NOISE, dict[int, int]()  # of each bit: what its tensor is made of

    def clear(self) -> None:
        """A pass begins."""
        for kept in (self._known, self._factors, self._stacks, self._deep):
            kept.clear()
        self._bit = NOISE

    def find(self, tensors: Iterable[Tensor]) -> _Origin:
        """What tensors are made of, taken together; one that nobody has made but autograd follows is of its own."""
        near = deep = 0
        for x in tensors:
            found = next((one for t in (x, x._base) if (one := self._known.get(id(t))) and one[0]() is t), None)
            if found is not None and not (x.is_leaf and x.requires_grad and not found[1].near):
                near, deep = near | found[1].near, deep | found[1].deep
            elif x.requires_grad and not isinstance(x, nn.Parameter):
                near, deep = near | self._mark(x, 0), deep | self._bit
        return _Origin(near, deep)

    def _mark(self, x: Tensor, deep: int) -> int:
        self._bit <<= 1
        self._deep[self._bit] = deep | self._bit
        self._known[id(x)] = ref(x), _Origin(self._bit, deep | self._bit)
        return self._bit

    def open(self, given: Iterable[Any]) -> None:
        """A module is called with tensors that nobody has made."""
        for x in list_tensors(given):
            if not self.find([x]).deep:
                self._mark(x, 0)

    def mark(self, x: Tensor, given: Iterable[Any], elementwise: bool = False) -> None:
        """A tensor is measured, that a module or a function has made of what it was given."""
        known = self._known.get(id(x))
        own = [x] if known is not None and known[0]() is x else []
        origin = self.find([*own, *(one for one in list_tensors(given) if x.requires_grad or not one.requires_grad)])
        if elementwise:
            self._known[id(x)] = ref(x), origin
        else:
            self._mark(x, origin.deep)

    def follow(self, func: Any, args: Iterable[Any], output: Tensor) -> None:
        """A function was called."""
        name = getattr(func, "__name__", "")
        given = list(list_tensors(args))
        origin = self.find(given)
        if name in _RANDOM:
            origin = _Origin(NOISE, NOISE)
        elif not output.requires_grad and any(x.requires_grad for x in given):
            origin = _Origin()
        self._known[id(output)] = ref(output), origin
        if name in _PRODUCTS:
            self._factors[id(output)] = ref(output), [ref(x) for x in given]

    def _is_made(self, new: int, old: int) -> bool:
        """Whether one of these bits is of a tensor that is made of all of those."""
        while new and old:
            lowest = new & -new
            if old & self._deep.get(lowest, 0) == old:
                return True
            new ^= lowest
        return False

    def is_residual(self, name: str, args: Sequence[Any], output: Tensor, is_known: Callable[[Tensor], bool]) -> bool:
        """Whether a call sums what has a row, or what a module was given, and something else, of one shape.

        Other sums than `x + y` are residual only if the other summand is made of the first.
        """
        first = args[0]
        if name in ("sum", "mean"):
            stack, dim = self._stacks.get(id(first), (None, 0))
            along = next((one for one in args[1:] if isinstance(one, (int, tuple, list))), ())
            dims = [along] if isinstance(along, int) else list(along)
            is_along = output.ndim < first.ndim and [one % first.ndim for one in dims] == [dim]
            return is_along and stack is not None and stack() is first
        tensors = [x for x in (args[:2] if name == "lerp" else list_tensors(args)) if isinstance(x, Tensor)]
        summands = [tensors[:1], tensors[1:]] if name == "addcmul" else [[x] for x in tensors]
        shape = first[0].shape if name == "stack" else output.shape
        for k, summand in enumerate(summands):
            rest = self.find(x for other in summands[:k] + summands[k + 1 :] for x in other)
            made, factors = self._factors.get(id(summand[0]), (None, []))
            is_product = made is not None and made() is summand[0]
            alike = all(x.shape == shape for x in (tensors if name in ("add", "sub") else summand[:1]))
            if rest.near & NOISE or not alike or len(shape) < 2:
                return False
            for x in [*summand[:1], *(one() for one in factors if is_product)]:
                own = self.find([] if x is None else [x])
                new, is_plain = rest.near & ~own.near, name in ("add", "stack") and x is summand[0]
                counts = new and (is_plain or self._is_made(new, own.near))
                if x is not None and x.shape == shape and counts and is_known(x):
                    if name == "stack":
                        dim = next((one for one in args[1:] if isinstance(one, int)), 0) % output.ndim
                        self._stacks[id(output)] = ref(output), dim
                    return name != "stack"
            if name == "addcmul":
                break
        return False


def list_tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of arguments, those in lists too."""
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from list_tensors(one)
