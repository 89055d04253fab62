import math

import pytest
import torch

import initlab
from initlab.errors import UsageError
from initlab.meanfield import maps
from initlab.nn import philox
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.init import (
    DISTRIBUTIONS,
    FIELDS,
    GENERATORS,
    PARAMETERS,
    RULES,
    Rule,
    draw,
    gaussian,
    permutation,
    rule,
    rule_name,
    uniform,
)

EVERYONE = pytest.mark.parametrize("name", RULES)

# Weights of 784 x 256 entries: the standard error of their std is std / sqrt(2 n) for a normal law, less for others.
SHAPE = (784, 256)
FIVE_SIGMA = 5 / math.sqrt(2 * SHAPE[0] * SHAPE[1])

EXPECTED_STD = {
    "naive": 1.0,
    "small": 0.01,
    "lecun": 1 / math.sqrt(784),
    "xavier": math.sqrt(2) * math.sqrt(2 / (784 + 256)),
    "kaiming": math.sqrt(2 / 784),
    "torch_default": 1 / math.sqrt(3 * 784),
}


@pytest.mark.parametrize(("name", "std"), EXPECTED_STD.items())
def test_std_of_the_weights(name: str, std: float) -> None:
    """On a rectangular layer: with fan_in read off the wrong axis every rule but the constant ones fails."""
    w, _ = draw(rule(name), "relu", SHAPE, [3], 1)
    assert w.shape == (1, *SHAPE)
    assert float(w.double().std()) == pytest.approx(std, rel=FIVE_SIGMA)
    assert abs(float(w.double().mean())) < 5 * std / math.sqrt(w.numel())
    if name not in ("naive", "small"):
        wrong_axis, _ = draw(rule(name), "relu", SHAPE[::-1], [3], 1)
        differs = name != "xavier"
        assert (abs(float(wrong_axis.double().std()) / std - 1) > 10 * FIVE_SIGMA) == differs


@pytest.mark.parametrize("distribution", [name for name in DISTRIBUTIONS if name != "orthogonal"])
def test_every_distribution_has_the_std_that_was_asked_for(distribution: str) -> None:
    w, _ = draw(rule("kaiming", distribution=distribution), "relu", SHAPE, [0], 1)
    assert float(w.double().std()) == pytest.approx(math.sqrt(2 / 784), rel=FIVE_SIGMA)


def test_distributions_have_their_shapes() -> None:
    """Largest |w| / std: sqrt(3) for uniform, 2/0.8796 for truncated, beyond 4 for 200,000 normal numbers."""
    largest = {
        name: float(draw(rule("kaiming", distribution=name), "relu", SHAPE, [0], 1)[0].abs().max() / math.sqrt(2 / 784))
        for name in ("uniform", "truncated_normal", "normal")
    }
    assert largest["uniform"] == pytest.approx(math.sqrt(3), rel=1e-3)
    assert largest["truncated_normal"] == pytest.approx(2 / 0.87962566, rel=1e-2)
    assert largest["normal"] > 4


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_orthogonal_is_an_isometry_times_the_gain(shape: tuple[int, int]) -> None:
    w, _ = draw(rule("orthogonal"), "tanh", shape, [0, 1], 1, dtype=torch.float64)
    gain = rule("orthogonal").gain_for("tanh")
    gram = w @ w.mT if shape[0] <= shape[1] else w.mT @ w
    torch.testing.assert_close(
        gram, gain**2 * torch.eye(min(shape), dtype=w.dtype).expand_as(gram), rtol=1e-14, atol=1e-14
    )  # in float64; networks of float32 are these, rounded
    assert torch.equal(draw(rule("orthogonal"), "tanh", shape, [0, 1], 1)[0], w.float())


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (1, 1)])
def test_orthogonal_is_the_isometry_of_its_random_numbers(shape: tuple[int, int]) -> None:
    """G = Q R has one solution with a positive diagonal of R: Q^T G is triangular there, and for no other isometry."""
    i, o = shape
    w, _ = draw(rule("orthogonal", gain=1.0), "linear", shape, [3], 2, dtype=torch.float64)
    q = w[0] if i >= o else w[0].mT
    numbers = philox.gaussian((max(shape), min(shape)), [3], "weight", 2)[0].double()
    r = q.mT @ numbers
    assert (r.diagonal() > 0).all()
    assert r.tril(-1).abs().max() < 1e-13 * r.diagonal().max()
    torch.testing.assert_close(q @ r / (q.mT @ q).diagonal().mean(), numbers, rtol=1e-12, atol=1e-13)


