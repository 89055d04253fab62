"""A result: what it is called, its JSON, and the bar it is held against. Knows nothing of how it was measured."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from initlab.errors import UsageError, choose

# id -> what is divided by what. Everything is recorded, every layer, every step, unless said otherwise.
IDS: dict[str, str] = {
    "step.deep.full": "by hand, everything recorded / bare nn.Module + SGD; 784-50x100-10, batch 128",
    "step.book.full": "by hand, everything recorded / bare nn.Module + SGD; 784-50-10, batch 64",
    "step.deep.bare": "by hand, nothing recorded / bare nn.Module + SGD; 784-50x100-10, batch 128",
    "step.book.bare": "by hand, nothing recorded / bare nn.Module + SGD; 784-50-10, batch 64",
    "step.deep.cost": "by hand, everything recorded / by hand, nothing recorded",
    "step.module.full": "nn.Module + SGD with initlab.probe / without; 784-50x100-10, batch 128",
    "train.recorded": "task=train, every step recorded and compared / both trainings as bare loops; 64-50x100-10",
    "train.book": "the same of the book's network, 64-50-10",
    "train.eight": "task=train of 8 networks 64-50x100-10, every step recorded / every 10th",
    "backward.50000": "one pass by hand / nn.Module, no gradient of the input; 50000x784-50-1",
    "stack.100": "50 layers of 100 units, batch 200, all but histograms / matmul and in-place ReLU alone",
    "stack.1000": "the same with 1000 units",
    "stack.nets": "networks per second, drawn, stacked, measured / the chapter's loop",
    "chapter.four": "four scalings x 50 layers, drawn, stacked, measured / the chapter's code",
    "ensemble.deep": "8 networks 784-50x100-10 in one program, nothing recorded / one nn.Module after the other",
    "ensemble.book": "16 networks 784-50-10 in one program, nothing recorded / one nn.Module after the other",
    "ensemble.narrow": "16 networks 784-100x32-10 in one program, nothing recorded / one nn.Module after the other",
    "phase.common": "a 64 x 64 plane of networks as one program / the same networks one by one; 100 tanh layers of 200",
    "phase.fresh": "the same / networks one by one that draw their own weights",
    "memory.stack": "peak memory of a forward-only stack at depth 3000 minus depth 10",
    "memory.train": "peak memory of a recorded training, 64-50x10-10, of 2000 steps minus one of 1000 steps",
    "startup.help": "CPU seconds of --help",
    "startup.run": "CPU seconds of a tiny run without plots, minus those of importing torch and hydra",
    "sweep.seeds": "CPU of a sweep of default stacks, other seeds in each job: batched launcher / Hydra's own",
    "sweep.single": "the same with one network in each job",
    "sweep.gains": "the same with the same 8 seeds and another gain in each job",
    "collect": "initlab.read of 3000 run folders of 500 rows / pyarrow.dataset to pandas over the same files",
    "collect.seconds": "CPU seconds of the same initlab.read",
    "verdict.diagnose": "diagnose of a ResNet-18, batch 8 x 3 x 64 x 64 / one forward and backward pass",
    "verdict.audit": "CPU seconds of audit of 100 million parameters",
    "growth.depth": "exponent of the CPU time of a stack, drawn and measured, over its depth",
    "growth.width": "the same over its width",
    "growth.batch": "the same over its batch",
    "growth.networks": "the same over the number of networks",
    "growth.steps": "exponent of the CPU time of a recorded training over its steps",
    "growth.jobs": "exponent of the CPU time of a sweep of default stacks over its jobs, batched launcher",
    "gpu.step.bare": "by hand, nothing recorded / bare nn.Module + SGD, launch by launch; 784-50x100-10, batch 128",
    "gpu.step.full": "by hand, everything recorded / the same nn.Module",
    "gpu.module.full": "nn.Module + SGD with initlab.probe / without",
    "gpu.ensemble.bare": "64 networks 784-50x100-10 in one program, nothing recorded / one nn.Module after the other",
    "gpu.ensemble.full": "the same with everything recorded",
    "gpu.row": "every statistic and the histogram of a tensor 2048 x 3072 / its x.mean() and x.std()",
    "gpu.stack.nets": "networks per second of a batched stack / one network after the other",
}
VARIANTS: dict[str, str] = {
    "accelerated": "everything, with the accelerated pass",
    "plain": "plain PyTorch; what is recorded, without histograms",
    "nohist": "accelerated, without histograms",
    "philox": "weights drawn on the GPU: generator=philox",
    "every10": "every 10th step recorded, by the fastest pass there is",
    "width100": "a network of width 100",
    "width1000": "a network of width 1000",
}
UNITS = ("ratio", "s", "MiB", "power")
ANY = 0  # a bar for any number of threads

# (id, variant, threads) -> bar; lower is better but in *.nets.
BARS: dict[tuple[str, str, int], float] = {
    ("step.deep.full", "accelerated", 1): 0.90,
    ("step.deep.full", "accelerated", 2): 0.75,
    ("step.deep.full", "plain", ANY): 1.6,
    ("step.book.full", "accelerated", ANY): 0.80,
    ("step.deep.bare", "plain", 1): 0.75,
    ("step.deep.bare", "plain", 2): 0.60,
    ("step.book.bare", "plain", ANY): 0.55,
    ("step.deep.cost", "accelerated", ANY): 1.10,
    ("step.deep.cost", "nohist", ANY): 1.05,
    ("step.deep.cost", "every10", ANY): 1.02,
    ("step.module.full", "accelerated", ANY): 1.35,
    ("step.module.full", "every10", ANY): 1.03,
    ("train.recorded", "nohist", ANY): 2.4,
    ("train.book", "nohist", ANY): 2.6,
    ("train.eight", "nohist", ANY): 2.0,
    ("backward.50000", "plain", ANY): 0.87,
    ("backward.50000.memory", "plain", ANY): 16.0,
    ("stack.100", "accelerated", ANY): 1.25,
    ("stack.100", "plain", ANY): 2.5,
    ("stack.1000", "accelerated", ANY): 1.04,
    ("stack.1000", "plain", ANY): 1.12,
    ("stack.nets", "accelerated", 2): 2.5,
    ("chapter.four", "accelerated", 1): 0.10,
    ("ensemble.deep", "plain", ANY): 0.67,
    ("ensemble.book", "plain", ANY): 0.43,
    ("ensemble.narrow", "plain", ANY): 0.20,
    ("phase.common", "plain", ANY): 0.35,
    ("phase.fresh", "plain", ANY): 0.08,
    ("phase.common.seconds", "plain", 1): 6.0,
    ("memory.stack", "plain", ANY): 2.0,
    ("memory.stack.time", "plain", ANY): 1.3,
    ("memory.train", "plain", ANY): 50.0,
    ("startup.help", "plain", ANY): 0.6,
    ("startup.run", "plain", ANY): 0.5,
    ("sweep.seeds", "plain", ANY): 0.6,
    ("sweep.single", "plain", ANY): 0.6,
    ("sweep.gains", "plain", ANY): 0.7,
    ("collect", "plain", ANY): 0.5,
    ("collect.seconds", "plain", 1): 2.0,
    ("verdict.diagnose", "plain", ANY): 5.0,
    ("verdict.audit", "plain", 1): 2.0,
    ("growth.depth", "accelerated", ANY): 1.1,
    ("growth.width", "accelerated", ANY): 2.1,
    ("growth.batch", "accelerated", ANY): 1.1,
    ("growth.networks", "accelerated", ANY): 1.1,
    ("growth.steps", "accelerated", ANY): 1.1,
    ("growth.jobs", "accelerated", ANY): 1.1,
    ("gpu.step.bare", "plain", ANY): 0.15,
    ("gpu.step.full", "accelerated", ANY): 0.2,
    ("gpu.module.full", "accelerated", ANY): 1.25,
    ("gpu.ensemble.bare", "plain", ANY): 0.01,
    ("gpu.ensemble.full", "accelerated", ANY): 0.05,
    ("gpu.row", "accelerated", ANY): 10.0,
    ("gpu.stack.nets", "philox", ANY): 100.0,
}


@dataclass(frozen=True)
class Row:
    """One line of the JSON; `ratio` is the median and, where `unit` is not `ratio`, a number of that unit.

    An id that is not in IDS continues one that is, or its group and network, by a dot: `step.deep.peer.chapter`.
    """

    id: str
    variant: str
    ratio: float
    q25: float
    q75: float
    unit: str
    threads: int
    device: str
    torch: str

    def __post_init__(self) -> None:
        choose(VARIANTS, self.variant, "variant")
        choose(dict.fromkeys(UNITS), self.unit, "unit")

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.id, self.variant, self.threads, self.device

    @property
    def is_peer(self) -> bool:
        return ".peer." in self.id

    @property
    def higher_is_better(self) -> bool:
        return self.id.endswith(".nets")

    @property
    def inverse(self) -> "Row":
        """The row of the time that a unit takes, of a row of units a second."""
        return replace(self, ratio=1 / self.ratio, q25=1 / self.q75, q75=1 / self.q25)

    @property
    def bar(self) -> float | None:
        """What the row is held against; None without one."""
        for threads in (self.threads, ANY):
            if (bar := BARS.get((self.id, self.variant, threads))) is not None:
                return bar
        return None

    @property
    def clears_its_bar(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio >= self.bar if self.higher_is_better else self.ratio <= self.bar


def place(row: Row) -> tuple[bool, int]:
    """Where a row stands: peers last, else in the order of IDS, and what continues an id just behind it."""
    family = row.id.split(".peer.")[0]
    found = [k for k, name in enumerate(IDS) if family == name or family.startswith(f"{name}.")]
    return row.is_peer, max(found, default=next((k for k, n in enumerate(IDS) if n.startswith(family)), len(IDS)))


class Missing(NamedTuple):
    """What was asked for and not measured, with its reason."""

    id: str
    variant: str
    reason: str


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile, between the samples by straight lines; nan of none."""
    if not samples:
        return math.nan, math.nan, math.nan
    ordered = sorted(samples)
    return at(ordered, 0.5), at(ordered, 0.25), at(ordered, 0.75)


def at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def read(path: Path) -> list[Row]:
    """The rows of a file; a mistake in it is one line."""
    try:
        return [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError) as fault:
        raise UsageError(f"{path}: not a list of benchmark results: {fault}") from None


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file: those measured again replace what stood there, the others stay."""
    kept = {row.key: row for row in (read(path) if path.exists() else [])}
    kept.update((row.key, row) for row in rows)
    ordered = sorted(kept.values(), key=lambda row: (place(row), *row.key))
    lines = ",\n".join(json.dumps(asdict(rounded(row)), allow_nan=False) for row in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def rounded(row: Row) -> Row:
    """Four digits: more than any clock here can tell."""
    numbers = {name: float(f"{value:.4g}") for name, value in asdict(row).items() if isinstance(value, float)}
    return Row(**{**asdict(row), **numbers})
