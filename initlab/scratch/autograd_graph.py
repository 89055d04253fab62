"""Autograd's own graph, walked from the loss to the parameters, with the hand-written line that does each node's work.

The graph is what the forward pass left behind: `loss.grad_fn` is the first node, `next_functions` are the edges, and a
leaf is an `AccumulateGrad` that holds its tensor in `variable`. Nothing is computed again and no `.grad` is touched.
`gradients` is the whole of backpropagation in one loop over these nodes, without hooks on tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.scratch.graph_text import frames_as_text


class Hand(NamedTuple):
    """What does a node's work in the network by hand ('' where it has no such piece), and its local rule."""

    piece: str
    rule: str


# Autograd's node, without "Backward" and the number of the overload -> the same work by hand, in the book's words
# (`self` and `other` are autograd's words for the two sides of an operator).
HAND: dict[str, Hand] = {
    "AccumulateGrad": Hand("p.g += g", "what arrives at a parameter adds up"),
    "Addmm": Hand("Lin.backward", "inp.g = g @ w.T; w.g = inp.T @ g; b.g = g.sum(0)"),
    "Mm": Hand("Lin.backward", "inp.g = g @ w.T; w.g = inp.T @ g"),
    "Bmm": Hand("Lin.backward", "inp.g = g @ w.mT; w.g = inp.mT @ g"),
    "Mv": Hand("Lin.backward", "w.g = outer(g, inp); inp.g = w.T @ g"),
    "T": Hand("Lin.backward", "w.g = g.T: torch keeps w as (O, I)"),
    "Relu": Hand("Relu.backward", "inp.g = g where inp > 0"),
    "LeakyRelu": Hand("pull_back (leaky_relu)", "inp.g = g * (1 or slope)"),
    "Tanh": Hand("pull_back (tanh)", "inp.g = g * (1 - out**2)"),
    "Sigmoid": Hand("pull_back (sigmoid)", "inp.g = g * out * (1 - out)"),
    "Gelu": Hand("pull_back (gelu)", "inp.g = g * (cdf(inp) + inp * pdf(inp))"),
    "Silu": Hand("pull_back (silu)", "inp.g = g * s * (1 + inp * (1 - s)), s = sigmoid(inp)"),
    "Elu": Hand("pull_back (selu)", "inp.g = g * scale * (1 or alpha * exp(inp))"),
    "MseLoss": Hand("Mse.backward", "out.g = 2 * (out - targ) / N"),
    "Pow": Hand("Mse.backward, its square", "inp.g = g * p * inp**(p - 1)"),
    "Mean": Hand("Mse.backward, its mean", "inp.g = g / N, for every element"),
    "Sub": Hand("Mse.backward, its difference", "self.g = g; other.g = -g"),
    "Squeeze": Hand("Mse.backward, its unsqueeze", "inp.g = g in the shape of inp"),
    "NllLoss": Hand("CrossEntropy.backward", "-1/N at the target's class"),
    "LogSoftmax": Hand("CrossEntropy.backward", "with NllLoss: out.g = (softmax(out) - onehot(targ)) / N"),
    "Gather": Hand("CrossEntropy.backward", "inp.g = g at the target's class, 0 elsewhere"),
    "Add": Hand("", "self.g = g; other.g = g"),
    "Mul": Hand("", "self.g = g * other; other.g = g * self"),
    "Div": Hand("", "self.g = g / other; other.g = -g * self / other**2"),
    "Neg": Hand("", "inp.g = -g"),
    "Exp": Hand("", "inp.g = g * out"),
    "Sum": Hand("", "inp.g = g, for every element"),
    "Transpose": Hand("", "inp.g = g.mT"),
    "Permute": Hand("", "inp.g = g, its axes in the old order"),
    "View": Hand("", "inp.g = g in the shape of inp"),
    "UnsafeView": Hand("", "inp.g = g in the shape of inp"),
    "Unsqueeze": Hand("", "inp.g = g in the shape of inp"),
    "Expand": Hand("", "inp.g = g, summed over what was repeated"),
    "Select": Hand("", "inp.g = g at the chosen index, 0 elsewhere"),
    "Slice": Hand("", "inp.g = g at the chosen indices, 0 elsewhere"),
    "Unbind": Hand("", "inp.g = the outputs' g, stacked"),
    "Stack": Hand("", "the inputs' g = g, unbound"),
    "Cat": Hand("", "the inputs' g = g, split"),
}


def by_hand(name: str) -> Hand:
    """The row of `HAND` for a node's name; empty where there is none.

    >>> by_hand("AddmmBackward0").piece
    'Lin.backward'
    """
    kind = name.rstrip("0123456789").removesuffix("Backward")
    activation = next((name for name in ACTIVATIONS if name.replace("_", "") == kind.lower()), "")
    other = Hand(f"pull_back ({activation})", "inp.g = g * phi'(inp)") if activation else Hand("", "")
    return HAND.get(kind, other)


