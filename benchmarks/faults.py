"""Networks that are healthy, and networks with one planted fault, with what a verdict must say of them.

A fault is planted at a size: depth and width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab


class Case(NamedTuple):
    """model, batch; the rule expected, and the parameter that it must name, empty for a fault of all layers.

    mend: the remedy, where it is no number. op: the function of torch that is at fault, where it is one.
    """

    model: nn.Module
    x: Tensor
    rules: tuple[str, ...] = ()
    name: str = ""
    mend: Callable[[nn.Module, Tensor], tuple[nn.Module, Tensor]] | None = None
    op: str = ""


def mlp(depth: int, width: int, act: Callable[[], nn.Module], gain: float, law: str = "normal") -> nn.Sequential:
    """`depth` layers of `width` units and a head; law: normal, orthogonal, cut, or torch's own."""
    parts: list[nn.Module] = []
    for _ in range(depth):
        layer, std = nn.Linear(width, width), gain / width**0.5
        if law == "normal":
            nn.init.normal_(layer.weight, 0, std)
        elif law == "orthogonal":
            nn.init.orthogonal_(layer.weight, gain)
        elif law == "cut":
            nn.init.trunc_normal_(layer.weight, 0, std, -2 * std, 2 * std)
        if law != "torch":
            nn.init.zeros_(layer.bias)
        parts += [layer, act()]
    head = nn.Linear(width, 10)
    nn.init.normal_(head.weight, 0, width**-0.5)
    return nn.Sequential(*parts, head)


class Residual(nn.Module):
    """Blocks x + B relu(A x) without norms."""

    def __init__(self, depth: int, width: int, gain: float) -> None:
        super().__init__()
        first, last = ([nn.Linear(width, width) for _ in range(depth)] for _ in range(2))
        self.a, self.b, self.head = nn.ModuleList(first), nn.ModuleList(last), nn.Linear(width, 10)
        for a, b in zip(first, last, strict=True):
            nn.init.kaiming_normal_(a.weight)
            nn.init.normal_(b.weight, 0, gain / width**0.5)
            nn.init.zeros_(a.bias)
            nn.init.zeros_(b.bias)

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.relu(a(x)))
        out: Tensor = self.head(x)
        return out


class Functional(nn.Module):
    """Linear layers with F.relu between them."""

    def __init__(self, depth: int, width: int, gain: float) -> None:
        super().__init__()
        layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
        for layer in layers:
            nn.init.normal_(layer.weight, 0, gain / width**0.5)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class Rooted(nn.Module):
    """A sqrt whose slope at 0 is infinite, two submodules deep: its input is exactly 0 where a ReLU is."""

    def __init__(self, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.eps, self.layer = eps, nn.Linear(width, width)
        nn.init.kaiming_normal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(F.relu(self.layer(x)) + self.eps)


class Logged(nn.Module):
    """log(relu(x)): -inf at 0."""

    def __init__(self, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.eps, self.layer = eps, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(F.relu(self.layer(x)) + self.eps)


class Nested(nn.Module):
    """Something in the middle of a network, two submodules deep."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(width, width), nn.Sequential(inner), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(torch.tanh(self.stem(x))))
        return out


def encoder(depth: int, width: int, norm_first: bool, activation: str = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, 0.0, batch_first=True, norm_first=norm_first, activation=activation
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def gpt2(depth: int, width: int) -> nn.Module:
    """Pre-norm blocks by GPT-2's rule: N(0, 0.02^2), the ends of branches by 1/sqrt(2 L) smaller."""
    model = encoder(depth, width, True, "gelu")
    for name, p in model.named_parameters():
        if p.ndim == 2:
            end = "out_proj" in name or "linear2" in name
            nn.init.normal_(p, 0, 0.02 / (2 * depth) ** (0.5 * end))
    return model


def normed(depth: int, width: int) -> nn.Module:
    parts = (part for _ in range(depth) for part in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()))
    return nn.Sequential(*parts, nn.Linear(width, 10))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        alike = stride == 1 and inputs == outputs
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Identity() if alike else down

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.downsample(x))


