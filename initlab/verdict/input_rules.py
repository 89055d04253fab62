"""Rules about what the network is given."""

from initlab.probes.snapshot import all_tensors
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.reference_networks import Reference
from initlab.verdict.rules import ERROR, INPUT, INPUT_MEAN, WARNING

# Functions that keep values, or multiply them by a number.
KEPT = {"view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "to", "float", "contiguous"}
KEPT |= {"clone", "detach", "getitem", "cat", "stack", "expand", "repeat", "chunk", "split"}
KEPT |= {"mul", "div", "truediv", "sub", "add"}


def judge_input(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """An input that is not standardized, or the same for every example; none if a norm comes first."""
    rows = e.rows[(e.rows["layer"] == 0) & (e.rows["op"] == "input") & (e.rows["direction"] == "forward")]
    spoiled = bool(e.known.flow.spoiled())
    nodes = {node.name: k for k, node in enumerate(e.nodes) if node.kind == "input"}
    n_floats = sum(t.is_floating_point() for t in all_tensors(e.x))
    for row in rows.to_dict("records"):
        bad = int(row["n_nan"] + row["n_inf"])
        rms, place = row["rms"], (0, row["part"] or "x", "activation", "forward")
        met = _list_met(e, nodes[row["part"]]) if row["part"] in nodes else set[str]()
        if bad and not spoiled:  # a mask
            continue
        if bad:
            cause = f"{bad} of {row['count']} entries of the input are nan or inf"
            return Finding("non-finite", ERROR, *place, cause, "remove or replace them before the model sees them")
        if "layer" not in met:  # a norm comes first, or it is a time, a position, a mask
            continue
        if rms == 0:
            return Finding("input-scale", ERROR, *place, "the input is 0 throughout", "look at how batches are made")
        largest = max(abs(row["min"]), abs(row["max"]))  # one-hot vectors are sparse, and not small
        if rms > INPUT or (0 < rms < 1 / INPUT and largest < 4 / INPUT):
            cause = f"the input has an rms of {rms:.3g} where weights are made for 1"
            remedy = f"standardize the input: subtract its mean, divide by {row['std']:.3g}"
            return Finding(
                "input-scale",
                ERROR,
                *place,
                cause,
                remedy,
                {"rms": rms},
                factors={"input": 1 / rms} if n_floats == 1 else {},
            )
        within = row["std_within"]
        if row["cosine"] > 1 - 1e-9 and within <= 1e-6 * rms and row["count"] > 1:
            cause = "all examples of the batch are the same"
            return Finding("input-equal", ERROR, *place, cause, "look at how batches are made", {"cosine": 1.0})
        if rms and abs(row["mean"]) > INPUT_MEAN * row["std"]:
            cause = f"the mean of the input, {row['mean']:.3g}, is {abs(row['mean']) / row['std']:.3g} times its std"
            return Finding(
                "input-mean", WARNING, *place, cause, "subtract the mean of the input", {"mean": row["mean"]}
            )
    return None


def _list_met(e: NetworkEvidence, k: int) -> set[str]:
    """The kinds of operations that take an input as their first argument, apart from what keeps its values or scale."""
    found, stack = set[str](), [k]
    while stack:
        one = stack.pop()
        for user in e.known.flow.users[one]:
            node = e.nodes[user]
            if node.kind == "pass" and (node.op in KEPT or node.name):
                stack.append(user)
            elif node.inputs[0] == one:
                found.add(node.kind)
    return found
