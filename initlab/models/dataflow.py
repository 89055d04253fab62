"""What follows each layer of a model: an activation, a norm, a sum, a product, the output; and where branches end.

`symbolic_flow` reads the flow of data from the code, `traced_flow` from a pass of a batch.
"""

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from initlab.models.fans import is_norm
from initlab.nn.activations import Activation
from initlab.probes.computed_weights import PARAMETRIZED
from initlab.probes.operations import CONVOLUTIONS, FACTORS, PRODUCTS, find_operation
from initlab.probes.probed_modules import find_activation, is_owner, look_at_function, name_output

Weight = tuple[nn.Parameter, bool]  # a parameter, and whether its two dimensions are exchanged
SUMS = {torch.add, operator.add, operator.iadd, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.sub}
SUMS |= {Tensor.__iadd__, operator.sub, torch.sub, Tensor.__sub__, Tensor.__rsub__}
TIMES = FACTORS | {operator.mul, operator.imul, operator.truediv}
LEAVES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass
class FlowNode:
    """An operation of the flow: a layer, an activation, a norm, a sum, ...; `pass` for what changes only the shape."""

    kind: str
    name: str = ""  # of the module, or of the parameter that a function uses
    op: str = ""
    activation: Activation | None = None
    inputs: list[int] = field(default_factory=list)
    owner: str = ""  # the innermost module whose code called it
    finite: bool = True  # whether all that it gave was; and all of the loss gradient at that, where one came
    gradient_finite: bool = True
    has_gradient: bool = False
    logits: float = 0.0  # standard deviation over keys of what softmax is given
    equation: str = ""  # what a function does with it, as einsum writes it: inputs i, outputs o


@dataclass
class Follower:
    """What a layer's output meets first: `kind` and `op`; an activation also behind a norm, which `normed` says."""

    kind: str
    op: str
    activation: Activation | None = None
    normed: bool = False

    def __str__(self) -> str:
        words = {"sum": "a sum", "product": "a product", "norm": f"{self.op}"}
        return f"{'a norm, then ' if self.normed and self.kind != 'norm' else ''}{words.get(self.kind, self.op)}"


