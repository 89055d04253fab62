"""Gradients beside a reference: equal up to rounding is equal, and every usual mistake is called by its name."""

import pytest
import torch
from torch import Tensor, nn

import initlab
from initlab.errors import UsageError
from initlab.nn.init import gaussian

BATCH = 48
RIGHT = {"w": gaussian((20, 20), 0, "w"), "tall": gaussian((30, 20), 0, "t"), "b": gaussian((20,), 0, "b")}


def compared(name: str, wrong: Tensor, batch: int | None = BATCH) -> str:
    """What is said of one wrong tensor among right ones."""
    agreement = initlab.compare_gradients({**RIGHT, name: wrong}, RIGHT, batch=batch)
    assert [row.name for row in agreement.find_different()] == [name] and not agreement.equal
    return str(agreement)


def with_rows(x: Tensor, rows: list[int], value: float) -> Tensor:
    return x.index_fill(0, torch.tensor(rows), value)


MISTAKES = {
    "sum for mean": ("w", RIGHT["w"] * BATCH, f"a sum over the batch of {BATCH} for a mean"),
    "mean twice": ("b", RIGHT["b"] / BATCH, f"a mean over the batch of {BATCH} for a sum"),
    "twice": ("tall", RIGHT["tall"] * 2, "a factor 2 too many"),
    "half": ("w", RIGHT["w"] / 2, "a lost factor 2"),
    "sign": ("w", -RIGHT["w"], ": the sign"),
    "sum over outputs": ("w", RIGHT["w"] * 7, "a sum for a mean over 7?"),
    "mean over outputs": ("b", RIGHT["b"] / 7, "a mean for a sum over 7?"),
    "a constant": ("b", RIGHT["b"] * 1.37, "1.37 times the reference"),
    "transpose": ("w", RIGHT["w"].T.clone(), "the transpose of the reference"),
    "transposed shape": (
        "tall",
        RIGHT["tall"].T.clone(),
        "shape (20, 30) where the reference has (30, 20): the transpose",
    ),
    "a row of its own": ("b", RIGHT["b"][None], "shape (1, 20) where the reference has (20,): the same numbers"),
    "other shape": ("b", RIGHT["b"][:7], "shape (7,) where the reference has (20,)"),
    "zeros": ("w", torch.zeros(20, 20), "yours is 0"),
    "forgotten row": ("tall", with_rows(RIGHT["tall"], [4], 0), "1 of 30 rows are 0 (row 4)"),
    "wrong rows": ("tall", with_rows(RIGHT["tall"], [1, 9], 5), "2 of 30 rows are wrong (row 1, 9)"),
    "nan": ("w", with_rows(RIGHT["w"], [3], torch.nan), "20 entries of yours are not finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_called_by_its_name(mistake: str) -> None:
    name, wrong, text = MISTAKES[mistake]
    assert text in compared(name, wrong)


def test_nothing_is_claimed_where_nothing_fits() -> None:
    text = compared("w", RIGHT["w"] + 0.3 * gaussian((20, 20), 1, "noise"))
    assert text.endswith("(limit 1e-05)")
    nearly = {name: x * (1 + 1e-7) for name, x in RIGHT.items()}
    assert initlab.compare_gradients(nearly, RIGHT).equal
    assert str(initlab.compare_gradients(RIGHT, RIGHT)) == "equal bit for bit"
    zero = initlab.compare_gradients([torch.ones(3)], [torch.zeros(3)])
    assert "the reference is 0" in str(zero) and zero.relative_error == torch.inf


def test_every_form_of_gradients() -> None:
    """A module's, with its names; a dict of the same; pairs of layers; (loss, pairs); tensors; one tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    model(torch.randn(9, 5)).square().mean().backward()
    by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert list(initlab.compare_gradients(model, by_name).frame()["name"]) == list(by_name)
    assert initlab.compare_gradients(by_name, model).relative_error == 0
    pairs = [(model[k].weight.grad, model[k].bias.grad) for k in (0, 2)]
    loss = torch.tensor(0.5)
    names = list(initlab.compare_gradients((loss, pairs), (loss, pairs)).frame()["name"])
    assert names == ["loss", *(f"{what} of layer {k}" for k in (1, 2) for what in ("weight", "bias"))]
    assert [row.name for row in initlab.compare_gradients(pairs[0], pairs[0]).rows] == ["tensor 1", "tensor 2"]
    assert not initlab.compare_gradients(loss, 2 * loss).equal
    assert initlab.compare_gradients(loss.double(), loss).equal


@pytest.mark.parametrize(
    ("yours", "reference", "text"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2), "yours: weight has no gradient; call loss.backward"),
        ({"w": 3}, {"w": torch.ones(2)}, "yours: 3: must be a tensor"),
        ([3], [torch.ones(2)], "yours: 3: must be a tensor or a pair"),
        ("w", {}, "yours='w': must be a module, a dict, a sequence or a tensor"),
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, "yours has no v"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, {"v": torch.ones(2)}, "the reference has no w"),
        ({}, {}, "no tensor to compare"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2), "dtype=int64"),
        (torch.ones(2), torch.ones(2), "batch=0: must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(yours: object, reference: object, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        initlab.compare_gradients(yours, reference, batch=0 if "batch" in text else None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
