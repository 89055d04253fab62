"""Rules about a few steps of training, all of which are taken back."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.probes.probe import probe
from initlab.probes.snapshot import all_tensors, left_as_it_was, loss_value, run_model
from initlab.verdict.evidence import NetworkEvidence, changed_parameters
from initlab.verdict.finding import Finding
from initlab.verdict.rules import ERROR, GONE, LARGE, SMALL, TINY, USUAL, WARNING


class Steps(NamedTuple):
    """What a few steps of training gave: the loss before each of them, the rows of the probe, the groups of parameters.

    groups: the group of an optimizer that each parameter is in, by its name; all "" where there is one.
    """

    losses: list[float]
    rows: pd.DataFrame
    groups: dict[str, str]


def train_steps(e: NetworkEvidence, optimizers: Sequence[Optimizer], steps: int) -> Steps:
    """Take steps on the batch and take them back: parameters, gradients and the optimizer are as they were."""
    batch, losses = list(all_tensors(e.x)), []
    own = [(p, p.detach().clone()) for p in e.model.parameters()]
    with left_as_it_was(e.model, batch), _optimizers_as_they_were(e.model, optimizers), changed_parameters(own):
        with warnings.catch_warnings(action="ignore"), probe(e.model, optimizer=optimizers) as p:

            def evaluate() -> Tensor:
                e.model.zero_grad()
                value = loss_value(e.loss, run_model(e.model, e.x, batch), e.y)
                losses.append(float(value.detach()))
                value.backward()  # type: ignore[no-untyped-call]
                return value

            for _ in range(max(1, steps)):
                optimizers[0].step(evaluate)  # type: ignore[arg-type]
                for other in optimizers[1:]:
                    other.step()
            losses.append(float(loss_value(e.loss, run_model(e.model, e.x, batch), e.y).detach()))
        return Steps(losses, p.frame(), name_groups(e.model, optimizers))


def name_groups(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, str]:
    """By the names of parameters the group that holds them, as one writes it in Python; "" where there is only one."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = dict[str, str]()
    for k, optimizer in enumerate(optimizers):
        owner = f"optimizer[{k}].param_groups" if len(optimizers) > 1 else "param_groups"
        for j, group in enumerate(optimizer.param_groups):
            found |= {names[id(p)]: f"{owner}[{j}]" for p in group["params"] if id(p) in names}
    return found if len(set(found.values())) > 1 else dict.fromkeys(found, "")


@contextmanager
def _optimizers_as_they_were(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """After the block gradients and the states of the optimizers are what they were."""
    kept = [
        (
            one,
            one.state,
            [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in one.param_groups],
        )
        for one in optimizers
    ]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    for one, state, _ in kept:
        one.state = copy.copy(state)
        for key, value in state.items():
            one.state[key] = copy.deepcopy(value)
    try:
        yield
    finally:
        for one, state, groups in kept:
            one.state = state
            for group, old in zip(one.param_groups, groups, strict=True):
                group.update(old)
        for p, gradient, content in gradients:
            if gradient is not None and content is not None:
                gradient.copy_(content)
            p.grad = gradient


def _find_middle(ratios: np.ndarray) -> float:
    """The median of what moved: a branch that starts at 0 gives no gradient to what lies in it."""
    moved = ratios[np.isfinite(ratios) & (ratios > 0)]
    return float(np.median(moved)) if len(moved) else 0.0


def judge_updates(trained: Steps) -> Finding | None:
    """Updates far larger, or far smaller, than what training goes well with; a loss that runs away."""
    updates = trained.rows[trained.rows["tensor"] == "update"]
    first = updates[updates["step"] == updates["step"].min()]
    ratios = first["update_ratio"].to_numpy(dtype=float)
    names = zip(first["name"], first["part"], strict=True)
    own = [trained.groups.get(".".join(filter(None, pair)), "") for pair in names]
    by_group = {group: _find_middle(ratios[[one == group for one in own]]) for group in dict.fromkeys(own)}
    ratio, where = _find_middle(ratios), ""
    large = {group: one for group, one in by_group.items() if one > LARGE}
    bad = large or {group: one for group, one in by_group.items() if one < SMALL}
    if bad and len(bad) < len(by_group):
        where = max(bad, key=lambda group: abs(math.log(max(bad[group], 1e-30) / USUAL)))
        ratio = bad[where]
    start, end = trained.losses[0], trained.losses[-1]
    gone = not math.isfinite(end) or (end > GONE * abs(start) + 1)
    evidence = {"update_ratio": ratio, "first_loss": start, "last_loss": end}
    place = (-1, "", "update", "forward")
    change = f"an update changes the weights{f' of {where}' if where else ''} by {ratio:.2g} of their size"
    key, rate = (f"{where}.lr", f"the learning rate of {where}") if where else ("lr", "the learning rate")
    if ratio > LARGE or gone:
        loss = f", and the loss goes from {start:.3g} to {end:.3g}" if gone else ""
        factor = 3 * USUAL / ratio if ratio > 3 * USUAL else 0.01
        cause = f"{change}{loss}: 0.001 to 0.01 is usual"
        remedy = f"multiply {rate} by {factor:.2g}"
        return Finding("update-too-large", ERROR, *place, cause, remedy, evidence, factors={key: factor})
    if ratio < SMALL:
        severity = ERROR if ratio < TINY else WARNING
        factors = {key: USUAL / ratio} if ratio else {}
        remedy = f"multiply {rate} by {USUAL / ratio:.2g}" if ratio else f"set {rate} above 0"
        cause = f"{change}: 0.001 is usual, nothing will be learned"
        return Finding("update-too-small", severity, *place, cause, remedy, evidence, factors=factors)
    return None
