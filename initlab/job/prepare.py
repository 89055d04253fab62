"""One job: from a typed configuration to a run folder, its figures and what is printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from initlab.errors import UsageError, check, choose
from initlab.job.network_grid import refuse_axes
from initlab.job.options import columns, function_of, seeds
from initlab.job.printout import report
from initlab.job.settings import ActivationConfig, Config
from initlab.job.stages import DRAW_BY_RULE, TAKE_ANY_FUNCTION, TASKS, Stage
from initlab.meanfield.gain_table import gain_words
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import as_activation, numerical
from initlab.nn.init import GENERATORS, RULES, Rule, rule
from initlab.runs.recorder import Recorder
from initlab.scratch.layers import LOSSES
from initlab.stats.dtypes import format_of
from initlab.tasks.ensemble.device import MATMULS, find_device, set_matmul
from initlab.tasks.twins import MODULES, OPTIMIZERS
from initlab.theory.method import METHODS


@dataclass
class Job:
    """A job in which no mistake was found."""

    stages: Sequence[Stage]
    recorder: Recorder
    plots: bool
    gain: str = ""  # which gain the rule took, in words; those of a sweep stand in the columns of its tables
    compares: bool = False  # networks that differ inside the job: the figures of a sweep are asked for

    def run(self) -> str:
        """Measure, record, draw; what is to be printed."""
        with self.recorder:
            said = [stage(self.recorder) for stage in self.stages]
        return report(self.recorder.folder, said, self.plots, self.compares, about=self.gain)

    def draw(self) -> None:
        """The figures alone, of what is recorded."""
        if self.plots:
            report(self.recorder.folder, plots=True, compare=self.compares)


def prepare(config: Config, choices: Mapping[str, str | None], folder: Path) -> Job:
    """Refuse every mistake before anything is measured."""
    stages = choose(TASKS, config.task, "task")
    _refuse(config)
    refuse_axes(config)
    torch.set_num_threads(config.threads)
    set_matmul(config.matmul)
    i = config.init
    scaling = rule(i.name, **{name: value for name, value in vars(i).items() if name != "name"})
    device = find_device(config.device).type
    phi = _activation(config.activation)
    if phi not in ACTIVATIONS.values() and config.task not in TAKE_ANY_FUNCTION:
        allowed = ", ".join(TAKE_ANY_FUNCTION)
        raise UsageError(f"activation._target_={config.activation._target_}: is for task={allowed}")
    common = {
        "init": scaling,
        "activation": phi if config.task in TAKE_ANY_FUNCTION else config.activation.name,
        "seeds": seeds(config),
        "dtype": config.dtype,
        "device": device,
        "generator": config.generator,
        "progress": True,
    }
    described = _described(config, scaling, phi, choices) | {"device": device}
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {config.threads} thread(s)"
    recorder = Recorder(folder, described, name, seeds=list(seeds(config)))
    several = any(vars(config.sweep)[name] is not None for name in ("init", "gain", "lr"))
    if numerical(phi):
        recorder.note(
            f"activation: {described['activation']} came without a derivative; its slope is a difference quotient"
        )
    words = gain_words(scaling, phi) if config.task in DRAW_BY_RULE and not several else ""
    plots = config.plots and config.study.figure.y is None
    return Job([stage(config, common) for stage in stages], recorder, plots, words, several)


def _refuse(config: Config) -> None:
    t = config.train
    check(depth=config.depth, width=config.width, batch=config.batch, seed=config.seed, seeds=config.seeds)
    check(every=config.every, threads=config.threads, train_depth=t.depth, train_width=t.width)
    check(train_batch=t.batch, train_steps=t.steps, train_lr=t.lr)
    format_of(config.dtype)
    choose(GENERATORS, config.generator, "generator")
    choose(MATMULS, config.matmul, "matmul")
    choose(OPTIMIZERS, t.optimizer, "train.optimizer")
    choose(LOSSES, t.loss, "train.loss")
    choose(MODULES, t.modules, "train.modules")
    choose({**METHODS, "off": ""}, config.theory, "theory")


def _activation(given: ActivationConfig) -> Activation:
    """The row of the table, or one made of the user's function."""
    function = function_of(given)
    if function is None:
        return choose(ACTIVATIONS, given.name, "activation")
    try:
        return as_activation(function)
    except UsageError as error:
        raise UsageError(f"activation._target_={given._target_}: {str(error).removeprefix('activation: ')}") from error


def _described(config: Config, scaling: Rule, phi: Activation, choices: Mapping[str, str | None]) -> dict[str, Any]:
    """The configuration columns: a rule's name is that of its file, its fields are those in force."""
    in_force = vars(scaling) | {"gain": scaling.gain_for(phi)}
    named = columns(config)
    if config.activation._target_ and named["activation"] in {"", *ACTIVATIONS}:
        named["activation"] = config.activation._target_.rpartition(".")[2]
    for group, table in (("init", RULES), ("activation", ACTIVATIONS)):
        choice = choices.get(group)
        own = Path(choice).stem if isinstance(choice, str) else ""
        if own and own not in table:
            named[group] = own  # a file of the user's own; `init.name=` chooses another row without one
    return named | in_force
