"""The rules of the house, read from the sources: who may import whom, what names look like, what stands once."""

import ast
import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import initlab
from initlab.job.options import option_names
from initlab.job.settings import CONF, Config
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES
from initlab.runs.schema import LABELS, OPTION_OF, TABLES
from initlab.stats.dtypes import FORMATS
from initlab.stats.keys import KEY_COLUMNS
from initlab.stats.statistics import STATISTICS
from initlab.tasks.data import SOURCES

PACKAGE = Path(initlab.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# Every file in order, rooms lowest first: a file imports only from files before it.
HOUSE = {
    "errors": "",
    "files": "",
    "stops": "",
    "terminal": "",
    "stats": (
        "dtypes kernels.cpu kernels.triton_programs kernels.triton_merge keys row_order quadrature statistics "
        "workspace histogram format_shares reference kernels.triton_rows summarize backend gathering buffer "
        "kernels.cpu_backend kernels.gpu_backend measure"
    ),
    "nn": (
        "saturation activations breaks custom_activation loss_table custom_loss network triton_philox philox init "
        "custom_init lsuv mup unbounded"
    ),
    "meanfield": "maps correlation_points fixed_points gain_table trajectories",
    "theory": (
        "batch_law exact profile quantiles sample unit_moments bands forward_law lsuv_law request simulate "
        "singular_values tensor_law backward_law infinite_width stack_laws format_limits method predict z_scores"
    ),
    "scratch": (
        "agreement graph_text autograd_graph broadcasting matmul rungs layers mended_layers checks classes "
        "layer_function modules backward"
    ),
    "probes": (
        "torch_private hook_types probe_buffer computed_weights probed_modules layer_numbers gradient_hooks operations "
        "used_weights losses one_thread tensor_rows call_trace function_rows hooks parameters updates steps probe "
        "snapshot"
    ),
    "models": (
        "fans dataflow traced_flow symbolic_flow families laws named_rules layer_gains weight_writer draw_weights "
        "data_fit init_report model_filler initialize"
    ),
    "verdict": (
        "rules finding trends evidence stacked_networks reference_networks parameter_rules input_rules "
        "module_rules format_rules weight_rules audit depth_rules signal_rules training_rules table_rules diagnose"
    ),
    "engine": "mlp layer_memory named_tensors module_recorder fast_network recorders",
    "tasks": (
        "course.rotated_timing data ensemble.device ensemble.memory course.timing course.engine_versions "
        "course.ladders ensemble.networks ensemble.training ensemble.batches course.broadcast course.explain "
        "course.graph ensemble.plan "
        "ensemble.unbounded_twin coordinate_check gains jacobian phase_points phase seeded stack curves formats "
        "model_checks twins train"
    ),
    "runs": (
        "distance lock folders parquet schema labels read parts recorder select theory_rows summary collect compare"
    ),
    "figures": (
        "axes lines model_rows figure_spec broadcast_figure format_figure gain_figure graph_figure histogram_figure "
        "jacobian_figure model_figure phase_figure share_figure training_figures plots pictures study_figure "
        "table_figures plot"
    ),
    "studies": "reductions expectation expect study gallery",
    "report": "page_words page_numbers page_tables page_sections page_findings page page_files",
    "job": "printout settings network_grid options shared_program stages prepare worker_process life_cycle",
    "sweep": "batch callback hydra_private batched_launcher resume workers sweeper",
    "commands": "",
    "__main__": "",
}
ORDER = [f"{room}.{name}" if name else room for room, names in HOUSE.items() for name in names.split() or [""]]
HYDRA = ("job", "sweep", "commands", "__main__")
PRIVATE_IMPORTS = {"sweep.hydra_private", "probes.torch_private"}  # names with an underscore, each with its reason


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module(path): path for path in FILES}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported(path: Path) -> set[str]:
    """initlab's own modules that a file imports."""
    found = set()
    for name in imported(tree_of(path)):
        own = name.removeprefix("initlab.")
        if name.startswith("initlab."):
            found |= {one for one in (own, own.rpartition(".")[0]) if one in MODULES}
    return found


def test_every_file_has_its_place() -> None:
    assert sorted(ORDER) == sorted(MODULES)
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_one_way() -> None:
    """Between rooms and inside a room; a circle, or an arrow up, has no order that passes."""
    places = {name: place for place, name in enumerate(ORDER)}
    arrows = [(name, one) for name, path in MODULES.items() for one in modules_imported(path)]
    assert [(name, one) for name, one in arrows if places[one] >= places[name]] == []


