"""What autograd's graph says of a loss: its name, what multiplied it, its value where all classes are equally
probable, and a target that broadcasts by mistake.

A cross-entropy is linear in the logarithms of the probabilities. Of equal probabilities these are all -ln(classes), so
that the loss at chance is -ln(classes) times the sum of its gradient with respect to them, whatever its reduction,
weights and smoothing are (Karpathy, "A recipe for training neural networks", 2019: verify the loss at init).
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import as_batch, measurable
from initlab.probes.torch_private import ignore_functions
from initlab.stats.keys import TensorKey

Node = Any  # of autograd's graph
FARTHEST = 32  # nodes that are looked at for a broadcast: a loss is made of a few functions
NEAR = 0.01  # relative; of half precision numbers
MOST_NODES = 4096  # of a loss that is a sum over time
_LINEAR = {"NllLoss", "NllLoss2D", "Neg", "Sum", "Mean", "Mul", "Div", "Add", "Sub", "View", "UnsafeView", "Reshape"}
_LINEAR |= {"ReshapeAlias", "Squeeze", "Unsqueeze", "Gather", "MaskedFill", "MaskedSelect", "Index", "Select", "Slice"}
_LINEAR |= {"T", "Transpose", "Permute", "ToCopy", "Expand", "Where", "Clone", "Stack", "Cat", "Alias"}
_SCALE = "initlab: loss scale"  # in the metadata of a node: what a gradient scaler multiplied by there
_WITH_TARGET = {"Sub", "Rsub", "Expand"}  # by which a prediction is compared


def name_node(node: Node) -> str:
    """MseLoss of MseLossBackward0."""
    return re.sub(r"Backward\d*$", "", node.name())


def _walk(waiting: list[Node], most: int) -> Iterator[Node]:
    """Nodes of a graph, each once and so many at most; whoever asks puts those below one into `waiting`."""
    seen: set[Node] = set()
    while waiting and len(seen) < most:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node


def name_loss(loss: Tensor) -> str:
    """The function that a loss is the value of, in torch's spelling: mse_loss, mean."""
    if loss.grad_fn is None:
        return ""
    node: Node = loss.grad_fn
    while name_node(node) == "Alias":  # of a subclass of Tensor
        node = node.next_functions[0][0]
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name_node(node)).lower()


def find_chance_nodes(loss: Tensor) -> Iterator[tuple[Node, float]]:
    """Where a loss is linear in log-probabilities: the functions that make these, each with the log of chance.

    A binary cross-entropy of logits counts as two classes. Gives nothing where anything else is added to the loss.
    """
    found: dict[Node, float] = {}
    waiting: list[Node] = [loss.grad_fn]
    for node in _walk(waiting, MOST_NODES):
        name = name_node(node)
        if name == "LogSoftmax":
            shape, dim = node._input_metadata[0].shape, node._saved_dim
            found[node] = -math.log(shape[dim - 2**64 if dim >= 2**63 else dim])
        elif name == "BinaryCrossEntropyWithLogits" and node._saved_weight is node._saved_pos_weight is None:
            found[node] = math.log(2) * (node._saved_target.numel() if node._saved_reduction == 2 else 1)
        elif name in _LINEAR:
            below = [one for one, _ in node.next_functions]
            if name == "Sub" and below[0] is None:  # taken from a constant
                return
            waiting += below
        else:
            return
    if not waiting:
        yield from found.items()


def mark_scale(scaled: object, scale: float) -> None:
    """Write onto the graph of losses, one or several, what a gradient scaler has multiplied them by."""
    node: Node = scaled.grad_fn if isinstance(scaled, Tensor) else None
    if node is not None:
        node.metadata[_SCALE] = scale
    elif isinstance(scaled, (list, tuple)):
        for one in scaled:
            mark_scale(one, scale)


def find_scales(loss: Tensor) -> set[float]:
    """What gradient scalers have multiplied a loss by; several numbers where it is a sum of such losses."""
    found: set[float] = set()
    waiting: list[Node] = [loss.grad_fn]
    for node in _walk(waiting, MOST_NODES):
        scale = node.metadata.get(_SCALE)
        if scale is None and name_node(node) in _LINEAR:
            waiting += [below for below, _ in node.next_functions]
        else:
            found.add(scale or 1.0)
    return found or {1.0}


