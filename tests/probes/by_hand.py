"""What a network and its optimizers do, caught by plain hooks of torch in float64, and held against a probe's rows.

A loop runs three times from the same state: alone, with the hooks of this file, and watched by initlab. The first and
the last must agree bit for bit. Every module's output and its gradient, every parameter with its gradient and its
update must have a row with the right numbers, or be named in a warning.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode

import initlab

# Sums of float32 entries in float64, in another order: entries * 2^-53, with room.
RELATIVE = 1e-11
ROUNDED = 2.0**-24  # an update is the difference of two weights in their own format
WORDS = ["stage", "layer", "tensor", "direction", "name", "part", "call", "op", "pass", "step", "seed"]
PARAMETERS = ["weight", "bias", "update"]
Axis = Callable[[str, Tensor], int | None]


def usual_axis(name: str, x: Tensor) -> int | None:
    """Images (N, C, H, W) have their units in dimension 1, everything else in the last."""
    return 1 if x.ndim == 4 else x.ndim - 1


def flat(x: Tensor, axis: int = -1) -> Tensor:
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def numbers(x: Tensor, axis: int | None = None) -> dict[str, float]:
    """Statistics of a tensor in float64; those of its units, if it is said where they are."""
    x = x.detach().double()
    found = {
        "count": float(x.numel()),
        "rms": float(x.square().mean().sqrt()),
        "std": float(x.std(correction=0)),
        "min": float(x.min()),
        "max": float(x.max()),
        "frac_zero": float((x == 0).double().mean()),
    }
    if axis is not None and x.ndim > 1:
        rows = flat(x, axis)
        lengths = rows.norm(dim=1, keepdim=True)
        alive = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
        k = len(alive)
        if k > 1:
            found["cosine"] = float((alive.sum(0).square().sum() - k) / (k * (k - 1)))
        found["dead"] = float((rows == 0).all(0).double().mean())
    return found


def parts_of(output: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors of a nested output with their paths."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield path, output
    elif isinstance(output, Mapping | tuple | list):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from parts_of(value, f"{path}.{key}" if path else str(key))


class Place(NamedTuple):
    """Where a tensor was caught; `part` is a path in an output, or the name of a parameter."""

    step: int
    name: str
    part: str
    call: int
    direction: str
    pass_: int = 0
    word: str = ""  # of parameters: "value" or "update"


@dataclass
class Trace:
    """Everything that came by; whoever runs the loop counts the steps, and passes without autograd may be left out."""

    autograd_only: bool = True
    step: int = 0
    axis: Axis = usual_axis
    values: dict[Place, dict[str, float]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    leaves: set[str] = field(default_factory=set)

    def end_step(self) -> None:
        self.step += 1
        self.calls.clear()

    def follow(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        for name, module in model.named_modules():
            name = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
            if not any(module.children()):
                self.leaves.add(name)
            module.register_forward_hook(self._see_output(name))
        for optimizer in optimizers:
            self._follow_optimizer(model, optimizer)

    def _see_output(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if self.autograd_only and not torch.is_grad_enabled():
                return
            call = self.calls[name]
            self.calls[name] += 1
            for part, x in parts_of(output):
                place = Place(self.step, name, part, call, "forward")
                self.values[place] = numbers(x, self.axis(name, x))
                if x.requires_grad:
                    x.register_hook(self._see_gradient(place))

        return see

    def _see_gradient(self, place: Place) -> Callable[[Tensor], None]:
        seen = Counter[str]()

        def see(gradient: Tensor) -> None:
            key = place._replace(direction="backward", pass_=seen["pass"])
            seen["pass"] += 1
            self.values[key] = numbers(gradient, self.axis(place.name, gradient))

        return see

    def _follow_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        named = {id(p): name for name, p in model.named_parameters()}
        held = [(named[id(p)], p) for group in optimizer.param_groups for p in group["params"] if id(p) in named]
        before: dict[str, Tensor] = {}

        def place(name: str, direction: str, word: str) -> Place:
            module, _, part = name.replace("_orig_mod.", "").rpartition(".")
            return Place(self.step, module, part, 0, direction, 0, word)

        def see_before(*_: Any) -> None:
            for name, p in held:
                before[name] = p.detach().clone()
                self.values[place(name, "forward", "value")] = numbers(p)
                if p.grad is not None:
                    self.values[place(name, "backward", "value")] = numbers(p.grad)

        def see_after(*_: Any) -> None:
            for name, p in held:
                self.values[place(name, "forward", "update")] = numbers(p.detach().double() - before[name].double())

        optimizer.register_step_pre_hook(see_before)
        optimizer.register_step_post_hook(see_after)


def count_hooks(model: nn.Module) -> int:
    """Hooks of any kind, on modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def faults(rows: pd.DataFrame, trace: Trace, said: str) -> list[str]:
    """What has no row, two rows, or a row with other numbers."""
    found = [f"{n} rows with equal words" for n in [int(rows.duplicated(WORDS).sum())] if n]
    is_parameter = rows["tensor"].isin(PARAMETERS)
    columns = ["step", "name", "part", "call", "direction", "pass"]
    plain = rows[~is_parameter & (rows["op"] != "input")]
    is_parameter &= rows["op"] != "backward"  # as the backward pass has left them
    by_place: dict[tuple[Any, ...], list[int]] = {}
    for number, key in zip(plain.index, plain[columns].itertuples(index=False, name=None), strict=True):
        by_place.setdefault((*key, ""), []).append(number)
    own = rows[is_parameter]
    for number, word, key in zip(
        own.index, own["tensor"], own[columns].itertuples(index=False, name=None), strict=True
    ):
        by_place.setdefault((*key, "update" if word == "update" else "value"), []).append(number)
    known = set(zip(*[rows[c] for c in ("step", "direction", "name", "count")], rows["rms"].round(9), strict=True))
    known |= {(step, direction, "", count, rms) for step, direction, _, count, rms in known}
    for place, wanted in trace.values.items():
        numbers_of_rows = by_place.get(tuple(place), [])
        if len(numbers_of_rows) > 1:
            found.append(f"{len(numbers_of_rows)} rows: {place}")
        for number in numbers_of_rows:
            found += [f"{place}: {text}" for text in differences(rows.loc[number], wanted)]
        if not numbers_of_rows and not _is_biased_update(place, rows):
            # A module that returns what its last function gave has that row; a block may return what a part returned.
            name = place.name if place.name in trace.leaves else ""
            elsewhere = (place.step, place.direction, name, wanted["count"], round(wanted["rms"], 9)) in known
            if (place.word or not elsewhere) and place.name not in said.split():
                found.append(f"no row: {place}")
    return found


