"""The passes of the plain backend, which all others are held against: each is its steps made one after the other."""

import pytest
import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.stats.backend import SATURATED, Backend, as_matrix
from initlab.stats.histogram import bin_columns
from initlab.stats.summarize import saturated_share, summarize

BACKEND = Backend()


def counted(*tensors: Tensor) -> dict[str, list[list[int]]]:
    """The histograms of tensors (E, N, C), as they must come out of the bins."""
    bins = BACKEND.bins(len(tensors[0]))
    for x in tensors:
        BACKEND.rows(x, True, bins)
    return {name: [list(row) for row in column] for name, column in bin_columns(bins.take()).items() if name != "first"}


def seen(bins: object) -> dict[str, list[list[int]]]:
    columns = bin_columns(bins.take())  # type: ignore[attr-defined]
    return {name: [list(row) for row in column] for name, column in columns.items() if name != "first"}


def same(found: Tensor, *expected: Tensor) -> None:
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_in_place(name: str) -> None:
    """Both rows, the share of small slopes, and both histograms; a linear one is its own argument."""
    z, row = torch.randn(2, 12, 5), ACTIVATIONS[name]
    x, bins = z.clone(), BACKEND.bins(2)
    found = BACKEND.activation_rows_(x, row, bins)
    torch.testing.assert_close(x, row.phi(z), rtol=1e-6, atol=0)
    before = summarize(z, single=True)
    before[SATURATED] = saturated_share(row.slope(z), row.largest_slope)
    same(found, before, summarize(x, single=True))
    assert seen(bins) == counted(z, x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_its_gradient_in_place(name: str) -> None:
    z, g, row = torch.randn(2, 12, 5), torch.randn(2, 12, 5), ACTIVATIONS[name]
    x, bins = g.clone(), BACKEND.bins(2)
    found = BACKEND.gradient_rows_(x, z, row, bins)
    torch.testing.assert_close(x, row.pull_back(g, z), rtol=1e-6, atol=0)
    same(found, summarize(g, single=True), summarize(x, single=True))
    assert seen(bins) == counted(g, x)


def test_the_gradient_of_a_bias_is_summed_over_the_batch() -> None:
    g, a, sums = torch.randn(3, 7, 5), torch.randn(3, 7, 5).relu(), torch.full((3, 5), torch.nan)
    BACKEND.mask_rows_(g, a, sums)
    assert torch.equal(sums, g.sum(1)) and bool((g[a == 0] == 0).all())


def test_parameters_and_their_changes_have_rows_and_histograms_without_a_batch() -> None:
    """Of any shapes; a bias is one row of units for the user's functions, and so are the changes, which replace."""
    shapes: list[tuple[int, ...]] = [(4, 3), (5,), (2, 3, 2, 2)]
    widths = {(4, 3): (4, 3), (5,): (1, 5), (2, 3, 2, 2): (2, 12)}
    old, new = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    asked: list[tuple[int, ...]] = []

    def share(x: Tensor) -> Tensor:
        asked.append(tuple(x.shape[-2:]))
        return (x > 0).double().mean((-2, -1))

    backend = Backend({"share": share})
    bins = backend.bins(1)
    found = backend.rows_of_each(new, bins)
    assert asked == [widths[shape] for shape in shapes]
    changes = [b - a for a, b in zip(old, new, strict=True)]
    moved = backend.change_rows_(old, new, bins)
    for rows, tensors in ((found, new), (moved, changes)):
        for k, x in enumerate(tensors):
            torch.testing.assert_close(
                rows[:-1, k], summarize(as_matrix(x), False, True), rtol=0, atol=0, equal_nan=True
            )
            assert rows[-1, k] == (x > 0).double().mean()
    assert all(torch.equal(a, b) for a, b in zip(old, changes, strict=True))
    histograms = seen(bins)
    assert len(histograms["positive"]) == 6
    for k, x in enumerate([*new, *changes]):
        assert sum(histograms["positive"][k]) == int((x > 0).sum())
        assert sum(histograms["negative"][k]) == int((x < 0).sum())


def test_an_update_in_place() -> None:
    w, g = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    x, bins = w.clone(), BACKEND.bins(2)
    found = BACKEND.update_rows_(x, g, 0.25, bins)
    assert torch.equal(x, w - 0.25 * g)
    same(found, *(summarize(t, False, True) for t in (w, g, x - w)))
    assert seen(bins) == counted(w, g, x - w)
