"""The parameters of a watched network as rows: their values, gradients and updates."""

from collections.abc import Callable, Container, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initlab.probes.hooks import Hooks
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import MEASURED, name_parameter
from initlab.stats.backend import as_matrix
from initlab.stats.keys import TensorKey


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


class Parameters:
    """The chosen parameters, each once: a shared one goes by the name under which it is met first.

    With `updates` the weights before an update are kept in memory of their own.
    """

    def __init__(self, hooks: Hooks, buffer: ProbeBuffer, stage: str, updates: bool) -> None:
        self._hooks, self._buffer, self._before = hooks, buffer, list[Tensor]()  # weights before an update
        found: dict[int, tuple[TensorKey, nn.Parameter]] = {}
        for m in hooks.modules:
            number = hooks.number(m) if m.is_layer else m.below
            for part, p in m.parameters if m.chosen else []:
                if p.dtype in MEASURED and not isinstance(p, UninitializedParameter) and p.numel():
                    word = name_parameter(m.module, part, p, id(p) in hooks.added)
                    number = hooks.weight_numbers.get(id(p), number)
                    key = TensorKey(stage, "module", number, word, "forward", m.name, part)
                    found.setdefault(id(p), (key, p))
        # Weights before biases, and those of one shape together: neighbours of one shape are measured together.
        kinds = list(dict.fromkeys(_kind(pair) for pair in found.values()))
        pairs = sorted(found.values(), key=lambda pair: (pair[0].tensor == "bias", kinds.index(_kind(pair))))
        keys, self._all = [key for key, _ in pairs], [p for _, p in pairs]
        self._codes = [buffer.code(key) for key in keys]
        self._gradient_codes = [buffer.code(key._replace(direction="backward")) for key in keys]
        # Weights stand first: the k-th of them is the k-th of all.
        self._weights = [p for key, p in pairs if updates and key.tensor == "weight"]
        self._open: set[int] = set()
        self._update_codes = [buffer.code(key._replace(tensor="update")) for key in keys if key.tensor == "weight"]

    def start(self) -> None:
        """A step begins in which nothing has been measured yet."""
        self._open = set(range(len(self._all)))

    def choose(self, wanted: Callable[[nn.Parameter], bool]) -> list[int]:
        """The numbers of those parameters that have not been measured in this step and are wanted now."""
        chosen = [k for k in sorted(self._open) if wanted(self._all[k])]
        self._open.difference_update(chosen)
        return chosen

    @torch.no_grad()
    def measure_values(self, chosen: Sequence[int]) -> None:
        """Rows of the values as they are; the weights are kept for `measure_updates`."""
        self._buffer.put_each([self._codes[k] for k in chosen], [self._all[k] for k in chosen])
        if not self._before:
            with torch.inference_mode(False):
                self._before = [torch.empty_like(w, requires_grad=False) for w in self._weights]
        for k in chosen:
            if k < len(self._before):
                self._before[k].copy_(self._weights[k])

    @torch.no_grad()
    def measure_updates(self, held: Container[int]) -> None:
        """Rows of W_{k+1} - W_k, for the weights whose ids are held; W_k is what `measure_values` has seen."""
        moved = [k for k, w in enumerate(self._weights) if id(w) in held and k not in self._open]
        self._buffer.put_each(
            [self._update_codes[k] for k in moved], [self._weights[k] for k in moved], [self._before[k] for k in moved]
        )

    def forget(self) -> None:
        """Let go of the kept weights: the next recorded step is far away."""
        self._before = []

    @torch.no_grad()
    def measure_gradients(self, chosen: Sequence[int]) -> None:
        """Rows of `.grad` as it stands; parameters without one have none."""
        grads = [(self._gradient_codes[k], self._all[k].grad) for k in chosen]
        found = [(code, _dense(grad)) for code, grad in grads if grad is not None]
        self._buffer.put_each([code for code, _ in found], [grad for _, grad in found])

    def measure_coming_gradients(self) -> None:
        """Rows of the gradients that the coming backward pass finds, whatever `.grad` holds."""
        for code, p in zip(self._gradient_codes, self._all, strict=True):
            if p.requires_grad:
                self._hooks.on_gradient(p, partial(self._measure_gradient, code))

    def _measure_gradient(self, code: int, grad: Tensor) -> None:
        code = self._hooks.count_pass(code)
        self._buffer.put(code, as_matrix(_dense(grad.detach())), batched=False)


def _kind(pair: tuple[TensorKey, Tensor]) -> tuple[object, ...]:
    key, p = pair
    return key.tensor, p.shape, p.dtype, p.device
