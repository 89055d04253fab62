"""A coordinate check of one's own model: how the outputs of its modules, and their changes in training, go with width.

Under a parametrization that carries hyperparameters from narrow nets to wide ones, both stay level. Sizes come from a
probe; the change of an output is its distance from the one before the first step, on the same batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.errors import UsageError, check_value, describe_error, library_call, show
from initlab.probes.probe import probe
from initlab.probes.probed_modules import list_outputs
from initlab.probes.snapshot import all_tensors, loss_value, run_model
from initlab.stats.keys import Seeds, resolve_seeds
from initlab.terminal import Bar, NotebookText

Made = nn.Module | tuple[nn.Module, Optimizer]

OUTPUT, CHANGE = "output", "change"
# An exponent in the width between these counts as level: at the widths of the study `mup` its changes go as width^-0.24
# to width^0, by corrections that end at infinite width, and those of the standard parametrization as -0.5, 0.5 and 1.
VANISHES, GROWS = -0.25, 0.1
ERRORS = 3  # standard errors by which an exponent must be beyond
LINES = 8  # of a verdict, at most
MODULE = ["name", "part", "op", "call"]
CAUSES = {
    (CHANGE, "grows"): "a wider net needs a smaller learning rate here, or smaller weights above",
    (CHANGE, "vanishes"): "a wider net hardly learns here: it needs a larger learning rate, or larger weights above",
    (OUTPUT, "grows"): "its weights, or what enters it, are too large in a wide net",
    (OUTPUT, "vanishes"): "its weights, or what enters it, are too small in a wide net",
}


@dataclass(frozen=True)
class CoordinateCheck(NotebookText):
    """What `coordinate_check` has found; `str()` is the verdict, `ok` whether nothing grows or vanishes with the width.

    frame: a row per module, step and `tensor` (output, or its change since step 0): `exponent` in the width, its
    standard `error` over widths and seeds, and `verdict`: level, grows, vanishes, undecided (beyond the limits by less
    than 3 errors), zero, or not finite. sizes: the rms behind it, a row per width, seed, step, module and tensor.
    """

    frame: pd.DataFrame
    sizes: pd.DataFrame

    @property
    def findings(self) -> pd.DataFrame:
        """The modules that grow, vanish or are not finite at the last step: rows of `frame`, and `since` which step.

        An output of the last module that vanishes is none: logits of 0 are how maximal-update nets begin. An output
        that goes with the width since a later step is none beside its own change, which is the cause.
        """
        last = self.frame[self.frame["step"] == self.frame["step"].max()]
        bad = last[last["verdict"].isin(["grows", "vanishes", "not finite"])]
        head = self.frame[MODULE].iloc[-1] if len(self.frame) else None
        is_head = (bad[MODULE] == head).all(axis=1) & (bad["tensor"] == OUTPUT) & (bad["verdict"] == "vanishes")
        bad = bad[~is_head]
        since = [self._find_start(row) for _, row in bad.iterrows()]
        bad = bad.assign(since=np.array(since, dtype=int)).sort_values("exponent", key=abs, ascending=False)
        changed = bad.loc[bad["tensor"] == CHANGE, MODULE].apply(tuple, axis=1).tolist()
        follows = bad[MODULE].apply(tuple, axis=1).isin(changed) & (bad["tensor"] == OUTPUT) & (bad["since"] > 0)
        return bad[~follows] if len(bad) else bad

    def _find_start(self, row: pd.Series) -> int:
        """The first step from which a module has had this verdict up to the last one."""
        same = (self.frame[[*MODULE, "tensor"]] == row[[*MODULE, "tensor"]]).all(axis=1)
        mine = self.frame[same].sort_values("step", ascending=False)
        holds = (mine["verdict"] == row["verdict"]).cumprod().astype(bool)
        return int(mine.loc[holds, "step"].min())

    @property
    def ok(self) -> bool:
        return not len(self.findings)

    def __str__(self) -> str:
        widths, steps = self.sizes["width"], self.frame["step"]
        about = f"widths {widths.min()} to {widths.max()}, {self.sizes['seed'].nunique()} seeds, {steps.max()} steps"
        undecided = self.frame[(self.frame["verdict"] == "undecided") & (steps == steps.max())]
        unsure = [f"undecided, for lack of seeds or widths: {', '.join(map(name_module, list_rows(undecided)))}"]
        unsure = unsure if len(undecided) else []
        found = self.findings
        if not len(found):
            level = self.frame[(self.frame["verdict"] == "level") & (steps == steps.max())]
            low, high = level["exponent"].min(), level["exponent"].max()
            line = f"ok: no module grows or vanishes with the width ({about}); exponents from {low:.2f} to {high:.2f}"
            return "\n".join([line, *unsure])
        count, causes = len(found[MODULE].drop_duplicates()), dict(CAUSES)
        lines = [f"not ok: {count} of {len(self.frame[MODULE].drop_duplicates())} modules go with the width ({about})"]
        for row in list_rows(found[:LINES]):
            what = "its output" if row["tensor"] == OUTPUT else "its change"
            if row["verdict"] == "not finite":
                lines.append(f"  {name_module(row)}: {what} is not finite at some widths since step {row['since']}")
                continue
            size = f"{row['verdict']} as width^{row['exponent']:.2f} ± {row['error']:.2f} since step {row['since']}"
            cause = causes.pop((row["tensor"], row["verdict"]), "")  # said once
            lines.append(f"  {name_module(row)}: {what} {size}{'; ' if cause else ''}{cause}")
        lines += [f"  and {len(found) - LINES} more, see .findings"] if len(found) > LINES else []
        return "\n".join([*lines, *unsure])


def list_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def name_module(row: dict[str, Any]) -> str:
    """A module in words: its dotted name, what computed the output where the name is a number, and which call."""
    what = row["op"] if not row["name"] or row["name"].rpartition(".")[2].isdigit() else ""
    what = row["part"] if row["part"].startswith(row["op"]) and row["part"] else what
    return " ".join(one for one in (row["name"], what, f"#{row['call'] + 1}" if row["call"] else "") if one)


@library_call
def coordinate_check(
    make_model: Callable[[int], Made],
    widths: Sequence[int],
    x: Any,
    y: Any = None,
    loss: Callable[..., Tensor] | None = None,
    *,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    steps: int = 4,
    seeds: Seeds = 3,
    progress: bool = False,
) -> CoordinateCheck:
    """Train a model of your own for a few steps at several widths, and say what grows or vanishes with the width.

    make_model: takes a width and returns a new model, or (model, optimizer). widths: two at least, as far apart as
    time allows, such as [64, 128, 256, 512]. x, y, loss: one batch for all widths, as in `measure`. optimizer: takes a
    model and returns its optimizer, where make_model does not. steps: updates on that batch. seeds: networks at each
    width, how many or their seeds. progress: show a bar.

    The exponent of a module is the slope of log rms over log width, its error comes from the spread over widths and
    seeds. Level is from -0.25 to 0.1, the limits of the study `mup`; an exponent counts as beyond by 3 errors at least.
    Random numbers of torch are left as they were. Costs steps + 1 forward and backward passes for each width and seed,
    and memory for the outputs of one. Raises UsageError for what does not fit together.
    Source: Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, appendix D.1.

    >>> def make(width):
    ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    >>> adam = lambda model: torch.optim.Adam(model.parameters(), 1e-2)
    >>> found = coordinate_check(make, [32, 128, 512], torch.randn(8, 4), loss=lambda out: out.mean(), optimizer=adam)
    >>> found.ok, found.findings["verdict"].unique().tolist()
    (False, ['grows'])
    """
    sizes = _check_widths(widths)
    steps, numbers = check_value("train.steps", steps), list(resolve_seeds(seeds))
    if not callable(make_model) or loss is None or not callable(loss):
        raise UsageError("coordinate_check: give make_model, a function of the width, and loss, as in initlab.measure")
    tables = []
    with torch.random.fork_rng():
        for width, seed in Bar(
            [(width, seed) for width in sizes for seed in numbers], unit="network", disable=None if progress else True
        ):
            torch.manual_seed(seed)
            model, stepper = _make(make_model, width, optimizer)
            tables.append(train_briefly(model, stepper, x, y, loss, steps, seed).assign(width=width, seed=seed))
    found = pd.concat(tables, ignore_index=True)
    return CoordinateCheck(fit_exponents(found), found)


def _check_widths(widths: Sequence[int]) -> list[int]:
    given = list(widths) if isinstance(widths, Sequence | np.ndarray) and not isinstance(widths, str) else []
    sizes = sorted({check_value("width", width) for width in given})
    if len(sizes) < 2:
        raise UsageError(f"widths={show(widths)}: must be two different widths at least, such as [64, 128, 256]")
    return sizes


def _make(
    make_model: Callable[[int], Made], width: int, optimizer: Callable[[nn.Module], Optimizer] | None
) -> tuple[nn.Module, Optimizer]:
    """A model of this width and its optimizer."""
    try:
        made = make_model(width)
        model, stepper = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if isinstance(model, nn.Module) and stepper is None and optimizer is not None:
            stepper = optimizer(model)
    except UsageError:
        raise
    except Exception as error:  # a function of the user's may raise anything
        raise UsageError(f"make_model({width}): {describe_error(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"make_model({width}): gives {show(made)}: must give an nn.Module, or (model, optimizer)")
    if not isinstance(stepper, Optimizer):
        raise UsageError(
            "optimizer: give one, such as optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1)"
        )
    return model, stepper


def train_briefly(
    model: nn.Module, optimizer: Optimizer, x: Any, y: Any, loss: Callable[..., Tensor], steps: int, seed: int
) -> pd.DataFrame:
    """Steps on one batch: `step`, the module, `tensor` and `rms` of every output and of its change since step 0.

    Every pass draws the same random numbers, so that dropout is no change.
    """
    batch, changes = list(all_tensors(x)), []
    with probe(model, optimizer=optimizer) as p, _keep_outputs(model) as outputs:
        first: dict[tuple[str, str, int], Tensor] = {}
        for step in range(steps + 1):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            outputs.clear()
            value = loss_value(loss, run_model(model, x, batch), y)
            first = first or dict(outputs)
            changes += [(step, *key, measure_distance(out, first.get(key))) for key, out in outputs.items() if step]
            torch.autograd.backward(value)
            optimizer.step()
    rows = p.frame()
    rows = rows[
        (rows["direction"] == "forward") & ~rows["tensor"].isin(["weight", "parameter", "bias", "update", "loss"])
    ]
    rows = rows[(rows["layer"] > 0) & (rows["pass"] == 0) & ~rows["op"].str.contains("Dropout|Identity")]
    finite = rows["n_nan"] + rows["n_inf"] == 0
    rows = rows.assign(rms=rows["rms"].where(finite), tensor=OUTPUT)[["step", *MODULE, "tensor", "rms"]]
    rows = rows.astype(dict.fromkeys(MODULE[:3], str))
    moved = pd.DataFrame(changes, columns=["step", "name", "part", "call", "rms"]).assign(tensor=CHANGE)
    known = rows[MODULE].drop_duplicates(["name", "part", "call"])
    return pd.concat([rows, moved.merge(known, on=["name", "part", "call"])[list(rows)]], ignore_index=True)


def measure_distance(out: Tensor, before: Tensor | None) -> float:
    """The rms of a difference, nan where there is none or an entry is not finite."""
    if before is None or before.shape != out.shape:
        return float("nan")
    size = float((out.double() - before.double()).square().mean().sqrt())
    return size if np.isfinite(size) else float("nan")


@contextmanager
def _keep_outputs(model: nn.Module) -> Iterator[dict[tuple[str, str, int], Tensor]]:
    """The outputs of the modules that compute something, by name, part of the output and number of the call."""
    outputs: dict[tuple[str, str, int], Tensor] = {}

    def keep(name: str, module: nn.Module, given: Any, out: Any) -> None:
        call = sum(key[0] == name for key in outputs)
        for part, tensor in list_outputs(module, out):
            outputs[name, part, call] = tensor.detach().clone()

    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: keep(name, m, given, out))
        for name, module in model.named_modules()
        if not list(module.children()) or list(module.parameters(recurse=False))
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def fit_exponents(sizes: pd.DataFrame) -> pd.DataFrame:
    """Slope of log rms over log width, with its standard error, for every module, tensor and step."""
    rows = []
    keys = [*MODULE, "tensor", "step"]
    for key, mine in sizes.groupby(keys, sort=False):
        size, width = mine["rms"].to_numpy(float), mine["width"].to_numpy(float)
        exponent = error = float("nan")
        if np.isfinite(size).all() and (size > 0).all() and len(np.unique(width)) > 1:
            exponent, error = fit_slope(np.log2(width), np.log2(size))
        rows.append((*key, exponent, error, len(mine), judge_exponent(size, exponent, error)))
    return pd.DataFrame(rows, columns=[*keys, "exponent", "error", "n", "verdict"])


def fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares: the slope and its standard error from the residuals, inf with too few points for one."""
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * (y - y.mean())).sum()) / spread
    residuals = y - y.mean() - slope * centred
    left = len(x) - 2
    return slope, float(np.sqrt((residuals**2).sum() / left / spread)) if left > 0 else float("inf")


def judge_exponent(size: np.ndarray, exponent: float, error: float) -> str:
    """What an exponent means: level, grows, vanishes or undecided; zero or not finite where sizes have no logarithm."""
    if not np.isfinite(size).all():
        return "not finite"
    if not (size > 0).all():
        return "zero"
    if not np.isfinite(exponent):
        return "undecided"
    if VANISHES <= exponent <= GROWS:
        return "level"
    if exponent - ERRORS * error > GROWS:
        return "grows"
    return "vanishes" if exponent + ERRORS * error < VANISHES else "undecided"
