"""The fused passes against the plain producer of the same row: counts exactly, moments to 1e-12.

On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1), on a GPU as compiled.
"""

import math

import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import gaussian
from initlab.stats.histogram import histogram
from initlab.stats.kernels import triton_rows as fused
from initlab.stats.reference import FIELDS
from initlab.stats.summarize import saturated_share, summarize

# The interpreter computes with numpy, which warns of 0/0; here that is a tensor without a finite entry.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

NO_CPU = fused.missing(torch.device("cpu"))
DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(bool(NO_CPU), reason=f"{NO_CPU}, or TRITON_INTERPRET=1")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not fused.TRITON, reason="Triton is not installed")]
        ),
    ],
)
EXACT = ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "exponent", "min", "max", "dead", "alive")
SIZED = ("m2", "within", "resultant")
DTYPES = pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)


def normal(shape, what="x"):
    return gaussian(shape, 0, what)


def with_holes(shape, bad):
    """Every third entry is bad; the first vector and the first unit have nothing else."""
    x = normal(shape)
    x.flatten()[::3] = bad
    x[..., 0, :] = bad
    x[..., 0] = bad
    return x


def edges(shape):
    """The ends of the number format, of both signs, and zeros of both signs."""
    ends = torch.tensor([1e-45, -1.2e-38, 1.17e-38, 1e-40, -3e38, 3.4e38, 0.0, -0.0, 1.0, -2.0, torch.inf, -torch.inf])
    return ends.repeat(math.prod(shape) // len(ends) + 1)[: math.prod(shape)].reshape(shape)


VALUES = {
    "normal": normal,
    "half nan": lambda shape: with_holes(shape, torch.nan),
    "inf": lambda shape: with_holes(shape, torch.inf),
    "-inf": lambda shape: with_holes(shape, -torch.inf),
    "all nan": lambda shape: torch.full(shape, torch.nan),
    "all zero": torch.zeros,
    "1e-40": lambda shape: normal(shape) * 1e-40,
    "1e37": lambda shape: (normal(shape) * 1e37).clamp(-3e38, 3e38),
    "far mean": lambda shape: normal(shape) * 0.01 + 1e4,
    "far units": lambda shape: normal(shape) * 1e-3 + 1e3 * normal((shape[-1],), "units"),
    "constant": lambda shape: torch.full(shape, 0.1),
    "constant units": lambda shape: normal((shape[-1],)).expand(shape).clone(),
    "one large": lambda shape: normal(shape).index_fill(-1, torch.tensor([0]), 1e30),
    "sparse": lambda shape: normal(shape) * (normal(shape, "mask") > 1),
    "edges": edges,
}
CASES = pytest.mark.parametrize("value", VALUES)
# One entry; one vector; one unit; less and more than a tile; an ensemble; two dimensions of leads; more blocks of a
# batch than are merged with the units, and more without a batch than are merged together.
SHAPES = [(1, 1), (1, 5), (40, 1), (7, 6), (33, 130), (3, 20, 10), (2, 2, 17, 3), (2, 150, 5), (300, 900)]


def agree(found, x, batched, saturated=None):
    """The row and the histogram of x, as the plain producer makes them."""
    fields, counts = found
    fields, counts, x = fields.cpu(), counts.cpu(), x.cpu()
    reference = dict(zip(FIELDS, summarize(x, batched), strict=True))
    mine = dict(zip(FIELDS, fields, strict=True))
    assert torch.equal(counts, histogram(x))
    for name in EXACT:
        torch.testing.assert_close(mine[name], reference[name], rtol=0, atol=0, equal_nan=True, msg=name)
    finite = reference["count"] - reference["n_nan"] - reference["n_inf"]
    rms = (reference["m2"] / finite + reference["mean"].square()).sqrt()
    assert torch.equal(mine["mean"].isnan(), reference["mean"].isnan())
    assert not ((mine["mean"] - reference["mean"]).abs() > 1e-12 * rms).any()
    for name in SIZED:
        torch.testing.assert_close(mine[name], reference[name], rtol=1e-12, atol=0, equal_nan=True, msg=name)
    expected = torch.full_like(rms, torch.nan) if saturated is None else saturated.cpu()
    torch.testing.assert_close(mine["saturated"], expected, rtol=1e-15, atol=0, equal_nan=True)


def make(value, shape, dtype, device):
    x = VALUES[value](shape)
    return x.clamp(-6e4, 6e4).to(dtype).to(device) if dtype == torch.float16 else x.to(dtype).to(device)


def room(x, batched=True, saturated=False):
    return fused.blocks(
        x.shape[:-2], tuple(x.shape[-2:]), x.dtype, x.device, batched, x.shape[:-2].numel() if saturated else 0
    )


@DEVICES
@CASES
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "flat"])
def test_a_single_tensor(value, batched, device):
    x = make(value, (3, 20, 10), torch.float32, device)
    agree(fused.measure_alone(x, batched), x, batched)