def test_weights_are_their_random_numbers_scaled() -> None:
    """Normal and uniform ones are those named `weight` of the seed and the layer; so are orders of batches."""
    for distribution, numbers in (("normal", philox.gaussian), ("uniform", philox.uniform)):
        w, _ = draw(rule("kaiming", distribution=distribution), "linear", (6, 5), [4, 9], 3)
        for k, seed in enumerate((4, 9)):
            own = numbers((6, 5), [seed], "weight", 3)[0]
            torch.testing.assert_close(w[k] / w[k, 0, 0], own / own[0, 0], rtol=1e-5, atol=0)
    orders = [permutation(50, seed, "order", layer).tolist() for seed in (0, 1) for layer in (0, 1)]
    assert len(set(map(tuple, orders))) == 4 and all(sorted(order) == list(range(50)) for order in orders)


@EVERYONE
def test_gain_scales_the_weights(name: str) -> None:
    """A law: twice the gain, twice every weight, from the same random numbers."""
    base, _ = draw(rule(name, gain=1.0), "relu", (20, 30), [5], 2)
    twice, _ = draw(rule(name, gain=2.0), "relu", (20, 30), [5], 2)
    torch.testing.assert_close(twice, 2 * base, rtol=1e-6, atol=0)


@EVERYONE
def test_numbers_depend_on_seed_and_layer_alone(name: str) -> None:
    alone, alone_bias = draw(rule(name), "relu", (6, 4), [7], 3)
    torch.manual_seed(0)
    gaussian((5,), 7, "something else")
    together, together_bias = draw(rule(name), "relu", (6, 4), [2, 7, 9], 3)
    assert torch.equal(together[1], alone[0]) and torch.equal(together_bias[1], alone_bias[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(draw(rule(name), "relu", (6, 4), [7], 4)[0], alone)


@EVERYONE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_seed_is_the_same_network_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    reference, _ = draw(rule(name), "relu", (6, 4), [0], 1, dtype=torch.float64)
    w, b = draw(rule(name), "relu", (6, 4), [0], 1, dtype=dtype)
    assert w.dtype == b.dtype == dtype
    assert torch.equal(w, reference.to(dtype))


BY = pytest.mark.parametrize("generator", GENERATORS)


@BY
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (100, 100)])
def test_a_member_is_the_single_network_whoever_draws(
    distribution: str, shape: tuple[int, int], generator: str
) -> None:
    scaling = rule("torch_default", distribution=distribution)
    w, b = draw(scaling, "tanh", shape, [2, 7, 9], 3, generator=generator)
    assert w.shape == (3, *shape) and b.shape == (3, shape[1])
    for member, seed in enumerate([2, 7, 9]):
        alone, alone_bias = draw(scaling, "tanh", shape, [seed], 3, generator=generator)
        assert torch.equal(w[member], alone[0]) and torch.equal(b[member], alone_bias[0])
    assert not torch.equal(w[0], w[1])


@BY
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_layers_that_are_drawn_together_are_those_drawn_alone(distribution: str, generator: str) -> None:
    scaling = rule("lecun", distribution=distribution, bias=1.0, sigma_b=0.5)
    alone = [draw(scaling, "tanh", (6, 5), [2, 7], layer, generator=generator) for layer in (3, 4)]
    together = draw(scaling, "tanh", (6, 5), [2, 7], (3, 4), generator=generator)
    for k in (0, 1):
        assert torch.equal(together[k], torch.cat([pair[k] for pair in alone]))


