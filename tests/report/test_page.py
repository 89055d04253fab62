"""The page of a run and of a sweep, read as a text: what it says, in which order, that it is whole without a script."""

import json
import re
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import initlab
from initlab.errors import UsageError
from initlab.figures import plots
from initlab.figures.pictures import draw_pictures
from initlab.report import page_numbers, page_sections, page_tables, page_words
from initlab.report.page import write_page
from initlab.report.page_files import read_labelled, write_pages
from initlab.runs.read import find_runs
from tests.report.pages import COMMANDS, Reader

Lab = Callable[..., tuple[int, str, str]]
DEAD = "sweep/1"
PAGES = [*COMMANDS, DEAD]
ORDER = ["findings", "setting", "stack", "training", "parity", "formats", "theory", "walk", "jobs", "again"]
OUTSIDE = re.compile(r"(?:https?:)?//|url\((?!#|&quot;#)|@import|\bsrcset\b")


def read(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_stands_alone_and_is_whole(runs: Path, name: str) -> None:
    page = read(runs / name)
    assert max(page.ids.values()) == 1, [one for one, count in page.ids.items() if count > 1]
    for tag, about in page.elements:
        for key in ("src", "href", "data", "poster", "action"):
            value = about.get(key) or ""
            inner = tag == "a" and re.fullmatch(r"\d/report\.html|#[\w-]+", value)
            assert not value or inner or value.startswith(("data:", "#")), (tag, key, value)
    text = (runs / name / "report.html").read_text(encoding="utf-8")
    assert not OUTSIDE.search(re.sub(r"data:image/png;base64,[\w+/=]*", "", text).replace('"http" + "://', ""))
    for about in page.named("a"):
        link = str(about["href"])
        assert link[1:] in page.ids if link.startswith("#") else (runs / name / link).is_file()
    size = (runs / name / "report.html").stat().st_size
    assert size < (3e6 if name == "sweep" else 1e6)


@pytest.mark.parametrize("name", PAGES)
def test_the_parts_stand_in_their_order(runs: Path, name: str) -> None:
    page = read(runs / name)
    sections = [about["id"] for about in page.named("section")]
    assert sections == [one for one in ORDER if one in sections]
    assert {"findings", "setting", "stack", "training", "parity", "theory", "walk", "again"} <= set(sections)
    assert ("jobs" in sections) == (name in ("sweep", "axes"))
    heads = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert heads[0] == "h1" and heads.count("h1") == 1
    assert all(int(b[1]) - int(a[1]) <= 1 for a, b in pairwise(heads))


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_a_text_alternative(runs: Path, name: str) -> None:
    page = read(runs / name)
    pictures = [about for about in page.named("svg") if about.get("role") == "img"] + page.named("img")
    assert len(pictures) == len(page.named("figure")) > 0
    for about in pictures:
        labelled = about.get("alt") or about.get("aria-labelledby")
        assert labelled and (about.get("alt") or labelled in page.ids)
    titles = page.inside["title"]
    assert len(titles) == 1 + len(page.named("svg")) and all(len(title) > 10 for title in titles)


def test_the_findings_come_first_in_words(runs: Path) -> None:
    healthy, dead, diverged = (read(runs / name).text for name in ("healthy", DEAD, "diverged"))
    assert "healthy The rules found nothing wrong." in healthy and "error" not in healthy.split("What was run")[0]
    assert "agree, p = " in healthy.split("What was run")[0]
    assert "vanishing at layer 1" in dead and "Remedy: init=kaiming" in dead
    assert "exactly 0 from layer" in dead.split("What was run")[0]
    assert "error diverged" in diverged and "not finite from step" in diverged.split("What was run")[0]
    assert "Usual remedy:" in diverged


def test_the_picture_above_all_shows_the_gravest_finding(runs: Path) -> None:
    first = {name: next(iter(read(runs / name).named("svg"))) for name in (DEAD, "diverged", "sweep")}
    assert [str(first[name]["aria-labelledby"]) for name in first] == [
        "activation_std-title", "loss-title", "activation_std-title"
    ]  # fmt: skip


def test_what_was_set_stands_before_what_was_left(runs: Path) -> None:
    text = read(runs / DEAD).text
    assert text.index("Different from the defaults:") < text.index("In force")
    assert re.search(r"Different from the defaults: .*init small .*In force", text)
    assert "init naive, small, kaiming" in read(runs / "sweep").text


def test_a_sweep_has_a_row_for_each_job_with_a_word_beside_every_colour(runs: Path) -> None:
    page = read(runs / "sweep")
    text = page.text
    grid = text[text.index("What was found in each job") : text.index("How to run it again")]
    assert all(f"{k} {init}" in grid for k, init in enumerate(["naive", "small", "kaiming"]))
    assert "exploding" in grid and "vanishing" in grid and grid.count("alive") >= 2
    cells = [about for about in page.named("td") if re.search("good|fair|bad", str(about.get("class")))]
    assert len(cells) > 8
    (row,) = re.findall(r'<a href="0/report.html">.*?</tr>', (runs / "sweep/report.html").read_text(), re.DOTALL)
    coloured = re.findall(r'class="\w* (good|fair|bad)">([^<]*)<', row)
    assert coloured and all(word.strip() for _, word in coloured)


def test_settings_inside_a_run_have_rows_too(runs: Path) -> None:
    text = read(runs / "axes").text
    grid = text[text.rindex("What was found in each setting") :]
    assert "naive, relu, gain 3" in grid and "exploding" in grid
    rows = re.findall(r"kaiming, relu, gain 1 (\S+)", grid)
    assert rows  # the finding about another setting is not told of this one
    assert "exploding" not in rows[0]


def test_the_commands_can_be_typed_again(runs: Path) -> None:
    commands = [code for code in read(runs / "healthy").inside["code"] if "initlab" in code]
    assert commands[0].startswith("initlab depth=12 histograms=true") and "initlab report healthy" not in commands[0]
    assert any("initlab report" in code for code in commands) and any("initlab.read(" in code for code in commands)
    alone = read(runs / "sweep/1").inside["code"]
    assert any(re.fullmatch(r"initlab (?!.*-m).*init=small.*", code) for code in alone)
    assert any(" -m " in code for code in alone)


def test_the_page_is_complete_without_a_script(runs: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", (runs / "healthy/report.html").read_text(), flags=re.DOTALL)
    page = Reader(text)
    walk = page.text[page.text.index("The first, the middle and the last layer") :]
    assert all(f" {layer} activation " in walk for layer in (1, 7, 12))
    assert "gradient of the weight" in walk and " weight " in walk
    hidden = [about.get("id") or about.get("class") for _, about in page.elements if "hidden" in about]
    assert set(hidden) == {"walk-controls", "copy"}


def numbers(folder: Path) -> list[dict[str, object]]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="walk-numbers">(.*?)</script>', text, re.DOTALL)
    views: list[dict[str, object]] = json.loads(found)["views"]
    return views


def test_the_numbers_of_the_walk_are_those_of_the_tables(runs: Path) -> None:
    """Three digits: a relative tolerance of half a unit of the third."""
    stats = initlab.read(runs / "healthy")
    for view in numbers(runs / "healthy"):
        steps, layers = view["steps"], view["layers"]
        assert isinstance(steps, list) and isinstance(layers, list) and isinstance(view["tensors"], list)
        rows = stats[(stats["stage"] == view["stage"]) & (stats["implementation"] == "scratch")]
        assert len(steps) * len(layers) >= 3 and {rows["layer"].max()} <= set(layers)
        for one in view["tensors"]:
            tensor, direction = one["name"].removeprefix("gradient of the "), one["name"].startswith("gradient")
            mine = rows[(rows["tensor"] == tensor) & (rows["direction"] == ("backward" if direction else "forward"))]
            for statistic in ("std", "max"):
                found = mine.groupby(["step", "layer"])[statistic].agg("median" if statistic == "std" else "max")
                for (step, layer), number in found.items():
                    if step in steps and layer in layers:
                        place = steps.index(step) * len(layers) + layers.index(layer)
                        value = page_numbers.value_at(one, statistic, place)
                        assert value == pytest.approx(number, rel=6e-3)


def test_recorded_histograms_are_there_and_others_are_not_invented(runs: Path) -> None:
    training = next(view for view in numbers(runs / "healthy") if view["stage"] == "train")
    shares = [one["histograms"] for one in training["tensors"]]  # type: ignore[attr-defined]
    filled = [bins for every in shares for bins in every if bins]
    assert filled and all(sum(bins[1]) == pytest.approx(100, abs=len(bins[1])) for bins in filled)
    assert "histograms=true" not in read(runs / "healthy").text.split("walk through")[0]
    for view in numbers(runs / DEAD):
        assert all("histograms" not in one for one in view["tensors"])  # type: ignore[attr-defined]
    assert "No histograms were recorded: histograms=true" in read(runs / DEAD).text


def test_a_long_training_is_thinned_and_says_so() -> None:
    steps, layers = 3000, 40
    place = pd.MultiIndex.from_product([range(steps), range(1, layers)], names=["step", "layer"]).to_frame(index=False)
    columns = dict.fromkeys(["mean", "std", "norm", "min", "max", "cosine"], 1.5)
    columns |= dict.fromkeys(["frac_zero", "frac_dead", "frac_saturated", "n_nan", "n_inf", "n_subnormal"], 0.0)
    rows = place.assign(**columns, count=10, seed=0, tensor="weight", direction="forward", label="one", stage="train")
    (view,) = page_numbers.collect_views({"stats": rows}, 20_000)
    kept = len(view["steps"]) * len(view["layers"]) * len(page_numbers.SHOWN)
    assert kept <= 20_000 and view["steps"][0] == 0 and view["steps"][-1] == 2999
    assert view["layers"][0] == 1 and view["layers"][-1] == 39 and "of 3000 steps" in view["thinned"]
    (whole,) = page_numbers.collect_views({"stats": rows[rows["step"] < 5]}, 20_000)
    assert whole["thinned"] == "" and len(whole["layers"]) == 39


def test_a_word_is_explained_where_it_is_met_first() -> None:
    reader = page_words.Reader()
    assert dict(reader.explain(["the std of a layer"])) == {name: page_words.WORDS[name] for name in ("layer", "std")}
    assert dict(reader.explain(["std, gain"])) == {"gain": page_words.WORDS["gain"]}
    assert reader.explain(["a player, dstd, regain"]) == []


def test_numbers_have_three_digits_and_others_are_words() -> None:
    texts = [page_tables.as_text(one) for one in (0.123456, 1e-12, 50.0, 7, 1234567, float("nan"), float("inf"), None)]
    assert texts == ["0.123", "1e-12", "50", "7", "1,234,567", "not finite", "inf", ""]


@pytest.mark.parametrize(
    ("rate", "word"), [(0.0, "holds"), (4.0, "overflow from layer 32"), (-4.0, "subnormal from layer 32")]
)
def test_the_end_of_a_format_is_where_sizes_leave_it(rate: float, word: str) -> None:
    """float32 ends at 2^128, and becomes subnormal below 2^-126: at 4 octaves a layer both are the 32nd."""
    layers = range(1, 35)
    cell = page_sections.find_format_end(rate * np.array(layers), layers, "float32")
    assert cell.text == word and (cell.kind == page_tables.GOOD) == (rate == 0)


HOSTILE = """x<script>alert("1")</script>&'"{{7*7}}"""


def test_whatever_comes_from_outside_is_a_text(runs: Path, tmp_path: Path) -> None:
    """Names of rules, messages of verdicts, expectations, notes and commands."""
    folder = tmp_path / "<b>run"
    shutil.copytree(runs / "healthy", folder)
    about = json.loads((folder / "run.json").read_text())
    about |= {"notes": [HOSTILE], "command": ["initlab", HOSTILE], "overrides": [f"init={HOSTILE}"]}
    about["columns"] |= {"init": HOSTILE, "device": HOSTILE}
    (folder / "run.json").write_text(json.dumps(about))
    finding = {"rule": HOSTILE, "severity": "error", "layer": 3, "name": HOSTILE, "cause": HOSTILE, "remedy": HOSTILE}
    (folder / "verdict.json").write_text(json.dumps({"ok": False, "layers": 3, "findings": [finding]}))
    verdicts = [{"say": HOSTILE, "holds": True, "said": HOSTILE, "measured": []}]
    study = {"study": HOSTILE, "question": HOSTILE, "source": "", "holds": 1, "of": 1, "verdicts": verdicts}
    (folder / "expect.json").write_text(json.dumps(study))
    tables, _ = read_labelled(find_runs(folder))
    spoilt = {
        name: frame.assign(label=pd.Categorical([HOSTILE] * len(frame)), init=HOSTILE) if "label" in frame else frame
        for name, frame in tables.items()
    }
    safe = (runs / "healthy/report.html").read_text().count("<script")
    write_page(folder, spoilt, draw_pictures(plots.make_figures(spoilt), None, inline=True))
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert text.count("<script") == safe and 'alert("1")</script>' not in text and "49" not in page.inside["h1"][0]
    assert page.inside["h1"] == [HOSTILE]
    assert page.text.count(HOSTILE.replace("  ", " ")) > 8
    assert not [tag for tag, about in page.elements if any(key.startswith("on") for key in about)]
    policy = [about["content"] for about in page.named("meta") if about.get("http-equiv")]
    assert len(policy) == 1 and "script-src 'sha256-" in str(policy[0]) and "default-src 'none'" in str(policy[0])


def test_a_rule_with_an_odd_file_name(lab: Lab) -> None:
    Path("mine/init").mkdir(parents=True)
    name = '<script>alert("1")'
    Path(f"mine/init/{name}.yaml").write_text(f"name: '{name}'\ngain: 1.0\n")
    code, _, err = lab("-cd", "mine", f"init='{name}'", "task=stack", "depth=3", "seeds=1", "hydra.run.dir=odd")
    assert code == 0, err
    page = read(Path("odd"))
    assert f"stack, {name}" in page.inside["h1"][0] and len(page.named("script")) == 2


def test_neither_files_nor_page_where_both_are_off(lab: Lab) -> None:
    code, out, _ = lab("task=stack", "depth=3", "seeds=1", "plots=false", "report=false", "hydra.run.dir=none")
    assert code == 0 and "report:" not in out and not list(Path("none").glob("*.[ph][nt]*"))
    code, out, _ = lab("task=stack", "depth=3", "seeds=1", "plots=false", "hydra.run.dir=words")
    assert code == 0 and f"report: {Path('words/report.html')}" in out
    assert not list(Path("words").glob("*.png")) and read(Path("words")).named("figure") == []


@pytest.mark.long
def test_pages_are_made_anew_from_tables(lab: Lab, runs: Path) -> None:
    shutil.copytree(runs / "sweep", "sweep")
    before = {path: path.read_text() for path in Path("sweep").glob("**/report.html")}
    for path in before:
        path.unlink()
    code, out, err = lab("report", "sweep")
    assert code == 0 and err == "" and out.splitlines()[0] == f"report: {Path('sweep/report.html')}"
    assert set(Path("sweep").glob("**/report.html")) == set(before) and len(before) == 4
    made = read(Path("sweep"))
    assert [about["id"] for about in made.named("section")] == [
        about["id"] for about in read(runs / "sweep").named("section")
    ]
    assert len(made.named("figure")) == len(read(runs / "sweep").named("figure"))
    assert len(read(Path("sweep/2")).named("figure")) == len(read(runs / "sweep/2").named("figure"))


def test_mistakes_of_the_command_are_a_line(lab: Lab, runs: Path) -> None:
    code, _, err = lab("report", "nowhere")
    assert code == 2 and err.strip() == "initlab: no run at or below nowhere"
    shutil.copytree(runs / DEAD, "broken")
    Path("broken/losses.parquet").write_bytes(b"PAR1 nothing")
    Path("broken/verdict.json").write_text("[1]")
    code, out, err = lab("report", "broken")
    assert code == 0 and out.strip() == f"report: {Path('broken/report.html')}"
    assert len(err.splitlines()) == 1 and "losses.parquet" in err
    page = read(Path("broken"))
    assert (
        "verdict.json: cannot be read" in page.text
        and "The stack" in page.text
        and "Loss" not in page.inside["caption"]
    )
    with pytest.raises(UsageError, match="no run"):
        write_pages([])


def test_a_run_that_was_killed_has_a_page(lab: Lab, runs: Path) -> None:
    shutil.copytree(runs / "healthy", "killed")
    about = json.loads(Path("killed/run.json").read_text()) | {"status": "running"}
    Path("killed/run.json").write_text(json.dumps(about))
    Path("killed/stats.parquet").unlink()
    assert lab("report", "killed")[0] == 0
    assert "killed: killed" in read(Path("killed")).text


TASKS = (
    "gains",
    "formats",
    "jacobian",
    "phase",
    "graph",
    "explain",
    "broadcast",
    "audit",
    "diagnose",
    "seeded",
    "train",
)


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_page(lab: Lab, task: str) -> None:
    small = ("depth=3", "width=8", "batch=8", "seeds=2", "train.steps=2", "phase.sw.points=2", "phase.sb.points=2")
    code, _, err = lab(f"task={task}", *small, "hydra.run.dir=one")
    assert code in (0, 3), err
    page = read(Path("one"))
    assert max(page.ids.values()) == 1
    assert page.named("table") or "found nothing wrong" in page.text
    assert len(page.named("figure")) == len(list(Path("one").glob("*.png")))
    assert ('id="walk-numbers"' in Path("one/report.html").read_text()) == (task in ("seeded", "train"))


def test_a_page_costs_little_beside_its_figures(runs: Path) -> None:
    """CPU time of this process for the pages of a run of default size and of a sweep."""
    for name in ("healthy", "sweep"):
        tables, _ = read_labelled(find_runs(runs / name))
        whole = (runs / name / "report.html").read_bytes()
        start = time.process_time()
        write_page(runs / name, tables, [])
        assert time.process_time() - start < 1.5
        (runs / name / "report.html").write_bytes(whole)  # as other tests look at it


@pytest.mark.long
def test_a_sweep_of_64_jobs_stays_small(tmp_path: Path) -> None:
    """Jobs of default depth: the rows of one, under 64 gains."""
    frame = initlab.stack("kaiming", depth=50, width=10, batch=8, seeds=2)
    parts = []
    for k in range(64):
        (tmp_path / f"{k}").mkdir()
        about = {"status": "done", "overrides": [f"init.gain={k}"], "columns": {"gain": k, "init": "kaiming"}}
        (tmp_path / f"{k}/run.json").write_text(json.dumps(about))
        own = {"run": str(tmp_path / f"{k}"), "label": f"kaiming, relu, gain {k}", "init": "kaiming", "gain": float(k)}
        parts.append(frame.assign(**own))
    tables = {"stats": pd.concat(parts, ignore_index=True).astype({"label": "category"})}
    start = time.process_time()
    pictures = draw_pictures(plots.make_figures(tables, compare=True), None, inline=True)
    drawn = time.process_time()
    path = write_page(tmp_path, tables, pictures)
    assert path.stat().st_size < 3e6 and time.process_time() - drawn < 1.5 + (drawn - start)
    page = read(tmp_path)
    assert len([about for about in page.named("a") if "/" in str(about["href"])]) == 64
    assert len(page.named("figure")) == len(pictures) >= 1
