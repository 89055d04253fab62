"""Lines and bars on one terminal, the width of tables, and what another program reads."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import initlab
from initlab import terminal
from initlab.runs import summary
from initlab.terminal import Bar, LineHandler, NotebookText, as_json, choose_lines, print_start
from tests.long import long_except

Lab = Callable[..., tuple[int, str, str]]
SMALL = ("task=stack", "depth=2", "width=6", "batch=5", "seeds=1", "plots=false", "theory=off")
RUN = ("depth=2", "width=6", "batch=5", "seeds=1", "plots=false", "train.steps=2", "train.width=4")


class Screen(io.StringIO):
    """A terminal of one size."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What a person sees: carriage returns go back, `ESC [A` up, `ESC [K` clears, later signs replace earlier."""
        rows, row, column = [""], 0, 0
        text = self.getvalue().replace("\x1b[A", "\0").replace("\x1b[K", "\1")
        for sign in text:
            if sign == "\0":
                row -= 1
            elif sign == "\1":
                rows[row] = rows[row][:column]
            elif sign == "\r":
                column = 0
            elif sign == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            else:
                rows[row] = rows[row].ljust(column)[:column] + sign + rows[row][column + 1 :]
                column += 1
        return [one.rstrip() for one in rows if one.strip()]


@pytest.fixture(autouse=True)
def all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(terminal.LINES, "")


def log_to(handler: logging.Handler) -> logging.Logger:
    log = logging.Logger("here", logging.INFO)
    log.addHandler(handler)
    return log


@pytest.mark.parametrize("columns", [80, 150])
def test_lines_stand_above_the_bars(columns: int) -> None:
    """Two bars, three lines: each line is whole, and the bars are below; with another handler they are not."""
    for handler in (LineHandler, logging.StreamHandler):
        screen = Screen()
        log = log_to(handler(screen))
        options = {"file": screen, "disable": None, "mininterval": 0, "dynamic_ncols": False, "ncols": columns}
        with Bar(total=3, desc="sweep", unit="job", **options) as outer:
            for k in range(3):
                with Bar(total=5, desc="stack", unit="layer", **options) as inner:
                    for _ in range(5):
                        inner.update()
                log.info("done: job %d", k)
                outer.update()
            shown = screen.lines()
        whole = [line for line in shown if line.startswith("done: job")] == [f"done: job {k}" for k in range(3)]
        assert whole == (handler is LineHandler)
        if handler is LineHandler:
            assert shown[-1].startswith("sweep: 100%") and len(shown) == 4
            assert all(len(line) <= columns for line in shown)
            assert screen.lines() == [f"done: job {k}" for k in range(3)]  # the bars are gone


