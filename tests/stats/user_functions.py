"""Forty functions that a user might give as an activation, each in torch and in mpmath, and their Gaussian means.

`python tests/stats/user_functions.py` writes user_functions.json beside this file: for every function and second moment
q in Q the means E[phi], E[phi^2], E[phi'^2] by `mpmath.quad` with 30 digits, and E[phi phi], E[phi' phi'] at
correlation 1/2 by nested Gauss-Legendre panels with the functions of `mpmath.fp`, which has 53 bits (closed forms for
sines and |z|^1.5). It takes about a quarter of an hour.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import torch
from torch.nn import functional

Q = (0.01, 1.0, 4.0, 100.0)
C = 0.5
TABLE = Path(__file__).with_suffix(".json")
mp: Any = mpmath.mp  # the arithmetic of phi and phi' in FUNCTIONS: this, or mpmath.fp


class UserFunction(NamedTuple):
    """phi in torch; phi and phi' in mpmath; where it bends, each place with the width of the bend (0 for a kink)."""

    torch: Callable[[torch.Tensor], torch.Tensor]
    phi: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    bends: tuple[tuple[float, float], ...] = ()


def sig(x: Any) -> Any:
    return mp.exp(min(x, 0)) / (1 + mp.exp(-abs(x)))


def sech(x: Any) -> Any:
    return 2 * mp.exp(-abs(x)) / (1 + mp.exp(-2 * abs(x)))


def softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(-abs(x))) + max(x, 0)


def steep(k: float) -> UserFunction:
    return UserFunction(
        lambda z: torch.sigmoid(k * z),
        lambda x: sig(k * x),
        lambda x: k * sig(k * x) * sig(-k * x),
        ((0, 1 / k),),
    )


def wave(k: float) -> UserFunction:
    return UserFunction(lambda z: torch.sin(k * z), lambda x: mp.sin(k * x), lambda x: k * mp.cos(k * x))


def clamp(a: float, b: float) -> UserFunction:
    return UserFunction(
        lambda z: z.clamp(a, b), lambda x: min(max(x, a), b), lambda x: int(a < x < b), ((a, 0), (b, 0))
    )


def mish_slope(x: Any) -> Any:
    t = mp.tanh(softplus(x))
    return t + x * (1 - t * t) * sig(x)


def cdf(x: Any) -> Any:
    return mp.erfc(-x / mp.sqrt(2)) / 2


