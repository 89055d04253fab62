"""The rules of the house, read from the sources."""

import ast
from pathlib import Path

import pytest
import yaml

import initlab
from initlab.config import COLUMNS, CONF, Config, option_names
from initlab.output.summary import TELLING
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.init import RULES
from initlab.tasks.data import SOURCES

PACKAGE = Path(initlab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Room -> rooms that it may import besides itself.
MAY = {
    "errors": set(),
    "signal": {"errors"},
    "scratch": {"errors", "signal"},
    "tasks": {"errors", "signal", "scratch"},
    "output": {"errors", "signal", ""},
}
ROOF = {"", "config", "composing", "grid", "together", "stages", "jobs", "batch", "batched", "study", "gallery"}
ROOF |= {"schema", "launcher", "commands", "plugins", "resume", "sweeper", "workers", "__main__"}
ids = {"ids": lambda path: str(path.relative_to(PACKAGE))}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@pytest.mark.parametrize("path", FILES, **ids)
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    if here in ROOF:
        return
    inside = {name.split(".")[1] if "." in name else "" for name in imported(path) if name.split(".")[0] == "initlab"}
    assert inside <= MAY[here] | {here}


@pytest.mark.parametrize("path", FILES, **ids)
def test_the_package_knows_nothing_of_its_benchmarks(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] == "benchmarks"}


@pytest.mark.parametrize("path", FILES, **ids)
def test_heavy_packages_stay_in_their_place(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"hydra", "omegaconf"} or room(path) in ROOF
    assert not packages & {"seaborn", "matplotlib"} or path.parent.name == "output"


@pytest.mark.parametrize("path", FILES, **ids)
def test_functions_are_short_and_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py":
        assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize(("group", "table"), [("init", RULES), ("activation", ACTIVATIONS), ("data", SOURCES)])
def test_every_row_of_a_table_has_its_file(group: str, table: dict[str, object]) -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (CONF / group).glob("*.yaml")}
    assert set(files) == set(table)
    for name, text in files.items():
        assert text.startswith("#"), f"{name}.yaml says nothing about itself"
        values = yaml.safe_load(text)
        assert (values.get("name") or values[group]["name"]) == name


def test_every_knob_has_a_comment() -> None:
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    knobs = text[text.index("task:") : text.index("\nhydra:")].splitlines()
    bare = [line for line in knobs if ":" in line and not line.startswith("#") and "#" not in line]
    assert bare == ["train:", "sweep:", "graph:", "phase:", "study:"]


def test_columns_are_options_and_summaries_know_them() -> None:
    assert set(COLUMNS.values()) <= set(option_names(Config))
    assert set(TELLING) <= set(COLUMNS) | {"gain", "device"}
