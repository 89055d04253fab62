"""One backward pass followed step by step: who sets which `.g`, from what, with shapes and norms.

The pass is really made, by the classes of `scratch/classes.py`, and watched from outside: before and after each
`backward()` every tensor is asked for its `.g`. Beside it stand the local rules with their derivatives as text that
SymPy can read; the tests let SymPy differentiate them. Knows nothing of autograd, whose own graph is `task=graph`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from initlab.errors import UsageError, check, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, gaussian, permutation, rule
from initlab.scratch.classes import LOSS_LAYERS, Act, Lin
from initlab.scratch.layers import LOSSES, g_of
from initlab.stats.dtypes import resolve_dtype
from initlab.stats.statistics import STATISTICS, measure
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.networks import draw_trained


class Symbolic(NamedTuple):
    """One number out of numbers in, and what it changes by for each of them; both in SymPy's notation."""

    formula: str
    derivatives: dict[str, str]


# Every activation, loss and the linear layer, for one entry. In a loss `out` is one entry of the last layer, N the
# batch; `rest` is the sum of exp over the other classes, `hit` 1 for the target's class and 0 for the others.
SYMBOLIC: dict[str, Symbolic] = {
    **{name: Symbolic(row.formula, {"z": row.derivative}) for name, row in ACTIVATIONS.items()},
    "lin": Symbolic("inp*w + b", {"inp": "w", "w": "inp", "b": "1"}),
    "mse": Symbolic("(out - targ)**2/N", {"out": "2*(out - targ)/N"}),
    "cross_entropy": Symbolic("(log(exp(out) + rest) - hit*out)/N", {"out": "(exp(out)/(exp(out) + rest) - hit)/N"}),
}

# The same for whole tensors, as `layers.py` computes it: class -> what each of its tensors is set to.
SETS: dict[str, dict[str, str]] = {
    "Lin": {"out": "inp @ w + b", "inp.g": "out.g @ w.T", "w.g": "inp.T @ out.g", "b.g": "sum of out.g over the batch"},
    "Act": {"out": "phi(inp)", "inp.g": "out.g * phi'(inp)"},
    "Mse": {"out": "mean of (inp - targ)^2", "inp.g": "2 (inp - targ) / N"},
    "CrossEntropy": {"out": "mean of -log softmax(inp)[targ]", "inp.g": "(softmax(inp) - onehot(targ)) / N"},
}


@dataclass(frozen=True)
class Explanation:
    """`steps`: a row per tensor that is set; `rules`: a row per derivative; `text`: both told in order."""

    steps: pd.DataFrame
    rules: pd.DataFrame
    text: str

    def __str__(self) -> str:
        return self.text


