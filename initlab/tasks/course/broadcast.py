"""Broadcasting, strides and einsum on the chapter's 3x3 examples: every expression that is shown is computed.

The rules are those of `scratch/broadcasting.py`; each result by hand is compared with torch's own.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.scratch.broadcasting import broadcast_shape, einsum_by_hand, expand_by_hand, read_storage
from initlab.tasks.ensemble.networks import Frames

# The chapter's vector and matrix, and a batch of two matrices.
TENSORS: dict[str, Tensor] = {
    "c": torch.tensor([10.0, 20.0, 30.0]),
    "m": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]),
}
TENSORS["b"] = torch.stack([TENSORS["m"], TENSORS["m"].t()])

Shape = tuple[int, ...]
SHAPES: tuple[tuple[Shape, Shape], ...] = (
    ((256, 256, 3), (3,)),
    ((3, 3), (3,)),
    ((3, 3), (3, 1)),
    ((64, 1), (1, 10)),
    ((5, 784, 1), (784, 10)),
    ((64, 1), (64,)),  # fits, and should not
    ((3,), (4,)),
)
VIEWS = (
    "m", "m.t()", "m[1]", "m[:, 1]", "c", "c.expand_as(m)", "c[None, :]", "c[:, None]", "c[:, None].expand_as(m)",
    "c[None, :] + c[:, None]",
)  # fmt: skip
SUMS = (
    "m + c", "m + c[:, None]", "m * c", "m > c[:, None] / 5", "c[None, :] * c[:, None]",
    "(m[:, :, None] * m[None, :, :]).sum(1)", "m @ m",
)  # fmt: skip
# What einsum is asked for, and the same in other words.
EINSUMS = {
    'einsum("ij->ji", m)': "m.t()",
    'einsum("ii->i", m)': "m.diagonal()",
    'einsum("ii->", m)': "m.trace()",
    'einsum("ij->i", m)': "m.sum(1)",
    'einsum("ij->j", m)': "m.sum(0)",
    'einsum("ij,j->i", m, c)': "m @ c",
    'einsum("i,j->ij", c, c)': "torch.outer(c, c)",
    'einsum("ik,kj->ij", m, m)': "m @ m",
    'einsum("ij,ij->", m, m)': "(m * m).sum()",
    'einsum("i,ij,j->", c, m, c)': "c @ m @ c",
    'einsum("bik,bkj->bij", b, b)': "torch.bmm(b, b)",
}
COLUMNS = ("part", "expression", "shape", "stride", "offset", "stored", "memory", "same_as", "by_hand", "values")

RULES = """\
1. The rules. Shapes are compared from the last dimension to the first. Two sizes fit if they are equal, or if one of
   them is 1 or missing: it stretches to the other. (64, 1) and (64,) fit too, which is seldom meant: see the loss."""
STRIDES = """\
2. Strides. The stride is the step in memory to the next number of each dimension. A transpose only swaps two of them,
   a stretched dimension has stride 0: the same number is read again, and nothing is copied. The offset is where
   the first number lies."""
SUMMED = """\
3. Operations stretch what they are given in the same way: a row for every row, a column for every column, and both
   for a table of all pairs. A matrix product is such a table of products, summed over the middle."""
EINSUM = """\
4. einsum. A letter names a dimension; letters that meet are multiplied, and one that is missing from the result is
   summed over."""


def broadcast(shapes: Sequence[Sequence[int]] | None = None) -> Frames:
    """The frame `examples`: a row for each pair of shapes, view, sum and einsum, with what comes out.

    shapes: shapes of your own, each broadcast with the one before; None takes the chapter's pairs. `stride` is the step
    in memory to the next number of each dimension, `stored` how many numbers stand there, `memory` whose they are.
    Errors: fewer than two shapes, a size below 0. Shapes that do not fit are a row that says why.

    >>> broadcast([(8, 1, 6), (7, 1)])["examples"].iloc[0]["shape"]
    '(8, 7, 6)'
    """
    pairs = SHAPES
    if shapes is not None:
        if len(shapes) < 2 or any(not isinstance(size, int) or size < 0 for shape in shapes for size in shape):
            given = [list(shape) for shape in shapes]
            raise UsageError(f"shapes={given}: must be two or more, as [[3,3],[3]], no size below 0")
        pairs = tuple((tuple(one), tuple(other)) for one, other in pairwise(shapes))
    rows = [fit_shapes(one, other) for one, other in pairs]
    rows += [describe_result("view", text) for text in VIEWS]
    rows += [describe_result("sum", text) for text in SUMS]
    rows += [describe_result("einsum", text, same) for text, same in EINSUMS.items()]
    return {"examples": pd.DataFrame(rows, columns=list(COLUMNS))}


def fit_shapes(one: Shape, other: Shape) -> dict[str, object]:
    """Two shapes by the rules; a pair that does not fit says why."""
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {"part": "shapes", "expression": f"{one} and {other}", "offset": 0, "stored": 0}
    try:
        return row | {"shape": str(broadcast_shape(one, other))}
    except UsageError as reason:
        return row | {"values": str(reason)}


def evaluate(text: str, names: Mapping[str, object] | None = None) -> Tensor:
    """What an expression of this file gives, so that what is shown is what was computed."""
    found: Tensor = eval(text, {"torch": torch, "einsum": torch.einsum, **TENSORS, **(names or {})})
    return found


def describe_result(part: str, text: str, same: str = "") -> dict[str, object]:
    """One expression: its shape and strides, how many numbers are stored for it, and whether they are another's."""
    found = evaluate(text)
    storage = {x.untyped_storage().data_ptr(): name for name, x in TENSORS.items()}
    whose = storage.get(found.untyped_storage().data_ptr())
    by_hand = [evaluate(same)] if same else []
    if part == "einsum":
        by_hand.append(evaluate(text, {"einsum": einsum_by_hand}))
    elif text.endswith(".expand_as(m)"):
        by_hand.append(expand_by_hand(evaluate(text.removesuffix(".expand_as(m)")), TENSORS["m"].shape))
    equal = all(torch.equal(found, one) for one in by_hand)
    return {
        "part": part, "expression": text, "shape": str(tuple(found.shape)), "stride": str(found.stride()),
        "offset": found.storage_offset(), "stored": len(read_storage(found)),
        "memory": f"{whose}'s" if whose else "its own",
        "same_as": same, "by_hand": ("equal" if equal else "differs") if by_hand else "",
        "values": write_numbers(found.tolist()),
    }  # fmt: skip


