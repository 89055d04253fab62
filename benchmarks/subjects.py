"""initlab's side of every race: the one file that knows how initlab is called.

Where the machine lacks what a contestant needs, a compiler or a GPU, `NotAvailable` says so. A plain contestant takes
the plain backend in every call: accelerated ones run between its calls.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import initlab
from benchmarks import bare
from benchmarks.nets import LR, Net, batch, parameters
from benchmarks.race import Contestant, NotAvailable
from initlab.engine.fast_network import Engine
from initlab.engine.recorders import Recording
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, rule
from initlab.scratch.backward import Step
from initlab.stats.buffer import StatsBuffer
from initlab.stats.kernels.cpu import library, plain
from initlab.stats.measure import backend_for
from initlab.tasks import stack as stacks
from initlab.tasks.course.engine_versions import BACKWARDS
from initlab.tasks.curves import gain_curves
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Ensemble, Frames, Networks
from initlab.tasks.ensemble.networks import Net as StackNet
from initlab.tasks.phase import measured_layers
from initlab.tasks.phase_points import Points, measure_points

BACKWARD = "fast"  # the row of the backward ladder that initlab trains with
TABLE_STEPS = 50  # recorded steps of which tables are made at once; a training makes them of more

# What is recorded at a step: variant -> options of a Recording.
RECORDINGS: dict[str, dict[str, bool]] = {
    "accelerated": {"histograms": True, "accelerated": True},
    "nohist": {"histograms": False, "accelerated": True},
    "plain": {"histograms": False, "accelerated": False},
    "plain_histograms": {"histograms": True, "accelerated": False},
}


def available(accelerated: bool) -> bool:
    """What was asked for; not available where the compiled passes are wanted and cannot be had."""
    if accelerated and library() is None:
        raise NotAvailable("the compiled passes cannot be had: no compiler, or switched off")
    return accelerated


def fastest() -> str:
    """The variant with everything by the fastest backend of this machine."""
    return "accelerated" if library() is not None else "plain_histograms"


def backend(accelerated: bool, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on the plain backend if it is not accelerated."""

    def on_it() -> Any:
        with nullcontext() if accelerated else plain():
            return call()

    return on_it


# --- a training step ---------------------------------------------------------------------------------------------


class Hand:
    """The hand-written network with its batch: `bare` is a step, `recorded` one that leaves its rows behind.

    The pages of recorded steps are handed over as in a training; the rows are let go once there are many.
    """

    def __init__(
        self, net: Net, seeds: Sequence[int] = (0,), record: str = "plain", device: str = "cpu", keep: bool = False
    ) -> None:
        self.seeds, self.options, self.keep = seeds, RECORDINGS[record], keep
        available(self.options["accelerated"] and device == "cpu")
        self.batch, self.steps = batch(net, seeds, device), 0
        self.engine = Engine(parameters(net, seeds, device), "relu", "cross_entropy", LR, net.batch)
        backend = backend_for(device, accelerated=self.options["accelerated"])
        self.recording = Recording(self.engine, StatsBuffer(seeds, backend, self.options["histograms"]))

    def bare(self) -> Tensor:
        return self.engine.step(*self.batch)

    def recorded(self) -> Tensor:
        if not self.keep and self.steps % TABLE_STEPS == 0:
            self.recording.buffer.clear()
        self.steps += 1
        return self.recording.step(*self.batch, self.steps - 1)

    def tables(self) -> list[Any]:
        """What was recorded since the last time, as frames."""
        self.recording.flush()
        return list(self.recording.buffer.take_tables().values())


def bare_step(net: Net, seeds: Sequence[int] = (0,), device: str = "cpu") -> Contestant:
    """A step of the hand-written networks; gives the losses (E,)."""
    return Contestant(Hand(net, seeds, device=device).bare)


def recorded_step(
    net: Net, record: str, seeds: Sequence[int] = (0,), every: int = 1, device: str = "cpu"
) -> Contestant:
    """`every` steps of the hand-written networks, the first of them recorded; gives the losses (E,) of the last."""
    hand = Hand(net, seeds, record, device)
    return Contestant(lambda: _every(hand.recorded, hand.bare, every), every)


def tabled_step(net: Net, record: str) -> Contestant:
    """As many recorded steps as tables are made of, and the tables; gives these."""
    hand = Hand(net, record=record, keep=True)

    def steps() -> list[Any]:
        for _ in range(TABLE_STEPS):
            hand.recorded()
        return hand.tables()

    return Contestant(steps, TABLE_STEPS)


def _every(recorded: Callable[[], Any], bare_step: Callable[[], Any], every: int) -> Any:
    out = recorded()
    for _ in range(every - 1):
        out = bare_step()
    return out


