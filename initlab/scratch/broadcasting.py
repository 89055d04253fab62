"""Broadcasting, strides and einsum by hand: how an operation finds numbers that nobody has written down twice.

A tensor is a row of numbers in memory, its storage, and a rule for reading it: the number at (i, j) stands at place
offset + i * stride[0] + j * stride[1]. A stride of 0 reads the same number again, and that is all that stretching is:
`expand_as`, the broadcasting of `m + c`, and with one line more einsum. Nothing is copied.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from initlab.errors import UsageError

Shape = Sequence[int]


def broadcast_shape(one: Shape, other: Shape) -> tuple[int, ...]:
    """The shape of an operation between two: compared from the last dimension, a 1 or nothing stretches to the other.

    Errors: two sizes that differ, neither of them 1.

    >>> broadcast_shape((256, 256, 3), (3,)), broadcast_shape((8, 1, 6), (7, 1))
    ((256, 256, 3), (8, 7, 6))
    """
    found: list[int] = []
    for place, (a, b) in enumerate(zip_longest(reversed(one), reversed(other), fillvalue=1), start=1):
        if a != b and 1 not in (a, b):
            raise UsageError(f"{tuple(one)} and {tuple(other)} do not fit: {a} and {b} in dimension -{place}, no 1")
        found.append(b if a == 1 else a)
    return tuple(reversed(found))


def expand_by_hand(x: Tensor, shape: Shape) -> Tensor:
    """`x.expand(shape)`: the same storage, read with stride 0 where x has size 1 or no such dimension.

    >>> c = torch.tensor([10.0, 20.0, 30.0])
    >>> expand_by_hand(c, (2, 3)).tolist(), expand_by_hand(c, (2, 3)).stride()
    ([[10.0, 20.0, 30.0], [10.0, 20.0, 30.0]], (0, 1))
    """
    if broadcast_shape(x.shape, shape) != tuple(shape):
        raise UsageError(f"{tuple(x.shape)} cannot be expanded to {tuple(shape)}: only a size of 1 stretches")
    new = len(shape) - x.ndim  # dimensions in front that x has not
    strides = [0] * new + [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return torch.as_strided(x, tuple(shape), strides, x.storage_offset())


def read_storage(x: Tensor) -> Tensor:
    """The numbers in memory, in their order there, whatever shape and strides x reads them with."""
    return x.new_empty(0).set_(x.untyped_storage())


def einsum_by_hand(equation: str, *tensors: Tensor) -> Tensor:
    """`torch.einsum`: every tensor viewed with one dimension for each letter, multiplied, and summed over the letters
    that are not in the result. A letter that a tensor has not gets stride 0, one that it has twice gets their sum.

    >>> m = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> einsum_by_hand("ik,kj->ij", m, m).tolist(), einsum_by_hand("ii->", m).item()
    ([[7.0, 10.0], [15.0, 22.0]], 5.0)
    """
    given, result = equation.replace(" ", "").split("->")
    letters = result + "".join(sorted(set(given) - set(result) - {","}))
    product = torch.ones(())
    for term, x in zip(given.split(","), tensors, strict=True):
        sizes = [x.shape[term.index(letter)] if letter in term else 1 for letter in letters]
        strides = [sum(s for own, s in zip(term, x.stride(), strict=True) if own == letter) for letter in letters]
        product = product * torch.as_strided(x, sizes, strides, x.storage_offset())
    summed = tuple(range(len(result), len(letters)))
    return product.sum(summed) if summed else product
