"""initlab's side of every race: the one file that knows how initlab is called.

Where this initlab lacks what is asked for, `NotAvailable` says what; where it lacks only the faster road, `parts` takes
the slower one to the same rows.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import initlab
from benchmarks import bare, parts
from benchmarks.nets import LR, Net, batch, parameters
from benchmarks.race import Contestant, NotAvailable
from initlab.errors import UsageError
from initlab.scratch.backward import VERSIONS
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.init import Rule, rule
from initlab.signal.stats import Rows
from initlab.tasks.stack import stack

ENGINE = "initlab.scratch.engine"
REPLAY = "initlab.tasks.replay"
NETWORKS = "initlab.tasks.networks"  # with it, a stack's own pass can be had over other weights
CURVES = "initlab.tasks.curves"  # every gain of a homogeneous stack from one run
BACKWARD = "engine"  # the row of the backward ladder that initlab trains with

CAPTURE_AFTER = 3  # steps before a graph is captured

# What is recorded at a step: name -> options of a Recording.
RECORDINGS: dict[str, dict[str, bool]] = {
    "accelerated": {"histograms": True, "accelerated": True},
    "nohist": {"histograms": False, "accelerated": True},
    "plain": {"histograms": False, "accelerated": False},
    "plain_histograms": {"histograms": True, "accelerated": False},
}


def options(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """What is asked of the function; not available where it has no option of that name, unless False is asked."""
    known = inspect.signature(function).parameters
    for name, value in wanted.items():
        if name not in known and value is not False:
            raise NotAvailable(f"{function.__module__}.{function.__qualname__} has no option `{name}`")
    return {name: value for name, value in wanted.items() if name in known}


def module_named(name: str) -> Any:
    """The module, or None where this initlab has none of that name."""
    return import_module(name) if find_spec(name) else None


# --- a training step ---------------------------------------------------------------------------------------------


def hand_step(
    net: Net, seeds: Sequence[int] = (0,), record: str | None = None, every: int = 1, device: str = "cpu"
) -> Contestant:
    """`every` steps of the hand-written network, the first of them recorded; gives the losses (E,) of the last."""
    step = hand_call(net, seeds, record, device)
    bare_step = step if record is None else hand_call_of(step)
    return Contestant(lambda: _every(step, bare_step, every), every)


class HandStep:
    """A step of the hand-written network, recorded or not, on its own weights and batch."""

    def __init__(self, engine: Any, recording: Any, xb: Tensor, yb: Tensor) -> None:
        self.engine, self.recording, self.xb, self.yb = engine, recording, xb, yb

    def __call__(self) -> Tensor:
        losses: Tensor = self.engine.step(self.xb, self.yb, self.recording)
        return losses


def hand_call(net: Net, seeds: Sequence[int] = (0,), record: str | None = None, device: str = "cpu") -> HandStep:
    own, (xb, yb) = parameters(net, seeds, device), batch(net, seeds, device)
    module = module_named(ENGINE)
    if module is None:
        engine: Any = parts.Engine(own, "relu", "cross_entropy", LR)
    else:
        engine = module.Engine(own, activation="relu", loss="cross_entropy", lr=LR, batch=net.batch)
    return HandStep(engine, _recording(module, engine, record, seeds), xb, yb)


def hand_call_of(step: HandStep) -> HandStep:
    """The same network, a step that records nothing."""
    return HandStep(step.engine, None, step.xb, step.yb)


def _recording(module: Any, engine: Any, record: str | None, seeds: Sequence[int]) -> Any:
    if record is None:
        return None
    if module is not None:
        try:
            return module.Recording(engine, **RECORDINGS[record])
        except UsageError as reason:
            raise NotAvailable(str(reason)) from None
    return parts.Recording(seeds, **options(Rows, **RECORDINGS[record]))


def fastest(build: Callable[[bool], Contestant]) -> Contestant:
    """The contestant with the accelerated pass, or where there is none with the plain one."""
    try:
        return build(True)
    except NotAvailable:
        return build(False)


def _every(recorded: Callable[[], Any], bare_step: Callable[[], Any], every: int) -> Any:
    out = recorded()
    for _ in range(every - 1):
        out = bare_step()
    return out


def probe_step(net: Net, accelerated: bool, every: int = 1) -> Contestant:
    """`every` steps of nn.Module + SGD under the probe, one of them recorded."""
    if not hasattr(initlab, "probe"):
        raise NotAvailable("initlab.probe is not there")
    model = bare.module(net)
    optimizer = bare.sgd(model)
    xb, yb = batch(net)
    wanted = options(initlab.probe, accelerated=accelerated)
    if "emit" in inspect.signature(initlab.probe).parameters:
        wanted["emit"] = len  # rows are handed over on the way, as in a long training
    context = initlab.probe(model, optimizer=optimizer, every=every, **wanted)
    context.__enter__()
    step = bare.step_of(model, optimizer, xb[0], yb[0])
    return Contestant(lambda: _every(step, step, every), every, lambda: context.__exit__(None, None, None))


def backward_pass(net: Net) -> Contestant:
    """Loss and gradients of one pass by hand, from a single network's parameters."""
    own = [(w[0], b[0]) for w, b in parameters(net)]
    xb, yb = batch(net)
    step = VERSIONS[BACKWARD].bind(own, "relu", "mse")
    return Contestant(lambda: step(xb[0], yb[0]))


