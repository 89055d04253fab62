"""What a user asks of the speed, a dozen rows: the table that is printed first, and the figure.

A row has two answers of initlab, with its compiled passes and in plain PyTorch, and those of others.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.rows import Row


class Question(NamedTuple):
    """What is asked, against what, and which results answer it: an id, and variants with and without a compiler."""

    text: str
    against: str
    id: str
    compiled: str = "plain"
    plain: str = ""  # none: the same, or not possible

    @property
    def rival(self) -> str:
        """What the ids of peers begin with; "" where they stand on another row."""
        return "" if self.compiled == "every10" else self.id.removesuffix(".full")


# In the order of the picture. A row stands for one thread where there are several.
QUESTIONS = (
    Question(
        "Watch every layer of a stack, 50 layers of 100", "the products alone", "stack.100", "accelerated", "plain"
    ),
    Question("The same, 1000 wide", "the products alone", "stack.1000", "accelerated", "plain"),
    Question("Draw, stack and measure a network", "the chapter's loop", "stack.nets", "accelerated", "plain"),
    Question("The chapter's four attempts", "the chapter's code", "chapter.four", "accelerated", "plain"),
    Question("Train 50 layers, every statistic kept", "bare nn.Module", "step.deep.full", "nohist", "plain"),
    Question("Train the book's network, the same", "bare nn.Module", "step.book.full", "nohist", "plain"),
    Question("task=train of 50 layers as it is typed", "two bare loops", "train.recorded", "nohist", "plain"),
    Question("Your nn.Module of 50 layers under the probe", "without it", "step.module.full", "nohist", "plain"),
    Question("The same, every 10th step", "without it", "step.module.full", "every10"),
    Question("Train 8 networks, every statistic kept", "one after the other", "ensemble.deep.full", "nohist", "plain"),
    Question("A plane of 4,096 networks", "one by one", "phase.common"),
    Question("diagnose a ResNet-18", "a forward-backward pass", "verdict.diagnose"),
)
# What people write for a few of these numbers, as `peers.py` has it: the last part of an id, and its name.
PEERS = {
    "chapter": "the chapter's mean and std",
    "std_mean": "torch.std_mean in hooks",
    "course": "a course's hooks",
    "retain_grad": "retain_grad",
    "makemore": "makemore's histograms",
    "vmap": "torch.func.vmap",
}


def wanted(name: str, variant: str) -> bool:
    """Whether a result answers a question, or is that of a peer on its row."""
    rival, _, peer = name.partition(".peer.")
    if peer:
        return any(one.rival == rival for one in QUESTIONS)
    return any(one.id == name and variant in (one.compiled, one.plain) for one in QUESTIONS)


def answer(rows: Sequence[Row], name: str, variant: str) -> Row | None:
    """The result of this id and variant with the fewest threads, as a time: networks a second the other way round."""
    named = [row for row in rows if row.id == name and row.variant == variant and row.unit == "ratio"]
    found = min(named, key=lambda row: row.threads, default=None)
    return found.inverse if found is not None and found.higher_is_better else found


def peers(rows: Sequence[Row], one: Question) -> dict[str, Row]:
    """What others take, by the last part of their ids, in the order of PEERS."""
    if not one.rival:
        return {}
    found = {name: answer(rows, f"{one.rival}.peer.{name}", "plain") for name in PEERS}
    return {name: row for name, row in found.items() if row is not None}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table: how many times what a row is measured against."""
    answered = [one for one in QUESTIONS if answer(rows, one.id, one.compiled) or answer(rows, one.id, one.plain)]
    if not answered:
        return
    yield f"{'what you do, against what':72} {'compiled':>9} {'plain':>9}   others"
    for one in answered:
        cells = [answer(rows, one.id, variant) for variant in (one.compiled, one.plain)]
        numbers = " ".join(f"{'' if cell is None else format(cell.ratio, '.2f'):>9}" for cell in cells)
        others = ", ".join(f"{name} {row.ratio:.2f}" for name, row in peers(rows, one).items())
        yield f"{one.text + ', against ' + one.against:72} {numbers}   {others}".rstrip()
    yield "CPU time over that of what it is measured against: below 1 is faster. Plain: without a C++ compiler."
