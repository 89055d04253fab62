"""How each tool is asked what is wrong with a network, by its public interface, and its answer as a list of findings.

A tool that watches a training sees `STEPS` steps of Adam on one batch. A kind is called by the word that initlab has
for it; a finding that fits none of these keeps the name that its tool gives it. Notes below a warning are left out.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from initlab.verdict.diagnose import diagnose

STEPS = 10


class Said(NamedTuple):
    """One finding: an error or a warning by the tool's own word, what is wrong, and where, the first place in front."""

    error: bool
    kind: str
    places: tuple[str, ...] = ()


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer, after: Callable[[Tensor], Any] = id) -> None:
    """A few steps; `after` is called with the loss behind each."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        after(loss)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), 1e-3)


def ask_initlab(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """`diagnose`; what runs forward and what runs backward is one kind."""
    found = diagnose(model, x, y, F.mse_loss)
    return [Said(one.severity == "error", one.rule.removeprefix("gradient-"), (one.name,)) for one in found]


TORCH_AUDIT = {
    "TA100": "non-finite", "TA102": "exploding", "TA104": "vanishing", "TA105": "dead", "TA301": "input-scale",
    "TA302": "input-equal",
}  # fmt: skip


def ask_torch_audit(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """`autopatch`, as its README begins, at the start and at every step; advice on the hardware (TA2xx) is left out."""
    from torch_audit import autopatch

    optimizer = adam(model)
    auditor = autopatch(model, optimizer=optimizer, every_n_steps=1, reporters=[], run_static=True, run_init=True)
    train(model, x, y, optimizer)
    found = auditor.finish(report=False).findings
    said = [
        Said(f.severity.value != "WARN", TORCH_AUDIT.get(f.rule_id, f.rule_id), (f.module_path,) * bool(f.module_path))
        for f in found
        if f.severity.value != "INFO" and not f.rule_id.startswith("TA2")
    ]
    return list(dict.fromkeys(said))  # every step says it again


NANSENSE = {"nan": "non-finite", "inf": "non-finite", "underflow": "vanishing", "overflow": "exploding"}


def ask_nansense(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """The debugger's warning over the steps of a session that runs freely; the numbers that it draws are no answer."""
    import nansense

    optimizer = adam(model)
    session = nansense.start(model, optimizer=optimizer)
    session.set_debug_settings(interval=1)
    session.detach()
    for _ in session.batches(range(STEPS), phase="train", epoch=0):
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(model(x), y))
        optimizer.step()
    error = session.debug_error
    session.close()
    if error is None:
        return []
    said = []
    for one in error.layers:
        kinds = dict.fromkeys(kind for reason, kind in NANSENSE.items() if getattr(one, reason))
        said += [Said(True, kind, (one.layer, one.layer.rpartition(".")[2].strip("_0123456789"))) for kind in kinds]
    return said


TORCHMORTEM = {
    "Vanishing gradients": "vanishing", "Gradient stalling": "vanishing", "Exploding gradients": "exploding",
    "Weight norm explosion": "exploding", "Dead units": "dead", "Activation saturation": "saturated",
    "Inter-layer weight norm imbalance": "outlier", "Rank collapse": "correlation-collapse",
}  # fmt: skip