@DEVICES
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "flat"])
def test_every_shape_and_format(shape, dtype, batched, device):
    for value in ("normal", "edges"):
        x = make(value, shape, dtype, device)
        agree(fused.measure_alone(x, batched), x, batched)


@DEVICES
def test_a_wrong_row_is_caught(device):
    x = make("normal", (20, 10), torch.float32, device)
    found = fused.measure_alone(x)
    for wrong in (x * (1 + 1e-6), x.flip(0) + 0, x.mT.reshape(20, 10), -x):
        if not torch.equal(wrong, x.flip(0)):
            with pytest.raises(AssertionError):
                agree(found, wrong, True)
    agree(found, x.flip(0), True)  # the order of the batch is nothing


@DEVICES
@CASES
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_fused_into_relu(value, in_place, device):
    z = make(value, (2, 20, 150), torch.float32, device)
    before, row = z.clone(), ACTIVATIONS["relu"]
    z_blocks, a_blocks = room(z, saturated=True), room(z)
    a = fused.relu(z, z_blocks, a_blocks, out=z if in_place else None)
    torch.testing.assert_close(a, row.phi(before), rtol=0, atol=0, equal_nan=True)
    assert in_place == (a.data_ptr() == z.data_ptr())
    assert in_place or torch.equal(z.view(torch.int32), before.view(torch.int32))
    agree(fused.finish(z_blocks), before, True, saturated_share(row.slope(before), row.largest_slope))
    agree(fused.finish(a_blocks), a, True)


@DEVICES
@CASES
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_fused_into_the_mask_of_the_backward(value, in_place, device):
    z = make(value, (2, 20, 10), torch.float32, device)
    a = torch.relu(z)
    for g in (normal((2, 20, 10), "g").to(device), make("inf", (2, 20, 10), torch.float32, device)):
        before, a_blocks, z_blocks = g.clone(), room(g), room(g)
        z_grad = fused.mask(g, a, a_blocks, z_blocks, out=g if in_place else None)
        torch.testing.assert_close(z_grad, ACTIVATIONS["relu"].pull_back(before, z), rtol=0, atol=0, equal_nan=True)
        agree(fused.finish(a_blocks), before, True)
        agree(fused.finish(z_blocks), z_grad, True)


