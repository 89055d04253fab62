"""How often the rows of a tensor start something on a GPU, and that nothing waits for it: on tensors without values.

Meta tensors stand in for a GPU's: whoever reads or copies one to the host gets an error, as he would wait for a GPU.
Triton's programs are counted and not run. Every operation of torch that is no view and no allocation is one launch.
"""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import rule
from initlab.nn.network import forward
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.stats.backend import Backend
from initlab.stats.kernels import triton_rows
from initlab.stats.kernels.gpu_backend import GpuBackend
from initlab.stats.keys import TensorKey
from initlab.tasks import stack as stacks
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Ensemble, Net, Networks

META = torch.device("meta")


class Launches(TorchDispatchMode):
    """Counts torch's operations on the stand-in by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        there = any(isinstance(one, Tensor) and one.is_meta for one in (*args, *(kwargs or {}).values(), out))
        if there and not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.found[name] += 1
        return out


class Programs:
    """A file of Triton's programs, which counts their launches."""

    RELU, MASK = SimpleNamespace(value=1), SimpleNamespace(value=2)

    def __init__(self, found: Counter[str]) -> None:
        self._found = found

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(__name__=name) if name.startswith("__") else _Program(name, self._found)


class _Program:
    def __init__(self, name: str, found: Counter[str]) -> None:
        self._name, self._found = name, found

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **sizes: self._found.update([self._name])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    mode = Launches()
    programs = Programs(mode.found)
    monkeypatch.setattr(triton_rows, "missing", lambda device: "")
    monkeypatch.setattr(triton_rows, "_kernels", lambda: (programs, programs))
    return mode


def made(*shape: int) -> Tensor:
    return torch.empty(*shape, device=META)


ROWS: dict[str, tuple[int, Callable[[Backend, Tensor], object]]] = {
    "row": (4, lambda backend, x: backend.rows(x)),
    "row and histogram": (5, lambda backend, x: backend.rows(x, True, backend.bins(len(x)))),
    "row without a batch": (3, lambda backend, x: backend.rows(x, False)),
    "relu": (4, lambda backend, x: backend.relu_rows_(x)),
    "mask": (4, lambda backend, x: backend.mask_rows_(x, x)),
    "update": (4, lambda backend, x: backend.update_rows_(x, x, 0.1)),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_start_few_programs_and_wait_for_nothing(case: str, launches: Launches) -> None:
    most, call = ROWS[case]
    backend, x = GpuBackend(), made(8, 200, 100)
    with launches:
        call(backend, x)
    assert launches.found.total() == most, launches.found


class Weightless(Networks):
    """Networks of 100 units on the stand-in."""

    def weights(self, layer: int, who: object = None) -> tuple[Tensor, None]:
        return made(8, 100, 100), None

    def gaussian(self, units: int, what: str) -> Tensor:
        return made(8, 200, units)


@pytest.mark.parametrize(("name", "most"), [("relu", 6), ("linear", 10), ("tanh", 22)])
def test_a_layer_of_a_stack_takes_tritons_rows(name: str, most: int, launches: Launches) -> None:
    """A product, and two rows; an activation other than ReLU also makes its slope, for the saturated share."""
    net = Net(ACTIVATIONS[name], 4, 100, 100, 200)
    nets = Weightless(net, Ensemble([rule("kaiming")], range(8)), Where(torch.float32, META))
    buffers = stacks._Buffers(nets, GpuBackend(), keep=False)
    x = stacks._Signal.from_tensor(nets.gaussian(100, "input"))
    buffers.open(torch.empty(4, 8, 15, dtype=torch.float64, device=META), 0)
    with launches:
        forward(net.network, nets.weights, x, lambda *_: None, buffers, range(1, 3))
    assert buffers.at == 4
    assert launches.found["merge"] >= 2 and launches.found.total() == 2 * most, launches.found


def test_a_step_of_the_probe_takes_tritons_rows(launches: Launches) -> None:
    """Tensors of one shape are measured together; besides, each costs a copy."""
    found = []
    for layers in (1, 30):
        buffer = ProbeBuffer([0], GpuBackend())
        launches.found.clear()
        with launches:
            for layer in range(1, layers + 1):
                key = TensorKey("probe", "module", layer, "activation", "forward")
                buffer.put(buffer.code(key), made(200, 100))
            buffer.end_step(0)
        found.append(launches.found.copy())
    assert (found[0]["merge"], found[1]["merge"]) == (1, 3), found
    assert found[1].total() <= 3 * found[0].total() + 30, found


def test_what_waits_for_a_gpu_is_an_error_here() -> None:
    waits: list[Callable[[Tensor], object]] = [
        lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait(made(2, 3))
