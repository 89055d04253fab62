"""The configurations of a sweep's jobs, composed once and changed from job to job.

Hydra composes every job anew, twice, and writes it out anew: about 150 ms. Here Hydra composes what jobs share, a
pattern; a job's simple overrides (`seed=3`) are applied to it as Hydra applies them, and a choice from a group
(`init=naive`) is composed once and carried over as the values that it sets. Whatever is not simple, Hydra composes.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from initlab.errors import UsageError
from initlab.job.options import leaves, option_names, typed
from initlab.job.settings import Config

KEPT = 64  # patterns at a time
_OPTIONS = frozenset(option_names())
_SCALARS = (bool, int, float, str, type(None))
# Where hydra.yaml differs between the jobs of a pattern, and what stands there until a job is known.
_VARYING: dict[str, Any] = {
    "overrides.task": ["@overrides@"],
    "job.override_dirname": "@dirname@",
    "job.id": "@id@",
    "job.num": -987654321,
    "runtime.output_dir": "@output_dir@",
}


class Composed(NamedTuple):
    """A job's configuration: typed (or why it cannot be), the choices from groups, its folder, its files by name.

    `alone`: something in it concerns the whole process, and Hydra itself must run the job.
    """

    typed: Config | UsageError
    choices: dict[str, str | None]
    folder: Path
    files: dict[str, str]
    job_logging: dict[str, Any]
    alone: bool


class _Change(NamedTuple):
    key: str
    value: Any


class _Unusual(Exception):
    """A change that is not simple after all."""


class Composer:
    """Makes the configurations of a sweep's jobs out of what Hydra's loader makes of a few of them."""

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._patterns: dict[tuple[str, ...], _Pattern] = {}
        self._choices: dict[tuple[tuple[str, ...], str], list[_Change] | None] = {}

    def check(self, overrides: Sequence[str]) -> None:
        """Whether a job can be composed. Errors: those of Hydra."""
        self._changed(overrides)

    def of_its_own(self, overrides: Sequence[str], number: int) -> DictConfig:
        """A job's configuration, to keep."""
        pattern = self._changed(overrides)
        pattern.numbered(number)
        return copy.deepcopy(pattern.config)

    def compose(self, overrides: Sequence[str], number: int) -> Composed:
        """Everything about a job of this number that does not depend on what it measures."""
        pattern = self._changed(overrides)
        pattern.numbered(number)
        return pattern.composed()

    def _changed(self, overrides: Sequence[str]) -> "_Pattern":
        try:
            rest, choices, values = self._split(overrides)
            changes = [change for choice in choices for change in self._choices[rest, choice] or ()]
            pattern = self._pattern(rest)
            groups = dict(choice.split("=", 1) for choice in choices)
            pattern.change([*changes, *values], groups)
        except (_Unusual, HydraException, OmegaConfBaseException):
            pattern = self._pattern(tuple(overrides))  # and if it is a mistake, Hydra says so
            pattern.change([], {})
        parsed = [self._parse(one) for one in overrides]
        pattern.overridden([one for one in parsed if not one.is_hydra_override()])
        return pattern

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = self._parser.parse_override(text)
        return self._parsed[text]

    def _pattern(self, overrides: tuple[str, ...]) -> "_Pattern":
        found = self._patterns.pop(overrides, None)
        if found is None:
            found = _Pattern(self._loader.load_sweep_config(self._master, list(overrides)))
            while len(self._patterns) >= KEPT:
                del self._patterns[next(iter(self._patterns))]
        self._patterns[overrides] = found  # the last used stands last
        return found

    def _split(self, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str], list[_Change]]:
        """What Hydra must compose, the choices that only set values of their own group, and simple values in order."""
        choices: list[str] = []
        values: list[_Change] = []
        rest: list[str] = []
        for text in overrides:
            one = self._parse(text)
            plain = one.type is OverrideType.CHANGE and one.package is None and one.value_type is ValueType.ELEMENT
            value = one.value() if plain else None
            if not plain or "${" in text or not isinstance(value, _SCALARS):
                rest.append(text)
            elif self._loader.repository.group_exists(one.key_or_group):
                (choices if isinstance(value, str) and text == f"{one.key_or_group}={value}" else rest).append(text)
            elif one.key_or_group in _OPTIONS:
                values.append(_Change(one.key_or_group, value))
            else:
                rest.append(text)
        groups = [choice.split("=")[0] for choice in choices]
        if len(set(groups)) < len(groups):
            raise _Unusual
        touched = {self._parse(text).key_or_group for text in rest}
        if any(_overlap(key, change.key) for key in touched for change in values):
            raise _Unusual
        for choice in list(choices):  # in a pattern of its own where it reaches beyond its group
            if self._carried(tuple(rest), choice) is None:
                choices.remove(choice)
                rest.append(choice)
        for choice in choices:
            if self._carried(tuple(rest), choice) is None:
                raise _Unusual
        return tuple(rest), choices, values

    def _carried(self, rest: tuple[str, ...], choice: str) -> list[_Change] | None:
        """What a choice changes in the pattern of `rest`; None where that is more than values of its own group."""
        if (rest, choice) not in self._choices:
            self._choices[rest, choice] = self._difference(rest, choice)
        return self._choices[rest, choice]

    def _difference(self, rest: tuple[str, ...], choice: str) -> list[_Change] | None:
        group, _, name = choice.partition("=")
        source = self._loader.repository.load_config(f"{group}/{name}")
        if source is not None and "${" in str(source.defaults_list):
            return None
        pattern = self._pattern(rest)
        pattern.change([], {})
        before, after = (dict(leaves(_plain(one))) for one in (pattern.config, self._loaded(rest, choice)))
        mine = f"{group.replace('/', '.')}."
        told = (f"hydra.runtime.choices.{group}", *(f"hydra.{name}" for name in _VARYING))
        if set(before) != set(after):
            return None
        differ = [key for key in after if after[key] != before[key] or type(after[key]) is not type(before[key])]
        differ = [key for key in differ if not key.startswith(told)]
        simple = all(key.startswith(mine) and isinstance(after[key], _SCALARS) for key in differ)
        return [_Change(key, after[key]) for key in differ] if simple else None

    def _loaded(self, rest: tuple[str, ...], choice: str) -> DictConfig:
        found: DictConfig = self._loader.load_sweep_config(self._master, [*rest, choice])
        return found


