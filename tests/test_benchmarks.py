"""The benchmarks' arithmetic, their file of results, their guard, and the shape of the package. Nothing is timed."""

import ast
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks
from benchmarks import __main__ as command
from benchmarks import child, growth, guard, machine, memory, questions, race, report, rows, subjects
from benchmarks.draw import figure
from benchmarks.groups import GROUPS
from benchmarks.questions import QUESTIONS
from benchmarks.race import Asked, Contestant, NotAvailable, Outcome, Setting
from benchmarks.rows import BARS, IDS, UNITS, VARIANTS, Missing, Row, at, quartiles
from initlab.errors import UsageError

PACKAGE = Path(benchmarks.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
KEYS = ["id", "variant", "ratio", "q25", "q75", "unit", "threads", "device", "torch"]


def result(name="stack.100", ratio=2.0, **changes):
    given = {"variant": "plain", "q25": ratio, "q75": ratio, "unit": "ratio", "threads": 1, "device": "cpu"}
    return Row(**{"id": name, "ratio": ratio, "torch": "2.13", **given, **changes})


# --- quartiles and ratios ---------------------------------------------------------------------------------------------


def test_quartiles_of_known_samples():
    assert quartiles([5, 1, 3, 2, 4]) == (3, 2, 4)
    assert quartiles([1, 2]) == (1.5, 1.25, 1.75)
    assert quartiles([7.0]) == (7, 7, 7)
    assert all(map(math.isnan, quartiles([])))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), st.floats(0.01, 100))
def test_quartiles_are_ordered_and_scale_with_the_samples(samples, factor):
    median, low, high = quartiles(samples)
    assert min(samples) <= low <= median <= high <= max(samples)
    scaled = quartiles([factor * x for x in samples])
    assert scaled == pytest.approx((factor * median, factor * low, factor * high), rel=1e-12)
    assert quartiles(samples[::-1]) == (median, low, high)
    assert at(sorted(samples), 0) == min(samples) and at(sorted(samples), 1) == max(samples)


class Clock:
    """Time that passes only in contestants, and faster and faster on a machine that slows down."""

    def __init__(self, drift=1.0):
        self.now, self.factor, self.drift, self.calls, self.closed = 0.0, 1.0, drift, [], []

    def contestant(self, name, seconds, work=1):
        def call():
            self.calls.append(name)
            self.now += seconds * self.factor
            self.factor *= self.drift

        return lambda: Contestant(call, work, lambda: self.closed.append(name))


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(race.time, "process_time", lambda: made.now)
    monkeypatch.setattr(race, "wall", lambda: made.now / 10)
    return made


def test_a_ratio_is_the_time_of_one_over_that_of_the_other(clock):
    builds = {"slow": clock.contestant("slow", 0.25), "fast": clock.contestant("fast", 0.125)}
    asked = [Asked("stack.100", "plain", "slow", "fast"), Asked("stack.1000", "plain", "fast", "slow")]
    outcome = race.run(builds, asked, Setting())
    assert [(r.id, r.ratio, r.q25, r.q75) for r in outcome.rows] == [
        ("stack.100", 2, 2, 2),
        ("stack.1000", 0.5, 0.5, 0.5),
    ]
    assert outcome.seconds == {"slow": 0.25, "fast": 0.125} and not outcome.missing


def test_ratios_are_per_unit_of_work(clock):
    """Ten steps of which one is dear, against a step; sixteen networks in one program, against one."""
    builds = {"ten": clock.contestant("ten", 0.25, work=10), "one": clock.contestant("one", 0.125)}
    outcome = race.run(builds, [Asked("step.deep.cost", "every10", "ten", "one")], Setting())
    assert outcome.rows[0].ratio == pytest.approx(0.2, rel=1e-12)
    assert outcome.seconds["ten"] == pytest.approx(0.025, rel=1e-12)


def test_a_machine_that_slows_down_changes_times_and_hardly_a_ratio(clock):
    clock.drift = 1.01
    builds = {"slow": clock.contestant("slow", 0.25), "fast": clock.contestant("fast", 0.125)}
    outcome = race.run(builds, [Asked("stack.100", "plain", "slow", "fast")], Setting(rounds=10, seconds=9))
    assert clock.factor > 1.2
    assert outcome.rows[0].ratio == pytest.approx(2, rel=0.02)  # neighbours in a round are one call apart


