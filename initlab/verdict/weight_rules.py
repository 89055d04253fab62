"""Rules about weights alone: never set, cut without being widened, fans the wrong way, lost under a parametrization."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from initlab.models.dataflow import Follower
from initlab.models.families import CUT
from initlab.models.fans import ModelTensor, Slice, find_rms, is_readable
from initlab.models.laws import WeightLaw, recognize_law
from initlab.verdict.evidence import NetworkEvidence
from initlab.verdict.finding import Finding
from initlab.verdict.parameter_rules import describe_stray, has_equal_rows
from initlab.verdict.reference_networks import Reference
from initlab.verdict.rules import AGREES, ERROR, KEPT, LOST, WARNING


class AuditRow(NamedTuple):
    """A parameter, or a part of a stacked one, as `audit` sees it."""

    tensor: ModelTensor
    part: Slice
    law: WeightLaw
    rules: tuple[str, ...]
    follower: Follower | None
    needed: float
    words: str

    @property
    def name(self) -> str:
        """The dotted name, with the part in brackets."""
        return f"{self.tensor.name}[{self.part.label}]" if self.part.label else self.tensor.name

    @property
    def gain(self) -> float:
        """std times sqrt(fan_in)."""
        return self.law.std * math.sqrt(self.part.fan_in)

    def as_dict(self) -> dict[str, Any]:
        """The columns of the frame."""
        root, weight = math.sqrt(self.part.fan_in), self.tensor.is_weight
        return {
            "name": self.tensor.name,
            "part": self.part.label,
            "kind": self.tensor.kind,
            "shape": tuple(self.tensor.values.shape) if is_readable(self.tensor.values) else (),
            "count": self.law.size,
            "fan_in": self.part.fan_in,
            "fan_out": self.part.fan_out,
            "mean": self.law.mean,
            "std": self.law.std,
            "gain": self.gain if weight else math.nan,
            "gain_error": self.law.std_error * root if weight else math.nan,
            "law": self.law.name,
            "rules": ", ".join(self.rules),
            "follower": str(self.follower) if self.follower is not None else "",
            "needed": self.needed,
            "words": self.words,
        }

    def has_std(self, std: float) -> bool:
        """Whether the standard deviation is this one, at 5 standard errors."""
        return abs(self.law.std - std) <= AGREES * self.law.std_error


def list_weight_findings(model: nn.Module, rows: Sequence[AuditRow]) -> Iterator[Finding]:
    """What is wrong with the parameters of a model, one finding for each tensor and cause."""
    seen = set[tuple[str, str]]()
    for row in rows:
        for rule, severity, cause, remedy in _judge_row(row):
            if (rule, row.tensor.name) not in seen:
                seen.add((rule, row.tensor.name))
                yield Finding(rule, severity, -1, row.name, "weight", "forward", cause, remedy)
    yield from _list_shared(model)


Words = tuple[str, str, str, str]  # rule, severity, cause, remedy


def _judge_row(row: AuditRow) -> Iterator[Words]:
    tensor, part = row.tensor, row.part
    values = tensor.values
    if not is_readable(values) or not values.is_floating_point():
        return
    bad = int((~values.isfinite()).sum())
    if bad:
        yield "non-finite", ERROR, f"{bad} of {values.numel()} entries are nan or inf", "set it: it may be empty memory"
        return
    tiny = torch.finfo(values.dtype).tiny
    largest = float(values.abs().max())
    if 0 < largest < tiny:
        yield "never-set", ERROR, f"no entry is above {largest:.3g}: it looks like empty memory", "set it"
        return
    if not tensor.is_weight:
        return
    if largest == 0:
        yield "zero", WARNING, "all entries are 0", "draw it, unless it ends a residual branch"
        return
    if has_equal_rows(tensor.cut(part)):
        yield "symmetric", ERROR, "all units have the same weights and stay alike for ever", "draw it at random"
        return
    stray = describe_stray(tensor.cut(part), math.hypot(row.law.mean, row.law.std))
    if stray:
        yield "stray-entries", ERROR, stray, "draw it anew"
        return
    yield from _judge_size(row)
    lost = describe_lost(tensor, row.needed)
    if lost:
        yield "init-lost", ERROR, *lost


def _judge_size(row: AuditRow) -> Iterator[Words]:
    """A cut normal that lost variance, fans the wrong way round, Xavier's rule over a stack."""
    tensor, law, part, needed = row.tensor, row.law, row.part, row.needed
    meant = law.nominal_std * math.sqrt(part.fan_in)
    usual = {needed, 1.0, math.sqrt(2)}
    if law.name == CUT and law.kept_std < KEPT and any(abs(meant / one - 1) < 0.03 for one in usual):
        at, kept = law.high / law.nominal_std, law.kept_std
        cause = f"normal numbers cut at {at:.2g} standard deviations keep gain {row.gain:.3g} of {meant:.3g}"
        yield "lost-variance", WARNING, cause, f"divide the std that trunc_normal_ is given by {kept:.3g}"
    apart = abs(math.log2(part.fan_in / part.fan_out)) > 0.5 if part.fan_in > 0 and part.fan_out > 0 else False
    unusual = tensor.axis == 1 or tensor.kind == "transposed convolution"
    if unusual and apart and law.std_error > 0:
        counted = float(math.prod(tensor.values.shape[1:]))  # fan_in as torch.nn.init takes it, by the shape alone
        for one in sorted(usual | {3**-0.5}):
            swapped, right = one / math.sqrt(counted), one / math.sqrt(part.fan_in)
            if row.has_std(swapped) and not row.has_std(right):
                cause = f"its std is {one:.3g}/sqrt({counted:g}), but {part.fan_in:g} numbers feed one output"
                remedy = f"multiply it by {right / swapped:.3g}: nn.init takes shape[1] for the inputs"
                yield "fans-swapped", ERROR if tensor.kind == "linear" else WARNING, cause, remedy
                break
    n_parts = len(tensor.slices)
    if n_parts > 1 and tensor.kind in ("attention", "linear") and law.std_error > 0:
        whole = math.sqrt(2 / (part.fan_in + n_parts * part.fan_out))
        each = math.sqrt(2 / (part.fan_in + part.fan_out))
        if row.has_std(whole) and not row.has_std(each):
            cause = f"Xavier's rule took {n_parts} stacked matrices for one: std {law.std:.3g} in place of {each:.3g}"
            remedy = f"draw each part for itself, or multiply by {each / whole:.3g}"
            yield "xavier-stacked", WARNING, cause, remedy


