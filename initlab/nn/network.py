"""A network as data, and the one pass through its layers, forward and backward.

A `Network` is a row of blocks. A block is a linear map of some kind and an activation, and with `residual` its input is
added to what comes out:

    z = x W + b,    a = phi(z),    or with residual    a = x + phi(z)

`forward` and `backward` walk the blocks and show every layer's tensors to a visitor. What a product or a sum is, an
`Arithmetic` says: plain tensors (`PLAIN`), numbers without a range (unbounded.py), values with their derivatives
(theory/singular_values.py), buffers that are used again (tasks/stack.py).
Legend: E ensemble, N batch, I fan_in, O fan_out, L layers; layers are counted from 1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from initlab.errors import LIMITS, UsageError, check, check_value, choose, plain, show
from initlab.nn.activations import Activation

DEPTH, WIDTH = 50, 100  # of a stack of which nothing is said

T = TypeVar("T")
Weights = Callable[[int], tuple[Tensor, Tensor | None]]  # layer -> w (..., I, O) and b (..., O) or None
Visit = Callable[[int, T, T], object]  # layer, preactivation and activation, or the gradients by them


class Arithmetic(Protocol[T]):
    """The operations of a forward pass on signals of some type; `w` (..., I, O) and `b` (..., O) are plain tensors."""

    def linear(self, x: T, w: Tensor, b: Tensor | None) -> T:
        """z = x w + b."""

    def activate(self, z: T, row: Activation) -> T:
        """phi(z)."""

    def add(self, a: T, b: T) -> T:
        """a + b."""


class TwoWayArithmetic(Arithmetic[T], Protocol[T]):
    """The same with the operations of the backward pass."""

    def linear_back(self, g: T, w: Tensor) -> T:
        """dL/dx = dL/dz w^T."""

    def activate_back(self, g: T, z: T, row: Activation) -> T:
        """dL/dz = dL/dphi phi'(z)."""


class Kind(NamedTuple):
    """A kind of linear map: how it acts on a signal, and on a gradient in the other direction."""

    forward: Callable[[Any, Any, Tensor, Tensor | None], Any]
    backward: Callable[[Any, Any, Tensor], Any]


KINDS: dict[str, Kind] = {
    "dense": Kind(lambda math, x, w, b: math.linear(x, w, b), lambda math, g, w: math.linear_back(g, w)),
}


@dataclass(frozen=True)
class Block:
    """A layer: a linear map of a `kind` from `fan_in` to `fan_out` units, an activation, perhaps a residual connection.

    Errors: an unknown kind; a residual connection between different numbers of units.
    """

    fan_in: int
    fan_out: int
    activation: Activation
    kind: str = "dense"
    residual: bool = False

    def __post_init__(self) -> None:
        choose(KINDS, self.kind, "kind")
        if self.residual and self.fan_in != self.fan_out:
            raise UsageError(f"residual: needs as many units in as out, not {self.fan_in} and {self.fan_out}")


@dataclass(frozen=True)
class Network:
    """Blocks in the order of the forward pass."""

    blocks: tuple[Block, ...]

    @property
    def residual(self) -> bool:
        """Whether any block adds its input to its output."""
        return any(block.residual for block in self.blocks)


def dense(sizes: Iterable[int], activation: Activation, residual: bool = False) -> Network:
    """Dense layers between `sizes` units, the input's first; `residual` where a layer has as many units in as out.

    >>> from initlab.nn.activations import ACTIVATIONS
    >>> [block.residual for block in dense([3, 5, 5], ACTIVATIONS["relu"], residual=True).blocks]
    [False, True]
    """
    return Network(tuple(Block(i, o, activation, residual=residual and i == o) for i, o in pairwise(sizes)))


