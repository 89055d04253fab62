"""Every study composes, says what it is, is drawn and judged at toy size; conf/ and experiments/ are kept apart."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import initlab
from initlab.errors import UsageError
from initlab.job import prepare, printout
from initlab.job.life_cycle import study_of
from initlab.job.options import option_names, read_config
from initlab.job.settings import CONF
from initlab.runs.read import find_runs
from initlab.runs.schema import NOT_OPTIONS, OPTION_OF, TABLES, own_columns
from initlab.runs.select import NothingFound
from initlab.studies import study
from initlab.studies.expect import judge
from initlab.studies.expectation import AMONG, parse_expectation
from initlab.sweep.resume import expand
from tests.long import long_except

ROOT = Path(initlab.__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
STUDIES = sorted(EXPERIMENTS.glob("*.yaml"))
pytestmark = pytest.mark.skipif(not STUDIES, reason="the studies stand in the repository")
Lab = Callable[..., tuple[int, str, str]]
named = pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)

# Sizes at which a job takes a moment; where a study sweeps over one, each job gets a size of its own.
TOY = {"depth": 3, "width": 8, "batch": 6, "seeds": 2, "train.depth": 2, "train.width": 6, "train.batch": 5}
TOY |= {"train.steps": 2, "every": 1}
# Columns whose values do not hang on the size.
WORDS = ("implementation", "tensor", "direction")


@pytest.fixture
def composed() -> Iterator[Callable[..., Any]]:
    """Hydra's composition of a study with some options, from its two folders."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(EXPERIMENTS), version_base="1.3"):

        def one(path: Path, *words: str) -> Any:
            given = [f"hydra.searchpath=[file://{CONF}]", *words]
            return compose(path.stem, overrides=given, return_hydra_config=True)

        yield one


def first_jobs(config: Any, most: int = 2) -> list[list[str]]:
    """The first values of everything that is swept, at toy size."""
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in config.hydra.sweeper.params.items()])
    found = []
    for job in range(most):
        words = []
        for override in parsed:
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
            key, value = override.key_or_group, values[min(job, len(values) - 1)]
            words.append(f"{key}={TOY[key] + job}" if key in TOY else f"{key}={value}")
        swept = {word.split("=")[0] for word in words}
        found.append([*words, *(f"{key}={size}" for key, size in TOY.items() if key not in swept)])
    return found


@pytest.mark.parametrize("path", long_except(STUDIES, *STUDIES[::8]), ids=lambda path: path.stem)
def test_a_study_says_what_it_asks_and_runs(path: Path, composed: Callable[..., Any], tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"# Launch: python -m initlab -cd experiments -cn {path.stem}" in text
    config = composed(path)
    asked = study_of(config, path.stem, OmegaConf.create([]))
    assert asked.question.endswith("?") and "\n" not in asked.question
    assert asked.source and asked.cost["runs"] and asked.cost["cpu_seconds"]
    assert asked.expect and config.hydra.mode.name == "MULTIRUN"
    for number, words in enumerate(first_jobs(config)):
        one = composed(path, *words, f"theory={'off' if number else 'closed'}", "plots=false", "report=false")
        choices = OmegaConf.to_container(one.hydra.runtime.choices)
        assert isinstance(choices, dict)
        del one.hydra
        prepared = prepare.prepare(read_config(one), choices, tmp_path / str(number))
        with prepared.recorder as recorder:  # what a job prints is no matter here
            for stage in prepared.stages:
                stage(recorder)
    tables = printout.read_tables(find_runs(tmp_path), asked.tables())
    # So small, an expectation may fail and may find no rows of its layer; what it asks must make sense all the same.
    verdicts, mistakes = study.answer(asked, tables, tmp_path)
    assert all(isinstance(mistake, NothingFound) for mistake in mistakes), mistakes
    assert len(verdicts) + len(mistakes) == len(asked.expect)
    if not verdicts:  # all of it is about settings that a toy has not: the same of whatever settings there are
        anywhere = tuple(replace(one, where={k: v for k, v in one.where.items() if k in WORDS}) for one in asked.expect)
        anywhere = tuple(replace(one, how="above", value=(0.0,)) if one.how in AMONG else one for one in anywhere)
        verdicts, mistakes = study.answer(replace(asked, expect=anywhere), tables, tmp_path)
    assert verdicts and all(isinstance(mistake, NothingFound) for mistake in mistakes), mistakes
    try:
        drawn = study.draw(asked, tables, tmp_path, verdicts)
    except NothingFound:
        drawn = None
    assert drawn is None or drawn.is_file()


@pytest.mark.slow
@named
def test_a_study_holds_at_full_size(path: Path, lab: Lab) -> None:
    code, out, err = lab("-cd", str(path.parent), "-cn", path.stem)
    assert code == 0, err + out
    (answers,) = Path("outputs", path.stem).glob("*/expect.json")
    kept = json.loads(answers.read_text(encoding="utf-8"))
    fails = [one["say"] for one in yaml.safe_load(path.read_text(encoding="utf-8"))["expect"] if one.get("fails")]
    assert [one["say"] for one in kept["verdicts"] if not one["holds"]] == fails  # and nothing else
    assert len(kept["verdicts"]) == kept["of"] > 0 and kept["question"] in out
    frame = initlab.read("outputs/**", table=kept_table(path))
    for key, values in yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"].items():
        if key in frame and key != "task":  # each task writes tables of its own
            assert len(frame[key].unique()) == len(expand([], {key: values})), key


def kept_table(path: Path) -> str:
    """A table that the study asks for."""
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["expect"][0].get("table", "stats"))


