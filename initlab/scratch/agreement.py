"""Compare the gradients of two backward passes, tensor by tensor, and say why they differ where a cause fits.

An absolute tolerance of 0.01 passes a gradient of zeros wherever gradients are small; the relative error of zeros is 1.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn

from initlab.errors import UsageError, check, library_call, show
from initlab.stats.dtypes import DTYPES, format_of
from initlab.stats.summarize import relative_error
from initlab.terminal import text_as_html

Gradients: TypeAlias = nn.Module | Mapping[str, Tensor] | Sequence[Any] | Tensor


class Difference(NamedTuple):
    """One tensor of two results. `ulp` counts in units of the tensor's largest entry, `ulp_own` in each entry's own.

    An entry that cancels to nearly 0 has a tiny unit: `ulp_own` may then be large where nothing is wrong. The relative
    error of tensors of different shapes is inf.
    """

    name: str
    relative_error: float
    ulp: float
    ulp_own: float
    n_nonfinite: int
    limit: float
    cause: str


class Agreement(NamedTuple):
    """All tensors of two results; `str()` says whether they are equal up to rounding, and if not why, where it can."""

    rows: list[Difference]

    def _repr_html_(self) -> str:
        return text_as_html(self)

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

    def find_different(self) -> list[Difference]:
        """The tensors that are not equal up to rounding, in their order."""
        return [row for row in self.rows if not row.relative_error <= row.limit]

    @property
    def equal(self) -> bool:
        return not self.find_different()

    def frame(self) -> pd.DataFrame:
        """A row for each tensor: `name, relative_error, ulp, ulp_own, n_nonfinite, limit, cause`."""
        return pd.DataFrame(self.rows, columns=list(Difference._fields))

    def __str__(self) -> str:
        if all(row.relative_error == 0 for row in self.rows):
            return "equal bit for bit"
        worst = self.worst
        if self.equal:
            text = f"relative error at most {worst.relative_error:.1e} (limit {worst.limit:.0e})"
            return f"equal up to rounding: {text}, at most {self.ulp:.3g} units in the last place"
        count = f"different: {len(self.find_different())} of {len(self.rows)} tensors"
        lines = [
            f"  {row.name}: relative error {row.relative_error:.1e} (limit {row.limit:.0e})"
            for row in self.find_different()
        ]
        causes = [f"; {row.cause}" if row.cause else "" for row in self.find_different()]
        return "\n".join([count, *map("".join, zip(lines, causes, strict=True))])


@library_call
def compare_gradients(yours: Gradients, reference: Gradients, batch: int | None = None) -> Agreement:
    """Compare gradients that you computed with those of a reference, and name the mistake where one fits.

    yours, reference: an nn.Module after `backward()`, whose parameters' `.grad` are taken; a dict of tensors by name; a
    sequence of tensors, or of pairs (weight's, bias's) with one for each layer; (loss, such pairs); or a tensor.
    batch: how many rows the batch had; a factor of that size is then called a sum for a mean.

    The relative error is ||yours - reference|| / ||reference||, the limit the number format's. Causes: a constant
    factor, a sign, a sum for a mean, a transpose, zeros, rows that were forgotten or are wrong, entries not finite.
    Errors: other names on one side, something that holds no tensors, a module without gradients.

    >>> print(compare_gradients({"w": torch.ones(3, 2)}, {"w": 2 * torch.ones(3, 2)}))
    different: 1 of 1 tensors
      w: relative error 5.0e-01 (limit 1e-05); 0.5 times the reference: a lost factor 2, as of a square
    """
    if batch is not None:
        check(batch=batch)
    found, wanted = dict(_name_tensors(yours, "yours")), dict(_name_tensors(reference, "reference"))
    for one, other, text in ((wanted, found, "yours has no"), (found, wanted, "the reference has no")):
        missing = [name for name in one if name not in other]
        if missing:
            raise UsageError(f"compare_gradients: {text} {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}")
    if not wanted:
        raise UsageError("compare_gradients: there is no tensor to compare")
    return Agreement([_compare_pair(name, found[name], wanted[name], batch) for name in wanted])


def _name_tensors(given: Gradients, side: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors with their names."""
    if isinstance(given, nn.Module):
        without = [name for name, p in given.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise UsageError(f"compare_gradients: {side}: {without[0]} has no gradient; call loss.backward() first")
        yield from ((name, p.grad) for name, p in given.named_parameters() if p.grad is not None)
    elif isinstance(given, Mapping):
        yield from ((str(name), _check_tensor(value, side)) for name, value in given.items())
    elif isinstance(given, Tensor):
        yield "gradient", given
    elif isinstance(given, Sequence) and not isinstance(given, str):
        pairs = given
        if len(given) == 2 and isinstance(given[0], Tensor) and isinstance(given[1], Sequence):
            yield "loss", given[0]
            pairs = given[1]
        for layer, pair in enumerate(pairs, start=1):
            if isinstance(pair, Tensor):
                yield f"tensor {layer}", pair
                continue
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise UsageError(f"compare_gradients: {side}: {show(pair)}: must be a tensor or a pair of tensors")
            for name, value in zip(("weight", "bias"), pair, strict=True):
                yield f"{name} of layer {layer}", _check_tensor(value, side)
    else:
        raise UsageError(f"compare_gradients: {side}={show(given)}: must be a module, a dict, a sequence or a tensor")


def _check_tensor(value: object, side: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(f"compare_gradients: {side}: {show(value)}: must be a tensor")
    return value


def _compare_pair(name: str, a: Tensor, b: Tensor, batch: int | None) -> Difference:
    limit = max(format_of(t.dtype, tuple(DTYPES)).tolerance for t in (a, b))
    a, b = (t.detach().to("cpu") for t in (a, b))
    if a.shape != b.shape:
        shapes = f"shape {tuple(a.shape)} where the reference has {tuple(b.shape)}"
        if a.ndim == 2 and a.mT.shape == b.shape:
            shapes += ": the transpose" if _measure_error(a.mT, b) <= limit else ": transposed, and other numbers"
        elif a.numel() == b.numel() and _measure_error(a.reshape(b.shape), b) <= limit:
            shapes += ": the same numbers"
        return Difference(name, math.inf, math.inf, math.inf, 0, limit, shapes)
    flat_a, flat_b = (t.reshape(1, -1) for t in (a, b))
    error, n_bad = relative_error(flat_a, flat_b)
    gap = (flat_a.double() - flat_b.double()).abs()
    ulp, own = (float((gap / unit_in_last_place(unit)).amax()) for unit in (flat_b.abs().amax(), flat_b))
    cause = "" if error <= limit else _find_cause(a.double(), b.double(), limit, batch)
    return Difference(name, float(error), ulp, own, int(n_bad), limit, cause)


def _measure_error(a: Tensor, b: Tensor) -> float:
    return float(relative_error(a.reshape(1, -1), b.reshape(1, -1))[0])


def _find_cause(a: Tensor, b: Tensor, limit: float, batch: int | None) -> str:
    """What was done to b that makes a of it, where that is one simple thing; "" else."""
    a, b = (x.reshape(1) if x.ndim == 0 else x for x in (a, b))
    for text, x in (("yours", a), ("the reference", b)):
        bad = int((~x.isfinite()).sum())
        if bad:
            return f"{bad} entries of {text} are not finite"
    if not bool(a.any()):
        return "yours is 0: it was never written, or the graph is cut before it"
    if not bool(b.any()):
        return "the reference is 0"
    ratio = float((a * b).sum() / b.square().sum())
    if _measure_error(a, ratio * b) <= limit:
        return f"{ratio:.6g} times the reference{_explain_factor(ratio, limit, batch)}"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and _measure_error(a.mT, b) <= limit:
        return "the transpose of the reference"
    rows_a, rows_b = (x.reshape(len(x), -1) for x in (a, b))
    wrong = ((rows_a - rows_b).norm(dim=-1) > limit * b.norm()).nonzero().flatten()
    if len(wrong) < len(a) and len(wrong) <= max(1, len(a) // 2):
        which = ", ".join(map(str, wrong[:3].tolist())) + " ..." * (len(wrong) > 3)
        kind = "0" if not bool(rows_a[wrong].any()) else "wrong"
        return f"{len(wrong)} of {len(a)} rows are {kind} (row {which}), the others right"
    return ""


def _explain_factor(ratio: float, limit: float, batch: int | None) -> str:
    """What a constant factor usually comes from."""
    size = abs(ratio)
    sign = ": the sign" if ratio < 0 and math.isclose(size, 1, rel_tol=limit) else ""
    if batch and batch > 1 and math.isclose(size, batch, rel_tol=limit):
        return f": a sum over the batch of {batch} for a mean"
    if batch and batch > 1 and math.isclose(size, 1 / batch, rel_tol=limit):
        return f": a mean over the batch of {batch} for a sum, or a mean taken twice"
    if math.isclose(size, 2, rel_tol=limit):
        return ": a factor 2 too many, or two passes added up without zeroing"
    if math.isclose(size, 0.5, rel_tol=limit):
        return ": a lost factor 2, as of a square"
    whole = round(size) if size > 1 else round(1 / size)
    if whole > 2 and math.isclose(size, whole if size > 1 else 1 / whole, rel_tol=limit):
        return f": a {'sum for a mean' if size > 1 else 'mean for a sum'} over {whole}?"
    return sign


def unit_in_last_place(x: Tensor) -> Tensor:
    """eps 2^floor(log2 |x|) of x's own dtype, as float64; below the normal numbers the smallest subnormal."""
    info = torch.finfo(x.dtype)
    wide = x.double()
    unit = torch.ldexp(torch.full_like(wide, info.eps), torch.frexp(wide).exponent - 1)
    return torch.where(wide == 0, 0.0, unit).clamp_min(info.tiny * info.eps)  # frexp gives 0 the exponent of 1/2
