import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import initlab
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.custom_activation import as_activation, name_of, slope_source
from tests.conftest import ROWS
from tests.long import long_except


@pytest.mark.parametrize(
    ("function", "kinks"),
    [
        (torch.relu, (0.0,)),
        (functional.hardtanh, (-1.0, 1.0)),
        (functional.relu6, (0.0, 6.0)),
        (functional.hardswish, (-3.0, 3.0)),
        (torch.tanh, ()),
        (functional.softplus, ()),
        (torch.sin, ()),
        (lambda z: torch.relu(z - 0.3), (0.3,)),
    ],
)
def test_kinks_are_found_where_they_are(function, kinks) -> None:  # type: ignore[no-untyped-def]
    assert as_activation(function).kinks == pytest.approx(kinks, abs=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_kinks_anywhere_in_a_cell_are_found(seed: int) -> None:
    """Sums of |z - c| over random c, far apart and close together, beside a smooth part; their slopes jump by 2 a."""
    random = torch.Generator().manual_seed(seed)
    centres = (torch.rand(4, generator=random, dtype=torch.float64) * 20 - 10).sort().values
    if seed % 2:
        centres[1] = centres[0] + 0.05  # a few cells further
    sizes = 0.5 + torch.rand(4, generator=random, dtype=torch.float64)

    def phi(z: torch.Tensor) -> torch.Tensor:
        return (sizes * (z[..., None] - centres).abs()).sum(-1) + torch.sin(z)

    row = as_activation(phi)
    assert row.kinks == pytest.approx(centres.tolist(), abs=1e-8)
    z = torch.linspace(-12, 12, 3001, dtype=torch.float64)
    z = torch.cat([z, centres - 1e-5, centres + 1e-5])
    exact = (sizes * (z[..., None] - centres).sign()).sum(-1) + torch.cos(z)
    torch.testing.assert_close(row.slope(z), exact, rtol=2e-3, atol=1e-3)


def test_a_small_kink_beside_a_large_slope_is_found() -> None:
    assert as_activation(lambda z: 5 * z + 0.05 * (z - 1.2).abs()).kinks == pytest.approx([1.2], abs=1e-7)


@pytest.mark.parametrize("at", [-3.2107, 0.0, 0.0123, 5.5])
def test_a_jump_lies_in_its_cell(at: float) -> None:
    assert as_activation(lambda z: torch.where(z < at, z, z + 1)).kinks == pytest.approx([at], abs=1e-5)


def test_leaky_units_with_a_random_slope_have_their_mean_slope_in_eval_mode() -> None:
    """torch takes (lower + upper) / 2 there: gain sqrt(2 / (1 + slope^2))."""
    expected = math.sqrt(2 / (1 + ((1 / 8 + 1 / 3) / 2) ** 2))
    assert gain(as_activation(torch.nn.RReLU().eval()), "chi") == pytest.approx(expected, rel=1e-9)


def test_a_module_with_parameters_is_the_function_that_it_is_now() -> None:
    """nn.PReLU in float32 against leaky_relu of the same slope; what it learns later is another activation."""
    module = torch.nn.PReLU(init=0.2)
    row, slope = as_activation(module), float(module.weight.detach())
    assert gain(row, "chi") == pytest.approx(math.sqrt(2 / (1 + slope**2)), rel=1e-9)
    z = torch.randn(5, 4, requires_grad=True)
    torch.testing.assert_close(row.phi(z), functional.leaky_relu(z, slope), rtol=1e-6, atol=0)
    row.phi(z).sum().backward()
    assert z.grad is not None and module.weight.grad is None and module.weight.requires_grad
    with torch.no_grad():
        module.weight.fill_(1.0)
    assert gain(as_activation(module), "chi") == pytest.approx(1, rel=1e-9)


def test_steps_are_kinks_up_to_as_many_as_theory_can_use() -> None:
    steps = as_activation(torch.floor)
    assert steps.kinks == pytest.approx(range(-32, 32), abs=1e-9)  # the 64 nearest to 0
    assert float(steps.slope(torch.linspace(-9, 9, 1001, dtype=torch.float64)).abs().max()) == 0


@pytest.mark.parametrize("steepness", [1.0, 10.0, 50.0])
def test_a_steep_slope_is_no_kink(steepness: float) -> None:
    assert as_activation(lambda z: torch.tanh(steepness * z)).kinks == ()


@pytest.mark.parametrize("name", ["relu", "tanh", "selu", "silu"])
@pytest.mark.parametrize("kind", ["chi", "rms", "std"])
def test_a_function_of_ones_own_has_the_gains_of_its_twin(name: str, kind: str) -> None:
    twin = as_activation(ACTIVATIONS[name].module())
    assert slope_source(twin) == "autograd" and slope_source(ACTIVATIONS[name]) == "given"
    assert gain(twin, kind) == pytest.approx(gain(name, kind), rel=1e-10)


def test_the_slope_is_autograds_at_every_size() -> None:
    """A difference quotient with one step for all is 0 at 1e15 and off near 0, where phi'' of elu jumps."""
    z = torch.tensor([-1e15, -3.0, -1e-9, 1e-9, 2.0, 1e15], dtype=torch.float64)
    for function, slope in (
        (functional.elu, lambda z: torch.where(z > 0, 1.0, torch.exp(z))),
        (lambda z: torch.relu(z) * 2, lambda z: 2.0 * (z > 0)),
        (lambda z: torch.where(z > 0, z, 0.3 * z), lambda z: 1 - 0.7 * (z < 0).double()),
    ):
        row = as_activation(function)
        assert slope_source(row) == "autograd"
        torch.testing.assert_close(row.slope(z), slope(z).double(), rtol=1e-15, atol=0)
        with torch.inference_mode():
            assert row.slope(z.float()).dtype == torch.float32
    infinite = torch.full((2,), math.inf, dtype=torch.float64)
    assert as_activation(lambda z: torch.relu(z)).pull_back(infinite, z[[0, -1]]).tolist() == [0, math.inf]


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda z: torch.from_numpy(np.tanh(z.numpy())), lambda z: 1 - torch.tanh(z) ** 2),
        (lambda z: torch.from_numpy(np.maximum(z.numpy(), 0)), lambda z: (z > 0).double()),
        (lambda z: functional.selu(z).detach(), ACTIVATIONS["selu"].slope),
        (lambda z: functional.elu(z).detach(), ACTIVATIONS["elu"].slope),
    ],
)
def test_where_autograd_cannot_go_the_slope_is_a_difference_quotient(function, slope) -> None:  # type: ignore[no-untyped-def]
    """Its step grows with |z|, and its points stay on the side of z of a kink and of 0."""
    row = as_activation(function)
    assert slope_source(row) == "numerical derivative"
    z = torch.tensor([-1e15, -30.0, -0.7, -1e-5, 1e-9, 1e-4, 2.0, 33.0, 1e15], dtype=torch.float64)
    torch.testing.assert_close(row.slope(z), slope(z), rtol=1e-9, atol=1e-11)
    assert initlab.predict(activation=function, depth=2)["slope"].unique().tolist() == ["numerical derivative"]