# --- a stack ---------------------------------------------------------------------------------------------------------


def watched_stack(weights: Sequence[Tensor], x: Tensor, accelerated: bool) -> Contestant:
    """A stack over weights drawn before, every statistic of every layer but no histogram.

    A call gives what makes the frame of its rows: a run makes one frame of many passes, so none is made here.
    """
    wanted = options(Rows, accelerated=accelerated)
    if module_named(NETWORKS) is not None:
        return Contestant(_own_pass(weights, x))

    def layers() -> Iterator[tuple[Tensor, None]]:
        return ((w, None) for w in weights)

    return Contestant(lambda: parts.stack_rows(x, layers(), "relu", [0], **wanted).rows.frame)


def _own_pass(weights: Sequence[Tensor], x: Tensor) -> Callable[[], Callable[[], Any]]:
    """The pass that `stack` itself makes, over these weights instead of its own."""
    module, networks = module_named(stack.__module__), module_named(NETWORKS)
    shape = networks.Shape(len(weights), x.shape[-1], x.shape[-1], x.shape[-2])
    nets = networks.Networks([rule("kaiming")], "relu", shape, [0], x.dtype, x.device)
    nets.weights = lambda layer, who=None: (weights[layer - 1], None)
    nets.gaussian = lambda units, what: x
    silent = tqdm(disable=True)

    def run() -> Callable[[], Any]:
        frames: list[Any] = []
        record = module._Record(nets, None, lambda part: frames.append(part["stats"]), False)
        flush, record.flush = record.flush, lambda: None
        module._Pass(nets, ACTIVATIONS["relu"], record, False, silent).run()

        def frame() -> Any:
            flush()
            return frames[0]

        return frame

    return run


def forward_only(
    init: Rule | str,
    activation: str = "relu",
    depth: int = 50,
    width: int = 100,
    rows: int = 200,
    seeds: Sequence[int] = (0,),
    accelerated: bool = False,
    device: str = "cpu",
) -> int:
    """Draw, stack and measure the forward pass alone; the rows are counted and let go."""
    count = 0

    def emit(part: Any) -> None:
        nonlocal count
        count += part if isinstance(part, int) else sum(map(len, part.values()))

    wanted = options(stack, accelerated=accelerated)
    try:
        wanted |= options(stack, backward=None, emit=emit) | {"backward": False}
    except NotAvailable:
        if device != "cpu":
            raise
        parts.forward_only(rule(init) if isinstance(init, str) else init, activation, depth, width, rows, seeds, emit)
        return count
    frame = stack(init, activation, depth, width, batch=rows, seeds=seeds, device=device, **wanted)
    return count if frame is None else max(count, len(frame))


def four_scalings(accelerated: bool) -> Contestant:
    """The chapter's four attempts; gives the number of rows of each."""
    attempts = [
        (Rule(gain=1.0, mode="constant"), "linear"),
        (Rule(gain=0.01, mode="constant"), "linear"),
        (Rule(gain=1.0), "linear"),
        (Rule(), "relu"),
    ]
    wanted = options(stack, accelerated=accelerated)
    curves = module_named(CURVES)
    if curves is None:
        return Contestant(lambda: [forward_only(*attempt, accelerated=accelerated) for attempt in attempts])

    def shared() -> list[int]:
        """The attempts without an activation are one run, and factors."""
        linear = [init for init, activation in attempts if activation == "linear"]
        rows = curves.gain_curves(linear, "linear", seeds=[0], backward=False, **wanted)
        return [len(rows) // len(linear)] * len(linear) + [forward_only(*attempts[-1], accelerated=accelerated)]

    return Contestant(shared)


def stack_networks(count: int, accelerated: bool, device: str = "cpu") -> Contestant:
    """`count` networks drawn, stacked and measured."""
    options(stack, accelerated=accelerated)
    return Contestant(
        lambda: forward_only("kaiming", seeds=range(count), accelerated=accelerated, device=device), count
    )


# --- a GPU -----------------------------------------------------------------------------------------------------------


def replayed(net: Net, record: str | None) -> Contestant:
    """A step of the hand-written network captured as a CUDA graph and replayed."""
    module = module_named(REPLAY)
    if module is None or module_named(ENGINE) is None:
        raise NotAvailable(f"{REPLAY} or {ENGINE} is not there")
    step = module.captured(hand_call(net, record=record, device="cuda"), torch.device("cuda"), warmup=CAPTURE_AFTER)
    for _ in range(CAPTURE_AFTER + 1):
        step()
    return Contestant(step)


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotAvailable("torch sees no CUDA GPU here")
