"""Broadcasting, strides and einsum by hand are torch's, whatever the shapes; the rest is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initlab.errors import UsageError
from initlab.scratch.broadcasting import broadcast_shape, einsum_by_hand, expand_by_hand, read_storage

shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4).map(tuple)
laws = settings(deadline=None, max_examples=200)


def count(*shape: int) -> torch.Tensor:
    """0, 1, 2, ...: every number another, so that one in a wrong place is seen."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@laws
@given(shapes, shapes)
def test_the_rules_are_torchs(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    try:
        wanted = tuple(torch.broadcast_shapes(one, other))
    except RuntimeError:
        with pytest.raises(UsageError, match="do not fit") as caught:
            broadcast_shape(one, other)
        assert "\n" not in str(caught.value)
        return
    assert broadcast_shape(one, other) == broadcast_shape(other, one) == wanted
    stretched = [expand_by_hand(count(*shape), wanted) for shape in (one, other)]
    assert torch.equal(stretched[0] + stretched[1], count(*one) + count(*other))


@laws
@given(shapes, shapes, st.booleans())
def test_expanding_reads_the_same_storage(one: tuple[int, ...], shape: tuple[int, ...], turned: bool) -> None:
    """As torch's own `expand`, of a transpose and a piece too, and nothing is copied."""
    x = count(*one)[1:] if one else count()
    x = x.mT if turned and x.ndim > 1 else x
    try:
        wanted = x.expand(shape)
    except RuntimeError:
        with pytest.raises(UsageError):
            expand_by_hand(x, shape)
        return
    found = expand_by_hand(x, shape)
    assert torch.equal(found, wanted) and found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    if found.numel():
        assert torch.equal(read_storage(found), read_storage(x))


def test_a_stride_is_a_step_in_storage() -> None:
    """The number at (i, j) stands at offset + i stride[0] + j stride[1], in a view of a view too."""
    x = count(4, 5).t()[1:, ::2]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            place = x.storage_offset() + i * x.stride(0) + j * x.stride(1)
            assert read_storage(x)[place] == x[i, j]


@pytest.mark.parametrize(
    ("equation", "sizes"),
    [
        ("ij->ji", [(3, 4)]),
        ("ii->i", [(3, 3)]),
        ("iij->ji", [(3, 3, 2)]),
        ("iii->", [(3, 3, 3)]),
        ("ij->", [(3, 4)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ik,kj->ij", [(3, 4), (4, 2)]),
        ("ik,jk->ij", [(3, 4), (2, 4)]),
        ("b i k, b k j -> b i j", [(2, 3, 4), (2, 4, 5)]),
        ("ni,no->io", [(6, 3), (6, 2)]),
        ("i,ij,j->", [(3,), (3, 4), (4,)]),
        (",i->i", [(), (3,)]),
    ],
)
def test_einsum_is_torchs(equation: str, sizes: list[tuple[int, ...]]) -> None:
    """Whole numbers, whose sums are exact in every order; of a transposed operand too."""
    tensors = [count(*size) + 1 for size in sizes]
    assert torch.equal(einsum_by_hand(equation, *tensors), torch.einsum(equation, *tensors))
    turned = [x.flip(0).mT.contiguous().mT if x.ndim > 1 else x for x in tensors]
    assert torch.equal(einsum_by_hand(equation, *turned), torch.einsum(equation, *turned))
