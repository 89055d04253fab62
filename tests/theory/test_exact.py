import math
from functools import partial
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.custom_activation import as_activation
from initlab.theory.batch_law import digamma, trigamma
from initlab.theory.exact import (
    kappa,
    linear_batch,
    linear_one_input,
    lognormal,
    relu_batch,
    relu_one_input,
    second_moment_variance,
    survival,
)
from initlab.theory.forward_law import DenseLayer
from initlab.theory.sample import IN_ORDER
from initlab.theory.simulate import _Chain, simulate
from tests.long import long_except

LINEAR, RELU = ACTIVATIONS["linear"], ACTIVATIONS["relu"]


def chain(widths: list[int], sw2: float) -> list[DenseLayer]:
    return [DenseLayer(i, o, sw2 / i) for i, o in pairwise(widths)]


def statistic(found: dict, layer: int, name: str = "q", tensor: str = "activation", way: str = "forward") -> np.ndarray:
    return np.asarray(found[(layer, tensor, way)].values[IN_ORDER.index(name)])


def agrees(values: np.ndarray, mean: float, sd: float, slack: float = 0.0) -> None:
    """Mean and standard deviation within five standard errors of the sample (kurtosis to 6) plus a relative slack."""
    n = len(values)
    assert abs(values.mean() - mean) < 5 * values.std() / math.sqrt(n) + slack * max(abs(mean), sd)
    assert abs(values.std() / sd - 1) < 5 * math.sqrt(1.25 / n) + slack


def test_digamma_and_trigamma() -> None:
    x = np.array([0.5, 1.0, 3.7, 50.0, 1e5])
    for order, found in enumerate((digamma(x), trigamma(x))):
        expected = [float(mpmath.polygamma(order, at)) for at in x]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13 * (order == 0))


def test_first_orders_of_one_input() -> None:
    """-5/(2n) and 5/n a ReLU layer, -1/n and 2/n a linear one, up to 1/n^2."""
    widths = [400] * 11
    assert np.array(relu_one_input(widths)) == pytest.approx((-10 * 5 / 800, math.sqrt(10 * 5 / 400)), rel=0.02)
    assert np.array(linear_one_input(widths)) == pytest.approx((-10 / 400, math.sqrt(10 * 2 / 400)), rel=0.01)
    assert survival([10, 10, 10]) == pytest.approx((1 - 2**-10) ** 2)


@pytest.mark.long
def test_variance_of_one_inputs_second_moment() -> None:
    """(1 + 5/n)^L - 1 of ReLU, 2 for 5 of linear layers; against 20,000 networks drawn here; others are refused."""
    assert second_moment_variance("relu", [100] * 51)[-1] == pytest.approx((1 + 5 / 100) ** 50 - 1, rel=1e-14)
    assert second_moment_variance(torch.abs, [7, 4, 9]).tolist() == pytest.approx([0.5, 1.5 * (1 + 2 / 9) - 1])
    widths, random = [6, 40, 30], torch.Generator().manual_seed(0)
    for given, gain_ in (("relu", 2**0.5), (lambda z: torch.where(z > 0, z, 0.3 * z), 1.1)):
        phi, x = as_activation(given).phi, torch.ones(20_000, 1, 6, dtype=torch.float64)
        for layer, (i, o) in enumerate(pairwise(widths)):
            w = torch.randn(20_000, i, o, dtype=torch.float64, generator=random) * gain_ / i**0.5
            z = x @ w
            x = phi(z)
            for tensor, preactivation in ((z, True), (x, False)):
                k = tensor.square().mean((1, 2))
                found = float(k.var() / k.mean() ** 2)
                assert found == pytest.approx(second_moment_variance(given, widths, preactivation)[layer], rel=0.06)
    with pytest.raises(UsageError, match="activation=tanh: the exact variance is known of lines"):
        second_moment_variance("tanh", [10, 10])