@dataclass(frozen=True, eq=False)
class Node:
    """One node; `leaf` are all names of the tensor that an `AccumulateGrad` stands for.

    `shapes` belong to what the forward pass returned there, which are the shapes of the gradients that arrive; `next`
    is (id, which of its gradients) for each input of the forward pass, None where the input needs no gradient.
    """

    id: int
    name: str
    leaf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tensors: dict[str, str]  # saved tensors -> shape, or the value of a single number, or "freed"
    values: dict[str, str]  # other things that were saved
    next: tuple[tuple[int, int] | None, ...]
    in_degree: int
    function: Any  # autograd's node itself


@dataclass(frozen=True, eq=False)
class Graph:
    """The nodes, in an order in which each comes after all that send it a gradient; the first is the loss's."""

    nodes: tuple[Node, ...]
    unreached: tuple[str, ...]  # names that were given and get no gradient from this loss

    def frame(self, gradients: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
        """One row per node; with `gradients` the leaves' gradients, numbers as they are and tensors by their norm."""
        return pd.DataFrame([_row(node, gradients or {}) for node in self.nodes], columns=list(NODE_COLUMNS))

    def edges(self) -> pd.DataFrame:
        """One row per gradient that is passed on: output `position` of `source` is input `input` of `target`."""
        rows = [
            (node.id, target[0], position, target[1], str(self.nodes[target[0]].shapes[target[1]]))
            for node in self.nodes
            for position, target in enumerate(node.next)
            if target is not None
        ]
        return pd.DataFrame(rows, columns=["source", "target", "position", "input", "shape"])


NODE_COLUMNS = (
    "id", "node", "leaf", "shape", "in_degree", "next", "saved_tensors", "saved_values", "hand", "rule", "gradient",
)  # fmt: skip


def _row(node: Node, gradients: Mapping[str, Tensor]) -> tuple[object, ...]:
    shown = gradients.get(node.leaf[0]) if node.leaf else None
    return (
        node.id,
        node.name,
        " = ".join(node.leaf),
        ", ".join(map(str, node.shapes)),
        node.in_degree,
        ", ".join("-" if target is None else f"{target[0]}:{target[1]}" for target in node.next),
        _join_items(node.tensors),
        _join_items(node.values),
        *by_hand(node.name),
        "" if shown is None else f"{shown.item():.6g}" if shown.ndim == 0 else f"norm {shown.norm().item():.4g}",
    )


def _join_items(saved: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in saved.items())


def walk(loss: Tensor, names: Mapping[str, Tensor] | nn.Module | None = None) -> Graph:
    """The graph beneath `loss`, one float number; `names` tells the leaves' names, or the module that owns them.

    The order is the one in which autograd runs the nodes: always the latest operation of those that have all their
    gradients, a leaf at once. A tensor that is used twice is one node with two edges in.
    """
    refuse(loss)
    order, in_degree = _order(loss.grad_fn)
    ids = {function: number for number, function in enumerate(order)}
    named = names.named_parameters(remove_duplicate=False) if isinstance(names, nn.Module) else (names or {}).items()
    owners: dict[Tensor, list[str]] = {}  # tensor -> all its names
    for name, tensor in named:
        owners.setdefault(tensor, []).append(name)
    leaf: dict[int, tuple[str, ...]] = {}  # position of each leaf -> its names; one that nobody named is numbered
    unnamed = 0
    for number, function in enumerate(order):
        if function.name().endswith("AccumulateGrad"):
            unnamed += function.variable not in owners
            leaf[number] = tuple(owners.get(function.variable, [f"unnamed {unnamed}"]))
    nodes = tuple(
        Node(
            id=number,
            name=function.name().split("::")[-1],
            leaf=leaf.get(number, ()),
            shapes=tuple(tuple(arriving.shape) for arriving in function._input_metadata),
            **_saved_values(function),
            next=tuple(None if f is None else (ids[f], which) for f, which in function.next_functions),
            in_degree=in_degree[function],
            function=function,
        )
        for number, function in enumerate(order)
    )
    reached = {name for node in nodes for name in node.leaf}
    return Graph(nodes, tuple(name for same in owners.values() for name in same if name not in reached))


def refuse(loss: Tensor) -> None:
    """One line for a loss that has no graph, or from which no backward pass can start."""
    if not isinstance(loss, Tensor):
        raise UsageError(f"loss is a {type(loss).__name__}: must be a tensor that holds one float number")
    if not loss.is_floating_point():
        raise UsageError(f"loss has dtype {str(loss.dtype).removeprefix('torch.')}: only float tensors have gradients")
    if loss.numel() != 1:
        raise UsageError(f"loss has shape {tuple(loss.shape)}: must hold one number; take its mean() or sum()")
    if loss.grad_fn is None:
        why = "it is itself a leaf" if loss.requires_grad else "nothing it was computed from requires a gradient"
        raise UsageError(f"loss has no graph (grad_fn is None): {why}, or it was detached, or made under no_grad")


def _next(function: Any) -> Iterator[Any]:
    return (following for following, _ in function.next_functions if following is not None)


def _order(root: Any) -> tuple[list[Any], dict[Any, int]]:
    """Nodes by Kahn's algorithm with autograd's own priority, so that sums are taken in its order; edges into each."""
    degree, waiting = {root: 0}, [root]
    while waiting:  # a stack, not recursion: a deep network must not meet Python's limit
        for following in _next(waiting.pop()):
            if following not in degree:
                degree[following] = 0
                waiting.append(following)
            degree[following] += 1
    missing, order = dict(degree), []
    ready: list[tuple[int, int, Any]] = [(0, 0, root)]
    pushed = 1
    while ready:
        order.append(heappop(ready)[-1])
        for following in _next(order[-1]):
            missing[following] -= 1
            if not missing[following]:
                heappush(ready, (-following._sequence_nr(), pushed, following))
                pushed += 1
    return order, degree


def _saved_values(function: Any) -> dict[str, dict[str, str]]:
    """What the forward pass left at a node, tensors apart from the rest."""
    tensors: dict[str, str] = {}
    values: dict[str, str] = {}
    for attribute in sorted(name for name in dir(function) if name.startswith(("_saved_", "saved_tensors"))):
        name = attribute.removeprefix("_saved_")
        try:
            value = getattr(function, attribute)
        except RuntimeError as error:  # autograd says at length that it cannot give it any more
            tensors[name] = "freed" if "freed" in str(error) else "changed in place since"
            continue
        (tensors if _holds_tensor(value) else values)[name] = _value_text(value)
    return {"tensors": tensors, "values": values}


def _holds_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _value_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():.6g}" if value.ndim == 0 else str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, int) and value >= 1 << 63:  # autograd shows its negative integers without their sign
        return str(value - (1 << 64))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@torch.no_grad()