def test_contestants_take_turns_at_the_front(clock):
    builds = {name: clock.contestant(name, 0.125) for name in "abc"}
    race.run(builds, [], Setting(rounds=3, seconds=9))
    assert "".join(clock.calls[-9:]) == "abcbcacab"


def test_one_thread_is_timed_by_the_processor_and_two_by_the_wall(clock):
    assert Setting(threads=1).clock() == clock.now
    builds = {"a": clock.contestant("a", 0.25)}
    assert race.run(builds, [], Setting(threads=1)).seconds["a"] == 0.25
    assert race.run(builds, [], Setting(threads=2)).seconds["a"] == pytest.approx(0.025)


def absent():
    raise NotAvailable("no compiler")


def test_what_cannot_run_is_said_and_the_rest_runs(clock):
    builds = {"gone": absent, "a": clock.contestant("a", 0.25), "b": clock.contestant("b", 0.25)}
    asked = [Asked("stack.100", "accelerated", "gone", "a"), Asked("stack.100", "plain", "b", "a")]
    outcome = race.run(builds, asked, Setting())
    assert outcome.missing == [Missing("stack.100", "accelerated", "no compiler")]
    assert [row.ratio for row in outcome.rows] == [1]
    assert clock.closed == ["a", "b"]


def test_contestants_are_closed_after_a_fault(clock):
    def fault():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        race.run({"a": clock.contestant("a", 0.25), "bad": lambda: Contestant(fault)}, [], Setting())
    assert clock.closed == ["a"]


# --- the file of results ----------------------------------------------------------------------------------------------


def test_the_file_has_the_agreed_keys_in_their_order(tmp_path):
    assert [field.name for field in fields(Row)] == KEYS
    path = tmp_path / "new" / "cpu.json"
    rows.write(path, [result(ratio=1.23456)])
    entries = json.loads(path.read_text())
    assert [list(entry) for entry in entries] == [KEYS]
    assert entries[0]["ratio"] == 1.235


def test_rows_come_back_as_they_were(tmp_path):
    given = [result("startup.help", 0.5, unit="s"), result("stack.100"), result("stack.100", 3.0, threads=2)]
    rows.write(tmp_path / "a.json", given)
    assert set(rows.read(tmp_path / "a.json")) == set(given)


def test_what_is_measured_again_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "a.json"
    rows.write(path, [result(ratio=2.0), result("stack.nets", 2.5), result(threads=2)])
    rows.write(path, [result(ratio=1.5)])
    found = {row.key: row.ratio for row in rows.read(path)}
    assert found == {
        ("stack.100", "plain", 1, "cpu"): 1.5,
        ("stack.100", "plain", 2, "cpu"): 2.0,
        ("stack.nets", "plain", 1, "cpu"): 2.5,
    }


