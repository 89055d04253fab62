"""The command line: compose configurations, hand them to their jobs, turn what happened into lines and an exit code."""

import gc
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import initlab
from initlab import commands, stops
from initlab.errors import Fault, UsageError, disk_error, join_mistakes, nearest, not_one_of
from initlab.terminal import close_pipe, print_start

log = logging.getLogger("initlab")

STOPPED = (130, 143)  # exit codes
# Threads of the libraries that numpy multiplies with: several sum in another order, and theory would hang on how many
# cores there are. torch's own follow the option `threads`.
BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

HELP = """initlab {version}: what happens to the numbers in a deep network under this initialization?

  python -m initlab key=value ...                      one run
  python -m initlab -m init=naive,lecun,kaiming ...    a sweep: every combination of the values
  python -m initlab -cn NAME ...                       a study: a sweep, its figure, and whether what it expects holds
{commands}

  -cn {studies}

  init={init}
  activation={activation}, or activation._target_=MODULE.FUNCTION
  data={data}

Tables, plots and logs go to outputs/. Exit codes: 0 done, 1 a fault, 2 a mistake in the options, 3 `compare` found
a difference or task=diagnose an error, 4 an expectation failed, 130 and 143 stopped. Hydra's own flags: --hydra-help.
Every option with its default:

{config}"""


def main() -> int:
    """The exit code, as the help says.

    0 done, 1 a fault in a job, 2 the user's mistake, 3 a difference or an error that task=diagnose found, 4 an
    expectation failed, 130 and 143 stopped.
    """
    stops.install()
    os.environ.update(dict.fromkeys(BLAS, "1"))  # read when numpy is imported, here and in every process started here
    # Tables are then put together in the memory that the training has left, not beside it; read with pyarrow.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    words = sys.argv[1:]
    try:
        if commands.is_command(words):
            stops.work()  # a half-written file is removed
            code = commands.run(words)
            sys.stdout.flush()
            return code
        if "--version" in words:
            print(f"initlab {initlab.__version__}")
        elif {"-h", "--help"} & set(words):
            print(help_text(), flush=True)
        else:
            print_start(words)
            gc.disable()  # until all is imported: a collection looks at every object of torch and finds nothing to free
            return _run()
    except UsageError as error:
        _tell(str(error))
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        close_pipe()
    except BaseException:
        if stops.is_stopping():  # whatever a library made of the exception
            return stops.exit_code()
        raise
    finally:
        stops.work(False)
        gc.enable()
    return 0


def _run() -> int:
    from initlab.job.life_cycle import finish_sweep, outcome
    from initlab.sweep import batched_launcher, sweeper, workers
    from initlab.sweep.callback import Sweep

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler that counts memory warns about its own start
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    logging.raiseExceptions = False  # a log that cannot be written to is no reason to stop
    sweeper.install()
    batched_launcher.install()
    workers.install()
    Sweep.forget()
    outcome.clear()
    code = _run_jobs()
    code = stops.exit_code() or code
    folder = Sweep.close()
    try:
        if folder is not None and code not in STOPPED:
            finish_sweep(folder, Sweep.study, Sweep.plots, Sweep.report)
    finally:
        Sweep.release()
    return _tell_end(code, folder)


def _tell_end(code: int, folder: Path | None) -> int:
    """The lines at the end of a run or of a sweep in its folder; the exit code."""
    from initlab.job.life_cycle import outcome
    from initlab.runs.folders import path_text

    if code in STOPPED and (outcome.started or folder):
        _tell(f"stopped; what was measured is in {outcome.started[-1] if outcome.started else folder}")
    if code and folder is not None:
        _tell(f"the same command with resume={path_text(folder)} runs the jobs that are not done")
    for line in dict.fromkeys([*outcome.notes, *join_mistakes(outcome.mistakes)]):
        _tell(line)
    return code or (2 if outcome.mistakes else 0) or (4 if outcome.failed else 0) or (3 if outcome.ill else 0)


def _run_jobs() -> int:
    """Let Hydra run what the command line asks for; the exit code, 0 also where a mistake is kept for the end."""
    from concurrent.futures import BrokenExecutor  # of which each launcher has its kind

    import hydra

    from initlab.job.life_cycle import outcome, run_composed
    from initlab.job.settings import CONF
    from initlab.runs.schema import COMMAND
    from initlab.sweep.callback import Refused

    warned: list[str] = []
    try:
        os.environ[COMMAND] = json.dumps(sys.argv)  # as it was typed
        sys.argv[1:] = check_words(sys.argv[1:])
        with _note_warnings(Path(hydra.__file__).parent, warned):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_composed)()
        outcome.notes.extend(warned)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if not stop.code and not outcome.started and not any(word.startswith("--") for word in sys.argv[1:]):
            outcome.mistakes.append("something that a _target_ names ended the program before anything was run")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Fault as error:  # of a job, which has said so; the others have run
        log.debug("%s", error)
        return 1
    except BrokenExecutor as error:
        outcome.mistakes.append(f"a process of the launcher was killed ({type(error).__name__})")
        return 1
    except (UsageError, Refused) as error:
        outcome.mistakes.append(str(error))
    except Exception as error:
        line = _describe_mistake(error)
        if line is None:
            if not stops.is_stopping():
                traceback.print_exc()
            return 1
        outcome.mistakes.append(line)
    return 0


