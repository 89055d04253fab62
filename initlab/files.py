"""The one door for files that may come from anybody: a value of the form that was asked for, or one line on the file.

What lies in a folder may be damaged, of another program, or made to do harm. So nothing but a regular file is opened,
nothing is allocated that its size does not warrant, and no text brings control characters along. Errors: `UsageError`.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from initlab.errors import UsageError, printable

SMALL = 2**22  # bytes: what a file of this size holds must fit in the memory of any machine
LARGEST_TEXT = 2**26  # bytes of a JSON file: a million seeds stand in 16 MB
LARGEST_YAML = 2**21
NODES, DEPTH, LONGEST = 100_000, 40, 4_000  # of a YAML file: values with what aliases repeat, nesting, one plain word

# The form of a value: a type, several of them, [form of every item], {key: form}, where `...` stands for every other
# key, or a function that says whether the value is right.
Form: TypeAlias = type | tuple[Any, ...] | list[Any] | Mapping[Any, Any] | Callable[[Any], bool]


def check_file(path: Path | str, most: float = float("inf")) -> int:
    """Its bytes, if it is a regular file of at most `most`; anything else at its place is refused and never opened."""
    try:
        found = os.stat(path)  # noqa: PTH116 (a Path costs ten times as much)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path}: cannot be read (is a folder, device or pipe, not a file)")
    if found.st_size > most:
        raise UsageError(f"{path}: cannot be read (has {found.st_size:,} bytes, at most {most:,.0f} are read)")
    return found.st_size


def read_bytes(path: Path | str, most: float = LARGEST_TEXT) -> bytes:
    """All of a regular file of at most `most` bytes."""
    check_file(path, most)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def read_gz(path: Path, most: int) -> bytes:
    """All that a file holds, once gzip has unpacked it; more than `most` bytes are refused, and never unpacked."""
    check_file(path)
    try:
        with gzip.open(path) as file:
            raw = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if len(raw) > most:
        raise UsageError(f"{path}: cannot be read (unpacks to more than {most:,} bytes)")
    return raw


def read_json(path: Path | str, form: Form = dict) -> Any:
    """The value of a JSON file; its texts without control characters."""
    raw = read_bytes(path)
    try:
        value = json.loads(raw)
        if not raw.isascii() or b"\\" in raw or b"\x7f" in raw:
            value = _clean(value)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({type(error).__name__}: not JSON)") from error
    return _check_form(path, value, form)


def read_yaml(path: Path | str, form: Form = dict) -> Any:
    """The value of a YAML file; its texts without control characters."""
    import yaml

    try:
        value = _clean(yaml.load(read_yaml_text(path), yaml.CSafeLoader))
    except UsageError:
        raise
    except Exception as error:  # a date may have no month, a key may be a list
        raise UsageError(f"{path}: cannot be read ({type(error).__name__}: not YAML)") from error
    return _check_form(path, value, form)


def read_yaml_text(path: Path | str) -> str:
    """The text of a YAML file that is small, flat and short also with all that its aliases repeat."""
    import yaml

    raw = read_bytes(path, LARGEST_YAML)
    nodes = 0
    sizes: dict[str, int] = {}  # nodes of what an anchor names
    begun: list[tuple[str | None, int]] = []  # of every collection that is open: its anchor, the nodes before it
    try:
        text = raw.decode("utf-8")
        for event in yaml.parse(text, yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent):
                nodes += sizes[event.anchor]  # a KeyError: it would hold itself
            elif isinstance(event, yaml.ScalarEvent):
                nodes += 1
                sizes |= {event.anchor: 1} if event.anchor else {}
                if event.implicit[0] and len(event.value) > LONGEST:
                    raise ValueError(f"a plain word of {len(event.value):,} characters")
            elif isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, nodes))
                nodes += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = begun.pop()
                sizes |= {anchor: nodes - before} if anchor else {}
            if nodes > NODES or len(begun) > DEPTH:
                raise ValueError(f"more than {NODES:,} values, or nested more than {DEPTH} deep")
    except (ValueError, KeyError, yaml.YAMLError) as error:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: not YAML"
        raise UsageError(f"{path}: cannot be read ({why})") from error
    return text


def _clean(value: Any) -> Any:
    """The same value; what a terminal would obey is spelt out in its texts."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value


def _check_form(path: Path | str, value: Any, form: Form) -> Any:
    wrong = find_misfit(value, form)
    if wrong is not None:
        raise UsageError(f"{path}: cannot be read ({wrong or 'the whole'} has another form)")
    return value


def find_misfit(value: Any, form: Form, name: str = "") -> str | None:
    """The place of the first thing in a value that is not of the form; None where all is."""
    if isinstance(form, list):
        parts = [(one, form[0], f"{name}[{k}]") for k, one in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(form, Mapping):
        parts = None
        if isinstance(value, dict):
            parts = [(one, form.get(key, form.get(...)), f"{name}.{key}".lstrip(".")) for key, one in value.items()]
    elif isinstance(form, type | tuple):
        return None if isinstance(value, form) else name
    else:
        return None if form(value) else name
    if parts is None:
        return name
    found = (find_misfit(one, inner, where) for one, inner, where in parts if inner is not None)
    return next((place for place in found if place is not None), None)
