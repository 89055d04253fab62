"""Where rows of statistics come from: one object for each device, and this one in plain PyTorch for all of them.

Whoever wants rows asks `backend_for(device)` (measure.py) once and then its backend: it knows whether there are
compiled passes and which tensors they take. A method whose name ends in `_` changes a tensor in place and gives the
rows of what it was and became; a backend that can do so in one reading of memory (`fuses`) does.

    backend = backend_for(z.device)
    backend.activation_rows(z, activation, a, rows)     # a becomes phi(z); rows (2, ..., F): of z, and of phi(z)
    backend.gradient_rows(g, z, activation, dz, rows)   # dz becomes dL/dz, from g = dL/dphi; rows (2, ..., F)
    values = derive(rows.movedim(-1, 0))                # (S, 2, ...)

With statistics of the user rows are (F + M, ...): their M results stand behind the fields.
Legend: E networks, N batch, C units, F fields, M functions of the user, K rows.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from initlab.errors import UsageError, describe_error
from initlab.stats.histogram import Bins, histogram, octaves
from initlab.stats.reference import BLOCK, FIELDS
from initlab.stats.statistics import Function, checked_statistics
from initlab.stats.summarize import derive, relative_error, summarize
from initlab.stats.workspace import AT_ONCE

COUNT, N_NAN, N_ZERO, SATURATED = (list(FIELDS).index(name) for name in ("count", "n_nan", "n_zero", "saturated"))


class Elementwise(Protocol):
    """What a backend asks of an activation: a row of the table in nn/activations.py has it all."""

    @property
    def phi(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def rectifies(self) -> bool:
        """Whether phi(z) is max(z, 0)."""

    def pull_back(self, grad: Tensor, z: Tensor) -> Tensor: ...
    def saturated_share(self, z: Tensor) -> Tensor: ...


class Backend:
    """Rows in plain PyTorch, for tensors of any float format on any device; on a CPU right to 1e-6, see summarize.py.

    `statistics` are functions of the user by name. All methods take `bins`, which gets the histograms of the rows in
    their order, made by the method `bins`, and `out`, float64 memory (..., F + M) or (K, ..., F + M) that gets the rows
    and is given back: nothing is allocated then. Tensors (..., N, C) have the same leading dimensions throughout.
    """

    def __init__(self, statistics: Mapping[str, Function] | None = None) -> None:
        self.statistics = checked_statistics(statistics)

    def fuses(self, x: Tensor) -> bool:
        """Whether a pass over a tensor like x and its rows cost one reading of memory."""
        return False

    def is_quick(self, x: Tensor) -> bool:
        """Whether the row of a tensor like x costs little by itself; else small ones are better measured together."""
        return False

    def bins(self, networks: int) -> Bins:
        """A collector for the histograms of rows of so many networks."""
        return Bins(networks)

    def rows(
        self,
        x: Tensor,
        batched: bool = True,
        bins: Bins | None = None,
        out: Tensor | None = None,
        part_of: Tensor | None = None,
    ) -> Tensor:
        """The row of x (..., N, C) over its last two dimensions: float64 (F + M, ...).

        `batched` says that N counts inputs; else what needs a batch is nan. `part_of`: the row of a tensor with the
        same entries or 0; plain PyTorch then looks for less. Nothing waits for a GPU.
        """
        with torch.autocast(x.device.type, enabled=False):
            return into(out, self._with_custom(summarize(x, batched, True, part_of), x, bins))

    def rows_of_each(self, tensors: Sequence[Tensor], bins: Bins | None = None, batched: bool = False) -> Tensor:
        """The rows of tensors of one network, of any shapes: (F + M, K).

        batched: whether they are (N, C) and N counts inputs. Else they are parameters: the user's functions see them as
        matrices (O, rest), a vector as one row.
        """
        groups = groupby(tensors, lambda x: (x.shape, x.dtype, x.device))  # neighbours of one shape: together
        stacked = (torch.stack([as_matrix(x) for x in group]) for _, group in groups)
        return torch.cat([self.rows(x, batched, bins) for x in stacked], 1)

    def compare_each(self, tensors: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
        """How far tensors are from others of their shapes, (2, K) in float64.

        ||a - b|| / ||b||, nan where anything is not finite, and how many entries of either are not.
        """

        def kind(k: int) -> tuple[object, ...]:  # so many together as a cache holds, or a GPU keeps busy
            x = tensors[k]
            return x.shape, x.dtype, x.device, k * x.numel() // (AT_ONCE if x.is_cpu else BLOCK["cuda"])

        found = []
        for _, places in groupby(range(len(tensors)), kind):
            some = list(places)
            ours, theirs = (torch.stack([as_matrix(side[k]) for k in some]) for side in (tensors, references))
            error, n_bad = relative_error(ours, theirs)
            found.append(torch.stack([error, n_bad.double()]))
        return torch.cat(found, 1)

    def change_rows_(self, before: Sequence[Tensor], tensors: Sequence[Tensor], bins: Bins | None = None) -> Tensor:
        """Each of `before`, earlier values of the tensors, becomes the change since then; the rows of these (F + M, K).

        As in `rows_of_each` there is no batch. Changes of half precision numbers are those of their values: the row is
        that of float32, which holds them, and `before` stays.
        """
        changes = [
            x.float() - old.float() if x.itemsize < 4 else torch.sub(x, old, out=old)
            for old, x in zip(before, tensors, strict=True)
        ]
        return self.rows_of_each(changes, bins)

    def relu_rows_(self, z: Tensor, bins: Bins | None = None, out: Tensor | None = None) -> Tensor:
        """z becomes max(z, 0), nan kept; rows (F + M, 2, ...) of z, with its saturated share, and of what it became."""
        before = self.rows(z, True, bins)
        after = self.rows(z.relu_(), True, bins, None, before)
        before[SATURATED] = (after[N_ZERO] + after[N_NAN]) / after[COUNT]
        return into(out, torch.stack([before, after], 1))

    def mask_rows_(
        self, g: Tensor, a: Tensor, sums: Tensor | None = None, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        """g, the gradient of a ReLU's output a, becomes that of its input: 0 where a <= 0; rows (F + M, 2, ...).

        `sums` (..., C), if given, gets the sums of the new g over the batch: the gradient of a bias.
        """
        before = self.rows(g, True, bins)
        torch.ops.aten.threshold_backward.grad_input(g, a, 0, grad_input=g)
        if sums is not None:
            torch.sum(g, -2, out=sums)
        return into(out, torch.stack([before, self.rows(g, True, bins, None, before)], 1))

    def update_rows_(
        self, w: Tensor, g: Tensor, lr: float, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        """w becomes w - lr g; rows (F + M, 3, ...) of the old w, of g, and of the change. No batch."""
        old = w.clone()
        rows = [self.rows(w, False, bins), self.rows(g, False, bins)]
        w.sub_(g, alpha=lr)
        return into(out, torch.stack([*rows, self.rows(w - old, False, bins)], 1))

    def prepare(self, name: str, *given: Any, bins: Bins | None, out: Tensor) -> Callable[[], object]:
        """A pass that is called again and again over tensors that stay where they are: the method `name` of `given`."""
        return partial(getattr(self, name), *given, bins=bins, out=out)

    def activation_rows(self, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0) -> None:
        """`out` becomes phi(z); `rows[at : at + 2]` those of z, with its saturated share, and of phi(z).

        z stays as it is.
        """
        pair = rows[at : at + 2]
        if activation.rectifies:
            self.relu_rows_(out.copy_(z), None, pair)
            return
        value = activation.phi(z)
        self._measure_both(z, value, out, pair)
        pair[0, ..., SATURATED] = 0.0 if value is z else activation.saturated_share(z)

    def gradient_rows(
        self, g: Tensor, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0
    ) -> None:
        """`out` becomes g phi'(z), the gradient of z, from g, that of phi(z); `rows[at : at + 2]` are those of both."""
        pair = rows[at : at + 2]
        if activation.rectifies:
            self.mask_rows_(out.copy_(g), z, None, None, pair)
        else:
            self._measure_both(g, activation.pull_back(g, z), out, pair)

    def derive(self, rows: Tensor) -> Tensor:
        """The statistics (S, ...) of rows (F, ...), in the order of STATISTICS."""
        return derive(rows)

    def inside(self, rows: Tensor, smallest: float) -> bool:
        """Whether all rows (..., F + M) are of tensors without nan and inf whose rms is at least `smallest`."""
        rms, n_nan, n_inf = derive(rows.movedim(-1, 0), ("rms", "n_nan", "n_inf"))
        return bool(((n_nan + n_inf == 0) & (rms >= smallest)).all())

    def _measure_both(self, x: Tensor, value: Tensor, out: Tensor, rows: Tensor) -> None:
        """The rows of x and of the value, which `out` takes over; it is x itself where the activation is linear."""
        self.rows(x, True, None, rows[0])
        out.copy_(value)
        if value is x:
            rows[1] = rows[0]
        else:
            self.rows(out, True, None, rows[1])

    def _with_custom(self, fields: Tensor, x: Tensor, bins: Bins | None) -> Tensor:
        """Fields with the user's statistics of x behind them; its histogram goes into the bins."""
        if bins is not None:
            bins.add(histogram(x), octaves(x.dtype)[0])
        return torch.cat([fields, measure_custom(self.statistics, x.detach())]) if self.statistics else fields


