"""The tasks as their stages: each refuses its mistakes when it is made, and measures and records when it is called.

TASKS names the module of every task: the one of the task that is asked for is imported, and no other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pandas as pd

from initlab.errors import UsageError
from initlab.job.network_grid import grid_of
from initlab.job.options import call_text, import_function, instantiate
from initlab.job.settings import Config
from initlab.job.shared_program import EnsembleStage, TableSink
from initlab.nn.activations import Activation
from initlab.nn.init import LAWS, Rule
from initlab.nn.network import resolve_directions
from initlab.runs import summary
from initlab.scratch.graph_text import frames_as_text
from initlab.stats.statistics import Function
from initlab.tasks.data import TEACHER_ROWS, Data, as_data, load
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Emit, Frames, Net
from initlab.tasks.ensemble.plan import plan
from initlab.tasks.ensemble.training import Training
from initlab.theory.z_scores import InputMoments, compare_stack, compare_training, measure_input

Stage = Callable[[TableSink], str]  # measures, records, and says what is to be printed with the short table
WORTH_SAYING = 2**30  # bytes


@dataclass(frozen=True)
class JobSettings:
    """A configuration with its names resolved, once: what the stages of a job are made of."""

    config: Config
    rule: Rule
    activation: Activation
    net: Net
    training: Training
    where: Where
    seeds: Sequence[int]
    statistics: Mapping[str, Function]

    def load_data(self) -> Data:
        """The training split; the jobs of a sweep share it."""
        data = self.config.data
        if data._target_:
            return _load_own(data._target_, json.dumps(data.arguments))
        return _load(data.name, data.root, data.download, data.url)

    def keywords(self, *names: str) -> dict[str, Any]:
        """Parameters that the tasks share, by their names."""
        net, where = self.net, self.where
        every = {
            "init": self.rule, "activation": self.activation, "depth": net.depth, "width": net.width,
            "inputs": net.inputs, "batch": net.batch, "seeds": self.seeds, "dtype": where.dtype, "device": where.device,
            "generator": where.generator, "progress": True,
        }  # fmt: skip
        return {name: every[name] for name in names or every}


def _measure_later(measure: Callable[[], Frames], as_text: Callable[[Frames], str]) -> Stage:
    """A stage that measures when it is called: `measure` makes the tables, `as_text` what is printed of them."""

    def run(sink: TableSink) -> str:
        frames = measure()
        sink.add(frames)
        return as_text(frames)

    return run


def stack_stage(task: Any, s: JobSettings) -> Stage:
    """Plans the memory at once: a network that does not fit is a mistake of the user."""
    config, net = s.config, s.net
    ensemble = grid_of(config, s.rule, s.activation, s.seeds)
    backward, to_input = resolve_directions(config.backward, config.input_gradient)
    planned = plan(net, len(ensemble), s.where, backward)
    asked = {**s.keywords("activation", "depth", "width", "inputs", "batch"), "widths": net.widths}

    def predict(stats: pd.DataFrame, rule: Rule, method: str) -> pd.DataFrame:
        return compare_stack(stats, init=rule, method=method, input_gradient=to_input, **asked)

    return EnsembleStage(
        lambda networks, emit: task.run_stack(net, networks, s.where, backward, emit, True, s.statistics, to_input),
        ensemble,
        None if config.theory == "off" else predict,
        config.theory,
        at_once=True,
        note=str(planned) if planned.kept > WORTH_SAYING else "",
    )


def seeded_stage(task: Any, s: JobSettings) -> Stage:
    """The stack of course material, on the CPU."""
    if s.where.device.type != "cpu":
        raise UsageError(f"device={s.config.device}: task=seeded is about the CPU's numbers; use device=cpu")
    asked = s.keywords("activation", "depth", "width", "batch")
    plain = grid_of(s.config, s.rule, s.activation, s.seeds)

    def predict(stats: pd.DataFrame, rule: Rule, method: str) -> pd.DataFrame:
        return compare_stack(stats, init=rule, method=method, inputs=s.net.width, **asked)

    def program(networks: Any, emit: Emit) -> None:
        frame = task.seeded_stack(s.rule, **asked, seeds=networks.seeds, dtype=s.where.dtype)
        emit({"stats": frame.assign(network=pd.Index(networks.seeds).get_indexer(frame["seed"]))})

    return EnsembleStage(program, plain, None if s.config.theory == "off" else predict, s.config.theory)


def train_stage(task: Any, s: JobSettings) -> Stage:
    """Loads the data at once: what is wrong with it must show before anything is measured."""
    config, training = s.config, s.training
    data = s.load_data()
    training.check_data(data)
    ensemble = grid_of(config, s.rule, s.activation, s.seeds)
    if len(set(ensemble.rates)) > 1 and training.optimizer != "sgd":
        raise UsageError(f"sweep.lr: train.optimizer={training.optimizer} has one learning rate for all; use sgd")

    def predict(stats: pd.DataFrame, rule: Rule, method: str) -> pd.DataFrame:
        widths, entering = training.sizes(data)[1:], entering_moments(data, training.batch)
        return compare_training(stats, widths, entering, training.batch, rule, s.activation, method=method)

    return EnsembleStage(
        lambda networks, emit: task.run_training(
            data, training, s.activation, networks, s.where, emit, True, s.statistics
        ),
        ensemble,
        None if config.theory == "off" else predict,
        config.theory,
        step=0,
    )


_load = lru_cache(maxsize=1)(load)  # the jobs of a sweep share their data


@lru_cache(maxsize=1)
def _load_own(path: str, arguments: str) -> Data:
    """What the function at `package.module.function` returns for arguments in JSON."""
    given = json.loads(arguments)
    name, option = call_text(path, given), f"data._target_={path}"
    function = import_function("data._target_", path, make=False)
    try:
        found = function(**given)
    except (Exception, SystemExit) as error:  # a function of the user's may raise anything
        raise UsageError(f"{option}: cannot be called ({str(error) or type(error).__name__})") from error
    return as_data(found, name.rpartition(".")[2] if not given else name)


@lru_cache(maxsize=1)
def entering_moments(data: Data, batch: int) -> InputMoments:
    """What theory needs to know of the data: measured once for the jobs of a sweep."""
    return measure_input(data.x.numpy(), batch)


def _ladder(task: Any, measure: Callable[..., pd.DataFrame], s: JobSettings) -> Stage:
    where = s.keywords("dtype", "device", "progress")
    return _measure_later(
        lambda: {"timings": measure(seed=s.config.seed, **where)},
        lambda frames: "\n".join(
            [summary.timings_as_text(frames["timings"]), task.agreement(frames["timings"], s.where.dtype)]
        ),
    )


def matmul_stage(task: Any, s: JobSettings) -> Stage:
    """The ladder of matrix products."""
    return _ladder(task, task.matmul_ladder, s)


def backward_stage(task: Any, s: JobSettings) -> Stage:
    """The book's regression: its 50,000 rows at once, and minibatches of `train.batch`."""
    t = s.training
    batches = sorted({t.batch, TEACHER_ROWS})
    measure = partial(task.backward_ladder, batches, t.depth, t.width, activation=s.config.activation.name)
    return _ladder(task, measure, s)