@pytest.mark.parametrize("widths", [[10, 10], [20, 7, 50, 13], [30] * 11])
def test_one_input_against_the_chain(widths: list[int]) -> None:
    """Rectangular stacks too: 4,000 networks."""
    for row, sw2, law in ((LINEAR, 1.0, linear_one_input), (RELU, 2.0, relu_one_input)):
        found = simulate(row, chain(widths, sw2), 1, 4000, seed=3)
        ratio = statistic(found, len(widths) - 1) / statistic(found, 0)
        agrees(np.log(ratio[ratio > 0]), *law(widths))


@pytest.mark.parametrize("widths", long_except([[10, 10], [20, 7, 50, 13], [25] * 11], [10, 10], [20, 7, 50, 13]))
def test_a_linear_batch_has_its_exact_relative_variance(widths: list[int]) -> None:
    found = simulate(LINEAR, chain(widths, 1.0), 8, 6000, seed=5)
    expected = linear_batch(widths, 8)
    for layer in range(len(widths)):
        q = statistic(found, layer)
        kurtosis = ((q - q.mean()) ** 4).mean() / q.var() ** 2
        assert q.var() == pytest.approx(expected[layer], rel=5 * math.sqrt((kurtosis - 1) / len(q)))
        assert q.mean() == pytest.approx(1, abs=5 * q.std() / math.sqrt(len(q)))


def test_one_input_is_the_batch_of_one() -> None:
    """prod (1 + 2/n) and prod (1 + 5/n) - the moments of the exact laws."""
    widths = [30, 20, 40, 10]
    product = math.prod(1 + 2 / n for n in widths)
    assert linear_batch(widths, 1)[-1] + 1 == pytest.approx(product, rel=1e-12)
    relu = math.prod(1 + 5 / n for n in widths[1:])
    assert relu_batch(widths, 1, [0, 0, 0])[-1] + 1 == pytest.approx(relu + 2 / 30, rel=1e-12)


def test_kappa_ends() -> None:
    assert kappa(np.array([0.0, 1.0])) == pytest.approx([0.0, 5.0], abs=1e-12)


def test_a_relu_batch_spreads_as_its_formula_says() -> None:
    """600 networks, 10 layers of 60 units, 12 inputs; correlations by the infinitely wide map; good to O(1/n^2)."""
    n, depth, batch = 60, 10, 12
    c, cs = 0.0, []
    for _ in range(depth):
        cs.append(c)
        c = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    found = np.log(statistic(simulate(RELU, chain([n] * (depth + 1), 2.0), batch, 600, seed=1), depth))
    agrees(found, *lognormal(relu_batch([n] * (depth + 1), batch, cs)[-1]), slack=0.05)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_a_chain_without_weights_is_the_stack_with_them(name: str) -> None:
    """B < I, where no weights are drawn, against the same with weights drawn: forward and backward."""
    row, widths, batch = ACTIVATIONS[name], [24, 16, 30, 24, 24], 6
    layers = chain(widths, gain(name) ** 2)
    without = simulate(row, layers, batch, 3000, seed=1)
    drawn = simulate(row, [layer._replace(bias=1e-30) for layer in layers], batch, 3000, distribution="uniform", seed=2)
    for layer in (1, 4):
        for tensor, way in (("activation", "forward"), ("preactivation", "backward")):
            for what in ("rms", "std_within", "cosine", "mean"):
                one, other = (statistic(found, layer, what, tensor, way) for found in (without, drawn))
                error = math.sqrt(one.var() / len(one) + other.var() / len(other))
                assert abs(one.mean() - other.mean()) < 5 * error + 0.02 * abs(one.mean())  # uniform weights: O(1/n^2)
                assert one.std() == pytest.approx(other.std(), rel=0.12)


def test_orthogonal_weights_keep_every_length() -> None:
    layers = [layer._replace(orthogonal=True) for layer in chain([12] * 5, 1.0)]
    found = simulate(LINEAR, layers, 3, 5)
    torch.testing.assert_close(
        torch.from_numpy(statistic(found, 4)), torch.from_numpy(statistic(found, 0)), rtol=1e-11, atol=0
    )  # rounding of four layers; the Gram matrix of 3 inputs counts as singular below 1e-13


