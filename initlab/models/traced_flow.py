"""The flow of data through a model, from one forward pass of a batch that leaves no trace."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from initlab.models.dataflow import Flow, FlowBuilder, FlowNode, Weight
from initlab.probes.operations import OperationMode
from initlab.probes.snapshot import all_tensors, left_as_it_was, run_model
from initlab.probes.torch_private import ignore_functions


class TracedFlow(FlowBuilder):
    """Follows one forward pass: every tensor knows which operation has made it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model
        self._made: dict[int, int] = {}  # id of a tensor -> its node
        self._views: dict[int, Weight] = {}  # id of a tensor that was made of a parameter alone
        self._kept: list[Tensor] = []  # so that no id comes twice
        self._depth = 0
        self._within: list[tuple[nn.Module, list[int]]] = []

    def record(self, x: Any) -> Flow:
        with ExitStack() as hooks:
            for module in self._model.modules():
                if self.is_leaf(module):
                    before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, always_call=True)
                    hooks.callback(before.remove)
                    hooks.callback(after.remove)
            root = self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
            hooks.callback(root.remove)
            batch = list(all_tensors(x))
            with left_as_it_was(self._model, batch), OperationMode(lambda: None, self._see):
                run_model(self._model, x, batch)
        return Flow(self.nodes)

    def find_parameter(self, arg: Any) -> Weight | None:
        return self._views.get(id(arg)) or super().find_parameter(arg)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.nodes:
            start = self.add(FlowNode("input"))
            for tensor in all_tensors((args, kwargs)):
                self._note(tensor, start)

    def _note(self, tensor: Tensor, node: int) -> None:
        self._made[id(tensor)] = node
        self._kept.append(tensor)

    def _find_sources(self, given: Any) -> list[int]:
        return [self._made[id(t)] for t in all_tensors(given) if id(t) in self._made]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._within.append((module, self._find_sources((args, kwargs))))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with ignore_functions():
            while self._within:
                entered, inputs = self._within.pop()
                if entered is module:
                    break
            if self._within or not any(True for _ in all_tensors(output)):
                return
            node = self.add(self.describe_module(module, inputs))
            for tensor in all_tensors(output):
                self._note(tensor, node)

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._within or not any(True for _ in all_tensors(output)):
            return
        with ignore_functions():
            inputs = self._find_sources((args, kwargs))
            weight = next(filter(None, map(self.find_parameter, args)), None)
            if not inputs and weight is not None and isinstance(output, Tensor):
                p = weight[0]
                flipped = output.ndim == 2 and output._base is not None and output.stride() == p.stride()[::-1]
                self._views[id(output)] = p, flipped and output.shape == p.shape[::-1]
                self._kept.append(output)
            if inputs:
                node = self.add(self.describe_function(func, args, kwargs, inputs))
                for tensor in all_tensors(output):
                    self._note(tensor, node)
