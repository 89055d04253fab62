import pytest
import torch

from initlab.errors import UsageError
from initlab.stats.dtypes import DTYPES, FORMATS, NumberFormat, dtype_name, epsilon_of, format_of, resolve_dtype

ROWS = pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)


@ROWS
def test_formats_are_those_of_torch(row: NumberFormat) -> None:
    info = torch.finfo(row.dtype)
    assert (row.eps, row.max, row.tiny) == (info.eps, info.max, info.tiny)
    assert dtype_name(row.dtype) == row.name


@ROWS
def test_the_smallest_number_has_nothing_between_itself_and_zero(row: NumberFormat) -> None:
    def stored(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).to(row.dtype).double())

    assert stored(row.least) == row.least > 0
    assert stored(row.least / 4) == 0


@ROWS
def test_octaves_end_at_the_largest_and_the_smallest_number(row: NumberFormat) -> None:
    low, high = row.octaves
    assert row.least == 2.0**low and 2.0**high <= row.max < 2.0 ** (high + 0.9999) * 2


def test_a_dtype_is_a_name_or_an_object() -> None:
    for name in DTYPES:
        assert resolve_dtype(name) is resolve_dtype(getattr(torch, name)) is getattr(torch, name)
    with pytest.raises(UsageError, match=r"^dtype=float23: must be one of .* - did you mean float32\?$"):
        resolve_dtype("float23")
    with pytest.raises(UsageError, match="dtype=int64"):
        resolve_dtype(torch.int64)
    with pytest.raises(UsageError, match="dtype=float8_e5m2"):
        format_of("float8_e5m2")


def test_rounding_is_allowed_more_where_a_format_is_coarser() -> None:
    rows = [FORMATS[name] for name in ("float64", "float32", "float16", "bfloat16")]
    assert sorted(rows, key=lambda row: row.eps) == sorted(rows, key=lambda row: row.tolerance) == rows
    assert all(row.eps < row.tolerance <= row.loop_tolerance for row in rows)
    assert epsilon_of(["float64", "float16"]) == FORMATS["float16"].eps
    assert epsilon_of([]) == epsilon_of(["float23"]) == FORMATS["float32"].eps