class LossRows:
    """The rows of the losses of one network: their values, and beside them what they would be at chance."""

    def __init__(self, buffer: ProbeBuffer, stage: str) -> None:
        self._buffer, self._stage = buffer, stage
        self._roots: list[tuple[Tensor, str, int | None, float]] = []  # of the pass under way: names, rows, scales
        self._chances: dict[int, Tensor] = {}  # of these losses, by their place
        self._seeds: dict[int, Tensor] = {}  # what the pass begins with at each
        self._handles: list[RemovableHandle] = []
        self._n_passes = 0  # in this step
        self._layer = self._n_gradients = 0  # before the pass under way: the layer called last, and gradients seen
        self.broadcast = ""  # what is wrong with the shapes that a loss compares

    def begin(self, roots: Sequence[tuple[Tensor, int | None]], layer: int, n_gradients: int) -> None:
        """A backward pass begins at these losses; what they would be at chance adds up while it runs.

        With each comes the number of its row where it has one already, as an output of a module. layer: that was called
        last. n_gradients: that the network has seen so far.
        """
        self._layer, self._n_gradients = layer, n_gradients
        self._seeds.clear()
        self._roots, self._chances = [], {}
        for k, (loss, row) in enumerate(roots):
            nodes = list(find_chance_nodes(loss))
            scales = find_scales(loss)
            op = "cross_entropy" if nodes else name_loss(loss)
            self._roots.append((loss.detach(), op, row, scales.pop() if len(scales) == 1 else 1.0))
            self.broadcast = self.broadcast or find_broadcast(loss)
            if loss.grad_fn is not None:
                self._handles.append(loss.grad_fn.register_prehook(partial(self._note_seed, k)))
            for node, chance in nodes:
                self._handles.append(node.register_prehook(partial(self._add_chance, k, node, chance)))

    def _note_seed(self, k: int, gradients: tuple[Tensor | None, ...]) -> None:
        """What `backward` begins with at a loss: 1, or what it was given."""
        if k not in self._seeds and gradients[0] is not None:
            with ignore_functions():
                self._seeds[k] = gradients[0].detach().double()

    def _add_chance(self, k: int, node: Node, chance: float, gradients: tuple[Tensor | None, ...]) -> None:
        """Add what log-probabilities give to the loss: as they are, and at chance."""
        if gradients[0] is None:
            return
        with ignore_functions(), torch.no_grad():
            grad = gradients[0].detach().double()
            at_chance = chance * grad.sum()
            now = (grad * node._saved_result).sum() if name_node(node) == "LogSoftmax" else torch.nan
            part = torch.stack([at_chance, torch.as_tensor(now, dtype=torch.float64, device=grad.device)])
            self._chances[k] = self._chances[k] + part if k in self._chances else part

    def end(self, n_gradients: int) -> None:
        """It is over: the rows of its losses, if the network has seen gradients."""
        is_own = n_gradients > self._n_gradients
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for k, (loss, op, row, scale) in enumerate(self._roots if is_own else []):
            if row is None and measurable(loss):
                part = f"{op}.{k}" if k else op
                key = TensorKey(self._stage, "module", self._layer, "loss", "forward", "", part, self._n_passes, op)
                code = self._buffer.code(key)
                self._buffer.scaled.add(code)
                row = self._buffer.put(code, as_batch(loss, loss.ndim - 1), batched=False)
                self._buffer.set_scale([row], scale)
            if row is not None and k in self._chances:
                at_chance, now = self._chances[k] / self._seeds[k]
                # A loss that is more than its log-probabilities, such as the square of one, is not known at chance.
                known = now.isnan() | ((now - loss).abs() <= NEAR * loss.abs())
                self._buffer.set_chance(row, at_chance.where(known, torch.nan))
        self._n_passes += is_own
        self._roots.clear()

    def end_step(self) -> None:
        """Count passes from 0 again."""
        self._n_passes = 0


def find_broadcast(loss: Tensor) -> str:
    """What is wrong where a prediction (N, 1) met a target (N,), or the other way round; else nothing."""
    waiting: list[Node] = [loss.grad_fn]
    for node in _walk(waiting, FARTHEST):
        below = [one for one, _ in node.next_functions if one is not None]
        if len(below) == 1 and name_node(node) in _WITH_TARGET and node._input_metadata and below[0]._input_metadata:
            made, given = (tuple(one._input_metadata[0].shape) for one in (node, below[0]))
            n = math.prod(given)
            prediction = name_node(below[0]) != "torch::autograd::AccumulateGrad"  # and no parameter
            if prediction and n > 1 and made == (n, n) and given in ((n,), (n, 1)):
                other = (n, 1) if given == (n,) else (n,)
                return f"the loss compares a prediction {given} with a target {other}: they broadcast to {made}"
        waiting += below
    return ""
