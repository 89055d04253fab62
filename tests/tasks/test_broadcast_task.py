"""The task `broadcast`: what it shows is what torch computes; shapes of one's own, and mistakes in one line."""

import pytest
import torch

from initlab.errors import UsageError
from initlab.figures.broadcast_figure import draw_broadcast
from initlab.tasks.course import broadcast as task
from initlab.tasks.course.broadcast import TENSORS, broadcast, broadcast_as_text


def test_every_number_is_computed() -> None:
    """The columns of a row are those of its expression; a row by hand that differs is named."""
    examples = broadcast()["examples"]
    assert set(examples["part"]) == {"shapes", "view", "sum", "einsum"}
    names = {"torch": torch, "einsum": torch.einsum, **TENSORS}
    for row in examples[examples["part"] != "shapes"].itertuples():
        found = eval(row.expression, dict(names))
        assert (row.shape, row.stride) == (str(tuple(found.shape)), str(found.stride()))
        assert row.values == task.write_numbers(found.tolist())
        assert row.same_as == "" or torch.equal(found, eval(row.same_as, dict(names)))
    by_hand = examples.set_index("expression")["by_hand"]
    assert set(by_hand[by_hand != ""]) == {"equal"} and (by_hand == "equal").sum() == 13


def test_views_store_nothing_of_their_own() -> None:
    views = broadcast()["examples"].query("part == 'view'").set_index("expression")
    assert views.loc["c.expand_as(m)", ["shape", "stride", "stored", "memory"]].tolist() == [
        "(3, 3)",
        "(0, 1)",
        3,
        "c's",
    ]
    assert views.loc["m.t()", ["stride", "stored", "memory"]].tolist() == ["(1, 3)", 9, "m's"]
    assert views.loc["c[None, :] + c[:, None]", ["stored", "memory"]].tolist() == [9, "its own"]


def test_one_colour_is_one_place_in_memory() -> None:
    """In the figure: three colours for the nine cells of a stretched row, and m[1] in those of m's second row."""
    figure = draw_broadcast(broadcast()["examples"])
    assert figure is not None and "c.expand_as(m) shows 9 numbers and stores 3" in figure.get_suptitle()
    cells = {ax.get_title(): [patch.get_facecolor() for patch in ax.patches] for ax in figure.axes}
    assert len(set(cells["c.expand_as(m)"])) == 3 and len(set(cells["m.t()"])) == 9
    assert cells["m[1]"] == cells["m"][3:6] and cells["m[:, 1]"] == cells["m"][1::3]
    assert draw_broadcast(broadcast()["examples"].query("part == 'shapes'")) is None


def test_a_wrong_result_by_hand_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "13 results by hand" in broadcast_as_text(broadcast())
    monkeypatch.setattr(task, "einsum_by_hand", lambda equation, *tensors: torch.zeros(3))
    assert 'NOT equal by hand: einsum("ij->ji", m)' in broadcast_as_text(broadcast())


def test_shapes_of_ones_own() -> None:
    rows = broadcast([[8, 1, 6], [7, 1], [3, 4], []])["examples"].query("part == 'shapes'")
    assert rows["shape"].tolist() == ["(8, 7, 6)", "", "(3, 4)"]
    assert rows["values"].iloc[1] == "(7, 1) and (3, 4) do not fit: 7 and 3 in dimension -2, no 1"


@pytest.mark.parametrize("bad", [[], [[3]], [[3], [-1]]])
def test_mistakes_end_in_one_line(bad: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="must be two or more") as caught:
        broadcast(bad)
    assert "\n" not in str(caught.value)


def test_from_the_command_line(lab) -> None:
    code, out, _ = lab("task=broadcast", "shapes=[[2,1],[4]]")
    assert code == 0 and "(2, 1) and (4,)  (2, 4)" in out
    code, _, errors = lab("task=broadcast", "shapes=[[2,1]]")
    assert code == 2 and errors.startswith("initlab: shapes=[[2, 1]]: must be two or more")
