"""What is wrong with a network: findings with layer, cause and remedy, and the verdict that they make together."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from initlab.terminal import as_plain
from initlab.verdict.rules import ERROR, list_rules


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, where it starts, why, and what to change.

    rule: its row in the table of rules, such as `vanishing`. severity: `error` or `warning`. layer: its number in the
    frame of `measure`, 0 for the input, -1 where it is none. name: the dotted name of the module or parameter. tensor,
    direction: as in the frame. since: the training step at which it was seen first. cause, remedy: plain sentences.
    evidence: the numbers behind them. factors: what the remedy multiplies parameters by, by their dotted names; `input`
    and `lr` stand for the batch and the learning rate, `param_groups[1].lr` for that of one group. redraw: the
    parameters that the remedy draws anew.
    detail: further numbers in words, for a second line.
    """

    rule: str
    severity: str
    layer: int
    name: str
    tensor: str
    direction: str
    cause: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    since: int = 0
    factors: Mapping[str, float] = field(default_factory=dict)
    redraw: tuple[str, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        where = f"layer {self.layer}" if self.layer > 0 else "the input" if self.layer == 0 else ""
        place = " ".join(filter(None, [where, f"({self.name})" if self.name else ""]))
        line = f"{self.rule}{f' at {place}' if place else ''}: {self.cause}. Remedy: {self.remedy}."
        return f"{line}\n  {self.detail}" if self.detail else line


@dataclass(frozen=True)
class Verdict:
    """What was found, errors first; `print` gives it in words.

    findings: none if the network is healthy. n_layers: how many layers were looked at. frame: the measured rows, as
    `initlab.measure` gives them. draw_bands: what gives `bands`; a copy in a file has none.

    >>> verdict = Verdict((), 3, pd.DataFrame())
    >>> verdict.ok, str(verdict)
    (True, 'healthy: nothing found in 3 layers.')
    """

    findings: tuple[Finding, ...]
    n_layers: int
    frame: pd.DataFrame = field(repr=False)
    draw_bands: Callable[[], pd.DataFrame] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "draw_bands": None}

    @property
    def bands(self) -> pd.DataFrame:
        """What 95 % of 16 networks of this architecture under the right rule have; `initlab.plot(verdict)` shows them.

        They are drawn and measured when they are asked for, unless a rule has already; empty where there is no model.
        """
        return self.draw_bands() if self.draw_bands is not None else pd.DataFrame()

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return all(one.severity != ERROR for one in self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(one for one in self.findings if one.severity == ERROR)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return f"healthy: nothing found in {self.n_layers} layers."
        head = "" if not self.ok else f"healthy, with {len(self.findings)} to know about:\n"
        return head + "\n".join(str(one) for one in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """A row per finding."""
        columns = ["rule", "severity", "layer", "name", "tensor", "direction", "since", "cause", "remedy"]
        return pd.DataFrame([{key: getattr(one, key) for key in columns} for one in self.findings], columns=columns)

    @property
    def rules(self) -> pd.DataFrame:
        """The table of rules that findings refer to by `id`: a row for each threshold, with its unit and source."""
        return list_rules()

    @property
    def json(self) -> str:
        """The findings as JSON; what is not finite stands as a text."""
        found = [{key: as_plain(value) for key, value in asdict(one).items()} for one in self.findings]
        return json.dumps({"ok": self.ok, "layers": self.n_layers, "findings": found}, indent=1)

    def _repr_html_(self) -> str:
        if not self.findings:
            import html

            return f"<p>{html.escape(str(self))}</p>"
        return str(self.table.to_html(index=False, escape=True))
