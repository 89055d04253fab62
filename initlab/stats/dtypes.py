"""The table of number formats: their range, their precision, and how far rounding may move a sum.

It is plain numbers, so that it can be read without torch.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from initlab.errors import UsageError, choose, not_one_of, show

if TYPE_CHECKING:
    import torch


class NumberFormat(NamedTuple):
    """A binary floating-point format, as it is stored."""

    name: str
    torch_name: str
    eps: float  # distance from 1 to the next larger number
    max: float  # largest finite number
    tiny: float  # smallest normal number
    # Largest ||a - b|| / ||b|| that counts as rounding: of two ways to the same gradients, and of a loop that rounds
    # every partial sum. The half formats can tell 16 eps at best.
    tolerance: float
    loop_tolerance: float

    @property
    def least(self) -> float:
        """Smallest subnormal number."""
        return self.tiny * self.eps

    @property
    def octaves(self) -> tuple[int, int]:
        """floor(log2 |x|) of the smallest subnormal number and of the largest finite one."""
        return math.frexp(self.least)[1] - 1, math.frexp(self.max)[1] - 1

    @property
    def overflow_value(self) -> float:
        """Numbers from here on are rounded beyond the largest finite one, which ends half a unit above it."""
        return self.max + self.eps * 2.0 ** (self.octaves[1] - 1)

    @property
    def dtype(self) -> "torch.dtype":
        """The torch dtype of this format."""
        import torch

        found: torch.dtype = getattr(torch, self.torch_name)
        return found


_HALF, _BRAIN = 2.0**-10, 2.0**-7
_ROWS = (
    NumberFormat("float64", "float64", 2.0**-52, (2 - 2.0**-52) * 2.0**1023, 2.0**-1022, 1e-12, 1e-12),
    NumberFormat("float32", "float32", 2.0**-23, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 1e-5, 1e-5),
    NumberFormat("bfloat16", "bfloat16", _BRAIN, (2 - _BRAIN) * 2.0**127, 2.0**-126, 16 * _BRAIN, 2e-1),
    NumberFormat("float16", "float16", _HALF, (2 - _HALF) * 2.0**15, 2.0**-14, 16 * _HALF, 3e-2),
    NumberFormat("float8_e4m3", "float8_e4m3fn", 2.0**-3, 448.0, 2.0**-6, 2.0, 2.0),
    NumberFormat("float8_e5m2", "float8_e5m2", 2.0**-2, 57344.0, 2.0**-14, 4.0, 4.0),
)
FORMATS: dict[str, NumberFormat] = {row.name: row for row in _ROWS}
# The formats that networks compute in, in the order of the tables; the others are formats to store in.
DTYPES = ("float16", "bfloat16", "float32", "float64")


@lru_cache
def format_of(dtype: "str | torch.dtype", among: tuple[str, ...] = DTYPES) -> NumberFormat:
    """The row of a number format, given as its name or as torch's dtype; it must be one of the names `among`.

    >>> format_of("float16").max
    65504.0
    """
    name = dtype_name(dtype)
    if name not in among:
        raise not_one_of("dtype", name, among)
    return FORMATS[name]


def resolve_dtype(dtype: "str | torch.dtype") -> "torch.dtype":
    """The torch dtype that networks compute in, given as "float32" or as torch.float32."""
    return format_of(dtype_name(dtype)).dtype


def resolve_formats(formats: object) -> list[str]:
    """The names of number formats that were given as names or torch's dtypes, with or without their `fn`.

    >>> resolve_formats(["float16", "float8_e4m3fn"])
    ['float16', 'float8_e4m3']
    """
    if isinstance(formats, str) or not isinstance(formats, Sequence) or not formats:
        raise UsageError(f"formats={show(formats)}: must be a list of number formats, such as {list(FORMATS)[:2]}")
    names = [dtype_name(one) for one in formats]
    for name in names:
        choose(FORMATS, name, "formats")
    return list(dict.fromkeys(names))


def dtype_name(dtype: "str | torch.dtype") -> str:
    """The name of a number format in options and tables: torch.float32 is "float32"."""
    return (dtype if isinstance(dtype, str) else show(dtype)).removeprefix("torch.").removesuffix("fn")


def epsilon_of(names: Iterable[str]) -> float:
    """eps of the coarsest of some formats; float32 stands for names that are not known, and for no names."""
    return max((FORMATS.get(name, FORMATS["float32"]).eps for name in names), default=FORMATS["float32"].eps)
