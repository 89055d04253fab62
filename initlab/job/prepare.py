"""One job: from a typed configuration to a run folder, its figures and what is printed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from initlab.errors import UsageError, check, check_value, choose, show
from initlab.job.network_grid import refuse_axes
from initlab.job.options import call_text, columns, import_function, option_names, seeds, statistics_of
from initlab.job.printout import Ended, describe_run, run_as_json
from initlab.job.settings import Config
from initlab.job.stages import TASKS, JobSettings, Stage
from initlab.meanfield.fixed_points import critical
from initlab.meanfield.gain_table import gain_words
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import as_activation, check_trainable, slope_source
from initlab.nn.custom_init import make_rule
from initlab.nn.init import FIELDS, RULES, Rule, rule
from initlab.runs.recorder import Recorder
from initlab.runs.schema import NOT_OPTIONS, OPTION_OF
from initlab.stats.backend import measure_custom
from initlab.stats.statistics import checked_statistics
from initlab.studies.expect import measure_objective
from initlab.studies.expectation import Expectation, parse_objective
from initlab.studies.study import known_columns
from initlab.tasks.data import SOURCES
from initlab.tasks.ensemble.device import Where, set_matmul
from initlab.tasks.ensemble.networks import Net
from initlab.tasks.ensemble.training import Training, default_rate
from initlab.theory.method import METHODS
from initlab.verdict.table_rules import judge_tables

SAID = 3  # findings that are printed
EXAMPLES = {"loss": "torch.nn.HuberLoss", "optimizer": "torch.optim.Adagrad", "init": "torch.nn.init.xavier_normal_"}


@dataclass
class Job:
    """A job in which no mistake was found."""

    stages: Sequence[Stage]
    recorder: Recorder
    plots: bool
    report: bool
    gain: str = ""  # which gain the rule took, in words; those of a sweep stand in the columns of its tables
    texts_only: bool = False  # which are JSON for another program
    json: bool = False  # JSON is made of the tables and the findings
    compares: bool = False  # networks that differ inside the job: the figures of a sweep are asked for
    constant_loss: float = math.inf  # of the best answer that does not look at the inputs
    objective: Expectation | None = None
    value: float | None = None  # of the objective, once it is measured
    findings: Sequence[Mapping[str, Any]] = ()  # of the verdict, once it is found

    def run(self) -> str:
        """Measure, record, draw; what is to be printed."""
        with self.recorder:
            texts = [stage(self.recorder) for stage in self.stages]
        said = self.finish()
        if self.texts_only:
            return "\n".join([*said, *texts])
        if self.json:
            return run_as_json(self.ended, self.recorder, self.findings, self.value)
        return "\n".join([describe_run(self.ended, self.recorder, texts, self.gain, self.report), *said])

    def judge(self, tables: Mapping[str, pd.DataFrame]) -> list[str]:
        """Keep the verdict of the run's own tables; a line for each of its findings."""
        verdict = judge_tables(tables, self.constant_loss)
        if verdict is None:
            return []
        self.recorder.keep_verdict(verdict)
        self.findings = json.loads(verdict.json)["findings"]
        said = [f"verdict: {str(one).splitlines()[0]}" for one in verdict] or [f"verdict: {verdict}"]
        return [*said[:SAID], *([f"verdict: {len(said) - SAID} more in verdict.json"] if len(said) > SAID else [])]

    def measure(self, tables: Mapping[str, pd.DataFrame]) -> list[str]:
        """Keep the value of the objective; a line about it, if there is one."""
        if self.objective is None:
            return []
        found = measure_objective(self.objective, tables)
        self.value = found.number
        return [f"objective: {found}"]

    def finish(self) -> list[str]:
        """The verdict, the objective and the figures of what was recorded; what there is to say of the first two."""
        self.ended = Ended(self.recorder.folder, self.recorder.frames())
        said = [*self.judge(self.ended.tables), *self.measure(self.ended.tables)]
        if self.plots and not self.texts_only:
            self.ended.draw(self.compares, self.report)
        return said

    def write_page(self) -> None:
        """All of it on one page, if that is asked for."""
        if self.report:
            self.ended.write_page()


