"""A verdict of a run's own tables: how its stack's signal and gradients change, and whether its training learned."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES
from initlab.stats.dtypes import format_of
from initlab.verdict.finding import Finding, Verdict
from initlab.verdict.rules import CONSTANT, DEAD, ERROR, GONE, LEARNED, STEPS, WARNING
from initlab.verdict.trends import fit_trend, is_significant

SETTING = ("init", "activation", "gain", "lr", "dtype")  # columns whose networks are judged together
LAST_STEPS = 20  # of a training, averaged: single batches differ
SAME_GAIN = 0.05  # relative: a gain so near the right one is not what moves the signal


def judge_tables(tables: Mapping[str, pd.DataFrame], constant_loss: float = math.inf) -> Verdict | None:
    """What the tables `stats` and `losses` of a run say; None where it has no rows of a stack or of a training.

    constant_loss: the loss of the best answer that does not look at the inputs, see `tasks.data.Data.constant_loss`.
    Sizes are the median over networks; each setting of a run is judged for itself. Taken is `log2_rms_true`, which
    outlives the number format.
    """
    stats, losses = (tables.get(name, pd.DataFrame()) for name in ("stats", "losses"))
    if "stage" not in stats or not stats["stage"].isin(["stack", "train"]).any():
        return None
    keys = [name for name in SETTING if name in stats]
    varied = [name for name in keys if stats[name].nunique(dropna=False) > 1]
    found: list[Finding] = []
    judged = set()
    for values, rows in stats.groupby(keys, observed=True, dropna=False):
        setting = dict(zip(keys, values, strict=True))
        label = ", ".join(f"{name}={_as_text(setting[name])}" for name in varied)
        of_stack = tuple(value for name, value in setting.items() if name != "lr")  # which a stack has not
        if of_stack not in judged:
            judged.add(of_stack)
            place = ", ".join(f"{name}={_as_text(setting[name])}" for name in varied if name != "lr")
            found += _judge_stack(rows, setting, place)
        if len(losses) and (rows["stage"] == "train").any():
            own = losses
            for name in set(keys) & set(losses):
                own = own[own[name] == setting[name]]
            found += _judge_training(rows[rows["stage"] == "train"], own, label, constant_loss)
    found.sort(key=lambda one: one.severity != ERROR)
    return Verdict(tuple(found), int(stats["layer"].max()), stats)


def _as_text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _judge_stack(rows: pd.DataFrame, setting: Mapping[str, object], label: str) -> Iterator[Finding]:
    rows = rows[(rows["stage"] == "stack") & (rows["tensor"] == "activation") & (rows["layer"] > 0)]
    if "log2_rms_true" not in rows or not len(rows):
        return
    for direction, what in (("forward", "the signal"), ("backward", "the gradient")):
        sizes = rows[rows["direction"] == direction].groupby("layer", observed=True)["log2_rms_true"].median()
        trend = fit_trend(sizes.index.tolist(), sizes.tolist())
        if direction == "backward":
            trend = trend.reverse()
        if not is_significant(trend):
            continue
        grows = trend.rate > 0
        rule = ("gradient-" if direction == "backward" else "") + ("exploding" if grows else "vanishing")
        cause = f"init={setting.get('init', '?')} with gain {float(str(setting.get('gain', math.nan))):.3g}: {what} "
        cause += (
            f"{'grows' if grows else 'falls'} by a factor {2.0**trend.rate:.3g} a layer, 2^{trend.total:.0f} in all"
        )
        own = format_of(str(setting.get("dtype", "float32"))).name
        steps = trend.count_steps(own)
        if steps is not None:
            layer = trend.last - steps if direction == "backward" else trend.first + steps
            there = trend.first <= layer <= trend.last
            cause += f"; {own} ends at layer {layer}" if there else f"; {own} would end with {steps + 1} layers"
        place = (trend.last if direction == "backward" else trend.first, label, "activation", direction)
        remedy = "init=kaiming, whose gain is that of the activation"
        if _is_right_gain(setting):
            cause += "; the gain is right, but layers are few units wide for so many"
            remedy = "a larger width, or fewer layers"
        evidence = {"octaves_a_layer": trend.rate, "standard_error": trend.error}
        yield Finding(rule, ERROR, *place, cause, remedy, evidence)
        return  # the gradient inherits it


def _is_right_gain(setting: Mapping[str, object]) -> bool:
    """Whether the gain is the one of the activation, as far as this is known."""
    if str(setting.get("activation")) not in ACTIVATIONS:
        return False
    needed = RULES["kaiming"].gain_for(str(setting["activation"]))
    return abs(float(str(setting.get("gain", math.nan))) / needed - 1) < SAME_GAIN


def _judge_training(
    rows: pd.DataFrame, losses: pd.DataFrame, label: str, constant_loss: float = math.inf
) -> Iterator[Finding]:
    hand = losses[losses["implementation"] == "scratch"]
    if not len(hand):
        return
    by_step = hand.groupby("step", observed=True)["loss"].median()
    first, last = float(by_step.iloc[0]), float(by_step.iloc[-1])
    end = float(by_step.iloc[-LAST_STEPS:].mean())
    place = (-1, label, "loss", "forward")
    slower = f"train.lr={float(hand['lr'].iloc[0]) / 10:.3g}" if "lr" in hand else "a smaller train.lr"
    lost = hand[~np.isfinite(hand["loss"])]
    evidence = {"first_loss": first, "last_loss": last}
    if len(lost):
        step = int(lost["step"].min())
        n = lost["seed"].nunique() if "seed" in lost else 1
        cause = f"the loss of {n} networks is not finite from step {step} on"
        yield Finding("diverged", ERROR, *place, cause, slower, evidence, since=step)
    elif len(by_step) > 10 and last > GONE * first + 1:
        cause = f"the loss goes from {first:.3g} to {last:.3g}"
        yield Finding("diverged", ERROR, *place, cause, slower, evidence, since=int(by_step.index[-1]))
    elif len(by_step) > STEPS and (last > LEARNED * first or end > CONSTANT * constant_loss):
        cause = f"nothing is learned: the loss goes from {first:.3g} to {end:.3g} in {len(by_step)} steps"
        cause += f", and an answer that is always the same has {constant_loss:.3g}" if constant_loss < math.inf else ""
        yield Finding("not-learning", WARNING, *place, cause, "another train.lr, or init=kaiming", evidence)
    dead = rows[(rows["step"] == rows["step"].max()) & (rows["tensor"] == "activation") & (rows["layer"] > 0)]
    share = dead.groupby("layer", observed=True)["frac_dead"].median()
    if len(share) and float(share.max()) > DEAD:
        layer = int(share.idxmax())
        cause = f"{float(share.max()):.0%} of its units are dead at the end of the training"
        place = (layer, label, "activation", "forward")
        yield Finding("dead", ERROR, *place, cause, slower, {"frac_dead": float(share.max())})