class _Pattern:
    """What Hydra composed from the overrides that jobs share, as it was and as it now is."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        for name, value in _VARYING.items():
            self._in_hydra(name, value)
        self._task, self._hydra = _task_text(config), _hydra_text(config)
        self._choices: dict[str, str | None] = dict(config.hydra.runtime.choices)
        self._resolves = "${" in self._task
        try:
            self._typed: Config | UsageError = typed(_without_hydra(config))
        except UsageError as error:
            self._typed = error
        hydra = config.hydra
        whole = hydra.job.chdir or hydra.job.env_set or hydra.output_subdir is None or len(hydra.callbacks) > 1
        self._alone = bool(whole) or "${hydra:" in self._hydra + self._task
        self._original: dict[str, Any] = {}
        self._steps: list[tuple[str, Any, Any]] = []  # key, value before, value after
        self._groups: dict[str, str] = {}
        self._overrides: list[str | None] = []

    def _in_hydra(self, name: str, value: Any) -> None:
        with open_dict(self.config.hydra):
            OmegaConf.update(self.config.hydra, name, value, merge=False)

    def change(self, changes: Sequence[_Change], groups: Mapping[str, str]) -> None:
        """The pattern as it was, with these changes. Errors: of OmegaConf, about a value that does not fit."""
        for key, value in self._original.items():
            OmegaConf.update(self.config, key, value, merge=True)
        for group in self._groups:
            self._in_hydra(f"runtime.choices.{group}", self._choices[group])
        self._original, self._steps, self._groups = {}, [], dict(groups)
        for key, value in changes:
            before = OmegaConf.select(self.config, key)
            if not isinstance(before, _SCALARS):
                raise _Unusual
            self._original.setdefault(key, before)
            OmegaConf.update(self.config, key, value, merge=True)
            self._steps.append((key, before, OmegaConf.select(self.config, key)))
        for group, choice in groups.items():
            self._in_hydra(f"runtime.choices.{group}", choice)

    def overridden(self, overrides: Sequence[Override]) -> None:
        self._overrides = [one.input_line for one in overrides]
        self._in_hydra("overrides.task", self._overrides)
        how = self.config.hydra.job.config.override_dirname
        self._in_hydra(
            "job.override_dirname",
            get_overrides_dirname(list(overrides), list(how.exclude_keys), how.item_sep, how.kv_sep),
        )

    def numbered(self, number: int) -> None:
        """Which job of the sweep it is, and the folder that follows from it."""
        self._in_hydra("job.id", number)
        self._in_hydra("job.num", number)
        place = Path(str(self.config.hydra.sweep.dir), str(self.config.hydra.sweep.subdir))
        self._in_hydra("runtime.output_dir", os.path.abspath(place))  # noqa: PTH100 - as Hydra does, links not resolved

    def composed(self) -> Composed:
        hydra = self.config.hydra
        folder = Path(hydra.runtime.output_dir)
        task, about = self._texts()
        overrides = OmegaConf.to_yaml(hydra.overrides.task)
        files = {"config.yaml": task, "hydra.yaml": about, "overrides.yaml": overrides}
        logging: dict[str, Any] = OmegaConf.to_container(hydra.job_logging, resolve=True)  # type: ignore[assignment]
        choices = self._choices | self._groups
        return Composed(self._as_typed(), choices, folder, files, logging, self._alone)

    def _texts(self) -> tuple[str, str]:
        """config.yaml and hydra.yaml: what differs is replaced in the pattern's own, where it stands there once."""
        if "${" in str(self._overrides):  # read, it would be what it refers to
            return _task_text(self.config), _hydra_text(self.config)
        now = {name: OmegaConf.to_container(self.config.hydra[a][b]) if b == "task" else self.config.hydra[a][b]
               for name in _VARYING for a, b in [name.split(".")]}  # fmt: skip
        steps = [(f"hydra.{name}", value, now[name]) for name, value in _VARYING.items()]
        steps += [(f"hydra.runtime.choices.{name}", self._choices[name], new) for name, new in self._groups.items()]
        task, hydra = _replaced(self._task, self._steps), _replaced(self._hydra, steps)
        return task or _task_text(self.config), hydra or _hydra_text(self.config)

    def _as_typed(self) -> Config | UsageError:
        if self._resolves or isinstance(self._typed, UsageError):
            try:
                return typed(_without_hydra(self.config))
            except UsageError as error:
                return error
        found = copy.deepcopy(self._typed)
        for key, _, value in self._steps:
            *path, name = key.split(".")
            place: Any = found
            for part in path:
                place = getattr(place, part)
            setattr(place, name, value)
        return found


