"""Rules about modules other than layers: embeddings, norms, and the gates of recurrent networks."""

from initlab.models.fans import is_readable
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.reference_networks import Reference
from initlab.verdict.rules import ERROR, GATES, NORMED, RECURRENT, TABLE


def judge_embeddings(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Tables of vectors that are all 0, or far larger than layers are made for."""
    used = set(e.select("embedding")["name"])
    for tensor in e.known.tensors:
        if tensor.kind != "embedding" or tensor.module_name not in used or not is_readable(tensor.values):
            continue
        rms = tensor.rms
        place = (e.layer_of(tensor.name), tensor.name, "embedding", "forward")
        if rms > TABLE:
            cause = f"its vectors have an rms of {rms:.3g} where layers are made for 1"
            remedy = f"multiply {tensor.name} by {1 / rms:.3g}"
            return Finding("exploding", ERROR, *place, cause, remedy, {"rms": rms}, factors={tensor.name: 1 / rms})
        if not rms and "pos" not in tensor.name.lower():
            return Finding("vanishing", ERROR, *place, "all its vectors are 0", "draw it at random", {"rms": 0.0})
    return None


def judge_norms(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A norm that gives numbers far from 1, by its weight or by its bias."""
    norms = {t.module_name: t for t in e.known.tensors if t.kind == "norm"}
    for row in e.select("norm").to_dict("records"):
        weight, rms = norms.get(row["name"]), row["rms"]
        if weight is not None and not rms and not weight.values.any() and not e.known.flow.branches:
            cause = f"all of {weight.name} is 0: nothing passes this norm"
            place = (int(row["layer"]), row["name"], "norm", "forward")
            return Finding(
                "vanishing", ERROR, *place, cause, f"set {weight.name} to 1", {"rms": 0.0}, redraw=(weight.name,)
            )
        if weight is None or not rms or 1 / NORMED < rms < NORMED or not is_readable(weight.values):
            continue
        own = weight.rms
        bias = next((t for t in e.known.tensors if t.kind == "bias" and t.module_name == row["name"]), None)
        shift = 0.0 if bias is None else bias.rms
        place = (int(row["layer"]), row["name"], "norm", "forward")
        evidence = {"rms": rms, "weight": own, "bias": shift}
        if bias is not None and shift > NORMED * max(own, 1 / NORMED) / 2:
            cause = f"its bias has an rms of {shift:.3g} beside a weight of {own:.3g}: all inputs become alike"
            remedy = f"set {bias.name} to 0"
            return Finding("bias-too-large", ERROR, *place, cause, remedy, evidence, factors={bias.name: 0.0})
        if own > NORMED or 0 < own < 1 / NORMED:
            rule = "exploding" if own > 1 else "vanishing"
            cause = f"its weight has an rms of {own:.3g} where 1 is usual"
            remedy = f"multiply {weight.name} by {1 / own:.3g}"
            return Finding(rule, ERROR, *place, cause, remedy, evidence, factors={weight.name: 1 / own})
    return None


def judge_recurrent(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Gates of an LSTM or GRU that are always shut or always open: weights or biases far too large."""
    large = [gain for gain in e.gains if gain.tensor.kind == "recurrent" and gain.found > RECURRENT]
    if large:
        gain, more = large[0], f" (and {len(large) - 1} more parts)" if len(large) > 1 else ""
        place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
        cause = f"recurrent weights {gain.name}{more} have gain {gain.found:.3g} where 1 is usual: gates saturate"
        factors = {one.name: 1 / one.found for one in large}
        remedy = f"multiply {gain.name if len(large) == 1 else gain.tensor.name} by {1 / gain.found:.3g}"
        return Finding("saturated", ERROR, *place, cause, remedy, {"gain": gain.found}, factors=factors)
    modules = {gain.tensor.module_name for gain in e.gains if gain.tensor.kind == "recurrent"}
    for tensor in e.known.tensors:
        if tensor.kind == "bias" and tensor.module_name in modules and is_readable(tensor.values):
            rms = tensor.rms
            if rms > GATES:
                place = (e.layer_of(tensor.module_name), tensor.name, "bias", "forward")
                cause = f"biases of gates have an rms of {rms:.3g}: they are always shut, or always open"
                remedy = f"set {tensor.name} to 0"
                return Finding("saturated", ERROR, *place, cause, remedy, {"rms": rms}, factors={tensor.name: 0.0})
    return None