def broadcast_stage(task: Any, s: JobSettings) -> Stage:
    """The chapter's 3x3 examples; shapes of one's own are broadcast when the stage is made."""
    frames = task.broadcast(s.config.shapes)
    return _measure_later(lambda: frames, task.broadcast_as_text)


def explain_stage(task: Any, s: JobSettings) -> Stage:
    """One backward pass, followed when the stage is made."""
    t = s.training
    name, where = s.config.activation.name, s.keywords("dtype", "device")
    data = {"data": s.load_data(), "seed": s.config.seed}
    found = task.explain(t.depth, t.width, t.batch, name, t.loss, s.rule, **data, **where)
    return _measure_later(lambda: {"steps": found.steps, "rules": found.rules}, lambda _: str(found))


def graph_stage(task: Any, s: JobSettings) -> Stage:
    """Walks the graph at once: a model that cannot be built or run is a mistake of the user."""
    t, given = s.training, s.config
    shape = {"depth": t.depth, "width": t.width, "batch": t.batch, "loss": None if given.model else t.loss}
    network = {"init": s.rule, "activation": s.config.activation.name, "seed": s.config.seed}
    where = s.keywords("dtype", "device")
    data = {} if given.model else {"data": s.load_data()}
    frames = task.graph(instantiate(given.model), shapes=given.shapes, **network, **shape, **where, **data)
    notes = [f"note: {note}" for note in frames.pop("notes")["note"]]
    text = "\n".join([frames_as_text(frames["nodes"], frames["edges"]), *notes])
    return _measure_later(lambda: frames, lambda _: text)


