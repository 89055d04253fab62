"""What each tool says of planted situations: `python -m benchmarks.sees [FILE]` prints a table, beside the truth.

Asked is what a tool's public interface gives without further arithmetic on tensors; a peer that keeps tensors is asked
with the functions that it offers for them. Each is asked in a process of its own, since some leave torch changed.
Peers are not needed: one that is absent is said to be.
"""

import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

import initlab
from benchmarks.child import python
from benchmarks.planted import SITUATIONS, Place, Situation, batch, loss_of, train_step
from initlab.errors import describe_error

NOT_SHOWN = "not shown"
Answer = float | str | None
PARTS = {"first", "second", "third", "last", "body", "head"}  # modules that are asked for by their order


def ask_initlab(s: Situation) -> Answer:
    """`probe` around two steps, and its rows of the first."""
    model = s.model()
    optimizers = s.optimizers(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.probe(model, optimizer=optimizers) as p:
            for _ in range(2):
                train_step(model, optimizers, s.scale)
    rows = p.frame()
    rows = rows[rows["step"] == 0]
    forward = rows[rows["direction"] == "forward"]
    if s.question == "uncalled":
        return _first(name for w in caught for name in str(w.message).replace(",", " ").replace(";", " ").split() if
                      name in dict(model.named_modules()))  # fmt: skip
    if s.question == "nan":
        bad = forward[(forward["n_nan"] > 0) & ~forward["tensor"].isin(["weight", "bias", "update"])]
        return f"output of {bad['name'].iloc[0] or bad['op'].iloc[0]}" if len(bad) else None
    if s.question == "order":
        layers = forward[forward["tensor"] == "preactivation"].sort_values("layer", kind="stable")
        return " ".join(dict.fromkeys(layers["name"]))
    if s.question == "not updated":
        weights = set(forward.loc[forward["tensor"] == "weight", "name"])
        return " ".join(sorted(weights - set(forward.loc[forward["tensor"] == "update", "name"]))) or None
    column = {"dead": "frac_dead", "ratio": "update_ratio", "gradient": "rms", "saturated": "frac_saturated"}
    found = _at(rows if s.question == "gradient" else forward, s)
    return float(found[column.get(s.question, "std")].iloc[0]) if len(found) else None


def _at(rows: pd.DataFrame, s: Situation) -> pd.DataFrame:
    """The row that answers: of a module's output, of a function, of an update, or of the layer below an activation."""
    if s.question == "ratio":
        return rows[(rows["tensor"] == "update") & (rows["name"] == s.place.module)]
    if s.question == "saturated":
        return rows[(rows["tensor"] == "preactivation") & (rows["name"] == "first")]
    if s.question == "logits":
        return rows[rows["tensor"] == "logits"]
    if s.place.function:
        return rows[rows["op"] == s.place.function].iloc[s.place.nth :]
    own = rows[(rows["name"] == s.place.module) & (rows["part"] == "")]
    return own[own["direction"] == ("backward" if s.question == "gradient" else "forward")]


def ask_torchlens(s: Situation) -> Answer:
    """`trace` with gradients, `stats.tensor_stats` of what it keeps, and its functions of the module `debug`."""
    import torchlens as tl

    model = s.model()
    if s.question == "nan":
        found = tl.debug.find_nan(model, batch())
        return f"output of {found.func_name}" if found.found else None
    log = tl.trace(model, batch(), capture=tl.options.CaptureOptions(save_grads=True))
    if s.question == "uncalled":
        return " ".join(map(str, log.uncalled_modules)) or None
    if s.question == "order":
        names = [str(op.module).partition(":")[0] for op in log if op.module]
        return " ".join(dict.fromkeys(name for name in names if name in PARTS))
    if s.question in ("ratio", "not updated"):
        return None  # a trace is of one pass
    op = log[s.place.module] if s.place.module else _nth(log, s.place)
    if s.question == "dead":
        table = tl.debug.dead_neurons(log)
        return float(table.loc[table["op"].str.startswith(op.layer_label), "dead_frac"].iloc[0])
    if s.question == "gradient":
        log.log_backward(s.scale * loss_of(log[log.output_layers[0]].out))
        audit = tl.debug.gradient_flow_audit(log, grad_scale=s.scale, basis="rms")
        row = audit[audit["op"].str.startswith(op.layer_label)].iloc[0]
        return float(row["rms" if "rms" in row.index else "grad_rms"])
    if s.question == "saturated":
        return None  # selects units between several traces by bounds that one gives; no share
    if s.question == "logits":
        op = log[op.parents[0]]
    return float(tl.stats.tensor_stats(op.out).sd)


def _nth(log: Any, place: Place) -> Any:
    return [op for op in log if str(op.func_name).strip("_") == place.function][place.nth]


def ask_nansense(s: Situation) -> Answer:
    """A session that runs freely and publishes every batch, and its statistics of the last."""
    import nansense

    model = s.model()
    optimizers = s.optimizers(model)
    session = nansense.start(model, optimizer=optimizers[0])
    session.set_debug_settings(interval=1)
    session.detach()
    session.set_update_frequency(unit="batch", n=1)
    for _ in session.batches([0], phase="train", epoch=0):
        train_step(model, optimizers, s.scale)
    error = session.debug_error
    session.close()
    names = list(session.layer_names)
    if s.question == "nan":
        return f"output of {error.layers[0].layer}" if error else None
    if s.question == "order":
        return " ".join(name for name in names if name in PARTS)
    if s.question not in ("std", "gradient", "dead", "logits"):
        return None
    functions = [name for name in names if name.rpartition(".")[2].strip("_0123456789") == s.place.function]
    wanted = s.place.module or (functions[s.place.nth] if s.place.nth < len(functions) else "")
    if s.question == "logits":  # what softmax is called with is the tensor before it
        wanted = names[names.index(wanted) - 1]
    found = session.current_batch_stats(layers=[name for name in names if name == wanted], include_patches=False)
    stats = next(iter(found.stats.values()), None)
    if stats is None:
        return None
    if s.question == "dead":
        channels = stats.activations.channel_hists
        count = stats.activations.dead_channel_count
        return None if count is None or channels is None else count / len(channels)
    tensor = stats.gradients if s.question == "gradient" else stats.activations
    return float((tensor.sum_sq / tensor.n) ** 0.5) if s.question == "gradient" else float(tensor.std)


def ask_torch_audit(s: Situation) -> Answer:
    """The findings of its wrappers around two steps; it has no numbers apart from them."""
    from torch_audit import audit_dynamic

    model = s.model()
    optimizers = s.optimizers(model)
    with audit_dynamic(model, optimizer=optimizers[0], every_n_steps=1, reporters=[]) as auditor:
        for _ in range(2):
            train_step(model, optimizers, s.scale, auditor.forward)
            auditor.optimizer_step()
    rules = {"nan": "TA100", "dead": "TA105", "uncalled": "TA500", "not updated": "TA104"}
    wanted = [f for f in auditor.finish(report=False).findings if f.rule_id == rules.get(s.question)]
    return str(wanted[0].message if s.question == "nan" else wanted[0].module_path) if wanted else None


def ask_torchmortem(s: Situation) -> Answer:
    """The series and findings of its JSON report over two steps."""
    from torchmortem import Autopsy

    model = s.model()
    optimizers = s.optimizers(model)
    with Autopsy(model, optimizer=optimizers[0], sampling="thorough") as autopsy:
        for _ in range(2):
            train_step(model, optimizers, s.scale)
            autopsy.step(loss=0.0)
    with tempfile.TemporaryDirectory() as folder:
        states = autopsy.report(Path(folder) / "report.json").collector_states
    series = {
        "std": ("activation", "act_std"), "dead": ("activation", "act_dead_frac"), "ratio": ("weight", "update_ratio"),
        "saturated": ("activation", "act_saturated_frac"), "gradient": ("gradient", "grad_norm"),
        "nan": ("activation", "act_mean"), "not updated": ("weight", "update_norm"), "order": ("activation", "act_std"),
    }  # fmt: skip
    if s.question not in series:
        return None
    collector, name = series[s.question]
    layers, values = states[collector].layers, states[collector].series[name][0]
    if s.question == "nan":
        return _first(f"output of {layer}" for layer, value in zip(layers, values, strict=True) if value != value)
    if s.question == "not updated":
        return _first(layer for layer, value in zip(layers, values, strict=True) if value == 0)
    if s.question == "order":
        return " ".join(layers)
    if s.place.module not in layers:
        return None
    value = float(values[layers.index(s.place.module)])
    if s.question == "dead":
        return f"{value:.4g} of entries"
    return f"{value:.4g} (norm)" if s.question == "gradient" else value


def _first(names: Any) -> str | None:
    return next(iter(names), None)


TOOLS: dict[str, Callable[[Situation], Answer]] = {
    "initlab": ask_initlab,
    "torchlens": ask_torchlens,
    "nansense": ask_nansense,
    "torch-audit": ask_torch_audit,
    "torchmortem": ask_torchmortem,
}


def ask(tool: str) -> list[str]:
    """A tool's answers as text; what it prints and warns is left out."""
    try:
        importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return ["not installed"] * len(SITUATIONS)
    logging.disable(logging.CRITICAL)
    answers = []
    for situation in SITUATIONS:
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = TOOLS[tool](situation)
            answers.append(NOT_SHOWN if answer is None or answer != answer else as_text(answer))
        except Exception as error:  # another's program may raise anything, and that is an answer
            answers.append(f"error: {describe_error(error)[:60]}")
    return answers


def as_text(answer: float | str) -> str:
    return answer if isinstance(answer, str) else f"{answer:.4g}"


def child(tool: str) -> None:
    """What a process of its own runs."""
    print(json.dumps(ask(tool)))


def table() -> pd.DataFrame:
    """A row per situation: the truth, and what each tool says."""
    columns = {"situation": [s.name for s in SITUATIONS], "truth": [as_text(s.answer()) for s in SITUATIONS]}
    for tool in TOOLS:
        _, said = python(["-c", f"from benchmarks import sees; sees.child({tool!r})"], threads=1)
        columns[tool] = json.loads(said.splitlines()[-1])
    return pd.DataFrame(columns)


def as_markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def versions() -> str:
    found = []
    for package in ["torch", *TOOLS]:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main(words: list[str]) -> None:
    text = f"{as_markdown(table())}\n\n{versions()}\n"
    print(text, end="")
    if words:
        Path(words[0]).write_text(f"# What each tool says of planted situations\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