def test_conf_has_no_sweeps_and_no_study() -> None:
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "MULTIRUN" not in text and "sweeper" not in text
    config = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    assert config["study"]["question"] == "" and config["expect"] == []


@named
def test_experiments_have_no_options_of_their_own(path: Path) -> None:
    """What a study may say: the schema's options, and of Hydra that it is a sweep and over what."""
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert said["defaults"][0] == "config" and said["defaults"][-1] == "_self_"
    assert said["hydra"].keys() == {"mode", "sweeper"} and said["hydra"]["sweeper"].keys() == {"params"}
    assert not [line for line in path.parent.iterdir() if line.is_dir()]


GROWS = "{say: it grows, where: {layer: 4, tensor: activation, direction: forward}, statistic: std, reduce: median, "
GROWS += "is: above, value: 1.0e+6}"


def hope(tmp_path: Path, *changes: tuple[str, str]) -> None:
    """A study of one's own in `study/hope.yaml`."""
    text = f"""
defaults: [config, _self_]
task: stack
depth: 4
seeds: 2
width: 50
study:
  question: Does it grow?
  figure: {{where: {{tensor: activation, direction: forward}}, x: layer, y: std, by: init, y_scale: log}}
expect:
  - {GROWS}
hydra:
  mode: MULTIRUN
  sweeper: {{params: {{init: "small,lecun"}}}}
"""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "study").mkdir(exist_ok=True)
    (tmp_path / "study" / "hope.yaml").write_text(text, encoding="utf-8")


def test_a_study_that_fails_says_so_and_one_that_holds_too(lab: Lab, tmp_path: Path) -> None:
    hope(tmp_path)
    code, out, err = lab("-cd", "study", "-cn", "hope")
    assert code == 4 and not err, err
    assert out.startswith("Does it grow?\n") and "FAILS: it grows (measured " in out
    assert out.rstrip().endswith("0 of 1 expectations hold") or "0 of 1 expectation holds" in out
    (folder,) = Path("outputs", "hope").iterdir()
    assert {path.name for path in folder.glob("*.*")} == {"hope.png", "expect.json", "multirun.yaml", "report.html"}
    assert not list(folder.glob("*/*.png"))  # the study's figure is the one that is drawn
    kept = json.loads((folder / "expect.json").read_text(encoding="utf-8"))
    assert kept["question"] == "Does it grow?" and (kept["holds"], kept["of"]) == (0, 1)
    assert kept["verdicts"][0]["measured"][0]["number"] < 1
    hope(tmp_path, ("small,lecun", "naive,orthogonal"), ("1.0e+6", "1"))
    code, out, err = lab("-cd", "study", "-cn", "hope", "init=naive", "plots=false", "report=false")
    assert code == 0, err
    assert "1 of 1 expectation holds" in out


@pytest.mark.long
def test_a_study_that_says_what_fails_ends_well_and_one_whose_claim_holds_after_all_does_not(
    lab: Lab, tmp_path: Path
) -> None:
    known = 'value: 1.0e+6, fails: "four layers are too few"'
    hope(tmp_path, ("value: 1.0e+6", known))
    code, out, err = lab("-cd", "study", "-cn", "hope", "report=false", "plots=false")
    assert code == 0 and not err, err
    assert "does not reproduce: it grows" in out and "0 of 1 expectation holds, 1 does not reproduce" in out
    hope(tmp_path, ("value: 1.0e+6", known.replace("1.0e+6", "0")))
    code, out, _ = lab("-cd", "study", "-cn", "hope", "plots=false", "report=false")
    assert code == 4 and "HOLDS AFTER ALL: it grows" in out


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("reduce: median", "reduce: meddian", "expect: 'it grows': reduce=meddian: must be one of"),
        ("statistic: std", "statistic: stdd", "expect: 'it grows': column of stats=stdd: must be one of"),
        ("where: {layer: 4", "where: {laier: 4", "expect: 'it grows': column of stats=laier: must be one of"),
        ("is: above, ", "", "expect: 'it grows': has no `is`"),
        ("say: it grows", "tell: it grows, say: it grows", "expect: 'it grows': tell: no such field"),
        ("y: std", "y: stdd", "study.figure: column of stats=stdd: must be one of"),
        ("question:", "qestion:", "study.qestion: no such option - did you mean study.question?; see --help"),
        ("small,lecun", "small,lecum", "init=lecum: must be one of"),
        ('init: "small,lecun"', 'init: ""', "init=: must be one of"),
        ('init: "small,lecun"', 'seed: "range(0,0)"', "seed=range(0,0): has no values, the sweep is empty"),
        ('init: "small,lecun"', 'sed: "1,2"', "sed: no such option - did you mean seed?; see --help"),
    ],
)
def test_a_broken_study_is_one_line_before_anything_is_measured(
    lab: Lab, tmp_path: Path, old: str, new: str, text: str
) -> None:
    hope(tmp_path, (old, new))
    code, out, err = lab("-cd", "study", "-cn", "hope")
    assert code == 2 and err.startswith(f"initlab: {text}") and err.count("\n") == 1, err
    assert "Traceback" not in out and not list(Path().glob("outputs/**/*.parquet"))
    assert not Path("outputs").exists() or not list(Path("outputs").iterdir())


