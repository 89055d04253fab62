"""The flow of data through a model, from one forward pass of a batch that leaves no trace, and a backward pass too."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from initlab.models.dataflow import Flow, FlowBuilder, FlowNode, Weight
from initlab.probes.hooks import list_inputs
from initlab.probes.operations import OperationMode
from initlab.probes.probed_modules import find_tensors
from initlab.probes.snapshot import all_tensors, left_as_it_was, loss_value, run_backward, run_model
from initlab.probes.tensor_rows import MASKED
from initlab.probes.torch_private import ignore_functions, is_transforming

SOFTMAX = (F.multi_head_attention_forward, F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention)


def measure_logits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The standard deviation over keys of what softmax is given, rms over queries; masked ones are left out."""
    if func is F.multi_head_attention_forward:
        query, key, _, width, n_heads, stacked, bias = args[:7]
        weights = (kwargs["q_proj_weight"], kwargs["k_proj_weight"]) if stacked is None else stacked.split(width)[:2]
        biases = (None, None) if bias is None else bias.split(width)[:2]
        both = zip((query, key), weights, biases, strict=True)
        projected = (F.linear(x, w, b).detach().float() for x, w, b in both)
        q, k = (one.reshape(*one.shape[:-1], n_heads, -1).movedim(0, -2) for one in projected)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (batch, heads, queries, keys)
    elif func is F.scaled_dot_product_attention:
        q, k = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if q.ndim > 2 and q.shape[-3] != k.shape[-3] else k
        logits = q.detach().float() @ k.detach().float().transpose(-2, -1) * scale
    else:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        logits = args[0].detach().float().movedim(dim if isinstance(dim, int) else -1, -1)
    seen = (logits > MASKED) & logits.isfinite()
    n = seen.sum(-1, keepdim=True).clamp_min(1)
    mean = logits.where(seen, 0).sum(-1, keepdim=True) / n
    return float(((logits - mean).where(seen, 0).square().sum(-1, keepdim=True) / n).mean().sqrt())


class TracedFlow(FlowBuilder):
    """Follows one pass: every tensor knows which operation has made it, and every operation what was not finite."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model
        self._made: dict[int, int] = {}  # id of a tensor -> its node
        self._views: dict[int, Weight] = {}  # id of a tensor that was made of a parameter alone
        self._kept: list[Tensor] = []  # so that no id comes twice
        self._at_work: list[tuple[nn.Module, list[int]]] = []  # modules, one inside of another, and their inputs
        self._logits = 0.0  # of the attention that was computed last
        self._leaf: nn.Module | None = None  # the one at work that is one operation

    def record(self, x: Any, y: Any = None, loss: Callable[..., Tensor] | None = None) -> Flow:
        """Run the model on a batch; with a loss, `loss(out, y)` or `loss(out)`, its backward pass too.

        Raises UsageError where the model or the loss fails.
        """
        batch = list(all_tensors(x))
        with ExitStack() as hooks:
            for module in self._model.modules():
                self.find_activation(module)  # before a hook stands there, which a copy of it would copy
            for module in self._model.modules():
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            with left_as_it_was(self._model, batch), OperationMode(lambda: None, self._see):
                out = run_model(self._model, x, batch)
                value = None if loss is None else loss_value(loss, out, y)
                if value is not None:
                    with ignore_functions():
                        run_backward(value, [*self._model.parameters(), *batch])
        return Flow(self.nodes, differentiable=value is None or value.requires_grad)

    def find_parameter(self, arg: Any) -> Weight | None:
        return self._views.get(id(arg)) or super().find_parameter(arg)

    def _find_sources(self, given: Any) -> list[int]:
        return [self._made[id(t)] for t in all_tensors(given) if id(t) in self._made]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_transforming():  # its tensors have no values of their own
            return
        if not self.nodes:
            named = list(list_inputs(module, args, kwargs))
            for part, tensor in named:
                self._add_node(FlowNode("input", part), tensor)
            rest = [t for t in all_tensors((args, kwargs)) if id(t) not in self._made]
            self._add_node(FlowNode("input", "" if not named else "others"), rest)
        self._at_work.append((module, self._find_sources((args, kwargs))))
        if self._leaf is None and self.is_leaf(module):
            self._leaf = module

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_transforming():
            return
        with ignore_functions():
            inputs: list[int] = []
            while self._at_work:
                entered, inputs = self._at_work.pop()
                if entered is module:
                    break
            if self._leaf is not None and self._leaf is not module:
                return
            unknown = [t for t in all_tensors(output) if id(t) not in self._made]
            if self._leaf is module:
                self._leaf = None
                self._add_node(self.describe_module(module, inputs), output)
            elif unknown:  # made by what no mode sees, such as a Function of autograd's
                self._add_node(FlowNode("pass", "", type(module).__name__, None, inputs), unknown)

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_transforming():
            return
        if func in SOFTMAX:
            with ignore_functions():
                self._logits = max(self._logits, measure_logits(func, args, kwargs))
        if self._leaf is not None:
            return
        with ignore_functions():
            inputs = self._find_sources((args, kwargs))
            weight = next(filter(None, map(self.find_parameter, args)), None)
            if inputs:
                self._add_node(self.describe_function(func, args, kwargs, inputs), output)
            elif weight is not None and isinstance(output, Tensor):
                p = weight[0]
                flipped = output.ndim == 2 and output._base is not None and output.stride() == p.stride()[::-1]
                self._views[id(output)] = p, flipped and output.shape == p.shape[::-1]
                self._kept.append(output)

    def _add_node(self, node: FlowNode, output: Any) -> None:
        """A node for an operation, whose tensors are looked at, and their gradients when these come."""
        tensors = list(all_tensors(output))
        if not tensors:
            return
        node.owner = next((self.names.get(module, "") for module, _ in reversed(self._at_work)), "")
        node.logits, self._logits = self._logits, 0.0
        k = self.add(node)
        node.finite = all(bool(t.isfinite().all()) for _, t in find_tensors(tensors))

        def look(gradient: Tensor) -> None:
            node.has_gradient = True
            node.gradient_finite &= bool(gradient.isfinite().all())

        for tensor in tensors:
            self._made[id(tensor)] = k
            self._kept.append(tensor)
            if tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(look)  # type: ignore[no-untyped-call]
