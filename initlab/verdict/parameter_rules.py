"""Rules about parameters and the input alone: what is not finite, 0, alike, or of another size than the others."""

import math
from statistics import median

import torch
from torch import Tensor, nn

from initlab.models.families import CUT
from initlab.models.fans import is_readable, orthogonal_view
from initlab.models.laws import IDENTITY, recognize_law
from initlab.models.layer_gains import LayerGain
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.reference_networks import Reference, right_std
from initlab.verdict.rules import (
    APART,
    ERROR,
    FEW_WEIGHTS,
    HEAD,
    LOUD,
    MEAN,
    MEAN_SUM,
    OUTLIER,
    SAME,
    SHORT,
    SHORT_LAYERS,
    STRAY,
    WARNING,
)


def judge_parameters(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Parameters and buffers that hold nan or inf, the first in the order in which they run."""
    values = {t.name: t.values for t in e.known.tensors if is_readable(t.values) and t.values.is_floating_point()}
    buffers = {name: b for name, b in e.model.named_buffers() if b.is_floating_point() and "mask" not in name}
    bad = {name: int((~v.isfinite()).sum()) for name, v in {**values, **buffers}.items()}
    names = sorted((name for name, n in bad.items() if n), key=lambda name: (e.layer_of(name) < 0, e.layer_of(name)))
    if not names:
        return None
    first, count = names[0], {**values, **buffers}[names[0]].numel()
    more = f", and of {len(names) - 1} tensors behind it" if len(names) > 1 else ""
    cause = f"{bad[first]} of {count} entries of {first} are nan or inf{more}"
    remedy = f"draw {'them' if more else first} anew; if training made it so, lower the learning rate"
    kinds = {t.name: "weight" if t.is_weight else "bias" if t.kind == "bias" else "parameter" for t in e.known.tensors}
    place = (e.layer_of(first), first, kinds.get(first, "parameter"), "forward")
    redraw = tuple(name for name in names if name in values)
    return Finding("non-finite", ERROR, *place, cause, remedy, {"n_nonfinite": bad[first]}, redraw=redraw)


def judge_zero(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Weights that are 0 throughout, or whose units are alike; the end of a residual branch may be 0, and the last."""
    last = max((gain.position for gain in e.gains), default=-1)
    met = [gain for gain in e.gains if gain.position >= 0]
    zero = [gain for gain in met if not gain.rms and not e.is_residual_end(gain)]
    alike = [gain for gain in met if has_equal_rows(gain.tensor.cut(gain.part))]
    partly = [] if zero or alike else [gain for gain in met if count_alike(e, gain) > 0]
    for found, what in (
        (zero, "all weights of {} are 0: nothing passes, and what lies below has no gradient"),
        (alike, "all units of {} have the same weights: they stay alike for ever"),
        (partly, "{} of {} units of {} have the same weights: they stay alike for ever"),
    ):
        if not found:
            continue
        gain, more = found[0], f" (and of {len(found) - 1} more)" if len(found) > 1 else ""
        rule, words = "vanishing" if found is zero else "symmetric", [f"{gain.name}{more}"]
        if found is partly:
            words = [str(count_alike(e, gain)), str(gain.part.stop - gain.part.start), *words]
        place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
        severity = WARNING if all(one.position == last for one in found) else ERROR
        remedy = f"draw {gain.name} with a standard deviation of {right_std(e, gain):.3g}"
        redraw = tuple(dict.fromkeys(one.tensor.name for one in found))
        return Finding(rule, severity, *place, what.format(*words), remedy, redraw=redraw)
    return None


def count_alike(e: NetworkEvidence, gain: LayerGain) -> int:
    """How many outputs of a weight have the same numbers, or 0 where these are few, or meant.

    Meant are the identity, and kernels that fill in pixels between each other (ICNR).
    """
    if gain.tensor.kind not in ("linear", "convolution") or getattr(gain.tensor.module, "groups", 1) > 1:
        return 0
    if any(e.nodes[user].op.lower().startswith("pixel") for user in e.known.flow.users[gain.position]):
        return 0
    weight = gain.tensor.cut(gain.part)
    rows = orthogonal_view(weight)
    firsts, counts = torch.unique(rows[:, 0], return_counts=True)
    if int(counts.max()) < max(2, SAME * len(rows)):
        return 0
    same = rows[rows[:, 0] == firsts[counts.argmax()]]
    n = int(torch.unique(same, dim=0, return_counts=True)[1].max())
    return n if n >= max(2, SAME * len(rows)) and recognize_law(weight).name != IDENTITY else 0


def judge_stray(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Single entries of a weight that outweigh all others."""
    for gain in e.gains:
        values = gain.tensor.cut(gain.part)
        words = describe_stray(values, gain.rms) if gain.position >= 0 else ""
        if words:
            place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
            remedy = f"draw {gain.name} with a standard deviation of {right_std(e, gain):.3g}"
            evidence = {"largest": float(values.abs().max()), "rms": gain.rms}
            redraw = (gain.tensor.name,)
            return Finding("stray-entries", ERROR, *place, f"{gain.name}: {words}", remedy, evidence, redraw=redraw)
    return None


def has_equal_rows(weight: Tensor) -> bool:
    """Whether all outputs of a weight, outputs first, have the same numbers, or all inputs are weighted alike."""
    rows = orthogonal_view(weight)
    if len(rows) < 2 or rows.shape[1] < 2 or not bool(rows[0].any()):
        return False
    return bool((rows[:64] == rows[0]).all() and (rows == rows[0]).all()) or bool(
        (rows[:64] == rows[:64, :1]).all() and (rows == rows[:, :1]).all()
    )


def describe_stray(weight: Tensor, rms: float) -> str:
    """How many entries of a weight of this rms outweigh all others, in words; empty where none does."""
    n, largest = weight.numel(), float(weight.abs().max())
    if n < FEW_WEIGHTS or not largest > min(6.5, 0.9 * math.sqrt(n)) * rms:  # normal numbers stay below
        return ""
    sizes = weight.detach().abs().flatten().double()
    usual = float(sizes.kthvalue(min(n - 1, math.ceil(0.99 * n))).values)
    count = int((sizes > STRAY * usual).sum())
    return f"{count} of {n} entries are up to {largest:.3g} where 99 % are below {usual:.3g}" if count and usual else ""


def judge_means(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Weights whose mean is no chance: what it makes is the same for all units and grows with fan_in."""
    found = []
    for gain in e.gains:
        mean = gain.mean_size
        if (
            gain.tensor.kind in ("linear", "convolution")
            and mean > MEAN * gain.std
            and mean * gain.part.fan_in > MEAN_SUM
        ):
            found.append((gain, mean))
    if not found:
        return None
    gain, mean = found[0]
    more = f" (and those of {len(found) - 1} more layers)" if len(found) > 1 else ""
    cause = f"its weights have a mean of {mean:.3g}{more} beside a std of {gain.std:.3g}: all units give the same"
    place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
    remedy = f"draw {gain.name} with mean 0 and a std of {right_std(e, gain):.3g}"
    redraw = tuple(dict.fromkeys(one.tensor.name for one, _ in found))
    return Finding("weights-with-a-mean", ERROR, *place, cause, remedy, {"mean": mean, "std": gain.std}, redraw=redraw)


def judge_outlier(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """One layer whose weights are of another size than those of the others, by their gain and by their std."""
    sized = [gain for gain in e.gains if gain.rms > 0 and gain.part.fan_in > 0]
    sized = [gain for gain in sized if gain.tensor.cut(gain.part).numel() >= FEW_WEIGHTS]
    sized = [gain for gain in sized if gain.tensor.computed is None or not gain.tensor.computed.is_estimated]
    sized = [gain for gain in sized if not isinstance(gain.tensor.module, nn.Embedding) or _is_loud(e, gain)]
    if len(sized) < 2:
        return None
    usual, usual_ln = (
        _find_middle([gain.octaves for gain in sized]),
        _find_middle([math.log2(gain.rms) for gain in sized]),
    )
    last = max(gain.position for gain in sized)
    apart = []
    plain = not {node.kind for node in e.nodes} & {"norm", "sum", "product"}  # else what is somewhat off is absorbed
    for limit in (OUTLIER, APART) if plain else (OUTLIER,):
        for gain in sized:
            off = gain.octaves - usual
            by_std = math.log2(gain.rms) - usual_ln
            small_by_design = off < 0 and (gain.position == last or e.is_residual_end(gain))
            size = min(abs(off), abs(by_std), 2 * abs(gain.octaves))
            if size > (HEAD if gain.position == last else limit) and off * by_std > 0 and not small_by_design:
                apart.append((abs(off), off, gain))
        if apart:
            break
    alike = max((sum(by * one > 0 for _, by, _ in apart) for _, one, _ in apart), default=0)
    if not apart or alike > max(3, 0.2 * len(sized)):  # many of one odd size are a design
        return None
    _, off, gain = max(apart, key=lambda one: one[0])
    parts = [(one, by) for _, by, one in apart if one.tensor.name == gain.tensor.name and by * off > 0]
    factors = {one.name: 2.0**-by for one, by in parts}
    factor, large = 2.0**-off, off > 0
    times = f"{2 ** abs(off):.3g} times too {'large' if large else 'small'}"
    cause = (
        f"its weights have gain {gain.found:.3g} where the other layers' rule gives {gain.found * factor:.3g}: {times}"
    )
    named = gain.name if len(parts) == 1 else gain.tensor.name
    return Finding(
        "exploding" if large else "vanishing",
        ERROR if abs(off) > OUTLIER else WARNING,
        e.layer_of(gain.tensor.name),
        gain.tensor.name,
        "weight",
        "forward",
        cause,
        f"multiply {named} by {factor:.3g}",
        {"gain": gain.found, "usual": gain.found * factor, "octaves": off},
        factors=factors,
    )


def _is_loud(e: NetworkEvidence, gain: LayerGain) -> bool:
    """Whether a table that is the last layer too gives outputs far larger than 1; some scale what it is given."""
    rows = e.select("preactivation")
    return float(rows[rows["name"] == gain.tensor.module_name]["rms"].max()) > LOUD


def _find_middle(values: list[float]) -> float:
    """The median; of three or fewer, that nearest to 0."""
    return median(values) if len(values) > 3 else min(values, key=abs)


def judge_lost_variance(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Normal weights that were cut off and not widened again: their std is smaller than the one that was asked for."""
    lost, short = [], [gain for gain in e.gains if -0.25 < gain.octaves < -0.1]
    for gain in short:
        if gain.follower is not None:
            law = recognize_law(gain.tensor.cut(gain.part))
            if law.name == CUT and abs(math.log2(law.nominal_std / gain.std) + gain.octaves) < 0.03:
                lost.append((gain, law))
    total = -sum(gain.octaves for gain in short)
    if not lost or total < SHORT or len(lost) < SHORT_LAYERS * len(e.gains):
        return None
    gain, law = lost[0]
    factor = gain.needed / gain.found
    place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
    kept, cut = gain.found / gain.needed, law.high / law.nominal_std
    cause = f"normal weights cut at {cut:.2g} standard deviations keep {kept:.3g} of the one asked for"
    cause += f": gain {gain.found:.3g} where {gain.follower} needs {gain.needed:.3g}, in at least {len(lost)} layers"
    remedy = f"divide the std that trunc_normal_ is given by {kept:.3g}"
    factors = {one.name: one.needed / one.found for one in short}
    return Finding(
        "lost-variance", ERROR, *place, cause, remedy, {"factor": factor, "layers": len(lost)}, factors=factors
    )


def judge_gradients(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A loss without a gradient: all is frozen, or nothing that the model gives can be differentiated."""
    if e.known.flow.differentiable:
        return None
    place = (-1, "", "parameter", "backward")
    if not any(p.requires_grad for p in e.model.parameters()):
        cause = "no parameter has requires_grad: nothing is trained"
        return Finding("frozen", ERROR, *place, cause, "model.requires_grad_() for what is to be trained")
    cause = "nothing that the model gives carries a gradient"
    return Finding("no-gradient", ERROR, *place, cause, "give numbers that depend on the parameters, not their argmax")
