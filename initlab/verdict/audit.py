"""How every parameter of a model is initialized: law, gain, the rule it agrees with, the gain that it needs."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from initlab.errors import UsageError, library_call
from initlab.models.families import UNKNOWN
from initlab.models.fans import ModelTensor, is_readable
from initlab.models.laws import CONSTANT, WeightLaw, recognize_law
from initlab.models.layer_gains import ModelGains, measure_gains, needed_gain
from initlab.models.named_rules import matching_rules
from initlab.nn.activations import Activation
from initlab.probes.torch_private import ConvNd
from initlab.verdict.finding import Finding, Verdict
from initlab.verdict.rules import AGREES, WARNING
from initlab.verdict.weight_rules import AuditRow, list_weight_findings

COLUMNS = (
    "name", "part", "kind", "shape", "count", "fan_in", "fan_out", "mean", "std", "gain", "gain_error", "law", "rules",
    "follower", "needed", "words",
)  # fmt: skip


class Audit(NamedTuple):
    """What `audit` gives: `print` it for a line a parameter and the findings.

    frame: a row per parameter, a stacked one has a row for each part. verdict: what is wrong with them.
    """

    frame: pd.DataFrame
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict.ok

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return self.verdict.findings

    def __str__(self) -> str:
        lines = [
            f"{row.name}{f'[{row.part}]' if row.part else ''}: {row.words}"
            for row in self.frame.itertuples(index=False)
        ]
        return "\n".join([*lines, *map(str, self.findings)])

    def _repr_html_(self) -> str:
        return str(self.frame.to_html(index=False, escape=True)) + self.verdict._repr_html_()


@library_call
def audit(model: nn.Module, x: Any = None) -> Audit:
    """Say how every parameter of a model is initialized, and what is wrong with that; or compare two models.

    model: any nn.Module, which is not called. x: a batch, by which the flow of data is found in one pass that leaves no
    trace; else it is read from the code, and what cannot be read is said. A second nn.Module in its place is compared.

    Returns an `Audit`: `print` it, or read `.frame` and `.findings`. In the frame: `fan_in`, `fan_out`; `gain`, std
    times sqrt(fan_in), with its standard error; `law`, of what distribution the numbers are; `rules`, the named rules
    that they agree with at 5 standard errors; `needed`, the gain that what follows the layer needs. For two models:
    `gain_b`, `law_b`, and `z`, by how many standard errors the gains differ. Raises UsageError for what is no model.

    >>> _ = torch.manual_seed(0)
    >>> print(audit(nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU())))
    0.weight: torch's default, gain 0.576; GELU follows and needs 1.48: squares of gradients fall 6.6 times a layer
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model={type(model).__name__}: must be an nn.Module")
    if isinstance(x, nn.Module):
        return compare_models(model, x)
    known = measure_gains(getattr(model, "_orig_mod", model), x)
    rows = list(list_rows(known))
    frame = pd.DataFrame([row.as_dict() for row in rows], columns=COLUMNS)
    return Audit(frame, Verdict(tuple(list_weight_findings(model, rows)), len(known.gains), frame))


