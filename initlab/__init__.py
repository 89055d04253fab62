"""initlab: what happens to the numbers in a deep network under this initialization, forward, backward and in training?

The map of the house. Imports run one way, downwards in this list never:

    errors.py      a user's mistake in one line; the one thing that every room may import
    signal/        numbers passing through layers; a library that knows nothing of the harness
        activations.py   table: function, derivative, gains by quadrature
        init.py          the variance-scaling formula and its named rules; order-free random numbers
        stats.py         table of statistics that outlive the number format; tidy rows
    scratch/       the from-scratch network, in reading order
        matmul.py        the matmul ladder
        layers.py        forward and hand-written backward, neighbours on the page; the same with `.g`
        classes.py       layers that remember their call; LayerFunction
        modules.py       the same rules as torch.autograd.Function and nn.Module
        mlp.py           the MLP by hand and its nn.Module twin
        problem.py       what every version refuses before it starts
        backward.py      every version of the backward pass behind one signature
        agreement.py     equal up to rounding, or not
        graph.py         autograd's own graph, walked; graph_text.py tells it as text
    tasks/         what can be run, a file each: plain arguments in, frames out; knows nothing of Hydra
        place.py         device and number format
        data.py          the batches: digits, MNIST from files, a teacher
        stack.py         a stack of layers, forward and backward
        train.py         two trainings side by side
        memory.py        how much there is, how much a call holds at its peak
        timing.py        a ladder timed fairly: warm-up, rotation, memory, equality in the same run
        ladders.py       the matmul ladder and the backward ladder
        graph.py         autograd's graph of a small model, as frames
        explain.py       one backward pass, step by step: who sets which .g
    output/        what is kept and shown: takes frames, imports no task
        records.py       what a run folder holds; write and read
        summary.py       frames -> the short table and the findings in words
        expect.py        does a study's expected answer hold?
        axes.py          what figures are made of: bands, marks of death, ends of the number formats
        graphs.py        autograd's graph -> figure
        plots.py         frame -> figure
    config.py      the typed schema of conf/, and where conf/ is found
    launcher.py    what surrounds the jobs of a sweep
    jobs.py        one job: typed configuration -> run folder, figures, what is printed
    __main__.py    the roof: compose, run its jobs, exit codes

From Python: `initlab.read("outputs/**")` gives the tables of all runs, `initlab.gain("relu")` an activation's gain;
`initlab.tasks.stack.stack(...)` and `initlab.tasks.train.train(...)` run the tasks and return their frames.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from initlab.output.records import read as read
    from initlab.signal.activations import gain as gain
    from initlab.signal.probe import probe as probe

# Public name -> where it is defined. Loaded on first use: `import initlab` alone is cheap.
_PUBLIC = {"read": "initlab.output.records", "gain": "initlab.signal.activations", "probe": "initlab.signal.probe"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'initlab' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
