"""The roof: compose a configuration, run its task, record the tables, draw the figures, print the short table."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import initlab
from initlab.errors import UsageError, check, choose

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from initlab.config import Config
    from initlab.output.records import Recorder

log = logging.getLogger("initlab")

TASKS = {"lab": ("stack", "train"), "stack": ("stack",), "train": ("train",)}

HELP = """initlab {version}: what happens to the numbers in a deep network under this initialization?

  python -m initlab key=value ...                      one run
  python -m initlab -m init=naive,lecun,kaiming ...    a sweep: every combination of the values

  init={init}
  activation={activation}
  data={data}

Tables, plots and logs go to outputs/. Hydra's own flags: --hydra-help. Every option with its default:

{config}"""


def main() -> int:
    """Exit code: 0 done, 2 the user's mistake, 130/143 stopped, 1 a fault inside a job."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return 0
    import hydra

    from initlab.config import CONF, HYDRA_MISTAKES, as_usage_error, refuse_dashes
    from initlab.launcher import Sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _mistakes.clear()
    code = 0
    try:
        refuse_dashes(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except UsageError as error:
        _mistakes.append(str(error))
    except HYDRA_MISTAKES as error:
        _mistakes.append(str(as_usage_error(error)))
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not getattr(error, "logged", False):
            traceback.print_exc()
        code = 1
    for line in dict.fromkeys(_mistakes):
        print(f"initlab: {line}", file=sys.stderr)
    folder = Sweep.close()
    if folder is not None:
        _after_sweep(folder)
    return code or (2 if _mistakes else 0)


_mistakes: list[str] = []  # of the jobs of this process: Hydra prints lines of its own about jobs that raise


def help_text() -> str:
    from initlab.config import CONF

    options = {group.name: "|".join(sorted(f.stem for f in group.glob("*.yaml"))) for group in CONF.iterdir()}
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    shown = text[text.index("task:") : text.index("\nhydra:")]
    return HELP.format(version=initlab.__version__, config=shown, **options)


def job(cfg: "DictConfig") -> None:
    """One job of Hydra's: a mistake of the user leaves no folder, a fault leaves what was measured."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from initlab.config import typed
    from initlab.output import records

    setting = HydraConfig.get()
    folder = Path(setting.runtime.output_dir)
    try:
        config = typed(cfg)
        stages, recorder = prepare(config, dict(setting.runtime.choices), folder)
    except UsageError as error:
        _mistakes.append(str(error))
        records.discard(folder)
        return
    try:
        with recorder:
            for stage in stages:
                stage(recorder)
        paths = draw(folder) if config.plots else []
        if setting.mode == RunMode.RUN:
            _report(folder, paths)
        else:
            log.info("done: %s", _shown(folder))
    except Exception as error:
        log.exception("%s failed; what was measured is in %s", type(error).__name__, _shown(folder))
        error.logged = True  # type: ignore[attr-defined]
        raise


Stage = Callable[["Recorder"], None]


def prepare(config: "Config", choices: dict[str, str], folder: Path) -> tuple[list[Stage], "Recorder"]:
    """Refuse every mistake before anything is measured; the stages of the task, ready to run."""
    import torch

    from initlab.config import columns, seeds
    from initlab.output.records import Recorder
    from initlab.scratch.layers import LOSSES
    from initlab.signal.activations import ACTIVATIONS
    from initlab.signal.init import rule
    from initlab.tasks.data import load
    from initlab.tasks.place import DTYPES, find_device
    from initlab.tasks.stack import stack
    from initlab.tasks.train import OPTIMIZERS, refuse_mismatch, train

    names = choose(TASKS, config.task, "task")
    t = config.train
    check(depth=config.depth, width=config.width, batch=config.batch, seed=config.seed, seeds=config.seeds)
    check(every=config.every, threads=config.threads, train_depth=t.depth, train_width=t.width)
    check(train_batch=t.batch, train_steps=t.steps, train_lr=t.lr)
    device = find_device(config.device)
    choose(ACTIVATIONS, config.activation.name, "activation")
    choose(DTYPES, config.dtype, "dtype")
    choose(OPTIMIZERS, t.optimizer, "train.optimizer")
    choose(LOSSES, t.loss, "train.loss")
    i = config.init
    scaling = rule(i.name, gain=i.gain, gain_kind=i.gain_kind, mode=i.mode, distribution=i.distribution, bias=i.bias)
    gain = scaling.gain_for(config.activation.name)
    torch.set_num_threads(config.threads)
    common = {
        "init": scaling, "activation": config.activation.name, "seeds": seeds(config), "dtype": config.dtype,
        "device": device.type, "progress": True,
    }  # fmt: skip

    def run_stack(recorder: "Recorder") -> None:
        recorder.add({"stats": stack(depth=config.depth, width=config.width, batch=config.batch, **common)})

    stages: dict[str, Stage] = {"stack": run_stack}
    if "train" in names:
        d = config.data
        data = load(d.name, d.root, d.download, d.url)
        refuse_mismatch(data, t.loss, t.batch)

        def run_train(recorder: "Recorder") -> None:
            train(data, **vars(t), every=config.every, emit=recorder.add, **common)

        stages["train"] = run_train
    settled = {"gain": gain, "gain_kind": scaling.gain_kind, "mode": scaling.mode, "distribution": scaling.distribution}
    chosen = {name: choices[name] for name in ("init", "activation", "data") if choices.get(name)}
    described = columns(config) | settled | chosen | {"device": device.type}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {config.threads} thread(s)"
    return [stages[stage] for stage in names], Recorder(folder, described, name, seeds=list(seeds(config)))


def draw(folder: Path, compare: bool = False) -> list[Path]:
    """The figures of a run folder, or of all runs below a sweep's."""
    from initlab.output import plots

    return plots.draw(_tables(folder), folder, compare)


def _tables(folder: Path):  # type: ignore[no-untyped-def]
    from initlab.output import records

    tables = {}
    for name in records.TABLES:
        try:
            tables[name] = records.read(folder, name)
        except UsageError:
            continue
    return tables


def _report(folder: Path, paths: list[Path]) -> None:
    from initlab.output import summary

    tables = _tables(folder)
    log.info(summary.as_text(summary.summarize(tables["stats"], tables.get("losses"), tables.get("parity"))))
    log.info("tables: %s", _shown(folder / "*.parquet"))
    if paths:
        log.info("plots:  %s", _shown(folder / "*.png"))


def _after_sweep(folder: Path) -> None:
    """The short table and the comparing figures over all jobs of a sweep that left something to read."""
    from initlab.output.records import discard

    discard(folder)
    if any(folder.glob("*/run.json")):
        _report(folder, draw(folder, compare=True))


def _shown(path: Path) -> str:
    """Relative where that is shorter."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    # The module runs as `initlab.__main__`, so that a launcher's worker can import the job by that name.
    from initlab.__main__ import main as run

    sys.exit(run())
