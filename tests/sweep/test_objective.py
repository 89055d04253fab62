"""A job's objective, and Optuna as the sweeper that seeks its best value."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from initlab.errors import UsageError
from initlab.runs.read import read
from initlab.studies.expect import measure_objective
from initlab.studies.expectation import parse_objective
from tests.long import long_except

Lab = Callable[..., tuple[int, str, str]]
SMALL = ("task=stack", "depth=3", "width=12", "seeds=2", "plots=false", "theory=off")
OBJECTIVE = (
    "objective.where={layer:3,tensor:activation,direction:forward}",
    "objective.statistic=std",
    "objective.reduce=mean",
)
optuna = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs hydra-optuna-sweeper"
)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"statistic": "std", "reduce": "mean"}, 2.0),
        ({"statistic": "std", "reduce": "max", "where": {"layer": 1}}, 1.0),
        ({"statistic": "ln std", "reduce": "slope", "over": "layer"}, 0.549306),  # ln 3 over two layers
        ({"statistic": "std", "reduce": "share", "when": {"min": 2}}, 0.5),
    ],
)
def test_an_objective_is_an_expectation_that_expects_nothing(given: dict[str, Any], value: float) -> None:
    frame = pd.DataFrame({"seed": [0, 0], "layer": [1, 3], "std": [1.0, 3.0]})
    one = parse_objective(given)
    assert one is not None
    assert measure_objective(one, {"stats": frame}).number == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"statistic": "std"}, "objective: has no `reduce`"),
        ({"statistic": "std", "reduce": "most"}, "objective: reduce=most: must be one of"),
        ({"statistic": "std", "reduce": "mean", "is": "below"}, "leave `is` out"),
        ({"statistic": "std", "reduce": "mean", "value": 3}, "leave `value` out"),
        ({"statistic": "std", "reduce": "mean", "were": 3}, "objective: were: no such field - did you mean where?"),
    ],
)
def test_a_wrong_objective_is_one_line(given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse_objective(given)
    assert parse_objective({}) is None


def test_an_objective_is_measured_and_said(lab: Lab) -> None:
    code, out, errors = lab(*SMALL, *OBJECTIVE, "hydra.run.dir=run")
    assert (code, errors) == (0, "")
    rows = read("run").query("layer == 3 and tensor == 'activation' and direction == 'forward'")
    assert f"objective: {rows['std'].mean():.3g} +-" in out
    code, _, errors = lab(*SMALL, *OBJECTIVE[1:], "objective.where={layer:9}")
    assert code == 2 and "objective: selects no rows: layer=9" in errors and errors.count("\n") == 1
    assert len(read("outputs/**")) > 0  # what was measured is not lost
    code, out, errors = lab(*SMALL, "objective.statistic=stdd", "objective.reduce=mean")
    assert (code, out) == (2, "") and "did you mean std?" in errors


@optuna
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("launcher", long_except(["basic", "batched"], "batched"))
def test_optuna_seeks_the_best_value(lab: Lab, tmp_path: Path, launcher: str) -> None:
    """Two trials: the better one is the one whose rows are smaller, by the tables."""
    code, out, errors = lab(
        "-m", "hydra/sweeper=optuna", f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2", "init.gain=interval(0.5,2)", "hydra.sweep.dir=sweep", *SMALL, *OBJECTIVE,
    )  # fmt: skip
    assert code == 0, errors
    found = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text(encoding="utf-8"))
    rows = read("sweep/**").query("layer == 3 and tensor == 'activation' and direction == 'forward'")
    by_gain = rows.groupby("gain")["std"].mean()
    assert len(by_gain) == 2
    assert found["best_value"] == pytest.approx(by_gain.min(), rel=1e-6)
    assert found["best_params"]["init.gain"] == pytest.approx(by_gain.idxmin(), rel=1e-6)
    assert "tables: sweep/*/*.parquet" in out


@optuna
@pytest.mark.filterwarnings("ignore")
def test_optuna_without_an_objective_is_one_line(lab: Lab) -> None:
    words = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "init.gain=interval(0.5,2)", *SMALL)
    code, _, errors = lab(*words)
    assert code == 2 and "hydra/sweeper=optuna: needs an objective, such as" in errors and errors.count("\n") == 1
    code, _, errors = lab(*words, "hydra.sweeper.n_jobs=1", *OBJECTIVE[1:], "objective.where={layer:9}")
    assert code == 2 and "Traceback" not in errors
    assert "objective: selects no rows: layer=9" in errors and "no trial gave an objective" in errors
