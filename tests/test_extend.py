"""What CONTRIBUTING promises, executed: each of its steps is followed, and what it gives is run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import initlab
from initlab.runs.read import read

ROOT = Path(initlab.__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the page stands in the repository")
Lab = Callable[..., tuple[int, str, str]]
SMALL = ("depth=4", "width=40", "batch=50", "seeds=4", "plots=false", "report=false")


def steps() -> list[tuple[str, str]]:
    """(where, text) of every block of the page that names a file: `PATH`, `PATH after LINE` or `PATH before LINE`."""
    blocks = re.findall(r"^```(?:python|yaml) ([^\n]+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [(where.strip(), text) for where, text in blocks]


def step(name: str) -> str:
    """The text of the one block whose file has this name."""
    (text,) = [text for where, text in steps() if Path(where.split()[0]).name == name]
    return text


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def follow(tree: Path, where: str, text: str) -> None:
    """A new file, or lines put after or before the one line that begins so."""
    name, *how = where.split(maxsplit=2)
    path = tree / name
    if not how:
        assert not path.exists()
        write(path, text)
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (at,) = [k for k, line in enumerate(lines) if line.startswith(how[1])]
    lines.insert(at + (how[0] == "after"), text)
    path.write_text("".join(lines), encoding="utf-8")


def test_a_rule_is_a_file(lab: Lab, tmp_path: Path) -> None:
    """Its std, from the first layer: half of kaiming's, to 5 standard errors of 4 x 40 x 40 uniform entries."""
    write(tmp_path / "mine/init/halved.yaml", step("halved.yaml"))
    code, _, errors = lab("-cd", "mine", "init=halved", "task=train", "train.steps=1", *SMALL)
    assert (code, errors) == (0, "")
    stats = read("outputs/**").query("tensor == 'weight' and direction == 'forward' and layer == 1 and step == 0")
    assert set(stats["init"]) == {"halved"} and set(stats["distribution"]) == {"uniform"}
    expected = 0.5**0.5 / np.sqrt(64)
    error = np.sqrt(0.8 / 4 / stats["count"]) * expected  # of a uniform variable's std: kurtosis 1.8
    assert (np.abs(stats["std"] - expected) < 5 * error).all()
    assert (np.abs(stats["std"] - 2 * expected) > 5 * error).all()


def test_an_activation_is_a_file(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "mine/activation/clipped.yaml", step("clipped.yaml"))
    code, _, errors = lab("-cd", "mine", "activation=clipped", "task=stack", *SMALL)
    assert (code, errors) == (0, "")
    stats = read("outputs/**").query("tensor == 'activation' and direction == 'forward' and layer > 0")
    assert set(stats["activation"]) == {"clipped"}
    assert stats["max"].max() == 1 and stats["min"].min() == -1


def test_a_statistic_is_a_function(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Gaussian input it is 3, to 5 standard errors of 2,000 entries; of what leaves a ReLU it is more."""
    write(tmp_path / "shape_statistics.py", step("shape_statistics.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, errors = lab("statistics.kurtosis=shape_statistics.kurtosis", "task=stack", *SMALL)
    assert (code, errors) == (0, "")
    stats = read("outputs/**").query("tensor == 'activation' and direction == 'forward'")
    entering, leaving = (stats[stats["layer"] == layer]["kurtosis"] for layer in (0, 1))
    assert (np.abs(entering - 3) < 5 * np.sqrt(24 / 2000)).all() and (leaving > 4).all()
    import shape_statistics  # type: ignore[import-not-found]

    net, x = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()), torch.randn(500, 6)
    rows = initlab.measure(net, x, statistics={"kurtosis": shape_statistics.kurtosis})
    mine = rows.query("tensor == 'activation' and layer == 1")["kurtosis"].item()
    assert mine == pytest.approx(float(shape_statistics.kurtosis(net(x).detach())), rel=1e-12)


def test_a_task_with_its_table_and_figure(tmp_path: Path) -> None:
    """In a copy of the tree, by the steps of the page and nothing else; then run, read and drawn."""
    tree = tmp_path / "tree"
    for name in ("initlab", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for where, text in steps():
        if where.startswith("initlab/"):
            follow(tree, where, text)
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "initlab", "task=norms", "depth=3", "width=30", "seeds=2", "hydra.run.dir=run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    ratio = float(re.search(r"norms: (\S+) of their expectation", done.stdout)[1])  # type: ignore[index]
    assert abs(ratio - 1) < 5 / np.sqrt(2 * 30 * 30 * 6)  # of the norm of n normal entries: 1 / sqrt(2 n)
    assert (tmp_path / "run/norms.parquet").is_file() and (tmp_path / "run/norms.png").stat().st_size > 5000