@BY
@pytest.mark.parametrize("distribution", [name for name in DISTRIBUTIONS if name != "orthogonal"])
def test_std_and_mean_of_the_weights_whoever_draws(distribution: str, generator: str) -> None:
    w, _ = draw(rule("lecun", distribution=distribution), "relu", SHAPE, [1], 2, generator=generator)
    assert float(w.double().std()) == pytest.approx(1 / math.sqrt(784), rel=FIVE_SIGMA)
    assert abs(float(w.double().mean())) < 5 / math.sqrt(784 * w.numel())


def test_orthogonal_is_an_isometry_whoever_draws() -> None:
    for shape in ((7, 5), (5, 7)):
        w, _ = draw(rule("orthogonal", gain=1.0), "relu", shape, [0, 1], 1, torch.float64, generator="philox")
        gram = w @ w.mT if shape[0] <= shape[1] else w.mT @ w
        torch.testing.assert_close(gram, torch.eye(5, dtype=w.dtype).expand_as(gram), rtol=1e-6, atol=1e-6)


def test_networks_whose_keys_agree_in_32_bits_are_told_apart_by_philox() -> None:
    """Seeds 1193 and 1295 at layer 19: torch's generator, whose seeds have 32 bits, gives them the same weights."""
    drawn = {name: draw(rule("kaiming"), "relu", (5, 4), [1193, 1295], 19, generator=name)[0] for name in GENERATORS}
    assert torch.equal(*drawn["torch"]) and not torch.isclose(*drawn["philox"]).any()


def test_the_generators_draw_different_networks_and_philox_is_the_default() -> None:
    by_torch, by_philox = (draw(rule("kaiming"), "relu", (6, 4), [0], 1, generator=name)[0] for name in GENERATORS)
    assert not torch.equal(by_torch, by_philox)
    assert torch.equal(by_philox, draw(rule("kaiming"), "relu", (6, 4), [0], 1)[0])
    std = rule("kaiming").gain_for("relu") / math.sqrt(6)
    assert torch.equal(by_torch[0], gaussian((6, 4), 0, "weight", 1) * std)
    with pytest.raises(UsageError, match=r"generator=philx: must be one of philox, torch - did you mean philox"):
        draw(rule("kaiming"), "relu", (6, 4), [0], 1, generator="philx")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_philox_draws_where_the_network_lives_and_the_same_network(name: str) -> None:
    here = draw(rule(name), "relu", (50, 40), [0, 1], 1, generator="philox")
    there = draw(rule(name), "relu", (50, 40), [0, 1], 1, device="cuda", generator="philox")
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_different_things_of_one_seed_are_independent() -> None:
    x, y = gaussian((100, 100), 0, "input"), gaussian((100, 100), 0, "gradient")
    assert abs(float((x * y).mean())) < 5 / 100  # five standard errors of a mean over 10,000 products
    assert sorted(permutation(50, 1, "order").tolist()) == list(range(50))
    assert not torch.equal(permutation(50, 1, "order"), permutation(50, 2, "order"))


def test_only_torch_default_has_biases() -> None:
    for name in RULES:
        _, b = draw(rule(name), "relu", (400, 300), [0], 1)
        assert bool((b != 0).any()) == (name == "torch_default")
    _, b = draw(rule("torch_default"), "relu", (400, 300), [0], 1)
    assert 0.99 / 20 < float(b.abs().max()) <= 1 / 20


def test_modes_choose_the_axis() -> None:
    by_mode = {
        mode: float(draw(rule("kaiming", mode=mode), "linear", SHAPE, [0], 1)[0].double().std())
        for mode in ("fan_in", "fan_out", "fan_avg", "constant")
    }
    assert by_mode["fan_out"] / by_mode["fan_in"] == pytest.approx(math.sqrt(784 / 256), rel=1e-5)
    assert by_mode["constant"] / by_mode["fan_avg"] == pytest.approx(math.sqrt((784 + 256) / 2), rel=1e-5)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"init=kaimng: .* did you mean kaiming"):
        rule("kaimng")
    with pytest.raises(UsageError, match=r"init.mode=fan_inn"):
        rule("kaiming", mode="fan_inn")
    with pytest.raises(UsageError, match=r"^distribution=gauss"):
        Rule(distribution="gauss")
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match=r"^gain="):
            Rule(gain=bad)
        with pytest.raises(UsageError, match=r"^bias="):
            Rule(bias=bad)


