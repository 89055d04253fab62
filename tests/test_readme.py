"""What the README promises is what there is."""

import re
from pathlib import Path

import pytest

import initlab
from initlab.job.options import option_names
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES
from initlab.stats.statistics import STATISTICS

ROOT = Path(initlab.__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README stands in the repository")


def text() -> str:
    return README.read_text(encoding="utf-8")


def test_two_commands_and_the_checks_take_the_second_from_here() -> None:
    commands = re.findall(r"^python3 -m venv .*$", text(), re.M)
    assert len(commands) == 2
    assert commands[0].endswith("-m initlab init=kaiming") and commands[1].endswith("-m pytest -n 2")
    assert all("-c constraints.txt" in command for command in commands)
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_option_rule_and_activation_is_named() -> None:
    said = text()
    for name in [*RULES, *ACTIVATIONS]:
        assert f"`{name}`" in said
    for option in option_names():
        if not option.endswith(".name") and option != "data.url":
            assert option.split(".")[-1] in said, option


def test_every_statistic_is_explained() -> None:
    left = [name for name in STATISTICS if f"`{name}`" not in text()]
    assert left == ["count", "mean", "norm", "min", "max"]  # these explain themselves


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target


def test_tested_versions_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "\ntorch==2.13.0\n" in pins and "\nhydra-core==1.3" in pins