FUNCTIONS: dict[str, UserFunction] = {
    "linear": UserFunction(lambda z: 2 * z, lambda x: 2 * x, lambda x: 2),
    "relu": UserFunction(lambda z: torch.relu(z), lambda x: max(x, 0), lambda x: int(x > 0), ((0, 0),)),
    "leaky 0.2": UserFunction(
        lambda z: functional.leaky_relu(z, 0.2),
        lambda x: x if x > 0 else x / 5,
        lambda x: 1 if x > 0 else mp.mpf(1) / 5,
        ((0, 0),),
    ),
    "abs": UserFunction(lambda z: z.abs(), lambda x: abs(x), lambda x: mp.sign(x), ((0, 0),)),
    "tanh": UserFunction(lambda z: torch.tanh(z), lambda x: mp.tanh(x), lambda x: sech(x) ** 2, ((0, 1),)),
    "tanh 5": UserFunction(
        lambda z: torch.tanh(5 * z), lambda x: mp.tanh(5 * x), lambda x: 5 * sech(5 * x) ** 2, ((0, 0.2),)
    ),
    "sigmoid": steep(1),
    "sigmoid 50": steep(50),
    "sigmoid 1000": steep(1000),
    "erf": UserFunction(
        lambda z: torch.erf(z), lambda x: mp.erf(x), lambda x: 2 / mp.sqrt(mp.pi) * mp.exp(-x * x), ((0, 1),)
    ),
    "atan": UserFunction(lambda z: torch.atan(z), lambda x: mp.atan(x), lambda x: 1 / (1 + x * x), ((0, 1),)),
    "softsign": UserFunction(
        lambda z: z / (1 + z.abs()),
        lambda x: x / (1 + abs(x)),
        lambda x: 1 / (1 + abs(x)) ** 2,
        ((0, 0), (0, 1)),
    ),
    "sin": wave(1),
    "sin 10": wave(10),
    "cos": UserFunction(lambda z: torch.cos(z), lambda x: mp.cos(x), lambda x: -mp.sin(x)),
    "snake": UserFunction(
        lambda z: z + torch.sin(z) ** 2,
        lambda x: x + mp.sin(x) ** 2,
        lambda x: 1 + mp.sin(2 * x),
    ),
    "gauss": UserFunction(
        lambda z: torch.exp(-z * z), lambda x: mp.exp(-x * x), lambda x: -2 * x * mp.exp(-x * x), ((0, 1),)
    ),
    "sech": UserFunction(
        lambda z: 1 / torch.cosh(z.clamp(-700, 700)),
        lambda x: sech(x),
        lambda x: -sech(x) * mp.tanh(x),
        ((0, 1),),
    ),
    "square": UserFunction(lambda z: z * z, lambda x: x * x, lambda x: 2 * x),
    "cube": UserFunction(lambda z: z**3, lambda x: x**3, lambda x: 3 * x * x),
    "relu squared": UserFunction(
        lambda z: torch.relu(z) ** 2, lambda x: max(x, 0) ** 2, lambda x: 2 * max(x, 0), ((0, 0),)
    ),
    "gelu": UserFunction(
        lambda z: functional.gelu(z), lambda x: x * cdf(x), lambda x: cdf(x) + x * mp.npdf(x), ((0, 1),)
    ),
    "silu": UserFunction(
        lambda z: functional.silu(z), lambda x: x * sig(x), lambda x: sig(x) * (1 + x * sig(-x)), ((0, 1),)
    ),
    "swish 3": UserFunction(
        lambda z: z * torch.sigmoid(3 * z),
        lambda x: x * sig(3 * x),
        lambda x: sig(3 * x) * (1 + 3 * x * sig(-3 * x)),
        ((0, 0.4),),
    ),
    "mish": UserFunction(
        lambda z: functional.mish(z),
        lambda x: x * mp.tanh(softplus(x)),
        mish_slope,
        ((0, 1),),
    ),
    "softplus": UserFunction(lambda z: functional.softplus(z, threshold=40), softplus, sig, ((0, 1),)),
    "log sigmoid": UserFunction(
        lambda z: functional.logsigmoid(z), lambda x: -softplus(-x), lambda x: sig(-x), ((0, 1),)
    ),
    "elu": UserFunction(
        lambda z: functional.elu(z),
        lambda x: x if x > 0 else mp.expm1(x),
        lambda x: 1 if x > 0 else mp.exp(x),
        ((0, 0), (0, 1)),
    ),
    "celu 0.5": UserFunction(
        lambda z: functional.celu(z, 0.5),
        lambda x: x if x > 0 else mp.expm1(2 * x) / 2,
        lambda x: 1 if x > 0 else mp.exp(2 * x),
        ((0, 0), (0, 0.5)),
    ),
    "hard tanh": clamp(-1, 1),
    "relu6": clamp(0, 6),
    "clamp 20": clamp(-20, 20),
    "kink at 20": UserFunction(
        lambda z: z + torch.relu(z - 20), lambda x: x + max(x - 20, 0), lambda x: 1 + int(x > 20), ((20, 0),)
    ),
    "hard swish": UserFunction(
        lambda z: functional.hardswish(z),
        lambda x: 0 if x < -3 else x if x > 3 else x * (x + 3) / 6,
        lambda x: 0 if x < -3 else 1 if x > 3 else x / 3 + mp.mpf(1) / 2,
        ((-3, 0), (3, 0)),
    ),
    "soft shrink": UserFunction(
        lambda z: functional.softshrink(z),
        lambda x: mp.sign(x) * max(abs(x) - 0.5, 0),
        lambda x: int(abs(x) > 0.5),
        ((-0.5, 0), (0.5, 0)),
    ),
    "tanh shrink": UserFunction(
        lambda z: z - torch.tanh(z), lambda x: x - mp.tanh(x), lambda x: mp.tanh(x) ** 2, ((0, 1),)
    ),
    "shifted relu": UserFunction(
        lambda z: torch.relu(z - 0.3), lambda x: max(x - mp.mpf(0.3), 0), lambda x: int(x > 0.3), ((0.3, 0),)
    ),
    "log": UserFunction(
        lambda z: z.sign() * torch.log1p(z.abs()),
        lambda x: mp.sign(x) * mp.log1p(abs(x)),
        lambda x: 1 / (1 + abs(x)),
        ((0, 0), (0, 1)),
    ),
    "exp": UserFunction(lambda z: torch.exp(z), lambda x: mp.exp(x), lambda x: mp.exp(x)),
    "power 1.5": UserFunction(
        lambda z: z.abs() ** 1.5,
        lambda x: abs(x) ** 1.5,
        lambda x: 1.5 * mp.sign(x) * mp.sqrt(abs(x)),
        ((0, 0), (0, 1e-6)),
    ),
}


