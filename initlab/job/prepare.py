"""One job: from a typed configuration to a run folder, its figures and what is printed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from initlab.errors import UsageError, check, choose
from initlab.job.network_grid import refuse_axes
from initlab.job.options import columns, import_function, seeds, statistics_of
from initlab.job.printout import report_run
from initlab.job.settings import Config
from initlab.job.stages import TASKS, JobSettings, Stage
from initlab.meanfield.gain_table import gain_words
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.custom_activation import as_activation, check_trainable, numerical
from initlab.nn.init import RULES, Rule, rule
from initlab.runs.recorder import Recorder
from initlab.runs.schema import NOT_OPTIONS, OPTION_OF
from initlab.stats.backend import measure_custom
from initlab.stats.statistics import checked_statistics
from initlab.tasks.ensemble.device import Where, set_matmul
from initlab.tasks.ensemble.networks import Net
from initlab.tasks.ensemble.training import Training, default_rate
from initlab.theory.method import METHODS
from initlab.verdict.table_rules import judge_tables

SAID = 3  # findings that are printed


@dataclass
class Job:
    """A job in which no mistake was found."""

    stages: Sequence[Stage]
    recorder: Recorder
    plots: bool
    gain: str = ""  # which gain the rule took, in words; those of a sweep stand in the columns of its tables
    texts_only: bool = False  # JSON for another program
    compares: bool = False  # networks that differ inside the job: the figures of a sweep are asked for
    constant_loss: float = math.inf  # of the best answer that does not look at the inputs

    def run(self) -> str:
        """Measure, record, draw; what is to be printed."""
        with self.recorder:
            texts = [stage(self.recorder) for stage in self.stages]
        tables = self.recorder.frames()
        said = self.judge(tables)
        if self.texts_only:
            return "\n".join([*said, *texts])
        return "\n".join([report_run(self.recorder, tables, texts, self.plots, self.compares, self.gain), *said])

    def judge(self, tables: Mapping[str, pd.DataFrame]) -> list[str]:
        """Keep the verdict of the run's own tables; a line for each of its findings."""
        verdict = judge_tables(tables, self.constant_loss)
        if verdict is None:
            return []
        self.recorder.keep_verdict(verdict)
        said = [f"verdict: {str(one).splitlines()[0]}" for one in verdict] or [f"verdict: {verdict}"]
        return [*said[:SAID], *([f"verdict: {len(said) - SAID} more in verdict.json"] if len(said) > SAID else [])]

    def finish(self) -> None:
        """The verdict and the figures of what others have recorded."""
        tables = self.recorder.frames()
        self.judge(tables)
        if self.plots:
            report_run(self.recorder, tables, [], self.plots, self.compares, self.gain)


def prepare(config: Config, choices: Mapping[str, str | None], folder: Path) -> Job:
    """Refuse every mistake before anything is measured.

    config: the options. choices: of each group of conf/ the file that was chosen. folder: of the run.
    """
    task = choose(TASKS, config.task, "task")
    if config.train.lr is None:
        config.train.lr = default_rate(config.train.loss, config.train.optimizer)
    check(seed=config.seed, seeds=config.seeds, threads=config.threads, train_lr=config.train.lr)
    choose({**METHODS, "off": ""}, config.theory, "theory")
    refuse_axes(config)
    torch.set_num_threads(config.threads)
    set_matmul(config.matmul)
    settings = resolve(config, choices)
    activation, device = settings.activation, settings.where.device
    if not task.any_function and activation not in ACTIVATIONS.values():
        allowed = ", ".join(name for name, row in TASKS.items() if row.any_function)
        raise UsageError(f"activation._target_={config.activation._target_}: is for task={allowed}")
    if settings.statistics and not task.statistics:
        allowed = ", ".join(name for name, row in TASKS.items() if row.statistics)
        raise UsageError(f"statistics.{next(iter(settings.statistics))}: is for task={allowed}")
    described = describe(settings, choices)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {config.threads} thread(s)"
    recorder = Recorder(folder, described, name, seeds=list(settings.seeds))
    several = any(vars(config.sweep)[name] is not None for name in ("init", "gain", "lr"))
    if numerical(activation):
        recorder.note(
            f"activation: {described['activation']} came without a derivative; its slope is a difference quotient"
        )
    gain = gain_words(settings.rule, activation) if task.by_rule and not several else ""
    plots = config.plots and config.study.figure.y is None
    stages = [make(import_module(f"initlab.tasks.{module}"), settings) for module, make in task.stages]
    trains = any(module == "train" for module, _ in task.stages)
    constant = settings.load_data().constant_loss(settings.training.loss) if trains else math.inf
    return Job(stages, recorder, plots, gain, config.json, several, constant)


def resolve(config: Config, choices: Mapping[str, str | None]) -> JobSettings:
    """The options with their names looked up; a file conf/init/NAME.yaml that names itself is a rule by its fields."""
    fields = {name: value for name, value in vars(config.init).items() if name != "name"}
    by_file = config.init.name not in RULES and config.init.name == _file_of("init", choices)
    scaling = rule(Rule() if by_file else config.init.name, **fields)
    asked = config.activation
    if asked.arguments and not asked._target_:
        raise UsageError(
            "activation.arguments: are those of activation._target_, which is not set; give one, such as "
            "activation._target_=torch.nn.LeakyReLU"
        )
    function = import_function("activation._target_", asked._target_, asked.arguments) if asked._target_ else None
    where = Where.resolve(config.dtype, config.device, config.generator)
    try:
        activation = as_activation(asked.name if function is None else function)
        if function is not None and config.task in ("lab", "train"):
            check_trainable(activation, where.dtype)
    except UsageError as error:
        if function is None:
            raise
        text = str(error).removeprefix("activation: ")
        raise UsageError(f"activation._target_={asked._target_}: {text}") from error
    net = Net.resolve(activation, config.depth, config.width, config.inputs, config.batch)
    options = {name: value for name, value in vars(config.train).items() if name != "lr"}
    training = Training(**options, every=config.every, histograms=config.histograms)
    statistics = checked_statistics(statistics_of(config), (*OPTION_OF, *NOT_OPTIONS))
    measure_custom(statistics, torch.linspace(-1, 1, 24, dtype=where.dtype).reshape(2, 3, 4))  # refuses what it cannot
    return JobSettings(config, scaling, activation, net, training, where, seeds(config), statistics)


def _file_of(group: str, choices: Mapping[str, str | None]) -> str:
    """The name of the file of a group that was chosen, or nothing."""
    choice = choices.get(group)
    return Path(choice).stem if isinstance(choice, str) else ""


def describe(settings: JobSettings, choices: Mapping[str, str | None]) -> dict[str, Any]:
    """The configuration columns: a rule's name is that of its file, its fields are those in force."""
    config, scaling = settings.config, settings.rule
    named = columns(config)
    if config.activation._target_ and named["activation"] in {"", *ACTIVATIONS}:
        named["activation"] = config.activation._target_.rpartition(".")[2]
    for group, table in (("init", RULES), ("activation", ACTIVATIONS)):
        name = _file_of(group, choices)
        if name and name not in table:
            named[group] = name  # a file of the user's own; `init.name=` chooses another row without one
    gain = {"gain": scaling.gain_for(settings.activation)}
    return named | vars(scaling) | gain | {"device": settings.where.device.type}