def test_the_order_sees_an_arrow_up() -> None:
    up = ast.parse("def f():\n    from initlab.sweep import sweeper")
    assert imported(up) == {"initlab.sweep.sweeper"} and ORDER.index("sweep.sweeper") > ORDER.index("stats.keys")


def test_packages_stay_in_their_rooms() -> None:
    for name, path in MODULES.items():
        names = imported(tree_of(path))
        packages, room = {one.split(".")[0] for one in names}, name.split(".")[0]
        assert not packages & {"hydra", "omegaconf"} or room in HYDRA, name
        assert not packages & {"seaborn", "matplotlib"} or room == "figures", name
        assert "benchmarks" not in packages and "tests" not in packages, name
        private = [n for n in names if n.split(".")[0] in ("hydra", "omegaconf", "torch", "pyarrow") and "._" in n]
        assert private == [] or name in PRIVATE_IMPORTS, (name, private)


def test_one_name_one_module_one_class() -> None:
    """In a traceback or an editor's tab a name says which file it is."""
    names = Counter(path.stem for path in FILES)
    assert [name for name, count in names.items() if count > 1] == []
    classes = Counter(
        node.name
        for tree in map(tree_of, FILES)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_rooms_and_files_have_a_size_that_one_can_hold_in_mind() -> None:
    folders = Counter(path.parent for path in FILES)
    assert {str(folder): count for folder, count in folders.items() if count > 20} == {}
    sources = [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: count for name, count in lines.items() if count > 350} == {}
    assert len([name for name, count in lines.items() if count < 60]) <= len(lines) / 8
    shares = Counter[str]()
    for name, count in lines.items():
        shares[name.split("/")[0]] += count
    room, most = shares.most_common(1)[0]
    assert most <= 0.18 * shares.total(), f"{room} has {most} of {shares.total()} lines"


@cache
def functions() -> list[tuple[Path, ast.FunctionDef]]:
    return [
        (path, node)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")
    ]


def test_functions_are_short() -> None:
    long = [f"{module(path)}.{node.name}" for path, node in functions() if node.end_lineno - node.lineno >= 60]  # type: ignore[operator]
    assert long == []


def test_few_functions_are_used_once() -> None:
    """A private function that is used once costs a jump and saves no line: at most 15 % of all are such.

    Counted are names that occur twice in their file, the definition and one use; by name over all files at most 10 %.
    """
    private = [(path, node.name) for path, node in functions() if node.name.startswith("_")]
    words = {path: Counter(re.findall(r"\w+", path.read_text(encoding="utf-8"))) for path in FILES}
    everywhere = sum(words.values(), Counter())
    once = [name for path, name in private if words[path][name] <= 2]
    assert len(once) <= 0.15 * len(functions()), f"{len(once)} of {len(functions())}"
    assert len([name for _, name in private if everywhere[name] <= 2]) <= 0.10 * len(functions())


GLOSSARY = {
    title: set(words.split())
    for title, words in re.findall(
        r"^(\w+)\n((?:    .*\n)+)", Path(__file__).with_name("glossary.txt").read_text(encoding="utf-8"), re.M
    )
}
VERBS, ENDS, PHRASES = GLOSSARY["verbs"], GLOSSARY["nouns"] | GLOSSARY["adjectives"], GLOSSARY["phrases"]
# Bare participles and prepositions that stood for functions once.
BARE = {"said", "told", "seen", "kept", "given", "made", "taken", "drawn", "held", "left", "lost", "beside", "together"}
BARE |= {"apart", "own", "around", "above", "below", "within", "alone", "across", "before", "after", "between", "whose"}


def test_functions_are_verbs_or_nouns_of_the_glossary() -> None:
    """The first word is a verb, or the last one a noun; no bare participle, no bare preposition."""
    odd, bare = set(), set()
    for _, node in functions():
        words = [word for word in node.name.split("_") if word]
        if words[0] not in VERBS and words[-1] not in ENDS and node.name.strip("_") not in PHRASES:
            odd.add(node.name)
        if len(words) == 1 and (words[0] in BARE or re.fullmatch(r"\w{2,}[^e]ed", words[0])):
            bare.add(node.name)
    assert sorted(odd) == []
    assert len(bare) <= 5, bare


def test_the_glossary_refuses_riddles() -> None:
    """Whoever adds a word to the glossary reads this."""
    assert not BARE & (VERBS | ENDS)
    for riddle in ("_said", "told", "kept", "beside", "_apart", "shown_beside", "seen_alone"):
        words = [word for word in riddle.split("_") if word]
        assert words[0] not in VERBS and words[-1] not in ENDS


def literal_collections(tree: ast.AST) -> list[set[str]]:
    """The strings of every tuple, list, set and dictionary (its keys) that is written out."""
    found = []
    for node in ast.walk(tree):
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        texts = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        if texts:
            found.append(texts)
    return found


# Lists of the same words that mean something else.
OTHER_LISTS = {
    "stats.keys": {"tasks.course.explain"},  # columns of the table `steps`, which is about a pass and not a tensor
    "stats.statistics": {"stats.reference", "theory.sample", "tasks.phase"},  # sums; predictions; columns
    "runs.schema": {"figures.plots", "job.stages"},  # names of figures and of tasks
}


@pytest.mark.parametrize(
    ("names", "home"),
    [
        (KEY_COLUMNS, "stats.keys"),
        (STATISTICS, "stats.statistics"),
        (FORMATS, "stats.dtypes"),
        (TABLES, "runs.schema"),
    ],
    ids=["key columns", "statistics", "number formats", "tables"],
)
def test_lists_of_names_stand_once(names: object, home: str) -> None:
    """Five or more of these names together are such a list: it belongs in one module, the others use its constants."""
    known = set(names)  # type: ignore[call-overload]
    found = {module(path) for path in FILES for one in literal_collections(tree_of(path)) if len(one & known) >= 5}
    assert found <= {home} | OTHER_LISTS.get(home, set())


def test_docstrings_say_what_a_module_is_for() -> None:
    for name, path in MODULES.items():
        text = ast.get_docstring(tree_of(path))
        assert text and len(re.split(r"\.\s", text + " ")[0].split()) >= 5, name
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"[Kk]nows? (nothing|neither|no )", source), name


