"""Which law the numbers of a tensor were drawn from, told from the numbers alone.

What has a structure is told by it: a constant, an identity, an orthogonal matrix, a sparse one. Everything else is told
by the shape of its distribution (families.py). Numbers that fit no law are `other`, and where two laws fit they are
`too few to tell`: an answer is given where it is certain.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from initlab.errors import UsageError, show
from initlab.models.families import CUT, NORMAL, OTHER, UNIFORM, UNKNOWN, FamilyFit, fit_law
from initlab.probes.probed_modules import describe_output, measurable
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS

CONSTANT, IDENTITY, ORTHOGONAL, SPARSE = "constant", "identity", "orthogonal", "sparse"
LAWS = (NORMAL, UNIFORM, CUT, ORTHOGONAL, CONSTANT, IDENTITY, SPARSE, OTHER, UNKNOWN)

SAMPLE = 2**16  # numbers that the shape of a distribution is told by
VECTORS = 64  # rows, or columns, whose products tell an orthogonal matrix
NEAR_ORTHOGONAL = 0.02  # of what the products are for random numbers: rounding to bfloat16 gives 0.004
CHANCE = 1e-9  # of random numbers being so near to orthogonal
NEAR_IDENTITY = 0.01  # of the diagonal
FEW = 4096
SOME_ZEROS = 2e-3  # more than rounding gives
FINE = 1e-35  # below, float32 has few numbers
DISTINCT = 200  # fewer numbers than these, drawn again and again, are no sample of a density


class WeightLaw(NamedTuple):
    """The law that the numbers of a tensor follow.

    name: one of LAWS. mean, std: of all its finite numbers. std_error: the standard error of std under this law. low,
    high: the least and the largest number; of `uniform` and `cut normal` the ends. nominal_mean, nominal_std: of the
    normal density before it was cut, the same as mean and std for `normal`; what is set by `std=` in torch. scale: what
    an orthogonal matrix or an identity is multiplied by. zeros: the share of numbers that are 0. size: how many
    there are in all. note: why it has no name, or what is not finite. Numbers that do not apply are nan.
    """

    name: str
    mean: float = math.nan
    std: float = math.nan
    std_error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    nominal_mean: float = math.nan
    nominal_std: float = math.nan
    scale: float = math.nan
    zeros: float = math.nan
    size: int = 0
    note: str = ""

    @property
    def kept_std(self) -> float:
        """std over nominal_std: what is left of the standard deviation after a cut; 0.88 for a cut at 2."""
        return self.std / self.nominal_std if self.nominal_std else math.nan


def recognize_law(values: Tensor) -> WeightLaw:
    """The law that the numbers of a tensor were drawn from.

    values: of any shape; a matrix as torch stores it, (fan_out, fan_in, ...), can be orthogonal or an identity. All of
    its numbers count for mean, std and ends, a fixed selection of 2^16 for the shape of the distribution. Numbers of
    half precision, and weights that have moved by a thousandth of their std, have the law that they had.
    Errors: no tensor. What has no numbers, or others than floats, is `other` with a note.

    >>> law = recognize_law(torch.nn.init.trunc_normal_(torch.empty(256, 128)))
    >>> law.name, round(law.kept_std, 2)
    ('cut normal', 0.88)
    """
    if not isinstance(values, Tensor):
        raise UsageError(f"values={show(values)}: must be a tensor")
    if is_lazy(values):
        return WeightLaw(OTHER, note="not initialized yet: its shape is known after the first call")
    x = values.detach()
    if x.layout is torch.strided and not (x.is_meta or x.is_complex() or x.is_quantized) and not measurable(x):
        x = x.double()  # integers, and formats to store in
    if x.is_complex() or not measurable(x):
        return WeightLaw(OTHER, note=describe_output(values.data))
    found = dict(zip(STATISTICS, measure(x.reshape(1, -1), batched=False).tolist(), strict=True))
    ends = {"low": found["min"], "high": found["max"], "zeros": found["frac_zero"]}
    law = WeightLaw(OTHER, found["mean"], found["std"], **ends, size=x.numel())
    if found["n_nan"] or found["n_inf"]:
        counts = (f"{found[key]:.0f} {key[2:]}" for key in ("n_nan", "n_inf") if found[key])
        return law._replace(note=", ".join(counts))
    return _tell(x, law)


def _tell(x: Tensor, law: WeightLaw) -> WeightLaw:
    """The law of finite numbers whose mean, std and ends are known."""
    if law.low == law.high:
        drawn = x.numel() == 1 and law.low not in (0, 1)
        return law._replace(name=UNKNOWN if drawn else CONSTANT, std_error=0.0, note="1 number" if drawn else "")
    largest = law.high if law.high > -law.low else law.low
    # An identity has at least one number of the largest size, and at most one in each row.
    ones = x.numel() * ((law.std / largest) ** 2 + (law.mean / largest) ** 2)
    if 0.97 < ones < 1.03 * len(x) and (scale := find_identity(x, largest)) is not None:
        return law._replace(name=IDENTITY, scale=scale, std_error=0.0)
    if (scale := find_orthogonal(x.reshape(len(x), -1))) is not None:
        return law._replace(name=ORTHOGONAL, scale=scale, std_error=0.0)
    sample = choose_sample(x)
    if law.zeros > SOME_ZEROS and x.ndim == 2 and len(x) > 1:
        zeros = (x == 0).sum(0)
        inner = sample[sample != 0]
        n = int(x.numel() * (1 - law.zeros) + 0.5)
        # As many in every column; float32 normal numbers are 0 themselves once in 2^24.
        if int((zeros - zeros.min()).sum()) <= min(4, len(zeros) // 8) and int(zeros.min()) and len(inner):
            fit = fit_law(inner, law.low, law.high, n)
            if fit.name == UNKNOWN:
                return law._replace(name=UNKNOWN, note=fit.note)
            if fit.name == NORMAL:
                error = law.std / math.sqrt(2 * n)
                return law._replace(name=SPARSE, nominal_mean=fit.mean, nominal_std=fit.std, std_error=error)
    few = sample[:FEW]
    distinct = len(np.unique(few.numpy()))
    is_fine = x.dtype.itemsize > 2 and law.std > FINE  # all numbers are different then
    if distinct < (0.8 * len(few) if is_fine else min(DISTINCT, len(few) / 4)):
        return law._replace(note=f"{distinct} different numbers of {len(few)}")
    fit = fit_law(sample, law.low, law.high, x.numel())
    if law.zeros > SOME_ZEROS and fit.name in (NORMAL, UNIFORM, CUT):
        fit = FamilyFit(OTHER, kurtosis=fit.kurtosis, note=f"{fit.name} beside {law.zeros:.2g} of zeros")
    nominal = (law.mean, law.std) if fit.name == NORMAL else (fit.mean, fit.std)
    error = law.std * math.sqrt(max(fit.kurtosis - 1, 0) / (4 * x.numel()))
    return law._replace(name=fit.name, std_error=error, nominal_mean=nominal[0], nominal_std=nominal[1], note=fit.note)


def choose_sample(x: Tensor) -> Tensor:
    """All numbers, or SAMPLE of them at places that depend on their count alone, float64 on the CPU."""
    flat = x.reshape(-1)
    if flat.numel() > SAMPLE:
        places = torch.randint(flat.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(flat.numel()))
        flat = flat[places.to(flat.device)]
    return flat.double().cpu()


def find_identity(x: Tensor, largest: float) -> float | None:
    """What `eye_` or `dirac_` is multiplied by, if the tensor is one of these, also in groups and slightly moved."""
    if not 2 <= x.ndim <= 5 or (x.ndim == 2 and min(x.shape) < 2):
        return None
    rows, columns = x.shape[:2]
    square = x.double() / largest
    for size in x.shape[2:]:  # the numbers in the middle of the kernels
        square = square.select(2, size // 2)
    ones = int((square.abs() > 0.5).sum())
    # A group of rows / groups has min(rows / groups, columns) ones.
    groups = [g for g in range(1, rows + 1) if rows % g == 0 and g * min(rows // g, columns) == ones]
    if not groups or int((x.abs() > abs(largest) / 2).sum()) != ones:
        return None
    for count in groups[:: 1 if x.ndim > 2 else len(groups)]:
        number = torch.arange(rows, device=x.device) % (rows // count)
        pattern = (number[:, None] == torch.arange(columns, device=x.device)).double()
        outside = x.double().square().sum() / largest**2 - square.square().sum()
        error = math.sqrt(max(0.0, float(((square - pattern).square().sum() + outside) / x.numel())))
        if error < NEAR_IDENTITY / math.sqrt(max(rows, columns)):
            return largest * float((square * pattern).sum() / pattern.sum())
    return None


def find_orthogonal(matrix: Tensor) -> float | None:
    """What a matrix with orthonormal rows or columns is multiplied by, if the matrix is one."""
    vectors = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
    count, size = vectors.shape
    if count < 2:
        return None
    chosen = torch.linspace(0, count - 1, min(count, VECTORS), device=matrix.device).round().long()
    some = vectors[chosen].double()
    products = some @ some.mT
    lengths = products.diagonal()
    square = float(lengths.mean())
    if not square > 0:
        return None
    number = len(some)
    off = products - torch.diag(lengths)
    angle = math.sqrt(float(off.square().sum()) / (number * (number - 1)) * size) / square
    spread = math.sqrt(float((lengths - square).square().mean()) * size / 2) / square
    nearest = min(NEAR_ORTHOGONAL, CHANCE ** (1 / (number * (number + 1) / 2 - 1)))
    return math.sqrt(square) if max(angle, spread) < nearest else None