def resnet18(width: int = 16) -> nn.Sequential:
    """ResNet-18 as torchvision initializes it: Kaiming's rule by fan_out, norms 1 and 0."""
    blocks, inputs = [], width
    for k, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
        blocks += [BasicBlock(inputs, outputs, 2 if k else 1), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def lightning_module(body: nn.Module) -> nn.Module:
    """A LightningModule as its documentation writes one: the network is a part, the loss and the optimizer methods."""
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    return Classifier()


RELU = 2**0.5
LIBRARIES = {"LightningModule": "lightning", "LightningModule 1/sqrt(n)": "lightning"}  # that a case needs
HEALTHY: dict[str, Callable[[int, int], Case]] = {
    "kaiming": lambda d, w: Case(mlp(d, w, nn.ReLU, RELU), torch.randn(64, w)),
    "lecun tanh": lambda d, w: Case(mlp(d, w, nn.Tanh, 1), torch.randn(64, w)),
    "kaiming tanh": lambda d, w: Case(mlp(d, w, nn.Tanh, initlab.gain("tanh")), torch.randn(64, w)),
    "orthogonal linear": lambda d, w: Case(mlp(d, w, nn.Identity, 1, "orthogonal"), torch.randn(64, w)),
    "selu": lambda d, w: Case(mlp(d, w, nn.SELU, 1), torch.randn(64, w)),
    "batch-normed": lambda d, w: Case(normed(d, w), torch.randn(64, w)),
    "residual by 1/sqrt(L)": lambda d, w: Case(Residual(d, w, d**-0.5), torch.randn(64, w)),
    "pre-norm": lambda d, w: Case(encoder(min(d, 12), w, True), torch.randn(4, 12, w)),
    "gpt2": lambda d, w: Case(gpt2(min(d, 12), w), torch.randn(4, 12, w)),
    "resnet18": lambda d, w: Case(resnet18(w // 4), torch.randn(4, 3, 64, 64)),
    "functional": lambda d, w: Case(Functional(d, w, RELU), torch.randn(64, w)),
    "LightningModule": lambda d, w: Case(lightning_module(mlp(d, w, nn.ReLU, RELU)), torch.randn(64, w)),
}


def planted(d: int, w: int, change: Callable[[nn.Linear], Any], part: str, *rules: str) -> Case:
    """A healthy network, one layer of which is changed, at a place that the random numbers choose."""
    model, k = mlp(d, w, nn.ReLU, RELU), 2 * int(torch.randint(1, d, ()))
    layer = model[k]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        change(layer)
    return Case(model, torch.randn(64, w), rules, f"{k}.{part}" if part else str(k))


def with_logits(w: int) -> Case:
    model = encoder(4, w, True)
    with torch.no_grad():
        model.layers[2].self_attn.in_proj_weight[:w] *= 100  # type: ignore[union-attr,index]
    return Case(model, torch.randn(4, 12, w), ("saturated",), "layers.2.self_attn")


SMALL, LARGE = ("vanishing", "gradient-vanishing"), ("exploding", "gradient-exploding")
FAULTS: dict[str, Callable[[int, int], Case]] = {
    "naive": lambda d, w: Case(mlp(d, w, nn.ReLU, w**0.5), torch.randn(64, w), LARGE),
    "0.01": lambda d, w: Case(mlp(d, w, nn.ReLU, 0.01 * w**0.5), torch.randn(64, w), SMALL),
    "1/sqrt(n) before ReLU": lambda d, w: Case(mlp(d, w, nn.ReLU, 1), torch.randn(64, w), SMALL),
    "torch's default before ReLU": lambda d, w: Case(mlp(d, w, nn.ReLU, 1, "torch"), torch.randn(64, w), SMALL),
    "functional 1/sqrt(n)": lambda d, w: Case(Functional(d, w, 1), torch.randn(64, w), SMALL),
    "LightningModule 1/sqrt(n)": lambda d, w: Case(lightning_module(mlp(d, w, nn.ReLU, 1)), torch.randn(64, w), SMALL),
    "tanh 3": lambda d, w: Case(mlp(d, w, nn.Tanh, 3), torch.randn(64, w), ("saturated",)),
    "sigmoid N(0, 1)": lambda d, w: Case(mlp(d, w, nn.Sigmoid, w**0.5), torch.randn(64, w), ("saturated",)),
    "one layer x100": lambda d, w: planted(d, w, lambda m: m.weight.mul_(100), "weight", "exploding"),
    "one layer x0.01": lambda d, w: planted(d, w, lambda m: m.weight.mul_(0.01), "weight", "vanishing"),
    "one layer 0": lambda d, w: planted(d, w, lambda m: m.weight.zero_(), "weight", "vanishing"),
    "one layer nan": lambda d, w: planted(d, w, lambda m: m.weight[1].fill_(torch.nan), "weight", "non-finite"),
    "bias -50": lambda d, w: planted(d, w, lambda m: m.bias.fill_(-50), "", "dead"),
    "input x1e4": lambda d, w: Case(mlp(d, w, nn.ReLU, RELU), 1e4 * torch.randn(64, w), ("input-scale",)),
    "input x1e-4": lambda d, w: Case(mlp(d, w, nn.Tanh, 1), 1e-4 * torch.randn(64, w), ("input-scale",)),
    "residual unscaled": lambda d, w: Case(Residual(d, w, RELU), torch.randn(64, w), LARGE),
    "cut normal": lambda d, w: Case(mlp(d, w, nn.ReLU, RELU, "cut"), torch.randn(64, w), ("lost-variance",)),
    "logits x100": lambda d, w: with_logits(w),
    "post-norm": lambda d, w: Case(
        encoder(24, w, False),
        torch.randn(2, 8, w),
        ("post-norm",),
        mend=lambda model, x: (encoder(24, w, True), x),
    ),
    "inputs equal": lambda d, w: Case(
        mlp(d, w, nn.ReLU, RELU),
        torch.randn(1, w).expand(64, w),
        ("input-equal",),
        mend=lambda model, x: (model, torch.randn(64, w)),
    ),
    "nan in the backward pass": lambda d, w: Case(
        Nested(w, Rooted(w)),
        torch.randn(64, w),
        ("non-finite",),
        "middle.0",
        mend=lambda model, x: (Nested(w, Rooted(w, 1e-6)), x),
        op="sqrt",
    ),
    "nan in the forward pass": lambda d, w: Case(
        Nested(w, Logged(w)),
        torch.randn(64, w),
        ("non-finite",),
        "middle.0",
        mend=lambda model, x: (Nested(w, Logged(w, 1e-6)), x),
        op="log",
    ),
}