@DEVICES
@CASES
@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.0]], ids=["one rate", "a rate for each network"])
def test_fused_into_the_update(value, rates, device):
    """The new weights to one rounding, since a GPU may round lr g or not; the rows of what was written exactly."""
    w, g = normal((2, 50, 60), "w").to(device), make(value, (2, 50, 60), torch.float32, device)
    old, lr = w.clone(), torch.tensor(rates, device=device)
    rooms = [room(w, batched=False) for _ in range(3)]
    fused.update(w, g, lr, *rooms)
    expected = old.double() - lr.double()[:, None, None] * g.double()
    rounded = expected.float()
    known = rounded.isfinite()
    assert torch.equal(w.isfinite(), known)
    scale = (old.abs() + (lr[:, None, None] * g).abs())[known]
    assert ((w - rounded)[known].abs() <= 2**-23 * scale).all()
    for found, x in zip(rooms, (g, w - old, w), strict=True):
        agree(fused.finish(found), x, False)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_passes_in_16_bits(dtype, device):
    z = make("edges", (20, 10), dtype, device)
    before, z_blocks, a_blocks = z.clone(), room(z, saturated=True), room(z)
    a = fused.relu(z, z_blocks, a_blocks)
    assert torch.equal(a, torch.relu(before))
    agree(fused.finish(a_blocks), a, True)
    w, g = (normal((50, 60), what).to(device, dtype) for what in ("w", "g"))
    old, rooms = w.clone(), [room(w, batched=False) for _ in range(3)]
    fused.update(w, g, torch.tensor([0.1], device=device), *rooms)
    expected = old.double() - torch.tensor([0.1]).to(device).double() * g.double()
    assert ((w.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()
    agree(fused.finish(rooms[1]), (w.float() - old.float()).to(dtype), False)


@DEVICES
def test_tensors_of_one_pass_are_finished_together(device):
    """Two networks each; the first two tensors are preactivations."""
    z = normal((2, 20, 10)).to(device)
    both = fused.blocks((2, 2), (20, 10), z.dtype, z.device, True, 2)
    a = fused.relu(z, *both.split())
    fields, counts = fused.finish(both)
    assert fields.shape[1:] == (2, 2) and counts.shape[:2] == (2, 2)
    share = (z > 0).logical_not().double().mean((-2, -1))
    agree((fields[:, 0], counts[0]), z, True, saturated=share)
    agree((fields[:, 1], counts[1]), a, True)


@DEVICES
def test_mistakes_are_named(device):
    x = torch.ones(20, 10, device=device)
    with pytest.raises(UsageError, match=r"float64: must be one of bfloat16, float16, float32"):
        fused.measure_alone(x.double())
    with pytest.raises(UsageError, match=r"\(20, 10\) float32.*room for \(20, 11\) float32"):
        fused.measure(x, fused.blocks((), (20, 11), torch.float32, device))
    with pytest.raises(UsageError, match=r"\(20, 10\) float16.*room for \(20, 10\) float32"):
        fused.measure(x.half(), room(x))
    with pytest.raises(UsageError, match=r"contiguous"):
        fused.measure(torch.ones(10, 20, device=device).mT, room(x))
    with pytest.raises(UsageError, match=r"batched=False, needed is batched=True"):
        fused.relu(x, room(x, batched=False), room(x))
    with pytest.raises(UsageError, match=r"lr of 3 numbers.*must be 1 or 1"):
        fused.update(x, x.clone(), torch.ones(3, device=device), *[room(x, batched=False) for _ in range(3)])
    with pytest.raises(UsageError, match=r"at least one entry"):
        fused.blocks((), (0, 3), torch.float32, device)


@pytest.mark.skipif(not NO_CPU, reason="the passes run here")
def test_without_triton_or_a_gpu_there_is_a_reason_and_no_crash():
    x = torch.ones(20, 10)
    with pytest.raises(UsageError, match=r"fused statistics of \(20, 10\) float32 on cpu: .*(Triton|GPU)"):
        fused.measure_alone(x)


@pytest.mark.gpu
@pytest.mark.skipif(not fused.TRITON, reason="Triton is not installed")
def test_no_pass_waits_for_the_gpu():
    z = normal((2, 3, 128, 100)).cuda()
    w, lr = normal((100, 100)).cuda(), torch.tensor([0.1], device="cuda")
    rooms, flat = [room(z, saturated=True), room(z)], [room(w, batched=False) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        a = fused.relu(z, *rooms)
        fused.mask(z, a, *rooms)
        fused.update(w, w.clone(), lr, *flat)
        rows = [fused.finish(r) for r in (*rooms, *flat)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(fields.shape[0] == len(FIELDS) for fields, _ in rows)