def explain(
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    activation: str = "relu",
    loss: str = "mse",
    init: str | Rule = "kaiming",
    inputs: int = 10,
    classes: int = 10,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> Explanation:
    """Follow one forward and one backward pass of `depth` hidden layers over a Gaussian batch.

    Under mse the network ends in one unit and the targets are Gaussian, else in `classes` units and classes.
    """
    check(train_depth=depth, train_width=width, train_batch=batch, seed=seed)
    for name, size in (("inputs", inputs), ("classes", classes)):
        if size < 1:
            raise UsageError(f"{name}={size}: must be at least 1")
    row = choose(ACTIVATIONS, activation, "activation")
    sizes = [inputs, *[width] * depth, classes if choose(LOSSES, loss, "train.loss").classes else 1]
    number, place = resolve_dtype(dtype), find_device(device)
    scaling = rule(init)
    xb = gaussian((batch, inputs), seed, "input").to(place, number)
    parameters = [(w[0], b[0]) for w, b in draw_trained([scaling], row, sizes, [seed], xb[None]).parameters]
    yb = gaussian((batch,), seed, "target").to(number)
    if LOSSES[loss].classes:
        yb = permutation(batch, seed, "target") % classes
    steps = _followed(parameters, xb, yb.to(place), activation, loss)
    rules = _rules(["lin", *[activation] * (depth > 0), loss])
    return Explanation(steps, rules, _told(steps, rules))


# --- the pass, watched ------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A layer's object, the number of its linear layer, and how it is called: lin1, relu1, ..., mse."""

    object: Any
    layer: int
    name: str

    @property
    def sets(self) -> dict[str, str]:
        return SETS[type(self.object).__name__]


def _followed(
    parameters: Sequence[tuple[Tensor, Tensor]], xb: Tensor, yb: Tensor, activation: str, loss: str
) -> pd.DataFrame:
    """The classes of the book run one by one, forward and in reverse; a row for everything that one of them sets."""
    places, watch = _places(parameters, activation, loss), _Watch()
    watch.name(xb, "xb")
    for k, pair in enumerate(parameters, start=1):
        for value, letter in zip(pair, "wb", strict=True):
            watch.name(value, f"{letter}{k}")
    value = xb
    for place in places:
        value = place.object(value) if place is not places[-1] else place.object(value, yb)
        watch.forward(place, value)
    for k in range(len(places) - 1, -1, -1):
        watch.backward(places[k], places[k - 1] if k else None)
    return pd.DataFrame(watch.rows)


def _places(parameters: Sequence[tuple[Tensor, Tensor]], activation: str, loss: str) -> list[_Place]:
    places = []
    for k, (w, b) in enumerate(parameters, start=1):
        places += [
            _Place(Lin(w, b, inp_grad=k > 1), k, f"lin{k}"),
            _Place(Act(ACTIVATIONS[activation]), k, f"{activation}{k}"),
        ]
    return [*places[:-1], _Place(LOSS_LAYERS[loss](), len(parameters), loss)]


class _Watch:
    """Knows the tensors by name and who set the `.g` of each; found out by looking, not by asking the layers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.step = 0
        self._tensors: list[tuple[Tensor, str]] = []
        self._setter: dict[str, tuple[int, str]] = {}

    def name(self, value: Tensor, name: str) -> None:
        self._tensors.append((value, name))

    def name_of(self, value: Tensor) -> str:
        return next(name for known, name in self._tensors if known is value)

    def forward(self, place: _Place, out: Tensor) -> None:
        self.step += 1
        letter = {Lin: "z", Act: "a"}.get(type(place.object))
        self.name(out, f"{letter}{place.layer}" if letter else "loss")
        self._note("forward", place, "out", out, reads=self.name_of(place.object.inp))

    def backward(self, place: _Place, below: _Place | None) -> None:
        """Run the layer's backward; whatever has a `.g` that it had not before was set by it."""
        self.step += 1
        before = {name for value, name in self._tensors if hasattr(value, "g")}
        place.object.backward()
        out = self.name_of(place.object.out)
        step, setter = self._setter.get(out, (0, ""))
        for value, name in self._tensors:
            if hasattr(value, "g") and name not in before:
                attribute = next(a for a in ("inp", "w", "b") if getattr(place.object, a, None) is value)
                reader = below.name if attribute == "inp" and below else "optimizer"
                origin = {"reads": f"{out}.g" if setter else "", "set_by": setter, "set_in": step, "read_by": reader}
                self._note("backward", place, f"{attribute}.g", g_of(value), **origin)
                self._setter[name] = (self.step, place.name)

    def _note(self, direction: str, place: _Place, attribute: str, value: Tensor, **more: object) -> None:
        owner = getattr(place.object, attribute.removesuffix(".g"))
        row = {
            "step": self.step, "direction": direction, "layer": place.layer, "name": place.name,
            "sets": f"self.{attribute}", "tensor": self.name_of(owner) + ".g" * attribute.endswith(".g"),
            "formula": place.sets[attribute], "reads": "", "set_by": "", "set_in": 0, "read_by": "",
            "shape": "x".join(map(str, value.shape)) or "number",
        }  # fmt: skip
        self.rows.append(row | more | _sizes(value))


def _sizes(value: Tensor) -> dict[str, float]:
    """Norm and rms, which outlive the number format."""
    found = dict(zip(STATISTICS, measure(value.reshape(1, -1), batched=False).tolist(), strict=True))
    return {"norm": found["norm"], "rms": found["rms"]}


# --- the telling ------------------------------------------------------------------------------------------------------


def _rules(names: Sequence[str]) -> pd.DataFrame:
    """The local rules that this network uses, a row per derivative."""
    rows = [
        {"rule": name, "formula": SYMBOLIC[name].formula, "with_respect_to": variable, "derivative": derivative}
        for name in names
        for variable, derivative in SYMBOLIC[name].derivatives.items()
    ]
    return pd.DataFrame(rows)


ANSWERS = """\
Where does self.out.g come from?
  No layer sets the .g of its own out. {above} does: its inp and the out of {below} are one tensor, {tensor}, under two
  names. So self.inp.g, set there in step {step}, is what {below} reads as self.out.g in step {next}.
Why inp.g in the loss?
  The loss is the last layer: nothing comes after it that could leave a gradient on its out, and dL/dL is 1. Its
  backward therefore reads no gradient and begins the chain, with the derivative with respect to its own inp.
Why no xb.g?
  lin1 could set it, but nobody would read it: the data are not trained. It is the one product that is saved.
"""


def _told(steps: pd.DataFrame, rules: pd.DataFrame) -> str:
    """All of it as text: forward, backward, the questions that readers ask, the local rules."""
    backward = steps[steps["direction"] == "backward"]
    first, second = backward.iloc[0], backward.iloc[1]
    words = {"above": first["name"], "step": first["step"], "below": second["name"], "next": second["step"]}
    answers = ANSWERS.format(tensor=second["reads"].removesuffix(".g"), **words)
    lines = ["Forward: each layer keeps what came in, self.inp, and what went out, self.out."]
    lines += [_forward_line(row) for row in steps[steps["direction"] == "forward"].itertuples()]
    lines += ["", "Backward: the same objects in reverse. Each reads self.out.g and sets the .g of what came in."]
    for _, rows in backward.groupby("step"):
        lines += _backward_lines(list(rows.itertuples()))
    lines += ["", answers, "The local rules, for one entry (SymPy's notation):"]
    lines += [f"  {r.rule}: d/d{r.with_respect_to} [{r.formula}] = {r.derivative}" for r in rules.itertuples()]
    return "\n".join(lines) + "\n"


def _forward_line(row: Any) -> str:
    return (
        f"  {row.step}. {row.name}: {row.tensor} = {row.formula}, inp is {row.reads}; {row.shape}, norm {row.norm:.4g}"
    )


def _backward_lines(rows: list[Any]) -> list[str]:
    """A sentence on what is read, then a line for each `.g` that is set."""
    first = rows[0]
    source = f"self.out.g, which is {first.reads}, set by {first.set_by} in step {first.set_in}"
    lines = [f"  {first.step}. {first.name}.backward() reads {source if first.set_by else 'no gradient: dL/dL = 1'}"]
    for row in rows:
        reader = f"{row.read_by} reads it as self.out.g" if row.read_by != "optimizer" else "for the optimizer"
        lines.append(f"       {row.sets} = {row.formula}: {row.tensor}, {row.shape}, norm {row.norm:.4g}; {reader}")
    return lines
