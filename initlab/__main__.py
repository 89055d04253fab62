"""The command line: compose configurations, hand them to their jobs, turn what happened into lines and an exit code."""

import gc
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import initlab
from initlab import commands, stops
from initlab.errors import Fault, UsageError, disk_error

log = logging.getLogger("initlab")

STOPPED = (130, 143)  # exit codes

HELP = """initlab {version}: what happens to the numbers in a deep network under this initialization?

  python -m initlab key=value ...                      one run
  python -m initlab -m init=naive,lecun,kaiming ...    a sweep: every combination of the values
  python -m initlab -cd experiments -cn NAME ...       a study: a sweep, its figure, and whether what it expects holds
{commands}

  init={init}
  activation={activation}, or activation._target_=MODULE.FUNCTION
  data={data}

Tables, plots and logs go to outputs/. Exit codes: 0 done, 1 a fault, 2 a mistake in the options, 3 `compare` found
a difference, 4 an expectation failed, 130 and 143 stopped. Hydra's own flags: --hydra-help. Every option with its
default:

{config}"""


def main() -> int:
    """Exit code: 0 done, 1 a fault in a job, 2 the user's mistake, 3 a difference, 4 an expectation failed, 130/143."""
    stops.install()
    words = sys.argv[1:]
    try:
        if commands.is_command(words):
            stops.work()  # a half-written file is removed
            return commands.run(words)
        if "--version" in words:
            print(f"initlab {initlab.__version__}")
        elif {"-h", "--help"} & set(words):
            print(help_text())
        else:
            gc.disable()  # until all is imported: a collection looks at every object of torch and finds nothing to free
            return _run()
    except UsageError as error:
        _tell(str(error))
        return 2
    except BaseException:
        if stops.is_stopping():  # whatever a library made of the exception
            return stops.exit_code()
        raise
    finally:
        stops.work(False)
        gc.enable()
    return 0


def _run() -> int:
    from concurrent.futures.process import BrokenProcessPool

    import hydra

    from initlab.job.life_cycle import finish_sweep, outcome, run_composed
    from initlab.job.options import HYDRA_MISTAKES, as_usage_error
    from initlab.job.settings import CONF
    from initlab.sweep import batched_launcher, sweeper, workers
    from initlab.sweep.callback import Refused, Sweep

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler that counts memory warns about its own start
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    logging.raiseExceptions = False  # a log that cannot be written to is no reason to stop
    sweeper.install()
    batched_launcher.install()
    workers.install()
    Sweep.forget()
    outcome.clear()
    code = 0
    try:
        sys.argv[1:] = check_words(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_composed)()
    except Fault as error:  # of a job, which has said so; the others have run
        log.debug("%s", error)
        code = 1
    except (UsageError, Refused) as error:
        outcome.mistakes.append(str(error))
    except HYDRA_MISTAKES as error:
        outcome.mistakes.append(str(as_usage_error(error)))
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except OSError as error:
        outcome.mistakes.append(str(disk_error(error, error.filename or "standard output")))
    except BrokenProcessPool as error:
        code = 1
        outcome.mistakes.append(f"a process of the launcher was killed ({type(error).__name__})")
    except Exception as error:
        if stops.is_stopping():
            log.debug("%s", error)
        elif outcome.started or Sweep.folder is not None:
            traceback.print_exc()
            code = 1
        else:  # whatever Hydra could not make of the options, no job has begun
            outcome.mistakes.append(str(as_usage_error(error)))
    code = stops.exit_code() or code
    folder = Sweep.close()
    try:
        if folder is not None and code not in STOPPED:
            finish_sweep(folder, Sweep.study, Sweep.plots)
    finally:
        Sweep.release()
    return _tell_end(code, folder)


def _tell_end(code: int, folder: Path | None) -> int:
    """The lines at the end of a run or of a sweep in its folder; the exit code."""
    from initlab.job.life_cycle import outcome
    from initlab.job.printout import path_text

    if code in STOPPED and (outcome.started or folder):
        _tell(f"stopped; what was measured is in {outcome.started[-1] if outcome.started else folder}")
    if code and folder is not None:
        _tell(f"the same command with resume={path_text(folder)} runs the jobs that are not done")
    for line in dict.fromkeys([*outcome.notes, *outcome.mistakes]):
        _tell(line)
    return code or (2 if outcome.mistakes else 0) or (4 if outcome.failed else 0)


def _tell(line: str) -> None:
    print(f"initlab: {line}", file=sys.stderr)


GROUPS = ("init", "activation", "data")  # folders of conf/: one file of each is chosen


def check_words(words: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it.

    `--depth=50` is a habit from elsewhere: say how it is written here, and put every other fault of a flag in one line
    too. The keys of an option that holds a dictionary, such as `activation.arguments`, need no `+`.
    """
    from initlab.job.options import open_options, option_names
    from initlab.sweep.hydra_private import get_args_parser

    options = set(option_names())
    for word in words:
        bare = word.lstrip("-")
        if word.startswith("-") and bare.split("=")[0] in options:
            raise UsageError(f"{word}: options have no dashes, write {bare if '=' in bare else bare + '=VALUE'}")
        name, _, value = word.partition("=")
        if name in GROUPS and value.startswith("["):  # Hydra would lay one over the other, and run the last
            values = value.strip("[] ")
            raise UsageError(f"{word}: one at a time; for several write -m {name}={values or 'A,B'}")

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(words))
    free = tuple(f"{name}{end}" for name in open_options() for end in ".=")
    return [f"++{word}" if word.startswith(free) else word for word in words]


def help_text() -> str:
    from initlab.job.settings import CONF

    options = {group.name: "|".join(sorted(f.stem for f in group.glob("*.yaml"))) for group in CONF.iterdir()}
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
