"""Networks under the right rule: measured together they are what they are alone; their spread is the band."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import initlab
from benchmarks.faults import Functional, Residual, encoder, mlp, normed, resnet18
from initlab.verdict import reference_networks
from initlab.verdict.evidence import collect_evidence, default_loss
from initlab.verdict.reference_networks import measure_networks

RELU = 2**0.5


class Branching(nn.Module):
    """Asks for the value of a tensor, which has none of its own where many networks run as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) if layer(x).detach().sum().item() < 1e9 else x
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


def weight_normed() -> nn.Module:
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)) for _ in range(4)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU(inplace=True), nn.Dropout(0.2))])


TOGETHER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 32, nn.ReLU, 1), (16, 32)),
    "functional": (lambda: Functional(6, 32, 1), (16, 32)),
    "residual": (lambda: Residual(6, 32, RELU), (16, 32)),
    "batch-normed": (lambda: normed(4, 32), (16, 32)),
    "encoder": (lambda: encoder(2, 32, True), (2, 6, 32)),
    "resnet": (lambda: resnet18(4), (2, 3, 32, 32)),
    "weight-normed": (weight_normed, (16, 32)),
    "half precision": (lambda: mlp(6, 32, nn.Tanh, 1).bfloat16(), (16, 32)),
}
ALONE = {"values asked for": (Branching, (4, 16)), "recurrent": (Recurrent, (2, 6, 16))}


@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_together_they_are_what_they_are_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of every network, to what another kernel rounds: 16 eps of the format, float32 if not half.

    What cannot run together runs one by one, and gives the same table. The model stays as it was.
    """
    torch.manual_seed(0)
    make, shape = (TOGETHER | ALONE)[name]
    model = make()
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    e = collect_evidence(model, x, None, default_loss)
    calls: list[int] = []
    real = reference_networks.measure

    def counted(*args: object) -> object:
        calls.append(1)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_networks, "measure", counted)
    together = measure_networks(e)
    assert (sum(calls) == 1) == (name in TOGETHER)
    alone = measure_networks(e, stacked=False)
    assert len(together) == len(alone) == 16
    eps = 16 * torch.finfo(dtype).eps
    for one, other in zip(together, alone, strict=True):
        assert one[["name", "tensor", "direction"]].equals(other[["name", "tensor", "direction"]])
        np.testing.assert_allclose(one["rms"], other["rms"], rtol=max(eps, 1e-5))
        forward = (one["direction"] == "forward").to_numpy()
        np.testing.assert_allclose(one["std_within"][forward], other["std_within"][forward], rtol=max(eps, 1e-5))
    assert not np.allclose(together[0]["rms"], together[1]["rms"], rtol=1e-3)  # another network is another one
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_band_is_their_spread() -> None:
    """A healthy network lies in it, one of gain 1 leaves it; it follows the rule, not the weights that are judged."""
    x, shares, bands = torch.randn(64, 64), [], []
    for gain in (RELU, 1.0):
        torch.manual_seed(0)
        verdict = initlab.diagnose(mlp(20, 64, nn.ReLU, gain), x)
        rows = verdict.frame.merge(verdict.bands, on=["tensor", "name", "part", "call", "direction"])
        assert len(rows) == 2 * 21
        shares.append(((rows["rms"] >= rows["band_low"]) & (rows["rms"] <= rows["band_high"])).mean())
        bands.append(verdict.bands)
        figure = initlab.plot(verdict)
        (legend,) = figure.legends
        assert "95 % of networks under the right rule" in [text.get_text() for text in legend.get_texts()]
        again = pickle.loads(pickle.dumps(verdict))
        assert str(again) == str(verdict) and again.bands.empty and initlab.plot(again).axes
    assert shares[0] > 0.5 and shares[1] < 0.1  # sizes of one network lean on each other
    np.testing.assert_allclose(bands[0]["predicted"], bands[1]["predicted"], rtol=1e-6)
