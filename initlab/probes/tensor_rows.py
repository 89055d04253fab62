"""The rows of the tensors that come by in a pass, and what is remembered of them until the next layer."""

from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from initlab.nn.activations import Activation
from initlab.probes.gradient_hooks import GradientHooks
from initlab.probes.hook_types import Preactivation, count_writes
from initlab.probes.layer_numbers import LayerNumbers, Site
from initlab.probes.one_thread import OneThread
from initlab.probes.operations import Operation, Origins, find_axis
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import RELU, ProbedModule, as_batch, as_real
from initlab.probes.torch_private import has_no_values
from initlab.probes.used_weights import UsedWeights
from initlab.stats.keys import TensorKey

MASKED = -9000.0  # a logit below this, of probability 0, is a mask and counts as -inf
LAYERS = ("preactivation", "norm", "embedding")  # words of functions that are numbered


class TensorRows:
    """Measures tensors of one network under the layer that was called last.

    With `training` only passes that autograd follows are part of a step.
    """

    def __init__(self, buffer: ProbeBuffer, stage: str, training: bool) -> None:
        self.buffer, self.stage, self._training = buffer, stage, training
        self.numbers, self.gradients, self.thread = LayerNumbers(), GradientHooks(buffer), OneThread()
        self.origins = Origins()
        self.weights = UsedWeights(buffer, stage, training, self.gradients)
        self._added: set[int] = set()  # ids of parameters that functions add, and that they multiply by
        self._multiplied: set[int] = set()
        self.layer = 0  # the number of the layer that was called last; below the first one is the input
        self._axes: dict[int, int] = {}  # by how many dimensions: that which counted the units of the last such tensor
        self.last: Preactivation | None = None  # the output of the layer that was called last
        self._measured: dict[int, tuple[ReferenceType[Tensor], int]] = {}  # in this pass, and how often written to
        self._scalars: dict[int, tuple[ReferenceType[Tensor], int]] = {}  # outputs of one number in this step: rows
        self._counts: dict[tuple[str, int, str], int] = {}  # functions of one name in a call of a module

    def is_unseen(self) -> bool:
        """Whether a pass is none of a step's: a validation, an export, or the first pass of a checkpoint."""
        return (self._training and not torch.is_grad_enabled()) or has_no_values()

    def begin_pass(self) -> None:
        """Below what comes now there is no layer but the input."""
        self.layer, self.last = 0, None
        self._axes.clear()
        self._measured.clear()
        self.origins.clear()

    def end_step(self) -> None:
        """Forget the step's graph and count from 0 again."""
        self.gradients.end_step()
        self.weights.end_step()
        self.thread.end_step()
        self.last = None
        self.origins.clear()
        for kept in (self._measured, self._scalars, self._counts):
            kept.clear()

    def find_row(self, x: Tensor) -> int | None:
        """The row that a tensor of one number has as the output of a module in this step."""
        seen = self._scalars.get(id(x))
        return seen[1] if seen is not None and seen[0]() is x else None

    def has_row(self, x: Tensor, overwritten: bool = False) -> bool:
        """Whether a tensor, or what it is another shape of, was measured in this pass as it is now.

        overwritten: as it was before it was last written to.
        """
        base = x._base if x._base is not None and _is_reshaped(x, x._base) else x
        seen = [(self._measured.get(id(one)), one) for one in (x, base)]
        wanted = [(known, one, count_writes(one) - overwritten) for known, one in seen]
        return any(known is not None and known[0]() is one and known[1] == writes for known, one, writes in wanted)

    def note_shape(self, x: Tensor) -> None:
        """A layer hands on its output in another shape with the same units: an activation may be called with that."""
        last = self.last
        if (
            last is not None
            and x._base is last.x
            and last.axis == last.x.ndim - 1
            and x.shape[-1:] == last.x.shape[-1:]
        ):
            self.last = last._replace(x=x, axis=x.ndim - 1)

    def make_site(self, key: TensorKey, axis: int) -> Site:
        """The numbers of a key and of that of its gradient."""
        gradient = self.buffer.code(key._replace(direction="backward"))
        self.buffer.scaled.add(gradient)
        return Site(axis, self.buffer.code(key), gradient)

    def measure(self, x: Tensor, site: Site, values: Tensor | None = None) -> int:
        """Measure a tensor, or other values in its place, and its gradient when that comes; the number of the row."""
        row = self.buffer.put(site.code, as_batch(x if values is None else values, site.axis))
        code = self.buffer.rows[row]
        if code != site.code:  # another tensor has these words
            site = self.make_site(list(self.buffer.codes)[code], site.axis)
        self._measured[id(x)] = ref(x), count_writes(x)
        if x.requires_grad:
            self.gradients.watch(x, site.gradient_code, partial(as_batch, axis=site.axis), batched=True)
        return row

    def measure_function(self, m: ProbedModule, call: int, found: Operation, args: tuple[Any, ...], x: Tensor) -> None:
        """The rows of what a function has made inside of a call of a module."""
        axis = find_axis(found, x)
        if found.word in LAYERS:
            self.layer = self.number_function(m, args)
        if axis is None:
            axis = self._follow_axis(x, args, found.word)
        self._axes[x.ndim] = axis
        if found.word != "other":
            self.origins.mark(x, args, elementwise=found.word == "activation")
        if not m.chosen or (found.word == "other" and x.is_cpu and bool(x.isfinite().all())):
            return
        count = self._counts[m.name, call, found.name] = self._counts.get((m.name, call, found.name), -1) + 1
        part = f"{found.name}.{count}" if count else found.name
        key = TensorKey(self.stage, "module", self.layer, found.word, "forward", m.name, part, call, found.name)
        if found.name == "softmax":
            logits = self.make_site(key._replace(tensor="logits"), axis)
            z = args[0].detach()
            self.measure(args[0], logits, z.masked_fill((x == 0) & (z < MASKED), -torch.inf))
        if found.activation not in (None, RELU):
            self.measure_saturation(found.activation, args)
        if found.word == "other":
            code = self.buffer.code(key)
            self.buffer.set_rare(self.buffer.put(code, as_batch(x, axis)))
            return
        row = self.measure(x, self.make_site(key, axis))
        self._set_last(x, axis, row, found.word == "preactivation", found.activation is RELU, args)

    def _follow_axis(self, x: Tensor, given: tuple[Any, ...], word: str) -> int:
        """Which dimension counts units of what is made entry by entry of what was given.

        An activation of a view of a layer's output has them where the strides say; others as the last tensor of so many
        dimensions.
        """
        z: Any = given[0] if given else None
        follows = word == "activation" and isinstance(z, Tensor) and z.shape == x.shape
        last, base = self.last, z._base if follows else None
        if last is not None and base is not None and (base is last.x or base is last.x._base):
            size, stride = last.x.shape[last.axis], last.x.stride(last.axis)
            found = [k for k in range(z.ndim) if z.shape[k] == size > 1 and z.stride(k) == stride]
            if len(found) == 1:
                return found[0]
        return self._axes.get(x.ndim, x.ndim - 1)

    def number_function(self, m: ProbedModule, args: tuple[Any, ...]) -> int:
        """The layer of a function by the weight that it is given."""
        sources = (self.weights.find_source(t) for t in args if isinstance(t, Tensor))
        return self.numbers.number_function(m, next(filter(None, sources), 0))

    def note_bias(self, args: tuple[Any, ...]) -> None:
        """A sum: a parameter in it is a bias of the layer below."""
        for p in args:
            if isinstance(p, nn.Parameter):
                self.numbers.of_weights.setdefault(id(p), self.layer)
                self._added.add(id(p))

    def note_factors(self, args: tuple[Any, ...]) -> None:
        """A product: a parameter in it is a factor."""
        self._multiplied.update(id(p) for p in args if isinstance(p, nn.Parameter))

    def find_use(self, p: Tensor) -> tuple[bool, bool]:
        """Whether functions were seen to add a parameter, and to multiply by it."""
        return id(p) in self._added, id(p) in self._multiplied

    def measure_output(
        self, m: ProbedModule, call: int, part: str, x: Tensor, given: tuple[Any, ...], word: str
    ) -> None:
        """One tensor of what a call of a module gives, under a word for it."""
        if m.is_layer and m.is_owner:
            self.layer = self.numbers.number(m)
        axis = m.axis(x.ndim) if m.is_layer else self._follow_axis(x, given, word)
        site = self._find_site(m, call, part, x.ndim, word, axis)
        self._axes[x.ndim] = axis
        self.origins.mark(x, given, elementwise=word == "activation")
        if not m.chosen:
            return
        row = self.measure(x, site)
        if not x.ndim:
            self._scalars[id(x)] = ref(x), row
        self._set_last(x, site.axis, row, m.is_layer, m.activation is RELU, given)

    def _find_site(self, m: ProbedModule, call: int, part: str, ndim: int, word: str, axis: int) -> Site:
        """The site of an output of a call, made when it is first seen."""
        seen = (self.layer, call, part, ndim, word, axis)
        if seen not in m.sites:
            op = type_before_parametrizations(m.module).__name__
            key = TensorKey(self.stage, "module", self.layer, word, "forward", m.name, part, call, op)
            m.sites[seen] = self.make_site(key, axis)
        site: Site = m.sites[seen]
        return site

    def _set_last(self, x: Tensor, axis: int, row: int, is_layer: bool, rectifies: bool, args: tuple[Any, ...]) -> None:
        """Remember the output of a layer; a ReLU that was called with it says its saturated share."""
        last = self.last
        if is_layer:
            self.last = Preactivation(x, count_writes(x), axis, row)
        elif rectifies and last is not None and last.is_input(args, x is last.x):
            self.buffer.set_rectified(last.row, row)
            self.last = None  # its memory is free as early as without a probe

    def measure_saturation(self, activation: Activation, args: tuple[Any, ...]) -> None:
        """The preactivation that an activation is given, if it has not been overwritten since."""
        last = self.last
        if last is not None and last.is_input(args):
            z = as_real(last.x.detach()).reshape(1, -1) if activation.is_fixed else as_batch(last.x.detach(), last.axis)
            self.buffer.set_saturated(last.row, activation.saturated_share(z))


def _is_reshaped(x: Tensor, base: Tensor) -> bool:
    """Whether a view has the entries of its base, each once and as they are, in another shape or order."""
    if (
        x.numel() != base.numel()
        or x.data_ptr() != base.data_ptr()
        or x.is_neg() != base.is_neg()
        or x.dtype != base.dtype
    ):
        return False
    moved = sorted(x.stride()) == sorted(base.stride()) and sorted(x.shape) == sorted(base.shape)
    return moved or (x.is_contiguous() and base.is_contiguous())
