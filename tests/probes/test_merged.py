"""Batches put together unit by unit: the rows of one batch that holds them all."""

from collections.abc import Iterable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import initlab
from initlab.errors import UsageError
from initlab.probes.probe import Probe
from initlab.stats.statistics import STATISTICS
from tests.probes.test_functions import one

KEYS = ["layer", "tensor", "direction", "name", "part", "op", "call", "pass"]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [k + torch.randn(4 + k, 6, generator=generator, dtype=torch.float64) for k in range(5)]


def watch(model: nn.Module, inputs: Iterable[Tensor]) -> Probe:
    with initlab.probe(model, merged=True) as p, torch.no_grad():
        for x in inputs:
            model(x)
    return p


def test_merged_batches_are_one_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh()).double()
    found = watch(model, batches()).merged()
    wanted = initlab.measure(model, torch.cat(batches()))
    wanted = wanted[~wanted["tensor"].isin(["weight", "bias"])].reset_index(drop=True)
    assert (found["batches"] == 5).all() and "step" not in found
    pd.testing.assert_frame_equal(found[KEYS], wanted[KEYS], check_dtype=False, check_categorical=False)
    names = [name for name in STATISTICS if name != "frac_saturated"]  # which needs the slope of every entry
    pd.testing.assert_frame_equal(found[names], wanted[names], rtol=1e-11, check_dtype=False)


def test_a_unit_that_lives_in_one_batch_is_alive() -> None:
    """Zero in one batch and not in another: 0.5 and 0.5, over both 0."""
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    p = watch(nn.Sequential(layer, nn.ReLU()), [torch.ones(3, 1), -torch.ones(3, 1)])
    each = p.frame().query("op == 'ReLU'")["frac_dead"].tolist()
    assert each == [0.5, 0.5] and one(p.merged(), op="ReLU")["frac_dead"] == 0


def test_a_loop_merges_its_recorded_steps_and_emit_takes_nothing_away() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    kept: list[pd.DataFrame] = []
    with initlab.probe(model, optimizer=optimizer, every=2, merged=True, emit=kept.append, flush_steps=1) as p:
        for x in batches():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    wanted = initlab.measure(model, torch.cat(batches()[::2]))
    found = one(p.merged(), op="ReLU", direction="forward")
    assert found["batches"] == 3 and len(kept) == 3
    assert found["std"] == pytest.approx(one(wanted, op="ReLU")["std"], rel=1e-12)


def test_what_was_not_asked_for_is_one_line() -> None:
    model = nn.Linear(2, 2)
    with initlab.probe(model) as p:
        model(torch.ones(1, 2))
    with pytest.raises(UsageError, match="ask for it with merged=True"):
        p.merged()
    with pytest.raises(UsageError, match="merged=3: must be True or False"):
        initlab.probe(nn.Linear(2, 2), merged=3)  # type: ignore[arg-type]


def test_a_frame_in_the_middle_of_the_first_step_has_no_rows() -> None:
    """One of two optimizers has stepped: what it measured belongs to a step that is not closed."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    first, second = (torch.optim.SGD(layer.parameters(), 0.1) for layer in (model[0], model[2]))
    with initlab.probe(model, optimizer=[first, second]) as p:
        model(batches()[0]).square().mean().backward()
        first.step()
        assert len(p.frame()) == 0
        second.step()
    assert len(p.frame())