def prepare(config: Config, choices: Mapping[str, str | None], folder: Path) -> Job:
    """Refuse every mistake before anything is measured.

    config: the options. choices: of each group of conf/ the file that was chosen. folder: of the run.
    """
    task = choose(TASKS, config.task, "task")
    objective = parse_objective(config.objective, known_columns(option_names()))
    training = resolve_training(config)
    if config.train.lr is None:
        config.train.lr = default_rate(training.loss, training.optimizer)
    check(seed=config.seed, seeds=config.seeds, threads=config.threads, train_lr=config.train.lr)
    choose({**METHODS, "off": ""}, config.theory, "theory")
    refuse_axes(config)
    torch.set_num_threads(config.threads)
    set_matmul(config.matmul)
    settings = resolve(config, choices, training)
    activation, device = settings.activation, settings.where.device
    if not task.any_function and activation not in ACTIVATIONS.values():
        allowed = ", ".join(name for name, row in TASKS.items() if row.any_function)
        raise UsageError(f"activation._target_={config.activation._target_}: is for task={allowed}")
    if config.widths is not None and all(module != "stack" for module, _ in task.stages):
        raise UsageError(f"widths={show(config.widths)}: is for task=lab, stack")
    if settings.statistics and not task.statistics:
        allowed = ", ".join(name for name, row in TASKS.items() if row.statistics)
        raise UsageError(f"statistics.{next(iter(settings.statistics))}: is for task={allowed}")
    described = describe(settings, choices)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {config.threads} thread(s)"
    recorder = Recorder(folder, described, name, seeds=list(settings.seeds))
    several = any(vars(config.sweep)[name] is not None for name in ("init", "gain", "lr"))
    if slope_source(activation) == "numerical derivative":
        recorder.note(
            f"activation: autograd cannot go through {described['activation']}; its slope is a difference quotient"
        )
    gain = gain_words(settings.rule, activation) if task.by_rule and not several else ""
    plots = config.plots and config.study.figure.y is None
    stages = [make(import_module(f"initlab.tasks.{module}"), settings) for module, make in task.stages]
    trains = any(module == "train" for module, _ in task.stages)
    constant = settings.load_data().constant_loss(training.loss) if trains else math.inf
    as_json = config.json and not task.json
    about = (gain, config.json and task.json, as_json, several, constant, objective)
    return Job(stages, recorder, plots, config.report, *about)


def resolve_training(config: Config) -> Training:
    """The options `train.*`; a loss or an optimizer with a dot in its name is the user's own."""
    options = {name: value for name, value in vars(config.train).items() if name != "lr"}
    for name in ("loss", "optimizer"):
        path, arguments = options[name], options.pop(f"{name}_arguments")
        option = f"train.{name}"
        if "." in path:
            if config.task not in ("lab", "train"):
                raise UsageError(f"{option}={path}: is for task=lab, train")
            found = import_function(option, path, arguments if name == "loss" else None, make=name == "loss")
            options[name] = partial(found, **arguments) if arguments and name == "optimizer" else found
        elif arguments:
            raise UsageError(f"{option}_arguments: are those of a {name} of your own, as in {option}={EXAMPLES[name]}")
    return Training(**options, every=config.every, histograms=config.histograms)


def resolve_rule(config: Config, choices: Mapping[str, str | None]) -> Rule:
    """The options `init.*`; a file conf/init/NAME.yaml that names itself is a rule by its fields."""
    asked = config.init
    fields = {name: getattr(asked, name) for name in FIELDS}
    if not asked._target_:
        if asked.arguments:
            raise UsageError(f"init.arguments: are those of init._target_, as in init._target_={EXAMPLES['init']}")
        by_file = asked.name not in RULES and asked.name == _file_of("init", choices)
        return rule(Rule() if by_file else asked.name, **fields)
    if fields["distribution"] is not None:
        raise UsageError(
            f"init.distribution={fields['distribution']}: init._target_ is the distribution; give one of them"
        )
    fill = import_function("init._target_", asked._target_, asked.arguments)
    return rule(make_rule(fill, call_text(asked._target_, asked.arguments)), **fields)


