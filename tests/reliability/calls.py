"""Odd and wrong arguments for everything that the library offers, over all parameters, found by introspection.

A value that means something (`np.int64(2)`, a tensor of one number) must give what it means; anything else must end in
one line, before any product of matrices is computed, and torch's, numpy's and Python's random numbers stay where they
were.
"""

import inspect
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cache
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import initlab
from initlab.nn.init import FIELDS
from initlab.theory.request import Request, parse_request
from tests.reliability.attack import Case

LARGE = 600
LONGEST = 320  # characters of a line
PRODUCTS = ("mm", "bmm", "addmm", "matmul", "baddbmm", "addmv", "mv", "dot")


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


class Angry:
    """An object that raises at whatever it is asked."""

    def __repr__(self) -> str:
        raise KeyError("no text")

    def __bool__(self) -> bool:
        raise AssertionError("neither")

    def __eq__(self, other: object) -> bool:
        raise AttributeError("not comparable")

    __hash__ = None  # type: ignore[assignment]


class Unhashable:
    """An elementwise function that no dictionary takes."""

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(z)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


TEXTS = ["", "3", "37", "no", "true", "False", "None", "nan", "relu", "tanh", "kaiming", "naive", "float64", "cpu"]
TEXTS += ["sgd", "adam", "mse", "*", "0", "a\nb", "\x1b[31mred", "x" * 5000, "\0", "..", "chi", "closed", "fan_out"]


def fail(*given: object) -> None:
    raise KeyError("a function\nthat fails")


def odd_value(rng: random.Random) -> Any:
    """Anything that a parameter may be given; what it says of itself is `repr`."""
    whole = rng.choice([-(2**63), -1, 0, 1, 2, 3, 10**13, 2**63 - 1, 2**63, 2**64, 10**30, 10**5000])
    number = rng.choice([-0.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, -1.5, 1e-320, 1e300, -1e300, math.nan, math.inf])
    text = rng.choice(TEXTS)
    some = [rng.choice([0, 1, 2, 3, -1, 0.5, True, None, "a", math.nan]) for _ in range(rng.randint(0, 4))]
    kinds: list[Callable[[], Any]] = [
        lambda: whole,
        lambda: number,
        lambda: text,
        lambda: some,
        lambda: rng.choice([None, True, False]),
        lambda: rng.choice([np.int8, np.int64, np.float32, np.float64, np.bool_, np.complex128])(rng.randint(0, 3)),
        lambda: rng.choice([np.array, torch.tensor])(rng.choice([whole % 4, number, bool(whole % 2), 1j])),
        lambda: rng.choice([np.array, torch.tensor])([whole % 4, *range(rng.randint(0, 2))]),
        lambda: rng.choice([np.array(text), np.datetime64("2020"), np.array(some, dtype=object)]),
        lambda: rng.choice([torch.empty(0), torch.eye(2), torch.ones((), device="meta"), torch.tensor(2).half()]),
        lambda: rng.choice([tuple, set, frozenset, iter])(value for value in some),
        lambda: rng.choice([range(3), range(0), range(5, 2), range(2**40), {}, {"a": 1}, {1: 2}, b"3", bytearray(2)]),
        lambda: rng.choice([Decimal(2), Fraction(2), Fraction(1, 2), 1j, Path("nowhere"), Path.cwd(), np.nan, ...]),
        lambda: rng.choice([Angry(), object(), int, ValueError("x"), Angry, [Angry()], {"a": Angry()}, [[1], [2]]]),
        lambda: rng.choice([fail, torch.relu, math.sin, print, Unhashable(), nn.ReLU(), nn.ReLU]),
        lambda: rng.choice([{"a": fail}, {"a": print}, {"a": torch.Tensor.sum}, {"a b": abs}, {"mean": abs}]),
        lambda: rng.choice([torch.float16, torch.int64, torch.device("cpu"), torch.device("meta"), initlab.Rule()]),
        lambda: rng.choice([nn.Linear(2, 2), nn.functional.cross_entropy, pd.Series([0, 1]), pd.DataFrame(), pd.NA]),
    ]
    return rng.choice(kinds)()


def describe(value: Any) -> str:
    try:
        return f"{type(value).__name__} {value!r}"[:80]
    except (KeyError, ValueError):
        return type(value).__name__


