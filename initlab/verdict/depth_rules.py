"""Rules about how sizes change with depth, and about inputs that cannot be told apart at the end."""

import math
from statistics import harmonic_mean, median

from initlab.errors import UsageError
from initlab.meanfield.fixed_points import Phase, phase
from initlab.nn.custom_activation import name_of
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.reference_networks import Reference
from initlab.verdict.rules import (
    COLLAPSED,
    DEEP,
    DIFFERENT,
    ERROR,
    FAR,
    LARGE_LOSS,
    LOSS,
    MUCH,
    POST_NORM,
    RATE,
    SOME_POST_NORM,
    SPREAD,
    TINY_GRADIENT,
    TOTAL,
    WARNING,
    WIDTH,
)
from initlab.verdict.trends import Trend, fit_trend, is_significant


def judge_trends(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Sizes that grow or fall from layer to layer, beyond what the architecture does under the right rule."""
    for direction, column in (("forward", "rms"), ("forward", "std_within"), ("backward", "rms")):
        trend = e.trend(direction, column)
        if direction == "backward":  # gradients run from the last layer to the first
            trend = trend.reverse()
        if not is_significant(trend):
            continue
        usual, spread = reference.trend(direction, column)
        usual = -usual if direction == "backward" else usual
        excess = trend.rate - usual
        span = trend.last - trend.first
        if abs(excess) < max(RATE, SPREAD * spread) or abs(excess) * span < TOTAL:
            continue
        return _describe_trend(e, trend, direction, column, usual)
    return None


def _describe_trend(e: NetworkEvidence, trend: Trend, direction: str, column: str, usual: float) -> Finding:
    grows, back = trend.rate > 0, direction == "backward"
    rule = f"{'gradient-' if back else ''}{'exploding' if grows else 'vanishing'}"
    what = "the gradient" if back else {"rms": "the signal", "std_within": "what the inputs differ by"}[column]
    cause, remedy, factors = _find_cause(e, grows)
    cause += f": {what} {'grows' if grows else 'falls'} by a factor {2.0**trend.rate:.3g} a layer"
    detail = (
        f"{2.0**trend.total:.3g} in all {trend.last - trend.first} steps{', from the last layer down' if back else ''}"
    )
    detail = f"It {'doubles' if grows else 'halves'} every {1 / abs(trend.rate):.2g} layers, {detail}"
    words, ends = _find_format_ends(trend, back)
    detail += f"; {words}" if words else ""
    gradients = e.trend("backward").reverse()
    if not back and is_significant(gradients):
        words, _ = _find_format_ends(gradients, True)
        detail += f"; of gradients {words}" if words else ""
    layer = e.layer_at(trend.last if back else trend.first)
    where = next((g.tensor.module_name or g.tensor.name for g in e.gains if e.layer_of(g.tensor.name) == layer), "")
    evidence: dict[str, float] = {
        "octaves_a_layer": trend.rate,
        "standard_error": trend.error,
        "reference": usual,
        "total_octaves": trend.total,
        **ends,
    }
    if e.gains:
        evidence |= {"gain": e.gains[0].found, "needed": e.gains[0].needed}
    place = (layer, where, "preactivation", direction)
    deepest = max(e.depths.values(), default=trend.last) - trend.first
    deep = deepest >= DEEP and abs(trend.rate) * deepest > MUCH
    severity = ERROR if deep or abs(trend.total) > FAR else WARNING
    return Finding(rule, severity, *place, cause, remedy, evidence, factors=factors, detail=f"{detail}.")


def _find_format_ends(trend: Trend, back: bool) -> tuple[str, dict[str, int]]:
    """Where a trend leaves each number format, in words and as a layer; of what has not happened yet the depth."""
    words, found = [], dict[str, int]()
    for name in ("float16", "bfloat16", "float32"):
        steps = trend.count_steps(name)
        if steps is None:
            continue
        layer = trend.last - steps if back else trend.first + steps
        if trend.first <= layer <= trend.last:
            words.append(f"{name} ends at layer {layer}")
            found[f"leaves_{name}"] = layer
        else:
            words.append(f"{name} would end with {steps + 1} layers")
            found[f"depth_{name}"] = steps + 1
    return ", ".join(words), found


def _find_cause(e: NetworkEvidence, grows: bool) -> tuple[str, str, dict[str, float]]:
    """What in the weights makes sizes grow or fall: all of them, those of residual branches, or none."""
    sized = [gain for gain in e.gains if gain.found > 0 and gain.tensor.kind != "recurrent"]
    inner = [gain for gain in sized if gain.follower is not None and gain.follower.kind != "output"] or sized
    off = [gain.octaves for gain in inner]
    branches = e.residual_ends
    ends = [gain for gain in sized if e.is_residual_end(gain)]
    if inner and abs(median(off)) > 0.1 and (median(off) > 0) == grows and not (ends and abs(median(off)) < 0.75):
        wrong = [gain for gain in inner if (gain.octaves > 0) == grows and abs(gain.octaves) > 0.1]
        usual = sorted(wrong, key=lambda gain: gain.octaves)[len(wrong) // 2]
        share = usual.needed / usual.found
        std = f"a standard deviation of {usual.rms * share:.3g} in place of {usual.rms:.3g}"
        cause = f"the weights have gain {usual.found:.3g} where {usual.follower} needs {usual.needed:.3g}"
        far = [gain for gain in sized if gain not in inner and abs(gain.octaves) > 1.5 and (gain.octaves > 0) == grows]
        factors = {gain.name: gain.needed / gain.found for gain in [*inner, *far]}
        return cause, f"multiply the weights by {share:.3g} ({std}), or initlab.init_(model, 'kaiming')", factors
    if ends and grows:
        share = 1 / math.sqrt(len(branches))
        cause = f"{len(branches)} residual branches are added with no scaling"
        return (
            cause,
            f"multiply the last weights of each branch by {share:.3g}, 1/sqrt of their number",
            {gain.name: share for gain in ends},
        )
    return "no weight is of the wrong size; what lies between the layers makes it", "add norms or residual branches", {}


def judge_post_norm(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Norms on the stream of a deep residual network: Xiong et al. 2020, section 3."""
    flow = e.known.flow
    sums = {k for k, _ in flow.branches}
    after = [k for k in sums if len(flow.users[k]) == 1 and e.nodes[flow.users[k][0]].kind == "norm"]
    if len(sums) < SOME_POST_NORM or len(after) < 0.8 * len(sums):
        return None
    trend = e.trend("backward")
    cause = (
        f"norms stand after the sums of {len(sums)} residual branches (post-norm): gradients of the last layers do not"
    )
    cause += f" shrink with depth, and those at the first are {2.0**-trend.total:.3g} times as large"
    remedy = "put the norms in front of the branches (norm_first=True), or warm the learning rate up from 0"
    severity = ERROR if len(sums) >= POST_NORM else WARNING
    return Finding("post-norm", severity, e.n_layers, "", "stream", "backward", cause, remedy, {"branches": len(sums)})


def judge_output(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A first cross-entropy far above that of a guess: the last layer's outputs are too large."""
    rows = e.select("loss")
    chance = rows["chance_loss"].to_numpy(dtype=float)
    for loss, guess in zip(rows["mean"], chance, strict=True):
        if guess == guess and loss > LOSS * guess + 1:
            last = next((g for g in reversed(e.gains) if g.position >= 0), None)
            name = last.tensor.module_name or last.tensor.name if last is not None else ""
            cause = f"the loss starts at {loss:.3g} where a guess has {guess:.3g}: outputs are too large"
            place = (e.layer_of(name), name, "loss", "forward")
            remedy = f"draw the weights of {name or 'the last layer'} 10 times smaller, or as 0"
            return Finding("output-scale", WARNING, *place, cause, remedy, {"loss": loss, "chance": guess})
    return None


def judge_loss(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A loss of targets that are not standardized, or gradients so small that optimizers take them for 0."""
    gradients = e.select("weight", "backward")["rms"]
    largest = float(gradients.max()) if len(gradients) else math.nan
    for row in e.select("loss").to_dict("records"):
        loss, place = abs(row["mean"]), (-1, str(row["op"]), "loss", "forward")
        if row["chance_loss"] != row["chance_loss"] and loss > LARGE_LOSS:
            cause = f"the loss starts at {loss:.3g}: what it compares is not of size 1"
            remedy = f"standardize the targets, or divide the loss by {loss:.1g}"
            return Finding("loss-scale", WARNING, *place, cause, remedy, {"loss": loss})
        if 0 < largest < TINY_GRADIENT:
            cause = f"the largest gradient of a weight has an rms of {largest:.3g}, at a loss of {loss:.3g}"
            remedy = f"multiply the loss by {1e-3 / largest:.1g}: Adam adds 1e-8 to what it divides by"
            return Finding("loss-scale", WARNING, *place, cause, remedy, {"gradient": largest})
    return None


def judge_collapse(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Inputs that the last layers cannot tell apart, though they differ at the input."""
    rows = e.select("preactivation")
    given = e.rows[(e.rows["layer"] == 0) & (e.rows["op"] == "input")]["cosine"]
    if len(rows) < 3 or not len(given) or not float(given.iloc[0]) < DIFFERENT:
        return None
    before_last = rows[rows["layer"] < rows["layer"].max()]["cosine"]
    late = before_last.iloc[-1] if len(before_last) else 0.0
    if not late > COLLAPSED:
        return None
    angles = [(row["layer"], 0.5 * math.log2(max(1 - row["cosine"], 1e-15))) for row in rows.to_dict("records")]
    trend = fit_trend(*zip(*angles, strict=True))
    evidence = {"cosine": late}
    cause = f"vectors of different inputs have a mean cosine of {late:.4f} at the end"
    if trend.rate < 0:
        evidence["layers_per_halving"] = 1 / abs(trend.rate)
        cause += f" (the difference halves every {1 / abs(trend.rate):.2g} layers)"
    known = _find_phase(e)
    if known is not None:
        evidence["xi_c"] = known.xi_c
        is_finite = known.xi_c < math.inf
        scale = f"{known.xi_c:.3g} layers" if is_finite else "infinite, angles fall as 1/layer"
        cause += f"; the correlation depth of {known.activation} with gain {known.sigma_w:.3g} is {scale}"
    remedy = "fewer layers, residual branches, or an activation and gain that keep angles (tanh, or a shaped ReLU)"
    last = int(rows["layer"].max()) - 1
    return Finding("correlation-collapse", WARNING, last, "", "preactivation", "forward", cause, remedy, evidence)


def _find_phase(e: NetworkEvidence) -> Phase | None:
    """The phase of the most frequent activation at the middle gain and bias; none with norms or residual branches."""
    behind = [(g, g.follower.activation) for g in e.gains if g.follower and g.follower.activation]
    if not behind or any(node.kind in ("norm", "sum") for node in e.nodes):
        return None
    names = [name_of(activation) for _, activation in behind]
    mine = [one for one, name in zip(behind, names, strict=True) if name == max(names, key=names.count)]
    biases = [bias.rms for g, _ in mine if (bias := e.find_bias(g)) is not None]
    try:
        return phase(mine[0][1], median(g.found for g, _ in mine), median(biases) if biases else 0.0)
    except UsageError:  # a gain that is not finite
        return None


def judge_width(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Networks of one rule that differ much from each other, for they are narrow and deep; Hanin & Nica 2020."""
    kinds = {node.kind for node in e.nodes}
    if "norm" in kinds or "sum" in kinds:
        return None
    variance, fans = 0.0, list[float]()
    for gain in e.gains:
        activation = gain.follower.activation if gain.follower is not None else None
        if gain.tensor.kind == "linear" and (activation is None or activation.homogeneous):
            variance += (5.0 if activation is not None else 2.0) / gain.part.fan_in
            fans.append(gain.part.fan_in)
    spread = 0.5 * math.sqrt(variance)
    if spread < WIDTH:
        return None
    factor, scale = math.exp(spread), len(fans) / spread**2
    cause = f"sizes at the end differ between networks of this rule by a factor {factor:.3g} (one standard deviation)"
    cause += f": the depth scale, where that is e, is {scale:.3g} layers, {scale / harmonic_mean(fans):.2g} times the "
    cause += f"width, and {len(fans)} are there"
    place = (e.n_layers, "", "preactivation", "forward")
    remedy = "wider layers, fewer of them, or orthogonal weights"
    return Finding("finite-width", WARNING, *place, cause, remedy, {"std_ln_rms": spread, "depth_scale": scale})
