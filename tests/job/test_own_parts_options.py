"""Options that name what is the user's own: what is recorded, and one line for what cannot be had."""

from collections.abc import Callable
from pathlib import Path

import pytest

from initlab.runs.read import read

Lab = Callable[..., tuple[int, str, str]]
SMALL = (
    "depth=2",
    "width=8",
    "seeds=1",
    "train.steps=2",
    "train.width=5",
    "plots=false",
    "report=false",
    "hydra.run.dir=run",
)
MINE = """
import numpy, torch

def flowers(n=90):
    x = numpy.random.default_rng(0).normal(size=(n, 4))
    return x, x.argmax(1)

def halves(weight):
    return torch.full_like(weight, 0.5)

def poor(out, target):
    return out.argmax(-1)

def stop():
    raise SystemExit("no more")
"""


def test_what_is_ones_own_has_its_name_in_every_table(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_parts.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, errors = lab(
        "data._target_=mine_parts.flowers", "data.arguments.n=70", "init._target_=mine_parts.halves",
        "train.loss=torch.nn.CrossEntropyLoss", "train.loss_arguments.label_smoothing=0.1",
        "train.optimizer=torch.optim.SGD", "train.optimizer_arguments.momentum=0.5", *SMALL,
    )  # fmt: skip
    assert (code, errors) == (0, "")
    stats = read("run")
    wanted = {
        "data": "flowers(n=70)", "init": "halves", "distribution": "mine_parts.halves", "gain": 1.0,
        "train_loss": "torch.nn.CrossEntropyLoss(label_smoothing=0.1)", "lr": 0.001,
        "optimizer": "torch.optim.SGD(momentum=0.5)",
    }  # fmt: skip
    for name, value in wanted.items():
        assert set(stats[name]) == {value}, name
    weights = stats.query("tensor == 'weight' and direction == 'forward' and step == 0")
    assert set(weights["mean"]) == {0.5} and set(weights["std"]) == {0.0}
    assert read("run", table="losses")["loss"].notna().all()
    text = (tmp_path / "run/run.json").read_text(encoding="utf-8")
    assert text.count("theory has no law of weights that mine_parts.halves writes") == 2  # stack and training


def test_widths_are_a_list(lab: Lab) -> None:
    code, out, errors = lab(
        "task=stack", "widths=[12,5,9]", "inputs=7", "seeds=2", "plots=false", "report=false", "hydra.run.dir=run"
    )
    assert (code, errors) == (0, "") and "theory: 3 layers" in out
    stats = read("run")
    assert set(stats["widths"]) == {"12-5-9"} and set(stats["depth"]) == {3} and set(stats["inputs"]) == {7}
    counts = stats.query("tensor == 'activation' and direction == 'forward' and seed == 0")["count"]
    assert counts.tolist() == [200 * n for n in (7, 12, 5, 9)]
    assert "widths" not in read_defaults(lab)


def read_defaults(lab: Lab) -> list[str]:
    assert (
        lab("task=stack", "depth=2", "width=3", "seeds=1", "plots=false", "report=false", "hydra.run.dir=other")[0] == 0
    )
    return list(read("other").columns)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("data._target_=mine_parts.stop",), "data._target_=mine_parts.stop: cannot be called (no more)"),
        (("data._target_=mine_parts.flower",), "did you mean flowers?"),
        (("data._target_=mine_parts.flowers", "data.arguments.m=3"), "unexpected keyword argument 'm'"),
        (("data._target_=mine_parts.halves", "data.arguments.weight=3"), "cannot be called"),
        (("data._target_=math.pi",), "cannot be had (3.141592653589793 cannot be called)"),
        (("data.arguments.n=3",), "data.arguments: are those of data._target_"),
        (("init._target_=mine_parts.flowers",), "init: mine_parts.flowers cannot fill a weight (6, 4)"),
        (("init._target_=torch.nn.init.eyes",), "cannot be had"),
        (("init._target_=torch.nn.init.eye_", "init.distribution=normal"), "init._target_ is the distribution"),
        (("init._target_=torch.nn.init.eye_", "sweep.init=[naive]"), "is one of your own"),
        (("init._target_=torch.nn.init.eye_", "task=phase"), "task=phase scales weights of a known law alone"),
        (("init.arguments.a=1",), "init.arguments: are those of init._target_"),
        (("train.loss=mine_parts.poor",), "must return one number"),
        (("train.loss=mine_parts.absent",), "cannot be had"),
        (("train.loss_arguments.delta=1",), "are those of a loss of your own, as in train.loss=torch.nn.HuberLoss"),
        (("train.optimizer=torch.optim.LBFGS",), "missing 1 required positional argument: 'closure'"),
        (("train.optimizer=torch.optim.SGD", "train.optimizer_arguments.momentun=1"), "unexpected keyword argument"),
        (("train.optimizer=torch.nn.Linear",), "cannot train a weight"),
        (("train.loss=mine_parts.poor", "task=explain"), "is for task=lab, train"),
        (("widths=[4,0]",), "widths=0: must be at least 1"),
        (("widths=[4,4]", "depth=3"), "leave depth and width out"),
        (("widths=[4,4]", "task=train"), "widths=[4, 4]: is for task=lab, stack"),
        (("widths=4",), "widths=4: must be a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], text: str
) -> None:
    (tmp_path / "mine_parts.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, errors = lab("train.steps=2", "plots=false", "report=false", *words)
    assert (code, out) == (2, "") and errors.count("\n") == 1
    assert text in errors
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs/config").glob("*"))