def test_public_doors_name_every_parameter() -> None:
    """With an example that runs as a doctest."""
    doors = [name for name in dir(initlab) if inspect.isfunction(getattr(initlab, name))]
    doors = [name for name in doors if name[0] != "_" and name != "import_module"]
    assert len(doors) == 17
    for name in doors:
        door = getattr(initlab, name)
        text = door.__doc__ or ""
        code = inspect.unwrap(door).__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        missing = [one for one in parameters if not re.search(rf"\b{one}\b", text)]
        assert missing == [], f"{name}: {missing}"
        assert ">>>" in text, f"{name} has no example"


@pytest.mark.parametrize(("group", "table"), [("init", RULES), ("activation", ACTIVATIONS), ("data", SOURCES)])
def test_every_row_of_a_table_has_its_file(group: str, table: dict[str, object]) -> None:
    """A file may be there without a row: fields of a rule need no more."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in (CONF / group).glob("*.yaml")}
    assert set(files) >= set(table)
    for name, text in files.items():
        assert text.startswith("#"), f"{name}.yaml says nothing about itself"
        values = yaml.safe_load(text)
        assert (values.get("name") or values[group]["name"]) in {name, *(table if name not in table else ())}


def test_every_option_has_a_comment() -> None:
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    options = text[text.index("task:") : text.index("\nhydra:")].splitlines()
    bare = [line for line in options if ":" in line and not line.startswith("#") and "#" not in line]
    assert bare == ["train:", "sweep:", "phase:", "study:"]


def test_columns_are_options_and_summaries_know_them() -> None:
    assert set(OPTION_OF.values()) <= set(option_names(Config))
    assert set(LABELS) <= set(OPTION_OF) | {"gain", "device", "widths"}


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


def test_tables_are_named_in_the_schema_alone() -> None:
    places = {
        name: table_literals(tree_of(path))
        for name, path in MODULES.items()
        if name.split(".")[0] in ("runs", "figures", "studies", "sweep") and name != "runs.schema"
    }
    assert {name: lines for name, lines in places.items() if lines} == {}


def test_a_table_named_elsewhere_is_seen() -> None:
    assert table_literals(ast.parse("x = ('stats', 'theory')\ny = tables['losses']\nz = table['theory']")) == [1, 2]
