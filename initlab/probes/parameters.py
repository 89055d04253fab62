"""The parameters of a watched network as rows: their values, gradients and updates."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initlab.probes.hooks import Hooks
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import MEASURED
from initlab.stats.backend import as_matrix
from initlab.stats.keys import TensorKey


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


class Parameters:
    """The chosen parameters, each once: a shared one goes by the name under which it is met first.

    With `updates` the weights before an update are kept in memory of their own.
    """

    def __init__(self, hooks: Hooks, buffer: ProbeBuffer, stage: str, updates: bool) -> None:
        self._hooks, self._buffer, self._kept = hooks, buffer, dict[int, Tensor]()
        found: dict[int, tuple[TensorKey, nn.Parameter]] = {}
        for m in hooks.modules:
            number = hooks.number(m) if m.parameters else 0
            for part, p in m.parameters if m.chosen else []:
                if p.dtype in MEASURED and not isinstance(p, UninitializedParameter) and p.numel():
                    tensor = "bias" if "bias" in part else "weight"
                    key = TensorKey(stage, "module", number, tensor, "forward", m.name, part)
                    found.setdefault(id(p), (key, p))
        # Weights before biases, and those of one shape together: neighbours of one shape are measured together.
        kinds = list(dict.fromkeys(_kind(pair) for pair in found.values()))
        pairs = sorted(found.values(), key=lambda pair: (pair[0].tensor == "bias", kinds.index(_kind(pair))))
        self._keys, self._all = [key for key, _ in pairs], [p for _, p in pairs]
        self._weights = [k for k, key in enumerate(self._keys) if updates and key.tensor == "weight"]

    @torch.no_grad()
    def measure_values(self) -> None:
        """Rows of the values as they are; the weights are kept for `measure_updates`."""
        self._buffer.put_each(self._keys, self._all)
        for k in self._weights:
            if k not in self._kept:
                with torch.inference_mode(False):
                    self._kept[k] = torch.empty_like(self._all[k], requires_grad=False)
            self._kept[k].copy_(self._all[k])

    @torch.no_grad()
    def measure_updates(self) -> None:
        """Rows of W_{k+1} - W_k, for weights; W_k is what `measure_values` has seen."""
        changes = [self._all[k].detach() - self._kept[k] for k in self._weights]
        self._buffer.put_each([self._keys[k]._replace(tensor="update") for k in self._weights], changes)

    @torch.no_grad()
    def measure_gradients(self) -> None:
        """Rows of `.grad` as it stands; parameters without one have none."""
        pairs = [(key, p.grad) for key, p in zip(self._keys, self._all, strict=True) if p.grad is not None]
        keys = [key._replace(direction="backward") for key, _ in pairs]
        self._buffer.put_each(keys, [_dense(grad) for _, grad in pairs])

    def measure_coming_gradients(self) -> None:
        """Rows of the gradients that the coming backward pass finds, whatever `.grad` holds."""
        for key, p in zip(self._keys, self._all, strict=True):
            if p.requires_grad:
                self._hooks.on_gradient(p, partial(self._measure_gradient, key._replace(direction="backward")))

    def _measure_gradient(self, key: TensorKey, grad: Tensor) -> None:
        self._buffer.put(key, as_matrix(_dense(grad.detach())))


def _kind(pair: tuple[TensorKey, Tensor]) -> tuple[object, ...]:
    key, p = pair
    return key.tensor, p.shape, p.dtype, p.device