def _is_biased_update(place: Place, rows: pd.DataFrame) -> bool:
    """Updates have rows for weights only."""
    if place.word != "update":
        return False
    mine = rows[(rows["name"] == place.name) & (rows["part"] == place.part)]
    return set(mine["tensor"]) == {"bias"}


def differences(row: pd.Series, wanted: Mapping[str, float]) -> list[str]:
    """Numbers of a row that are not those of the tensor."""
    size = max(abs(wanted["min"]), abs(wanted["max"]))
    found = []
    for name, value in wanted.items():
        column = "frac_dead" if name == "dead" else name
        given = float(row[column])
        if name == "dead" and (row["tensor"] != "activation" or row["direction"] != "forward"):
            continue
        relative = ROUNDED if row["tensor"] == "update" else RELATIVE
        room = {"cosine": 1e-9, "std": relative * size}.get(name, relative * abs(value))
        if not (abs(given - value) <= room or (given != given and value != value)):
            found.append(f"{column} {given:.9g} (truth {value:.9g})")
    return found


class Watched(NamedTuple):
    """What a watched loop gives: its rows, what was warned, and what was caught by hand."""

    rows: pd.DataFrame
    said: str
    trace: Trace
    model: nn.Module

    def check(self) -> None:
        found = faults(self.rows, self.trace, self.said)
        assert not found, "\n".join([f"{len(found)} faults; warned: {self.said!r}", *found[:25]])


