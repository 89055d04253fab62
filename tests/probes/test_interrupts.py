"""What is not the network's: functions that initlab calls, and functions after an interrupt that a loop has caught."""

from collections import Counter
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

import initlab
from tests.probes.by_hand import WORDS, X


class Heard(TorchFunctionMode):
    """Counts the functions of torch by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Layers, functions, a computed weight, attention and a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.attention = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.3)
        h = h + torch.sin(self.first(h))
        h = self.attention(h[None])[0]
        out: Tensor = self.head(self.norm(h)).softmax(-1)
        return out


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_mode_of_the_user_hears_the_same_functions_as_without_a_probe(given: bool, inside: bool) -> None:
    heard = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, mode = Net(), Heard()
        optimizer = torch.optim.Adam(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def loop(model: nn.Module = model, o: Any = optimizer, scaler: Any = scaler) -> None:
            for _ in range(2):
                o.zero_grad()
                scaler.scale(F.cross_entropy(model(X), torch.arange(12) % 3)).backward()
                scaler.unscale_(o)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(o)
                scaler.update()

        known = optimizer if given else None
        if not watched:
            with mode:
                loop()
        elif inside:
            with initlab.probe(model, optimizer=known), mode:
                loop()
        else:
            with mode, initlab.probe(model, optimizer=known):
                loop()
        heard.append(mode.names)
    assert heard[0] == heard[1] and sum(heard[0].values()) > 100


class Interrupted(nn.Module):
    """Raises in its second call, inside of a block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            h = F.relu(self.layer(x))
            if self.calls == 2:
                raise KeyboardInterrupt
            return x + h

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = self.Block(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.head(self.block(x)))
        return out


@pytest.mark.parametrize("given", [True, False])
def test_an_interrupt_that_the_loop_catches(given: bool) -> None:
    """What runs after it has no rows, a mode that was entered since stays, and the next steps are as ever."""

    def run(interrupt: bool) -> pd.DataFrame:
        torch.manual_seed(0)
        model = Interrupted()
        model.block.calls = 0 if interrupt else 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with initlab.probe(model, optimizer=optimizer if given else None) as p:
            for _ in range(4):
                optimizer.zero_grad()
                try:
                    model(X).square().mean().backward()
                    optimizer.step()
                except KeyboardInterrupt:
                    F.gelu(torch.randn(5, 6) @ model.block.layer.weight.t())
                    with Heard() as mode:
                        assert model(X).isfinite().all()
                        assert _get_current_function_mode() is mode
            assert _get_current_function_mode() is None
        return p.frame()

    rows = run(True)
    plain = run(False)
    assert not rows.duplicated(WORDS).any() and "gelu" not in set(rows["op"])
    last = [frame[frame["step"] == frame["step"].max()].drop(columns="step") for frame in (rows, plain)]
    if given:  # without optimizers a pass is a step, and the interrupted one is one
        assert rows["step"].max() == 2
        plain = plain[plain["step"] == 2]
        last[1] = plain.drop(columns="step")
    words = [word for word in WORDS if word not in ("step", "call")]
    calls = last[0]["call"].max()
    own = last[0][last[0]["call"] == calls] if given else last[0]
    assert set(own[words].itertuples(index=False, name=None)) <= set(last[1][words].itertuples(index=False, name=None))
