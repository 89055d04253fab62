"""The rules of the house, read from the sources."""

import ast
from pathlib import Path

import pytest
import yaml

import initlab
from initlab.job.options import option_names
from initlab.job.settings import CONF, Config
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES
from initlab.runs.schema import LABELS, OPTION_OF, TABLES
from initlab.tasks.data import SOURCES

PACKAGE = Path(initlab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# The rooms, lowest first: a file imports from its own room and from those before it.
ROOMS = [
    "errors",
    "stats",
    "nn",
    "meanfield",
    "theory",
    "scratch",
    "probes",
    "engine",
    "tasks",
    "runs",
    "figures",
    "studies",
    "job",
]
ROOMS += ["sweep", "commands", "__main__"]
ROOF = {"", "commands", "__main__", "job", "sweep", "studies"}
UPWARD = {  # (file, room above it): still to be turned round
}
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
    name = str(path.relative_to(PACKAGE))
    inside = {one.split(".")[1] for one in imported(path) if one.startswith("initlab.")} & set(ROOMS)
    if name == "__init__.py":
        return
    above = {one for one in inside if ROOMS.index(one) > ROOMS.index(room(path))}
    assert above == {one for file, one in UPWARD if file == name}


@pytest.mark.parametrize("path", FILES, **ids)
def test_the_package_knows_nothing_of_its_benchmarks(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] == "benchmarks"}


@pytest.mark.parametrize("path", FILES, **ids)
def test_heavy_packages_stay_in_their_place(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"hydra", "omegaconf"} or room(path) in ROOF
    assert not packages & {"seaborn", "matplotlib"} or path.parent.name == "figures"


# Names that begin with an underscore, of packages that may change them: here with their reasons, and nowhere else.
PRIVATE = {"sweep/hydra_private.py", "probes/torch_private.py"}


@pytest.mark.parametrize("path", FILES, **ids)
def test_private_names_of_other_packages_are_imported_in_one_place(path: Path) -> None:
    private = {
        name
        for name in imported(path)
        if name.split(".")[0] in ("hydra", "omegaconf", "torch") and any(p.startswith("_") for p in name.split("."))
    }
    assert not private or str(path.relative_to(PACKAGE)) in PRIVATE


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
    assert set(files) >= set(table)  # a rule needs a file only
    for name, text in files.items():
        assert text.startswith("#"), f"{name}.yaml says nothing about itself"
        values = yaml.safe_load(text)
        assert (values.get("name") or values[group]["name"]) in {name, *(table if name not in table else ())}


def test_every_knob_has_a_comment() -> None:
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    knobs = text[text.index("task:") : text.index("\nhydra:")].splitlines()
    bare = [line for line in knobs if ":" in line and not line.startswith("#") and "#" not in line]
    assert bare == ["train:", "sweep:", "graph:", "phase:", "study:"]


def test_columns_are_options_and_summaries_know_them() -> None:
    assert set(OPTION_OF.values()) <= set(option_names(Config))
    assert set(LABELS) <= set(OPTION_OF) | {"gain", "device"}


def table_literals(tree: ast.AST) -> list[int]:
    """Lines that list names of tables, or look one up by its literal name."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            names = [one.value for one in node.elts if isinstance(one, ast.Constant)]
            if sum(name in TABLES for name in names) > 1:
                lines.append(node.lineno)
        looked_up = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "tables"
        if looked_up and isinstance(node.slice, ast.Constant) and node.slice.value in TABLES:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in ("runs", "figures", "studies", "sweep")], **ids
)
def test_tables_are_named_in_the_schema_alone(path: Path) -> None:
    if path.name != "schema.py":
        assert table_literals(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_a_table_named_elsewhere_is_seen() -> None:
    assert table_literals(ast.parse("x = ('stats', 'theory')\ny = tables['losses']\nz = table['theory']")) == [1, 2]
