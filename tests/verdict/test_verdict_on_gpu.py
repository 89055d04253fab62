"""On a GPU a verdict, an audit and an initialization say what they say on the CPU."""

import pytest
import torch

import initlab
from benchmarks.faults import FAULTS, HEALTHY, LIBRARIES

pytestmark = pytest.mark.gpu
NAMES = ("naive", "one layer x100", "bias -50", "logits x100", "nan in the backward pass", "input x1e4")


def check_alike(name: str, device: str) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} is not installed")
    torch.manual_seed(0)
    case = (FAULTS | HEALTHY)[name](10, 64)
    on_cpu = initlab.diagnose(case.model, case.x)
    model, x = case.model.to(device), case.x.to(device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = initlab.diagnose(model, x)
    assert [(one.rule, one.name, one.layer) for one in found.errors] == [
        (one.rule, one.name, one.layer) for one in on_cpu.errors
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    laws = initlab.audit(model).frame
    assert laws["law"].tolist() == initlab.audit(case.model.cpu()).frame["law"].tolist()


@pytest.mark.parametrize("name", [*NAMES, *HEALTHY])
def test_a_verdict_is_the_cpus(name: str) -> None:
    check_alike(name, "cuda")


def test_an_initialization_is_the_cpus() -> None:
    a, b = (torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)) for _ in range(2))
    initlab.init_(a, "kaiming", seed=3, quiet=True)
    initlab.init_(b.cuda(), "kaiming", seed=3, quiet=True)
    assert torch.equal(a[0].weight, b[0].weight.cpu())