@pytest.mark.parametrize("init", long_except(["naive", "small", "kaiming"], "naive"))
@pytest.mark.parametrize("name", ROWS)
def test_a_stack_of_a_function_is_that_of_its_name(name: str, init: str) -> None:
    """Fifty layers forward and backward, to 1e-6 of each number; `frac_zero` of gradients where phi' rounds to 0 apart.

    Of a float32 stack what is beyond the format, too: log2_rms_true.
    """
    row = ACTIVATIONS[name]
    for dtype in ("float64", "float32"):
        named, ours = (
            initlab.stack(init, given, 50, 20, None, 20, [3], dtype=dtype) for given in (name, lambda z: row.phi(z))
        )
        assert len(named) == len(ours) == 201
        columns = {"q", "rms", "std", "norm", "frac_saturated"} if dtype == "float64" else {"log2_rms_true"}
        for column in columns:
            a, b = named[column].to_numpy(), ours[column].to_numpy()
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-5 * (dtype == "float32"), err_msg=column)


@pytest.mark.parametrize(
    ("function", "place"),
    [
        (torch.sign, "0"),
        (functional.hardshrink, "-0.5"),
        (lambda z: functional.threshold(z, 0.1, 20.0), "0.1"),
        (torch.round, "-0.5"),
        (torch.floor, "0"),
        (lambda z: z + 0.5 * (z > 37.21), "37.21"),
        (lambda z: torch.tanh(z) + 1e-4 * (z > -1.2345), "-1.2345"),
        (lambda z: z.abs() ** 0.5, "0"),
        (lambda z: (z - 1.5).sign() * (z - 1.5).abs() ** 0.4, "1.5"),
    ],
)
def test_functions_whose_slope_has_no_mean_square_are_refused(function, place: str) -> None:  # type: ignore[no-untyped-def]
    """Their chi_1 is infinite; the gain that keeps second moments needs phi alone."""
    assert gain(as_activation(function), "rms") > 0
    for ask in (
        lambda: initlab.gain(function),
        lambda: initlab.phase(function, 1.5, 0.1),
        lambda: initlab.critical(function, 0.1),
        lambda: initlab.predict("lecun", function, 3),
    ):
        with pytest.raises(UsageError, match=f"z={place}[,;]? ") as said:
            ask()
        assert "jumps" in str(said.value) or "no mean" in str(said.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.sigmoid(50 * z),
        lambda z: torch.tanh(1e4 * z),
        lambda z: torch.sin(10 * z),
        lambda z: z.abs() ** 0.75,
        functional.softplus,  # jumps by 2e-9 at 20, where torch takes z itself
        lambda z: functional.gelu(z.float()).double(),
        lambda z: torch.relu(z - 30),
    ],
)
def test_what_is_steep_or_rounded_does_not_jump(function) -> None:  # type: ignore[no-untyped-def]
    assert as_activation(function).no_slope == ""