def test_normal_biases_have_their_standard_deviation_and_join_uniform_ones() -> None:
    """0.3 whatever the fan; with torch's uniform ones variances add. 20,000 biases: 5 standard errors are 2.5 %."""
    for name, variance in (("kaiming", 0.09), ("torch_default", 0.09 + 1 / 3)):
        _, b = draw(rule(name, sigma_b=0.3), "relu", (1, 10_000), [0, 1], 1, torch.float64)
        assert float(b.var()) == pytest.approx(variance, rel=0.03) and not torch.equal(b[0], b[1])
    with_biases, without = (draw(rule("kaiming", sigma_b=one), "relu", (3, 4), [0], 1) for one in (0.3, 0.0))
    assert torch.equal(with_biases[0], without[0]) and not without[1].any()
    with pytest.raises(UsageError, match=r"init\.sigma_b"):
        rule("kaiming", sigma_b=-1.0)


def test_gelu_stays_at_its_half_stable_point() -> None:
    """sigma_w^2 = 1.98305826, sigma_b^2 = 0.17292239: chi_1 = V' = 1 at q = (3 + sqrt 17)/2, measured as predicted."""
    scales = {"gain": 1.98305826**0.5, "sigma_b": 0.17292239**0.5}
    at = initlab.phase("gelu", scales["gain"], scales["sigma_b"])
    assert at.q == pytest.approx((3 + 17**0.5) / 2, rel=1e-4) and at.chi_1 == pytest.approx(1, abs=1e-4)
    assert at.attracts == "below"
    frame = initlab.stack("kaiming", "gelu", 3, 400, None, 100, 8, **scales)
    bands = initlab.predict("kaiming", "gelu", 3, 400, batch=100, **scales)
    q = 1.0
    for layer in (1, 2, 3):
        q = scales["gain"] ** 2 * q + scales["sigma_b"] ** 2
        here = bands.query(f"layer == {layer} and tensor == 'preactivation' and direction == 'forward'")
        here = here.set_index("statistic").loc["rms"]
        assert here["limit"] ** 2 == pytest.approx(q, rel=1e-7)
        found = frame.query(f"layer == {layer} and tensor == 'preactivation' and direction == 'forward'")["rms"]
        spread = (here["band_high"] - here["band_low"]) / 4
        assert abs(found.mean() - here["predicted"]) < 5 * spread / 8**0.5
        q = float(maps.moment(ACTIVATIONS["gelu"], q))


@pytest.mark.parametrize("name", [name for name in (*FIELDS, *PARAMETERS) if len(name) > 3])
def test_a_misspelt_parameter_is_told_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match=f"no such parameter.*did you mean {name}"):
        rule("kaiming", **{f"{name}_": 1})


def test_what_is_left_out_is_the_first_layer_and_the_rules_own_kind_of_gain() -> None:
    for draw_one in (gaussian, uniform):
        assert torch.equal(draw_one((3,), 0, "x"), draw_one((3,), 0, "x", 0))
    assert torch.equal(permutation(9, 0, "x"), permutation(9, 0, "x", 0))
    assert Rule(gain_kind="rms").gain_for("tanh") == gain("tanh", "rms") != gain("tanh") == Rule().gain_for("tanh")
    with pytest.raises(UsageError, match="init=3: must be a rule's name or a Rule"):
        rule(3)  # type: ignore[arg-type]


def test_a_rule_of_ones_own_is_named_by_what_it_is_made_of() -> None:
    assert rule_name(Rule(gain=3.0)) == "normal, fan_in" and rule_name(Rule()) == rule_name("kaiming") == "kaiming"
    assert rule_name(Rule(distribution="uniform", mode="fan_out", gain=2.0)) == "uniform, fan_out"
    assert RULES["lsuv"] == Rule(gain=1.0, distribution="orthogonal", attempts=10) and RULES["mup"].base_width == 50