@pytest.mark.parametrize("text", ["{", "[1]", '[{"id": "a"}]', '{"a": 1}'])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=r"a\.json: not a list of benchmark results") as fault:
        rows.read(tmp_path / "a.json")
    assert "\n" not in str(fault.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.json: no such file"):
        rows.read(tmp_path / "gone.json")


@pytest.mark.parametrize("changes", [{"variant": "plane"}, {"unit": "ms"}])
def test_words_outside_the_vocabulary_are_refused(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        result(**changes)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        rows.write(tmp_path / "a.json", [result(ratio=math.nan)])


@pytest.mark.parametrize("path", sorted((PACKAGE / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_what_the_tables_say(path):
    found = rows.read(path)
    assert len({row.key for row in found}) == len(found)
    for row in found:
        assert row.q25 <= row.ratio <= row.q75 and row.threads >= 1 and row.torch[0].isdigit()
        assert any(row.id == name or row.id.startswith(f"{name}.") for name in [*IDS, "step.deep", "step.book"])
        assert (row.unit == "ratio") == (UNITS.index(row.unit) == 0) and row.variant in VARIANTS
    assert re.fullmatch(r"(cpu-\d+core-\w+-\w+|gpu-sm\d+)", path.stem)


# --- bars and the guard -----------------------------------------------------------------------------------------------


def test_every_id_has_a_bar_and_every_bar_an_id():
    named = {name for name, *_ in BARS}
    assert set(IDS) <= named
    assert named - set(IDS) == {"backward.50000.memory", "memory.stack.time", "phase.common.seconds"}
    assert {variant for _, variant, _ in BARS} <= set(VARIANTS)
    assert {name.split(".")[0] for name in IDS} == set(GROUPS)


def test_a_bar_depends_on_the_threads_where_it_says_so():
    row = result("step.deep.full", 0.8, variant="accelerated")
    assert (row.bar, row.clears_its_bar) == (0.90, True)
    assert (replace(row, threads=2).bar, replace(row, threads=2).clears_its_bar) == (0.75, False)
    assert replace(row, threads=4).bar is None and replace(row, threads=4).clears_its_bar is None
    assert replace(row, id="step.book.full", threads=4).bar == 0.80


def test_networks_per_second_are_better_when_higher():
    row = result("stack.nets", 2.6, variant="accelerated", threads=2)
    assert row.clears_its_bar and not replace(row, ratio=2.4).clears_its_bar
    assert guard.worse([replace(row, ratio=1.0)], [row]) and not guard.worse([replace(row, ratio=9.0)], [row])


@pytest.mark.parametrize(("factor", "found"), [(0.5, 0), (1.0, 0), (1.2, 0), (1.3, 1), (math.nan, 1), (math.inf, 1)])
def test_the_guard_names_what_became_worse(factor, found):
    then = [result("stack.100", 2.0), result("stack.1000", 1.0)]
    now = [result("stack.100", 2.0 * factor), result("stack.1000", 1.0)]
    worse = guard.worse(now, then)
    assert [each.row.id for each in worse] == ["stack.100"] * found
    assert all("stack.100 (plain, 1 threads)" in str(each) and "was 2" in str(each) for each in worse)


def test_the_guard_compares_ratios_of_ours_alone():
    then = [result("startup.help", 0.1, unit="s"), result("stack.100.peer.course", 2.0), result(threads=2)]
    now = [replace(row, ratio=100 * row.ratio) for row in then[:2]] + [result(ratio=100.0)]
    assert guard.worse(now, then) == []


def test_the_guard_says_what_is_gone():
    then = [result(), result(variant="accelerated"), result("chapter.four"), result(threads=2)]
    assert guard.no_longer_measured([result()], then) == ["stack.100 (accelerated)"]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch):
    """A group that measures nothing, and the settings that it was called with."""
    asked = []

    def group(setting):
        asked.append(setting)
        return Outcome([result(threads=setting.threads)], [Missing("stack.1000", "plain", "too large")], {"a": 0.001})

    monkeypatch.setitem(GROUPS, "stack", group)
    return asked


def test_the_output_names_the_machine_the_numbers_and_what_is_missing(fixed, capsys):
    assert command.main(["stack", "--threads", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert [setting.threads for setting in fixed] == [1, 2]
    for words in ("machine", "torch", "Python", "load", "CPU time", "wall time", IDS["stack.100"]):
        assert words in said
    assert re.search(r"stack\.100 +plain +2 +2 +2 ratio +1 +2\.5 holds", said)
    assert re.search(r"^Watch every layer.*against the products alone +2\.00$", said, re.M)
    assert re.search(r"stack\.1000 +plain +not available: too large", said)


def test_results_go_to_the_file_and_come_back_without_measuring(fixed, tmp_path, capsys):
    path = tmp_path / "a.json"
    assert command.main(["stack", "--json", str(path)]) == 0
    assert rows.read(path) == [result()]
    assert command.main(["--from", str(path), "--plot", str(tmp_path / "a.png")]) == 0
    assert len(fixed) == 1 and (tmp_path / "a.png").stat().st_size > 1000


def test_a_run_that_is_stopped_has_written_what_it_measured(fixed, tmp_path, monkeypatch):
    def stopped(setting):
        raise KeyboardInterrupt

    monkeypatch.setitem(GROUPS, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(["stack", "step", "--json", str(tmp_path / "a.json")])
    assert rows.read(tmp_path / "a.json") == [result()]


def test_the_guard_ends_with_1_and_names_what_became_worse(fixed, tmp_path, capsys):
    path = tmp_path / "a.json"
    rows.write(path, [result(ratio=1.0)])
    assert command.main(["stack", "--compare", str(path)]) == 1
    assert "WORSE stack.100" in capsys.readouterr().out
    path.unlink()
    rows.write(path, [result(ratio=2.0)])
    assert command.main(["stack", "--compare", str(path)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stak"], "did you mean stack"),
        (["stack", "--threads", "0"], "--threads 0"),
        (["stack", "--device", "tpu"], "device=tpu"),
        (["stack", "--compare", "gone.json"], "gone.json: no such file"),
    ],
    ids=["group", "threads", "device", "file"],
)
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, words, says):
    monkeypatch.setattr(command.sys, "argv", ["benchmarks", *words])
    assert command.entry() == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_comparison_with_nothing_in_common_is_refused(fixed, tmp_path):
    rows.write(tmp_path / "a.json", [result("chapter.four")])
    with pytest.raises(UsageError, match="none of its ratios"):
        command.main(["stack", "--compare", str(tmp_path / "a.json")])


def test_every_line_of_the_report_is_one_line():
    lines = list(report.lines(Outcome([result("stack.nets", 2.6)], [Missing("a", "b", "c")], {"x": 0.5})))
    assert all("\n" not in line for line in lines) and any("500 ms" in line for line in lines)


# --- the figure -------------------------------------------------------------------------------------------------------


ANSWERS = [
    result("step.deep.full", 0.7, threads=2, variant="nohist"),
    result("step.deep.full", 0.8, variant="nohist"),
    result("step.deep.full", 0.9, variant="accelerated"),
    result("step.deep.full", 1.9),
    result("stack.nets", 4.0, variant="accelerated"),
    result("step.deep.peer.course", 2.2),
    result("startup.help", 1.0, unit="s"),
]


def test_the_figure_asks_what_a_user_asks_and_has_peers_on_their_rivals_line():
    drawn = figure(ANSWERS, "title")
    (ax,) = drawn.axes
    labels = [text.get_text().split("\n")[0] for text in ax.get_yticklabels()]
    assert labels == ["Draw, stack and measure a network", "Train 50 layers, every statistic kept"]
    drawn_lines = [line for line in ax.lines if len(line.get_xdata())]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn_lines if line.get_marker() == "o"]
    # One thread, the variants that the row asks for, networks a second the other way round.
    assert dots == [(0.25, 0), (1.9, 1), (0.8, 1)]
    peers = [(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn_lines if line.get_marker() == "s"]
    assert peers == [(2.2, 1)] and drawn.get_figwidth() * drawn.dpi == 850


def test_the_table_of_questions_has_both_answers_and_those_of_others():
    head, *lines, _ = questions.lines(ANSWERS)
    assert [line.split("  ")[0] for line in lines] == [
        "Draw, stack and measure a network, against the chapter's loop",
        "Train 50 layers, every statistic kept, against bare nn.Module",
    ]
    assert lines[0].split()[-1:] == ["0.25"] and lines[1].split()[-4:] == ["0.80", "1.90", "course", "2.20"]
    assert all(len(line) <= 130 for line in (head, *lines)) and list(questions.lines([])) == []


def test_without_groups_only_the_questions_are_measured(monkeypatch, capsys):
    """And the growth of cost; a race leaves out whom nothing asks for."""
    asked = {}

    def group(name):
        def measured(setting):
            asked[name] = setting
            return Outcome()

        return measured

    for name in GROUPS:
        monkeypatch.setitem(GROUPS, name, group(name))
    assert command.main([]) == 0
    assert list(asked) == command.DOZEN
    wanted = asked["stack"].wanted
    assert wanted("stack.100", "plain") and wanted("stack.100.peer.course", "plain")
    assert not wanted("step.deep.cost", "nohist") and not wanted("step.deep.full.histograms", "plain")
    command.main(["stack"])
    assert asked["stack"].wanted("step.deep.cost", "nohist")


def test_a_race_measures_what_is_wanted_alone(clock):
    builds = {name: clock.contestant(name, 0.1) for name in ("a", "b", "c")}
    asked = [Asked("stack.100", "plain", "a", "b"), Asked("stack.1000", "plain", "c", "b")]
    outcome = race.run(builds, asked, Setting(rounds=1, wanted=lambda name, variant: name == "stack.1000"))
    assert set(clock.calls) == {"b", "c"} and [row.id for row in outcome.rows] == ["stack.1000"]


@pytest.mark.long
def test_sweeps_and_trainings_run_as_they_are_typed():
    """In processes of their own; a command that fails is said."""
    small = "from benchmarks import growth; growth.JOBS = (1, 2); growth.SWEEP += ('depth=2', 'width=4', 'batch=4')"
    first, second = json.loads(child.python(["-c", f"{small}; growth.child()"], 1)[1])
    assert first > 0 and second > 0
    one, two = (memory._measured(f"train({steps})", Setting())["kib"] for steps in (1, 2))
    assert abs(one - two) < 30 * 1024
    with pytest.raises(NotAvailable, match=r"train\.steps=-1"):
        memory._measured("train(-1)", Setting())


def test_exponents_are_those_of_powers():
    for power in (0.5, 1.0, 2.0):
        assert growth.exponent([1, 3, 10], [7 * size**power for size in (1, 3, 10)]) == pytest.approx(power, rel=1e-12)
    found = [result("growth.depth", 0.9, unit="power"), result("growth.depth.products", 1.0, unit="power")]
    _, line = report.growth(found)
    assert line.split() == ["depth", "0.90", "1.00"] and list(report.growth([result()])) == []


def test_every_row_of_the_figure_is_a_result_that_there_is():
    assert len(QUESTIONS) == 12
    kept = {row.id for row in rows.read(PACKAGE / "results" / "cpu-2core-x86-avx512.json")}
    assert {one.id for one in QUESTIONS} <= kept


def test_nothing_to_draw_is_one_line():
    with pytest.raises(UsageError, match="nothing to draw"):
        figure([result("startup.help", 0.5, unit="s")], "title")


# --- the machine and fresh processes ----------------------------------------------------------------------------------


def test_the_class_of_machines_is_a_file_name_without_a_maker():
    assert re.fullmatch(r"cpu-\d+core-\w+-\w+", machine.machine_class())
    assert machine.cores() >= 1 and machine.model()


def test_a_processor_that_says_nothing_is_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    monkeypatch.delattr(machine.os, "getloadavg")
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    assert "caches unknown" in "\n".join(machine.describe([1])) and machine.load() == "unknown"


def test_a_process_that_fails_is_not_available_and_says_its_last_line():
    with pytest.raises(NotAvailable, match="ended with 1: ValueError: too bad"):
        child.python(["-c", "raise ValueError('too bad')"], 1)


def test_the_cpu_time_of_a_process_is_its_own():
    spent, said = child.python(
        ["-c", "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.2: pass"], 1
    )
    assert spent >= 0.2 and said == ""


def test_peak_memory_sees_what_was_held_and_let_go():
    code = "\n".join(
        [
            "from benchmarks.memory import peak_kib",
            "for size in (1, 2**26):",
            "    before = peak_kib()",
            "    held = bytearray(size)",
            "    del held",
            "    print(peak_kib() - before)",
        ]
    )
    still, grown = map(float, child.python(["-c", code], 1)[1].split())
    assert still < 1024 and 60 * 1024 <= grown <= 70 * 1024


def test_a_group_without_its_machine_says_so(monkeypatch):
    monkeypatch.setattr(subjects.torch.cuda, "is_available", lambda: False)
    outcome = GROUPS["gpu"](Setting())
    assert not outcome.rows and {missing.id for missing in outcome.missing} == {n for n in IDS if n.startswith("gpu")}
    assert all("no CUDA GPU" in missing.reason for missing in outcome.missing)


def test_a_process_without_memory_to_tell_is_said(monkeypatch):
    def gone(words, threads):
        raise NotAvailable("killed")

    monkeypatch.setattr(memory, "python", gone)
    assert GROUPS["memory"](Setting()).missing == [Missing("memory.stack", "plain", "killed")]


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_modules_say_what_they_are_and_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60


def test_the_map_names_every_module():
    assert {path.stem for path in FILES} - {"__init__"} <= set(re.findall(r"(\w+)\.py", benchmarks.__doc__))
