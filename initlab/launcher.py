"""What surrounds the jobs of a sweep: its study, checked before the first job; its folder; a progress bar."""

import math
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from initlab.errors import UsageError
from initlab.study import Study, prepare


class Refused(BaseException):
    """A mistake found before the first job. Hydra makes warnings of the exceptions of a callback, but not of this."""


class Sweep(Callback):
    """Hydra's callback: remembers the sweep's folder and its study, for what comes after the last job."""

    folder: ClassVar[Path | None] = None
    study: ClassVar[Study | None] = None
    plots: ClassVar[bool] = True
    _bar: ClassVar[Any] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        swept = _overrides(config)
        try:
            _refuse_empty(swept)
            Sweep.study = study_of(config, config.hydra.job.config_name, config.hydra.overrides.task)
        except UsageError as error:
            raise Refused(str(error)) from error
        Sweep.folder, Sweep.plots = Path(config.hydra.sweep.dir).absolute(), bool(config.plots)
        if Sweep.study.about.question:
            print(Sweep.study.about.question)
        Sweep._bar = tqdm(total=_jobs(swept), desc="sweep", unit="job", disable=None)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if Sweep._bar is not None:
            Sweep._bar.update()

    @classmethod
    def close(cls) -> Path | None:
        """End the bar; the folder of the sweep, if there was one."""
        folder, cls.folder = cls.folder, None
        if cls._bar is not None:
            cls._bar.close()
            cls._bar = None
        return folder


def study_of(config: DictConfig, name: str | None, overrides: Any) -> Study:
    """The study that a composed configuration is; raises `UsageError` where its form is wrong."""
    about: Any = OmegaConf.to_object(config.study)
    expect: Any = OmegaConf.to_container(config.expect, resolve=True)
    return prepare(str(name), about, expect, [str(one) for one in overrides])


def _overrides(config: DictConfig) -> list[Override]:
    """What the command line and the study's file say of the sweep; nothing where Hydra will refuse it."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    try:
        return list(OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task]))
    except HydraException:
        return []


def _values(override: Override) -> int | None:
    """How many values a swept key takes; None where Hydra alone can tell."""
    if override.is_choice_sweep() or override.is_range_sweep():
        return len(list(override.sweep_string_iterator()))
    return None


def _refuse_empty(overrides: list[Override]) -> None:
    for override in overrides:
        if override.is_sweep_override() and _values(override) == 0:
            raise UsageError(f"{override.input_line}: has no values, the sweep is empty")


def _jobs(overrides: list[Override]) -> int | None:
    """How many jobs the overrides make; None where Hydra alone can tell."""
    counts = [_values(override) for override in overrides if override.is_sweep_override()]
    return None if None in counts else math.prod(count for count in counts if count is not None)
