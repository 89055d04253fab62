"""The timed matmul ladder: every rung at every shape, nothing lost, and no assertion on a time."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from initlab.errors import UsageError
from initlab.scratch.rungs import LADDER
from initlab.tasks.course import ladders
from initlab.tasks.course.engine_versions import BACKWARDS
from initlab.tasks.course.ladders import BOOK_SHAPE, SHAPES, matmul_ladder
from initlab.tasks.course.timing import COLUMNS, agreement

QUICK = {"rounds": 3, "seconds": 1e-3}
PLAIN = [name for name in LADDER if name not in ("compiled", "triton")]


def test_every_rung_at_every_shape_equal_up_to_rounding():
    shapes = [(3, 4, 2), (1, 1, 1), (0, 3, 2), (2, 0, 3)]
    frame = matmul_ladder(shapes, PLAIN, **QUICK)
    assert list(frame.columns) == [*COLUMNS, "rows"]
    assert list(frame["version"]) == PLAIN * len(shapes)
    assert list(frame["rows"].unique()) == [3, 1, 0, 2]
    assert frame["shape"].iloc[0] == "3x4 @ 4x2"
    assert frame["median"].notna().all() and (frame["note"] == "").all()
    assert agreement(frame).startswith(f"All {len(PLAIN)} versions are equal up to rounding")
    assert (frame.loc[frame["version"] == "matmul", "ratio"] == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_is_equal_up_to_its_own_rounding(dtype):
    rungs = [name for name in PLAIN if name != "loops"]
    frame = matmul_ladder([BOOK_SHAPE], rungs, dtype=dtype, **QUICK)
    assert agreement(frame, dtype).startswith("All "), frame


def test_a_wrong_rung_is_named(monkeypatch):
    wrong = ladders.Rung(lambda a, b: a[:, :-1] @ b[:-1])
    monkeypatch.setitem(LADDER, "outer", wrong)
    frame = matmul_ladder([(3, 40, 2)], ["outer", "einsum", "matmul"], **QUICK)
    assert agreement(frame).startswith("NOT equal: outer (")


def test_the_broadcast_form_holds_all_products_and_the_operator_only_the_result():
    frame = matmul_ladder([BOOK_SHAPE], ["elementwise", "row", "outer", "matmul"], **QUICK).set_index("version")
    m, k, n = BOOK_SHAPE
    assert frame["peak_bytes"]["outer"] == 4 * (m * k * n + m * n)
    assert frame["peak_bytes"]["matmul"] == 4 * m * n
    for name in ("elementwise", "row", "outer", "matmul"):  # what is foreseen is what is held
        assert frame["peak_bytes"][name] == pytest.approx(4 * LADDER[name].entries(m, k, n), rel=0.01)


def test_what_needs_too_much_memory_is_named_and_the_rest_runs():
    frame = matmul_ladder([BOOK_SHAPE], ["outer", "einsum", "matmul"], memory_limit=1e5, **QUICK).set_index("version")
    assert frame["note"]["outer"] == "skipped: needs 157 kB, allowed are 100 kB"
    assert frame["median"].isna().to_dict() == {"outer": True, "einsum": False, "matmul": False}


def test_loops_that_would_take_too_long_are_named_and_the_rest_runs():
    frame = matmul_ladder([(30, 30, 30)], PLAIN, patience=1e-9, **QUICK).set_index("version")
    for name in PLAIN:
        skipped = LADDER[name].loops > 0
        assert frame["note"][name].startswith("skipped: would take about") == skipped, name
        assert (frame["median"][name] != frame["median"][name]) == skipped, name


def test_a_hiccup_skips_no_rung_and_the_books_shape_is_always_complete(monkeypatch):
    """On a machine that stalls at every rung's first call; one that is slow at every call is skipped, but at 5x784."""
    calls = []

    def stalled(call, times, device):
        calls.append(1)
        return 60.0 if len(calls) % 3 else 1e-6

    monkeypatch.setattr(ladders, "seconds_each", stalled)
    a, b = torch.ones(30, 30), torch.ones(30, 30)
    assert ladders.skip_reason(LADDER["loops"], a, b, 2.0) == "" and len(calls) == 3 * len(
        ladders.pieces((30, 30, 30), 3)
    )
    monkeypatch.setattr(ladders, "seconds_each", lambda call, times, device: 60.0)
    assert ladders.skip_reason(LADDER["loops"], a, b, 2.0).startswith("skipped: would take about")
    frame = matmul_ladder([(5, 784, 3), BOOK_SHAPE], ["elementwise", "row", "matmul"], **QUICK)
    assert frame.groupby("shape", sort=False)["median"].count().tolist() == [1, 3]