def test_a_slope_that_autograd_has_otherwise_is_measured_and_not_predicted() -> None:
    """A straight-through estimate: its backward pass is the identity's, its phi is not."""
    step = lambda z: z + (torch.tanh(z) - z).detach()  # noqa: E731
    row = as_activation(step)
    assert row.slope(torch.linspace(-3, 3, 7, dtype=torch.float64)).tolist() == [1.0] * 7
    with pytest.raises(UsageError, match="another slope than autograd"):
        initlab.phase(step, 1.0)


def test_names() -> None:
    assert name_of("relu") == "relu" == name_of(ACTIVATIONS["relu"])
    assert name_of(torch.sin) == "sin"


def test_what_is_no_activation_is_said() -> None:
    cases = [
        (lambda z: torch.softmax(z, -1), "not an elementwise"),
        (lambda z: z.sum(), "argument's shape"),
        (torch.log, "not finite at z="),
        (lambda z: 1 / z, "not finite at z=0"),
        (lambda z: 1 / (z - 0.5), "not finite at z=0.5"),
        (lambda z: z @ z @ z, r"cannot be called with a float64 tensor \([^()]*0D and 1D[^()]*\)$"),
        (lambda z: z - z.mean(), "not an elementwise"),
        (lambda z: z.cumsum(-1), "not an elementwise"),
        (lambda z: torch.relu(z).roll(1, -1), "not an elementwise"),
        (torch.nn.RReLU(), r"other values at each call.*\.eval\(\)"),
        (torch.nn.Dropout(0.01), r"other values at each call.*\.eval\(\)"),
        (lambda z: torch.round(z * 10), "more than 64 places"),
        (3.0, "must be a name"),
        ("reluu", "did you mean relu"),
    ]
    for bad, text in cases:
        with pytest.raises(UsageError, match=text) as said:
            as_activation(bad)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)
    with pytest.raises(UsageError, match="0 almost everywhere"):
        gain(as_activation(lambda z: 0 * z + 1), "chi")
    assert math.isfinite(gain(as_activation(torch.sign), "rms"))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 0.7, -0.5])
def test_torch_has_the_gain_of_a_leaky_relu_of_any_slope(slope: float) -> None:
    """As a module and as a function; torch's formula is sqrt(2 / (1 + slope^2))."""
    wanted = torch.nn.init.calculate_gain("leaky_relu", slope)
    for given in (nn.LeakyReLU(slope), lambda z: torch.nn.functional.leaky_relu(z, slope)):
        assert initlab.gain(given, "torch") == pytest.approx(wanted, rel=1e-12)
        assert initlab.gain(given) == pytest.approx(wanted, rel=1e-12)
    assert initlab.gain(torch.tanh, "torch") == 5 / 3 and initlab.gain(nn.SELU(), "torch") == 0.75
    for other in (nn.GELU(), nn.ELU(), lambda z: z.clamp(0, 3)):
        with pytest.raises(UsageError, match="torch has no gain"):
            initlab.gain(other, "torch")
