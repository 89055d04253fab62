"""A law is told from numbers alone: torch's are called by their names, what is near to them is not."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init

from benchmarks.laws import NEAR, SHAPES, list_cases
from initlab.errors import UsageError
from initlab.models.families import CUT, NORMAL, OTHER, UNIFORM, UNKNOWN
from initlab.models.laws import CONSTANT, IDENTITY, ORTHOGONAL, SPARSE, recognize_law
from initlab.models.named_rules import NAMED_RULES, Size, matching_rules
from tests.long import long_except

CASES = list_cases()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("name", long_except(CASES, *list(CASES)[::4]))
def test_laws_have_their_names_and_near_ones_have_not(name: str) -> None:
    """Three draws at each shape; benchmarks/laws.py makes a thousand."""
    law, draw = CASES[name]
    found = [recognize_law(draw(torch.empty(shape))).name for shape in SHAPES for _ in range(3)]
    allowed = {law, UNKNOWN} if name in NEAR else {law}
    assert set(found) <= allowed, found
    assert found.count(law) >= 12


@pytest.mark.parametrize("factor", [1e-40, 1e-5, 1.0, 1e30])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_scale_changes_no_name(draw, factor: float) -> None:  # type: ignore[no-untyped-def]
    """Also where float32 has no other numbers than denormal ones."""
    x = draw(64, 64, dtype=torch.float64)
    one, other = recognize_law(x), recognize_law((x * factor).float())
    assert one.name == other.name != OTHER
    assert other.std == pytest.approx(one.std * factor, rel=1e-3)  # denormal numbers have few digits
    assert recognize_law(-x).mean == pytest.approx(-one.mean, rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(-2, 2), (-1, 2), (-1, 1)])
def test_a_cut_says_what_was_meant(low: float, high: float) -> None:
    """The standard deviation before the cut, and what is left of it by the formula of the cut normal distribution."""
    law = recognize_law(init.trunc_normal_(torch.empty(512, 512), std=0.1, a=0.1 * low, b=0.1 * high))
    normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    ends = torch.tensor([float(low), float(high)])
    density, below = normal.log_prob(ends).exp(), normal.cdf(ends)
    share = below[1] - below[0]
    moved = (density[0] - density[1]) / share
    kept = math.sqrt(1 + (low * density[0] - high * density[1]) / share - moved**2)
    assert law.name == CUT
    assert law.kept_std == pytest.approx(kept, rel=0.03)  # 5 standard errors at the narrowest cut
    assert law.std == pytest.approx(0.1 * kept, rel=5 * law.std_error / law.std)
    assert (law.low, law.high) == pytest.approx((0.1 * low, 0.1 * high), rel=1e-3)


def test_the_standard_error_is_that_of_many_draws() -> None:
    for draw, name in ((torch.randn, NORMAL), (torch.rand, UNIFORM)):
        laws = [recognize_law(draw(40, 40)) for _ in range(200)]
        stds = torch.tensor([law.std for law in laws])
        assert {law.name for law in laws} <= {name, UNKNOWN}
        error = next(law.std_error for law in laws if law.name == name)
        assert float(stds.std()) == pytest.approx(error, rel=0.25)  # 5 standard errors of a std of 200


def test_structure_is_told_by_itself() -> None:
    assert recognize_law(-0.5 * torch.eye(30, 40)).scale == -0.5
    for groups in (1, 2, 4):
        assert recognize_law(init.dirac_(torch.empty(16, 4, 3, 3), groups)).name == IDENTITY
    assert recognize_law(torch.eye(64)[torch.randperm(64)]).name == ORTHOGONAL
    stretched = torch.diag(torch.linspace(0.9, 1.1, 64)) @ init.orthogonal_(torch.empty(64, 64))
    assert recognize_law(stretched).name != ORTHOGONAL
    assert recognize_law(init.orthogonal_(torch.empty(128, 3), 0.3)).scale == pytest.approx(0.3, rel=1e-6)
    x = init.sparse_(torch.empty(300, 200), 0.9, std=0.3)
    law = recognize_law(x)
    assert law.name == SPARSE and law.zeros == pytest.approx(0.9, abs=1e-9)
    assert law.nominal_std == pytest.approx(0.3, rel=5 / math.sqrt(2 * 6000))
    x[0, 0] += 1  # now one column has another number of zeros, or an outlier
    assert recognize_law(x).name == OTHER
    assert recognize_law(torch.randn(1, 4096).expand(64, -1)).name == OTHER


@pytest.mark.parametrize(
    ("x", "names"),
    [
        (torch.tensor([math.nan, 1.0]), {OTHER}),
        (torch.full((64, 64), math.inf), {OTHER}),
        (torch.empty(0, 3), {OTHER}),
        (torch.empty(3, 3, device="meta"), {OTHER}),
        (torch.ones(3, 3, dtype=torch.complex64), {OTHER}),
        (torch.arange(3), {UNKNOWN}),
        (torch.ones(4, dtype=torch.int32), {CONSTANT}),
        (torch.tensor(0.37), {UNKNOWN}),
        (torch.tensor([1.0]), {CONSTANT}),
        (torch.randn(5), {UNKNOWN}),
        (torch.eye(4).to_sparse(), {OTHER}),
        (torch.randn(64, 64).sign(), {OTHER}),
    ],
)
def test_anything_has_an_honest_answer(x: Tensor, names: set[str]) -> None:
    law = recognize_law(x)
    assert law.name in names
    assert law.note or law.name == CONSTANT


def test_what_is_no_tensor_or_not_there_yet() -> None:
    with warnings.catch_warnings(action="ignore"):  # that such modules are new
        lazy = nn.LazyLinear(3)
    assert "first call" in recognize_law(lazy.weight).note
    with pytest.raises(UsageError, match=r"values=\[1, 2\]: must be a tensor"):
        recognize_law([1, 2])  # type: ignore[arg-type]


def test_few_numbers_are_left_open_rather_than_called_wrongly() -> None:
    for draw, name in ((torch.randn, NORMAL), (torch.rand, UNIFORM)):
        found = [recognize_law(draw(8, n)).name for n in (1, 4, 8, 16, 64) for _ in range(20)]
        assert set(found) == {name, UNKNOWN}


@pytest.mark.parametrize("rule", NAMED_RULES, ids=lambda rule: f"{rule.name}, {rule.law}")
def test_every_named_rule_is_found_again(rule) -> None:  # type: ignore[no-untyped-def]
    """And not where the scale is a tenth more."""
    fan_out, fan_in, depth = 256, 192, 12
    scale = rule.scale(Size(fan_in, fan_out, depth))
    ends = 2 * scale / 0.87962566
    draws = {
        NORMAL: lambda x: init.normal_(x, rule.mean, scale),
        UNIFORM: lambda x: init.uniform_(x, rule.mean - 3**0.5 * scale, rule.mean + 3**0.5 * scale),
        CUT: lambda x: init.trunc_normal_(x, std=ends / 2, a=-ends, b=ends),
        ORTHOGONAL: lambda x: init.orthogonal_(x, scale),
        CONSTANT: lambda x: init.constant_(x, scale),
        IDENTITY: lambda x: scale * init.eye_(x),
        SPARSE: lambda x: init.sparse_(x, 0.1, scale),
    }
    x = draws[rule.law](torch.empty(fan_out, fan_in))
    assert rule in matching_rules(recognize_law(x), fan_in, fan_out, depth)
    if rule.name != "zeros_":
        assert rule not in matching_rules(recognize_law(1.1 * x), fan_in, fan_out, depth)


def test_rules_are_told_apart() -> None:
    def names(x: Tensor, fan_in: float, fan_out: float, **more: object) -> set[str]:
        return {rule.name for rule in matching_rules(recognize_law(x), fan_in, fan_out, **more)}  # type: ignore[arg-type]

    assert names(nn.Linear(256, 64).weight, 256, 64) == {"torch's default"}
    assert "torch's default of RNNs" in names(nn.LSTM(32, 128).weight_ih_l0[:128], 32, 128)
    relu, swapped = names(x := init.kaiming_normal_(torch.empty(64, 256)), 256, 64), names(x, 64, 256)
    assert "kaiming_normal_(fan_in, relu)" in relu and "kaiming_normal_(fan_in, relu)" not in swapped
    assert "kaiming_normal_(fan_out, relu)" in swapped
    gelu = init.normal_(torch.empty(512, 512), std=1.4814 / math.sqrt(512))
    assert names(gelu, 512, 512) == set() and names(gelu, 512, 512, activation="gelu") == {"kaiming for gelu"}
    lost = init.trunc_normal_(torch.empty(512, 512), std=1 / 16, a=-1 / 8, b=1 / 8)
    assert names(lost, 512, 512) == {
        f"kaiming_normal_({fan}, relu), cut at 2: std is 0.88 of it" for fan in ("fan_in", "fan_out")
    }
