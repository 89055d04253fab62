"""Layers measured together have the rows that each has alone, in the order in which they passed."""

import pytest
import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.stats import gathering as module
from initlab.stats.backend import Backend
from initlab.stats.gathering import Gathering
from initlab.stats.reference import FIELDS
from tests.stats.exact import SINGLE

# Widths in the order of the layers: blocks end where the width changes, and where they are full.
WIDTHS = [5, 5, 5, 3, 3, 7, 5, 5, 5, 5]
ROWS = 12 * 5 * 4  # entries of two networks of 5 units are 2 * 12 * 5


@pytest.fixture(params=[4 * ROWS, 2 * ROWS, ROWS], ids=["eight layers wait", "four", "none"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", request.param)


def spoilt(width: int, layer: int) -> Tensor:
    """Two networks, one of which has an entry that is not finite, or none but zeros, in some layers."""
    z = torch.randn(2, 12, width, generator=torch.Generator().manual_seed(layer))
    z[1, 0, 0] = [1.0, torch.nan, torch.inf, -torch.inf, 1e-40][layer % 5]
    z[0] *= layer != 3
    return z


def close(found: Tensor, expected: Tensor) -> None:
    """Counts and edges to the bit; sums to what float32 promises of tensors of size 1 to 12."""
    assert found.shape == expected.shape
    for name, a, b in zip(FIELDS, found, expected, strict=True):
        near = (
            0.0 if name in ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "min", "max", "dead") else 12 * SINGLE
        )
        torch.testing.assert_close(a, b, rtol=near, atol=near, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("name", ["relu", "tanh", "linear"])
def test_passes_of_many_layers_have_the_rows_of_each(name: str) -> None:
    row, backend, passes = ACTIVATIONS[name], Backend(), len(WIDTHS) + len(WIDTHS) // 4
    found, expected = torch.full((2, 2 * passes, 2, len(FIELDS)), torch.nan, dtype=torch.float64)
    gathering, at = Gathering(backend), 0
    for layer, width in enumerate(WIDTHS):
        z = spoilt(width, layer)
        ours, theirs = torch.empty(2, *z.shape)
        gathering.activation_rows(z, row, ours, found, at)
        backend.activation_rows(z, row, theirs, expected, at)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        at += 2
        if layer % 4 == 3:  # gradients between them
            g = spoilt(width, layer + 20)
            ours, theirs = torch.empty(2, *g.shape)
            gathering.gradient_rows(g, z, row, ours, found, at)
            backend.gradient_rows(g, z, row, theirs, expected, at)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            at += 2
    gathering.settle()
    gathering.settle()  # nothing is left
    assert at == 2 * passes
    close(found.movedim(-1, 0), expected.movedim(-1, 0))


def test_functions_of_the_user_see_each_tensor_by_itself() -> None:
    seen: list[tuple[int, ...]] = []

    def largest(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.amax((-2, -1))

    rows = torch.empty(6, 2, len(FIELDS) + 1, dtype=torch.float64)
    gathering = Gathering(Backend({"largest": largest}))
    for layer in range(3):
        gathering.activation_rows(torch.randn(2, 4, 3), ACTIVATIONS["relu"], torch.empty(2, 4, 3), rows, 2 * layer)
    assert len(seen) == 6 and set(seen) == {(2, 4, 3)}