Make = Callable[[nn.Module], list[Optimizer]]
Step = Callable[[nn.Module, list[Optimizer]], Tensor]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)]


def watch(
    model: nn.Module, step: Step, make: Make = sgd, steps: int = 2, axis: Axis = usual_axis, given: bool = True
) -> Watched:
    """Run a loop three times from the same state; the loop's own steps are the steps of the trace.

    given: whether the probe is told of the optimizers.
    """
    results, trace = [], Trace(axis=axis, autograd_only=given)
    rows, said, last = pd.DataFrame(), "", model
    for who in ("alone", "by hand", "watched"):
        own = copy.deepcopy(model)
        optimizers = make(own)
        before = count_hooks(own)
        if who == "by hand":
            trace.follow(own, optimizers if given else [])
        torch.manual_seed(0)
        losses = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            probe = initlab.probe(own, optimizer=optimizers if given else None) if who == "watched" else None
            if probe is not None:
                probe.__enter__()
            try:
                for _ in range(steps):
                    losses.append(step(own, optimizers).detach().clone())
                    if who == "by hand":
                        trace.end_step()
            finally:
                if probe is not None:
                    probe.__exit__(None, None, None)
        if probe is not None:
            rows, last = probe.frame(), own
            said = " ".join(str(one.message) for one in caught if "probe" in str(one.message)).replace(",", " ")
            said = said.replace(";", " ")
            assert count_hooks(own) == before
            assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks
            assert _get_current_function_mode() is None
        grads = [p.grad for p in own.parameters() if p.grad is not None]
        results.append([t.detach().clone() for t in (*losses, *own.parameters(), *own.buffers(), *grads)])
    for left, right in zip(results[0], results[2], strict=True):
        assert torch.equal(left, right) or (left != left).any()
    return Watched(rows, said, trace, last)


def snapshot(
    model: nn.Module, x: Any, y: Any = None, loss: Callable[..., Tensor] | None = None, axis: Axis = usual_axis
) -> Watched:
    """One pass by `initlab.measure`, beside the same pass with hooks by hand; the model stays as it was."""
    trace, own = Trace(axis=axis, autograd_only=False), copy.deepcopy(model)
    trace.follow(own)
    torch.manual_seed(0)
    out = own(**x) if isinstance(x, Mapping) else own(*x) if isinstance(x, tuple) else own(x)
    if loss is not None:
        (loss(out) if y is None else loss(out, y)).backward()
    for name, p in own.named_parameters():
        module, _, part = name.rpartition(".")
        trace.values[Place(0, module, part, 0, "forward", 0, "value")] = numbers(p)
        if p.grad is not None:
            trace.values[Place(0, module, part, 0, "backward", 0, "value")] = numbers(p.grad)
    before, state = count_hooks(model), [t.clone() for t in model.state_dict().values()]
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = initlab.measure(model, x, y, loss)
    said = " ".join(str(one.message) for one in caught if "probe" in str(one.message)).replace(",", " ")
    assert count_hooks(model) == before and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, state, model.state_dict().values()))
    return Watched(rows, said.replace(";", " "), trace, model)


# --- what many situations begin with ---------------------------------------------------------------------------------

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def once(model: nn.Module, optimizers: list[Optimizer], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """One batch as in the book."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    value = loss(model)
    torch.autograd.backward(value)
    for optimizer in optimizers:
        optimizer.step()
    return value


def square(model: nn.Module) -> Tensor:
    out: Tensor = model(X)
    return out.square().mean()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