def test_a_bar_may_tell_the_time_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn again without an update, and never after its end."""
    monkeypatch.setattr(terminal, "SECOND", 0.001)
    for ticks in (True, False):
        screen = Screen()
        with Bar(total=2, desc="theory", file=screen, disable=None, ticks=ticks) as bar:
            before = len(screen.getvalue())
            for _ in range(2000 * ticks):
                if len(screen.getvalue()) > before:
                    break
                time.sleep(0.01)
            assert (len(screen.getvalue()) > before) is ticks
        assert screen.lines() == [] and bar.disable


def test_a_process_of_a_sweep_has_no_bar_and_clears_that_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    screen = Screen()
    screen.write("\rsweep:  50%|####    |")  # by another process
    with Bar(total=2, file=screen, disable=None) as bar:
        log_to(LineHandler(screen)).info("done: here")
        assert bar.disable
    assert screen.lines() == ["done: here"]
    text = io.StringIO()
    log_to(LineHandler(text)).info("done: here")
    assert text.getvalue() == "done: here\n"  # a file gets the line alone


def test_no_estimate_of_no_time() -> None:
    at_start, near_end, halfway = (
        Bar.format_meter(n=n, total=1000, elapsed=seconds, ncols=80) for n, seconds in ((0, 0), (999, 10), (100, 10))
    )
    assert "<" not in at_start and "<" not in near_end and "00:10<01:30" in halfway


def test_what_is_run_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    print_start(["init=naive", "depth=3"])
    print_start([])
    assert screen.lines() == ["initlab: init=naive depth=3", "initlab: all defaults"]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    print_start(["init=naive"])
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def summary_table(rows: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "init": [f"rule_{k}" for k in range(rows)], "activation": "relu", "mean": 0.25, "std": 0.5, "std16": 0.1,
            "std84": 0.9, "signal": "alive", "loss by hand": 0.125, "loss nn.Module": 0.125, "diverged": "0 of 8",
            "gradient difference": 1e-7, "limit": 1e-5, "not comparable": 0.0,
        }
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 150])
def test_the_table_fits_and_loses_nothing(width: int) -> None:
    table = summary_table()
    plain, fitted = summary.as_text(table), summary.as_text(table, width)
    assert max(map(len, fitted.splitlines())) <= width
    for name in ("mean", "16-84 % of networks", "loss nn.Module", "gradient difference"):
        assert fitted.count(name) == 1
    blocks = fitted.split("\n\n")
    assert all("rule_2" in block and "activation" in block for block in blocks)
    assert (fitted == plain) == (len(blocks) == 1) == (width >= len(plain.splitlines()[0]))


def test_a_terminal_has_a_width_and_a_file_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setattr(sys, "stdout", Screen())
    assert terminal.find_width() == 77
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert terminal.find_width() is None


@pytest.mark.long
def test_many_jobs_have_no_lines_of_their_own(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for few, said in ((3, True), (2, False)):
        monkeypatch.setattr(terminal, "FEW_JOBS", few)
        code, out, errors = lab("-m", *SMALL, "init=naive,small,lecun", f"hydra.sweep.dir=sweep{few}")
        assert (code, errors) == (0, "")
        assert ("done: " in out) is said and ("init=lecun\n" in out) is said
        assert out.count("alive") == 3 and f"tables: sweep{few}/*/*.parquet" in out
    screen = Screen()
    choose_lines(aside=False, jobs=500)
    log = log_to(LineHandler(screen))
    log.info("done: here")
    log.warning("done: but wrong")
    log.info("verdicts: two")
    assert screen.lines() == ["done: but wrong", "verdicts: two"]


@pytest.mark.long
def test_values_of_a_sweep_may_be_a_glob(lab: Lab) -> None:
    code, out, errors = lab("-m", *SMALL, "data=glob(*)", "hydra.sweep.dir=sweep")
    assert (code, errors) == (0, "") and all(f"data={name}" in out for name in ("digits", "mnist", "teacher"))


def test_a_misspelt_study_is_told_which_there_are(lab: Lab, tmp_path: Path) -> None:
    code, _, errors = lab("-cn", "rulez")
    assert code == 2 and errors.count("\n") == 1
    assert "must be one of activations, chapter, " in errors and "did you mean rules?" in errors
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/hope.yaml").write_text("defaults: [config, _self_]\n", encoding="utf-8")
    code, _, errors = lab("-cd", "mine", "-cn", "hop")
    assert code == 2 and "did you mean hope?" in errors
    assert lab("-cd", "mine", "-cn", "hope", *SMALL)[0] == 0 and lab("-cn", "config", *SMALL)[0] == 0


def test_a_study_is_found_from_any_folder(lab: Lab, tmp_path: Path) -> None:
    code, out, _ = lab("-cn", "rules", *RUN, "init=kaiming")
    assert "Which of the chapter's scalings" in out and list((tmp_path / "outputs/rules").iterdir())
    assert code in (2, 4)  # so small a run answers nothing


# JSON


def test_a_run_is_json_and_nothing_else(lab: Lab) -> None:
    code, out, _ = lab(*RUN, "init=small", "depth=60", "--json")
    found = json.loads(out)
    assert code == 0 and found["folder"].startswith("outputs/config/")
    assert found["findings"][0]["rule"] == "vanishing"
    assert found["table"][0]["init"] == "small" and found["table"][0]["loss by hand"] > 0
    assert (
        json.loads((Path(found["folder"]) / "verdict.json").read_text(encoding="utf-8"))["findings"]
        == found["findings"]
    )
    code, out, _ = lab(*RUN, "json=true", "objective.statistic=std", "objective.reduce=max")
    assert code == 0 and json.loads(out)["objective"] > 0 and json.loads(out)["findings"] == []


@pytest.mark.parametrize("launcher", long_except(["basic", "batched"], "batched"))
def test_a_sweep_is_json_and_nothing_else(lab: Lab, launcher: str) -> None:
    words = ("-m", "init=naive,small", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep", "--json")
    code, out, errors = lab(*words, *RUN)
    found = json.loads(out)
    assert code == 0 and list(found["runs"].values()) == ["done", "done"] and "#1 : " in errors
    assert [row["init"] for row in found["table"]] == ["naive", "small"]


@pytest.mark.long
def test_other_tasks_are_json_too(lab: Lab) -> None:
    code, out, _ = lab("task=gains", "plots=false", "--json")
    found = json.loads(out)
    assert code == 0 and {"activation", "kind", "gain"} <= set(found["table"][0]) and found["findings"] == []


def test_what_is_not_finite_is_a_text() -> None:
    found = as_json({"a": float("nan"), "b": [float("-inf"), 1.5], "c": {"d": None}})
    assert json.loads(found) == {"a": "nan", "b": ["-inf", 1.5], "c": {"d": None}}


# Other programs


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(initlab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHON": f"{sys.executable} -m initlab"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )


def test_a_pipe_that_is_closed_is_no_fault(tmp_path: Path) -> None:
    """`head` ends long before 500 helps fit into a pipe's 64 kB."""
    done = shell("$PYTHON --help | head -1", tmp_path)
    assert done.stdout.startswith("initlab ") and done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")
    slow = shell("$PYTHON --help | (exec <&-; true)", tmp_path)
    assert (slow.returncode, slow.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
@pytest.mark.parametrize("columns", [80, 150])
def test_a_real_terminal(tmp_path: Path, columns: int) -> None:
    """A sweep in tmux, looked at five times a second: no line of a job and no bar on one row."""
    name, end = f"initlab-{os.getpid()}-{columns}", tmp_path / "end"
    path = Path(initlab.__file__).parents[1]
    command = (
        f"PYTHONPATH={path} {sys.executable} -m initlab -m init=naive,kaiming depth=20 seeds=2; touch {end}; sleep 5"
    )
    subprocess.run(
        ["tmux", "new-session", "-d", "-s", name, "-x", str(columns), "-y", "40", "-c", str(tmp_path), command],
        check=True,
    )
    looks = []
    while not end.exists():
        time.sleep(0.2)
        looks.append(
            subprocess.run(
                ["tmux", "capture-pane", "-p", "-t", name], capture_output=True, text=True, check=True
            ).stdout
        )
    rows = {row for look in looks for row in look.splitlines()}
    assert any(row.startswith("initlab: -m init=naive,kaiming") for row in rows)
    bars = [row for row in rows if "%|" in row]
    assert {row.split(":")[0] for row in bars} >= {"sweep", "train", "figures"}
    assert all(row.startswith(("sweep:", "stack:", "train:", "theory:", "figures:", "options:")) for row in bars)
    assert not any("<00:00" in row or "<?" in row for row in bars)
    last = looks[-1].splitlines()
    assert sum(row.startswith("done: outputs/") for row in last) == 2 and not any("%|" in row for row in last)


NOTEBOOK = """
import sys, types
class Widget:
    def __init__(self, *given, **values):
        vars(self).update(values, layout=types.SimpleNamespace(), style=types.SimpleNamespace())
        self.children, self.bar_style = values.get("children", ()), ""
    def close(self):
        pass
shown = []
widgets = types.ModuleType("ipywidgets")
widgets.HBox = widgets.HTML = widgets.FloatProgress = Widget
shell = types.ModuleType("IPython")
shell.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
display = types.ModuleType("IPython.display")
display.display = shown.append
sys.modules |= {"IPython": shell, "IPython.display": display, "ipykernel.zmqshell": types.ModuleType("zmqshell")}
if len(sys.argv) > 1:
    sys.modules["ipywidgets"] = widgets
from initlab.terminal import IN_NOTEBOOK, Bar
with Bar(total=4, desc="stack", disable=None) as bar:
    bar.update(3)
    bar.refresh()
    if shown:
        print([child.value for child in shown[0].children][1])
print(IN_NOTEBOOK, len(shown))
"""


@pytest.mark.parametrize(("words", "said"), [(["widgets"], "3\nTrue 1\n"), ([], "False 0\n")])
def test_a_bar_in_a_notebook_is_a_widget_where_there_are_any(words: list[str], said: str) -> None:
    """A kernel's standard error is no terminal, and still there is someone who looks."""
    script = NOTEBOOK.replace("if len(sys.argv) > 1:", "sys.modules['ipywidgets'] = None\nif len(sys.argv) > 1:")
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, *words], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (said, "")


def test_what_a_notebook_shows_is_what_print_gives() -> None:
    class Said(NotebookText):
        def __str__(self) -> str:
            return "<b> & 1"

    assert Said()._repr_html_() == "<pre>&lt;b&gt; &amp; 1</pre>"