def into(out: Tensor | None, rows: Tensor) -> Tensor:
    """The rows, or the memory that was given with the rows in it."""
    return rows if out is None else out.copy_(rows.movedim(0, -1))


def as_matrix(x: Tensor) -> Tensor:
    """(O, rest) of a parameter of any shape; a bias (O,) is one row."""
    return x.reshape(len(x) if x.ndim > 1 else 1, -1)


def measure_custom(statistics: Mapping[str, Function], x: Tensor) -> Tensor:
    """The results for x (..., N, C), in float64: (functions, ...).

    Entries that are nan or inf are data and reach the functions as they are. Each function gets a copy, so that nothing
    it does changes a measurement or a training. A function that raises, or gives anything but one number for each of
    the leading dimensions, is refused in one line.
    """
    found = []
    for name, function in statistics.items():
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the user's function at every tensor
                value = function(x.clone())
        except (Exception, SystemExit) as error:  # a function of the user may raise anything
            says = describe_error(error)
            raise UsageError(f"statistics.{name}: fails for a tensor {tuple(x.shape)}: {says}") from error
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(x.shape[:-2]):
            wanted = f"{tuple(x.shape[:-2])} for a tensor {tuple(x.shape)}"
            raise UsageError(f"statistics.{name}: gives {shape}, must give {wanted}, one number for each (N, C)")
        if value.is_complex():
            raise UsageError(f"statistics.{name}: gives complex numbers; it must give real ones")
        found.append(value.detach().to(x.device, torch.float64))
    return torch.stack(found) if found else x.new_empty((0, *x.shape[:-2]), dtype=torch.float64)
