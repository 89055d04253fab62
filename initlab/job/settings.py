"""Where conf/ is, and its types: one dataclass for each node. Values and comments stand in conf/."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
# In a checkout conf/ stands beside the package; the wheel carries it inside.
CONF = ROOT / "conf" if (ROOT / "pyproject.toml").is_file() else PACKAGE / "conf"


@dataclass
class InitConfig:
    name: str = MISSING
    _target_: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    gain: float | None = None
    gain_kind: str | None = None
    critical: float | None = None
    mode: str | None = None
    distribution: str | None = None
    bias: float | None = None
    sigma_b: float | None = None
    attempts: int | None = None
    tolerance: float | None = None
    base_width: int | None = None


@dataclass
class ActivationConfig:
    name: str = ""
    _target_: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    name: str = MISSING
    _target_: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    root: str = ""
    download: bool = False
    url: str = ""


@dataclass
class TrainConfig:
    depth: int = MISSING
    width: int = MISSING
    batch: int = MISSING
    steps: int = MISSING
    lr: float | None = MISSING
    optimizer: str = MISSING
    optimizer_arguments: dict[str, Any] = field(default_factory=dict)
    loss: str = MISSING
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    modules: str = MISSING
    drift: bool = MISSING


@dataclass
class SweepConfig:
    init: list[str] | None = None
    gain: list[float] | None = None
    seed: list[int] | None = None
    lr: list[float] | None = None


@dataclass
class AxisConfig:
    min: float = MISSING
    max: float = MISSING
    points: int = MISSING


@dataclass
class PhaseConfig:
    plane: str = MISSING
    sw: AxisConfig = field(default_factory=AxisConfig)
    sb: AxisConfig = field(default_factory=AxisConfig)
    sigma_b: float = MISSING
    batch: int = MISSING
    correlation: float = MISSING
    weights: str = MISSING


@dataclass
class CostConfig:
    runs: int | None = None
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None


@dataclass
class FigureConfig:
    table: str = MISSING
    where: dict[str, Any] = field(default_factory=dict)
    x: str | None = None
    y: str | None = None
    by: str | None = None
    col: str | None = None
    x_scale: str = MISSING
    y_scale: str = MISSING
    theory: bool = MISSING
    whole: bool = MISSING
    expected: list[Any] = field(default_factory=list)


@dataclass
class StudyConfig:
    question: str = MISSING
    source: str = MISSING
    answer: str = MISSING
    cost: CostConfig = field(default_factory=CostConfig)
    figure: FigureConfig = field(default_factory=FigureConfig)


@dataclass
class Config:
    task: str = MISSING
    init: InitConfig = field(default_factory=InitConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    depth: int = MISSING
    width: int = MISSING
    widths: list[int] | None = None
    batch: int = MISSING
    inputs: int | None = None
    backward: bool = MISSING
    input_gradient: bool = MISSING
    seed: int = MISSING
    seeds: int = MISSING
    dtype: str = MISSING
    device: str = MISSING
    generator: str = MISSING
    matmul: str = MISSING
    threads: int = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    model: dict[str, Any] = field(default_factory=dict)
    shapes: list[list[int]] | None = None
    json: bool = MISSING
    phase: PhaseConfig = field(default_factory=PhaseConfig)
    theory: str = MISSING
    every: int = MISSING
    histograms: bool = MISSING
    statistics: dict[str, str] = field(default_factory=dict)
    plots: bool = MISSING
    report: bool = MISSING
    resume: str | None = None
    study: StudyConfig = field(default_factory=StudyConfig)
    expect: list[Any] = field(default_factory=list)
    objective: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="schema", node=Config)


def by_thousand(key: str, *, _root_: DictConfig) -> str:
    """The number at `key` as a folder in one of a thousand, 123456 -> 123/123456: for hydra.sweep.subdir.

    A launcher may ask before there is a number; then nothing is named by it yet.
    """
    number = OmegaConf.select(_root_, key)
    return "not numbered" if number is None else f"{int(number) // 1000:03d}/{number}"


OmegaConf.register_new_resolver("by_thousand", by_thousand, replace=True)
