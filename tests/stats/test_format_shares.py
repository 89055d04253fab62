"""What formats would lose, from histograms alone, against the casts themselves; the loss scale against its opposite."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats.buffer import Item, StatsBuffer
from initlab.stats.dtypes import FORMATS, resolve_formats
from initlab.stats.format_shares import SHARES, BinTables, format_shares, spread_formats
from initlab.stats.keys import TensorKey
from initlab.stats.measure import backend_for

NARROW = [name for name in FORMATS if name not in ("float64", "float32")]


def tables(x: Tensor, direction: str = "backward") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables `histograms` and `stats` of one tensor (N, C)."""
    rows = StatsBuffer([0], backend_for(), histograms=True)
    rows.add([Item(TensorKey("probe", "module", 1, "weight", direction), x[None])], 0)
    found = rows.take_tables()
    return found["histograms"], found["stats"]


def draw(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(3)
    z = torch.randn(64, 128, generator=g)
    wide = torch.randn(64, 128, generator=g, dtype=torch.float64)
    return {
        "normal": z,
        "small": z * 1e-7,
        "large": z * 3e4,
        "lognormal": (z * 12).exp() * torch.where(z > 0, 1, -1),
        "wide": (wide * 80).exp(),
        "subnormal": z * 1e-40,
        "not finite": torch.where(z > 1, torch.inf, torch.where(z < -1, torch.nan, z * 1e5)),
        "zero": torch.zeros(4, 4),
        "all inf": torch.full((4, 4), torch.inf),
        "powers": (2.0 ** torch.arange(-150, 128).double()).float()[None],
        "ends": torch.tensor([[65504.0, 65519.0, 65520.0, 65536.0, 448.0, 464.0, 465.0, 57344.0, 61440.0, 2.0**-24]]),
    }[kind]


KINDS = [
    "normal", "small", "large", "lognormal", "wide", "subnormal", "not finite", "zero", "all inf", "powers", "ends",
]  # fmt: skip


def lost_by_cast(x: Tensor, name: str) -> Tensor:
    """Finite entries that a cast makes inf or nan, or in some versions of torch float8_e4m3's largest number."""
    one = FORMATS[name]
    cast, size = x.to(one.dtype).double(), x.double().abs()
    return size.isfinite() & (~cast.isfinite() | ((cast.abs() == one.max) & (size > one.overflow_value)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NARROW)
def test_shares_are_those_of_the_cast(kind: str, name: str) -> None:
    """Underflow and subnormal to the entry, but for those within half a unit of an end; overflow within its octave."""
    x, one = draw(kind), FORMATS[name]
    found = format_shares(*tables(x), [name]).iloc[0]
    cast, size = x.to(one.dtype).double(), x.double().abs()
    finite = size.isfinite()
    overflow = lost_by_cast(x, name).sum().item()
    underflow = (finite & (size > 0) & (cast == 0)).sum().item()
    subnormal = (finite & (cast != 0) & (cast.abs() < one.tiny)).sum().item()
    n = x.numel()
    assert found["overflow"] * n <= overflow + 1e-9
    assert found["overflow_most"] * n >= overflow - 1e-9
    tie = (size == one.least / 2).sum().item()  # halfway to the smallest number, rounded to the even 0
    rounded_up = ((size >= one.tiny * (1 - one.eps / 2)) & (size < one.tiny)).sum().item()
    assert underflow - found["underflow"] * n == pytest.approx(tie, abs=1e-9)
    assert found["subnormal"] * n - subnormal == pytest.approx(tie + rounded_up, abs=1e-9)
    in_octave = (size >= 2.0 ** one.octaves[1]) & (size < 2.0 ** (one.octaves[1] + 1))
    assert (found["overflow_most"] - found["overflow"]) * n <= in_octave.sum().item()


@pytest.mark.parametrize("name", NARROW)
def test_what_stays_inside_a_format_loses_nothing_and_four_times_its_end_loses_all(name: str) -> None:
    one = FORMATS[name]
    x = torch.rand(8, 16, dtype=torch.float64) + 1
    middle = 2.0 ** ((one.octaves[1] + np.log2(one.tiny)) // 2)
    inside, above, below = (format_shares(*tables(x * k), [name]).iloc[0] for k in (middle, 4 * one.max, one.least / 4))
    assert inside[list(SHARES)].tolist() == [0, 0, 0, 0]
    assert above["overflow"] == above["overflow_most"] == 1 and above["underflow"] == above["subnormal"] == 0
    assert below["underflow"] == 1 and below["overflow_most"] == below["subnormal"] == 0


def test_a_power_of_two_moves_the_shares_between_formats() -> None:
    """float16 and float8_e5m2 end at the same octaves above, and two and twenty-four octaves below one another."""
    x = draw("lognormal")
    a, b = (format_shares(*tables(x), [name]).iloc[0] for name in ("float16", "float8_e5m2"))
    shifted = format_shares(*tables(x.double() * 2.0**-8), ["float16"]).iloc[0]
    assert a["underflow"] < b["underflow"]  # 2^-24 against 2^-16
    assert shifted["underflow"] == b["underflow"]


def test_rows_keep_their_keys_and_formats_their_order() -> None:
    octaves, frame = tables(draw("normal"))
    found = format_shares(octaves, frame, ["float16", "bfloat16"])
    assert found["format"].tolist() == ["float16", "bfloat16"] and found["layer"].tolist() == [1, 1]
    wide = spread_formats(frame, found)
    assert wide["float16_subnormal"].iloc[0] == found["subnormal"].iloc[0] and len(wide) == len(frame)
    assert len(format_shares(octaves[:0], frame[:0], ["float16"])) == 0


def count(counts: BinTables, x: Tensor, direction: str = "backward") -> None:
    octaves, frame = tables(x, direction)
    counts.add(octaves, lambda: frame)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 6e4, 1e9])
@pytest.mark.parametrize("name", NARROW)
def test_the_loss_scale_saves_all_and_twice_as_much_does_not(size: float, name: str) -> None:
    x, one = draw("normal").double() * size, FORMATS[name]
    gradients = BinTables(False, ["float16"])
    count(gradients, x)
    found = gradients.find_scale(name)
    assert np.log2(found.scale) % 1 == 0
    assert not lost_by_cast(x * found.scale, name).any()
    if found.scale < 2.0**126:
        assert lost_by_cast(2 * x * found.scale, name).any()
    left = ((x * found.scale).to(one.dtype).double() == 0).double().mean().item()
    assert found.underflow == pytest.approx(left, abs=1e-9)
    assert found.underflow_without == pytest.approx((x.to(one.dtype).double() == 0).double().mean().item(), abs=1e-9)
    assert f"2^{np.log2(found.scale):.0f}" in str(found) and "weight at step 0" in str(found)


def test_gradients_of_several_steps_are_one_range_and_values_are_none() -> None:
    gradients, both = BinTables(False, ["float16"]), BinTables(False, ["float16"])
    for x in (draw("normal") * 1e-3, draw("normal")):
        count(gradients, x)
    count(both, torch.cat([draw("normal") * 1e-3, draw("normal")]))
    assert gradients.find_scale()[:3] == both.find_scale()[:3]
    assert gradients.find_scale().underflow == pytest.approx(both.find_scale().underflow, rel=1e-12)
    values = BinTables(False, ["float16"])
    count(values, draw("normal"), "forward")
    for nothing in ("zero", "all inf"):
        count(values, draw(nothing))
    assert np.isnan(values.find_scale().scale) and "no gradient was recorded" in str(values.find_scale())


@pytest.mark.parametrize(
    ("formats", "text"),
    [
        (["float15"], "formats=float15: must be one of .* did you mean float16"),
        ("float16", "formats='float16': must be a list of number formats"),
        ([torch.int8], "formats=int8: must be one of"),
        (3, "formats=3: must be a list"),
    ],
)
def test_a_bad_format_is_one_line(formats: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        resolve_formats(formats)


def test_formats_are_names_or_torchs_dtypes() -> None:
    assert resolve_formats([torch.float16, "float8_e4m3fn", "float16"]) == ["float16", "float8_e4m3"]


# -- several tensors in one table, and what is kept of them


def several(*layers: Tensor, direction: str = "backward") -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = StatsBuffer([0], backend_for(), histograms=True)
    rows.add([Item(TensorKey("probe", "module", k, "weight", direction), x[None]) for k, x in enumerate(layers, 1)], 0)
    found = rows.take_tables()
    return found["histograms"], found["stats"]


def test_tensors_of_one_table_are_each_alone_and_formats_follow_each() -> None:
    layers = [draw("normal") * 1e-6, draw("large"), draw("normal")]
    found = format_shares(*several(*layers), ["float16", "bfloat16"])
    assert found["layer"].tolist() == [1, 1, 2, 2, 3, 3] and found["format"].tolist() == ["float16", "bfloat16"] * 3
    assert "index" not in found and found.index.tolist() == list(range(6))
    for k, x in enumerate(layers):
        alone = format_shares(*tables(x), ["float16", "bfloat16"])
        assert found[2 * k : 2 * k + 2][list(SHARES)].to_numpy().tolist() == alone[list(SHARES)].to_numpy().tolist()
    octaves, frame = several(*layers)
    wide = spread_formats(frame, format_shares(octaves, frame, ["float16", "bfloat16", "float8_e5m2"]))
    columns = [name.rpartition("_")[0] for name in wide if name.endswith("_subnormal") and name != "n_subnormal"]
    assert columns == ["float16", "bfloat16", "float8_e5m2"]  # in the order in which they were asked for


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_octave_that_a_formats_end_cuts_counts_one_entry_at_least(sign: float) -> None:
    """65520 rounds to inf in float16 and 65519 does not; both lie in the octave of its largest number."""
    for last, least in ((65520.0, 0.25), (65519.0, 0.0)):
        found = format_shares(*tables(sign * torch.tensor([[1.0, 40000.0, 50000.0, last]])), ["float16"]).iloc[0]
        assert (found["overflow"], found["overflow_most"]) == (least, 0.75 if least else 0.0)
    beyond = format_shares(*tables(sign * torch.tensor([[1.0, 40000.0, 2.0**16, 2.0**17]])), ["float16"]).iloc[0]
    assert (beyond["overflow"], beyond["overflow_most"]) == (0.5, 0.75)


def test_the_largest_gradient_is_the_largest_of_both_signs_and_of_all_steps() -> None:
    gradients = BinTables(False, ["float16"])
    for x in (torch.tensor([[1.0, -8.0]]), torch.tensor([[3.0, 2.0]])):
        count(gradients, x)
    assert gradients.find_scale().largest == 8.0
    nothing = BinTables(False, ["float16"])
    count(nothing, draw("zero"))
    assert nothing.find_scale().where == ""
    count(nothing, draw("all inf"))
    assert np.isnan(nothing.find_scale().scale)


def test_a_loss_scale_says_both_shares_in_percent() -> None:
    """Of eight entries seven become 0 without a scale, one with it: the largest allows 2^15, the least is 2^-60."""
    gradients = BinTables(False, ["float16"])
    count(gradients, torch.tensor([[1.0, *[2.0**-30] * 6, 2.0**-60]]))
    said = str(gradients.find_scale())
    assert "does not overflow, and 12 % of the entries become 0 (88 % without a scale)" in said
    assert said.startswith("float16: multiply the loss by 2^15 = 32768: the largest gradient, 1 of weight at step 0, ")


def test_tables_are_kept_until_they_are_taken_and_only_where_they_were_asked_for() -> None:
    kept, counted = BinTables(True, []), BinTables(False, ["float16"])
    for x in (draw("normal"), draw("large")):
        count(kept, x)
        count(counted, x)
    assert len(kept.histograms()) == 2
    count(kept, draw("normal"))
    assert len(kept.histograms()) == 1  # since they were taken
    assert counted.shares()["overflow"].tolist() == [
        format_shares(*tables(draw(kind)), ["float16"])["overflow"].item() for kind in ("normal", "large")
    ]
    with pytest.raises(UsageError, match=r"^histograms: none were recorded; ask for them with histograms=True$"):
        counted.histograms()
    for ask in (kept.shares, kept.find_scale):
        with pytest.raises(UsageError, match=r"^formats: none were asked for; ask with formats=\['float16'\]$"):
            ask()


def test_what_was_forgotten_is_known_to_be_lost() -> None:
    tables_of, never = BinTables(True, ["float16"]), BinTables(True, ["float16"])
    assert tables_of.has_lost is False
    tables_of.forget()
    assert not tables_of.has_lost  # there was nothing
    count(tables_of, draw("normal"))
    tables_of.forget()
    assert tables_of.has_lost and not never.has_lost
    count(tables_of, draw("normal"))
    assert len(tables_of.shares()) == 1 and len(tables_of.histograms()) == 1