@dataclass
class Flow:
    """The operations of a model in order, each with those that it takes its inputs from."""

    nodes: list[FlowNode]
    complete: bool = True  # False where parts were taken in the order of registration
    differentiable: bool = True  # whether the loss of a pass had a gradient

    def __post_init__(self) -> None:
        self.users: list[list[int]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            for source in node.inputs:
                self.users[source].append(k)

    def layers(self) -> Iterator[tuple[int, FlowNode]]:
        """The layers in the order in which they run."""
        return ((k, node) for k, node in enumerate(self.nodes) if node.kind == "layer")

    def equations(self) -> dict[str, str]:
        """What functions do with parameters, by the parameters' names."""
        return {node.name: node.equation for _, node in self.layers() if node.equation}

    def follower(self, k: int) -> Follower:
        """What the output of a node meets first, apart from what changes only its shape."""
        order = ("activation", "product", "norm", "attention", "sum", "layer", "other", "unknown", "output")
        found = sorted(self._meet(k, False, set()), key=lambda one: order.index(one.kind))
        return found[0] if found else Follower("output", "the output")

    def is_gate(self, k: int) -> bool:
        """Whether the activation behind a layer is a factor of a product."""
        stack, seen = [k] if k >= 0 else [], set[int]()
        while stack:
            for user in self.users[stack.pop()]:
                if self.nodes[user].kind == "activation":
                    return self.follower(user).kind == "product"
                if user not in seen and self.nodes[user].kind in ("pass", "norm"):
                    seen.add(user)
                    stack.append(user)
        return False

    def _meet(self, k: int, normed: bool, seen: set[int]) -> Iterator[Follower]:
        for user in self.users[k]:
            if user in seen:
                continue
            seen.add(user)
            node = self.nodes[user]
            if node.kind == "pass":
                yield from self._meet(user, normed, seen)
            elif node.kind == "norm":
                behind = next(self._meet(user, True, seen), None)
                is_activation = behind is not None and behind.kind == "activation"
                yield behind if behind is not None and is_activation else Follower("norm", node.op, None, True)
            else:
                yield Follower(node.kind, node.op, node.activation, normed)

    def spoiled(self) -> set[int]:
        """Operations whose nan or inf reaches a layer, a norm, an activation or the end; a mask of -inf does not."""
        found = set[int]()
        for k in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[k]
            ends = node.kind in ("layer", "norm", "activation") or k == len(self.nodes) - 1
            if not node.finite and (ends or any(user in found for user in self.users[k])):
                found.add(k)
        return found

    def ancestors(self, k: int) -> set[int]:
        """Everything that a node depends on, itself included."""
        found, stack = set[int](), [k]
        while stack:
            one = stack.pop()
            if one not in found:
                found.add(one)
                stack.extend(self.nodes[one].inputs)
        return found

    def depths(self) -> dict[str, list[int]]:
        """How many layers lie on the longest way to each layer, itself counted, by its name and for each of its calls.

        A layer that is a function stands under the name of the module that calls it.
        """
        depth, found = [0] * len(self.nodes), dict[str, list[int]]()
        for k, node in enumerate(self.nodes):
            depth[k] = max((depth[i] for i in node.inputs), default=0) + (node.kind == "layer")
            if node.kind == "layer":
                found.setdefault(node.owner if node.equation else node.name, []).append(depth[k])
        return found

    @cached_property
    def branches(self) -> list[tuple[int, list[int]]]:
        """The sums of residual connections, each with the layers that a branch ends in.

        Of two summands, the branch is the one with more layers that the other does not depend on.
        """
        found = []
        for k, node in enumerate(self.nodes):
            if node.kind != "sum" or len(node.inputs) != 2:
                continue
            a, b = (self.ancestors(one) for one in node.inputs)
            if not (a & b):  # two inputs of the network, added
                continue
            counts = [len([i for i in one - other if self.nodes[i].kind == "layer"]) for one, other in ((a, b), (b, a))]
            if max(counts) == 0:
                continue
            end = node.inputs[0] if counts[0] >= counts[1] else node.inputs[1]
            found.append((k, self.last_layers(end)))
        return found

    def last_layers(self, k: int) -> list[int]:
        """The layers nearest above a node, itself included."""
        found, stack, seen = [], [k], set[int]()
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            node = self.nodes[one]
            if node.kind == "layer":
                found.append(one)
            elif node.kind in ("product", "sum"):
                stack.extend(node.inputs[:1])
            else:
                stack.extend(node.inputs)
        return found


class FlowBuilder:
    """Collects nodes; what a module or a function is, by its own table."""

    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[FlowNode] = []
        self.names = {module: name for name, module in model.named_modules()}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self._looked_at: dict[nn.Module, Activation | None] = {}

    def find_parameter(self, arg: Any) -> Weight | None:
        """The parameter that an argument of a function is, or is a view of."""
        return (arg, False) if isinstance(arg, nn.Parameter) and id(arg) in self.parameters else None

    def find_activation(self, module: nn.Module) -> Activation | None:
        """The function of a module that is an activation, torch's or somebody's own, such as a library's GELU.

        The forward function of one's own is called with a few numbers, if the module has no parts and no state.
        """
        if module not in self._looked_at:
            found = None if isinstance(module, nn.Identity) else find_activation(module)
            inside = (module.children(), module.parameters(), module.buffers())
            own = [value for name, value in vars(module).items() if not name.startswith("_") and name != "training"]
            plain = all(isinstance(value, int | float | str) or callable(value) for value in own)
            if found is None and is_owner(module) and plain and all(next(parts, None) is None for parts in inside):
                needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
                found = look_at_function(module.forward) if len(needed) == 1 else None
            self._looked_at[module] = found
        return self._looked_at[module]

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a module is one operation: an activation, or one of torch's that calls no part of its own."""
        if isinstance(module, LEAVES):
            return True
        inside = any(name != PARAMETRIZED for name, _ in module.named_children())
        return not inside and (not is_owner(module) or is_norm(module) or self.find_activation(module) is not None)

    def add(self, node: FlowNode) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def describe_module(self, module: nn.Module, inputs: list[int]) -> FlowNode:
        name, op = self.names.get(module, ""), type(module).__name__
        word, activation = name_output(module), self.find_activation(module)
        if activation is not None:
            return FlowNode("activation", name, op, activation, inputs)
        if is_norm(module):
            return FlowNode("norm", name, op, None, inputs)
        kinds = {"preactivation": "layer", "norm": "norm", "embedding": "layer", "activation": "attention"}
        return FlowNode(kinds.get(word, "pass"), name, op, None, inputs)

    def describe_function(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[int]
    ) -> FlowNode:
        used = [one for arg in (*args, *kwargs.values()) if (one := self.find_parameter(arg)) is not None]
        op = getattr(func, "__name__", str(func)).strip("_")
        if func in SUMS:
            return FlowNode("sum" if len(inputs) == 2 else "pass", "", op, None, inputs)
        if func in TIMES:
            return FlowNode("product" if len(set(inputs)) == 2 else "pass", "", op, None, inputs)
        found = find_operation(func, args, kwargs)
        if found is None:
            return FlowNode("pass", "", op, None, inputs)
        if found.name in PRODUCTS or found.name in ("linear", "bilinear", *CONVOLUTIONS):
            if not used:
                return FlowNode("attention", "", found.name, None, inputs)
            p, flipped = next((one for one in used if one[0].ndim > 1), used[0])
            is_weight = [self.find_parameter(arg) is not None for arg in args]
            equation = _find_equation(found.name, args, is_weight, p.ndim, flipped)
            return FlowNode("layer", self.parameters[id(p)], found.name, None, inputs, equation=equation)
        kinds = {"activation": "activation", "norm": "norm", "attention": "attention", "embedding": "layer"}
        kind = kinds.get(found.word, "other" if found.word == "other" else "pass")
        if kind == "activation" and found.activation is None:
            kind = "attention"
        name = self.parameters[id(used[0][0])] if used and kind == "layer" else ""
        return FlowNode(kind, name, found.name, found.activation, inputs)


def _find_equation(name: str, args: tuple[Any, ...], is_weight: list[bool], ndim: int, flipped: bool) -> str:
    """The dimensions of a weight in a function: i is summed over, o counts outputs, b both tensors have.

    >>> _find_equation("matmul", ("x", "w"), [False, True], 2, False)
    'io'
    """
    if name == "einsum" and isinstance(args[0], str) and "->" in args[0] and True in is_weight[1:]:
        inputs, output = args[0].replace(" ", "").split("->")
        own = inputs.split(",")[is_weight[1:].index(True)]
        others = inputs.replace(own, "", 1)
        return "".join("i" if k not in output else "b" if k in others else "o" for k in own)
    if name in CONVOLUTIONS or name in ("bilinear", "einsum", "tensordot"):
        return ""
    words = "io" if name != "linear" and is_weight[-1] else "oi"
    return "b" * (ndim - 2) + (words[::-1] if flipped else words)