def _overlap(a: str, b: str) -> bool:
    """Whether one key is the other, or stands inside it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _task_text(config: DictConfig) -> str:
    return OmegaConf.to_yaml(_without_hydra(config))


def _hydra_text(config: DictConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.masked_copy(config, "hydra"))


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, enum_to_str=True)  # type: ignore[return-value]


def _replaced(text: str, steps: Sequence[tuple[str, Any, Any]]) -> str | None:
    """The text of a tree with the value of each key replaced; None where a line to be replaced is not the only one."""
    text = f"\n{text}"
    for key, before, after in steps:
        old, new = (f"\n{_lines(key, value)}" for value in (before, after))
        if text.count(old) != 1:
            return None
        text = text.replace(old, new)
    return text[1:]


def _lines(key: str, value: Any) -> str:
    """How a value stands in the text of a tree: its own lines, at its depth."""
    known = isinstance(value, _SCALARS)
    return _scalar_lines(key, value, type(value).__name__) if known else _value_lines(key, value)


def _value_lines(key: str, value: Any) -> str:
    path = key.split(".")
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    text = yaml.dump(tree, default_flow_style=False, allow_unicode=True, Dumper=get_omega_conf_dumper())
    return "".join(text.splitlines(keepends=True)[len(path) - 1 :])


@lru_cache(maxsize=1024)
def _scalar_lines(key: str, value: Any, kind: str) -> str:
    """`kind` tells 1 from 1.0 and True, which are equal."""
    return _value_lines(key, value)