def _find_setting(task: Any, s: JobSettings) -> Any:
    c = s.config
    network = (s.rule, c.activation.name, s.training, c.train.lr or 0.0, c.seed, s.where)
    data = {} if c.model else {"data": s.load_data()}
    return task.ModelSetting(instantiate(c.model), c.shapes, *network, **data)


def audit_stage(task: Any, s: JobSettings) -> Stage:
    """How the parameters of a model are initialized."""
    setting = _find_setting(task, s)

    def run(sink: TableSink) -> str:
        found = setting.audit()
        sink.add(task.audit_frames(found))
        sink.keep_verdict(found.verdict)
        return str(found.verdict.json if s.config.json else found)

    return run


def diagnose_stage(task: Any, s: JobSettings) -> Stage:
    """What is wrong with a model."""
    setting = _find_setting(task, s)

    def run(sink: TableSink) -> str:
        verdict = setting.diagnose()
        sink.add({"findings": verdict.table})
        sink.keep_verdict(verdict)
        return str(verdict.json if s.config.json else verdict)

    return run


def gains_stage(task: Any, s: JobSettings) -> Stage:
    """Of all activations, whatever the options say."""
    return _measure_later(lambda: {"gains": task.gains()}, lambda frames: task.gains_as_text(frames["gains"]))


def jacobian_stage(task: Any, s: JobSettings) -> Stage:
    """The singular values of the stack's Jacobians."""
    return _measure_later(lambda: task.jacobian(**s.keywords()), task.jacobian_as_text)


def formats_stage(task: Any, s: JobSettings) -> Stage:
    """The stack in every number format, whatever `dtype` says."""
    asked = {name: value for name, value in s.keywords().items() if name != "dtype"}
    return _measure_later(lambda: task.formats(**asked), task.formats_as_text)


def phase_stage(task: Any, s: JobSettings) -> Stage:
    """Of `init` only the law of the weights counts: their size is what the plane is about."""
    p = s.config.phase
    if s.rule.distribution not in LAWS:
        raise UsageError(f"init._target_={s.rule.distribution}: task=phase scales weights of a known law alone")
    sigma_w, sigma_b = (task.Axis(axis.min, axis.max, axis.points) for axis in (p.sw, p.sb))
    asked = {"batch": p.batch, "correlation": p.correlation, "weights": p.weights, "distribution": s.rule.distribution}
    scales = (sigma_w, sigma_b if p.plane == "sigma" else p.sigma_b)
    where = s.keywords("activation", "depth", "width", "seeds", "dtype", "device", "generator", "progress")
    frames = task.phase(p.plane, *scales, **asked, **where)

    def run(sink: TableSink) -> str:
        kept = []
        for frame in frames:
            sink.add({"phase": frame})
            kept.append(frame)
        return str(task.phase_as_text(pd.concat(kept)))

    return run


class Task(NamedTuple):
    """What a task is made of: for each stage the module of its functions, and what makes the stage of that module.

    any_function: takes any elementwise function, not only the activations of the table. by_rule: it matters which gain
    the rule takes. statistics: takes statistics of the user. json: what it prints is JSON where that is asked for.
    """

    stages: tuple[tuple[str, Callable[[Any, JobSettings], Stage]], ...]
    any_function: bool = False
    by_rule: bool = False
    statistics: bool = False
    json: bool = False


TASKS: dict[str, Task] = {
    "lab": Task((("stack", stack_stage), ("train", train_stage)), any_function=True, by_rule=True, statistics=True),
    "stack": Task((("stack", stack_stage),), any_function=True, by_rule=True, statistics=True),
    "train": Task((("train", train_stage),), any_function=True, by_rule=True, statistics=True),
    "seeded": Task((("seeded", seeded_stage),), any_function=True, by_rule=True),
    "broadcast": Task((("course.broadcast", broadcast_stage),)),
    "matmul": Task((("course.ladders", matmul_stage),)),
    "backward": Task((("course.ladders", backward_stage),)),
    "graph": Task((("course.graph", graph_stage),)),
    "explain": Task((("course.explain", explain_stage),)),
    "audit": Task((("model_checks", audit_stage),), json=True),
    "diagnose": Task((("model_checks", diagnose_stage),), json=True),
    "gains": Task((("gains", gains_stage),)),
    "jacobian": Task((("jacobian", jacobian_stage),), by_rule=True),
    "formats": Task((("formats", formats_stage),), any_function=True, by_rule=True),
    "phase": Task((("phase", phase_stage),)),
}
