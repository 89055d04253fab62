"""Commands on run folders, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import initlab
from initlab import commands
from initlab.__main__ import main

Lab = Callable[..., tuple[int, str, str]]
QUICK = ("task=stack", "depth=6", "seeds=3", "plots=false", "report=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders: `a` and `b` of one command, `c` of another gain."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, gain in (("a", ()), ("b", ()), ("c", ("init.gain=3.0",))):
            patch.setattr(sys, "argv", ["initlab", *QUICK, *gain, f"hydra.run.dir={name}"])
            assert main() == 0
    return folder


@pytest.fixture
def swept(lab: Lab, runs: Path, tmp_path: Path) -> Lab:
    """The command line in a folder that holds a copy of them."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return lab


def test_two_runs_of_one_command_are_identical_and_another_gain_is_not(swept: Lab) -> None:
    code, out, err = swept("compare", "a", "b")
    assert (code, err) == (0, "") and out.endswith("identical: every number is the same, to the last bit\n")
    code, out, err = swept("compare", "a", "c")
    assert (code, err) == (3, "") and "gain: 1.41421 | 3" in out and "first layer beyond 4: 1," in out


def test_a_sweep_becomes_one_file_and_a_few_lines(swept: Lab) -> None:
    code, out, err = swept("collect", ".")
    assert (code, err) == (0, "")
    assert out.startswith("3 runs: 3 done\n") and "gain (1.41421, 3)" in out and "signal" in out
    code, out, err = swept("collect", "a", "c", "--to", "all.parquet", "--table", "theory")
    assert (code, err) == (0, "") and "from 2 runs" in out
    frame = pd.read_parquet("all.parquet")
    assert set(frame["run"]) == {"a", "c"} and "predicted" in frame
    assert swept("collect", ".", "--to", "stats.csv")[0] == 0 and Path("stats.csv").is_file()


def test_runs_that_keep_no_stats_are_compared_by_what_they_keep(lab: Lab) -> None:
    """Two planes, two formats; and what has no number to compare is not called identical."""
    small = ("depth=3", "width=8", "seeds=2", "plots=false", "report=false")
    plane = (*small, "task=phase", "phase.sw.points=2", "phase.sb.points=2", "activation=tanh")
    for name, words in (
        ("a", plane),
        ("b", plane),
        ("c", (*plane, "seed=2", "init.distribution=orthogonal", "width=64", "seeds=8")),
        ("f", (*small, "task=formats", "init=naive")),
        ("g", (*small, "task=formats", "init=small")),
        ("x", (*small, "task=explain")),
    ):
        assert lab(*words, f"hydra.run.dir={name}")[0] == 0
    code, out, _ = lab("compare", "a", "b")
    assert code == 0 and "phase: 8 rows of the same networks: all the same" in out and "identical" in out
    code, out, _ = lab("compare", "a", "c")
    assert code == 3 and "identical" not in out and "only in A: 8 rows" not in out
    code, out, _ = lab("compare", "f", "g")
    assert code == 3 and "ends: " in out and "first layer beyond" not in out
    assert lab("compare", "f", "f")[0] == 0
    code, out, err = lab("compare", "x", "x")
    assert code == 2 and out == "" and err.startswith("initlab: x, x: no run has a table that can be compared")


def test_comparing_names_runs_that_are_not_done(swept: Lab) -> None:
    run = json.loads(Path("b/run.json").read_text())
    Path("b/run.json").write_text(json.dumps(run | {"status": "interrupted"}))
    code, _, err = swept("compare", "a", "b")
    assert code == 0 and err.startswith("initlab: b: this run is interrupted, not done") and err.count("\n") == 1


def test_runs_of_many_sweeps_that_bear_one_name_are_told_apart(swept: Lab) -> None:
    """Two sweeps of the same networks: every job 0 is called 0."""
    for sweep in ("first", "second"):
        Path(sweep).mkdir()
        shutil.copytree("a", Path(sweep, "0"))
    code, out, err = swept("collect", "first", "second")
    assert (code, err) == (0, "") and "first/0" in out and "second/0" in out
    code, out, err = swept("collect", "first", "second", "c")
    assert (code, err) == (0, "") and "first/0" in out and "second/0" in out


def test_runs_that_are_not_done_are_named_on_the_side(swept: Lab) -> None:
    Path("c/run.json").unlink()
    code, out, err = swept("collect", ".", "--to", "all.csv")
    assert (
        code == 0
        and "from 3 runs" in out
        and err == ("initlab: c: this run is without a run.json, not done; reading the 75 rows it has\n")
    )
    assert "2 done, 1 without a run.json\n  without a run.json: c\n" in swept("collect", ".")[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("colect", "a"), "did you mean collect?"),
        (("init", "kaiming"), "init: is neither key=value nor a command"),
        (("collect",), "collect: the following arguments are required: PATH"),
        (("collect", "photos"), "photos: holds no run of initlab"),
        (("collect", "none/**"), "none/**: no such folder"),
        (("collect", "a", "--table", "stat"), "did you mean stats?"),
        (("collect", "a", "--table", "losses"), "no run with a table `losses`"),
        (("collect", "a", "--to", "x.xls"), "the name must end in .csv, .feather, .parquet"),
        (("collect", "a", "--too", "x.csv"), "collect: unrecognized arguments: --too x.csv"),
        (("compare", "a"), "compare: the following arguments are required: B"),
        (("compare", "a", "photos"), "photos: holds no run of initlab"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(swept: Lab, words: tuple[str, ...], says: str) -> None:
    Path("photos").mkdir()
    code, out, err = swept(*words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1 and err.startswith("initlab: ")


def test_help_is_there_for_the_program_and_for_each_command(lab: Lab) -> None:
    code, out, _ = lab("--help")
    assert code == 0
    for name, command in commands.COMMANDS.items():
        assert f"python -m initlab {name} ..." in out and command.about in out
        code, own, _ = lab(name, "--help")
        assert code == 0 and own.startswith(f"usage: initlab {name}") and command.about.split()[-1] in own


def test_commands_need_neither_torch_nor_hydra(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    program = "\n".join(
        [
            "import sys",
            "from initlab.__main__ import main",
            "for words in ('collect a', 'collect a --to a.csv', 'compare a a'):",
            "    sys.argv[1:] = words.split()",
            "    assert main() == 0",
            "print(sorted({'torch', 'hydra', 'omegaconf', 'seaborn', 'matplotlib'} & set(sys.modules)))",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(initlab.__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == "[]", said.stderr
