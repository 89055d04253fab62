"""The flow of data through a model, from its code alone: no layer is called.

What torch.fx cannot follow, such as a choice by a value, is taken in the order in which its parts were registered, and
what follows a part there is not known.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from initlab.errors import UsageError
from initlab.models.dataflow import Flow, FlowBuilder, FlowNode, Weight
from initlab.models.traced_flow import TracedFlow
from initlab.probes.probed_modules import look_at_function
from initlab.probes.snapshot import left_as_it_was

FLIPS = ("t", "T", "mT", "transpose", "swapaxes", "permute", "adjoint", "H", "mH")
# Where the branches of torch's layers of several parts end.
TRANSFORMERS: dict[type, tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("self_attn", "linear2"),
    nn.TransformerDecoderLayer: ("self_attn", "multihead_attn", "linear2"),
}


def find_flow(model: nn.Module, x: Any = None) -> Flow:
    """The flow of data through a model, from its code, or from a pass of the batch `x`."""
    refuse_unreadable(model, x is not None)
    if x is not None:
        with attributes_as_they_were(model):
            return TracedFlow(model).record(x)
    return _SymbolicFlow(model).read()


def refuse_unreadable(model: nn.Module, called: bool) -> None:
    """One line for a model that takes no hooks, or, where it will be called, that has no shapes or no memory yet."""
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise UsageError(f"model: {name or 'it'} is scripted; give the nn.Module that it was made of")
    for name, p in model.named_parameters() if called else ():
        if is_lazy(p):
            raise UsageError(f"model: {name} has no shape yet; call the model on a batch once")
        if p.is_meta:
            raise UsageError(f"model: {name} is on the meta device; call model.to_empty(device=...) and initialize it")


@contextmanager
def attributes_as_they_were(model: nn.Module) -> Iterator[None]:
    """What modules keep in attributes, and in lists, dicts and sets of their own, is put back after the block."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    lists = [
        (value, value.copy())
        for _, own in kept
        for name, value in own.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    ]
    try:
        yield
    finally:
        for module, state in kept:
            vars(module).clear()
            vars(module).update(state)
        for value, content in lists:
            value.clear()
            (value.extend if isinstance(content, list) else value.update)(content)


class _Tracer(fx.Tracer):
    """torch.fx, but a module that it cannot follow is one operation of unknown kind."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(autowrap_functions=())
        self.opaque: list[nn.Module] = []
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever code does with a value that it has not
            self.opaque.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _SymbolicFlow(FlowBuilder):
    """Reads the flow from the code of `forward`; attributes that the code sets are put back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = self._root = model
        self._complete = True

    def read(self) -> Flow:
        with attributes_as_they_were(self._model), left_as_it_was(self._model, []):
            self._add_module(self._model, [self.add(FlowNode("input"))])
        return Flow(self.nodes, self._complete)

    def _add_module(self, module: nn.Module, inputs: list[int], traceable: bool = True) -> int:
        """The operations of a module, by its code; where that cannot be followed, its parts as they were registered."""
        if self.is_leaf(module):
            return self.add(self.describe_module(module, inputs))
        if traceable and not (distributed.is_available() and distributed.is_initialized()):  # code may wait for others
            tracer = _Tracer(self.is_leaf)
            try:
                return self._add_graph(module, tracer.trace(module), set(tracer.opaque), inputs)
            except Exception:  # whatever code does with a value that it has not
                pass
        self._complete = False
        return self._add_registered(module, inputs)

    def _add_graph(self, root: nn.Module, graph: fx.Graph, opaque: set[nn.Module], given: list[int]) -> int:
        at: dict[fx.Node, int] = {}
        self._root = root
        last = given[0]
        for k, node in enumerate(graph.nodes):
            inputs = [at[one] for one in node.all_input_nodes if one in at]
            if node.op == "placeholder":
                at[node] = given[min(k, len(given) - 1)]
            elif node.op == "output":
                last = inputs[0] if inputs else last
            elif node.op == "get_attr" or self.find_parameter(node) is not None:
                continue
            elif node.op == "call_module":
                part = root.get_submodule(str(node.target))
                at[node] = self._add_module(part, inputs or given[:1], part not in opaque)
                self._root = root
            else:
                func = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
                at[node] = self.add(self.describe_function(func, node.args, dict(node.kwargs), inputs))
        return last

    def find_parameter(self, arg: Any) -> Weight | None:
        if not isinstance(arg, fx.Node):
            return None
        if arg.op == "get_attr":
            p = operator.attrgetter(str(arg.target))(self._root)
            return super().find_parameter(p)
        if arg.op not in ("call_method", "call_function") or len(arg.all_input_nodes) != 1:
            return None
        found = self.find_parameter(arg.all_input_nodes[0])
        words = [getattr(arg.target, "__name__", str(arg.target)), *map(str, arg.args[1:])]
        return None if found is None else (found[0], found[1] != any(word in FLIPS for word in words))

    def _add_registered(self, module: nn.Module, inputs: list[int]) -> int:
        """The parts of a module one after the other, as they were registered; a function kept as `activation` comes
        after the first of two linear layers, and a layer of torch's Transformer adds what its parts give."""
        last, ends = inputs, TRANSFORMERS.get(type_before_parametrizations(module), ())
        given = inputs
        is_chain, uncertain = type(module).forward in (nn.Sequential.forward, nn.Module.forward) or bool(ends), False
        act = next((v for k, v in vars(module).items() if k in ("activation", "act", "act_fn") and callable(v)), None)
        for name, child in module.named_children():
            if uncertain and self.find_activation(child) is None:
                last = [self.add(FlowNode("unknown", "", "what its code does with it", None, last))]
            last, uncertain = [self._add_module(child, last)], not is_chain
            if name in ends:
                given = last = [self.add(FlowNode("sum", "", "add", None, [*given, *last]))]
            if act is not None and isinstance(child, nn.Linear):
                last = [self.add(FlowNode("activation", "", getattr(act, "__name__", ""), look_at_function(act), last))]
                act = None
        return last[0] if len(last) == 1 else self.add(FlowNode("pass", inputs=last))
