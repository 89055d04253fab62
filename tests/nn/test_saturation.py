"""The stretches where an activation lets little of a gradient through are those where its slope says so."""

import pytest
import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.saturation import find_changes, find_stretches, measure_share
from initlab.stats.kernels.cpu import plain
from initlab.stats.statistics import SATURATED
from initlab.stats.summarize import saturated_share
from tests.conftest import ROWS

EDGE = 4 * torch.finfo(torch.float32).eps  # from an end, relative to it, where the rounding of phi' decides


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    near = 6 * torch.randn(20_000, generator=generator)
    far = torch.randn(2_000, generator=generator) * 10.0 ** torch.linspace(-44, 37, 2_000)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4028235e38, 1e-45])
    return torch.cat([near, far, odd])


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_every_entry_is_counted_as_its_slope_says(name: str, accelerated: bool) -> None:
    """Entry by entry, but for those within four roundings of an end."""
    row, z = ACTIVATIONS[name], numbers()
    with plain() if not accelerated else torch.no_grad():
        found = row.saturated_share(z.view(-1, 1, 1))
    wanted = (row.slope(z).abs() < SATURATED * row.largest_slope).double()
    different = found != wanted
    stretches = find_stretches(row.slope, row.largest_slope)
    assert 0 < wanted.sum() < len(z) or name in ("linear", "softplus")
    if stretches is None or not len(stretches):
        assert not different.any()
        return
    ends = stretches[stretches.isfinite()]
    assert ((z[different][:, None] - ends).abs() <= EDGE * ends.abs()).any(1).all()
    assert different.sum() <= 3


def test_most_of_the_table_has_stretches_and_they_are_where_they_should_be() -> None:
    tanh = find_stretches(ACTIVATIONS["tanh"].slope, 1.0)
    assert tanh is not None
    edge = float(torch.atanh(torch.tensor(0.95, dtype=torch.float64).sqrt()))
    assert tanh.tolist() == [[-torch.inf, pytest.approx(-edge, rel=1e-6)], [pytest.approx(edge, rel=1e-6), torch.inf]]
    gelu = find_stretches(ACTIVATIONS["gelu"].slope, ACTIVATIONS["gelu"].largest_slope)
    assert gelu is not None and len(gelu) == 2
    assert gelu[1, 0] < -0.7518 < gelu[1, 1]  # where gelu has its least value
    found = [find_stretches(row.slope, row.largest_slope) is not None for row in ACTIVATIONS.values()]
    assert sum(found) >= len(found) / 2


def test_a_wave_has_too_many_stretches_and_is_computed() -> None:
    z = torch.linspace(-9, 9, 500).view(2, 50, 5)
    assert find_stretches(torch.cos, 1.0) is None
    assert torch.equal(measure_share(z, torch.cos, 1.0), saturated_share(torch.cos(z), 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_formats_are_computed(dtype: torch.dtype) -> None:
    row, z = ACTIVATIONS["silu"], torch.linspace(-30, 30, 600).view(2, 60, 5).to(dtype)
    assert torch.equal(row.saturated_share(z), saturated_share(row.slope(z), row.largest_slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_change_lies_between_neighbours_of_the_format(dtype: torch.dtype) -> None:
    """At an ordinary number, at a subnormal one of float32, and where the largest number ends."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=dtype)
    ends = torch.tensor([torch.finfo(dtype).max, torch.inf], dtype=dtype)
    grid = torch.cat([-ends.flip(0), -powers.flip(0), torch.zeros(1, dtype=dtype), powers, ends])
    holds, low, high = find_changes(lambda z: (z > -1.5) & (z < 1e-42) | z.isinf() & (z > 0), grid)
    assert holds.tolist().count(True) == 1 + int((powers <= 1).sum()) + int((powers < 1e-42).sum()) + 1
    assert low[0] == -1.5 and high[1] == torch.tensor(1e-42, dtype=dtype) and high[2] == torch.inf
    assert torch.equal(torch.nextafter(low, high), high)


def test_shares_are_of_each_network_wherever_its_memory_lies() -> None:
    row, z = ACTIVATIONS["tanh"], 3 * torch.randn(4, 3, 30, 7, generator=torch.Generator().manual_seed(2))
    wanted = saturated_share(row.slope(z), row.largest_slope)
    assert wanted.shape == (4, 3) and len(wanted.unique()) > 3
    for x in (z, z.movedim(0, -1).contiguous().movedim(-1, 0), z.mT.contiguous().mT):
        assert torch.equal(row.saturated_share(x), wanted)
