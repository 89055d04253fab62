"""Run folders: where they lie, how their runs ended, what was set for them."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from initlab import files
from initlab.errors import UsageError, as_several, show
from initlab.runs.lock import is_locked

Paths = str | Path | Iterable[str | Path]
SCALAR = (str, int, float, type(None))
# What run.json may hold where others read it; the rest is for people.
RUN_JSON: files.Form = {
    "status": lambda value: isinstance(value, str) and len(value) < 80,
    "columns": {...: SCALAR},
    "overrides": [str],
    "seeds": [int],
    "versions": {...: SCALAR},
    "git_revision": SCALAR,
    "schema_version": int,
    "notes": [str],
    "device": SCALAR,
}


def path_text(path: Path) -> str:
    """Relative where the path lies below the working folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


class Folder(NamedTuple):
    """A folder with what lies in it and in its `parts`."""

    path: str
    files: frozenset[str]
    parts: tuple[str, ...]

    def shards(self, table: str) -> list[str]:
        """The files of a table: the whole one, or of an unfinished run its parts."""
        if f"{table}.parquet" in self.files:
            return [os.path.join(self.path, f"{table}.parquet")]  # noqa: PTH118 (a Path costs ten times as much)
        front = f"{table}-"
        return [os.path.join(self.path, "parts", name) for name in self.parts if name.startswith(front)]  # noqa: PTH118


def list_paths(paths: Paths) -> list[str]:
    """One path, or any number of them, as a list; a UsageError for what is neither, or names nothing."""
    found = []
    for path in as_several(paths, str | Path):
        if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
            raise UsageError(f"{show(path)}: must be a folder or a glob, or a list of them")
        found.append(str(path))
    return found


def find_folders(paths: Paths) -> list[Folder]:
    """Folders that hold a run, or what is left of one, at or below the given paths or globs; sorted, each once."""
    folders: dict[str, Folder] = {}
    seen: set[str] = set()
    for path in list_paths(paths):
        front = path.removesuffix("**").rstrip("/") or "."
        if os.path.isdir(path):  # noqa: PTH112 (a Path raises where a name is too long)
            tops = [str(Path(path))]
        elif path.endswith("/**") and os.path.isdir(front):  # noqa: PTH112  # walked once, not once from each folder in it
            tops = [str(Path(front))]
        else:
            matches = glob.glob(path, recursive=True)
            tops = [match if os.path.isdir(match) else os.path.dirname(match) or "." for match in matches]  # noqa: PTH112, PTH120
        for top in tops:
            for here, inner, names in os.walk(top):
                if here in seen:
                    inner.clear()
                    continue
                seen.add(here)
                parts = sorted(part.name for part in Path(here, "parts").glob("*.parquet")) if "parts" in inner else []
                inner[:] = [name for name in inner if name not in ("parts", ".hydra")]
                if parts or any(name == "run.json" or name.endswith(".parquet") for name in names):
                    name = here.removeprefix("./")
                    folders[name] = Folder(name, frozenset(names), tuple(parts))
    return [folders[path] for path in sorted(folders, key=lambda path: path.replace(os.sep, chr(0)))]


def read_run_json(folder: Path | str) -> dict[str, Any]:
    """What run.json says, or a status that says that it cannot be read; `killed` where nobody is running any more."""
    path = os.path.join(folder, "run.json")  # noqa: PTH118
    if not os.path.lexists(path):
        return {"status": "without a run.json"}
    try:
        found = {"status": "without a status", **files.read_json(path, RUN_JSON)}
        return {**found, "status": "killed"} if found["status"] == "running" and not is_locked(folder) else found
    except UsageError as error:
        return {"status": f"of unknown status (run.json {str(error).removeprefix(f'{path}: ')})"}


def read_settings(folder: Path | str, run_json: Mapping[str, Any]) -> dict[str, Any]:
    """What was set on the command line for a run: {"train.modules": "vmap", ...}, numbers and truth values as such."""
    given = run_json.get("overrides")
    given = read_overrides(Path(folder)) if given is None else given
    pairs = (text.lstrip("+").partition("=") for text in given if "=" in text and not text.startswith("~"))
    return {key: _parse(value) for key, _, value in pairs}


def read_overrides(folder: Path) -> list[str]:
    """The lines that Hydra keeps: a list of YAML, an override a line. Being resumed is no setting of a run."""
    try:
        lines = files.read_bytes(folder / ".hydra" / "overrides.yaml", files.LARGEST_YAML).decode().splitlines()
    except (UsageError, UnicodeDecodeError):
        return []
    texts = (line[2:].strip() for line in lines if line.startswith("- "))
    texts = (text for text in texts if not text.lstrip("'+").startswith("resume="))
    return [text[1:-1].replace("''", "'") if text[:1] == text[-1:] == "'" else text for text in texts]


def _parse(text: str) -> Any:
    """A number or a truth value where the text is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def differing_keys(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that were not set to the same value in all runs."""
    keys = dict.fromkeys(key for one in every for key in one)
    return [key for key in keys if len({repr(one.get(key)) for one in every}) > 1]


def list_folders(paths: Sequence[str]) -> str:
    """Folders by name, those of one sweep together: 'outputs/a: 3, 17; outputs/b'."""
    by_parent: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(os.sep)
        by_parent.setdefault(parent, []).append(name)
    shown = []
    for parent, names in by_parent.items():
        ordered = sorted(names, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        shown.append(f"{parent}: {', '.join(ordered)}" if len(names) > 1 else os.path.join(parent, names[0]))  # noqa: PTH118
    return "; ".join(shown)
