"""A probed training on a GPU has the words and the numbers of the same training on a processor.

Everything takes a device, so that `python -m tests.probes.test_gpu cpu` rehearses it where there is no GPU.
"""

import copy
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import WORDS

# Sums of float64 entries in another order, through a few layers and three updates: 1e-13 grows to 1e-10 at most.
RELATIVE = 1e-9
STEPS = 3
# Moments of numbers that nearly cancel are compared with the size of the numbers.
SIZED = {"mean": "rms", "std": "rms", "min": "rms", "max": "rms"}
PLAIN = ("count", "rms", "frac_zero", "frac_dead", "frac_saturated", "update_ratio", "loss_scale", "chance_loss")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


class ConvNet(nn.Module):
    """Two convolutions with norms, a residual sum and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x.view(-1, 1, 4, 4))))
        h = h + F.relu(self.other(self.second(h)))
        out: Tensor = self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return out


class Encoder(nn.Module):
    """A transformer encoder of two layers over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.layers = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embed(x.view(-1, 4, 4))).mean(1))
        return out


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convolutions": ConvNet, "encoder": Encoder}


def record(model: nn.Module, device: str, histograms: bool = False) -> tuple[pd.DataFrame, Tensor]:
    """Three steps of a copy of the model in float64 on a device: the rows, and a weight at the end."""
    model = copy.deepcopy(model).double().to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with initlab.probe(model, optimizer=optimizer, histograms=histograms) as p:
        for _ in range(STEPS):
            x = torch.randn(24, 16, generator=generator, dtype=torch.float64).to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), (torch.arange(24) % 5).to(device)).backward()
            optimizer.step()
    frame = p.frame()
    if histograms:  # of every row but those that are left out of frames
        assert set(frame[WORDS].astype(str).agg("/".join, axis=1)) <= set(
            p.histograms()[WORDS].astype(str).agg("/".join, axis=1)
        )
    return frame, next(model.parameters()).detach().cpu()


def check_alike(device: str, name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    (rows, weight), (wanted, other) = record(model, device), record(model, "cpu")
    assert not rows.duplicated(WORDS).any()
    assert rows[WORDS].astype(str).values.tolist() == wanted[WORDS].astype(str).values.tolist()
    torch.testing.assert_close(weight, other, rtol=RELATIVE, atol=0)
    # The bias below a norm has no gradient but what rounding leaves.
    large = (wanted["rms"] > 1e-12).to_numpy()
    for column in (*SIZED, *PLAIN):
        size = wanted[SIZED[column]] if column in SIZED else wanted[column].abs()
        error = (rows[column] - wanted[column]).abs() - RELATIVE * size
        bad = large & ((error > 0) | (rows[column].isna() != wanted[column].isna())).to_numpy()
        assert not bad.any(), wanted[bad][WORDS].assign(**{column: wanted[column], device: rows[column]}).head()


def check_mixed_precision(device: str) -> None:
    """autocast to half precision, a GradScaler and a fused AdamW: one unit, the scale in its column, no word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).to(device)
    kind, scale = torch.float16 if device == "cuda" else torch.bfloat16, 2.0**10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    x, y = torch.randn(24, 16, device=device), torch.arange(24, device=device) % 5
    wanted = []
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast(device, kind):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            wanted.append([float(loss.detach()), *(float(q.grad.norm()) / scale for q in model.parameters())])
            scaler.step(optimizer)
            scaler.update()
    rows = p.frame()
    assert not rows.duplicated(WORDS).any() and (rows["loss_scale"] == scale).all()
    losses = rows[rows["tensor"] == "loss"]["rms"]
    np.testing.assert_allclose(losses, [one[0] for one in wanted], rtol=1e-6)  # in float32
    for step, (_, *norms) in enumerate(wanted):
        own = rows[(rows["step"] == step) & (rows["direction"] == "backward") & rows["part"].isin(["weight", "bias"])]
        assert not (own["op"] == "backward").any()
        found = {(row["name"], row["part"]): row["rms"] * row["count"] ** 0.5 for _, row in own.iterrows()}
        for (name, _), norm in zip(model.named_parameters(), norms, strict=True):
            layer, _, part = name.rpartition(".")
            assert found[layer, part] == pytest.approx(norm, rel=1e-5), name  # a norm in float32
    assert (rows["tensor"] == "update").sum() == 2 * STEPS
    # Activations in half precision have gradients of the loss, not of the scaled one.
    gradient = rows[(rows["direction"] == "backward") & (rows["name"] == "2") & (rows["tensor"] == "preactivation")]
    assert gradient["rms"].between(1e-3, 1).all()  # of a mean over 24 of probabilities


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
def test_a_training_on_a_gpu_has_the_rows_of_one_on_a_processor(name: str) -> None:
    check_alike("cuda", name)


@pytest.mark.gpu
def test_histograms_on_a_gpu() -> None:
    torch.manual_seed(0)
    record(mlp(), "cuda", histograms=True)


@pytest.mark.gpu
def test_mixed_precision_with_a_fused_optimizer() -> None:
    check_mixed_precision("cuda")


if __name__ == "__main__":
    for net in NETS:
        check_alike(sys.argv[1], net)
    record(mlp(), sys.argv[1], histograms=True)
    check_mixed_precision(sys.argv[1])
    print(f"{sys.argv[1]}: alike")
