"""The page of the course: its blocks run and print what they say, its commands end well, its links lead somewhere."""

import doctest
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import initlab

ROOT = Path(initlab.__file__).parents[1]
PAGE = ROOT / "docs" / "course.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the page stands in the repository")
SLOW = ("task=matmul", "task=backward")  # minutes; tests/test_cli.py runs them on smaller shapes


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_block_prints_what_it_says() -> None:
    """One session from the first block to the last; a block that is no session would not be run: there is none."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text(), re.M | re.S)
    assert all(block.startswith(">>> ") for block in blocks) and len(blocks) > 15
    session = doctest.DocTestParser().get_doctest("\n\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    found = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(session)
    assert found.attempted > 80 and not found.failed


def test_every_command_runs(lab: Callable[..., tuple[int, str, str]]) -> None:
    given = [shlex.split(one)[3:] for one in re.findall(r"python -m initlab [^`\n]+", text())]
    assert {words[0] for words in given} == {"task=broadcast", "task=explain", "task=graph", *SLOW}
    for words in given:
        if words[0] not in SLOW:
            code, out, errors = lab(*words)
            assert code == 0 and out, errors


def test_every_file_of_the_folder_is_in_the_reading_order_or_beside_it() -> None:
    named = set(re.findall(r"`(\w+\.py)`", text()))
    assert named == {path.name for path in (ROOT / "initlab" / "scratch").glob("*.py")} - {"__init__.py"}


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", text(), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    prose = re.sub(r"^```.*?^```$", "", text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = target.partition("#")
        assert (PAGE.parent / path).exists() if path else anchor in anchors, target