def list_rows(known: ModelGains) -> Iterator[AuditRow]:
    """A row for each parameter, and for each part of a stacked one."""
    flow = known.flow
    followers = {gain.tensor.name: gain.follower for gain in known.gains}
    depth = max(1, len(flow.branches) // 2)
    for tensor in known.tensors:
        for part in tensor.slices:
            law = recognize_law(tensor.cut(part)) if is_readable(tensor.values) else WeightLaw(UNKNOWN)
            follower = followers.get(tensor.name)
            needed = needed_gain(tensor, follower) if tensor.is_weight else math.nan
            activation = follower.activation if follower is not None and needed != 1 else None
            rules = [rule.name for rule in matching_rules(law, part.fan_in, part.fan_out, depth, activation)]
            rules = list(dict.fromkeys([*_list_torch_rules(tensor, law, depth, activation), *rules]))
            if tensor.kind != "recurrent":
                rules = [name for name in rules if "RNN" not in name]
            row = AuditRow(tensor, part, law, tuple(rules), follower, needed, "")
            yield row._replace(words=describe_row(row))


def _list_torch_rules(tensor: ModelTensor, law: WeightLaw, depth: int, activation: Activation | None) -> Iterator[str]:
    """The rules of torch.nn.init with the fans that it counts by the shape alone, where a layer has others."""
    shape = tensor.values.shape if is_readable(tensor.values) else ()
    if len(tensor.slices) > 1 or not isinstance(tensor.module, ConvNd | nn.Bilinear) or len(shape) < 3:
        return
    part, kernel = tensor.slices[0], math.prod(shape[2:])
    fans = (shape[1] * kernel, shape[0] * kernel)
    if isinstance(tensor.module, nn.Bilinear):
        fans = (shape[1], shape[0])  # as its own reset_parameters does
    if fans != (part.fan_in, part.fan_out):
        for rule in matching_rules(law, *fans, depth, activation):
            yield rule.name if rule.name == "torch's default" else f"{rule.name} by torch's count of fans"


def describe_row(row: AuditRow) -> str:
    """A parameter in words."""
    tensor, law = row.tensor, row.law
    if not is_readable(tensor.values):
        return "has no numbers yet: " + (
            "lazy" if not isinstance(tensor.values, torch.Tensor) else "on the meta device"
        )
    named = row.rules[0] if row.rules else law.name
    if law.name == CONSTANT:
        named = f"all {law.mean:.3g}"
    elif not row.rules and law.std == law.std:
        named = f"std {law.std:.3g}" if law.name == UNKNOWN else f"{law.name}, std {law.std:.3g}"
    if not tensor.is_weight:
        return f"{tensor.kind}, {named}"
    words = f"{named}, gain {row.gain:.3g}"
    if row.follower is None:
        return f"{words}; what follows is not known: give a batch"
    if row.follower.normed:
        return f"{words}; a norm follows, and its scale does not matter forward"
    if row.follower.activation is None:
        return f"{words}; {row.follower} follows"
    words += f"; {row.follower} follows and needs {row.needed:.3g}"
    ratio = (row.gain / row.needed) ** 2 if row.gain > 0 else 0.0
    if 0.9 < ratio < 1.1 or not ratio:
        return words
    change = f"grow {ratio:.2g}" if ratio > 1 else f"fall {1 / ratio:.2g}"
    return f"{words}: squares of gradients {change} times a layer"


def compare_models(a: nn.Module, b: nn.Module) -> Audit:
    """The rows of two models side by side, by the names of their parameters."""
    one, two = (audit(model).frame for model in (a, b))
    keys = ["name", "part"]
    order = pd.concat([one[keys], two[keys]]).drop_duplicates()
    both = order.merge(one, on=keys, how="left").merge(two, on=keys, how="left", suffixes=("", "_b"))
    both["z"] = (both["gain"] - both["gain_b"]) / (both["gain_error"] ** 2 + both["gain_error_b"] ** 2) ** 0.5
    causes: list[tuple[str, str]] = []
    alone: dict[str, list[str]] = {"first": [], "second": []}
    for row in both.to_dict("records"):
        name = f"{row['name']}[{row['part']}]" if row["part"] else row["name"]
        if not isinstance(row["shape"], tuple) or not isinstance(row["shape_b"], tuple):
            alone["first" if isinstance(row["shape"], tuple) else "second"].append(name)
        elif row["shape"] != row["shape_b"]:
            causes.append((name, f"has shape {row['shape']} in one model and {row['shape_b']} in the other"))
        elif row["law"] != row["law_b"] or abs(row["z"]) > AGREES:
            ours, theirs = f"{row['law']}, gain {row['gain']:.3g}", f"{row['law_b']}, gain {row['gain_b']:.3g}"
            causes.append((name, f"{ours}, in one model, {theirs}, in the other"))
    for which, names in alone.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            causes.append(("", f"{len(names)} parameters are in the {which} model alone: {shown}"))
    meant = "nothing, if that is meant"
    findings = [Finding("different", WARNING, -1, name, "weight", "forward", cause, meant) for name, cause in causes]
    both["words"] = both["words"].fillna("-") + " | " + both["words_b"].fillna("-")
    return Audit(both, Verdict(tuple(findings), len(both), both))
