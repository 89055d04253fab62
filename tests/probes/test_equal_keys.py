"""No two rows of a step have equal words, whatever a module's outputs are called and whoever updates a weight twice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import initlab
from tests.probes.by_hand import WORDS, X, mlp, numbers, once, watch


class Named(nn.Module):
    """Gives five multiples of a layer's output, in whatever the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)


class Dots(Named):
    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        return {"a.b": h * 2, "a": {"b": h * 3, "c": [h * 4]}, "a.c.0": h * 5, "a.b~1": h * 6}


class Numbers(Named):
    def forward(self, x: Tensor) -> Any:
        h = self.l(x)
        return {0: h * 2, "0": h * 3, (0,): h * 4, "(0,)": h * 5, "1": [h * 6]}


class add(Named):
    def forward(self, x: Tensor) -> Any:
        h = x + self.l(x)
        return {"": h * 5, "mul": h * 6, "add": x + 1, "add.1": x * 2, "z": h}


class Sum(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        def total(one: Any) -> Tensor:
            if isinstance(one, Tensor):
                return one
            parts = [total(part) for part in (one.values() if isinstance(one, dict) else one)]
            return torch.stack([(k + 1) * part for k, part in enumerate(parts)]).sum(0)

        return total(self.part(x))


@pytest.mark.parametrize("kind", [Dots, Numbers, add])
def test_outputs_whose_names_clash(kind: type[nn.Module]) -> None:
    """Each has a row of its own, forward and backward, with the gradient that is its own."""
    torch.manual_seed(0)
    seen = watch(Sum(kind()), lambda model, o: once(model, o, lambda m: m(X).square().mean()))
    rows = seen.rows
    assert not rows.duplicated(WORDS).any() and set(rows["pass"]) == {0}
    own = rows[(rows["name"] == "part") & (rows["step"] == 0)]
    assert (own["direction"] == "forward").sum() == 5
    if kind is not add:  # outputs are 2, ..., 6 times one tensor, so that their sizes tell which is which
        forward, backward = (own[own["direction"] == way].set_index("part") for way in ("forward", "backward"))
        sizes = forward["rms"] / forward["rms"].min() * 2
        assert sorted(sizes) == pytest.approx([2, 3, 4, 5, 6], rel=1e-6)
        for part, size in sizes.items():  # the sum has taken the tensor so many times
            if kind is Dots:
                times = {2: 1, 3: 2, 4: 4, 5: 3, 6: 4}[round(size)]
                base = backward.loc[sizes.idxmin(), "rms"]
                assert backward.loc[part, "rms"] == pytest.approx(times * base, rel=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_weight_that_two_optimizers_update_has_one_update(order: tuple[int, int]) -> None:
    """W_{k+1} - W_k of the whole step, after the last of them."""
    model = mlp()
    shared = [*model[2].parameters()]
    optimizers = [
        torch.optim.SGD([*model[0].parameters(), *shared], lr=0.1),
        torch.optim.Adam([*shared, *model[4].parameters()], lr=0.01),
    ]
    truth = []
    with initlab.probe(model, optimizer=optimizers) as p:
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(X).square().mean().backward()
            before = [model[k].weight.detach().clone() for k in (0, 2, 4)]
            for k in order[: 1 + (step != 1)]:  # the second of them steps in every other step
                optimizers[k].step()
            for k, weight in zip((0, 2, 4), before, strict=True):
                change = (model[k].weight.detach() - weight).double()
                if change.any():
                    truth.append((step, str(k), numbers(change)["rms"]))
    rows = p.frame()
    assert not rows.duplicated(WORDS).any()
    updates = rows[rows["tensor"] == "update"].sort_values(["step", "name"])
    assert updates[["step", "name"]].values.tolist() == [list(one[:2]) for one in truth]
    assert updates["rms"].tolist() == pytest.approx([one[2] for one in truth], rel=1e-7)


def test_a_part_whose_weights_attention_takes_has_the_number_of_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    rows = initlab.measure(nn.Sequential(layer, nn.Linear(6, 3)), X[None], None, lambda out: out.sum())
    of = rows.groupby("name", observed=True)["layer"].unique()
    assert of["0.self_attn.out_proj"].tolist() == of["0.self_attn"].tolist() == [1]
    assert rows["layer"].max() == of["1"].item()
