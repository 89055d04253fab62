"""Where torch's own std and mean of squares give out, while the signal and its row go on."""

import pytest
import torch

from initlab.nn.init import draw, gaussian, rule
from initlab.stats.reference import FIELDS
from initlab.stats.summarize import summarize

NEVER = 10**9


def first_bad(stack, measured):
    """The first layer whose number is not finite."""
    return next((layer for layer, x in enumerate(stack, start=1) if not bool(torch.isfinite(measured(x)))), NEVER)


def naive_stack(device):
    x, layers = gaussian((200, 100), 0, "input").to(device), []
    for layer in range(1, 51):
        w, _ = draw(rule("naive"), "linear", (100, 100), [0], layer, device=device)
        x = x @ w[0]
        layers.append(x)
    return layers


def row_std(x):
    named = dict(zip(FIELDS, summarize(x), strict=True))
    return (named["m2"] / (named["count"] - named["n_nan"] - named["n_inf"])).sqrt()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_row_outlives_the_mean_of_squares(device):
    """The signal grows tenfold a layer and float32's squares end at 1.8e19: x.pow(2).mean() fails at layer 18.

    A CPU's x.std() accumulates in float64 and fails only where its result, or the signal, leaves float32. A GPU's
    accumulates in float32: by its source it must fail near layer 18 too.
    """
    stack = naive_stack(device)
    ends = first_bad(stack, lambda x: x.abs().max())
    assert 37 <= ends <= 39
    assert 17 <= first_bad(stack, lambda x: x.pow(2).mean()) <= 19
    assert first_bad(stack[: ends - 1], row_std) == NEVER  # as long as the signal lives
    std = first_bad(stack, lambda x: x.std())
    assert 34 <= std <= ends if device == "cpu" else 17 <= std <= 20
