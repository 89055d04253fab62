"""The passes of the plain backend, which all others are held against: each is its steps made one after the other."""

import pytest
import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.stats.backend import SATURATED, Backend, as_matrix
from initlab.stats.histogram import bin_columns
from initlab.stats.measure import backend_for
from initlab.stats.reference import FIELDS
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
def test_an_activation_and_its_rows(name: str) -> None:
    """Both rows, where they are asked for, and the share of small slopes; z stays as it is."""
    given, row = torch.randn(2, 12, 5), ACTIVATIONS[name]
    z, a, rows = given.clone(), torch.empty(2, 12, 5), torch.full((4, 2, len(FIELDS)), 7.0, dtype=torch.float64)
    BACKEND.activation_rows(z, row, a, rows, 1)
    torch.testing.assert_close(a, row.phi(given), rtol=1e-6, atol=0)
    before = summarize(given, single=True)
    before[SATURATED] = saturated_share(row.slope(given), row.largest_slope)
    same(rows[1:3].movedim(-1, 0), before, summarize(a, single=True))
    assert torch.equal(z, given) and bool((rows[[0, 3]] == 7).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_its_gradient_and_the_rows(name: str) -> None:
    z, given, row = torch.randn(2, 12, 5), torch.randn(2, 12, 5), ACTIVATIONS[name]
    g, dz, rows = given.clone(), torch.empty(2, 12, 5), torch.full((4, 2, len(FIELDS)), 7.0, dtype=torch.float64)
    BACKEND.gradient_rows(g, z, row, dz, rows, 2)
    torch.testing.assert_close(dz, row.pull_back(given, z), rtol=1e-6, atol=0)
    same(rows[2:].movedim(-1, 0), summarize(given, single=True), summarize(dz, single=True))
    assert torch.equal(g, given) and bool((rows[:2] == 7).all())


def test_whether_all_rows_are_inside_a_range() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 12, 5, dtype=dtype)
        for change, inside in ((1.0, True), (0.0, False), (1e-30, False), (torch.nan, False), (torch.inf, False)):
            y = x.clone()
            y[1] *= change
            rows = backend_for().rows(y).movedim(0, -1).contiguous()
            assert backend_for().inside(rows, 1e-20) == BACKEND.inside(rows, 1e-20) == inside


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