def write_numbers(values: object) -> str:
    """Nested lists in one line, numbers as short as they are."""
    if isinstance(values, list):
        return f"[{' '.join(map(write_numbers, values))}]"
    return str(values) if isinstance(values, bool) else f"{values:g}"


def broadcast_as_text(frames: Frames) -> str:
    """The four parts, each with a sentence before it."""
    examples = frames["examples"]
    parts = {
        "shapes": (RULES, ["expression", "shape", "values"]),
        "view": (STRIDES, ["expression", "shape", "stride", "offset", "stored", "memory", "by_hand", "values"]),
        "sum": (SUMMED, ["expression", "shape", "values"]),
        "einsum": (EINSUM, ["expression", "same_as", "shape", "by_hand", "values"]),
    }
    lines = [f"{name} = {write_numbers(x.tolist())}" for name, x in TENSORS.items()]
    for part, (sentence, columns) in parts.items():
        shown = examples.loc[examples["part"] == part, columns]
        cells = [columns, *shown.astype(str).to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        head, *rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines += ["", sentence, f"  {head.replace('_', ' ')}", *(f"  {row}" for row in rows)]
    wrong = examples.loc[examples["by_hand"].isin(["differs"]), "expression"]
    count = int((examples["by_hand"] == "equal").sum())
    same = f"{count} results by hand (scratch/broadcasting.py) are torch's own."
    return "\n".join([*lines, "", f"NOT equal by hand: {', '.join(wrong)}." if len(wrong) else same])