@pytest.mark.parametrize("widths", [[20] * 4, [20, 30, 16, 24], [40, 18, 18, 40]])
def test_orthogonal_weights_without_the_weights(widths: list[int]) -> None:
    """Few inputs see a random frame of an isometry, wide or tall, against the isometry itself: 2,000 networks each,
    means within five standard errors, spreads within 12 %."""
    layers = [
        layer._replace(orthogonal=True, weight=1.5 / max(layer.fan_in, layer.fan_out)) for layer in chain(widths, 1)
    ]
    row, batch = ACTIVATIONS["tanh"], 6
    few = simulate(row, layers, batch, 2000, seed=1)
    whole = simulate_with_weights(row, layers, batch, 2000, seed=2)
    for layer, way in ((1, "forward"), (3, "forward"), (1, "backward")):
        for what in ("rms", "std_within", "cosine", "mean"):
            one, other = (statistic(found, layer, what, way=way) for found in (few, whole))
            error = math.sqrt(one.var() / len(one) + other.var() / len(other))
            assert abs(one.mean() - other.mean()) < 5 * error + 1e-12
            assert one.std() == pytest.approx(other.std(), rel=0.12)


def simulate_with_weights(*args: object, **options: object) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Chain, "is_projected", lambda chain, layer: False)
        return simulate(*args, **options)


@pytest.mark.long
@pytest.mark.parametrize("name", ["relu", "tanh", "linear"])
def test_some_inputs_stand_for_the_batch(name: str) -> None:
    """16 of 60 inputs against all of them, 1,000 networks: where `is_known` says so, 95 % bands hold 90 to 99 % (five
    standard errors of both samples), and half of all rows are known."""
    layers, batch = chain([40] * 7, gain(name) ** 2), 60
    some = simulate(ACTIVATIONS[name], layers, batch, 1000, seed=1, inputs=16)
    every = simulate(ACTIVATIONS[name], layers, batch, 1000, seed=2)
    known = [0, 0]
    for key in ((1, "preactivation", "forward"), (6, "activation", "forward"), (1, "activation", "backward")):
        for at, what in enumerate(IN_ORDER):
            values = np.asarray(every[key].values[at])
            if np.isnan(values).all() or values.std() == 0:
                continue
            known[some[key].is_known(what)] += 1
            if some[key].is_known(what):
                low, high = np.nanquantile(some[key].values[at], (0.025, 0.975))
                assert 0.90 < ((values >= low) & (values <= high)).mean() < 0.99, (key, what, some[key].errors[at])
    assert known[1] > known[0]


def test_gradients_of_weights_and_biases_by_their_definition() -> None:
    """dW = x^T d and db = sum of d, over the batch, of networks with their weights; the same law without them."""
    layers, row = chain([14, 10, 12], 2.0), ACTIVATIONS["relu"]
    few, whole = simulate(row, layers, 5, 4000, seed=1), simulate_with_weights(row, layers, 5, 4000, seed=2)
    generator = torch.Generator().manual_seed(3)
    w = [
        torch.randn(4000, i, o, generator=generator, dtype=torch.float64) * (2 / i) ** 0.5
        for i, o in ((14, 10), (10, 12))
    ]
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x = draw(4000, 5, 14)
    hidden = torch.relu(x @ w[0])
    d = draw(4000, 5, 12) * (hidden @ w[1] > 0)
    below = d @ w[1].mT * (hidden > 0)
    for layer, gradient in ((2, hidden.mT @ d), (1, x.mT @ below), (1, below.sum(1, keepdim=True))):
        tensor = "weight" if gradient.shape[1] > 1 else "bias"
        for what, values in (
            ("rms", gradient.square().mean((1, 2)).sqrt()),
            ("std", gradient.std((1, 2), correction=0)),
            ("mean", gradient.mean((1, 2)).abs()),
        ):
            for found in (few, whole):
                other = np.abs(statistic(found, layer, what, tensor, "backward"))
                agrees(other, float(values.mean()), float(values.std()), slack=0.05)
