"""Recorded steps of `nn.Module` twins: a row for every tensor, and how far gradients by hand are from autograd's.

Tensors are measured where they lie, all of a pass in a few calls of the backend, and compared in one pass over both.
Legend: E ensemble, N batch, I fan_in, O fan_out, K rows of a step, F numbers of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from initlab.engine import mlp
from initlab.engine.layer_memory import equal_neighbours
from initlab.engine.mlp import Pass
from initlab.engine.named_tensors import module_keys, sort_by_shape
from initlab.nn.activations import Activation
from initlab.nn.loss_table import Loss
from initlab.stats.backend import COUNT, N_NAN, N_ZERO, SATURATED
from initlab.stats.buffer import RowBuffer, StatsBuffer
from initlab.stats.histogram import Bins, join_bins

# Tensors that are measured together: parameters with their gradients, and updates; all others count inputs.
KINDS = {"weight": "own", "bias": "own", "update": "change"}


class ModuleRecorder:
    """Measures steps of twins that torch trains: each is a `look`, torch's update, and a `finish`.

    twins: the modules. rows, parity: buffers that get what is measured.
    """

    def __init__(
        self, twins: Sequence[nn.Sequential], activation: Activation, loss: Loss, rows: StatsBuffer, parity: RowBuffer
    ) -> None:
        self._twins, self._activation, self._loss, self._rows, self._parity = twins, activation, loss, rows, parity
        self._own = [list(model.parameters()) for model in twins]
        self._views = [list[Tensor]() for _ in twins]  # w (I, O), b (O,), w, b, ... of each twin, on torch's memory
        first = self._find_views(0)
        sizes = [len(first[0]), *(len(b) for b in first[1::2])]
        keys, layers = module_keys(sizes), len(sizes) - 1
        # In the order of the table tensors of one shape stand together, and are measured and compared together.
        parts = [[key for key in keys if KINDS.get(key.tensor, "batch") == kind] for kind in ("batch", "own", "change")]
        self._orders = [sort_by_shape(some, sizes) for some in parts]
        self._codes = [rows.code(some[k]) for some, order in zip(parts, self._orders, strict=True) for k in order]
        values = [key for key in keys if key.direction == "forward" and KINDS.get(key.tensor) == "own"]
        compared = (values, [key for key in keys if key.direction == "backward"])
        self._compared_orders = [sort_by_shape(some, sizes) for some in compared]
        pairs = zip(compared, self._compared_orders, strict=True)
        self._compared_codes = [[parity.code(some[k]) for k in order] for some, order in pairs]
        # Rows of hidden preactivations and of their activations, which say the saturated shares.
        places = [self._orders[0].index(k) for k in (*range(layers - 1), *range(layers, 2 * layers - 1))]
        self._z, self._a = torch.tensor(places, device=first[0].device).view(2, -1)
        self._bins = [None if rows.bins is None else rows.backend.bins(1) for _ in twins]
        self._seen: list[tuple[Tensor, list[Tensor]]] = []  # of each twin its rows, and its weights before the update

    def compare(self, members: Sequence[Sequence[Tensor]], step: int) -> None:
        """How far other parameters, w (I, O), b (O,), w, b, ... of each network, are from those of the twins."""
        pairs = zip(members, map(self._find_views, range(len(self._own))), strict=True)
        self._put_parity(0, [self._compare(0, *pair) for pair in pairs], step)

    @torch.no_grad()
    def look(self, xb: Tensor, yb: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A pass of every twin, measured and compared with the pass by hand; losses (E,) and outputs (E, N, O)."""
        self._seen = []
        passes, errors = [], []
        for k, (bins, x, y) in enumerate(zip(self._bins, xb, yb, strict=True)):
            found, values = mlp.twin_pass(self._twins[k], self._own[k], x, y, self._loss), self._find_views(k)
            pairs = list(zip(values[0::2], values[1::2], strict=True))
            # From the module's forward pass, which is that by hand to the last bit.
            forward = (x, y, found.preactivations, found.activations)
            z_grads, a_grads, ours = mlp.backward(pairs, *forward, self._activation, self._loss)
            grads = [one for pair in found.parameter_grads for one in pair]
            by_torch = [*found.preactivation_grads, *found.activation_grads, *grads]
            by_hand = [*z_grads, *a_grads, *(one for pair in ours for one in pair)]
            errors.append(self._compare(1, by_hand, by_torch))
            passes.append((found.loss, found.out))
            rows = [self._measure_batch(found, bins), self._measure(1, self._turn([*values, *grads]), bins)]
            self._seen.append((torch.cat(rows, 1), [w.clone() for w in values[0::2]]))
        self._put_parity(1, errors, step)
        losses, outputs = zip(*passes, strict=True)
        return torch.stack(losses), torch.stack(outputs)

    def finish(self, step: int) -> None:
        """The twins have been updated: their rows are whole."""
        found = []
        for k, (bins, (rows, before)) in enumerate(zip(self._bins, self._seen, strict=True)):
            weights = self._find_views(k)[0::2]
            changes = self._turn([torch.sub(w, old, out=old) for w, old in zip(weights, before, strict=True)])
            found.append(torch.cat([rows, self._measure(2, changes, bins)], 1))
        self._seen = []
        self._rows.put_codes(self._codes, torch.stack(found, -1), step)
        if self._rows.bins is not None:
            parts = [join_bins(bins.take(), 0) for bins in self._bins if bins is not None]
            self._rows.put_bins([join_bins(parts, 1)])

    def _find_views(self, k: int) -> list[Tensor]:
        """Of one twin; they are made anew where an optimizer has put other memory in the place of a parameter's."""
        own, known = self._own[k], self._views[k]
        if not known or any(p.data_ptr() != one.data_ptr() for p, one in zip(own, known, strict=True)):
            pairs = mlp.arrange_pairs([p.detach() for p in own])
            self._views[k] = [one for pair in pairs for one in pair]
        return self._views[k]

    def _turn(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Weights (I, O) as they lie in torch's memory, (O, I); functions of the user see them as they are."""
        return list(tensors) if self._rows.backend.statistics else [x.mT if x.ndim > 1 else x for x in tensors]

    def _measure(self, part: int, tensors: Sequence[Tensor], bins: Bins | None) -> Tensor:
        """Rows (F, K) in the order of the table."""
        ordered = [tensors[k] for k in self._orders[part]]
        return self._rows.backend.rows_of_each(ordered, bins, batched=part == 0)

    def _measure_batch(self, found: Pass, bins: Bins | None) -> Tensor:
        """Rows of what counts inputs, and the saturated shares of hidden preactivations."""
        forward = [*found.preactivations, *found.activations]
        rows = self._measure(0, [*forward, *found.preactivation_grads, *found.activation_grads], bins)
        hidden = found.preactivations[:-1]
        if self._activation.rectifies:
            rows[SATURATED, self._z] = ((rows[N_ZERO] + rows[N_NAN]) / rows[COUNT])[self._a]
        elif hidden:
            runs = equal_neighbours([z.shape for z in hidden])
            shares = [self._activation.saturated_share(torch.stack(hidden[run])) for run in runs]
            rows[SATURATED, self._z] = torch.cat(shares)
        return rows

    def _compare(self, part: int, tensors: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
        """Errors (2, K) in the order of the table."""
        both = ([side[k] for k in self._compared_orders[part]] for side in (tensors, references))
        return self._rows.backend.compare_each(*both)

    def _put_parity(self, part: int, errors: Sequence[Tensor], step: int) -> None:
        self._parity.put_codes(self._compared_codes[part], torch.stack(list(errors), -1), step)
