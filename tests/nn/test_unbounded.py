import math
from collections.abc import Callable, Iterator

import mpmath
import pytest
import torch
from formulas import formulas

from initlab.nn.activations import ACTIVATIONS, SELU_ALPHA, SELU_SCALE, SLOPE
from initlab.nn.unbounded import UNBOUNDED, Scaled, log2_moments, rescale
from tests.conftest import ROWS
from tests.long import long_except

POWERS = (-3000, -1080, -700, -60, 0, 3, 60, 700, 1030, 3000)
MP = mpmath.mpf


@pytest.fixture(autouse=True)
def two_hundred_bits() -> Iterator[None]:
    with mpmath.workprec(200):
        yield


def exact(x: Scaled) -> list[mpmath.mpf]:
    return [mpmath.ldexp(MP(m), int(x.exponent)) for m in x.mantissa.flatten().tolist()]


def at(power: int, seed: int = 0) -> Scaled:
    entries = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rescale(entries, torch.tensor(float(power), dtype=torch.float64))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def close(found: list[mpmath.mpf], wanted: list[mpmath.mpf], limit: float = 1e-13) -> bool:
    """Relative to the norm: an entry that is small beside its tensor may be rounded away."""
    norm = mpmath.sqrt(sum(w * w for w in wanted))
    return bool(mpmath.sqrt(sum((f - w) ** 2 for f, w in zip(found, wanted, strict=True))) <= limit * norm)


def _gelu(z: mpmath.mpf) -> mpmath.mpf:
    return z * mpmath.ncdf(z) if abs(z) < 1000 else max(z, MP(0))  # beyond, mpmath itself overflows


def _selu(z: mpmath.mpf) -> mpmath.mpf:
    return SELU_SCALE * (z if z > 0 else SELU_ALPHA * mpmath.expm1(z))


PHI = {
    "linear": lambda z: z,
    "relu": lambda z: max(z, MP(0)),
    "leaky_relu": lambda z: z if z > 0 else MP(SLOPE) * z,
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "gelu": _gelu,
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "selu": _selu,
    "elu": lambda z: z if z > 0 else mpmath.expm1(z),
    "softplus": lambda z: z if z > 1000 else mpmath.log1p(mpmath.exp(z)),
    "mish": lambda z: z if z > 1000 else z * mpmath.tanh(mpmath.log1p(mpmath.exp(z))),
    "gelu_tanh": lambda z: formulas("gelu_tanh")[0](z) if abs(z) < 1000 else max(z, MP(0)),
    "hardswish": lambda z: z * min(max(z + 3, MP(0)), MP(6)) / 6,
    "relu6": lambda z: min(max(z, MP(0)), MP(6)),
}
BOUNDED = ("tanh", "sigmoid", "relu6")


def powers(name: str) -> list[int]:
    """Of a bounded activation what stays below 2^500; of one without a reference here what mpmath computes."""
    most = 500 if name in BOUNDED else 10**4 if name in PHI else 10
    return [power for power in POWERS if (abs(power) if name not in PHI else power) < most]


def phi(name: str) -> Callable[[mpmath.mpf], mpmath.mpf]:
    return PHI.get(name) or formulas(name)[0]


AT = [(name, power) for name in ROWS for power in powers(name)]


@pytest.mark.parametrize(("name", "power"), long_except(AT, *AT[::6]))
def test_an_activation_is_right_at_every_magnitude(name: str, power: int) -> None:
    """float64 itself is 0 or inf at most of these; what a bounded activation is handed stays below 2^500."""
    z = at(power)
    found = UNBOUNDED.activate(z, ACTIVATIONS[name])
    assert close(exact(found), [phi(name)(value) for value in exact(z)], 1e-12)


