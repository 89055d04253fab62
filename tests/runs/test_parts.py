"""Parts become one table in one order, whatever ran together and whenever rows were handed over."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from initlab.runs import parts
from initlab.runs.parquet import join
from initlab.runs.parts import Part, merge

TENSORS = [("weight", "forward"), ("activation", "backward"), ("bias", "forward")]


def rows_of(networks: list[int], stage: str, implementation: str, steps: range) -> pd.DataFrame:
    """As a training hands them over: step by step, tensor by tensor, the networks fastest."""
    order = TENSORS if implementation == "module" else TENSORS[::-1]
    found = [
        (stage, implementation, 100 + who, step, layer, tensor, direction, who, f"{step} {layer} {tensor} {who}")
        for step in steps
        for layer in (2, 1)
        for tensor, direction in order
        for who in networks
    ]
    names = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction", "network", "value"]
    return pd.DataFrame(found, columns=names).astype({"stage": "category", "implementation": "category"})


def emitted(rng: random.Random, networks: int, steps: int) -> list[pd.DataFrame]:
    """Networks in groups, one group after the other, each in pieces of steps."""
    found = []
    cuts = sorted(rng.sample(range(1, networks), rng.randint(0, networks - 1))) if networks > 1 else []
    for start, stop in zip([0, *cuts], [*cuts, networks], strict=True):
        ends = sorted(rng.sample(range(1, steps), rng.randint(0, min(4, steps - 1))))
        for a, b in zip([0, *ends], [*ends, steps], strict=True):
            who = list(range(start, stop))
            found.append(pd.concat([rows_of(who, "train", name, range(a, b)) for name in ("module", "scratch")]))
    return [frame.reset_index(drop=True) for frame in found]


@pytest.mark.parametrize("seed", range(12))
def test_order_does_not_hang_on_how_rows_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    networks, steps = rng.randint(1, 5), rng.randint(1, 9)
    monkeypatch.setattr(parts, "GROUP", rng.choice([1, 7, 16, 1000]))
    monkeypatch.setattr(parts, "AT_ONCE", rng.choice([1, 16, 50, 10**6]))
    (tmp_path / "parts").mkdir()
    made = [Part.make(k, "stats", frame, {"init": "naive"}) for k, frame in enumerate(emitted(rng, networks, steps))]
    for part in made:
        if rng.random() < 0.5:
            part.write(tmp_path)
            part.table = None
    found = join(list(merge(tmp_path, made))).to_pandas()
    whole = pd.concat([rows_of(list(range(networks)), "train", name, range(steps)) for name in ("module", "scratch")])
    pd.testing.assert_frame_equal(
        found.drop(columns="init").astype(str), whole.drop(columns="network").reset_index(drop=True).astype(str)
    )
    assert set(found["init"]) == {"naive"} and (np.diff(found["step"]) < 0).sum() <= 1