def test_what_only_the_tables_can_tell_is_told_afterwards(lab: Lab, tmp_path: Path) -> None:
    """A layer that is not there: the numbers stay, the other sentence is judged, the exit code says a mistake."""
    other = GROWS.replace("it grows", "it is deep").replace("layer: 4", "layer: 9")
    hope(tmp_path, (f"- {GROWS}", f"- {other}\n  - {GROWS}"))
    code, out, err = lab("-cd", "study", "-cn", "hope", "plots=false", "report=false")
    assert code == 2 and err == "initlab: expect: 'it is deep': selects no rows: layer=9 where there is 0, 1, 2, 3, 4\n"
    assert "0 of 2 expectations hold, 1 cannot be judged" in out  # as expect.json counts them
    assert "FAILS: it grows" in out and len(list(Path("outputs").glob("**/stats.parquet"))) == 2


@pytest.mark.parametrize("words", [("seed=range(0,0)",), ("seed=",), ("init=",)])
def test_an_empty_sweep_is_one_line(lab: Lab, words: tuple[str, ...]) -> None:
    code, _, err = lab("-m", "task=stack", *words)
    assert code == 2 and err.count("\n") == 1 and not Path("outputs").exists()


def test_the_columns_that_are_known_beforehand_are_those_that_are_written(lab: Lab) -> None:
    """Both ways: a column that is not known would be refused, one that is known and never written missed."""
    quick = ("depth=2", "width=4", "seeds=1", "train.steps=1", "plots=false", "report=false")
    assert lab(*quick)[0] == 0 and lab(*quick, "task=seeded", "device=cpu")[0] == 0
    configuration = {*OPTION_OF, *NOT_OPTIONS}
    for name in TABLES:
        if (own := own_columns(name)) is not None:
            assert set(initlab.read("outputs/**", table=name)) - configuration == own - configuration, name


def test_a_mistake_in_another_word_than_a_column_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="runs=-1"):
        about = {"question": "", "source": "", "cost": {"runs": -1}, "figure": {}}
        study.prepare("x", about, [], option_names())


@pytest.mark.parametrize("keeps", [True, False])
def test_formats_judges_a_processor_by_what_it_does(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two sentences about the bfloat16 of such a processor hold there, and those about the other kind fail.

    A processor that keeps subnormal numbers is made of products in float32, one that flushes them of the same with all
    below the smallest normal number made 0; its answer about itself is replaced.
    """
    tiny = torch.finfo(torch.bfloat16).tiny

    def multiply(x: Iterable[torch.Tensor], w: torch.Tensor, out: Iterable[torch.Tensor]) -> None:
        for one, weight, result in zip(x, w.unbind(), out, strict=True):
            result.copy_(one.float() @ weight.float())
            if not keeps:
                result[result.abs() < tiny] = 0

    monkeypatch.setattr("initlab.tasks.stack.multiply", multiply)
    monkeypatch.setattr("initlab.studies.expectation.drops_subnormals", lambda dtype: not keeps)
    given = yaml.safe_load((EXPERIMENTS / "formats.yaml").read_text(encoding="utf-8"))
    shape = {name: given[name] for name in ("depth", "batch", "seeds", "backward")}
    frames = [
        initlab.stack("small", name, **shape, dtype="bfloat16").assign(activation=name, init="small", dtype="bfloat16")
        for name in ("relu", "linear")
    ]
    tables = {"stats": pd.concat(frames).assign(run="one")}
    about = {name: given["study"][name] for name in ("question", "source", "cost", "figure")}
    judged = [one for one in study.prepare("formats", about, given["expect"], []).expect if one.machine]
    assert len(judged) == 2 and {one.machine for one in judged} == {"keeps bfloat16" if keeps else "flushes bfloat16"}
    assert [str(judge(one, tables)) for one in judged if not judge(one, tables).holds] == []
    others = [
        parse_expectation(one) for one in given["expect"] if one.get("machine", judged[0].machine) != judged[0].machine
    ]
    assert [judge(one, tables).holds for one in others] == [False, False]
