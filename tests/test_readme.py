"""What the README and its pages promise is what there is."""

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


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_two_commands_and_the_checks_take_the_second_from_here() -> None:
    commands = re.findall(r"^python3 -m venv .*$", text(), re.M)
    assert len(commands) == 2
    assert commands[0].endswith("-m initlab init=kaiming") and commands[1].endswith("-m pytest -n 2")
    assert all("-c constraints.txt" in command for command in commands)
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def table_rows() -> dict[str, str]:
    """The table of options: what stands in its first column, in code, and what in its second."""
    part = read("docs/options.md")
    part = part[: part.index("Exit codes:")]
    rows = (line.split("|")[1:3] for line in part.splitlines() if line.startswith("| `"))
    return {name: values for names, values in rows for name in full_names(names)}


def full_names(cell: str) -> list[str]:
    """`train.depth`, `.width` -> train.depth, train.width."""
    found: list[str] = []
    for name in re.findall(r"`([^`]+)`", cell):
        found.append(found[0].rpartition(".")[0] + name if name.startswith(".") else name)
    return found


def test_every_option_has_its_row_and_every_rule_and_activation_its_name() -> None:
    rows = table_rows()
    hidden = {"data.url", "data.root", "data.download"}  # explained in the row of `data`
    for option in option_names():
        shown = option.removesuffix(".name")
        holds_others = any(other.startswith(f"{shown}.") for other in option_names())
        deeper = shown.startswith(("phase.", "sweep."))  # the axes have a section
        assert shown in rows or shown in hidden or holds_others or deeper, option
    assert set(RULES) <= set(re.findall(r"`(\w+)`", rows["init"]))
    assert set(re.findall(r"`(\w+)`", rows["activation"])) <= set(ACTIVATIONS)


def test_every_statistic_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", read("docs/glossary.md")))
    assert set(STATISTICS) - explained <= {"count", "mean", "norm", "min", "max"}  # these explain themselves


def test_tested_versions_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "\ntorch==2.13.0\n" in pins and "\nhydra-core==1.3" in pins


PAGES = ("design", "model", "runs", "theory", "probe", "ladders", "reliability", "gpu", "options", "glossary")
PROSE = ("README.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in PAGES))


def sentences(path: Path) -> list[str]:
    """Sentences of a page, without code, tables and pictures."""
    page = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    page = "\n".join(line for line in page.splitlines() if not line.startswith(("|", "![", "<!--")))
    paragraphs = re.split(r"\n\s*\n|\n(?=[-*] )|\n(?=#)", re.sub(r"`[^`]*`", "CODE", page))
    plain = (" ".join(re.sub(r"\]\([^)]*\)", "]", paragraph).split()) for paragraph in paragraphs)
    return [one for paragraph in plain for one in re.split(r"(?<=[.!?:;])\s+(?=[A-Z*\"\[])", paragraph) if one]


@pytest.mark.parametrize("name", PROSE)
def test_sentences_are_short(name: str) -> None:
    """At most 30 words in 19 sentences of 20."""
    found = sentences(ROOT / name)
    long = [one for one in found if len(one.split()) > 30]
    assert len(long) <= len(found) / 20, long