@pytest.mark.parametrize(
    ("name", "power"), long_except([(name, power) for name, power in AT if name not in BOUNDED], *AT[::6])
)
def test_a_gradient_is_pulled_back_at_every_magnitude(name: str, power: int) -> None:
    z, g = at(power), at(-power, seed=1)
    found = exact(UNBOUNDED.activate_back(g, z, ACTIVATIONS[name]))
    least = MP(0) if ACTIVATIONS[name].kinks else MP(2) ** -60  # a kink at 0 must not be stepped over
    step = [max(abs(value), least) * MP(2) ** -60 for value in exact(z)]
    slopes = [(phi(name)(v + h) - phi(name)(v - h)) / (2 * h) for v, h in zip(exact(z), step, strict=True)]
    assert close(found, [a * b for a, b in zip(exact(g), slopes, strict=True)], 1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_a_linear_layer_is_right_at_every_magnitude(power: int) -> None:
    x = at(power)
    w, b = numbers(5, 4), numbers(4)
    values, weights = exact(x), w.double().tolist()
    plain = [sum(values[5 * n + i] * MP(weights[i][o]) for i in range(5)) for n in range(6) for o in range(4)]
    assert close(exact(UNBOUNDED.linear(x, w)), plain)
    with_bias = [value + MP(b[k % 4].item()) for k, value in enumerate(plain)]
    assert close(exact(UNBOUNDED.linear(x, w, b)), with_bias)
    assert close(exact(UNBOUNDED.linear(x, w, torch.zeros(4))), plain)
    assert close(exact(UNBOUNDED.linear(rescale(torch.zeros(6, 5)), w, b)), [MP(v) for v in b.tolist() * 6])


@pytest.mark.parametrize("value", [0.0, 5e-324, 3e-310, 1e-40, 1.0, 1e300, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scaling_is_exact(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[value, -value / 3]], dtype=torch.float64).to(dtype)
    largest = float(x.abs().max())
    if not math.isinf(largest):
        assert exact(rescale(x)) == [MP(v) for v in x.flatten().tolist()]
        assert largest == 0 or 2.0**-74 <= float(rescale(x).mantissa.abs().max()) < 2.0**24


@pytest.mark.parametrize("power", POWERS)
def test_log2_of_the_moments(power: int) -> None:
    x = at(power)
    values = exact(x)
    mean = sum(values) / len(values)
    rms, std = (mpmath.sqrt(sum((v - m) ** 2 for v in values) / len(values)) for m in (MP(0), mean))
    found = log2_moments(x).tolist()
    assert found == pytest.approx([float(mpmath.log(rms, 2)), float(mpmath.log(std, 2))], rel=1e-15, abs=1e-13)


def test_equal_entries_have_no_spread_and_zeros_no_size() -> None:
    assert log2_moments(rescale(torch.full((7, 3), 0.1)))[1] == -math.inf
    assert log2_moments(rescale(torch.zeros(2, 2))).tolist() == [-math.inf, -math.inf]
    each = torch.rand(200, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(200, 7, 11)
    for x in (each, -each):
        assert log2_moments(rescale(x))[1].tolist() == [-math.inf] * 200


def test_networks_carry_powers_of_their_own() -> None:
    together = Scaled(*(torch.stack(parts) for parts in zip(at(900), at(-900), strict=True)))
    w, b = numbers(2, 5, 4), numbers(2, 4)
    both = UNBOUNDED.linear(together, w, b)
    for k, power in enumerate((900, -900)):
        alone = UNBOUNDED.linear(at(power), w[k], b[k])
        assert torch.equal(both.exponent[k], alone.exponent)
        torch.testing.assert_close(both.mantissa[k], alone.mantissa, rtol=1e-14, atol=1e-15)


def test_nan_and_inf_pass_through() -> None:
    x = rescale(torch.tensor([[math.nan, 1.0], [math.inf, 2.0]]))
    assert x.mantissa.isnan().any() and x.mantissa.isinf().any()
    assert x.exponent == 0 and x.mantissa[1, 1] == 2
    assert math.isnan(float(log2_moments(x)[0]))
    assert UNBOUNDED.activate(x, ACTIVATIONS["relu"]).mantissa.isnan().any()


UNIT = ("sigmoid", "softplus")  # not 0 at 0: beside entries of 2^3000 that is below their last digit


@pytest.mark.parametrize(
    ("name", "power"),
    [(n, power) for n in ROWS for power in (-3000, 0, 3000) if power < 500 or n not in (*BOUNDED, *UNIT)],
)
def test_a_zero_among_other_entries_is_what_the_activation_makes_of_it(name: str, power: int) -> None:
    """phi(0) and phi'(0), whatever the magnitude of the entries beside it."""
    row, zero = ACTIVATIONS[name], torch.zeros((), dtype=torch.float64)
    z = at(power)
    z.mantissa[0, 0] = 0
    value = exact(UNBOUNDED.activate(z, row))[0]
    assert value == pytest.approx(float(row.phi(zero)), rel=1e-15, abs=0)
    pulled = exact(UNBOUNDED.activate_back(at(0, seed=1), z, row))[0]
    slope = float(row.pull_back(torch.ones((), dtype=torch.float64), zero))
    assert float(pulled) == pytest.approx(float(exact(at(0, seed=1))[0]) * slope, rel=1e-14, abs=0)


@pytest.mark.parametrize("name", ROWS)
def test_a_layer_of_zeros_stays_what_the_activation_makes_of_zeros(name: str) -> None:
    row = ACTIVATIONS[name]
    found = exact(UNBOUNDED.activate(rescale(torch.zeros(2, 3)), row))
    assert [float(v) for v in found] == pytest.approx([float(row.phi(torch.zeros((), dtype=torch.float64)))] * 6)
