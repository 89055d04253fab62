"""The parameters of a watched network as rows: their values, gradients and updates."""

from collections.abc import Callable, Container, Sequence
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initlab.probes.hooks import Hooks
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import (
    as_dense,
    as_weight,
    describe_output,
    measurable,
    name_parameter,
)
from initlab.stats.keys import TensorKey

AS_FOUND = "backward"  # in the column `op` of gradients as the backward pass has left them


class Parameters:
    """The chosen parameters, each once: a shared one goes by the name under which it is met first.

    Those that a weight is computed from are called `parameter`, all others `weight` or `bias`.

    With `updates` the weights before an update are kept in memory of their own.
    """

    def __init__(self, hooks: Hooks, buffer: ProbeBuffer, stage: str, updates: bool) -> None:
        self._hooks, self._buffer, self._before = hooks, buffer, list[Tensor]()  # weights before an update
        self._modules = hooks.modules  # and their parameters, which a pass may be lent others for
        self.unseen: list[str] = []  # parameters whose numbers cannot be measured
        found: dict[int, tuple[TensorKey, nn.Parameter]] = {}
        for m in hooks.modules:
            number = hooks.rows.numbers.number(m) if m.is_layer else m.below
            if m.chosen and m.is_quantized and not m.parameters:
                self.unseen.append(f"{m.label} (quantized)")
            for part, p in m.parameters if m.chosen else []:
                if isinstance(p, UninitializedParameter):
                    continue
                if not measurable(p):
                    self.unseen.append(f"{m.name}.{part}".lstrip(".") + f" ({describe_output(p.data)})")
                else:
                    computed = next((c for c in m.computed if c.is_made_of(part)), None)
                    source = p if computed is None else computed.source
                    word = "parameter" if computed else name_parameter(m.module, part, p, *hooks.rows.find_use(p))
                    layer = hooks.rows.numbers.of_weights.get(id(source), number)
                    if m.ran and m.is_layer and not m.is_owner:  # its own use is the first
                        layer = number
                    key = TensorKey(stage, "module", layer, word, "forward", m.name, part)
                    found.setdefault(id(p), (key, p))
        # Weights before biases, and those of one shape together: neighbours of one shape are measured together.
        kinds = list(dict.fromkeys(_kind(pair) for pair in found.values()))
        pairs = sorted(found.values(), key=lambda pair: (pair[0].tensor == "bias", kinds.index(_kind(pair))))
        keys, self._all = [key for key, _ in pairs], [p for _, p in pairs]
        self._codes = [buffer.code(key) for key in keys]
        self._gradient_codes = [buffer.code(key._replace(direction="backward")) for key in keys]
        if not updates:  # then nobody is heard who divides them
            buffer.scaled.update(self._gradient_codes)
        # Weights stand first: the k-th of them is the k-th of all.
        self._weights = [p for key, p in pairs if updates and key.tensor == "weight"]
        self._raw_codes = [buffer.code(key._replace(direction="backward", op=AS_FOUND)) for key in keys]
        buffer.scaled.update(self._raw_codes)
        self._seen: dict[int, tuple[Tensor, int]] = {}  # gradients before a backward pass: how often written to
        # Gradients as a pass has left them: rows, and what multiplied the loss; those that were only handed over too.
        self._raw: dict[int, tuple[Tensor, float]] = {}
        self._given: dict[int, tuple[ReferenceType[Tensor], Tensor, float]] = {}
        # What multiplied the losses of a gradient when it was looked at last, and how often it had been written to.
        self._scales: dict[int, tuple[int, float]] = {}
        self._open: set[int] = set()
        self._update_codes = [buffer.code(key._replace(tensor="update")) for key in keys if key.tensor == "weight"]

    def is_current(self) -> bool:
        """Whether the modules hold these parameters still."""
        if self._modules is not self._hooks.modules:
            return False
        return all(m.module._parameters.get(part, p) is p for m in self._modules for part, p in m.parameters)

    def start(self) -> None:
        """A step begins in which nothing has been measured yet."""
        self._open = set(range(len(self._all)))
        self._raw.clear()
        self._given.clear()

    def choose(self, wanted: Callable[[nn.Parameter], bool]) -> list[int]:
        """The numbers of those parameters that have not been measured in this step and are wanted now.

        One whose memory somebody has taken away, to load it later, has no row.
        """
        chosen = [k for k in sorted(self._open) if wanted(self._all[k]) and _has_memory(self._all[k])]
        self._open.difference_update(chosen)
        return chosen

    @torch.no_grad()
    def measure_values(self, chosen: Sequence[int]) -> None:
        """Rows of the values as they are; the weights are kept for `measure_updates`."""
        self._buffer.put_each([self._codes[k] for k in chosen], [as_dense(self._all[k]) for k in chosen])
        if not self._before:
            with torch.inference_mode(False):
                self._before = [torch.empty_like(as_dense(w), requires_grad=False) for w in self._weights]
        for k in chosen:
            if k < len(self._before):
                if self._before[k].shape != as_dense(self._weights[k]).shape:  # it has grown in place
                    self._before[k] = torch.empty_like(as_dense(self._weights[k]))
                self._before[k].copy_(as_dense(self._weights[k]))

    @torch.no_grad()
    def measure_updates(self, held: Container[int]) -> None:
        """Rows of W_{k+1} - W_k, for the weights whose ids are held; W_k is what `measure_values` has seen."""
        moved = [k for k, w in enumerate(self._weights) if id(w) in held and k not in self._open and _has_memory(w)]
        self._buffer.put_each(
            [self._update_codes[k] for k in moved],
            [as_dense(self._weights[k]) for k in moved],
            [self._before[k] for k in moved],
        )

    def forget(self) -> None:
        """Let go of the kept weights: the next recorded step is far away."""
        self._before = []

    def note_unscaling(self, held: Container[int]) -> None:
        """A scaler has divided the gradients of the parameters whose ids are held."""
        self._scales = {k: one for k, one in self._scales.items() if id(self._all[k]) not in held}

    def note_gradients(self) -> None:
        """A backward pass begins: remember which gradients there are."""
        self._seen = {k: (p.grad, p.grad._version) for k, p in enumerate(self._all) if p.grad is not None}

    @torch.no_grad()
    def look_at_gradients(self, scale: float) -> None:
        """A backward pass is over, whose loss was multiplied by `scale`: keep rows of the gradients that it changed.

        A gradient that sums scaled and unscaled losses is divided as the scaler will divide it.
        """
        grads = {k: p.grad for k, p in enumerate(self._all) if p.grad is not None and measurable(p.grad)}
        before, self._seen = self._seen, {}
        changed = []
        for k, grad in grads.items():
            seen, version = before.get(k, (None, 0))
            if seen is not grad or version != grad._version:
                changed.append(k)
                untouched = seen is grad and scale == 1 and self._scales.get(k, (-1, 1.0))[0] == version
                self._scales[k] = grad._version, self._scales[k][1] if untouched else scale
        if changed:
            rows = self._buffer.describe([as_dense(grads[k]) for k in changed]).unbind(1)
            self._raw |= {k: (row, self._scales[k][1]) for k, row in zip(changed, rows, strict=True)}

    @torch.no_grad()
    def look_at_results(self, sources: Sequence[Tensor], gradients: Sequence[Tensor | None], scale: float) -> None:
        """A backward pass has handed over gradients of `sources`: they have rows if they become `.grad`."""
        numbers = {id(p): k for k, p in enumerate(self._all)}
        pairs = [(numbers.get(id(p)), g) for p, g in zip(sources, gradients, strict=False)]
        found = [(k, g) for k, g in pairs if k is not None and g is not None and measurable(g)]
        if found:
            rows = self._buffer.describe([as_dense(g) for _, g in found]).unbind(1)
            self._given |= {k: (ref(g), row, scale) for (k, g), row in zip(found, rows, strict=True)}

    @torch.no_grad()
    def measure_gradients(self, chosen: Sequence[int], scale: float) -> None:
        """Rows of `.grad` as it stands; parameters without one have none.

        scale: what the optimizer will divide them by itself. What a backward pass has left has rows of its own where it
        is something else, as before clipping.
        """
        grads = [self._all[k].grad for k in chosen]
        found = [(k, as_dense(grad)) for k, grad in zip(chosen, grads, strict=True) if grad is not None]
        rows = self._buffer.put_each([self._gradient_codes[k] for k, _ in found], [grad for _, grad in found])
        self._buffer.set_scale(rows, scale)
        for k, (given, row, of_loss) in self._given.items():
            if given() is not None and given() is self._all[k].grad:
                self._raw[k] = row, of_loss
        raw = [(k, row) for (k, _), row in zip(found, rows, strict=True) if k in self._raw]
        if raw:
            self._buffer.put_unless_alike(
                [self._raw_codes[k] for k, _ in raw],
                torch.stack([self._raw[k][0] for k, _ in raw], 1),
                [self._raw[k][1] for k, _ in raw],
                [row for _, row in raw],
            )

    def measure_coming_gradients(self) -> None:
        """Rows of the gradients that the coming backward pass finds, whatever `.grad` holds."""
        for code, p in zip(self._gradient_codes, self._all, strict=True):
            if p.requires_grad:
                self._hooks.rows.gradients.watch(p, code, as_weight, batched=False)


def _has_memory(x: Tensor) -> bool:
    return x.layout is not torch.strided or x.untyped_storage().nbytes() > 0


def _kind(pair: tuple[TensorKey, Tensor]) -> tuple[object, ...]:
    key, p = pair
    return key.tensor, p.shape, p.dtype, p.device