def gradients(loss: Tensor, graph: Graph) -> dict[str, Tensor]:
    """Backpropagation over autograd's own nodes: dL/dleaf under every name of the leaf.

    Each node is called with the gradients that arrived for its outputs and returns those of its inputs; where several
    arrive at one place they add up. A leaf that no gradient reaches is left out. Equal to `torch.autograd.grad`.
    """
    if loss.grad_fn is not graph.nodes[0].function:
        raise UsageError("this graph was walked from another loss: give the loss that was given to walk()")
    arrived: list[list[Tensor | None]] = [[None] * len(node.shapes) for node in graph.nodes]
    arrived[0][loss.output_nr] = torch.ones_like(loss)
    leaves: dict[str, Tensor] = {}
    for node in graph.nodes:
        grads, arrived[node.id] = arrived[node.id], []
        if node.leaf:
            leaves.update({name: grads[0] for name in node.leaf if grads[0] is not None})
            continue
        for target, grad in zip(node.next, _call(node, grads), strict=True):
            if target is not None and grad is not None:
                to, which = target
                like = graph.nodes[to].function._input_metadata[which]  # autograd sums over what was broadcast
                shape = tuple(like.shape)
                grad = (grad if tuple(grad.shape) == shape else grad.sum_to_size(shape)).to(like.dtype)
                before = arrived[to][which]
                arrived[to][which] = grad if before is None else before + grad
    return leaves


def _call(node: Node, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The node's own backward; where it cannot be called alone, one line that says which and why."""
    call = node.function
    if hasattr(call, "apply"):  # a `torch.autograd.Function` finds zeros, not None, where nothing arrived
        call = call.apply
        grads = [
            torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device) if grad is None else grad
            for grad, like in zip(grads, node.function._input_metadata, strict=True)
        ]
    try:
        returned = call(*grads)
    except (RuntimeError, TypeError) as error:
        if "freed" in str(error):
            raise UsageError(
                f"what {node.name} (node {node.id}) saved has been freed by an earlier backward pass: "
                "run the forward pass again, or use backward(retain_graph=True)"
            ) from error
        reason = str(error).split("\n")[0]
        raise UsageError(f"{node.name} (node {node.id}) cannot be called by itself: {reason}") from error
    return returned if isinstance(returned, tuple) else (returned,)


class Example(NamedTuple):
    loss: Tensor
    graph: Graph
    gradients: dict[str, Tensor]

    def __str__(self) -> str:
        return as_text(self.graph, self.gradients)


def textbook_example() -> Example:
    """e = (a + b) * d at a = 2, b = 3, d = 4: de/da = de/db = d = 4 and de/dd = a + b = 5.

    >>> {name: grad.item() for name, grad in textbook_example().gradients.items()}
    {'d': 5.0, 'a': 4.0, 'b': 4.0}
    """
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in (("a", 2.0), ("b", 3.0), ("d", 4.0))}
    with torch.enable_grad():
        e = (leaves["a"] + leaves["b"]) * leaves["d"]
    graph = walk(e, leaves)
    return Example(e, graph, gradients(e, graph))


def as_text(graph: Graph, gradients: Mapping[str, Tensor] | None = None, limit: int = 100) -> str:
    """The table of the nodes and the tree from the loss down, each at most `limit` rows long."""
    return frames_as_text(graph.frame(gradients), graph.edges(), graph.unreached, limit)
