"""Laws of the walked graph: its gradients are autograd's, every node stands once and after all that point to it."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.scratch.autograd_graph import HAND, Graph, as_text, by_hand, gradients, textbook_example, walk

torch.set_num_threads(1)


class Shared(nn.Module):
    """Two inputs, a weight with two owners, a value used twice and a bias that is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(4))
        self.idle = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h) * h + self.scale * y + h.exp()


class Doubled(torch.autograd.Function):
    """Two outputs of which the tests use one, so that one gradient is missing."""

    @staticmethod
    def forward(ctx, inp: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(inp)
        ctx.variable = "as a leaf has one"
        return inp * inp, inp + 1

    @staticmethod
    def backward(ctx, g: Tensor, h: Tensor) -> Tensor:
        (inp,) = ctx.saved_tensors
        return 2 * inp * g + h


def _mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 6), activation, nn.Linear(6, 3)).double()


def _classes(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(torch.randn(9, 5, dtype=torch.float64)), torch.arange(9) % 3)


def _squares(model: nn.Module, *shapes: tuple[int, ...]) -> Tensor:
    return model(*(torch.randn(shape, dtype=torch.float64) for shape in shapes)).square().mean()


def _convolution() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(12)).double()


# name -> model and the loss of a forward pass
MODELS = {
    "linear": lambda: (model := nn.Linear(5, 3).double(), _classes(model)),
    "relu": lambda: (model := _mlp(nn.ReLU()), _classes(model)),
    "selu": lambda: (model := _mlp(nn.SELU()), _classes(model)),
    "gelu": lambda: (model := _mlp(nn.GELU()), _classes(model)),
    "shared": lambda: (model := Shared().double(), _squares(model, (6, 4), (6, 4))),
    "convolution": lambda: (model := _convolution(), _squares(model, (8, 2, 5))),
    "gru": lambda: (model := nn.GRUCell(4, 3).double(), _squares(model, (6, 4), (6, 3))),
    "attention": lambda: (
        model := nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).double(),
        _squares(model, (2, 3, 4)),
    ),
}


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Relative to the largest gradient of all, since some are zero but for rounding; 1e-12 as in the other proofs."""
    scale = max(float(grad.norm()) for grad in theirs.values())
    return ours.keys() == theirs.keys() and all((ours[n] - theirs[n]).norm() <= 1e-12 * scale for n in theirs)


def _autograd(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_autograd(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, loss = MODELS[name]()
    graph = walk(loss, model)
    ours, theirs = gradients(loss, graph), _autograd(loss, dict(model.named_parameters(remove_duplicate=False)))
    assert _same(ours, theirs)
    assert not _same({name: 1.001 * grad for name, grad in ours.items()}, theirs)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_node_stands_once_and_after_all_that_point_to_it(name: str) -> None:
    graph = walk(MODELS[name]()[1])
    edges = graph.edges()
    assert (edges["source"] < edges["target"]).all()
    assert len({node.function for node in graph.nodes}) == len(graph.nodes)
    assert [node.id for node in graph.nodes] == list(range(len(graph.nodes)))
    arrivals = Counter(edges["target"])
    assert [node.in_degree for node in graph.nodes] == [arrivals[node.id] for node in graph.nodes]
    assert [node.id for node in graph.nodes if not node.in_degree] == [0]


def test_walking_twice_gives_the_same_frames() -> None:
    _, loss = MODELS["shared"]()
    first, second = walk(loss), walk(loss)
    assert first.frame().equals(second.frame())
    assert first.edges().equals(second.edges())


def test_textbook_example() -> None:
    example = textbook_example()
    frame = example.graph.frame(example.gradients)
    assert list(frame["node"]) == ["MulBackward0", "AccumulateGrad", "AddBackward0", "AccumulateGrad", "AccumulateGrad"]
    assert list(frame["leaf"]) == ["", "d", "", "a", "b"]
    assert frame["saved_tensors"][0] == "other 4, self 5"
    assert list(frame["next"]) == ["2:0, 1:0", "", "3:0, 4:0", "", ""]
    assert {name: grad.item() for name, grad in example.gradients.items()} == {"a": 4.0, "b": 4.0, "d": 5.0}
    assert example.loss.item() == 20.0
    assert list(frame["gradient"]) == ["", "5", "", "4", "4"]


def test_textbook_example_reads_as_a_tree() -> None:
    with torch.no_grad():
        text = str(textbook_example())
    tree = ["[0] MulBackward0", "  [2] AddBackward0", "    [3] AccumulateGrad a", "    [4] AccumulateGrad b"]
    assert text.split("\n")[-5:] == [*tree, "  [1] AccumulateGrad d"]


def _named(graph: Graph, name: str) -> list[int]:
    return [node.id for node in graph.nodes if node.name == name]


def test_a_shared_parameter_is_one_leaf_with_all_its_names() -> None:
    model, loss = MODELS["shared"]()
    graph = walk(loss, model)
    (leaf,) = [node for node in graph.nodes if "first.weight" in node.leaf]
    assert leaf.leaf == ("first.weight", "second.weight")
    assert leaf.in_degree == 2
    assert leaf.shapes == ((4, 4),)
    assert graph.unreached == ("idle",)
    assert "No gradient reaches idle." in as_text(graph)
    found = gradients(loss, graph)
    assert found["first.weight"] is found["second.weight"]


def test_a_value_used_twice_is_one_node_with_two_edges_in() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    h = x.exp()
    loss = h * h
    graph = walk(loss, {"x": x})
    (exp,) = _named(graph, "ExpBackward0")
    assert graph.nodes[exp].in_degree == 2
    assert gradients(loss, graph)["x"] == torch.autograd.grad(loss, x)[0]


def test_leaves_without_a_name_are_numbered() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert sorted(walk((x * y).sum()).frame()["leaf"])[-2:] == ["unnamed 1", "unnamed 2"]


def test_depth_5000_meets_no_recursion_limit() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    h = x
    for _ in range(5000):
        h = -h
    loss = h.sum()
    graph = walk(loss, {"x": x})
    assert len(graph.nodes) == 5002
    assert gradients(loss, graph)["x"].tolist() == [1.0, 1.0]
    assert as_text(graph).count("\n") < 210
    assert "and 4,902 more" in as_text(graph)


def test_a_custom_function_gets_zeros_where_no_gradient_arrives() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = Doubled.apply(x)[0].sum()
    graph = walk(loss, {"x": x})
    assert torch.equal(gradients(loss, graph)["x"], 2 * x.detach())
    assert graph.nodes[1].tensors == {"saved_tensors": "[(3,)]"}


def test_broadcasts_and_casts_between_the_nodes() -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = (a.half().float() + b).square().sum()
    found = gradients(loss, walk(loss, {"a": a, "b": b}))
    for name, grad in _autograd(loss, {"a": a, "b": b}).items():
        assert torch.equal(found[name], grad)
        assert found[name].dtype == grad.dtype


def test_a_view_changed_in_place() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    h = 2 * x
    h[1:3].mul_(3.0)
    loss = h.square().sum()
    assert torch.equal(gradients(loss, walk(loss, {"x": x}))["x"], torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize(
    ("node", "piece"),
    [
        ("AddmmBackward0", "Lin.backward"),
        ("TBackward0", "Lin.backward"),
        ("ReluBackward0", "Relu.backward"),
        ("MseLossBackward0", "Mse.backward"),
        ("NllLossBackward0", "CrossEntropy.backward"),
        ("LogSoftmaxBackward0", "CrossEntropy.backward"),
        ("AccumulateGrad", "p.g += g"),
        ("ConvolutionBackward0", ""),
    ],
)
def test_the_work_by_hand(node: str, piece: str) -> None:
    assert by_hand(node).piece == piece


def test_every_node_of_the_two_layer_mlp_has_its_piece_by_hand() -> None:
    model, loss = MODELS["relu"]()
    assert (walk(loss, model).frame()["hand"] != "").all()
    assert all(row.rule for row in HAND.values())


def test_what_a_node_saved() -> None:
    model = nn.Linear(5, 3)
    loss = nn.functional.cross_entropy(model(torch.randn(9, 5)), torch.arange(9) % 3)
    nll, _, addmm = walk(loss, model).nodes[:3]
    assert nll.values["ignore_index"] == "-100"
    assert nll.tensors == {"self": "(9, 3)", "target": "(9,)", "total_weight": "9"}
    assert addmm.tensors == {"mat1": "(9, 5)"}  # the weight is not saved: the input asks for no gradient
    assert addmm.next[1] is None


def test_a_list_of_saved_tensors_and_indices() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    graph = walk(x[torch.tensor([0, 2, 2])].sum())
    assert graph.nodes[1].tensors == {"indices": "[(3,)]"}


def test_freed_buffers_are_shown_and_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    loss = x.square().sum()
    loss.backward()
    graph = walk(loss, {"x": x})
    assert "freed" in graph.nodes[1].tensors.values()
    with pytest.raises(UsageError, match=r"PowBackward0 .* freed by an earlier backward pass"):
        gradients(loss, graph)


def test_a_tensor_changed_since_is_shown_and_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    h = 2 * x
    loss = h.square().sum()
    h.detach().zero_()
    graph = walk(loss, {"x": x})
    assert "changed in place since" in graph.nodes[1].tensors.values()
    with pytest.raises(UsageError, match=r"PowBackward0 \(node 1\) cannot be called by itself"):
        gradients(loss, graph)


def test_the_graph_of_another_loss_is_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(UsageError, match="another loss"):
        gradients(x.sum(), walk(x.sum()))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda: torch.ones(()), "no graph"),
        (lambda: torch.ones((), requires_grad=True), "itself a leaf"),
        (lambda: torch.ones(3, requires_grad=True).sum().detach(), "no graph"),
        (lambda: 2 * torch.ones(3, requires_grad=True), r"shape \(3,\): must hold one number"),
        (lambda: torch.tensor(3), "dtype int64"),
        (lambda: torch.ones(1, requires_grad=True) * 1j, "dtype complex64"),
        (lambda: 3.0, "is a float: must be a tensor"),
    ],
    ids=["no graph", "leaf", "detached", "vector", "integer", "complex", "no tensor"],
)
def test_losses_that_are_refused(loss, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        walk(loss())
    assert "\n" not in str(caught.value)


def test_one_number_of_any_shape_is_a_loss() -> None:
    x = torch.randn(1, 1, requires_grad=True)
    assert gradients(loss := 3 * x, walk(loss, {"x": x}))["x"].tolist() == [[3.0]]


def test_an_edge_says_which_output_of_which_node_its_gradient_is_for() -> None:
    """`input` counts the outputs of the forward pass that the target made: here the second of two has the gradient."""
    x = torch.randn(3, requires_grad=True)
    graph = walk((Doubled.apply(x)[1] * 2).sum(), {"x": x})
    edges = graph.edges()
    names = {node.id: node.name for node in graph.nodes}
    assert list(edges.columns) == ["source", "target", "position", "input", "shape"]
    into = edges[[names[target].startswith("Doubled") for target in edges["target"]]]
    assert into["input"].tolist() == [1] and into["position"].tolist() == [0] and into["shape"].tolist() == ["(3,)"]
