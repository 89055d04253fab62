"""Number formats of any model: `formats=` on probe and measure against casts of the tensors themselves."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import initlab
from initlab.errors import UsageError
from initlab.probes.probe import Probe


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def record(model: nn.Module, scale: float = 1.0, steps: int = 2, **options: object) -> Probe:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    with initlab.probe(model, optimizer=optimizer, **options) as p:  # type: ignore[arg-type]
        for _ in range(steps):
            optimizer.zero_grad()
            (scale * model(x).square().mean()).backward()
            optimizer.step()
    return p


def test_the_shares_of_a_model_are_those_of_its_tensors() -> None:
    model = net()
    x = torch.randn(16, 32)
    frame = initlab.measure(model, x, loss=lambda out: 1e-6 * out.square().mean(), formats=["float16"])
    (1e-6 * model(x).square().mean()).backward()
    for name, parameter in model.named_parameters():
        module, part = name.split(".")
        row = frame[(frame["name"] == module) & (frame["part"] == part) & (frame["direction"] == "backward")].iloc[0]
        g = parameter.grad
        assert g is not None
        lost = ((g != 0) & (g.half() == 0)).double().mean().item()
        assert row["float16_underflow"] == pytest.approx(lost, abs=1e-12)
    assert (frame.loc[frame["direction"] == "backward", "float16_underflow"] > 0).any()
    assert (frame.loc[frame["direction"] == "forward", "float16_underflow"] < 0.01).all()


def test_the_frame_is_the_same_with_formats_and_without() -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(8, 32)
    plain, more = initlab.measure(model, x), initlab.measure(model, x, formats=["float16", "bfloat16"])
    pd.testing.assert_frame_equal(plain, more[list(plain)])
    assert len(more.columns) == len(plain.columns) + 8


def test_nothing_is_counted_when_not_asked_for() -> None:
    p = record(net())
    assert p._buffer.bins is None
    with pytest.raises(UsageError, match=r"formats: none were asked for; ask with formats=\['float16'\]"):
        p.formats()
    with pytest.raises(UsageError, match="formats: none were asked for"):
        p.loss_scale()
    with_formats = record(net(), formats=["float16"])
    with pytest.raises(UsageError, match="histograms: none were recorded"):
        with_formats.histograms()
    assert len(with_formats.formats()) == len(with_formats.frame())


def test_formats_stand_beside_histograms_and_with_emit_they_are_handed_over() -> None:
    p = record(net(), formats=["float16", "float8_e5m2"], histograms=True)
    assert len(p.histograms()) == len(p.frame()) and len(p.formats()) == 2 * len(p.frame())
    pd.testing.assert_frame_equal(p.formats(), p.formats())
    assert len(p.histograms()) == 0
    given: list[pd.DataFrame] = []
    model = net()
    q = record(model, steps=5, formats=["float16"], emit=given.append, flush_steps=2)
    assert len(given) == 3 and len(q.formats()) == len(given[-1]), "those of the last frame"
    assert q.loss_scale() == record(model, steps=5, formats=["float16"]).loss_scale(), "and of all gradients"


def test_the_loss_scale_is_a_law_of_the_loss() -> None:
    """A loss 2^10 times as large has a scale 2^10 times as small, and the scaled gradients fit into float16."""
    torch.manual_seed(0)
    model = net()
    small, large = (record(model, scale, formats=["float16"]).loss_scale() for scale in (2.0**-20, 2.0**-10))
    assert small.scale == 2.0**10 * large.scale and small.underflow == large.underflow
    assert small.underflow_without > large.underflow_without > large.underflow
    p = record(model, 2.0**-20 * small.scale, formats=["float16"])
    gradients = p.formats()[lambda f: f["direction"] == "backward"]
    assert (gradients["overflow_most"] == 0).all()
    twice = record(model, 2.0**-19 * small.scale, formats=["float16"]).formats()
    assert (twice.loc[twice["direction"] == "backward", "overflow"] > 0).any()


def test_a_scaler_changes_neither_shares_nor_the_scale_that_is_found() -> None:
    """Gradients are those of the loss: a scaled run says what the same run without a scaler would need."""
    torch.manual_seed(0)
    model = net()
    plain = record(model, 1e-4, 1, formats=["float16"])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    with initlab.probe(model, optimizer=optimizer, formats=["float16"]) as p:
        scaler.scale(1e-4 * model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert p.loss_scale().scale == plain.loss_scale().scale
    keys = ["name", "tensor", "direction", "op"]
    both = plain.formats().merge(p.formats(), on=keys, suffixes=("", "_scaled"))
    assert len(both) > 10 and np.allclose(both["underflow"], both["underflow_scaled"], atol=1e-12)