@pytest.mark.long
def test_with_patience_nothing_is_skipped():
    frame = matmul_ladder([(17, 17, 17)], PLAIN, patience=1e9, **QUICK)
    assert frame["median"].notna().all()


def test_a_rung_that_cannot_run_here_stays_with_its_reason():
    frame = matmul_ladder([(3, 4, 2)], ["matmul", "triton"], **QUICK).set_index("version")
    assert frame["note"]["triton"].startswith("unavailable: ")
    assert frame["ratio"]["matmul"] == 1


def test_pieces_grow_eightfold_and_cut_only_what_is_looped_over():
    assert ladders.pieces((5000, 784, 10), 1) == [
        (1, 784, 10),
        (2, 784, 10),
        (10, 784, 10),
        (79, 784, 10),
        (625, 784, 10),
    ]
    for sizes in [(5000, 784, 10), (10, 10**6, 3), (1000, 1000, 1000)]:
        pieces = [*ladders.pieces(sizes, 3), sizes]
        works = [m * k * n for m, k, n in pieces]
        assert works[0] <= 4096 and works == sorted(works)
        assert all(larger <= 8 * smaller for smaller, larger in pairwise(works))
    assert ladders.pieces((1000, 1000, 1000), 0) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shapes": [(1, 2)]}, r"shape \(1, 2\).*\(M, K, N\)"),
        ({"shapes": [(1, -2, 3)]}, r"shape \(1, -2, 3\)"),
        ({"shapes": []}, "shapes"),
        ({"rungs": ["einsun"]}, "did you mean einsum"),
        ({"rungs": []}, "at least one"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"device": "tpu"}, "device=tpu"),
    ],
    ids=["two sizes", "negative", "no shape", "unknown rung", "no rung", "dtype", "device"],
)
def test_mistakes_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        matmul_ladder(**options)


def test_the_books_shape_is_among_the_sizes_of_the_sweep():
    assert BOOK_SHAPE in SHAPES and sorted(SHAPES) == list(SHAPES)


@pytest.mark.slow
@pytest.mark.skipif(bool(LADDER["compiled"].missing(torch.device("cpu"))), reason="no compiler here")
def test_the_compiled_rung_is_timed_and_never_holds_the_products():
    frame = matmul_ladder([BOOK_SHAPE], ["outer", "compiled", "matmul"], **QUICK).set_index("version")
    assert frame["note"]["compiled"] == ""
    assert frame["peak_bytes"]["compiled"] < frame["peak_bytes"]["outer"] / 10


def test_the_backward_ladder_compares_every_version_with_torch() -> None:
    frame = ladders.backward_ladder([3, 8], depth=2, width=5, inputs=4, rounds=1, seconds=0.01,
                                    versions=[name for name in BACKWARDS if name != "compiled"])  # fmt: skip
    assert set(frame["rows"]) == {3, 8} and set(frame["shape"]) == {"3x4-5-5-1", "8x4-5-5-1"}
    assert len(frame) == 2 * len(BACKWARDS)
    book = frame[frame["version"] == "book"]
    assert book["note"].str.contains("the chapter's lines are for relu, mse and 1 hidden layer").all()
    ran = frame.drop(book.index)
    assert ran["relative_error"].max() < 1e-5 and (ran["median"] > 0).all()
    assert "equal up to rounding" in agreement(frame)


def test_a_version_that_needs_too_much_memory_is_named() -> None:
    frame = ladders.backward_ladder([64], versions=["outer", "engine"], rounds=1, seconds=0.01, memory_limit=2e6)
    notes = frame.set_index("version")["note"]
    assert "needs" in notes["outer"] and notes["engine"] == ""
    assert frame.set_index("version")["median"].isna()["outer"]


def test_classes_and_mistakes_of_the_backward_ladder() -> None:
    quick: dict[str, Any] = {"versions": ["engine"], "rounds": 1, "seconds": 0.01}
    frame = ladders.backward_ladder([6], loss="cross_entropy", width=4, inputs=3, **quick)
    assert frame["shape"].iloc[0] == "6x3-4-10" and frame["relative_error"].max() < 1e-5
    for bad, text in (({"batches": [0]}, "train.batch=0"), ({"versions": ["engin"]}, "did you mean engine"),
                      ({"loss": "mes"}, "did you mean mse"), ({"width": 0}, "train.width=0")):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            ladders.backward_ladder(**{"versions": ["engine"], "batches": [2]} | bad)  # type: ignore[arg-type]
