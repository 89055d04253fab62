"""What is wrong with a network, and what to change: one verdict of a model and a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.errors import Limits, UsageError, check_functions, check_value, library_call
from initlab.models.fans import ModelTensor
from initlab.models.symbolic_flow import attributes_as_they_were, refuse_unreadable
from initlab.probes.snapshot import all_tensors
from initlab.probes.torch_private import NormBase
from initlab.probes.updates import list_optimizers
from initlab.stats.dtypes import resolve_formats
from initlab.verdict.depth_rules import (
    judge_collapse,
    judge_loss,
    judge_output,
    judge_post_norm,
    judge_trends,
    judge_width,
)
from initlab.verdict.evidence import Loss, NetworkEvidence, changed_weights, collect_evidence, default_loss
from initlab.verdict.finding import Finding, Verdict
from initlab.verdict.format_rules import judge_formats
from initlab.verdict.input_rules import judge_input
from initlab.verdict.module_rules import judge_embeddings, judge_norms, judge_recurrent
from initlab.verdict.parameter_rules import (
    judge_gradients,
    judge_lost_variance,
    judge_means,
    judge_outlier,
    judge_parameters,
    judge_stray,
    judge_zero,
)
from initlab.verdict.reference_networks import Reference, draw_parameters
from initlab.verdict.rules import ERROR, WARNING
from initlab.verdict.signal_rules import judge_biases, judge_logits, judge_producers, judge_units
from initlab.verdict.training_rules import judge_updates, train_steps
from initlab.verdict.weight_rules import judge_fans, judge_lost_init

# In the order in which causes are looked for. Each takes the evidence and gives a finding or None. A remedy in numbers
# is applied before the next rule is asked, so that what a layer only inherits from those before it is not found again.
SIGNAL_RULES = (
    judge_parameters,
    judge_gradients,
    judge_input,
    judge_zero,
    judge_stray,
    judge_embeddings,
    judge_norms,
    judge_recurrent,
    judge_lost_init,
    judge_fans,
    judge_means,
    judge_biases,
    judge_logits,
    judge_outlier,
    judge_lost_variance,
    judge_producers,
    judge_units,
    judge_trends,
    judge_post_norm,
    judge_output,
    judge_loss,
    judge_collapse,
    judge_width,
)
ROUNDS = 6  # causes that are looked for one behind the other


@library_call
def diagnose(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    steps: int = 0,
    *,
    formats: Sequence[str | torch.dtype] = (),
) -> Verdict:
    """Say what is wrong with a network: which layer, why, and what to change.

    model: any nn.Module, in the mode in which it trains. x: a batch, as for `initlab.measure`. y, loss: `loss(out, y)`,
    or `loss(out)`; without a loss gradients are taken of the output itself. optimizer, steps: the rate of learning is
    judged by as many steps, at least one, which are taken back. formats: number formats, such as ["float16"]: what they
    would lose is said, and the loss scale that saves the gradients.

    Returns a `Verdict`: `print` it, or read `.ok` and `.findings`. Parameters, buffers, gradients, the optimizer and
    random numbers are afterwards what they were. Raises UsageError for what does not fit the model.

    >>> model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(20)])
    >>> verdict = diagnose(model, torch.randn(100, 64))
    >>> verdict.ok, verdict.findings[0].rule
    (False, 'vanishing')
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model={type(model).__name__}: must be an nn.Module")
    check_functions(loss=loss)
    if x is None:
        raise UsageError("diagnose: x is missing; give a batch, such as next(iter(loader))[0]")
    if y is not None and loss is None:
        raise UsageError("diagnose: y without a loss: give one too, such as loss=torch.nn.functional.cross_entropy")
    if next(model.parameters(), None) is None:
        raise UsageError("model: has no parameters; there is nothing to diagnose")
    steps = check_value("steps", steps, Limits(0, 10**6, whole=True))
    if optimizer is None and steps:
        raise UsageError(f"steps={steps}: without an optimizer no step can be taken; give optimizer= too")
    optimizers = [] if optimizer is None else list_optimizers(model, optimizer)
    if any(t.numel() == 0 for t in all_tensors(x)):
        raise UsageError("x: is empty; give a batch of one or more examples")
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    refuse_unreadable(model, True)
    names = resolve_formats(formats) if formats else ()
    idle = [m for m in model.modules() if isinstance(m, NormBase) and is_never_updated(m)]
    try:
        for m in idle:
            m.training = True
        with attributes_as_they_were(model):
            found, evidence, reference = _judge(model, x, y, loss, optimizers, steps, names, len(idle))
        found += judge_formats(evidence.rows, names)
        return Verdict(tuple(found), evidence.n_layers, evidence.rows, reference.bands)
    finally:
        for m in idle:
            m.training = False


def is_never_updated(norm: NormBase) -> bool:
    """Whether a norm takes running statistics that no batch has moved yet: it does nothing."""
    return not norm.training and norm.num_batches_tracked is not None and not int(norm.num_batches_tracked)


