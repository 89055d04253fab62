"""Hooks on tensors: the gradient of each is measured when autograd finds it, and a second one has words of its own."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.torch_private import ignore_functions, is_batched
from initlab.stats.keys import TensorKey


class GradientHooks:
    """The gradients of the tensors of one step."""

    def __init__(self, buffer: ProbeBuffer) -> None:
        self._buffer = buffer
        self._handles: list[RemovableHandle] = []
        self._passes: dict[int, int] = {}  # how often the gradient of a key has come in this step
        self.count = 0  # gradients that have come so far

    def watch(self, x: Tensor, code: int, reshape: Callable[[Tensor], Tensor], batched: bool) -> None:
        """Measure the gradient with respect to x in this step, before anything overwrites it.

        code: the number of its key. reshape: makes (N, C) of it. batched: whether N counts inputs.
        """
        measure = partial(self._measure, code, reshape, batched)
        self._handles.append(x.register_hook(measure))  # type: ignore[no-untyped-call]

    def _measure(self, code: int, reshape: Callable[[Tensor], Tensor], batched: bool, grad: Tensor) -> None:
        if is_batched(grad):
            return
        self.count += 1
        self._passes[code] = passes = self._passes.get(code, -1) + 1
        if passes:
            key: TensorKey = list(self._buffer.codes)[code]
            again = self._buffer.code(key._replace(pass_=passes))
            self._buffer.scaled.update({again} if code in self._buffer.scaled else ())
            code = again
        with ignore_functions():  # the network calls none of these
            self._buffer.put(code, reshape(grad), batched)

    def end_step(self) -> None:
        """Let go of the step's graph and count from 0 again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.clear()
