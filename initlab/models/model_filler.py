"""Every parameter of a model by its kind: weights by a rule, norms, biases and tables by what is right for them."""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.models.data_fit import fit_weight
from initlab.models.dataflow import Flow, Follower
from initlab.models.draw_weights import Fill, draw_weight, make_numbers
from initlab.models.fans import ModelTensor, as_weight_of_layer, list_tensors
from initlab.models.init_report import InitReport, InitRow
from initlab.models.symbolic_flow import find_flow
from initlab.models.weight_writer import put_weight, read_weight
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import name_of
from initlab.nn.init import Rule
from initlab.probes.torch_private import NormBase

RESIDUALS = ("1/sqrt(2L)", "zero")
ENDS = ("linear", "convolution", "transposed convolution")
FORGET = 1.0  # the bias of an LSTM's forget gate, Jozefowicz, Zaremba & Sutskever 2015
NOT_FOR_TABLES = ("eye_", "dirac_", "sparse_")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Growth(NamedTuple):
    """By how much more units a layer has than at the base width: into it and out of it, 1 for data and classes."""

    into: float = 1.0
    out: float = 1.0


class ModelFiller:
    """One model, one rule: where each parameter stands in the flow of data, and what becomes of it."""

    def __init__(
        self, model: nn.Module, name: str, rule: Rule | Fill, x: Any, seed: int | None, residual: str | None
    ) -> None:
        self._model, self._name, self._rule, self._x = model, name, rule, x
        self._seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._flow: Flow = find_flow(model, x)
        self._positions = {node.name: k for k, node in reversed(list(self._flow.layers()))}
        self._names = defaultdict[int, list[str]](list)  # of a parameter: all names that it goes by
        for path, p in model.named_parameters(remove_duplicate=False):
            self._names[id(p)].append(path)
        self._tensors = [self.join_uses(tensor) for tensor in list_tensors(model, self._flow.equations())]
        self._remarks: list[str] = []
        self._factors = self.find_residuals(residual) if residual else {}
        if not self._flow.complete:
            self._remarks.append(
                "the code could not be read everywhere: give a batch x, and what follows is seen in a pass"
            )

    def fill(self) -> InitReport:
        """Set everything, then fit to the batch where the rule says so; rows in the order of registration."""
        notes = {tensor.name: self._set(tensor) for tensor in self._tensors}
        if isinstance(self._rule, Rule) and self._rule.attempts:
            for tensor in sorted(self._tensors, key=self.find_position):
                if tensor.is_weight and notes[tensor.name][0]:
                    notes[tensor.name][2].append(self._fit(tensor, self._rule))
        for tensor in self._tensors:
            if tensor.name in self._factors and notes[tensor.name][0]:
                factor = self._factors[tensor.name]
                put_weight(tensor, read_weight(tensor).double() * factor)
                notes[tensor.name][2].append(f"ends a residual branch: times {factor:.4g}")
        rows = []
        for tensor in self._tensors:
            done, gain, words = notes[tensor.name]
            found = read_weight(tensor)
            wide = found.double() if found.is_floating_point() and found.numel() else torch.full((1,), math.nan)
            mean, std = float(wide.mean()), float(wide.std(correction=0))
            frozen = ["frozen"] if not any(p.requires_grad for p in tensor.sources) else []
            others = [path for p in tensor.sources for path in self._names[id(p)][1:]]
            shared = [f"shared with {', '.join(others)}"] if others else []
            sgd, adam = self.find_rates(tensor)
            note = "; ".join(filter(None, [*words, *shared, *frozen]))
            rows.append(InitRow(tensor.name, tuple(found.shape), tensor.kind, done, mean, std, gain, sgd, adam, note))
        return InitReport(self._name, rows, self._remarks, [tensor.sources for tensor in self._tensors])

    def join_uses(self, tensor: ModelTensor) -> ModelTensor:
        """A table that is an output layer too is one: its numbers are multiplied there."""
        for path in self._names[id(tensor.sources[0])][1:] if tensor.sources else ():
            other = self._model.get_submodule(path.rpartition(".")[0])
            if tensor.kind == "embedding" and isinstance(other, nn.Linear):
                return as_weight_of_layer(tensor)
        return tensor

    def find_position(self, tensor: ModelTensor) -> int:
        """Where its layer stands in the flow; what was not met comes last."""
        paths = [path for p in tensor.sources for path in self._names[id(p)]]
        found = [self._positions[path] for path in (tensor.name, *paths) if path in self._positions]
        owners = [tensor.module_name, *(path.rpartition(".")[0] for path in paths)]
        found += [self._positions[path] for path in owners if path in self._positions]
        if not found and isinstance(tensor.module, nn.Linear):  # the output projection inside of torch's attention
            found = [k for k in [self._positions.get(tensor.module_name.rpartition(".")[0])] if k is not None]
        return max(found) if found else len(self._flow.nodes)

    def find_follower(self, tensor: ModelTensor) -> Follower | None:
        position = self.find_position(tensor)
        if position == len(self._flow.nodes):
            return None
        return self._flow.follower(position)

    def _set(self, tensor: ModelTensor) -> tuple[bool, float, list[str]]:
        """Whether it was set, its gain, and words about it."""
        if tensor.values.dtype not in FLOATS or tensor.values.layout is not torch.strided:
            return False, math.nan, [f"its numbers are {str(tensor.values.dtype).removeprefix('torch.')}"]
        if tensor.values.numel() == 0:
            return False, math.nan, ["empty"]
        if tensor.is_weight:
            return self.set_weight(tensor)
        values = torch.zeros(tensor.values.shape)
        if is_norm_weight(tensor):
            return True, math.nan, [put_weight(tensor, values + 1)]
        if (
            tensor.kind == "bias"
            and sum(n > 1 for n in tensor.values.shape) < 2
            and tensor.part not in ("bias_k", "bias_v")
        ):
            return True, math.nan, [self.fill_bias(tensor, values), put_weight(tensor, values)]
        if tensor.kind == "embedding":
            return self.set_table(tensor)
        return False, math.nan, ["no rule for it"]

    def set_weight(self, tensor: ModelTensor) -> tuple[bool, float, list[str]]:
        if isinstance(self._rule, Rule) and any(math.isnan(part.fan_in) for part in tensor.slices):
            return False, math.nan, ["its fans are not known" + ("" if self._x is not None else ": give a batch x")]
        follower = self.find_follower(tensor)
        plain = follower is None or tensor.kind in ("recurrent", "attention")
        activation = None if plain or follower is None else follower.activation
        try:
            values, gain = draw_weight(tensor, self._name, self._rule, activation, self._seed)
        except UsageError as error:
            raise UsageError(f"{tensor.name}: {error}") from error
        words = []
        if len(tensor.slices) > 1:
            words.append(f"{', '.join(part.label for part in tensor.slices)}: each for itself")
        elif follower is not None and tensor.kind in ENDS and isinstance(self._rule, Rule):
            words.append(f"{name_follower(follower)} follows")
        growth = self._find_growth(tensor)
        if growth.into != 1 and follower is not None and follower.kind == "output":
            values *= growth.into**-0.5
            words.append(f"output layer: times {growth.into**-0.5:.4g}")
        return True, gain, [*words, put_weight(tensor, values)]

    def fill_bias(self, tensor: ModelTensor, values: Tensor) -> str:
        """Zeros become what the rule gives biases; says what else than 0 they are."""
        weights = [one for one in self._tensors if one.module is tensor.module and one.is_weight]
        same = [one for one in weights if one.part.replace("weight", "bias") == tensor.part] or weights
        note = ""
        if isinstance(self._rule, Rule) and self._rule.bias and same and same[0].slices[0].fan_in > 0:
            part = same[0].slices[0]
            units = part.fan_out if same[0].kind == "recurrent" else part.fan_in  # as torch has it
            half = self._rule.bias / math.sqrt(units)
            values += make_numbers(tensor.name, self._seed).uniform(tuple(values.shape))[0] * half
            note = f"uniform up to {half:.4g}"
        elif isinstance(self._rule, Rule) and self._rule.sigma_b and same:
            values += make_numbers(tensor.name, self._seed).gaussian(tuple(values.shape))[0] * self._rule.sigma_b
            note = f"normal, standard deviation {self._rule.sigma_b:.4g}"
        elif isinstance(tensor.module, nn.LSTM | nn.LSTMCell) and tensor.part.startswith("bias_ih"):
            for part in tensor.slices:
                if part.label == "forget gate":
                    values[part.start : part.stop] = FORGET
                    note = f"forget gate {FORGET:g}, the others 0"
        return note

    def set_table(self, tensor: ModelTensor) -> tuple[bool, float, list[str]]:
        """Rows that are looked up have no fan_in: N(0, 1), or what a rule without fans or a function gives."""
        rule = self._rule
        if self._name in NOT_FOR_TABLES:
            return False, math.nan, [f"{self._name} is for weights"]
        if isinstance(rule, Rule):
            std = (1.0 if rule.gain is None else rule.gain) if rule.mode == "constant" else 1.0
            rule = Rule(gain=std, mode="constant")
        values, _ = draw_weight(tensor, self._name, rule, None, self._seed)
        padding = getattr(tensor.module, "padding_idx", None)
        if padding is not None:
            values[padding] = 0
        return True, math.nan, ["" if padding is None else f"row {padding} is 0", put_weight(tensor, values)]

    def _fit(self, tensor: ModelTensor, rule: Rule) -> str:
        """Unit variance of the output of a layer on the batch."""
        position = self.find_position(tensor)
        if position == len(self._flow.nodes):
            return "not fitted to the batch: the pass does not use it"
        name, modules = self._flow.nodes[position].name, dict(self._model.named_modules())
        if tensor.kind not in ENDS or name not in modules:
            return "not fitted to the batch: no module gives its product"
        return fit_weight(self._model, tensor, modules[name], self._x, rule)

    def find_residuals(self, residual: str) -> dict[str, float]:
        """What ends the residual branches, by names of parameters, and what it is multiplied by."""
        tables = {k for k, node in self._flow.layers() if node.op.lower().startswith("embedding")}
        branches = [(total, ends) for total, ends in self._flow.branches if not tables.issuperset(ends)]
        factor = 0.0 if residual == "zero" else len(branches) ** -0.5 if branches else 1.0
        nodes = [self._flow.nodes[self.end_branch(end, total)] for total, ends in branches for end in ends]
        layers = {node.name for node in nodes if node.kind == "layer"}
        norms = {node.name or node.owner for node in nodes if node.kind == "norm"} - {""}
        found = {}
        for tensor in self._tensors:
            inside = isinstance(tensor.module, nn.Linear)  # the output projection inside of torch's attention
            parent = tensor.module_name.rpartition(".")[0] if inside else tensor.module_name
            is_end = bool(layers & {tensor.name, tensor.module_name, parent}) and tensor.kind in ENDS
            if is_end or (tensor.module_name in norms and is_norm_weight(tensor)):
                found[tensor.name] = factor
        if not branches:
            self._remarks.append(
                f"residual={residual}: no residual branch was found" + ("; give a batch x" if self._x is None else "")
            )
        else:
            self._remarks.append(f"residual={residual}: {len(branches)} branches, their ends times {factor:.4g}")
            if not found:
                self._remarks.append("none of the branches ends in a layer whose weight could be scaled")
        return found

    def end_branch(self, layer: int, total: int) -> int:
        """The last norm between a layer and the sum, else the layer."""
        ahead, last = [layer], layer
        while ahead:
            one = ahead.pop()
            if self._flow.nodes[one].kind == "norm":
                last = one
            ahead += [
                user
                for user in self._flow.users[one]
                if user < total and self._flow.nodes[user].kind in ("pass", "norm")
            ]
        return last

    def _find_growth(self, tensor: ModelTensor) -> Growth:
        """The width of a layer over the base width of a rule that has one."""
        base = self._rule.base_width if isinstance(self._rule, Rule) else 0
        if not base or tensor.values.ndim == 0 or tensor.kind in ("slope", "scale", "unknown"):
            return Growth()
        position, follower = self.find_position(tensor), self.find_follower(tensor)
        is_output = follower is not None and follower.kind == "output"
        out = 1.0 if is_output else (tensor.slices[0].stop - tensor.slices[0].start) / base
        if tensor.kind == "embedding":
            return Growth(1.0, tensor.values.shape[-1] / base)
        if not tensor.is_weight:
            return Growth(1.0, out)
        nodes = self._flow.nodes
        before = self._flow.ancestors(position) - {position} if position < len(nodes) else set()
        is_input = not any(nodes[k].kind == "layer" for k in before)
        if tensor.kind == "recurrent":  # inputs of the first layer are data, states are not
            is_input = is_input and tensor.part in ("weight_ih_l0", "weight_ih_l0_reverse", "weight_ih")
        groups = getattr(tensor.module, "groups", 1) if tensor.kind == "convolution" else 1
        return Growth(1.0 if is_input else tensor.values.shape[1 - tensor.axis] * groups / base, out)

    def find_rates(self, tensor: ModelTensor) -> tuple[float, float]:
        """What learning rates are multiplied by, SGD's and Adam's: Yang et al. 2022, table 3, as in nn/mup.py."""
        growth = self._find_growth(tensor)
        return growth.out / growth.into, 1 / growth.into


def is_norm_weight(tensor: ModelTensor) -> bool:
    """Also of a norm that somebody has built an activation into."""
    norms = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return tensor.kind == "norm" or (tensor.kind == "scale" and isinstance(tensor.module, norms))


def name_follower(follower: Follower) -> str:
    known: Activation | None = follower.activation
    name = name_of(known) if known is not None else ""
    return str(follower).replace(follower.op, name) if name and not name.startswith("Activation") else str(follower)
