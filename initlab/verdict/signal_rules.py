"""Rules about single operations: what makes nan, units that are dead or saturated, attention of one key."""

import math

import torch

from initlab.nn.activations import Activation
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.reference_networks import Reference
from initlab.verdict.rules import (
    AGREES,
    DEAD,
    ERROR,
    LEAST_SATURATED,
    LOGITS,
    OUTWEIGHS,
    SATURATED,
    SHARP,
    SHUTS,
    UNITS,
    WARNING,
)
from initlab.verdict.trends import is_significant


def judge_producers(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """The first operation that makes nan or inf of finite numbers, forward; then the first backward."""
    flow = e.known.flow
    spoiled = flow.spoiled()
    for k in sorted(spoiled):
        node = e.nodes[k]
        if not all(e.nodes[one].finite for one in node.inputs):
            continue
        if e.trend("forward").rate > 0 and is_significant(e.trend("forward")):
            return None  # too large a number by growth: judge_trends says where it comes from
        where, what = _find_place(e, k)
        cause = f"{what} makes nan or inf of finite numbers"
        place = (e.layer_of(where), where, "activation", "forward")
        return Finding("non-finite", ERROR, *place, cause, _find_cure(node.op), {"op": node.op})
    for k in range(len(e.nodes) - 1, -1, -1):
        node = e.nodes[k]
        if node.has_gradient and node.gradient_finite and not all(e.nodes[one].gradient_finite for one in node.inputs):
            if e.trend("backward").rate < 0 and is_significant(e.trend("backward")):
                return None
            where, what = _find_place(e, k)
            cause = f"the gradient of {what} is nan or inf, what it gives forward is finite"
            place = (e.layer_of(where), where, "activation", "backward")
            return Finding("non-finite", ERROR, *place, cause, _find_cure(node.op), {"op": node.op})
    return None


def _find_place(e: NetworkEvidence, k: int) -> tuple[str, str]:
    """The module of an operation, or the layer before it where that is the model itself; and the two in words."""
    node = e.nodes[k]
    where = node.name or node.owner
    if where:
        return where, f"{node.op} in {where}"
    before = [e.nodes[one].name for one in e.known.flow.last_layers(k) if one != k]
    return (before[0], f"{node.op} after {before[0]}") if before else ("", f"{node.op} in the model")


def _find_cure(op: str) -> str:
    if op in ("sqrt", "rsqrt", "log", "log2", "log10", "div", "truediv", "reciprocal", "pow", "norm", "acos", "asin"):
        return f"keep what {op} is given away from where it or its slope has no value: add a small number such as 1e-6"
    return f"look at what {op} is given"


def judge_biases(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A bias that outweighs by far what the weights of its layer give."""
    forward = e.rows[(e.rows["direction"] == "forward") & ~e.rows["tensor"].isin(["weight", "bias", "parameter"])]
    below = 1.0
    sized = [gain for gain in e.gains if gain.tensor.kind not in ("recurrent", "attention")]
    by_module = {gain.tensor.module_name: gain for gain in sized}
    for row in forward.to_dict("records"):
        gain = by_module.get(row["name"]) if row["tensor"] == "preactivation" else None
        bias = e.find_bias(gain) if gain is not None else None
        if gain is not None and bias is not None:
            size = bias.rms
            own = gain.found * below
            if size > OUTWEIGHS * max(own, 1.0):
                killed = float(e.dead_shares.get(row["layer"], 0.0)) > DEAD
                shut = row["frac_saturated"] > DEAD
                rule = "dead" if killed else "saturated" if shut else "bias-too-large"
                what = f"{'all its units are ' + rule + ': ' if killed or shut else ''}the biases have rms {size:.3g}"
                cause = f"{what} where the weights give {own:.3g}"
                place = (int(row["layer"]), row["name"], "preactivation", "forward")
                evidence = {"bias": size, "weights": own}
                severity = WARNING if gain.follower is not None and gain.follower.kind == "output" else ERROR
                return Finding(
                    rule, severity, *place, cause, f"set {bias.name} to 0", evidence, factors={bias.name: 0.0}
                )
        below = row["rms"] if row["rms"] == row["rms"] else below
    return None


def judge_units(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Units that are dead, or saturated, more than their activation gives with inputs of size 1."""
    before = e.select("preactivation")
    found = []
    by_name = {gain.tensor.module_name: gain for gain in e.gains} | {gain.tensor.name: gain for gain in e.gains}
    for row in before.to_dict("records"):
        gain = by_name.get(row["name"]) or by_name.get(".".join(filter(None, [row["name"], row["part"]])))
        activation = gain.follower.activation if gain is not None and gain.follower is not None else None
        share = row["frac_saturated"]
        if gain is None or activation is None or share != share or not row["rms"]:  # what it is given is 0
            continue
        all_dead = float(e.dead_shares.get(row["layer"], 0.0))
        n_units = gain.part.stop - gain.part.start
        if n_units < UNITS or e.known.flow.is_gate(gain.position):
            continue
        usual = _usual_share(activation)
        chance = AGREES * math.sqrt(usual * (1 - usual) / n_units)  # where inputs are alike
        if share > max(LEAST_SATURATED, usual + max(SATURATED, chance)) or all_dead > DEAD:
            found.append((row, gain, share, all_dead))
    if not found:
        return None
    row, gain, share, all_dead = found[0]
    bias = e.find_bias(gain)
    size = bias.rms if bias is not None else 0.0
    spread = row["std_within"] if row["std_within"] == row["std_within"] else row["std"]
    rectified = gain.follower is not None and "relu" in gain.follower.op.lower()
    rule = "dead" if rectified or all_dead > DEAD else "saturated"
    many = f" (and in {len(found) - 1} layers above)" if len(found) > 1 else ""
    what = f"{max(share, all_dead):.0%} of its units are {rule}{many}"
    place = (int(row["layer"]), gain.tensor.module_name or gain.tensor.name, "preactivation", "forward")
    evidence = {"frac_saturated": share, "frac_dead": all_dead, "bias": size, "gain": gain.found, "needed": gain.needed}
    if bias is not None and size > max(3 * spread, SHUTS):
        cause = f"{what}: the biases, rms {size:.3g}, outweigh what the inputs give, {spread:.3g}"
        return Finding(rule, ERROR, *place, cause, f"set {bias.name} to 0", evidence, factors={bias.name: 0.0})
    if is_significant(e.trend("forward")):
        return None  # numbers too small to be told from 0, or so large that all saturate
    factor = gain.needed / gain.found if gain.found else 1.0
    if factor > 0.8:  # weights that are too small saturate nothing
        if gain.std < 0.9 * gain.rms:
            mean = math.copysign(gain.mean_size, row["mean"])
            cause = f"{what}: its weights have a mean of {mean:.3g} beside a std of {gain.std:.3g}"
            redraw = (gain.tensor.name,)
            return Finding(rule, ERROR, *place, cause, f"draw {gain.name} with mean 0", evidence, redraw=redraw)
        if rule == "saturated" and spread > 3 * gain.found > 0:
            cause = f"{what}: what the layer is given is too large, its preactivations have a std of {spread:.3g}"
            return Finding(rule, ERROR, *place, cause, f"divide what it is given by {spread:.3g}", evidence)
        if abs(row["mean"]) > 2 * spread:
            cause = f"{what}: its inputs have a mean that the weights turn into {row['mean']:.3g}"
            return Finding(rule, ERROR, *place, cause, "subtract the mean of what the layer is given", evidence)
        return None
    same = [one for _, one, _, _ in found]
    factors = {one.name: one.needed / one.found for one in same if one.found}
    everywhere = "all such weights" if len(same) > 1 else gain.name
    cause = f"{what}: the weights have gain {gain.found:.3g} where {gain.follower} needs {gain.needed:.3g}"
    return Finding(rule, ERROR, *place, cause, f"multiply {everywhere} by {factor:.3g}", evidence, factors=factors)


def _usual_share(activation: Activation) -> float:
    """The saturated share of a standard normal preactivation, up to 1e-3."""
    u = torch.erfinv(torch.linspace(-1, 1, 2001, dtype=torch.float64)[1:-1]) * math.sqrt(2)
    return float(activation.saturated_share(u.reshape(-1, 1)))


def judge_logits(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Logits of attention so large that softmax leaves one key for each query."""
    flow, found = e.known.flow, [k for k, node in enumerate(e.nodes) if node.logits > LOGITS and _is_attention(e, k)]
    if not found:
        return None
    node, factors = e.nodes[found[0]], dict[str, float]()
    for k in found:
        sources = [e.nodes[i].name for one in e.nodes[k].inputs for i in flow.last_layers(one)] + [e.nodes[k].name]
        own = [g for g in e.gains if g.tensor.module_name in sources or g.tensor.name in sources]
        scores = [g for g in own if g.part.label in ("query", "key")] or own
        tensors = {g.tensor.name for g in scores if g.found > 2 * max(g.needed, 1.0)}
        large = [g for g in own if g.tensor.name in tensors and g.found > 2 * max(g.needed, 1.0)]
        factors |= {g.name: g.needed / g.found for g in large}
    large = [g for g in e.gains if g.octaves > 1.5]
    everywhere = len(large) > 0.7 * len(e.gains)
    if everywhere:  # a rule that is wrong, and attention shows it first
        factors = {g.name: g.needed / g.found for g in large}
    where = node.name or node.owner
    place = (e.layer_of(where), where, "logits", "forward")
    cause = f"attention's logits have a standard deviation of {node.logits:.3g}: softmax leaves one key a query"
    cause += f" (and in {len(found) - 1} attentions behind it)" if len(found) > 1 else ""
    if everywhere:
        cause += f"; the weights have gain {large[0].found:.3g} where {large[0].needed:.3g} is usual, everywhere"
    if not factors:
        remedy = f"divide the logits by {node.logits:.3g}: they are divided by sqrt(head size) as a rule"
        severity = ERROR if node.logits > SHARP else WARNING  # a mask of -100, or sharp by design
        return Finding("saturated", severity, *place, cause, remedy, {"std": node.logits})
    first = list(factors)[:3]
    remedy = " and ".join(f"multiply {name} by {factors[name]:.3g}" for name in first)
    remedy += f", and {len(factors) - 3} more by their factors" if len(factors) > 3 else ""
    return Finding("saturated", ERROR, *place, cause, remedy, {"std": node.logits}, factors=factors)


def _is_attention(e: NetworkEvidence, k: int) -> bool:
    """Whether a softmax weighs the rows of another tensor."""
    if e.nodes[k].op not in ("softmax", "Softmax"):
        return True
    return e.known.flow.follower(k).kind == "attention"
