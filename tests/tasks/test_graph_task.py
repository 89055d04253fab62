"""The task `graph`: any module gives frames, nothing of it is changed, and every mistake is told in one line."""

import pytest
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.tasks.course.explain import explain
from initlab.tasks.course.graph import graph
from initlab.tasks.train import train

torch.set_num_threads(1)


class Returns(nn.Module):
    """Whatever `give` makes of two inputs that went through one linear layer."""

    def __init__(self, give) -> None:
        super().__init__()
        self.lin, self.give = nn.Linear(4, 3), give

    def forward(self, x: Tensor, y: Tensor):
        return self.give(self.lin(x) * self.lin(y))


def _notes(frames) -> str:
    return " / ".join(frames["notes"]["note"])


@pytest.mark.parametrize(
    ("loss", "nodes"), [("mse", ["MseLossBackward0", "Squeeze"]), ("cross_entropy", ["NllLoss", "LogSoftmax"])]
)
def test_our_own_network(loss: str, nodes: list[str]) -> None:
    frames = graph(loss=loss, depth=2, width=6, batch=8)
    assert all(name.startswith(start) for name, start in zip(frames["nodes"]["node"], nodes, strict=False))
    leaves = frames["nodes"].query("leaf != ''")
    assert sorted(leaves["leaf"]) == [f"{layer}.{what}" for layer in (0, 2, 4) for what in ("bias", "weight")]
    assert leaves["gradient"].str.startswith("norm").all()
    assert list(frames["nodes"]["hand"]).count("Lin.backward") == 6
    assert (frames["nodes"]["hand"] != "").all()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_it_is_the_network_that_is_trained(loss: str) -> None:
    """The gradients of graph and of explain are those of step 0 of the training; of another seed they are not."""
    how = {"depth": 2, "width": 6, "batch": 8, "loss": loss, "init": "torch_default", "dtype": "float64"}
    stats = train("digits", steps=1, seeds=[3], **how)["stats"]
    trained = stats.query("implementation == 'scratch' and tensor == 'weight' and direction == 'backward'")
    followed = explain(seed=3, **how).steps.set_index("tensor")["norm"]
    for seed, same in ((3, True), (4, False)):
        nodes = graph(seed=seed, **how)["nodes"].set_index("leaf")
        assert nodes["shape"]["0.weight"] == "(6, 64)"
        for layer, norm in zip(trained["layer"], trained["norm"], strict=True):
            walked = float(nodes["gradient"][f"{2 * layer - 2}.weight"].removeprefix("norm "))
            assert (abs(walked / norm - 1) < 1e-3) == same  # printed with 4 digits
            assert followed[f"w{layer}.g"] == pytest.approx(norm, rel=1e-12)


def test_the_books_network_is_the_teachers_data_under_mse() -> None:
    shapes = graph(data="teacher", loss="mse")["nodes"].set_index("leaf")["shape"]
    assert (shapes["0.weight"], shapes["2.weight"]) == ("(50, 784)", "(1, 50)")


def test_the_same_arguments_give_the_same_frames_and_another_seed_does_not() -> None:
    first, second, other = graph(width=6), graph(width=6), graph(width=6, seed=1)
    assert all(first[name].equals(second[name]) for name in first)
    assert not first["nodes"].equals(other["nodes"])


def test_several_inputs_and_an_output_in_a_dictionary() -> None:
    model = Returns(lambda out: {"index": out.argmax(-1), "deep": (out, out)})
    frames = graph(model, shapes=[[5, 4], [5, 4]])
    assert "output['deep'][0]" in _notes(frames)
    assert "mean of squares" in _notes(frames)
    assert frames["nodes"].query("leaf == 'lin.weight'")["in_degree"].item() == 2
    named = graph(model, {"y": torch.ones(5, 4), "x": torch.ones(5, 4, requires_grad=True)})
    assert "x" in set(named["nodes"]["leaf"])


