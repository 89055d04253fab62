import math
import re
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch.nn import functional

from initlab.errors import UsageError
from initlab.meanfield import maps
from initlab.meanfield.fixed_points import critical, half_stable, phase, phase_plane
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.custom_activation import as_activation
from tests.conftest import ROWS

EVERYONE = pytest.mark.parametrize("name", ROWS)


@EVERYONE
def test_growth_is_the_derivative_of_the_length_map(name: str) -> None:
    """Central differences of fourth order; at the kinks too, where phi'' is not a function."""
    row = ACTIVATIONS[name]
    for q in (0.3, 1.0, 8.0):
        h = 1e-2 * q
        at = torch.tensor([q - 2 * h, q - h, q + h, q + 2 * h], dtype=torch.float64)
        far, near, next_, last = maps.moment(row, at).tolist()
        expected = (far - 8 * near + 8 * next_ - last) / (12 * h)
        assert float(maps.growth(row, torch.tensor([q]))[0]) == pytest.approx(expected, rel=1e-7)


@EVERYONE
def test_chi_is_the_derivative_of_the_correlation_map(name: str) -> None:
    """dE[phi phi]/dc = q E[phi' phi'], the identity that ties phi and phi' together."""
    row, q, h = ACTIVATIONS[name], 1.7, 2e-3
    c = torch.tensor([0.4 - 2 * h, 0.4 - h, 0.4 + h, 0.4 + 2 * h], dtype=torch.float64)
    far, near, next_, last = maps.overlap(row, q, c).tolist()
    expected = (far - 8 * near + 8 * next_ - last) / (12 * h)
    assert q * float(maps.slope_overlap(row, q, 0.4)) == pytest.approx(expected, rel=1e-8)


def test_relu_has_its_closed_maps() -> None:
    row = ACTIVATIONS["relu"]
    c = torch.linspace(0, 1, 11, dtype=torch.float64)
    kernel = ((1 - c * c).sqrt() + c * (math.pi - torch.acos(c))) / math.pi
    assert float((maps.correlation_map(row, c, 3.0, 2.0**0.5) - kernel).abs().max()) < 1e-12
    assert float(maps.length_map(row, torch.tensor([5.0]), 2.0**0.5, 0.5)[0]) == pytest.approx(5.25, rel=1e-13)


@pytest.mark.parametrize("q", [1e-300, 1e-30, 1e30, 1e300])
def test_maps_outlive_extreme_lengths(q: float) -> None:
    for name in ("relu", "tanh"):
        assert math.isfinite(float(maps.length_map(ACTIVATIONS[name], torch.tensor([q], dtype=torch.float64), 2.0)[0]))


@pytest.mark.parametrize(
    ("name", "sigma_w", "sigma_b"), [("tanh", 1.2, 0.2), ("tanh", 1.7, 0.3), ("selu", 1.1, 0.4), ("gelu", 1.2, 0.5)]
)
def test_fixed_points_are_fixed(name: str, sigma_w: float, sigma_b: float) -> None:
    row, at = as_activation(name), phase(name, sigma_w, sigma_b)
    q = torch.tensor([at.q], dtype=torch.float64)
    assert float(maps.length_map(row, q, sigma_w, sigma_b)[0]) == pytest.approx(at.q, rel=1e-12)
    if at.phase == "chaotic":
        assert 0 < at.c < 1
        assert float(maps.correlation_map(row, at.c, at.q, sigma_w, sigma_b)) == pytest.approx(at.c, abs=1e-9)
    assert at.chi == pytest.approx(float(maps.chi(row, at.q, sigma_w, at.c)), rel=1e-8)
    assert at.xi_q == pytest.approx(-1 / math.log(at.slope), rel=1e-9)


@pytest.mark.long
def test_iterating_the_maps_arrives_at_the_fixed_points() -> None:
    for sigma_w, sigma_b in ((1.1, 0.3), (1.7, 0.2)):
        row, at = as_activation("tanh"), phase("tanh", sigma_w, sigma_b)
        q = c = torch.tensor([0.5], dtype=torch.float64)
        for _ in range(300):
            q, c = maps.length_map(row, q, sigma_w, sigma_b), maps.correlation_map(row, c, q, sigma_w, sigma_b)
        assert float(q[0]) == pytest.approx(at.q, rel=1e-10) and float(c[0]) == pytest.approx(at.c, rel=1e-6)