def scale_critical_gain(config: Config, scaling: Rule, activation: Activation) -> Rule:
    """The rule with `init.critical` times the gain at which the activation's gradients keep their size."""
    if config.init.critical is None:
        return scaling
    times = check_value("init.critical", config.init.critical)
    others = {"init.gain": config.init.gain, "sweep.gain": config.sweep.gain, "sweep.init": config.sweep.init}
    for option, value in others.items():
        if value is not None:
            raise UsageError(f"init.critical={times:g}: is a gain, as is {option}={show(value)}; give one of them")
    if scaling.mode != "fan_in" or scaling.bias:
        has, needs = f"mode={scaling.mode}, bias={scaling.bias:g}", "weights by fan_in, and biases by init.sigma_b"
        raise UsageError(f"init.critical={times:g}: needs {needs}; the rule has {has}")
    try:
        return rule(scaling, gain=times * critical(activation, scaling.sigma_b))
    except UsageError as error:
        raise UsageError(f"init.critical={times:g}: {error}") from None


def resolve(config: Config, choices: Mapping[str, str | None], training: Training) -> JobSettings:
    """The options with their names looked up."""
    scaling = resolve_rule(config, choices)
    asked = config.activation
    if asked.arguments and not asked._target_:
        raise UsageError(
            "activation.arguments: are those of activation._target_, which is not set; give one, such as "
            "activation._target_=torch.nn.LeakyReLU"
        )
    if config.data.arguments and not config.data._target_:
        raise UsageError("data.arguments: are those of data._target_, which is not set")
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
    scaling = scale_critical_gain(config, scaling, activation)
    net = Net.resolve(activation, config.depth, config.width, config.inputs, config.batch, widths=config.widths)
    statistics = checked_statistics(statistics_of(config), (*OPTION_OF, *NOT_OPTIONS))
    measure_custom(statistics, torch.linspace(-1, 1, 24, dtype=where.dtype).reshape(2, 3, 4))  # refuses what it cannot
    return JobSettings(config, scaling, activation, net, training, where, seeds(config), statistics)


def _file_of(group: str, choices: Mapping[str, str | None]) -> str:
    """The name of the file of a group that was chosen, or nothing."""
    choice = choices.get(group)
    return Path(choice).stem if isinstance(choice, str) else ""


def describe(settings: JobSettings, choices: Mapping[str, str | None]) -> dict[str, Any]:
    """The configuration columns: a rule's name is that of its file, its fields are those in force."""
    config, scaling, net = settings.config, settings.rule, settings.net
    named = columns(config)
    if net.widths:
        named |= {
            "depth": net.depth,
            "width": net.width,
            "inputs": net.inputs,
            "widths": "-".join(map(str, net.widths)),
        }
    for group, known in (("init", RULES), ("activation", ACTIVATIONS), ("data", SOURCES)):
        own = getattr(config, group)
        if own._target_ and named[group] in {"", *known}:
            given = {} if group == "activation" else own.arguments
            named[group] = call_text(own._target_.rpartition(".")[2], given)
    named["train_loss"] = call_text(config.train.loss, config.train.loss_arguments)
    named["optimizer"] = call_text(config.train.optimizer, config.train.optimizer_arguments)
    for group, table in (("init", RULES), ("activation", ACTIVATIONS)):
        name = _file_of(group, choices)
        if name and name not in table:
            named[group] = name  # a file of the user's own; `init.name=` chooses another row without one
    gain = {"gain": scaling.gain_for(settings.activation)}
    if config.init.critical is not None:
        gain["init.critical"] = config.init.critical
    return named | vars(scaling) | gain | {"device": settings.where.device.type}
