"""Image nets of timm with random weights: every row against hooks by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.probes.by_hand import Axis, differences, flat, numbers, once, snapshot, watch
from tests.probes.flow import misplaced

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Y = torch.arange(4) % 3
NETS = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "mixer": {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 24},
}


def build(name: str, **words: object) -> nn.Module:
    torch.manual_seed(0)
    if name == "mixer":
        return timm.models.mlp_mixer.MlpMixer(num_classes=3, **NETS[name], **words)
    return timm.create_model(name, pretrained=False, num_classes=3, **NETS[name], **words)


def classify(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), Y)


def axis_of(model: nn.Module) -> Axis:
    """Units of (N, C, H, W) are channels, but where a net keeps them last: ConvNeXt's blocks, attention weights."""
    modules = dict(model.named_modules())

    def find(name: str, x: Tensor) -> int | None:
        if x.ndim != 4:
            return x.ndim - 1
        module = modules[name]
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            return 1
        return x.ndim - 1 if isinstance(module, nn.Linear) else None

    return find


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_every_module_and_parameter_has_its_row(name: str, drop: float) -> None:
    """With dropped paths too: a block whose path is dropped adds zeros."""
    model = build(name, drop_path_rate=drop).train()
    watch(model, lambda m, o: once(m, o, classify), axis=axis_of(model)).check()


@pytest.mark.parametrize("name", NETS)
def test_a_pass_alone(name: str) -> None:
    model = build(name).eval()
    seen = snapshot(model, IMAGES, Y, F.cross_entropy, axis=axis_of(model))
    seen.check()
    assert not misplaced(seen)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mixer"])
def test_the_stream_is_what_comes_out_of_the_blocks(name: str) -> None:
    """A block's last sum, or what it makes of it: the largest tensor of the stream is the one of hooks."""
    model = build(name).eval()
    kinds = {"BasicBlock", "Block", "ConvNeXtBlock", "MixerBlock"}
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}
    caught: dict[str, Tensor] = {}
    for n, m in blocks.items():
        m.register_forward_hook(lambda m, args, out, n=n: caught.update({n: out.detach()}))
    model(IMAGES)
    rows = snapshot(build(name).eval(), IMAGES).rows
    rows = rows[rows["direction"] == "forward"]
    for n, x in caught.items():
        own = rows[rows["name"].eq(n) | rows["name"].str.startswith(f"{n}.")]
        if name == "resnet10t":  # a ReLU module stands behind the sum
            found = own[own["tensor"].eq("activation") & own["name"].eq(f"{n}.act2")]
            assert len(own[own["tensor"] == "stream"]) >= 1
        else:
            found = own[own["tensor"] == "stream"].tail(1)
        axis = 1 if x.ndim == 4 else 2
        wanted = numbers(x, axis)
        wanted.pop("dead")
        if name == "convnext_atto":
            wanted.pop("cosine", None)
        assert len(found) == 1 and not differences(found.iloc[0], wanted), n


def test_squeeze_and_excite_gates_have_rows() -> None:
    """The gates are sigmoids of a module; SiLU in place stands behind every norm."""
    model = build("efficientnet_b0").eval()
    rows = snapshot(model, IMAGES).rows
    rows = rows[rows["direction"] == "forward"]
    name = "blocks.1.0.se.gate"
    found = rows[rows["name"] == name]
    assert list(found["tensor"]) == ["activation"]
    kept: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda m, args, out: kept.append(out.detach()))
    model(IMAGES)
    assert not differences(found.iloc[0], {k: v for k, v in numbers(flat(kept[0], 1)).items() if k != "dead"})


def test_the_saturated_share_behind_an_activation_of_ones_own() -> None:
    """ReLU behind a norm: BatchNormAct2d of timm holds its activation as a part."""
    model = build("resnet10t").eval()
    rows = snapshot(model, IMAGES).rows
    bn = rows[rows["name"].eq("layer1.0.bn1") & rows["part"].eq("") & rows["direction"].eq("forward")]
    kept: list[Tensor] = []
    model.layer1[0].bn1.register_forward_hook(lambda m, args, out: kept.append(out.detach().clone()))
    model(IMAGES)
    share = float((kept[0] <= 0).double().mean())
    assert float(bn["frac_saturated"].iloc[0]) == pytest.approx(share, rel=1e-12)