def test_phases_by_name() -> None:
    assert phase("tanh", 0.7).phase == "ordered" and phase("tanh", 0.7).q == 0
    assert phase("tanh", 1.0).phase == "critical" and phase("tanh", 1.0).xi_c == math.inf
    assert phase("tanh", 1.7).phase == "chaotic" and phase("tanh", 1.7).c == pytest.approx(0, abs=1e-12)
    assert phase("relu", 2.0**0.5).phase == "critical" and phase("relu", 2.0**0.5).q == 1
    assert phase("relu", 1.7).phase == "unbounded" and math.isnan(phase("relu", 1.7).c)
    assert phase("relu", 1.0, 0.5**0.5).q == pytest.approx(1, rel=1e-12)
    assert phase("linear", 0.5**0.5, 0.1**0.5).q == pytest.approx(0.2, rel=1e-12)
    assert phase("tanh", 1.2, 0.2).trainable_depth == pytest.approx(6 * phase("tanh", 1.2, 0.2).xi_c)


def test_critical_lines() -> None:
    assert critical("tanh", 0.05**0.5) ** 2 == pytest.approx(1.760955, abs=5e-7)
    assert critical("tanh") == pytest.approx(1, rel=1e-12)
    assert critical("relu") == pytest.approx(2**0.5, rel=1e-12)
    for name, sigma_b in (("tanh", 0.45), ("selu", 0.3), ("gelu", 0.63)):
        sigma_w = critical(name, sigma_b)
        assert (
            phase(name, sigma_w, sigma_b).chi_1 == pytest.approx(1, abs=1e-6)
            or phase(name, sigma_w, sigma_b).q == math.inf
        )
        below, above = phase(name, 0.985 * sigma_w, sigma_b), phase(name, 1.015 * sigma_w, sigma_b)
        assert below.phase == "ordered" and above.phase in ("chaotic", "unbounded")


USERS = {
    "relu": torch.relu,
    "leaky relu": lambda z: functional.leaky_relu(z, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "selu": functional.selu,
    "erf": torch.erf,
    "sin": torch.sin,
    "abs": torch.abs,
    "linear": lambda z: z,
    "hard tanh": functional.hardtanh,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("gelu", "abs") else pytest.mark.slow) for name in USERS]
)
def test_critical_and_phase_agree_or_say_why_not(name: str) -> None:
    """At six scales of biases: `phase` calls critical what `critical` returns, or `critical` says where q goes."""
    answers = 0
    for sigma_b in (0, 0.05, 0.1, 0.3, 0.5, 1):
        try:
            sigma_w = critical(USERS[name], sigma_b)
        except UsageError as refused:
            assert re.search(
                r"has chi_1 = 1 at q=.* the second moment (grows for ever|goes to)|no critical line", str(refused)
            )
            continue
        at = phase(USERS[name], sigma_w, sigma_b)
        assert at.phase == "critical" and at.chi_1 == pytest.approx(1, abs=1e-9) and at.attracts != "none"
        answers += 1
    expected = {"relu": 1, "leaky relu": 1, "abs": 1, "linear": 1, "softplus": 0, "gelu": 2, "silu": 1, "mish": 2}
    assert answers == expected.get(name, 6)


FLAT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "zero": (lambda z: 0 * z, "its slope is 0"),
    "one": (torch.ones_like, "its slope is 0"),
    "far": (lambda z: torch.relu(z - 100), "critical line of .* has sigma_b from 2.8"),
    "bump": (lambda z: torch.relu(1 - (z - 50).abs()), "critical line of .* has sigma_b from 1.3"),
    "narrow": (lambda z: torch.relu(1e-3 - (z - 0.5).abs()), "critical line of .* has sigma_b from 0.014"),
    "shrunk": (functional.softshrink, "critical line of .* has sigma_b from 0.014"),
    "only far": (lambda z: torch.where(z.abs() > 1e3, z, 0 * z), "no critical line, gradients shrink"),
    "square": (torch.square, "critical line of .* has sigma_b from 5e-07"),
    "faint": (lambda z: 1e-8 * torch.tanh(z), "which is beyond 100000"),
    "nearly one": (lambda z: 1 + 1e-9 * z, "no critical line, gradients shrink"),
}


