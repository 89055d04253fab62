"""The tasks as their stages: each refuses its mistakes when it is made, and measures and records when it is called."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import pandas as pd

from initlab.errors import UsageError, check
from initlab.job.network_grid import grid_of
from initlab.job.options import instantiate
from initlab.job.settings import Config
from initlab.job.shared_program import Ensemble
from initlab.nn.init import Rule
from initlab.runs import summary
from initlab.runs.recorder import Recorder
from initlab.scratch.graph_text import frames_as_text
from initlab.stats.dtypes import resolve_dtype
from initlab.tasks.course.explain import explain
from initlab.tasks.course.graph import graph
from initlab.tasks.course.ladders import backward_ladder, matmul_ladder
from initlab.tasks.course.timing import agreement
from initlab.tasks.data import TEACHER_ROWS, Data, load
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.networks import Shape, kept_as_text, plan
from initlab.tasks.ensemble.with_theory import Seen
from initlab.tasks.formats import formats, formats_as_text
from initlab.tasks.gains import gains, gains_as_text
from initlab.tasks.jacobian import jacobian, jacobian_as_text
from initlab.tasks.phase import Axis, phase, phase_as_text
from initlab.tasks.seeded import seeded
from initlab.tasks.stack import stack
from initlab.tasks.train import outputs_of, refuse_mismatch, train
from initlab.theory.z_scores import InputMoments, compare_stack, compare_training, measure_input

Stage = Callable[[Recorder], str]  # measures, records, and says what is to be printed beside the short table


WORTH_SAYING = 2**30  # bytes


def _stack(config: Config, common: Mapping[str, Any]) -> Stage:
    """Plans the memory at once: a network that does not fit alone is a mistake of the user."""
    inputs = config.width if config.inputs is None else config.inputs
    check(inputs=inputs)
    shape = Shape(config.depth, config.width, inputs, config.batch)
    number, place = resolve_dtype(config.dtype), find_device(config.device)
    grid = grid_of(config, common["init"], common["activation"])
    planned = plan(shape, len(grid.seeds), number, place, config.backward)
    asked = {"activation": common["activation"], **shape._asdict()}

    def predict(stats: pd.DataFrame, rule: Rule, method: str) -> pd.DataFrame:
        return compare_stack(stats, init=rule, method=method, **asked)

    return Ensemble(
        partial(stack, **shape._asdict(), backward=config.backward, **_fixed(common)),
        grid,
        None if config.theory == "off" else predict,
        config.theory,
        at_once=True,
        note=kept_as_text(planned) if planned.kept > WORTH_SAYING else "",
    )


def _fixed(common: Mapping[str, Any]) -> dict[str, Any]:
    """What all networks of a program share."""
    return {name: value for name, value in common.items() if name not in ("init", "seeds")}


def _seeded(config: Config, common: Mapping[str, Any]) -> Stage:
    if common["device"] != "cpu":
        raise UsageError(f"device={config.device}: task=seeded is about the CPU's numbers; use device=cpu")
    shape = {name: getattr(config, name) for name in ("depth", "width", "batch")}
    asked = {**{name: common[name] for name in ("init", "activation")}, **shape}

    def run(recorder: Recorder) -> str:
        seen = Seen(recorder.add, config.theory != "off", lambda stats: stats)

        def measure() -> None:
            seen.add({"stats": seeded(**asked, seeds=common["seeds"], dtype=config.dtype)})

        beside = partial(compare_stack, **asked, inputs=config.width)
        recorder.note(seen.around(measure, beside, config.theory))
        return ""

    return run


def _train(config: Config, common: Mapping[str, Any]) -> Stage:
    """Loads the data at once: what is wrong with it must show before anything is measured."""
    source = (config.data.name, config.data.root, config.data.download, config.data.url)
    data, t = _data(*source), config.train
    refuse_mismatch(data, t.loss, t.batch)
    grid = grid_of(config, common["init"], common["activation"])
    if len(set(grid.rates)) > 1 and t.optimizer != "sgd":
        raise UsageError(f"sweep.lr: train.optimizer={t.optimizer} has one learning rate for all; use sgd")

    def predict(stats: pd.DataFrame, rule: Rule, method: str) -> pd.DataFrame:
        widths, given = [*[t.width] * t.depth, outputs_of(data, t.loss)], _input(*source, t.batch)
        return compare_training(
            stats, widths, given, t.batch, init=rule, activation=common["activation"], method=method
        )

    how = {name: value for name, value in vars(t).items() if name != "lr"}
    return Ensemble(
        partial(train, data, **how, every=config.every, histograms=config.histograms, **_fixed(common)),
        grid,
        None if config.theory == "off" else predict,
        config.theory,
        chosen=lambda stats: stats[stats["step"] == 0],
        rates=True,
    )


@lru_cache(maxsize=1)
def _data(name: str, root: str, download: bool, url: str) -> Data:
    """The jobs of a sweep share their data."""
    return load(name, root, download, url)


@lru_cache(maxsize=1)
def _input(name: str, root: str, download: bool, url: str, batch: int) -> InputMoments:
    return measure_input(_data(name, root, download, url).x.numpy(), batch)


def _matmul(config: Config, common: Mapping[str, Any]) -> Stage:
    def run(recorder: Recorder) -> str:
        place = {name: common[name] for name in ("dtype", "device", "progress")}
        frame = matmul_ladder(seed=config.seed, **place)
        return _timed(recorder, frame, config.dtype)

    return run


def _backward(config: Config, common: Mapping[str, Any]) -> Stage:
    """The book's regression: its 50,000 rows at once, and minibatches of `train.batch`."""
    t = config.train
    batches = sorted({t.batch, TEACHER_ROWS})

    def run(recorder: Recorder) -> str:
        place = {name: common[name] for name in ("activation", "dtype", "device", "progress")}
        frame = backward_ladder(batches, t.depth, t.width, seed=config.seed, **place)
        return _timed(recorder, frame, config.dtype)

    return run


