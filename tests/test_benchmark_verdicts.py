"""How answers about planted faults are judged, and that each installed tool is understood. Nothing is timed."""

import importlib.util

import pandas as pd
import pytest
import torch

from benchmarks import verdicts
from benchmarks.faults import FAULTS, HEALTHY
from benchmarks.verdict_peers import TOOLS, Said
from benchmarks.verdicts import Fault, count, fault_of, judge

LAYER = Fault(("dead",), ("vanishing",), "6.bias")
EVERYWHERE = Fault(("vanishing",), ("dead",), "")
DEAD_AT_6 = Said(True, "dead", ("6",))


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ([], "nothing"),
        ([DEAD_AT_6], "right"),
        ([Said(True, "dead", ("7",))], "right"),  # the activation behind it
        ([Said(True, "dead", ("5", "8", "6"))], "right"),
        ([Said(True, "dead", ("4", "5", "8", "6"))], "kind only"),  # a list of all layers finds none
        ([Said(True, "dead", ("60",))], "kind only"),
        ([Said(True, "dead")], "kind only"),
        ([Said(True, "dead", ("2",)), DEAD_AT_6], "kind only"),  # the second in a list is not the first
        ([Said(False, "exploding", ("2",)), DEAD_AT_6], "right"),  # an error outweighs a warning
        ([Said(False, "dead", ("6",)), Said(True, "exploding", ("2",))], "wrong: exploding"),
        ([DEAD_AT_6, Said(True, "exploding")], "right (+1)"),
        ([Said(True, "vanishing", ("6",))], "right"),  # an effect, at the place
        ([Said(True, "vanishing", ("4",))], "kind only"),
        ([Said(True, "exploding", ("6",))], "layer only (+1)"),
        ([Said(True, "exploding", ("4",)), Said(True, "noise")], "wrong: exploding, noise"),
    ],
)
def test_an_answer_about_one_layer_is_judged_by_kind_and_place(said: list[Said], word: str) -> None:
    assert judge(LAYER, said) == word


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ([Said(False, "vanishing")], "right"),
        ([Said(True, "vanishing", ("0",))], "right"),  # there is no place to miss
        ([Said(True, "dead", ("0",))], "kind only"),
        ([Said(True, "exploding", ("0",))], "wrong: exploding"),
    ],
)
def test_an_answer_about_all_layers_is_judged_by_kind(said: list[Said], word: str) -> None:
    assert judge(EVERYWHERE, said) == word


def test_a_place_inside_of_a_module_or_a_function_at_fault_is_the_place() -> None:
    fault = Fault(("non-finite",), (), "middle.0", "sqrt")
    for place, found in (
        ("sqrt", True),
        ("middle.0.layer", True),
        ("middle.0", True),
        ("middle", False),
        ("head", False),
    ):
        assert fault.is_at(place) == found, place


def test_every_planted_fault_has_its_kind_and_no_kind_is_its_own_effect() -> None:
    torch.manual_seed(0)
    there = {name for name, *_ in verdicts.list_cases()}
    faults = {name: fault_of(name, build(3, 8)) for name, build in FAULTS.items() if name in there}
    assert all(fault.kinds[0] and not set(fault.kinds) & set(fault.effects) for fault in faults.values())
    assert set(verdicts.EFFECTS) <= {*faults, *(fault.kinds[0] for fault in faults.values())}


def test_findings_about_a_healthy_network_are_counted() -> None:
    assert count([]) == "nothing"
    assert count([Said(True, "dead"), Said(False, "dead"), Said(False, "noise")]) == "1 error, 2 warnings"


def test_the_summary_counts_words_and_blamed_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, *_ in verdicts.list_cases()]
    monkeypatch.setattr(verdicts, "TOOLS", {"one": None})
    answers = ["2 errors, 1 warning" if name in HEALTHY else "right (+1)" for name in names]
    answers[:3], answers[-2:] = ["1 warning", "nothing", "crash: 1 error"], ["wrong: dead", "crash: oh"]
    (row,) = verdicts.summary(pd.DataFrame({"one": answers})).to_dict("records")
    planted = sum(name in FAULTS for name in names)
    assert row[f"right of {planted}"] == planted - 2 and (row["wrong"], row["crash"], row["nothing"]) == (1, 1, 0)
    healthy = len(names) - planted
    counts = [row[name] for name in (f"healthy: nothing of {healthy}", "warnings", "errors", "crashes")]
    assert counts == [1, 1, healthy - 3, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_that_is_installed_sees_nan_and_none_in_a_healthy_network(tool: str, monkeypatch, capsys) -> None:
    """But torchmortem, which calls a nan vanishing."""
    if tool not in ("hooks", "anomaly mode") and importlib.util.find_spec(tool.replace("-", "_")) is None:
        pytest.skip(f"{tool} is not installed")
    for build, found in ((FAULTS["one layer nan"], tool != "torchmortem"), (HEALTHY["lecun tanh"], False)):
        torch.manual_seed(0)
        case = build(3, 16)
        said = TOOLS[tool](case.model, case.x, torch.randn(64, 10))
        assert ("non-finite" in {one.kind for one in said}) == found


def test_a_tool_that_is_absent_and_one_that_fails_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "list_cases", lambda: [("kaiming", 3, 8), ("bias -50", 3, 8)])
    monkeypatch.setitem(TOOLS, "hooks", lambda *given: 1 / 0)
    monkeypatch.setitem(TOOLS, "no such package", TOOLS["initlab"])
    try:
        assert verdicts.ask("no such package") == ["not installed"] * 2
        assert verdicts.ask("hooks") == ["crash: ZeroDivisionError: division by zero"] * 2
    finally:
        verdicts.logging.disable(verdicts.logging.NOTSET)