@pytest.mark.parametrize("name", FLAT)
def test_what_is_flat_nearly_everywhere_is_refused_with_few_calls(name: str) -> None:
    """Means of all second moments are refined together: 1,000 calls of the function, where one by one took 46,000."""
    function, reason = FLAT[name]
    calls = [0]

    def counted(z: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return function(z)

    with pytest.raises(UsageError, match=reason):
        critical(counted)
    assert calls[0] < 3000


def test_where_no_line_is_gradients_shrink_at_every_fixed_point() -> None:
    """At every scale at which lengths stay finite, of weights and of biases."""
    found = [phase(lambda z: 1 + 0.1 * z, sigma_w, sigma_b) for sigma_w in (0.1, 1, 5, 9) for sigma_b in (0, 1, 3)]
    assert all(at.chi_1 < 1 for at in found if math.isfinite(at.q)) and any(math.isfinite(at.q) for at in found)


def test_which_fixed_point_a_signal_runs_into_depends_on_where_it_starts() -> None:
    """GELU at sigma_w 2 without biases: 0 attracts nothing. At 1.45 with 0.3 three points; the middle one repels."""
    assert phase("gelu", 2.0).path == "from q=1 the second moment grows for ever"
    low, high = phase("gelu", 1.45, 0.3), phase("gelu", 1.45, 0.3, q0=2.0)
    assert low.attracts == "both" and low.q < 1 and low.phase == "ordered"
    assert high.phase == "unbounded" and high.attracts == "none"
    assert phase("relu", 2**0.5, q0=3.0).q == 3 and phase("relu", 2**0.5).attracts == "all"
    assert phase("tanh", 1.0).attracts == "above"
    assert "repels" in phase("gelu", gain("gelu", "rms")).path  # it starts on the point
    with pytest.raises(UsageError, match="at q=0, sigma_w=2, where V' is 1, but from q=1 the second moment grows"):
        critical("gelu", 0.0)


@pytest.mark.parametrize("name", ["linear", "relu", "tanh", "sigmoid", "selu", "gelu"])
def test_a_critical_point_is_called_critical(name: str) -> None:
    """And a point 1e-7 beside it is not: what is called critical is narrower than any measurement."""
    biases = {"linear": [0.0], "relu": [0.0], "sigmoid": [0.0, 0.5, 1.4], "selu": [0.2, 0.5], "gelu": [0.45, 0.6]}.get(
        name, [0.2, 0.5, 1.4]
    )
    for sigma_b in biases:
        sigma_w = critical(name, sigma_b)
        assert phase(name, sigma_w, sigma_b).phase == "critical"
        assert phase(name, sigma_w * (1 - 1e-7), sigma_b).phase == "ordered"
        assert phase(name, sigma_w * (1 + 1e-7), sigma_b).phase in ("chaotic", "unbounded")


def test_gelu_has_a_half_stable_point() -> None:
    sigma_w, sigma_b, q = half_stable("gelu")
    assert (sigma_w**2, sigma_b**2) == pytest.approx((1.98305826, 0.17292239), abs=5e-9)
    assert q == pytest.approx((3 + math.sqrt(17)) / 2, rel=1e-8)
    at = phase("gelu", 1.98305826**0.5, 0.17292239**0.5)  # given to eight digits the two maps touch or cross by 1e-9
    assert at.q == pytest.approx(q, rel=1e-5)
    assert (at.slope, at.chi_1) == pytest.approx((1, 1), abs=1e-6)
    with pytest.raises(UsageError, match="tanh"):
        half_stable("tanh")


def test_torchs_tanh_gain_is_chaotic_and_its_own_is_critical_at_zero() -> None:
    assert phase("tanh", gain("tanh", "torch")).chi_1 == pytest.approx(1.2098314, abs=1e-6)
    assert phase("selu", 0.75).chi_1 == pytest.approx(1, abs=0.005)
    assert phase("gelu", gain("gelu", "rms")).slope > 1.1


def test_a_plane_is_its_points() -> None:
    plane = phase_plane("tanh", [0.9, 1.2, 1.7], [0.0, 0.5])
    assert isinstance(plane, pd.DataFrame) and len(plane) == 6
    for row in plane.itertuples():
        at = phase("tanh", row.sigma_w, row.sigma_b)
        assert (row.phase, row.q) == (at.phase, pytest.approx(at.q, rel=1e-12))
        assert row.c == pytest.approx(at.c, abs=1e-9)


def test_mistakes_are_one_line() -> None:
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="sigma_w"):
            phase("tanh", bad)
    with pytest.raises(UsageError, match="sigma_b"):
        critical("tanh", -0.1)
    with pytest.raises(UsageError, match="did you mean tanh"):
        phase("tahn", 1.0)


@pytest.mark.parametrize("bad", ["a", None, [1, 2], 1j, True])
def test_what_is_no_scale_is_one_line(bad: object) -> None:
    for call in (lambda: phase("tanh", bad), lambda: phase("tanh", 1.0, bad), lambda: critical("tanh", bad)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="must be a number"):
            call()


@pytest.mark.long
def test_functions_without_a_slope_have_no_critical_scale() -> None:
    with pytest.raises(UsageError, match="its slope is 0"):
        critical(lambda z: 0 * z)
    with pytest.raises(UsageError, match="gives bool; it must return floats"):
        phase(lambda z: z > 0, 1.0)
