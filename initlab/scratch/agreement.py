"""Compare two results of a backward pass: relative error per tensor, and units in the last place.

An absolute tolerance of 0.01 passes a gradient of zeros wherever gradients are small; the relative error of zeros is 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats.dtypes import format_of
from initlab.stats.summarize import relative_error


class Difference(NamedTuple):
    """One tensor of two results. `ulp` counts in units of the tensor's largest entry, `ulp_own` in each entry's own.

    An entry that cancels to nearly 0 has a tiny unit: `ulp_own` may then be large where nothing is wrong.
    """

    layer: int
    tensor: str  # loss, weight or bias
    relative_error: float
    ulp: float
    ulp_own: float
    n_nonfinite: int


class Agreement(NamedTuple):
    """All tensors of two results and the limit; `str()` says in a sentence whether they are equal up to rounding."""

    rows: list[Difference]
    limit: float

    @property
    def worst(self) -> Difference:
        """The tensor that is farthest off; one that is not finite comes before all others."""
        return max(self.rows, key=lambda row: (row.n_nonfinite, row.relative_error))

    @property
    def relative_error(self) -> float:
        return self.worst.relative_error

    @property
    def ulp(self) -> float:
        return max(row.ulp for row in self.rows)

    @property
    def equal(self) -> bool:
        return self.relative_error <= self.limit

    def __str__(self) -> str:
        worst = self.worst
        where = "loss" if worst.tensor == "loss" else f"{worst.tensor} of layer {worst.layer}"
        if worst.n_nonfinite:
            return f"not comparable: {worst.n_nonfinite} entries of {where} are not finite"
        if all(row.relative_error == 0 for row in self.rows):
            return "equal bit for bit"
        text = f"relative error at most {worst.relative_error:.1e} (limit {self.limit:.0e})"
        if self.equal:
            return f"equal up to rounding: {text}, at most {self.ulp:.3g} units in the last place"
        return f"different: {where} has relative error {worst.relative_error:.1e} (limit {self.limit:.0e})"


Result = tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]


def compare(found: Result, reference: Result) -> Agreement:
    """Two (loss, [(w.g, b.g), ...]) of one network, tensor by tensor; layer 0 is the loss."""
    (loss, pairs), (wanted, references) = found, reference
    if len(pairs) != len(references):
        raise UsageError(f"compare: {len(pairs)} layers beside {len(references)}: must be as many")
    rows = [_difference(0, "loss", loss, wanted)]
    for layer, (pair, others) in enumerate(zip(pairs, references, strict=True), start=1):
        rows += [_difference(layer, *both) for both in zip(("weight", "bias"), pair, others, strict=True)]
    return Agreement(rows, format_of(wanted.dtype).tolerance)


def _difference(layer: int, tensor: str, a: Tensor, b: Tensor) -> Difference:
    if a.shape != b.shape or a.dtype != b.dtype:
        given = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (a, b)]
        raise UsageError(f"compare: {tensor} of layer {layer} is {given[0]} beside {given[1]}: must be the same")
    flat_a, flat_b = (t.detach().reshape(1, -1) for t in (a, b))
    error, n_bad = relative_error(flat_a, flat_b)
    gap = (flat_a.double() - flat_b.double()).abs()
    ulp, own = (float((gap / unit_in_last_place(unit)).amax()) for unit in (flat_b.abs().amax(), flat_b))
    return Difference(layer, tensor, float(error), ulp, own, int(n_bad))


def unit_in_last_place(x: Tensor) -> Tensor:
    """eps 2^floor(log2 |x|) of x's own dtype, as float64; below the normal numbers the smallest subnormal."""
    info = torch.finfo(x.dtype)
    wide = x.double()
    unit = torch.ldexp(torch.full_like(wide, info.eps), torch.frexp(wide).exponent - 1)
    return torch.where(wide == 0, 0.0, unit).clamp_min(info.tiny * info.eps)  # frexp gives 0 the exponent of 1/2