def describe_lost(tensor: ModelTensor, needed: float) -> tuple[str, str] | None:
    """Cause and remedy where a weight that a hook computes is not what was set: weight_norm, spectral_norm, pruning."""
    if tensor.computed is None or needed != needed:
        return None
    if "WeightNorm" not in tensor.computed.op:
        return None
    direction = next(p.detach() for p in tensor.sources if p.shape == tensor.values.shape)
    kept, root = vars(tensor.module).get(tensor.part), math.sqrt(tensor.slices[0].fan_in)
    found = tensor.rms * root
    if not found or abs(math.log2(found / needed)) < LOST:
        return None
    for what, one in (("its direction was", direction), (f"{tensor.part} was", kept)):
        own = find_rms(one.detach()) * root if isinstance(one, torch.Tensor) else 0.0
        if own > 0 and abs(math.log2(own / needed)) < 0.1:
            cause = f"{tensor.computed.op} gives it gain {found:.3g}, though {what} set with gain {own:.3g}: it is lost"
            return cause, f"set the magnitude too: multiply it by {needed / found:.3g}, or use initlab.init_"
    return None


def judge_lost_init(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """A weight that a hook or a parametrization computes, and that is not what was set."""
    for gain in e.gains:
        words = describe_lost(gain.tensor, gain.needed)
        if words:
            place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
            lost = [one for one in e.gains if describe_lost(one.tensor, one.needed)]
            factors = {one.name: one.needed / one.found for one in lost}
            evidence = {"gain": gain.found, "needed": gain.needed, "layers": len(lost)}
            return Finding("init-lost", ERROR, *place, *words, evidence, factors=factors)
    return None


def judge_fans(e: NetworkEvidence, reference: Reference) -> Finding | None:
    """Raw matrices kept as (inputs, outputs), whose size was set by the wrong one of the two."""
    found = []
    for gain in e.gains:
        tensor = gain.tensor
        if tensor.kind == "linear" and tensor.axis == 1 and gain.rms > 0:
            row = AuditRow(tensor, gain.part, recognize_law(tensor.cut(gain.part)), (), gain.follower, gain.needed, "")
            words = next((words for words in _judge_size(row) if words[0] == "fans-swapped"), None)
            if words is not None:
                found.append((gain, words))
    if not found:
        return None
    gain, (rule, _, cause, remedy) = found[0]
    more = f" (and so are {len(found) - 1} more)" if len(found) > 1 else ""
    place = (e.layer_of(gain.tensor.name), gain.tensor.name, "weight", "forward")
    factors = {one.name: math.sqrt(one.part.fan_out / one.part.fan_in) for one, _ in found}
    return Finding(rule, ERROR, *place, cause + more, remedy, {"layers": len(found)}, factors=factors)


def _list_shared(model: nn.Module) -> Iterator[Finding]:
    """Parameters that several modules hold."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for several in names.values():
        if len(several) > 1:
            cause = f"one parameter under {len(several)} names: {', '.join(several)}"
            remedy = "nothing, if it is meant: one rule sets them all, and the last one wins"
            yield Finding("shared", WARNING, -1, several[0], "weight", "forward", cause, remedy)
