"""What the public functions accept: numbers of networks or their seeds, names or torch's objects, fields of a rule."""

from typing import Any

import pandas as pd
import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.init import rule
from initlab.tasks.data import load
from initlab.tasks.ensemble.device import Where, find_device
from initlab.tasks.formats import formats
from initlab.tasks.jacobian import jacobian
from initlab.tasks.phase import phase
from initlab.tasks.seeded import seeded_stack
from initlab.tasks.stack import stack
from initlab.tasks.train import train

SMALL: dict[str, Any] = {"depth": 2, "width": 6, "batch": 5}
STEPS: dict[str, Any] = {"depth": 1, "width": 4, "batch": 5, "steps": 2}


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.mark.parametrize("seeds", [range(3), [0, 1, 2], (0, 1, 2)])
def test_seeds_are_how_many_or_which(seeds: Any) -> None:
    same(stack(**SMALL, seeds=3), stack(**SMALL, seeds=seeds))
    same(train(**STEPS, seeds=3)["losses"], train(**STEPS, seeds=seeds)["losses"])


def test_number_formats_and_devices_are_names_or_torchs_objects() -> None:
    by_name = stack(**SMALL, seeds=1, dtype="float64", device="cpu")
    same(by_name, stack(**SMALL, seeds=1, dtype=torch.float64, device=torch.device("cpu")))
    assert Where.resolve(torch.bfloat16, "cpu:0") == Where(torch.bfloat16, torch.device("cpu"))
    for wrong in ("gpu", "cuda:x", torch.device("meta"), 3):
        with pytest.raises(UsageError, match=f"device={wrong}: must be one of auto, cpu, cuda"):
            find_device(wrong)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device=cuda:0: torch sees no CUDA GPU here"):
            find_device("cuda:0")


def test_fields_of_a_rule_are_accepted_wherever_a_rule_is() -> None:
    own = rule("lecun", gain=1.5, distribution="uniform")
    fields: dict[str, Any] = {"gain": 1.5, "distribution": "uniform"}
    same(stack("lecun", **SMALL, seeds=1, **fields), stack(own, **SMALL, seeds=1))
    same(train("digits", "lecun", **STEPS, seeds=1, **fields)["stats"], train("digits", own, **STEPS, seeds=1)["stats"])
    same(seeded_stack("lecun", "tanh", **SMALL, **fields), seeded_stack(own, "tanh", **SMALL))
    for task in (jacobian, formats):
        a, b = task("lecun", **SMALL, seeds=1, **fields), task(own, **SMALL, seeds=1)  # type: ignore[operator]
        for name in a:
            same(a[name], b[name])


def test_data_may_be_named() -> None:
    same(train("digits", **STEPS, seeds=1)["stats"], train(load("digits"), **STEPS, seeds=1)["stats"])
    with pytest.raises(UsageError, match="data=digit: must be one of digits, mnist, teacher - did you mean digits"):
        train("digit")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"depth": "3"}, "depth='3': must be a whole number"),
        ({"depth": 2.5}, "depth=2.5: must be a whole number"),
        ({"width": None}, "width=None: must be a whole number"),
        ({"batch": True}, "batch=True: must be a whole number"),
        ({"seeds": "8"}, "seeds='8': must be how many networks there are, or a sequence of their seeds"),
        ({"seeds": 0}, "seeds=0: must be at least 1"),
        ({"seeds": [0, 1.5]}, "seed=1.5: must be a whole number"),
        ({"seeds": [-1]}, "seed=-1: must be at least 0"),
        ({"seed": 3}, "seed: no such parameter; of a rule there are gain, "),
        ({"seed": 3}, "did you mean seeds?"),
        ({"gian": 1.0}, "did you mean gain?"),
        ({"gain": "1"}, "gain='1': must be a number"),
        ({"init": 3}, "init=3: must be a rule's name, a Rule, or a sequence with one for each seed"),
        ({"init": [3], "seeds": 1}, "init=3: must be a rule's name or a Rule"),
        ({"dtype": "f32"}, "dtype=f32: must be one of bfloat16, float16, float32, float64"),
        ({"dtype": torch.int64}, "dtype=int64: must be one of"),
        ({"activation": 3}, "activation=3: must be a name, a row of the table or an elementwise function"),
    ],
)
def test_wrong_types_are_one_line(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as error:
        stack(**wrong)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_plane_takes_its_scales_as_axes_or_one_number() -> None:
    with pytest.raises(UsageError, match=r"phase.sigma_b=-1: must be at least 0"):
        phase("depth", sigma_b=-1.0)
    with pytest.raises(UsageError, match="seeds=0: must be at least 1"):
        phase(seeds=0)
