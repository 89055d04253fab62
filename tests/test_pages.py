"""Every block of the README and of docs/ runs, in its order and in a clean folder, and prints what stands there.

Compared is line by line. Numbers may differ by 2 %, and below 1e-5 by more: they are roundings. `...` stands for lines
that are left out; names of folders with a time in them are one name. Blocks behind `<!-- costs N s of CPU -->` are run
with `-m slow`. A block of `text` is an example of times or paths, and is not compared.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import initlab
from tests.long import long_except

ROOT = Path(initlab.__file__).parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("model", "runs", "theory", "probe", "ladders")))
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the pages stand in the repository")
NEAR, ROUNDING = 0.02, 1e-5
CHEAP = 10  # seconds of CPU
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")
STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d+")


class Block(NamedTuple):
    """A block of code: its language, its text, and what it costs in seconds of CPU."""

    language: str
    text: str
    costs: float


def find_blocks(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    pattern = r"(?:^<!-- costs (\d+) s of CPU -->\n\n)?^```(\w*)\n(.*?)^```$"
    return [
        Block(language, text, float(costs or 0)) for costs, language, text in re.findall(pattern, page, re.M | re.S)
    ]


def same_line(wanted: str, found: str) -> bool:
    """Whether two lines are equal but for blanks, times in names, and the last digits of numbers."""
    wanted, found = (" ".join(STAMP.sub("TIME", line).split()) for line in (wanted, found))
    if NUMBER.sub("#", wanted) != NUMBER.sub("#", found):
        return False
    pairs = zip(
        *([float(one.replace(",", "")) for one in NUMBER.findall(line)] for line in (wanted, found)), strict=True
    )
    return all(abs(a - b) <= max(NEAR * abs(a), 0 if abs(a) > ROUNDING else ROUNDING) for a, b in pairs)


def explain_difference(wanted: str, found: str) -> str:
    """ "" where the output is what stands on the page, else the first line that is not."""
    lines, at, free = found.splitlines(), 0, False
    for line in (line for line in wanted.splitlines() if line.strip()):
        if line.strip() == "...":
            free = True
            continue
        while at < len(lines) and (not lines[at].strip() or (free and not same_line(line, lines[at]))):
            at += 1
        if at == len(lines) or not same_line(line, lines[at]):
            return f"the page: {line}\nprinted:  {lines[at] if at < len(lines) else '(nothing more)'}\n\n{found}"
        at, free = at + 1, False
    rest = [line for line in lines[at:] if line.strip()]
    return "" if free or not rest else f"printed, and not on the page: {rest[0]}"


def split_commands(text: str) -> list[tuple[list[str], str]]:
    """Words of each command after `$ python -m initlab`, and what it prints."""
    parts = re.split(r"^\$ ", text, flags=re.M)[1:]
    return [(shlex.split(one.split("\n", 1)[0]), one.split("\n", 1)[1]) for one in parts]


def run_page(name: str, lab: Callable[..., tuple[int, str, str]], most: float) -> int:
    """Run the blocks of a page that cost at most so much; how many were run."""
    names: dict[str, object] = {}
    printed, ran = "", 0
    for block in find_blocks((ROOT / name).read_text(encoding="utf-8")):
        if block.costs > most:
            continue
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, name, "exec"), names)  # the page's own code
            printed = out.getvalue()
        elif block.language == "console":
            for words, wanted in split_commands(block.text):
                assert words[:3] == ["python", "-m", "initlab"], words
                code, out_text, errors = lab(*words[3:])
                assert code in (0, 3), errors
                assert not (difference := explain_difference(wanted, out_text)), f"{' '.join(words)}\n{difference}"
        elif block.language == "yaml":
            path = Path(block.text.split("\n", 1)[0].removeprefix("# "))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif not block.language and not block.text.startswith("python3 -m venv"):
            assert not (difference := explain_difference(block.text, printed)), f"{name}\n{difference}"
        ran += block.language != "text"
    return ran


@pytest.mark.parametrize("name", long_except(PAGES, "README.md", "docs/model.md"))
def test_every_block_runs_and_prints_what_it_says(name: str, lab: Callable[..., tuple[int, str, str]]) -> None:
    assert run_page(name, lab, CHEAP) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if "costs" in (ROOT / name).read_text(encoding="utf-8")])
def test_every_block_that_costs_much_too(name: str, lab: Callable[..., tuple[int, str, str]]) -> None:
    assert run_page(name, lab, float("inf")) >= 2


def test_what_is_compared_and_what_is_not() -> None:
    assert not explain_difference("a 1.00\n...\nb 2.5e-07\n", "a  1.01\nx\ny\nb 9.9e-07\n")
    assert "not on the page" in explain_difference("a 1\n", "a 1\nb\n")
    assert "the page: a 1.00" in explain_difference("a 1.00\n", "a 1.05\n")
    assert "nothing more" in explain_difference("a\n...\nb\n", "a\nc\n")
    assert same_line("tables: outputs/2026-11-23_09-13-19.172649/x", "tables: outputs/2026-01-02_03-04-05.6/x")
    assert not same_line("layer 45", "layer 47") and not same_line("1,608 rows", "1,708 rows")


def test_the_first_screen_is_short() -> None:
    """A question, one picture, one command, and a block of at most three lines of code for each of three readers."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    first = page[: page.index("## Pages")]
    assert len([line for line in first.splitlines() if line.strip()]) <= 40 and len(page.splitlines()) < 90
    assert first.startswith("# initlab: where does the signal die?\n") and first.count("![") == 1
    assert page.index("![") < page.index("pip install") < page.index("print(initlab.diagnose")
    code = [block.text for block in find_blocks(first) if block.language == "python"]
    assert (
        first.count("**") == 6
        and len(code) == 2
        and all(len(one.replace("\n\n", "\n").splitlines()) == 3 for one in code)
    )


LINKED = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target
