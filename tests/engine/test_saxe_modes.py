"""The course of each mode of a deep linear net in the training by hand: Saxe et al. 2013, section 1, equations 5 and 6.

Two layers learn y = x V S U^T under half the squared error, from weights that are aligned with U and V. Every mode goes
its own way, du/dt = 2 u (s - u): u(t) = s e^(2 s t) / (e^(2 s t) - 1 + s / u_0), t the steps times their length.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from initlab.engine.fast_network import Engine

S, U_0 = torch.tensor([3.0, 1.5, 0.7], dtype=torch.float64), 0.01
TIMES = (0.5, 1.0, 2.0, 4.0)


def frame(n: int, k: int, seed: int) -> Tensor:
    """k orthonormal columns, (n, k)."""
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found: Tensor = torch.linalg.qr(drawn)[0][:, :k]
    return found


def follow(length: float, aligned: bool = True) -> np.ndarray:
    """The modes V^T W_1 W_2 U at TIMES, (4, 3, 3), in steps of this length."""
    v, r, u = frame(6, 3, 1), frame(5, 3, 2), frame(4, 3, 3)
    first, second = v @ r.T * U_0**0.5, (r if aligned else frame(5, 3, 4)) @ u.T * U_0**0.5
    x = torch.cat([torch.eye(6), -torch.eye(6)]).double() / 2**0.5  # X^T X = 1, and no bias has a gradient
    y = x @ v @ S.diag() @ u.T
    zeros = [torch.zeros(1, n, dtype=torch.float64) for n in (5, 4)]
    engine = Engine(
        [(first[None], zeros[0]), (second[None], zeros[1])],
        "linear",
        lambda out, _: (out - y).square().sum() / 2,
        length,
    )
    found, steps = [], 0
    for time in TIMES:
        while steps < round(time / length):
            engine.step(x[None], torch.arange(12)[None])
            steps += 1
        (w_1, _), (w_2, b) = engine.parameters
        assert float(b.abs().max()) < 1e-12
        found.append((v.T @ w_1[0] @ w_2[0] @ u).numpy())
    return np.stack(found)


def predicted() -> np.ndarray:
    s, grown = S.numpy(), np.exp(2 * S.numpy() * np.array(TIMES)[:, None])
    return np.asarray(s * grown / (grown - 1 + s / U_0))


def test_every_mode_follows_its_own_curve() -> None:
    """A step's length off, as Euler's method is: half of it at half the length."""
    off = []
    for length in (0.004, 0.002):
        modes = follow(length)
        own = modes.diagonal(axis1=1, axis2=2)
        assert np.abs(modes - own[:, :, None] * np.eye(3)).max() < 1e-12  # none has anything of another
        off.append(np.abs(own - predicted()).max())
    assert off[0] < 0.03 * float(S[0]) and off[0] / off[1] == pytest.approx(2, rel=0.1)
    steepest = predicted()[TIMES.index(1.0)]
    assert steepest[0] > 0.5 * float(S[0]) and steepest[2] < 0.1 * float(S[2])  # strong modes first, as a sigmoid each


def test_weights_that_are_not_aligned_leave_it() -> None:
    """The law hangs on decoupled initial conditions."""
    own = follow(0.004, aligned=False).diagonal(axis1=1, axis2=2)
    assert np.abs(own - predicted()).max() > 0.1 * float(S[0])