def _judge(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Loss | None,
    optimizers: Sequence[Optimizer],
    steps: int,
    formats: Sequence[str],
    n_idle: int,
) -> tuple[list[Finding], NetworkEvidence, Reference]:
    evidence = collect_evidence(model, x, y, loss or default_loss, formats)
    if loss is not None and not evidence.known.flow.differentiable and any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "loss: has no gradient; it is cut off from the parameters (by detach, item, argmax or no_grad)"
        )
    reference = Reference(evidence)
    found = [_name_sources(evidence, one) for one in _find(evidence, reference, set())]
    if n_idle:
        cause = f"{n_idle} norms are in eval mode, and no batch has moved their running statistics: they do nothing"
        note = "call model.train() before a network that was not trained is judged; here they were judged in training"
        found.append(Finding("norm-never-updated", WARNING, -1, "", "norm", "forward", cause, note))
    if optimizers and all(one.severity != ERROR for one in found):
        found += filter(None, [judge_updates(train_steps(evidence, optimizers, steps))])
    found += [
        Finding("unmeasured", WARNING, -1, "", "other", "forward", note, "look at it, or leave it")
        for note in evidence.notes
    ]
    found.sort(key=lambda one: one.severity != ERROR)
    return found, evidence, reference


def _find(
    evidence: NetworkEvidence, reference: Reference, said: set[tuple[str, str]], rounds: int = ROUNDS
) -> Iterator[Finding]:
    """The findings of a pass; each cause that has a remedy in numbers is mended before the next one is looked for."""
    for rule in SIGNAL_RULES:
        finding = rule(evidence, reference)
        if finding is None or (finding.rule, finding.name) in said:  # its remedy was of no use
            continue
        said.add((finding.rule, finding.name))
        yield finding
        if finding.severity != ERROR:
            continue
        if rounds == 1 or not (finding.factors or finding.redraw):
            return
        with changed_weights(evidence.model, _list_mended(evidence, finding)):
            x = evidence.x
            if "input" in finding.factors:
                x = _scale_input(x, finding.factors["input"])
            mended = collect_evidence(evidence.model, x, evidence.y, evidence.loss)
            yield from _find(mended, Reference(mended), said, rounds - 1)
        return


def _name_sources(evidence: NetworkEvidence, finding: Finding) -> Finding:
    """A finding whose remedy names parameters alone: of a weight that is computed, those that it is computed from.

    The size of a weight under weight_norm is its magnitude; under others no factor of a parameter is one of the weight.
    """
    computed = {t.name: t for t in evidence.known.tensors if t.computed is not None}
    if not any(name.partition("[")[0] in computed for name in (*finding.factors, *finding.redraw)):
        return finding
    names = {id(p): name for name, p in evidence.model.named_parameters()}
    factors, redraw, set_through = dict[str, float](), list[str](), list[str]()
    for name, factor in finding.factors.items():
        tensor = computed.get(name.partition("[")[0])
        if tensor is None:
            factors[name] = factor
        elif tensor.computed is not None and "WeightNorm" in tensor.computed.op:
            factors |= {names[id(p)]: factor for p in tensor.sources if p.shape != tensor.values.shape}
        else:
            set_through.append(name)
    for name in finding.redraw:
        sources = [names[id(p)] for p in computed[name].sources] if name in computed else [name]
        redraw += sources
        set_through += [name] if name in computed else []
    how = f"{finding.remedy}; {', '.join(set_through[:3])} is computed: initlab.init_ sets what it is computed from"
    return replace(finding, factors=factors, redraw=tuple(redraw), remedy=how if set_through else finding.remedy)


def _list_mended(evidence: NetworkEvidence, finding: Finding) -> Iterator[tuple[ModelTensor, Tensor]]:
    """The values that tensors have after a remedy."""
    parts = {gain.name: gain for gain in evidence.gains}
    tensors = {tensor.name: tensor for tensor in evidence.known.tensors}
    values = dict[str, Tensor]()
    for name, factor in finding.factors.items():
        tensor = parts[name].tensor if name in parts else tensors.get(name)
        if tensor is None:
            continue
        value = values.setdefault(tensor.name, tensor.values.detach().clone())
        if name in parts:
            part = parts[name].part
            value = value.narrow(tensor.axis, part.start, part.stop - part.start)
        value.mul_(factor)
    drawn = {t.name: new for t, new in draw_parameters(evidence, torch.Generator().manual_seed(0))}
    for name in finding.redraw:
        one = tensors[name].values
        new = 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
        values[name] = drawn.get(name, new.to(one.device, one.dtype))
    for name, value in values.items():
        yield tensors[name], value


def _scale_input(x: Any, factor: float) -> Any:
    """A batch of any form whose floating-point tensors are multiplied by a number."""
    if isinstance(x, Tensor):
        return x * factor if x.is_floating_point() else x
    if isinstance(x, dict):
        return {name: _scale_input(one, factor) for name, one in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_scale_input(one, factor) for one in x)
    return x