def _timed(recorder: Recorder, frame: pd.DataFrame, dtype: str) -> str:
    recorder.add({"timings": frame})
    return f"{summary.timings_as_text(frame)}\n{agreement(frame, dtype)}"


def _explain(config: Config, common: Mapping[str, Any]) -> Stage:
    t = config.train
    place = {name: common[name] for name in ("init", "activation", "dtype", "device")}
    explanation = explain(t.depth, t.width, t.batch, loss=t.loss, seed=config.seed, **place)

    def run(recorder: Recorder) -> str:
        recorder.add({"steps": explanation.steps, "rules": explanation.rules})
        return explanation.text

    return run


def _graph(config: Config, common: Mapping[str, Any]) -> Stage:
    """Walks the graph at once: a model that cannot be built or run is a mistake of the user."""
    t, given = config.train, config.graph
    own: dict[str, Any] = {
        "depth": t.depth,
        "width": t.width,
        "batch": t.batch,
        "loss": None if given.model else t.loss,
    }
    setting = {name: common[name] for name in ("init", "activation", "dtype", "device")}
    frames = graph(instantiate(given.model), shapes=given.shapes, seed=config.seed, **own, **setting)
    notes = [f"note: {note}" for note in frames.pop("notes")["note"]]

    def run(recorder: Recorder) -> str:
        recorder.add(frames)
        return "\n".join([frames_as_text(frames["nodes"], frames["edges"]), *notes])

    return run


def _gains(config: Config, common: Mapping[str, Any]) -> Stage:
    """Of all activations, whatever the options say."""

    def run(recorder: Recorder) -> str:
        frame = gains()
        recorder.add({"gains": frame})
        return gains_as_text(frame)

    return run


def _jacobian(config: Config, common: Mapping[str, Any]) -> Stage:
    inputs = config.width if config.inputs is None else config.inputs
    check(inputs=inputs)

    def run(recorder: Recorder) -> str:
        frames = jacobian(depth=config.depth, width=config.width, inputs=inputs, batch=config.batch, **common)
        recorder.add(frames)
        return jacobian_as_text(frames)

    return run


def _formats(config: Config, common: Mapping[str, Any]) -> Stage:
    inputs = config.width if config.inputs is None else config.inputs
    check(inputs=inputs)
    shape: dict[str, Any] = {name: getattr(config, name) for name in ("depth", "width", "batch")}
    own = {name: value for name, value in common.items() if name != "dtype"}

    def run(recorder: Recorder) -> str:
        frames = formats(**shape, inputs=inputs, **own)
        recorder.add(frames)
        return formats_as_text(frames)

    return run


def _phase(config: Config, common: Mapping[str, Any]) -> Stage:
    """Of `init` only the law of the weights counts: their size is what the plane is about."""
    p = config.phase
    sw, sb = (Axis(axis.min, axis.max, axis.points) for axis in (p.sw, p.sb))
    asked = {name: getattr(p, name) for name in ("sigma_b", "batch", "correlation", "weights")}
    asked |= {name: value for name, value in common.items() if name != "init"}
    asked |= {"depth": config.depth, "width": config.width, "distribution": common["init"].distribution}
    frames = phase(p.plane, sw, sb, **asked)

    def run(recorder: Recorder) -> str:
        kept = []
        for frame in frames:
            recorder.add({"phase": frame})
            kept.append(frame)
        return phase_as_text(pd.concat(kept))

    return run


# Task -> its stages, each prepared before the first one runs.
TASKS: dict[str, tuple[Callable[[Config, Mapping[str, Any]], Stage], ...]] = {
    "lab": (_stack, _train),
    "stack": (_stack,),
    "train": (_train,),
    "seeded": (_seeded,),
    "matmul": (_matmul,),
    "backward": (_backward,),
    "graph": (_graph,),
    "explain": (_explain,),
    "gains": (_gains,),
    "jacobian": (_jacobian,),
    "formats": (_formats,),
    "phase": (_phase,),
}


TAKE_ANY_FUNCTION = ("lab", "stack", "train", "seeded", "formats")  # the other tasks know the rows of the table only
DRAW_BY_RULE = (*TAKE_ANY_FUNCTION, "jacobian")  # where it matters which gain a rule takes