def resolve_units(depth: int, width: int, widths: Sequence[int] | None, inputs: int | None) -> list[int]:
    """Units of the input and of every layer: whole numbers, none of them 0.

    depth, width: layers and units of each. widths: units of each instead. inputs: of the input, of the first layer if
    None. Errors: a number that is not whole or below 1; widths beside a depth or a width.

    >>> resolve_units(DEPTH, WIDTH, [30, 10], None)
    [30, 30, 10]
    """
    depth, width, inputs = check(depth=depth, width=width, inputs=inputs)
    given = plain(widths)
    if given is not None and (not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given):
        raise UsageError(f"widths={show(given)}: must be a list with the units of every layer")
    if given and ((depth, width) != (DEPTH, WIDTH)):
        raise UsageError("widths: says the units of every layer; leave depth and width out")
    own = [width] * depth if given is None else [check_value("widths", n, LIMITS["width"]) for n in given]
    return [own[0] if inputs is None else inputs, *own]


def resolve_directions(backward: bool, input_gradient: bool) -> tuple[bool, bool]:
    """Whether gradients are pulled back, and whether down to the input. Errors: the second without the first.

    >>> resolve_directions(True, False)
    (True, False)
    """
    backward, input_gradient = check(backward=backward, input_gradient=input_gradient)
    if input_gradient and not backward:
        raise UsageError("input_gradient=true: there is none with backward=false")
    return backward, input_gradient


def forward(
    network: Network, weights: Weights, x: T, visit: Visit[T], math: Arithmetic[T], layers: Iterable[int] | None = None
) -> T:
    """Push x (E, N, I) through the `layers`, all of them by default; returns what leaves the last one.

    `visit(layer, z, a)` sees every layer's preactivation and what leaves it, before the next layer is computed.
    """
    for layer in range(1, len(network.blocks) + 1) if layers is None else layers:
        block = network.blocks[layer - 1]
        z = KINDS[block.kind].forward(math, x, *weights(layer))
        a = math.activate(z, block.activation)
        x = math.add(a, x) if block.residual else a
        visit(layer, z, x)
    return x


def backward(
    network: Network,
    weights: Weights,
    preactivation: Callable[[int], T],
    g: T,
    visit: Visit[T],
    math: TwoWayArithmetic[T],
    layers: Iterable[int] | None = None,
    to_input: bool = False,
) -> T:
    """Pull dL/da (E, N, O) of the first of the `layers` back through them; `layers` descend, all of them by default.

    `preactivation(layer)` gives the z of the forward pass. `visit(layer, dL/dz, dL/da)` sees both gradients of a layer
    before those of the next are computed. Returned is dL/da of the layer below the last one; below layer 1 that is the
    gradient by the input, found only with `to_input`: else layer 1's own dL/da is returned.
    """
    for layer in range(len(network.blocks), 0, -1) if layers is None else layers:
        block = network.blocks[layer - 1]
        dz = math.activate_back(g, preactivation(layer), block.activation)
        visit(layer, dz, g)
        if layer > 1 or to_input:
            below = KINDS[block.kind].backward(math, dz, weights(layer)[0])
            g = math.add(below, g) if block.residual else below
    return g


def multiply(x: Iterable[Tensor], w: Tensor, out: Iterable[Tensor]) -> None:
    """out = x w, networks (N, I), (E, I, O) and (N, O) one after the other: rounded as when each runs by itself."""
    for one, weight, result in zip(x, w.unbind(), out, strict=True):
        torch.mm(one, weight, out=result)


class Plain:
    """Tensors as they are: (E, N, I) with w (E, I, O), or one network's (N, I) with (I, O).

    On a CPU the networks of an ensemble are multiplied one by one: as fast, and rounded as when each runs by itself.
    """

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """z = x w + b."""
        if w.dim() == 3 and w.device.type == "cpu":
            z = x.new_empty(*x.shape[:-1], w.shape[-1])
            multiply(x.unbind(), w, z.unbind())
        else:
            z = x @ w
        return z if b is None else z.add_(b.unsqueeze(-2))

    def linear_back(self, g: Tensor, w: Tensor) -> Tensor:
        """g w^T."""
        return self.linear(g, w.mT)

    def activate(self, z: Tensor, row: Activation) -> Tensor:
        """phi(z)."""
        return row.phi(z)

    def activate_back(self, g: Tensor, z: Tensor, row: Activation) -> Tensor:
        """g phi'(z), by the activation's own rule."""
        return row.pull_back(g, z)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        return a + b


PLAIN = Plain()
