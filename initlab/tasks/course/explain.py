"""One backward pass followed step by step: who sets which `.g`, from what, with shapes and norms.

The pass is really made, by the classes of `scratch/classes.py`, and watched from outside: before and after each
`backward()` every tensor is asked for its `.g`. Beside it stand the local rules with their derivatives as text that
SymPy can read; the tests let SymPy differentiate them. Autograd's own graph is `task=graph`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from initlab.errors import check, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, rule
from initlab.scratch.classes import LOSS_LAYERS, Act, FirstLin, Lin
from initlab.scratch.mended_layers import g_of
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS
from initlab.tasks.data import Data
from initlab.tasks.ensemble.batches import find_first_step
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.training import Training
from initlab.terminal import NotebookText


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

# The same for whole tensors, as `classes.py` computes it: class -> what each of its tensors is set to.
SETS: dict[str, dict[str, str]] = {
    "Lin": {"out": "inp @ w + b", "inp.g": "out.g @ w.t()", "w.g": "inp.t() @ out.g", "b.g": "out.g.sum(0)"},
    "FirstLin": {"out": "inp @ w + b", "w.g": "inp.t() @ out.g", "b.g": "out.g.sum(0)"},
    "Act": {"out": "phi(inp)", "inp.g": "out.g * phi'(inp)"},
    "Mse": {"out": "mean of (inp - targ)^2", "inp.g": "2 (inp - targ) / N"},
    "CrossEntropy": {"out": "mean of -log softmax(inp)[targ]", "inp.g": "(softmax(inp) - onehot(targ)) / N"},
}


@dataclass(frozen=True)
class Explanation(NotebookText):
    """`steps`: a row per tensor that is set; `rules`: a row per derivative; `text`: both in words."""

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
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    data: Data | str = "digits",
) -> Explanation:
    """Follow the first forward and backward pass of the network that `train` trains, before its first update.

    depth, width: its hidden layers and their units. batch: rows. activation, loss: names of the tables. init: a rule's
    name or a `Rule`. data: as in `train`; under mse the label is one number, as in the book, and the network ends in
    one unit. seed: of the weights and the batch. dtype, device: as in `stack`. Errors: an unknown name, a number out of
    its range, data that do not fit the loss.

    >>> explain(depth=1, width=3, batch=2).steps[["name", "sets", "tensor"]].iloc[-1].tolist()
    ['lin1', 'self.b.g', 'b1.g']
    """
    check(seed=seed)
    choose(ACTIVATIONS, activation, "activation")
    where = Where.resolve(dtype, device)
    training = Training(depth, width, batch, loss=loss)
    parameters, xb, yb = find_first_step(data, training, rule(init), activation, seed, where)
    steps = follow_pass(parameters, xb, yb, activation, loss)
    rules = [
        {"rule": name, "formula": SYMBOLIC[name].formula, "with_respect_to": variable, "derivative": derivative}
        for name in ["lin", *[activation] * (depth > 0), loss]
        for variable, derivative in SYMBOLIC[name].derivatives.items()
    ]
    sizes = "-".join(str(size) for size in [xb.shape[1], *(w.shape[1] for w, _ in parameters)])
    book = "" if loss == "mse" else " The book's loss is train.loss=mse; data=teacher train.loss=mse is its 784-50-1."
    head = f"The network {sizes}, {activation}, {loss}, and its first batch of {len(xb)} rows.{book}\n\n"
    return Explanation(steps, pd.DataFrame(rules), head + pass_as_text(steps, pd.DataFrame(rules)))


class NamedLayer(NamedTuple):
    """A layer's object, the number of its linear layer, and how it is called: lin1, relu1, ..., mse."""

    object: Any
    layer: int
    name: str