def small_net() -> nn.Module:
    """Two layers whose weights are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def watched(model: Any, **options: Any) -> Any:
    """The frame of a probe over two steps of a training loop."""
    if isinstance(model, nn.Module):
        options.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = options.get("optimizer")
    with initlab.probe(model, **options) as p:
        for _ in range(2):
            model(torch.ones(5, 3)).square().sum().backward()
            if optimizer is not None:
                optimizer.step()
    return p.frame()


SMALL = {"depth": 2, "width": 3, "batch": 4}
# What each function is given beside the odd argument; a model is made anew for every call.
BASES: dict[str, Callable[[], dict[str, Any]]] = {
    "measure": lambda: {"model": small_net(), "x": torch.ones(5, 3), "y": torch.zeros(5, 2), "loss": nn.MSELoss()},
    "probe": lambda: {"model": small_net()},
    "stack": lambda: SMALL | {"seeds": 2},
    "train": lambda: SMALL | {"seeds": 2, "steps": 2},
    "predict": lambda: dict(SMALL),
    "gain": lambda: {"activation": "tanh"},
    "phase": lambda: {"activation": "tanh", "sigma_w": 1.5, "sigma_b": 0.1},
    "critical": lambda: {"activation": "tanh", "sigma_b": 0.1},
    "limits": lambda: SMALL | {"formats": ["float16"]},
    "read": dict,
    "compare": lambda: {"a": "nowhere", "b": "nowhere"},
    "compare_gradients": lambda: {"yours": {"w": torch.ones(3, 2)}, "reference": {"w": torch.ones(3, 2)}, "batch": 3},
    "Rule": dict,
}
# Names that no annotation tells apart: those that only a pass through the model can judge.
JUDGED_BY_A_PASS = ("model", "x", "y", "loss", "statistics", "optimizer", "emit", "activation")


@cache
def parameters(name: str) -> dict[str, Any]:
    """Every parameter of a function with its annotation, those behind `**` too."""
    found = {}
    for one in inspect.signature(getattr(initlab, name)).parameters.values():
        if one.kind is not inspect.Parameter.VAR_KEYWORD:
            found[one.name] = one.annotation
            continue
        found |= {field: initlab.Rule.__annotations__[field] | None for field in FIELDS}  # None keeps the rule's own
        if name in ("predict", "limits"):
            more = inspect.signature(parse_request).parameters.values()
            found |= {p.name: p.annotation for p in more if p.kind is not inspect.Parameter.VAR_KEYWORD}
            found |= {field: Request.__annotations__[field] for field in ("q0", "c0", "fixed_input", "data")}
    return found


WRONG = object()


def meaning(value: Any, annotation: Any) -> Any:
    """What a value means for a parameter that takes a number or a truth value, or WRONG; of others nothing is said."""
    kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
    if not kinds <= {int, float, bool, type(None)}:
        return value
    if value is None:
        return None if type(None) in kinds else WRONG
    if isinstance(value, np.ndarray | np.generic | torch.Tensor) and value.shape == () and str(value.device) != "meta":
        value = value.item()
    if bool in kinds:
        return value if isinstance(value, bool) else WRONG
    if isinstance(value, bool) or not isinstance(value, Real) or not -math.inf < value < math.inf:
        return WRONG
    if float in kinds:
        return float(value) if abs(value) < 1e308 else WRONG
    return int(value) if value == int(value) else WRONG


def random_states() -> bytes:
    return pickle.dumps((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))  # noqa: NPY002


def call(name: str, given: Mapping[str, Any]) -> tuple[Any, str]:
    """What came of a call, as bytes that can be compared, and what was wrong with how it ended."""
    function = watched if name == "probe" else getattr(initlab, name)
    before, result = random_states(), None
    with warnings.catch_warnings(), Products() as products:
        warnings.simplefilter("ignore")
        try:
            result, wrong = as_comparable(function(**given)), ""
        except initlab.UsageError as error:
            line = str(error)
            result, wrong = UsageErrorSeen, ""
            if not line.isprintable() or len(line) > LONGEST:
                wrong = f"no line: {line[:LONGEST]!r}"
        except Exception as error:
            result, wrong = error, f"{type(error).__name__}: {str(error)[:200]}"
    if result is UsageErrorSeen and products.count and not wrong:
        wrong = f"refused after {products.count} products of matrices: {line}"
    if random_states() != before and not wrong:
        wrong = "random numbers were taken from the global stream"
    return result, wrong


class UsageErrorSeen:
    """Stands for a refusal."""


def as_comparable(result: Any) -> Any:
    if isinstance(result, dict):
        return {key: as_comparable(value) for key, value in result.items()}
    if isinstance(result, pd.DataFrame):
        return result.to_csv()
    return repr(result)


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        rng = random.Random(f"calls {seed} {number}")
        name = rng.choice(sorted(BASES))
        among = parameters(name)
        some = rng.sample(sorted(among), k=min(len(among), rng.choice([1, 1, 1, 2])))
        odd = {one: odd_value(rng) for one in some}
        if rng.random() < 0.02 and name != "Rule":  # a class, whose mistakes of this kind are Python's
            odd["no_such_parameter"] = 1
        what = f"{name}({', '.join(f'{one}={describe(value)}' for one, value in odd.items())}) of case {number}"
        meant = {one: meaning(value, among.get(one)) for one, value in odd.items()}
        result, wrong = call(name, BASES[name]() | odd)
        if set(odd) & set(JUDGED_BY_A_PASS) and wrong.startswith("refused after"):
            wrong = ""
        if callable(odd.get("emit")) and isinstance(result, Exception):  # the user's own, to be seen as it is
            wrong = ""
        means_nothing = any(value is WRONG for value in meant.values())
        if means_nothing and result is not UsageErrorSeen and not wrong:
            wrong = "accepted, though it means nothing"
        elif not wrong and any(meant[one] is not odd[one] for one in odd) and not means_nothing:
            expected, _ = call(name, BASES[name]() | meant)
            if expected != result:
                wrong = "gives something else than what it means"
        yield Case(what, wrong)