def ask_torchmortem(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """The findings of its report."""
    from torchmortem import Autopsy

    optimizer = adam(model)
    with Autopsy(model, optimizer=optimizer, sampling="thorough") as autopsy:
        train(model, x, y, optimizer, lambda loss: autopsy.step(loss=loss.item()))
    with tempfile.TemporaryDirectory() as folder:
        found = autopsy.report(Path(folder) / "report.json").findings
    said = []
    for one in found:
        kind = next((kind for title, kind in TORCHMORTEM.items() if one.title.startswith(title)), one.category)
        if one.severity.name != "INFO":
            said.append(Said(one.severity.name == "CRITICAL", kind, tuple(one.affected_layers)))
    return said


TORCHLENS = {"dtype_near_max": "exploding", "dtype_subnormal": "vanishing"}


def ask_torchlens(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """`debug.audit_params`, and `debug.audit_trace` of a pass with gradients, where nan is born forward in front.

    The kinds of gradients stand in their own audit.
    """
    import torchlens as tl

    said = [
        Said(one.severity == "critical", "non-finite" if "finite" in one.code else one.code, tuple(one.names))
        for one in tl.debug.audit_params(model).findings
        if one.severity != "info"
    ]
    log = tl.trace(model, x, capture=tl.options.CaptureOptions(save_grads=True))
    log.log_backward(F.mse_loss(log[log.output_layers[0]].out, y))
    flow = tl.debug.gradient_flow_audit(log, grad_scale=1.0)
    verdicts = dict(zip(flow["op"], flow["verdict"], strict=True))
    for one in sorted(tl.debug.audit_trace(log).findings, key=lambda one: one.check not in ("find_nan", "bisect_nan")):
        kind = TORCHLENS.get(one.check, one.check)
        if "nan" in one.check or "nonfinite" in one.check:
            kind = "non-finite"
        elif one.check == "gradient_flow_audit":
            kind = verdicts[one.ops[0]].replace("nonfinite", "non-finite")
        places = dict.fromkeys([*one.modules, *_list_places(log, one.ops)])
        if one.severity != "info":
            said.append(Said(one.severity == "critical", kind, tuple(places)))
    return said


def _list_places(log: Any, labels: tuple[str, ...]) -> list[str]:
    """The modules and functions of torchlens's operations."""
    places = []
    for label in labels:
        op = log[label]
        places += [str(op.module).partition(":")[0], str(op.func_name).strip("_")]
    return places


def ask_anomaly_mode(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """`torch.autograd.detect_anomaly`: an error with the name of a function in the backward pass."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
            train(model, x, y, adam(model))
    except RuntimeError as error:
        found = re.search(r"Function '(\w+?)Backward\d*' returned nan", str(error))
        if found is None:
            raise
        return [Said(True, "non-finite", (found[1].lower(),))]
    return []


def ask_transformers(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """`DebugUnderflowOverflow`: stops at the first nan or inf; the last frame that it prints is the module."""
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(model)
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            train(model, x, y, adam(model))
    except ValueError as error:
        if "inf/nan detected" not in str(error):
            raise
        frames = re.findall(r"^ {18}(\S*) \w+$", printed.getvalue(), re.MULTILINE)
        return [Said(True, "non-finite", tuple(frames[-1:]))]
    return []


SMALL, LARGE = 0.01, 100.0  # of a standard deviation
MOST_DEAD, MOST_SATURATED = 0.9, 0.5  # shares of zeros of a ReLU, and of |tanh| > 0.97 as in makemore, part 3


def ask_hooks(model: nn.Module, x: Tensor, y: Tensor) -> list[Said]:
    """A forward hook on every leaf and a look at its output, with round bounds, as one writes it by hand."""
    said: list[Said] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            out = (out[0] if isinstance(out, tuple) else out).detach()
            std = float(out.std())
            checks = {
                "non-finite": std != std or std == float("inf"),
                "vanishing": std < SMALL,
                "exploding": std > LARGE,
                "dead": isinstance(module, nn.ReLU) and float((out == 0).float().mean()) > MOST_DEAD,
                "saturated": isinstance(module, nn.Tanh) and float((out.abs() > 0.97).float().mean()) > MOST_SATURATED,
            }
            said.extend(Said(True, kind, (name,)) for kind, found in checks.items() if found)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    model(x)
    for handle in handles:
        handle.remove()
    return said


TOOLS: dict[str, Callable[[nn.Module, Tensor, Tensor], list[Said]]] = {
    "initlab": ask_initlab,
    "torch-audit": ask_torch_audit,
    "torchmortem": ask_torchmortem,
    "torchlens": ask_torchlens,
    "nansense": ask_nansense,
    "transformers": ask_transformers,
    "anomaly mode": ask_anomaly_mode,
    "hooks": ask_hooks,
}
