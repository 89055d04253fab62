"""The roof: compose configurations, hand them to their jobs, turn what happened into lines and an exit code."""

import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import initlab
from initlab import commands
from initlab.errors import Fault, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from initlab.job.prepare import Job
    from initlab.job.settings import Config
    from initlab.studies.study import Study

log = logging.getLogger("initlab")

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
    if commands.is_command(sys.argv[1:]):
        return _command(sys.argv[1:])
    if "--version" in sys.argv[1:]:
        print(f"initlab {initlab.__version__}")
        return 0
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return 0
    gc.disable()  # until all is imported: a collection looks at every object of torch and finds nothing to free
    try:
        return _run()
    finally:
        gc.enable()


def _command(words: Sequence[str]) -> int:
    try:
        return commands.run(words)
    except UsageError as error:
        print(f"initlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run() -> int:
    import hydra

    from initlab.config import CONF, HYDRA_MISTAKES, accepted, as_usage_error
    from initlab.sweep import batched_launcher
    from initlab.sweep.callback import Refused, Sweep
    from initlab.sweep.sweeper import install

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler that counts memory warns about its own start
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    install()
    batched_launcher.install()
    Sweep.forget()
    _mistakes.clear()
    _disappointed.clear()
    _started.clear()
    code = 0
    try:
        sys.argv[1:] = accepted(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except Fault as error:  # of a job, which has said so; the others have run
        log.debug("%s", error)
        code = 1
    except (UsageError, Refused) as error:
        _mistakes.append(str(error))
    except HYDRA_MISTAKES as error:
        _mistakes.append(str(as_usage_error(error)))
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        if _started or Sweep.folder is not None:
            traceback.print_exc()
            code = 1
        else:  # whatever Hydra could not make of the options, no job has begun
            _mistakes.append(str(as_usage_error(error)))
    folder = Sweep.close()
    try:
        if folder is not None:
            _after_sweep(folder, Sweep.study, Sweep.plots)
    finally:
        Sweep.release()
    if code in (130, 143) and (_started or folder):
        print(f"initlab: stopped; what was measured is in {_started[-1] if _started else folder}", file=sys.stderr)
    if code and folder is not None:
        print(
            f"initlab: the same command with resume={_shown(folder)} runs the jobs that are not done", file=sys.stderr
        )
    for line in dict.fromkeys([*Sweep.notes, *_mistakes, *Sweep.mistakes]):
        print(f"initlab: {line}", file=sys.stderr)
    return code or (2 if _mistakes or Sweep.mistakes else 0) or (4 if _disappointed else 0)


def _shown(folder: Path) -> str:
    from initlab.job.prepare import shown

    return shown(folder)


_started: list[Path] = []  # folders of the jobs that this process began
_disappointed: list[str] = []  # expectations that failed
_mistakes: list[str] = []  # of the jobs of this process: Hydra prints lines of its own about jobs that raise


def help_text() -> str:
    from initlab.config import CONF

    options = {group.name: "|".join(sorted(f.stem for f in group.glob("*.yaml"))) for group in CONF.iterdir()}
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    shown = text[text.index("task:") : text.index("\nhydra:")]
    for group, name, about in (("init", "kaiming", "any rule"), ("data", "mnist", "data=mnist")):
        lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        fields = [f"  {line}" for line in lines if not line.startswith(("#", "name"))]
        shown += "\n".join(["", f"# What can be said of {about}", f"{group}:", *fields, ""])
    told = [f"  {f'python -m initlab {name} ...':<53}{row.about}" for name, row in commands.COMMANDS.items()]
    return HELP.format(version=initlab.__version__, config=shown, commands="\n".join(told), **options)


def job(cfg: "DictConfig") -> str | None:
    """One job of Hydra's, in this process or another: the mistake of the user that ended it, if one did."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from initlab.runs.lock import claim
    from initlab.runs.recorder import discard
    from initlab.sweep.workers import at_work

    if not gc.isenabled():  # the first job of this process; later ones leave garbage that must not be kept
        gc.freeze()  # what was imported stays, and no collection need look at it again
        gc.enable()
    setting = HydraConfig.get()
    folder = Path(setting.runtime.output_dir)
    started(folder)
    try:
        if cfg.resume is not None and setting.mode == RunMode.RUN:
            discard(folder)
            raise UsageError(f"resume={cfg.resume}: is for a sweep; put -m before the options")
        with at_work(str(cfg.device)), claim(folder):
            _work(cfg, folder)
    except UsageError as error:
        _mistakes.append(str(error))
        return str(error)
    return None


def _work(cfg: "DictConfig", folder: Path) -> None:
    """A mistake of the user leaves no folder, a fault leaves what was measured."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from initlab.config import typed
    from initlab.job import prepare
    from initlab.runs.recorder import discard
    from initlab.sweep.callback import study_of

    setting = HydraConfig.get()
    alone = setting.mode == RunMode.RUN  # the study of a sweep is judged after its last job
    resumed = cfg.resume is not None
    prepared = begin(lambda: typed(cfg), dict(setting.runtime.choices), folder, resumed)
    try:
        asked = study_of(cfg, setting.job.config_name, setting.overrides.task) if alone else None
    except UsageError:
        if not resumed:
            discard(folder)
        raise
    if asked and asked.about.question:
        log.info(asked.about.question)
    try:
        said = prepared.run()
    except Exception as error:
        raise ended(error, folder) from error
    if alone:
        log.info(said)
        _answer(folder, asked, bool(cfg.plots))
    else:
        log.info("done: %s", prepare.shown(folder))


def started(folder: Path) -> None:
    """This process has begun a job in this folder."""
    _started.append(folder)


def begin(config: "Callable[[], Config]", choices: dict[str, str | None], folder: Path, resumed: bool) -> "Job":
    """The job of this folder. A UsageError leaves no folder, but for one that an earlier command made."""
    from initlab.job import prepare
    from initlab.runs.recorder import clear, discard, refuse_used

    if not resumed:
        refuse_used(folder)
    try:
        prepared = prepare.prepare(config(), choices, folder)
    except UsageError:
        if not resumed:
            discard(folder)
        raise
    if resumed:
        clear(folder)  # of a run that did not end: the sweep asks for no other
    return prepared


def ended(error: Exception, folder: Path) -> UsageError | Fault:
    """What ended a job, as it goes on from here: a mistake of the user, or a fault that has been logged."""
    from initlab.job import prepare
    from initlab.tasks.ensemble.memory import is_out_of_memory

    where = prepare.shown(folder)
    if is_out_of_memory(error):
        told = f"out of memory; make seeds, width, depth or batch smaller. What was measured is in {where}"
        return UsageError(told)
    log.error("%s; what was measured is in %s", type(error).__name__, where, exc_info=error)
    return Fault(f"{where}: {type(error).__name__}: {error}")


def _answer(folder: Path, asked: "Study | None", plots: bool) -> None:
    """Print which expectations hold and draw the study's figure; a failure is remembered for the exit code."""
    from initlab.job import prepare
    from initlab.studies import study

    if not asked:
        return
    found = prepare.tables(folder, asked.tables())
    verdicts, mistakes = study.answer(asked, found, folder)
    for verdict in verdicts:
        log.info(str(verdict))
    path = None
    try:
        path = study.draw(asked, found, folder, verdicts) if plots else None
    except UsageError as error:
        mistakes.append(error)
    _mistakes.extend(map(str, mistakes))
    if path is not None:
        log.info("figure: %s", prepare.shown(path))
    if verdicts:
        log.info(study.count(verdicts, len(asked.expect)))
    _disappointed.extend(verdict.say for verdict in verdicts if not verdict.holds)


def _after_sweep(folder: Path, asked: "Study | None", plots: bool) -> None:
    """The short table, the comparing figures or the study's own, and its verdict, where jobs left something to read."""
    from initlab.job import prepare
    from initlab.runs.recorder import discard

    if next(folder.rglob("run.json"), None) is None:
        discard(folder)
    else:
        log.info(prepare.report(folder, plots=plots and not (asked and asked.figure), compare=True))
        _answer(folder, asked, plots)


if __name__ == "__main__":
    # The module runs as `initlab.__main__`, so that a launcher's worker can import the job by that name.
    from initlab.__main__ import main as run

    sys.exit(run())