def _describe_mistake(error: Exception) -> str | None:
    """The line for what ended Hydra's work, if it is the user's or the disk's; None for a fault of ours."""
    from initlab.job.life_cycle import outcome
    from initlab.job.options import HYDRA_MISTAKES, as_usage_error
    from initlab.runs.recorder import discard
    from initlab.sweep.callback import Sweep

    begun = outcome.started or Sweep.folder is not None
    disk = error.__cause__ if begun and isinstance(error.__cause__, OSError) else error  # of a log, say
    if isinstance(error, HYDRA_MISTAKES):
        return str(as_usage_error(error))
    if isinstance(disk, OSError):
        return str(disk_error(disk, disk.filename or Sweep.place))
    if "No trials are completed yet" in str(error):  # as Optuna says it, after each has said why
        return "hydra/sweeper=optuna: no trial gave an objective that is a number"
    of_a_log = str(error).startswith(("Unable to configure", "Input cfg is not"))  # as Hydra says it
    if stops.is_stopping() or (begun and not of_a_log):
        return None
    if Sweep.single is not None:
        discard(Sweep.single)
    if str(error) and not isinstance(error, AssertionError):
        return str(as_usage_error(error))
    theirs = [word for word in sys.argv[1:] if "hydra" in word] or sys.argv[1:]
    return f"{UsageError(' '.join(theirs))}: Hydra takes no such value"


@contextmanager
def _note_warnings(package: Path, notes: list[str]) -> Iterator[None]:
    """What a package warns of in the block becomes a note, in one line; warnings of others stay as they are."""
    usual = warnings.showwarning

    def show(text: Warning | str, kind: type[Warning], file: str, *where: Any, **more: Any) -> None:
        if package in Path(file).parents:
            notes.append(str(UsageError(str(text))))
        else:
            usual(text, kind, file, *where, **more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = usual


def _tell(line: str) -> None:
    print(f"initlab: {line}", file=sys.stderr)


GROUPS = ("init", "activation", "data")  # folders of conf/: one file of each is chosen


def check_words(words: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it: flags last, wherever they stood.

    `--depth=50` is a habit from elsewhere: say how it is written here, and put every other fault of a flag in one line
    too. An option needs no `+`, nor do the keys of one that holds a dictionary, such as `activation.arguments`.
    """
    from initlab.job.options import list_files, open_options, option_names
    from initlab.sweep.hydra_private import get_args_parser

    options = set(option_names())
    as_json, words = "--json" in words, [word for word in words if word != "--json"]

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given, unknown = parser.parse_known_intermixed_args(list(words))
    for word in (word for word in (*unknown, *given.overrides) if word.startswith("-")):
        bare = word.lstrip("-")
        if bare.split("=")[0] in options:
            raise UsageError(f"{word}: options have no dashes, write {bare if '=' in bare else bare + '=VALUE'}")
        raise UsageError(f"{word}: no such flag{nearest(bare.split('=')[0], options)}; see --help and --hydra-help")
    found, flags = ["json=true"] * as_json, [word for word in words if word != "--"]
    if given.config_name and not given.config_path:
        flags += find_study(given.config_name, given.config_dir)
    for word in given.overrides:
        flags.remove(word)
        bare = word.lstrip("+ ")
        name, _, value = (part.strip() for part in bare.partition("="))
        if name in GROUPS and value.startswith("["):  # Hydra would lay one over the other, and run the last
            values = value.strip("[] ")
            raise UsageError(f"{word}: one at a time; for several write -m {name}={values or 'A,B'}")
        if name in ("", "hydra") and "=" in bare:
            raise UsageError(f"{word}: not an option; options are NAME=VALUE, see --help and --hydra-help")
        if name in GROUPS and value in ("", "null", "???"):
            raise not_one_of(name, value, list_files(name))
        if word.startswith("~") and name.lstrip("~") in options:
            raise UsageError(f"{word}: an option cannot be taken away; give it another value")
        free = any(f"{name}.".startswith(f"{one}.") for one in open_options())
        found.append(f"++{bare}" if free and "=" in bare else bare if name in options else word)
    return [*found, *flags]


def find_study(name: str, folder: str | None) -> list[str]:
    """The flags with which Hydra finds a study: none if it does anyway. Errors: there is no such file."""
    from initlab.job.settings import CONF

    stem, places = name.removesuffix(".yaml"), [CONF, *([Path(folder)] if folder else []), commands.EXPERIMENTS]
    for place in places:
        if (place / f"{stem}.yaml").is_file():
            return ["--config-dir", str(place)] if place == commands.EXPERIMENTS and not folder else []
    raise not_one_of("-cn", name, {path.stem for place in places[1:] for path in place.glob("*.yaml")})


def help_text() -> str:
    from initlab.job.settings import CONF

    groups = {group.name: group for group in CONF.iterdir()} | {"studies": commands.EXPERIMENTS}
    options = {name: "|".join(sorted(f.stem for f in group.glob("*.yaml"))) for name, group in groups.items()}
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    shown = text[text.index("task:") : text.index("\nhydra:")]
    for group, name, about in (("init", "kaiming", "any rule"), ("data", "mnist", "data=mnist")):
        lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        fields = [f"  {line}" for line in lines if not line.startswith(("#", "name"))]
        shown += "\n".join(["", f"# What can be said of {about}", f"{group}:", *fields, ""])
    described = [f"  {f'python -m initlab {name} ...':<53}{row.about}" for name, row in commands.COMMANDS.items()]
    return HELP.format(version=initlab.__version__, config=shown, commands="\n".join(described), **options)


if __name__ == "__main__":
    sys.exit(main())