@pytest.mark.parametrize(
    ("targets", "loss"),
    [(torch.zeros(5, 3), "mse"), (torch.tensor([0, 1, 2, 0, 1]), "cross_entropy")],
)
def test_the_loss_that_fits_the_targets(targets: Tensor, loss: str) -> None:
    frames = graph(nn.Linear(4, 3), torch.ones(5, 4), targets)
    assert _notes(frames) == f"loss: {loss}"


def test_a_loss_of_ones_own() -> None:
    frames = graph(nn.Linear(4, 3), loss=lambda out: out.abs().sum())
    assert list(frames["nodes"]["node"][:2]) == ["SumBackward0", "AbsBackward0"]


def test_an_output_of_one_number_is_the_loss() -> None:
    frames = graph(Returns(torch.sum), shapes=[[5, 4], [5, 4]])
    assert frames["nodes"]["node"][0] == "SumBackward0"


def test_frozen_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert "no gradient reaches 0.weight, 0.bias" in _notes(graph(model))


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = graph(model), graph(model)
    assert first["nodes"].equals(second["nodes"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_double_precision_models_get_double_precision_noise() -> None:
    assert len(graph(nn.Linear(4, 2).double())["nodes"]) == 6


X = torch.ones(5, 4)
WRONG = {
    "no model": ({"model": 3}, "must be an nn.Module"),
    "frozen": ({"model": nn.Linear(4, 3).requires_grad_(False)}, "output carries no gradient"),
    "integer output": ({"model": Returns(lambda out: out.argmax(-1)), "inputs": (X, X)}, "no float tensor but int64"),
    "no tensor": ({"model": Returns(lambda out: "text"), "inputs": (X, X)}, "no float tensor but str"),
    "detached": ({"model": Returns(Tensor.detach), "inputs": (X, X)}, "detached"),
    "shapes": ({"model": nn.Linear(4, 3), "inputs": torch.ones(5, 3)}, r"Linear refused inputs of shape \(5, 3\)"),
    "missing input": ({"model": Returns(torch.sum), "inputs": X}, "missing 1 required"),
    "empty": ({"model": nn.Linear(4, 3), "inputs": torch.ones(0, 4)}, "input 0 is empty"),
    "nan": ({"model": nn.Linear(4, 3), "inputs": X / 0 * 0}, "holds nan or inf, 20 of 20"),
    "unknown inputs": ({"model": nn.Conv1d(2, 3, 2)}, "a Conv1d first"),
    "no parameter": ({"model": nn.ReLU()}, "no parameter"),
    "size 0": ({"model": nn.Linear(4, 3), "shapes": [[0, 4]]}, "every size must be at least 1"),
    "vector loss": ({"model": nn.Linear(4, 3), "loss": torch.abs}, "must hold one number"),
    "unknown loss": ({"loss": "msee"}, "did you mean mse"),
    "unknown loss, own model": ({"model": nn.Linear(4, 3), "loss": "msee"}, "did you mean mse"),
    "no targets": ({"model": nn.Linear(4, 3), "loss": "mse"}, "needs targets"),
    "broadcast": (
        {"model": nn.Linear(4, 1), "inputs": X, "targets": torch.zeros(5, 1)},
        r"shape \(5, 1\).*needs \(5,\)",
    ),
    "nan targets": ({"model": nn.Linear(4, 1), "inputs": X, "targets": X[:, 0] / 0}, "targets hold nan"),
    "classes": ({"model": nn.Linear(4, 3), "inputs": X, "targets": torch.full((5,), 3)}, "3 to 3 need classes 0"),
    "float classes": (
        {"model": nn.Linear(4, 3), "inputs": X, "targets": X[:, 0], "loss": "cross_entropy"},
        "must be classes",
    ),
    "activation": ({"activation": "rellu"}, "did you mean relu"),
    "depth": ({"depth": -1}, "train.depth=-1"),
    "batch": ({"batch": 0}, "batch=0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_one_line(name: str) -> None:
    arguments, said = WRONG[name]
    with pytest.raises(UsageError, match=said) as caught:
        graph(**arguments)
    assert "\n" not in str(caught.value)
