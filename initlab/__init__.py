"""initlab: what happens to the numbers in a deep network under this initialization, forward, backward and in training?

The map of the house. Imports run one way, downwards in this list never:

    errors.py      a user's mistake in one line; the one thing that every room may import
    signal/        numbers passing through layers; a library that knows nothing of the harness
        activations.py   table: function, derivative, gains by quadrature
        init.py          the variance-scaling formula and its named rules; order-free random numbers
        lsuv.py          weights scaled by what the data make of them
        mup.py           what must follow the width: the last layer, the learning rates
        jacobian.py      singular values of a stack, measured and predicted
        philox.py        random numbers by position; triton_philox.py: in one pass on a GPU
        exponent.py      numbers without a range: a tensor with its power of two carried
        accelerate.py    accelerated.cpp, statistics in the passes of ReLU, mask and update; built once, optional
        workspace.py     memory that is kept between calls, for a CPU
        octaves.py       entries by sign and octave: a histogram that needs no range
        units.py         the row of a tensor, unit by unit; merging the rows of shards
        moments.py       the door of the row format: summarize, derive
        fused_triton.py  the same row on a GPU; triton_kernels.py, triton_merge.py: its programs
        stats.py         table of statistics that outlive the number format; tidy rows
        seats.py         tensors by address, for the compiled passes
        ledger.py        what rows are about: words, steps; tidy.py makes columns of them
        buffer.py        rows on their device until a frame is asked for
        watched.py       which modules give rows, and what counts units
        hooks.py         the hooks that see their tensors; parameters.py: weights, gradients, updates
        loop.py          which steps of a user's loop are recorded; one_pass.py: one pass that leaves no trace
        probe.py         watches any nn.Module or hand-written network and yields tidy rows
        quadrature.py    means over a normal variable; custom.py: a function of one's own as a row of the activations
        maps.py          infinite width: lengths, correlations, slopes; phases.py: fixed points and critical lines
        trajectories.py  the same layer by layer, for a plane of rules at once
        gains.py         every gain and what it leads to; formats.py: where a number format ends a stack
        theory.py        what is predicted for a stack, with bands; case.py: the question, checked
        finite_width.py  exact laws; gram_chain.py: simulated ones
        closure.py       the law of a batch from layer to layer; laws.py, unit_laws.py: what it is made of
        fits.py          weights that are fitted to data
        tensor_laws.py   what a stack's tensors show of it, all layers at once; gradients.py: the way back
        infinite_width.py  the same stack with all widths infinite; correlation_points.py: where two inputs end
        quantiles.py     which quantiles bands are
        bands.py         from a law to its statistics; beside.py: measured and predicted, row by row
    scratch/       the from-scratch network, in reading order
        matmul.py        the matmul ladder
        layers.py        forward and hand-written backward, neighbours on the page; the same with `.g`
        classes.py       layers that remember their call; LayerFunction
        modules.py       the same rules as torch.autograd.Function and nn.Module
        mlp.py           the MLP by hand and its nn.Module twin
        items.py         all tensors of a step, each with the words of its row
        engine.py        the fast path: the same rules in memory that is allocated once, for one network or many
        page.py          the rows of a few recorded steps
        pens.py          how a recorded step writes them: plain, or fused with its passes; launched.py: on a GPU
        recording.py     recorded steps of an engine, collected as tables
        problem.py       what every version refuses before it starts
        backward.py      every version of the backward pass behind one signature
        agreement.py     equal up to rounding, or not
        graph.py         autograd's own graph, walked; graph_text.py tells it as text
    tasks/         what can be run, a file each: plain arguments in, frames out; knows nothing of Hydra
        place.py         device, number format, how a GPU multiplies
        data.py          the batches: digits, MNIST from files, a teacher
        weights.py       the weights of a trained network, drawn, and fitted where a rule says so
        gains.py         every gain of every activation
        formats.py       where number formats end a stack, predicted and measured
        jacobian.py      singular values through the stack
        points.py        many networks that differ in (sigma_w, sigma_b) as rows of one product
        phase.py         a plane of them beside theory
        networks.py      the networks of one program: rules, draws, how many fit
        beyond.py        networks followed beyond their number format
        stack.py         a stack of layers, forward and backward
        shares.py        networks of several owners in one program, and whose rows are whose
        chunks.py        an ensemble in chunks: a chunk to each processor, fewer networks where memory is short
        seeded.py        the stack that circulates in course material, from torch's own stream
        seen.py          what a task hands over, beside its prediction
        curves.py        every gain of a homogeneous stack from one run
        pair.py          an ensemble by hand and its nn.Module twins, a step at a time, and their records
        train.py         two trainings side by side
        replay.py        a step as a CUDA graph, and how its rows leave
        memory.py        how much there is, how much a call holds at its peak
        rounds.py        calls timed against each other in rotated rounds
        timing.py        a ladder: memory, equality and time in the same run
        ladders.py       the matmul ladder and the backward ladder
        graph.py         autograd's graph of a small model, as frames
        explain.py       one backward pass, step by step: who sets which .g
    output/        what is kept and shown: takes frames, imports no task
        shards.py        Parquet files, one written, thousands read; folders.py: where runs lie and how they ended
        gather.py        many runs -> one frame and what is to be said of them
        records.py       what a run folder holds; write and read
        claim.py         one run to a folder, as long as its process lives
        summary.py       frames -> the short table and the findings in words
        collect.py       many runs -> one file, or a short account
        distance.py      how far apart are two sets of networks; compare.py: two runs or sweeps
        words.py         values of options as words of a label
        predicted.py     measured beside predicted -> layers within their band, lines for figures
        selection.py     which rows and columns a study speaks of; columns.py: those known beforehand
        reductions.py    rows of many networks -> a number and its standard error
        expect.py        does a study's expected answer hold?
        picture.py       what a study's figure shows; study.py draws it
        octaves.py       histograms over the training -> figure
        gains.py         their figure; jacobian.py, formats.py: singular values, ends of formats
        phase.py         measured and predicted planes -> figure
        axes.py          what figures are made of: bands, marks of death, ends of the number formats
        graphs.py        autograd's graph -> figure
        plots.py         frame -> figure
    schema.py      the types of conf/; config.py: where conf/ is found, a mistake in an option in one line
    composing.py   the configurations of a sweep's jobs, composed once and changed from job to job
    grid.py        the networks of one job: seeds, or every combination on the axes `sweep.*`
    together.py    stages whose networks can share a program; batch.py: jobs that do, and what becomes of each
    batched.py     the launcher `hydra/launcher=batched`
    launcher.py    what surrounds the jobs of a sweep
    sweeper.py     from the words of a sweep to its jobs; resume.py: what is left of one that was stopped
    workers.py     jobs in processes of their own: threads, GPUs, what a launcher must be told
    plugins.py     how Hydra comes to know initlab's own
    commands.py    what a first word without `=` asks for: collect, compare, gallery
    study.py       question, expectations and what came of them; gallery.py: all of them in experiments/README.md
    stages.py      the tasks as their stages: plain arguments out of the configuration, frames into a recorder
    jobs.py        one job: typed configuration -> run folder, figures, what is printed
    __main__.py    the roof: compose, run its jobs, exit codes

From Python: `initlab.read("outputs/**")` gives the tables of all runs, `initlab.probe(model, x, y, loss)` the rows of
any nn.Module, `initlab.predict(init, activation, depth, width)` what theory says of a stack (`predict_bands` with the
bands of every statistic), `initlab.gain("relu")`, `initlab.phase("tanh", sw2, sb2)`, `initlab.critical("tanh", sb2)`,
`initlab.limits("naive", "relu")` where each number format ends a stack;
`initlab.tasks.stack.stack(...)` and `initlab.tasks.train.train(...)` run the tasks and return their frames.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from initlab.output.records import read as read
    from initlab.signal.custom import gain as gain
    from initlab.signal.formats import limits as limits
    from initlab.signal.phases import critical as critical
    from initlab.signal.phases import phase as phase
    from initlab.signal.probe import probe as probe
    from initlab.signal.theory import predict as predict
    from initlab.signal.theory import predict_bands as predict_bands

# Public name -> where it is defined. Loaded on first use: `import initlab` alone is cheap.
_PUBLIC = {
    "read": "initlab.output.records",
    "gain": "initlab.signal.custom",
    "limits": "initlab.signal.formats",
    "phase": "initlab.signal.phases",
    "critical": "initlab.signal.phases",
    "predict": "initlab.signal.theory",
    "predict_bands": "initlab.signal.theory",
    "probe": "initlab.signal.probe",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'initlab' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
