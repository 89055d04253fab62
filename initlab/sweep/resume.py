"""What the folder of a sweep holds, and which jobs are left to do there; nothing is run or changed.

Jobs are the same when their overrides are; their numbers are only names of folders. A sweep may therefore be resumed
with more values than it was begun with, never with fewer or others.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from initlab import files
from initlab.errors import UsageError
from initlab.job.options import leaves
from initlab.runs.folders import read_run_json
from initlab.runs.lock import is_locked
from initlab.runs.parquet import check_seal
from initlab.runs.recorder import machine
from initlab.runs.schema import SEALED
from initlab.sweep.callback import parse_overrides

Job = Sequence[str]  # the overrides of one job
FREE = ("resume", "plots", "report", "expect", "study")  # what may differ: no number depends on it
_MAGIC = b"PAR1"  # how every whole parquet file ends


class BegunJob(NamedTuple):
    """A job that was begun in the folder."""

    folder: Path
    number: int
    overrides: Job
    done: bool
    code: str | None  # what made it: versions and revision


class Left(NamedTuple):
    """What is to be launched: the jobs, with the numbers that name their folders; and how many are kept."""

    jobs: Sequence[Job]
    numbers: Sequence[int]
    kept: int


def expand(arguments: Iterable[str], params: Mapping[str, Any] | None, loader: Any = None) -> list[list[str]]:
    """All jobs of a sweep: every combination of the values on the command line and in the study's `params`.

    loader: Hydra's, of configurations; with it `glob` is known.
    """
    axes: dict[str, list[str]] = {}  # the last word about an option counts
    for override in parse_overrides(arguments, params, loader):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not axes[key]:
                raise UsageError(f"{override.input_line}: has no values, the sweep is empty")
        else:
            raise UsageError(f"{override.input_line}: an interval has no end of values; use range, or list them")
    return [list(job) for job in product(*axes.values())]


def find_left(folder: Path, config: DictConfig, jobs: Sequence[Job], loader: Any) -> Left:
    """What of `jobs` is not done in the folder of a sweep; a UsageError if it is not the folder of this sweep.

    loader: Hydra's, of configurations, for what the sweep was begun with.
    """
    _refuse_other(folder, config, jobs, loader)
    runs = list(find_jobs(folder))
    running = [run for run in runs if is_locked(run.folder)]
    if running:
        raise UsageError(
            f"resume={folder}: {len(running)} of its jobs are at work, the first in {running[0].folder}; "
            "wait for their end or stop them"
        )
    by_overrides = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.done, -run.number)):  # the last is taken first: done, lowest number
        by_overrides[_key(run.overrides)].append(run)
    taken = {run.number for run in runs}
    free = (number for number in count() if number not in taken)
    found = [(job, matches.pop() if (matches := by_overrides[_key(job)]) else None) for job in jobs]
    unknown = [run for matches in by_overrides.values() for run in matches]
    if unknown:
        raise UsageError(f"resume={folder}: its job {_format_job(unknown[0].overrides)} is not in this sweep")
    todo = [(job, run.number if run else next(free)) for job, run in found if not (run and run.done)]
    todo.sort(key=lambda one: one[1])  # a launcher takes jobs together whose numbers have no gap
    return Left([job for job, _ in todo], [number for _, number in todo], len(jobs) - len(todo))


def refuse_no_sweep(folder: Path) -> None:
    """A UsageError where no sweep was begun; nothing is touched."""
    path = folder / "multirun.yaml"
    if not path.is_file():
        if not folder.is_dir():
            raise UsageError(f"resume={folder}: no such folder")
        above = [f"; that is {parent}" for parent in folder.absolute().parents[:3] if (parent / path.name).is_file()]
        raise UsageError(f"resume={folder}: not the folder of a sweep{''.join(above[:1])}")


def describe_other_code(folder: Path) -> str | None:
    """A line if jobs that are kept were made by another version of the code than this one."""
    done = [run for run in find_jobs(folder) if run.done]
    now = _code(machine())
    others = sorted({run.code or "an unknown version" for run in done} - {now})
    if not others:
        return None
    number = sum(run.code != now for run in done)
    return (
        f"{folder}: {number} of its {len(done)} jobs that are kept were made by {' and '.join(others)}, this is {now}"
    )


def _refuse_other(folder: Path, config: DictConfig, jobs: Sequence[Job], loader: Any) -> None:
    """The command must make every job that the sweep was begun with, from the same configuration."""
    path = folder / "multirun.yaml"
    try:
        begun: Any = OmegaConf.create(files.read_yaml_text(path))
        if not isinstance(begun, DictConfig) or "task" not in begun:
            raise UsageError(f"resume={folder}: not a sweep of initlab's")
        before = expand(begun.hydra.overrides.task, begun.hydra.sweeper.get("params"), loader)
        then, now = begun.hydra.job.config_name, config.hydra.job.config_name
    except UsageError:
        raise
    except Exception as error:  # any file may bear this name
        raise UsageError(f"{path}: cannot be read ({type(error).__name__})") from error
    if then != now:
        raise UsageError(f"resume={folder}: a sweep of `{then}`, and this is `{now}`")
    keys = {_key(job) for job in jobs}
    missing = [job for job in before if _key(job) not in keys]
    if missing:
        raise UsageError(
            f"resume={folder}: {len(missing)} of its {len(before)} jobs are not in this sweep, the first is "
            f"{_format_job(missing[0])}; resume with the command that it was begun with"
        )
    varied = {word.lstrip("+~").partition("=")[0].partition("@")[0] for job in (*before, *jobs) for word in job}
    options: list[dict[str, Any]] = []  # every one by its dotted name, without Hydra's own
    for one in (begun, config):
        plain: Any = OmegaConf.to_container(one, resolve=False)
        options.append(dict(leaves({key: value for key, value in plain.items() if key != "hydra"})))
    for name in sorted({*options[0], *options[1]}):
        was, is_now = (values.get(name, "not there") for values in options)
        if was != is_now and not any(f"{name}.".startswith(f"{key}.") for key in {*varied, *FREE}):
            raise UsageError(f"resume={folder}: {name} was {was} there and is {is_now} now")


def find_jobs(folder: Path) -> Iterator[BegunJob]:
    """Every job that was begun: folders in which Hydra wrote overrides. What lies inside of one is not walked."""
    for here, folders, names in os.walk(folder):
        if ".hydra" not in folders:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            continue
        folders.clear()
        path = Path(here)
        for name in ("initlab.log", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"):
            if os.path.lexists(path / name) and not (path / name).is_file():  # Hydra would write there, and wait
                raise UsageError(f"{path / name}: is not a file; take it away before the sweep is resumed")
        try:
            overrides = files.read_yaml(path / ".hydra" / "overrides.yaml", [str])
            number = re.search(r"^    num: (\d{1,9})$", files.read_yaml_text(path / ".hydra" / "hydra.yaml"), re.M)
        except UsageError:
            continue  # killed before it began: no table can be there
        if number is None:
            continue
        run_json = read_run_json(path)
        sealed = run_json.get("schema_version", 0) >= SEALED
        tables = [path / name for name in names if name.endswith(".parquet")]
        tables += (path / "parts").glob("*.parquet")
        done = run_json["status"] == "done" and bool(tables) and all(_is_whole(table, sealed) for table in tables)
        yield BegunJob(path, int(number[1]), overrides, done, _code(run_json))


def _is_whole(path: Path, sealed: bool) -> bool:
    """A file that was damaged is no table; one of an older version must at least have its end."""
    try:
        if check_seal(path, needed=sealed):
            return True
        with path.open("rb") as file:
            file.seek(max(0, files.check_file(path) - len(_MAGIC)))
            return file.read() == _MAGIC
    except (OSError, UsageError):
        return False


def _code(run_json: Mapping[str, Any]) -> str | None:
    """The version of the code that a run was made with, in words; None where it is not known."""
    try:
        versions, revision = run_json["versions"], run_json.get("git_revision")
        at = f" at {revision[:12]}{'+' if revision.endswith('+') else ''}" if revision else ""
        return f"initlab {versions['initlab']}{at} with torch {versions['torch']}"
    except (KeyError, TypeError, AttributeError):
        return None


def _key(job: Job) -> frozenset[str]:
    return frozenset(word for word in job if re.split("[.=]", word.lstrip("+"))[0] not in FREE)


def _format_job(job: Job) -> str:
    return " ".join(sorted(_key(job))) or "without options"
