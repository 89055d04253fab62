"""Where conf/ is found, a composed configuration as plain values, and a mistake in an option said in one line.

Below the roof there is no Hydra: tasks get plain values.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra.utils
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from initlab.errors import UsageError, nearest, not_one_of
from initlab.job.settings import ActivationConfig, Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# In a checkout conf/ stands beside the package; the wheel carries it inside.
CONF = ROOT / "conf" if (ROOT / "pyproject.toml").is_file() else HERE / "conf"


def by_thousand(key: str, *, _root_: DictConfig) -> str:
    """The number at `key` as a folder in one of a thousand, 123456 -> 123/123456: for hydra.sweep.subdir.

    A launcher may ask before there is a number; then nothing is named by it yet.
    """
    number = OmegaConf.select(_root_, key)
    return "not numbered" if number is None else f"{int(number) // 1000:03d}/{number}"


OmegaConf.register_new_resolver("by_thousand", by_thousand, replace=True)


def typed(cfg: DictConfig) -> Config:
    """The composed configuration as plain dataclasses; keys that slipped past Hydra with a `+` are refused."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise as_usage_error(error) from error


def instantiated(given: Mapping[str, Any]) -> Any:
    """The object that `_target_` and its arguments describe; None for nothing."""
    if not given:
        return None
    if "_target_" not in given:
        raise UsageError("graph.model: no _target_; it names a class, as in graph.model._target_=torch.nn.Linear")
    try:
        return hydra.utils.instantiate(dict(given))
    except Exception as error:  # whatever the class itself raises is about the arguments that it was given
        reason = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"graph.model: {given['_target_']} cannot be built ({reason})") from error


def function_of(given: ActivationConfig) -> Callable[[Any], Any] | None:
    """The elementwise function that `_target_` names: a function, with `arguments` if any, or a class made with them.

    None where no `_target_` is given. The folder that the program was started in is searched for it too.
    """
    if not given._target_:
        return None
    if str(Path.cwd()) not in sys.path:  # the console script starts with its own folder in the path
        sys.path.append(str(Path.cwd()))
    place, _, name = given._target_.rpartition(".")
    try:
        module = import_module(place)
        found = getattr(module, name)
        made: Callable[[Any], Any] = found(**given.arguments) if isinstance(found, type) else found
    except Exception as error:  # a module of the user's may raise anything
        reason = " ".join(str(error).split())
        near = nearest(name, dir(module)) if isinstance(error, AttributeError) else ""
        raise UsageError(f"activation._target_={given._target_}: cannot be had ({reason}){near}") from error
    return partial(made, **given.arguments) if given.arguments and made is found else made


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a configuration; what holds nothing has itself as its value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def option_names(of: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every option as it is typed on the command line: groups, and the values inside them."""
    for f in fields(of):
        yield prefix + f.name
        if is_dataclass(f.type):
            yield from option_names(f.type, prefix + f.name + ".")


# Launcher -> the extra that brings it.
EXTRAS = {"joblib": "parallel", "submitit_local": "parallel", "submitit_slurm": "parallel", "ray": "ray"}


def as_usage_error(error: Exception) -> UsageError:
    """One line for what Hydra or OmegaConf say in several."""
    if isinstance(error, OverrideParseException):
        return UsageError(f"{error.override}: not an option; options are key=value, see --help")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and name in EXTRAS:
            return UsageError(f"{group}={name}: is not installed; pip install 'initlab[{EXTRAS[name]}]'")
        if error.options:
            known = [*error.options, *(EXTRAS if group == "hydra/launcher" else ())]
            return not_one_of(group or "--config-name", name, known)
        return UsageError(f"{error.missing_cfg_file}: no such file below the folders of configurations")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    key = getattr(cause, "full_key", None)
    said = str(getattr(cause, "msg", None) or error).splitlines()[0].rstrip(".")
    if key and re.match(r"Key '.*' (is )?not in", said):
        return UsageError(f"{key}: no such option{nearest(key, option_names())}; see --help")
    if key and (given := re.match(r"Value '(.*?)'( of|$| could| is)", said)):
        wanted = next((words for kind, words in _WANTED.items() if kind in said), f"is not allowed ({said})")
        return UsageError(f"{key}={given[1]}: {wanted}")
    if key:
        return UsageError(f"{key}: {said[0].lower()}{said[1:]}")
    if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return UsageError(f"{several[1]}: several values need a sweep; put -m before the options")
    return UsageError(" ".join(str(error).split()))


_WANTED = {
    "Integer": "must be an integer",
    "Float": "must be a number",
    "valid bool": "must be true or false",
}


def _refuse_flags(message: str) -> NoReturn:
    raise UsageError(f"{message}; see --help")


GROUPS = ("init", "activation", "data")  # folders of conf/: one file of each is chosen


def accepted(words: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it.

    `--depth=50` is a habit from elsewhere: say how it is written here, and put every other fault of a flag in one line
    too. The arguments of `graph.model` and of an activation are their own, not the schema's: they may be added without
    a `+`.
    """
    for word in words:
        bare = word.lstrip("-")
        if word.startswith("-") and bare.split("=")[0] in set(option_names()):
            raise UsageError(f"{word}: options have no dashes, write {bare if '=' in bare else bare + '=VALUE'}")
        name, _, value = word.partition("=")
        if name in GROUPS and value.startswith("["):  # Hydra would lay one over the other, and run the last
            values = value.strip("[] ")
            raise UsageError(f"{word}: one at a time; for several write -m {name}={values or 'A,B'}")
    parser = get_args_parser()
    parser.error = _refuse_flags  # type: ignore[method-assign]
    parser.parse_args(list(words))
    free = ("graph.model.", "graph.model=", "activation.arguments.")
    return [f"++{word}" if word.startswith(free) else word for word in words]


HYDRA_MISTAKES = (HydraException, OmegaConfBaseException)

# Column of the tables -> option; a name of the trained network that the stack has too gets the prefix `train_`.
COLUMNS = {
    "task": "task",
    "init": "init.name",
    "gain_kind": "init.gain_kind",
    "mode": "init.mode",
    "distribution": "init.distribution",
    "bias": "init.bias",
    "attempts": "init.attempts",
    "tolerance": "init.tolerance",
    "base_width": "init.base_width",
    "activation": "activation.name",
    "depth": "depth",
    "width": "width",
    "inputs": "inputs",
    "batch": "batch",
    "dtype": "dtype",
    "generator": "generator",
    "matmul": "matmul",
    "data": "data.name",
    "train_depth": "train.depth",
    "train_width": "train.width",
    "train_batch": "train.batch",
    "steps": "train.steps",
    "lr": "train.lr",
    "optimizer": "train.optimizer",
    "train_loss": "train.loss",
    "modules": "train.modules",
    "every": "every",
}


def columns(config: Config) -> dict[str, Any]:
    """The configuration as columns of every table, so that a shard explains itself."""
    found = {}
    for name, option in COLUMNS.items():
        value: Any = config
        for part in option.split("."):
            value = getattr(value, part)
        found[name] = value
    return found | {"inputs": config.width if config.inputs is None else config.inputs}


def seeds(config: Config) -> Sequence[int]:
    """Those of all networks of a job, or of one point of its grid."""
    return range(config.seed, config.seed + config.seeds) if config.sweep.seed is None else config.sweep.seed
