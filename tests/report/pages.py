"""Folders of runs whose pages are looked at, made once for all tests of this folder; and what reads HTML."""

import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from initlab.__main__ import main

SMALL = ("width=20", "batch=10", "seeds=3", "train.width=8", "train.steps=12", "train.batch=16")
COMMANDS = {
    "healthy": ("depth=12", "histograms=true"),
    "diverged": ("depth=4", "train.depth=3", "train.lr=1e4", "train.steps=30"),
    "axes": ("depth=5", "sweep.init=[naive,kaiming]", "sweep.gain=[1,3]"),
    "sweep": ("-m", "depth=36", "init=naive,small,kaiming", "theory=closed"),  # float32 ends in the first two
}
VOID = {"meta", "link", "img", "input", "br", "hr"}


def make_run(folder: Path, name: str) -> None:
    """The folder `NAME` of one of the commands."""
    words = COMMANDS[name]
    small = (one for one in SMALL if one.partition("=")[0] not in " ".join(words))
    where = f"hydra.{'sweep' if '-m' in words else 'run'}.dir={name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["initlab", *words, *small, where])
        assert main() == 0


class Reader(HTMLParser):
    """What a page holds: its elements, ids, links to elsewhere, texts; an element that is not closed fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.inside.setdefault(where, []).append(data)
        if where not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> Counter[str]:
        return Counter(str(about["id"]) for _, about in self.elements if "id" in about)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [about for name, about in self.elements if name == tag]
