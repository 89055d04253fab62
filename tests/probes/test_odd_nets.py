"""Nets of plain torch that are no chain of its own layers: every row against hooks by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import Adam

from tests.probes.by_hand import Place, X, differences, mlp, numbers, once, sgd, snapshot, square, watch

WORDS = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(2))


class Translator(nn.Module):
    """torch's encoder and decoder with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        h = self.body(source, target, tgt_mask=mask, src_key_padding_mask=padding, tgt_is_causal=True)
        out: Tensor = self.head(h)
        return out


def translate(model: nn.Module) -> Tensor:
    padding = torch.zeros(5, 7, dtype=torch.bool)
    padding[0, 5:] = True
    out: Tensor = model(WORDS, WORDS[:, :4], padding)
    return out.square().mean()


def test_torchs_transformer_with_masks() -> None:
    torch.manual_seed(0)
    seen = watch(Translator(), lambda m, o: once(m, o, translate))
    seen.check()
    assert "out_proj" not in seen.said.replace(".", " ").split()
    stream = seen.rows[(seen.rows["tensor"] == "stream") & (seen.rows["direction"] == "forward")]
    layers = stream[stream["op"] == "add"].groupby(["step", "name"], observed=True).size()
    assert layers.tolist() == [2, 3] * 2  # an encoder layer has two sums, a decoder layer three


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([7, 5, 4, 2, 1]), batch_first=True)
        out, _ = self.body(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        found: Tensor = self.head(padded)
        return found


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    watch(Packed(kind), lambda m, o: once(m, o, lambda net: net(WORDS).square().mean())).check()


class OneAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(x, x, x, need_weights=False)[0] + x)
        return out


def test_multihead_attention() -> None:
    torch.manual_seed(0)
    watch(OneAttention(), lambda m, o: once(m, o, lambda net: net(WORDS).square().mean())).check()


class Adapter(nn.Module):
    """A frozen base beside a low-rank product that is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 3)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out


def test_low_rank_adapters() -> None:
    model = mlp()
    for k in (0, 2):
        model[k] = Adapter(model[k])
    model[4].requires_grad_(False)
    seen = watch(model, lambda m, o: once(m, o, square), steps=3)
    seen.check()
    updates = seen.rows[seen.rows["tensor"] == "update"]
    assert set(updates["name"]) == {"0", "2"} and set(updates["part"]) == {"a", "b"}
    total = seen.rows[(seen.rows["name"] == "0") & (seen.rows["op"] == "add") & (seen.rows["direction"] == "forward")]
    out = seen.trace.values[Place(0, "0", "", 0, "forward")]
    assert len(total) == 3 and not differences(total.iloc[0], out)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(self.embed(x)).tanh())
            return out

    torch.manual_seed(0)
    ids = torch.randint(11, (6, 5))
    seen = watch(Tied(), lambda m, o: once(m, o, lambda net: F.cross_entropy(net(ids).flatten(0, 1), ids.flatten())))
    seen.check()
    weights = seen.rows[(seen.rows["tensor"] == "weight") & (seen.rows["direction"] == "forward")]
    assert weights.groupby("step")["name"].agg(list).tolist() == [["embed", "body"]] * 2


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_activations_in_place(kind: type[nn.Module]) -> None:
    model = mlp()
    model[1], model[3] = kind(inplace=True), kind(inplace=True)
    watch(model, lambda m, o: once(m, o, square)).check()


def test_a_branch_that_is_not_taken_is_named_once() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleDict({"left": nn.Linear(6, 4), "right": nn.Linear(6, 4), "idle": nn.Linear(6, 4)})

        def forward(self, x: Tensor, way: str) -> Tensor:
            out: Tensor = self.ways[way](x)
            return out

    torch.manual_seed(0)
    ways = iter(["left", "right"] * 3)
    seen = watch(Routed(), lambda m, o: once(m, o, lambda net: net(X, next(ways)).square().mean()))
    seen.check()
    assert seen.said.split().count("ways.idle") == 1 and "ways.left" not in seen.said.split()


def test_half_precision_by_autocast() -> None:
    """Only the body is in bfloat16: numbers are those of the format that is there."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp()[:4], nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                h = self.body(x)
            out: Tensor = self.head(h.float())
            return out

    watch(Mixed(), lambda m, o: once(m, o, square), lambda m: [Adam(m.parameters(), 0.01)]).check()


def test_a_function_of_ones_own_as_activation() -> None:
    """A torch.autograd.Function with a straight-through gradient."""

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            return gradient

    class Binary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Sign.apply(x)
            return out

    model = mlp()
    model[1] = Binary()
    watch(model, lambda m, o: once(m, o, square)).check()


def test_parameters_in_a_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([nn.Parameter(torch.randn(6, 6) / 3) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for w in self.ws:
                x = torch.relu(x @ w)
            return x

    torch.manual_seed(0)
    watch(Listed(), lambda m, o: once(m, o, square), sgd).check()


def test_hooks_of_the_user_change_no_row() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(F.relu(self.first(x)))
            return out

    torch.manual_seed(0)
    alone, hooked = Net(), Net()
    hooked.load_state_dict(alone.state_dict())
    hooked.first.register_forward_hook(lambda m, args, out: print(out.detach().std()))
    wanted, found = snapshot(alone, X).rows, snapshot(hooked, X).rows
    assert list(wanted["layer"]) == list(found["layer"]) and list(wanted["rms"]) == list(found["rms"])


def test_an_input_has_a_row_whatever_the_root_is() -> None:
    rows = snapshot(mlp(), X).rows
    found = rows[rows["layer"] == 0]
    assert len(found) == 1 and not differences(found.iloc[0], numbers(X, 1))


class Force(nn.Module):
    """The slope of an energy with respect to the input: a gradient is taken inside of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Experts(nn.Module):
    """Each row goes to two of three experts, whose outputs are added where the rows came from."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights, places = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mine = places == k
            rows = mine.any(-1).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * (weights * mine).sum(-1)[rows, None])
        return out + x


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scales, self.norm = nn.Linear(6, 6), nn.Linear(6, 12), nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        factor, shift = self.scales(x).chunk(2, -1)
        out: Tensor = self.norm(self.body(x)) * (1 + factor) + shift
        return out


class OverDepth(nn.Module):
    """One layer, four times."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.act(self.body(x))
        return x


class Autoencoder(nn.Module):
    """Random numbers between its parts, three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        mean, log = self.encoder(x).chunk(2, -1)
        out: Tensor = self.decoder(mean + torch.randn_like(mean) * (0.5 * log).exp())
        return out


class Skips(nn.Module):
    """Down, up, and side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x[:, None, None, :4].reshape(-1, 1, 2, 2))
        out: Tensor = self.out(torch.cat([a, self.up(self.middle(self.pool(a)))], 1))
        return out


class Named(nn.Module):
    """A part that takes words only and gives a dict with what is no tensor."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, *, x: Tensor, scale: float) -> dict[str, object]:
            return {"h": self.layer(input=x) * scale, "more": [x, None, "text"]}

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Named.Part(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.part(x=x, scale=2.0)["h"])
        return out


@pytest.mark.parametrize("kind", [Force, Experts, Modulated, OverDepth, Autoencoder, Skips, Named])
def test_nets_of_many_kinds(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    watch(kind(), lambda m, o: once(m, o, square)).check()
