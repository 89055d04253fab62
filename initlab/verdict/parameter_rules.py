"""Rules about parameters and the input alone: what is not finite, 0, alike, or of another size than the others."""

import math
from statistics import median

from torch import Tensor

from initlab.models.families import CUT
from initlab.models.fans import is_readable, orthogonal_view
from initlab.models.laws import recognize_law
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import ERROR, WARNING, Finding
from initlab.verdict.reference_networks import Reference, right_std

INPUT = 16.0  # an rms of the input beyond this, or below its inverse, is not standardized
FEW = 16  # of fewer weights the size is chance
OUTLIER = 3.0  # octaves that one layer's gain may differ from the others'


def judge_parameters(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A parameter that holds nan or inf."""
    for tensor in e.known.tensors:
        values = tensor.values
        if not is_readable(values) or not values.is_floating_point():
            continue
        bad = int((~values.isfinite()).sum())
        if bad:
            return Finding(
                "non-finite",
                ERROR,
                e.layer_of(tensor.name),
                tensor.name,
                "weight" if tensor.is_weight else "bias" if tensor.kind == "bias" else "parameter",
                "forward",
                f"{bad} of {values.numel()} entries of {tensor.name} are nan or inf",
                f"draw {tensor.name} anew; if training made it so, lower the learning rate",
                {"n_nonfinite": bad, "count": values.numel()},
                redraw=(tensor.name,),
            )
    return None


def judge_input(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """An input that is not standardized, or the same for every example; none if a norm comes first."""
    rows = e.rows[(e.rows["layer"] == 0) & (e.rows["op"] == "input")]
    first = [e.nodes[k].kind for k in e.known.flow.users[0]] if e.nodes else []
    for row in rows.to_dict("records"):
        bad = int(row["n_nan"] + row["n_inf"])
        rms, place = row["rms"], (0, row["part"] or "x", "activation", "forward")
        if bad:
            cause = f"{bad} of {row['count']} entries of the input are nan or inf"
            return Finding("non-finite", ERROR, *place, cause, "remove or replace them before the model sees them")
        if first and set(first) == {"norm"}:
            continue
        if rms == 0:
            return Finding("input-scale", ERROR, *place, "the input is 0 throughout", "look at how batches are made")
        if rms > INPUT or (0 < rms < 1 / INPUT):
            cause = f"the input has an rms of {rms:.3g} where weights are made for 1"
            remedy = f"standardize the input: subtract its mean, divide by {row['std']:.3g}"
            return Finding("input-scale", ERROR, *place, cause, remedy, {"rms": rms}, factors={"input": 1 / rms})
        within = row["std_within"]
        if row["cosine"] > 1 - 1e-9 and within <= 1e-6 * rms and row["count"] > 1:
            cause = "all examples of the batch are the same"
            return Finding("input-equal", ERROR, *place, cause, "look at how batches are made", {"cosine": 1.0})
        if rms and abs(row["mean"]) > 3 * row["std"]:
            cause = f"the mean of the input, {row['mean']:.3g}, is {abs(row['mean']) / row['std']:.3g} times its std"
            return Finding(
                "input-mean", WARNING, *place, cause, "subtract the mean of the input", {"mean": row["mean"]}
            )
    return None


def judge_zero(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A weight that is 0 throughout, or has equal columns; that of a residual branch's end may be 0, and the last."""
    last = max((gain.position for gain in e.gains), default=-1)
    for gain in e.gains:
        alike = gain.position >= 0 and has_equal_rows(gain.tensor.cut(gain.part))
        if (gain.rms and not alike) or gain.position < 0 or (not gain.rms and e.is_residual_end(gain)):
            continue
        place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
        what = (
            f"all weights of {gain.name} are 0" if not gain.rms else f"all units of {gain.name} have the same weights"
        )
        inherits = (
            "nothing passes it and what lies below has no gradient" if not gain.rms else "they stay alike for ever"
        )
        severity = WARNING if gain.position == last else ERROR
        remedy = f"draw {gain.name} with a standard deviation of {right_std(e, gain):.3g}"
        rule = "vanishing" if not gain.rms else "symmetric"
        return Finding(rule, severity, *place, f"{what}: {inherits}", remedy, redraw=(gain.tensor.name,))
    return None


def has_equal_rows(weight: Tensor) -> bool:
    """Whether all outputs of a weight, outputs first, have the same numbers, which are not 0."""
    rows = orthogonal_view(weight)
    return len(rows) > 1 and rows.shape[1] > 1 and bool((rows == rows[0]).all()) and bool(rows[0].any())


def judge_outlier(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """One layer whose weights are of another size than those of the others, by their gain and by their std."""
    sized = [gain for gain in e.gains if gain.rms > 0 and gain.part.fan_in > 0]
    sized = [gain for gain in sized if gain.tensor.cut(gain.part).numel() >= FEW]
    if len(sized) < 2:
        return None
    usual, usual_ln = (
        _find_middle([gain.octaves for gain in sized]),
        _find_middle([math.log2(gain.rms) for gain in sized]),
    )
    last = max(gain.position for gain in sized)
    apart = []
    for gain in sized:
        off = gain.octaves - usual
        by_std = math.log2(gain.rms) - usual_ln
        small_by_design = off < 0 and (gain.position == last or e.is_residual_end(gain))
        if min(abs(off), abs(by_std), 2 * abs(gain.octaves)) > OUTLIER and off * by_std > 0 and not small_by_design:
            apart.append((abs(off), off, gain))
    if not apart:
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
        ERROR,
        e.layer_of(gain.tensor.name),
        gain.tensor.name,
        "weight",
        "forward",
        cause,
        f"multiply {named} by {factor:.3g}",
        {"gain": gain.found, "usual": gain.found * factor, "octaves": off},
        factors=factors,
    )


def _find_middle(values: list[float]) -> float:
    """The median; of three or fewer, that nearest to 0."""
    return median(values) if len(values) > 3 else min(values, key=abs)


def judge_lost_variance(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Normal weights that were cut off and not widened again: their std is smaller than the one that was asked for."""
    lost = []
    for gain in e.gains:
        if gain.rms > 0 and -0.25 < gain.octaves < -0.1 and gain.follower is not None:
            law = recognize_law(gain.tensor.cut(gain.part))
            if law.name == CUT and abs(math.log2(law.nominal_std / gain.std) + gain.octaves) < 0.03:
                lost.append((gain, law))
    total = -sum(gain.octaves for gain in e.gains if -0.25 < gain.octaves < -0.1)
    if not lost or total < 0.5 or len(lost) < 0.3 * len(e.gains):
        return None
    gain, law = lost[0]
    factor = gain.needed / gain.found
    place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
    kept, cut = gain.found / gain.needed, law.high / law.nominal_std
    cause = f"normal weights cut at {cut:.2g} standard deviations keep {kept:.3g} of the one asked for"
    cause += f": gain {gain.found:.3g} where {gain.follower} needs {gain.needed:.3g}, in at least {len(lost)} layers"
    remedy = f"divide the std that trunc_normal_ is given by {kept:.3g}"
    factors = {one.name: one.needed / one.found for one in e.gains if -0.25 < one.octaves < -0.1}
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
