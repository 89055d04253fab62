"""What a verdict costs: `audit` in seconds, `diagnose` over one forward and backward pass of the same network.

`verdict.diagnose.reference` is a network whose sizes change from layer to layer, a ResNet without norms, so that 16
networks of its architecture are drawn and measured to say whether they should.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import initlab
from benchmarks.faults import resnet18
from benchmarks.race import Asked, Builds, Contestant, Outcome, Setting, row, run

WEIGHTS, WIDTH = 24, 2048  # 100.7 million parameters
CLASSES, BATCH = 1000, (8, 3, 64, 64)
ROUNDS = 5  # of some seconds each


def residual(normed: bool) -> nn.Module:
    """torchvision's ResNet-18, 11.7 million parameters; without norms it has torch's own weights."""
    torch.manual_seed(0)
    model = resnet18(64)
    model[-1] = nn.Linear(512, CLASSES)
    for module in [] if normed else list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.reset_parameters()
    return model


def one_pass(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Contestant:
    """Forward and backward, as a step has them."""

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))

    return Contestant(step)


def audited(setting: Setting) -> list[float]:
    """Seconds of `audit` of a stack of 100 million parameters, after one that warms it up."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(WEIGHTS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    spent = []
    for _ in range(1 + min(setting.rounds, ROUNDS)):
        begun = setting.clock()
        initlab.audit(model)
        spent.append(setting.clock() - begun)
    return spent[1:]


def group(setting: Setting) -> Outcome:
    """Each network beside its own pass."""
    x, y = torch.randn(BATCH, generator=torch.Generator().manual_seed(0)), torch.arange(BATCH[0])
    outcome = Outcome()
    for name, normed, rounds in (("verdict.diagnose", True, 15), ("verdict.diagnose.reference", False, ROUNDS)):
        if not setting.wanted(name, "plain"):
            continue
        model = residual(normed)
        diagnosed = partial(initlab.diagnose, model, x, y, cross_entropy)
        builds: Builds = {"pass": partial(one_pass, model, x, y), name: partial(Contestant, diagnosed)}
        asked = [Asked(name, "plain", name, "pass")]
        outcome.add(run(builds, asked, setting._replace(rounds=min(rounds, setting.rounds))))
    if setting.threads == 1 and setting.wanted("verdict.audit", "plain"):  # the clock is the processor's
        outcome.rows.append(row("verdict.audit", "plain", audited(setting), setting, "s"))
    return outcome