def probed_step(net: Net, record: str, every: int = 1, tables: bool = False, device: str = "cpu") -> Contestant:
    """`every` steps of nn.Module + SGD under the probe, one of them recorded; gives the loss of the last.

    The probe makes its frame of the last TABLE_STEPS recorded steps by itself; with `tables` a call holds just one.
    """
    histograms, accelerated = RECORDINGS[record]["histograms"], RECORDINGS[record]["accelerated"]
    available(accelerated and device == "cpu")
    model = bare.module(net, 0, device)
    optimizer = bare.sgd(model)
    xb, yb = batch(net, device=device)

    def emit(frame: Any) -> None:
        if histograms:
            context.histograms()

    with nullcontext() if accelerated else plain():
        context = initlab.probe(
            model, optimizer=optimizer, every=every, emit=emit, flush_steps=TABLE_STEPS, histograms=histograms
        )
    context.__enter__()
    step = bare.step_of(model, optimizer, xb[0], yb[0])
    work = every * TABLE_STEPS if tables else every
    call = backend(accelerated, lambda: _every(step, step, work))
    return Contestant(call, work, lambda: context.__exit__(None, None, None))


def backward_pass(net: Net) -> Contestant:
    """Loss and gradients of one pass by hand, from a single network's parameters."""
    step, (xb, yb) = _bound(net), batch(net)
    return Contestant(lambda: step(xb[0], yb[0]))


def first_backward_pass(net: Net) -> Contestant:
    """The same with a network of its own for each call, which holds what it has allocated once."""
    xb, yb = batch(net)
    return Contestant(lambda: _bound(net)(xb[0], yb[0]))


def _bound(net: Net) -> Step:
    return BACKWARDS[BACKWARD].bind([(w[0], b[0]) for w, b in parameters(net)], "relu", "mse")


# --- a stack ---------------------------------------------------------------------------------------------------------


def watched_stack(weights: Sequence[Tensor], x: Tensor, accelerated: bool) -> Contestant:
    """The forward pass that `stack` makes, over weights (1, O, O) drawn before: every statistic but no histogram.

    A call gives the statistics (S + 2, K, 1) of its rows: a run makes one frame of many passes, so none is made here.
    """
    available(accelerated)
    net = StackNet(ACTIVATIONS["relu"], len(weights), x.shape[-1], x.shape[-1], x.shape[-2])
    nets = _Drawn(net, Ensemble([rule("kaiming")], [0]), Where(x.dtype, x.device))
    nets.given, nets.input = weights, x
    silent = tqdm(disable=True)

    def forward() -> Tensor:
        record = stacks._Record(nets, backend_for(), None)
        stacks._Pass(nets, record, False, silent).forward()
        return record.rows.numbers()

    return Contestant(backend(accelerated, forward))


class _Drawn(Networks):
    """A network whose weights and input are there."""

    given: Sequence[Tensor]
    input: Tensor

    def weights(self, layer: int, who: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        return self.given[layer - 1], None

    def gaussian(self, units: int, what: str) -> Tensor:
        return self.input


def forward_only(
    init: Rule | str,
    activation: str = "relu",
    depth: int = 50,
    width: int = 100,
    rows: int = 200,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    generator: str = "philox",
) -> int:
    """Draw, stack and measure the forward pass alone; the rows are counted and let go."""
    count = 0

    def emit(part: Frames) -> None:
        nonlocal count
        count += len(part["stats"])

    stacks.stack(
        init, activation, depth, width, None, rows, seeds, device=device, generator=generator, backward=False, emit=emit
    )  # fmt: skip
    return count


# The chapter's four attempts, as rules.
LINEAR = (Rule(gain=1.0, mode="constant"), Rule(gain=0.01, mode="constant"), Rule(gain=1.0))
RELU = Rule()


def four_scalings(accelerated: bool) -> Contestant:
    """The chapter's four attempts, those without an activation as one run and factors; gives the rows of each."""
    available(accelerated)

    def four() -> list[int]:
        curves = gain_curves(LINEAR, "linear", seeds=[0], backward=False)
        return [len(curves) // len(LINEAR)] * len(LINEAR) + [forward_only(RELU)]

    return Contestant(backend(accelerated, four))


def stack_networks(count: int, accelerated: bool, device: str = "cpu", generator: str = "philox") -> Contestant:
    """`count` networks drawn, stacked and measured; gives the number of rows."""
    available(accelerated and device == "cpu")
    draw = partial(forward_only, "kaiming", seeds=range(count), device=device, generator=generator)
    return Contestant(backend(accelerated, draw), count)


def plane(count: int, depth: int, width: int, batch: int, fresh: bool = False) -> Contestant:
    """Tanh networks of a plane (sigma_w, sigma_b) as one program, drawn and looked at as `task=phase` does."""
    grid = [k / count for k in range(count)]
    points = Points([0.5 + 2.5 * k for k in grid], grid, ACTIVATIONS["tanh"], depth, width, batch, 0.5, fresh=fresh)
    return Contestant(lambda: measure_points(points, 0, *measured_layers("sigma", depth), Where()), count)


# --- many run folders ------------------------------------------------------------------------------------------------


def collected(folder: Path) -> Contestant:
    """One frame of all of them."""
    return Contestant(lambda: initlab.read(folder))


# --- a GPU -----------------------------------------------------------------------------------------------------------


def row_of_tensor(rows: int, units: int, device: str, accelerated: bool) -> Contestant:
    """The row and the histogram of a tensor of many vectors, as the probe of a transformer sees them."""
    x, measured = torch.randn(rows, units, device=device), backend_for(device, accelerated=accelerated)

    def row() -> Tensor:
        bins = measured.bins(1)
        return measured.rows(x.unsqueeze(0), True, bins)

    return Contestant(row)


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotAvailable("torch sees no CUDA GPU here")
