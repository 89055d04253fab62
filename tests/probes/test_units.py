"""Which dimension counts units, wherever it has been moved to: two of eight channels are dead."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from initlab.probes.probed_modules import as_batch
from initlab.stats.kernels.cpu import plain

X = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.gate = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Linear(8, 8)
        self.relu, self.function = nn.ReLU(), function
        for layer in (self.conv, self.linear):
            with torch.no_grad():
                layer.bias[:2] = -100  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def squeeze_and_excite(m: Net, x: Tensor) -> Tensor:
    z = m.conv(x)
    gate = m.gate(z.mean((2, 3))).sigmoid()
    return m.relu(z * gate[:, :, None, None])


FUNCTIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda m, x: F.relu(m.conv(x)),
    "channels last": lambda m, x: F.relu(m.conv(x).permute(0, 2, 3, 1)),
    "channels last, module": lambda m, x: m.relu(m.conv(x).permute(0, 2, 3, 1)),
    "flattened": lambda m, x: F.relu(m.conv(x).flatten(2)),
    "flattened, module": lambda m, x: m.relu(m.conv(x).flatten(2)),
    "one more": lambda m, x: F.relu(m.conv(x).unsqueeze(1)),
    "a layer on moved channels": lambda m, x: F.relu(m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "tokens": lambda m, x: F.relu(m.conv(x).flatten(2).transpose(1, 2)),
    "a gate": squeeze_and_excite,
    "two ReLUs": lambda m, x: m.relu(F.relu(m.conv(x).permute(0, 2, 3, 1))),
}


@pytest.mark.filterwarnings("ignore:probe. never called")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dead_channels_are_found_wherever_they_are(name: str) -> None:
    rows = initlab.measure(Net(FUNCTIONS[name]), X)
    found = rows[rows["op"].isin(["relu", "ReLU"]) & rows["direction"].eq("forward")]
    assert len(found) == 1 + (name == "two ReLUs") and (found["frac_dead"] == 0.25).all()


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5), (1, 1, 7), (3, 37, 4, 5), (2, 64, 16, 16), (4, 16, 1, 1), (1, 20, 2, 3, 7)]
)
def test_images_are_read_with_their_channels_last(shape: tuple[int, ...], accelerated: bool) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = torch.nan
    wanted = x.movedim(1, -1).reshape(-1, shape[1])
    with nullcontext() if accelerated else plain():
        for one in (x, x.double(), x.transpose(0, -1).contiguous().transpose(0, -1), x.requires_grad_()):
            found = as_batch(one, 1)
            torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=0, equal_nan=True)
            assert not found.requires_grad
