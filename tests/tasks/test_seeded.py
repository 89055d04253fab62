import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from initlab.errors import UsageError
from initlab.nn.init import rule
from initlab.tasks.seeded import seeded_stack

SMALL = {"depth": 4, "width": 32, "batch": 8}


def activations(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["tensor"] == "activation"].set_index("layer")


def test_the_stream_is_torchs_own_and_is_left_as_it_was() -> None:
    """Written out once more, as the material has it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    frame = activations(seeded_stack("lecun", "tanh", seeds=[3], **SMALL))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(4)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=32**-0.5)
    x = torch.randn(8, 32)
    for k, layer in enumerate(layers, start=1):
        x = torch.tanh(layer(x)).detach()
        assert frame.loc[k, "std_torch"] == float(x.std())
    assert frame["std_torch"].to_numpy() == pytest.approx(frame["std"].to_numpy() * (256 / 255) ** 0.5, rel=1e-6)


def test_numbers_depend_on_what_was_drawn_before() -> None:
    """One layer more, and every weight is another: the opposite of seeds everywhere else in initlab."""
    four = activations(seeded_stack(**SMALL))
    five = activations(seeded_stack(**{**SMALL, "depth": 5}))
    assert (four["std"] != five["std"].head(5)).all()
    again = activations(seeded_stack(**SMALL, seeds=[1, 2]))
    assert again[again["seed"] == 1]["std"].tolist() == four["std"].tolist()


def test_rounding_grows_in_chaos_alone() -> None:
    """float32 against float64, 100 layers of tanh: ordered to 1e-6, gain 5/3 worse, and still within 1e-4."""
    worst = {}
    for name, init in (("ordered", rule("lecun")), ("chaotic", rule("kaiming", gain_kind="torch"))):
        narrow, wide = (activations(seeded_stack(init, "tanh", dtype=dtype))["std"] for dtype in ("float32", "float64"))
        worst[name] = float(np.abs(narrow / wide - 1).max())
    assert worst["ordered"] < 1e-6 < worst["chaotic"] < 1e-4


def test_mistakes_are_one_line() -> None:
    for init, text in (("torch_default", "no biases"), ("orthogonal", "must be one of normal, uniform")):
        with pytest.raises(UsageError, match=text):
            seeded_stack(init, **SMALL)
