"""Healthy networks have no error; a planted fault is named with its rule and its layer, and its remedy mends it."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.faults import FAULTS, HEALTHY, LIBRARIES, Case
from initlab.verdict.diagnose import diagnose
from initlab.verdict.finding import Finding, Verdict
from initlab.verdict.rules import RULES

SIZES = [(20, 64, "float32", 0), (10, 200, "bfloat16", 1)]
MORE = [(d, w, t, s) for d in (10, 20, 50) for w in (64, 200) for t in ("float32", "bfloat16") for s in range(3)]
sizes = pytest.mark.parametrize(
    ("depth", "width", "dtype", "seed"),
    [
        SIZES[0],
        pytest.param(*SIZES[1], marks=pytest.mark.long),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE if one not in SIZES),
    ],
)


def make(name: str, depth: int, width: int, dtype: str, seed: int) -> Case:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} is not installed")
    torch.manual_seed(seed)
    case = (HEALTHY | FAULTS)[name](depth, width)
    kind = getattr(torch, dtype)
    return case._replace(model=case.model.to(kind), x=case.x.to(kind))


def apply_remedy(model: nn.Module, x: Tensor, verdict: Verdict) -> tuple[nn.Module, Tensor]:
    """What a reader does with the errors of a verdict: multiply, or draw anew with the std that the remedy names."""
    parts = dict(model.named_parameters())
    for finding in verdict.errors:
        with torch.no_grad():
            x = _apply(finding, parts, x)
    return model, x


def _apply(finding: Finding, parts: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    for name in finding.redraw:
        fan_in = parts[name].shape[1]
        parts[name].normal_(0, (2 / fan_in) ** 0.5)
    for name, factor in finding.factors.items():
        if name == "input":
            x = x * factor
            continue
        full, _, label = name.rstrip("]").partition("[")
        p = parts[full]
        third = ("query", "key", "value").index(label) if label else 0
        (p.chunk(3)[third] if label else p).mul_(factor)
    return x


@sizes
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_has_no_error(name: str, depth: int, width: int, dtype: str, seed: int) -> None:
    case = make(name, depth, width, dtype, seed)
    verdict = diagnose(case.model, case.x)
    assert verdict.ok and verdict.errors == (), str(verdict)


@sizes
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_mended(name: str, depth: int, width: int, dtype: str, seed: int) -> None:
    case = make(name, depth, width, dtype, seed)
    verdict = diagnose(case.model, case.x)
    assert not verdict.ok and {one.rule for one in verdict} <= RULES.keys()
    first = verdict.findings[0]
    assert first.rule in case.rules and first.severity == "error", str(verdict)
    if case.name:
        assert first.name == case.name, str(verdict)
        assert len(verdict.errors) == 1, str(verdict)  # one cause, one finding
    kind = getattr(torch, dtype)
    if case.mend is not None:
        torch.manual_seed(seed)
        model, x = case.mend(case.model, case.x)
        model, x = model.to(kind), x.to(kind)
    else:
        model, x = apply_remedy(case.model, case.x, verdict)
    again = diagnose(model, x)
    assert again.ok, f"{verdict}\n--- after the remedy:\n{again}"


def test_nothing_of_the_model_is_changed() -> None:
    torch.manual_seed(0)
    case = HEALTHY["batch-normed"](10, 32)
    fault = FAULTS["naive"](10, 32)
    for model, x in ((case.model, case.x), (fault.model, fault.x)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        memory = [p.data_ptr() for p in model.parameters()]
        state = torch.get_rng_state()
        diagnose(model, x)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert memory == [p.data_ptr() for p in model.parameters()] and torch.equal(state, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("factor", "rule"), [(1.0, None), (100.0, "update-too-large"), (1e-6, "update-too-small")])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_learning_rate_is_judged_by_steps_that_are_taken_back(factor: float, rule: str | None, kind: str) -> None:
    torch.manual_seed(0)
    case = HEALTHY["kaiming"](5, 64)
    model, y = case.model, torch.randint(0, 10, (64,))
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * factor, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 * factor)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 1e-3  # a step, so that the optimizer has a state
    nn.functional.cross_entropy(model(case.x), y).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    verdict = diagnose(model, case.x, y, nn.functional.cross_entropy, optimizer, steps=3)
    assert [one.rule for one in verdict.errors] == ([] if rule is None else [rule]), str(verdict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)
    if rule is not None:
        for group in optimizer.param_groups:
            group["lr"] *= verdict.errors[0].factors["lr"]
        assert diagnose(model, case.x, y, nn.functional.cross_entropy, optimizer, steps=3).ok
