"""initlab: what happens to the numbers in a deep network under this initialization, forward, backward and in training?

The rooms, lowest first; imports go from a room to those above it in this list, never the other way:

    errors      a user's mistake, in one line
    stats/      numbers about a tensor: the table of statistics, rows that merge, histograms; kernels/ makes them fast
    nn/         a network as data and the pass through it; activations, initialization rules, order-free random numbers
    meanfield/  infinite width: length and correlation maps, fixed points, critical lines, what a gain leads to
    theory/     finite width: what is predicted for a stack, with bands, and how far a measurement is from it
    scratch/    the course: matmul, layers, the backward pass by hand, autograd's graph
    probes/     measuring any nn.Module: one pass, or a training loop
    models/     how any nn.Module is initialized: fans, laws of weights, what follows each layer
    verdict/    what is wrong with a network: evidence, rules, findings
    engine/     the fast training of one network or many, and its recorders
    tasks/      what can be run, plain values in and frames out; ensemble/ runs many networks, course/ the ladders
    runs/       run folders: writing, reading, collecting, comparing
    figures/    a function of frames, a figure out
    studies/    questions with expected answers, and their gallery
    job/        one job: its options, its stages, its life from start to end
    sweep/      many jobs: Hydra's sweeper, launchers, resuming
    commands    `initlab collect`, `compare`, `gallery`; __main__ composes the options and runs the jobs

At the top of the package, loaded when first used:

    measure     statistics of any nn.Module in one forward and backward pass
    probe       the same through a training loop, as a context manager
    audit       how every parameter of any nn.Module is initialized, and what it needs
    diagnose    what is wrong with a network: layer, cause, remedy
    stack       a stack of layers under a rule, forward and backward
    train       an MLP trained by hand and as an nn.Module, side by side
    predict     what theory predicts for a stack, with bands
    gain, phase, critical, limits   a rule at infinite width, and where number formats end it
    read, compare   the tables of any number of runs; what differs between two of them
    plot        the figure of any of these tables
    coordinate_check   what grows or vanishes with the width of your own model, and since which step
    compare_gradients   your backward pass against a reference, and why it differs
    init_       a rule applied to a model of one's own, with the gains that its activations need
    Rule, UsageError   an initialization rule; what is raised, in one line, for a mistake of the user
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from initlab.errors import UsageError as UsageError
    from initlab.figures.plot import plot as plot
    from initlab.meanfield.fixed_points import critical as critical
    from initlab.meanfield.fixed_points import phase as phase
    from initlab.models.initialize import init_ as init_
    from initlab.nn.custom_activation import gain as gain
    from initlab.nn.init import Rule as Rule
    from initlab.probes.probe import probe as probe
    from initlab.probes.snapshot import measure as measure
    from initlab.runs.compare import compare as compare
    from initlab.runs.read import read as read
    from initlab.scratch.agreement import compare_gradients as compare_gradients
    from initlab.tasks.coordinate_check import coordinate_check as coordinate_check
    from initlab.tasks.stack import stack as stack
    from initlab.tasks.train import train as train
    from initlab.theory.format_limits import limits as limits
    from initlab.theory.predict import predict as predict
    from initlab.verdict.audit import audit as audit
    from initlab.verdict.diagnose import diagnose as diagnose

# Public name -> where it is defined.
_PUBLIC = {
    "measure": "initlab.probes.snapshot",
    "probe": "initlab.probes.probe",
    "audit": "initlab.verdict.audit",
    "diagnose": "initlab.verdict.diagnose",
    "stack": "initlab.tasks.stack",
    "train": "initlab.tasks.train",
    "predict": "initlab.theory.predict",
    "gain": "initlab.nn.custom_activation",
    "phase": "initlab.meanfield.fixed_points",
    "critical": "initlab.meanfield.fixed_points",
    "limits": "initlab.theory.format_limits",
    "read": "initlab.runs.read",
    "compare": "initlab.runs.compare",
    "plot": "initlab.figures.plot",
    "coordinate_check": "initlab.tasks.coordinate_check",
    "compare_gradients": "initlab.scratch.agreement",
    "init_": "initlab.models.initialize",
    "Rule": "initlab.nn.init",
    "UsageError": "initlab.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'initlab' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