def follow_pass(
    parameters: Sequence[tuple[Tensor, Tensor]], xb: Tensor, yb: Tensor, activation: str, loss: str
) -> pd.DataFrame:
    """The classes of the book run one by one, forward and in reverse; a row for everything that one of them sets."""
    layers: list[NamedLayer] = []
    watch = _Watch()
    watch.name(xb, "xb")
    for k, (w, b) in enumerate(parameters, start=1):
        watch.name(w, f"w{k}")
        watch.name(b, f"b{k}")
        layers.append(NamedLayer(Lin(w, b) if k > 1 else FirstLin(w, b), k, f"lin{k}"))
        layers.append(NamedLayer(Act(ACTIVATIONS[activation]), k, f"{activation}{k}"))
    layers[-1] = NamedLayer(LOSS_LAYERS[loss](), len(parameters), loss)
    value = xb
    for layer in layers:
        value = layer.object(value) if layer is not layers[-1] else layer.object(value, yb)
        watch.forward(layer, value)
    for k in range(len(layers) - 1, -1, -1):
        watch.backward(layers[k], layers[k - 1] if k else None)
    return pd.DataFrame(watch.rows)


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

    def forward(self, layer: NamedLayer, out: Tensor) -> None:
        self.step += 1
        letter = {Lin: "z", FirstLin: "z", Act: "a"}.get(type(layer.object))
        self.name(out, f"{letter}{layer.layer}" if letter else "loss")
        self._note("forward", layer, "out", out, reads=self.name_of(layer.object.inp))

    def backward(self, layer: NamedLayer, below: NamedLayer | None) -> None:
        """Run the layer's backward; whatever has a `.g` that it had not before was set by it."""
        self.step += 1
        before = {name for value, name in self._tensors if hasattr(value, "g")}
        layer.object.backward()
        out = self.name_of(layer.object.out)
        step, setter = self._setter.get(out, (0, ""))
        for value, name in self._tensors:
            if hasattr(value, "g") and name not in before:
                attribute = next(a for a in ("inp", "w", "b") if getattr(layer.object, a, None) is value)
                reader = below.name if attribute == "inp" and below else "optimizer"
                origin = {"reads": f"{out}.g" if setter else "", "set_by": setter, "set_in": step, "read_by": reader}
                self._note("backward", layer, f"{attribute}.g", g_of(value), **origin)
                self._setter[name] = (self.step, layer.name)

    def _note(self, direction: str, layer: NamedLayer, attribute: str, value: Tensor, **more: object) -> None:
        owner = getattr(layer.object, attribute.removesuffix(".g"))
        numbers = dict(zip(STATISTICS, measure(value.reshape(1, -1), batched=False).tolist(), strict=True))
        row = {
            "step": self.step, "direction": direction, "layer": layer.layer, "name": layer.name,
            "sets": f"self.{attribute}", "tensor": self.name_of(owner) + ".g" * attribute.endswith(".g"),
            "formula": SETS[type(layer.object).__name__][attribute], "reads": "", "set_by": "", "set_in": 0,
            "read_by": "", "shape": "x".join(map(str, value.shape)) or "number",
        }  # fmt: skip
        self.rows.append(row | more | {"norm": numbers["norm"], "rms": numbers["rms"]})


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


def pass_as_text(steps: pd.DataFrame, rules: pd.DataFrame) -> str:
    """The pass in words: forward, backward, the questions that readers ask, the local rules."""
    backward = steps[steps["direction"] == "backward"]
    first, second = backward.iloc[0], backward.iloc[1]
    names = {"above": first["name"], "step": first["step"], "below": second["name"], "next": second["step"]}
    answers = ANSWERS.format(tensor=second["reads"].removesuffix(".g"), **names)
    lines = ["Forward: each layer keeps what came in, self.inp, and what went out, self.out."]
    for row in steps[steps["direction"] == "forward"].itertuples():
        reads = f"inp is {row.reads}; {row.shape}, norm {row.norm:.4g}"
        lines.append(f"  {row.step}. {row.name}: {row.tensor} = {row.formula}, {reads}")
    lines += ["", "Backward: the same objects in reverse. Each reads self.out.g and sets the .g of what came in."]
    for number, rows in backward.groupby("step"):
        source = rows.iloc[0]
        given = f"self.out.g, which is {source['reads']}, set by {source['set_by']} in step {source['set_in']}"
        reads = given if source["set_by"] else "no gradient: dL/dL = 1"
        lines.append(f"  {number}. {source['name']}.backward() reads {reads}")
        for row in rows.itertuples():
            reader = f"{row.read_by} reads it as self.out.g" if row.read_by != "optimizer" else "for the optimizer"
            what = f"{row.sets} = {row.formula}: {row.tensor}, {row.shape}, norm {row.norm:.4g}"
            lines.append(f"       {what}; {reader}")
    lines += ["", answers, "The local rules, for one entry (SymPy's notation):"]
    lines += [f"  {r.rule}: d/d{r.with_respect_to} [{r.formula}] = {r.derivative}" for r in rules.itertuples()]
    return "\n".join(lines) + "\n"