def line_mean(f: Callable[[Any], Any], q: float, bends: tuple[tuple[float, float], ...], power: int = 1) -> float:
    """E[f(sqrt(q) u)^power] with 30 digits."""
    with mpmath.workdps(30):
        root = mp.sqrt(mp.mpf(q))
        edges = {mp.mpf(k) for k in range(-14, 15)} | {mp.mpf(k) for k in range(15, 36)}
        for place, width in bends:
            edges |= {(place + s * k * mp.mpf(width)) / root for s in (-1, 1) for k in (0, 1, 2, 4, 8, 16, 32, 64, 128)}
        edges |= {mp.mpf(s) * mp.mpf(2) ** -k for s in (-1, 1) for k in range(1, 8)}
        edges = sorted(e for e in edges if abs(e) <= 36)
        return float(mp.quad(lambda u: f(root * u) ** power * mp.npdf(u), edges))


@lru_cache
def legendre() -> tuple[list[float], list[float]]:
    nodes, weights = zip(*mpmath.calculus.quadrature.GaussLegendre(mpmath.mp).calc_nodes(3, 70), strict=True)
    return [float(x) for x in nodes], [float(w) for w in weights]


def nodes_between(edges: list[float]) -> list[tuple[float, float]]:
    """Nodes and weights, normal density included."""
    found = []
    for low, high in pairwise(edges):
        half, middle = (high - low) / 2, (high + low) / 2
        for x, w in zip(*legendre(), strict=True):
            u = middle + half * x
            found.append((u, half * w * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)))
    return found


def plane_mean(f: Callable[[Any], Any], q: float, bends: tuple[tuple[float, float], ...]) -> float:
    """E[f(z1) f(z2)] at correlation C, with about 13 digits."""
    global mp
    legendre()
    mp = mpmath.fp
    try:
        root, rest = math.sqrt(q), math.sqrt(1 - C * C)
        bent = {p + s * k * w for p, w in bends or ((0, 1),) for s in (-1, 1) for k in (0, 1, 2, 4, 8, 16, 64, 256)}
        reach = 9 + 2 * int(root) * (f(5.0) > 100)
        regular = [float(k) for k in range(-reach, reach + 1, 2)]

        def edges(moved: float, scale: float) -> list[float]:
            return sorted({*regular, *(e for e in ((p - moved) / scale for p in bent) if abs(e) < reach)})

        total = []
        for u, weight in nodes_between(edges(0, root)):
            shift = C * root * u
            if at := weight * f(root * u):
                inner = nodes_between(edges(shift, rest * root))
                total.append(at * math.fsum(w * f(shift + rest * root * v) for v, w in inner))
        return math.fsum(total)
    finally:
        mp = mpmath.mp


def closed_pair(name: str, q: float) -> tuple[float, float] | None:
    """E[phi phi] and E[phi' phi'] at correlation C, of sines exp(-k^2 q) sinh or cosh k^2 q C, of |z|^1.5 by 2F1."""
    with mpmath.workdps(40):
        if name == "power 1.5":
            a, r = mp.mpf(3) / 2, mp.mpf(C)
            even = 2**a * mp.gamma((a + 1) / 2) ** 2 / mp.pi * mp.hyp2f1(-a / 2, -a / 2, 0.5, r * r)
            b = a - 1
            odd = 2 ** (b + 1) * mp.gamma(b / 2 + 1) ** 2 / mp.pi * r * mp.hyp2f1((1 - b) / 2, (1 - b) / 2, 1.5, r * r)
            return float(even * mp.mpf(q) ** a), float(odd * a * a * mp.mpf(q) ** b)
        k = {"sin": 1, "sin 10": 10, "cos": 1}.get(name)
        if k is None:
            return None
        x = mp.mpf(k) ** 2 * mp.mpf(q)
        odd, even = (float(mp.exp(-x) * f(x * mp.mpf(C))) for f in (mp.sinh, mp.cosh))
    return (even, odd * k * k) if name == "cos" else (odd, even * k * k)


def main(names: list[str]) -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for q in (1.0, 100.0, 4.0, 0.01):
        for name in names or FUNCTIONS:
            one = FUNCTIONS[name]
            row = table.setdefault(name, {}).setdefault(str(q), {})
            if "slope" not in row:
                row["mean"] = line_mean(one.phi, q, one.bends)
                row["square"], row["slope"] = (line_mean(f, q, one.bends, 2) for f in (one.phi, one.slope))
            if "overlap" not in row:
                row["overlap"], row["slope_overlap"] = closed_pair(name, q) or (
                    plane_mean(f, q, one.bends) for f in (one.phi, one.slope)
                )
            rows = (
                f' "{name}": {{\n  ' + ",\n  ".join(f'"{q}": {json.dumps(one)}' for q, one in of.items())
                for name, of in table.items()
            )
            TABLE.write_text("{\n" + "\n },\n".join(rows) + "\n }\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
