"""From the composed configuration to plain values, and a mistake in an option as one line."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin

import hydra.utils
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from initlab import files
from initlab.errors import UsageError, nearest, not_one_of, show
from initlab.job.settings import CONF, Config
from initlab.runs.schema import OPTION_OF

HYDRA_MISTAKES = (HydraException, OmegaConfBaseException)


def read_config(cfg: DictConfig) -> Config:
    """The composed configuration as plain dataclasses; keys that slipped past Hydra with a `+` are refused."""
    try:
        made: Any = OmegaConf.to_object(cfg)
        if not (isinstance(made, Config) and _has_declared_fields(made)):
            plain = OmegaConf.to_container(cfg, resolve=True)
            made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise as_usage_error(error) from error
    _check_lists(made)
    return made  # type: ignore[no-any-return]


def _check_lists(node: Any, prefix: str = "") -> None:
    """Lists in lists pass OmegaConf's types."""
    for f in fields(node):
        value, kind = getattr(node, f.name), str(f.type)
        if is_dataclass(value):
            _check_lists(value, f"{prefix}{f.name}.")
        elif value is not None and "list[" in kind and "Any" not in kind:
            inner = str if "[str]" in kind else int if "[int]" in kind else (int, float)
            form: files.Form = [[inner]] if "list[list[" in kind else [inner]
            if files.find_misfit(value, form) is not None:
                word = "words" if inner is str else "whole numbers" if inner is int else "numbers"
                what = f"lists of {word}, as in [[8,4]]" if form == [[inner]] else word
                raise UsageError(f"{prefix}{f.name}={show(value)}: must be a list of {what}")


def _has_declared_fields(node: Any) -> bool:
    """Whether a dataclass, and every one inside it, has its declared fields and no others."""
    values = vars(node)
    inner = [value for value in values.values() if is_dataclass(value)]
    return len(values) == len(fields(node)) and all(map(_has_declared_fields, inner))


def instantiate(given: Mapping[str, Any]) -> Any:
    """The object that `_target_` and its arguments describe; None for nothing."""
    if not given:
        return None
    if "_target_" not in given:
        raise UsageError("model: no _target_; it names a class, as in model._target_=torch.nn.Linear")
    try:
        return hydra.utils.instantiate(dict(given))
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever the class itself raises is about the arguments that it was given
        reason = str(error.__cause__ or error)
        raise UsageError(f"model: {given['_target_']} cannot be built ({reason})") from error


def statistics_of(config: Config) -> dict[str, Callable[[Any], Any]]:
    """The functions that `statistics.NAME=package.module.function` names."""
    return {name: import_function(f"statistics.{name}", path) for name, path in config.statistics.items()}


def import_function(
    option: str, path: str, arguments: Mapping[str, Any] | None = None, make: bool = True
) -> Callable[..., Any]:
    """The function at `package.module.function`, or an object of the class there, made with the arguments.

    The folder that the program was started in is searched too. Without `make` a class is taken as a function.
    Errors: it cannot be had; the option stands in the text.
    """
    if str(Path.cwd()) not in sys.path:  # the console script starts with its own folder in the path
        sys.path.append(str(Path.cwd()))
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
        found = getattr(module, name)
        made: Callable[..., Any] = found(**(arguments or {})) if make and isinstance(found, type) else found
        if not callable(made):
            raise TypeError(f"{show(made)} cannot be called")
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        reason = str(error) or type(error).__name__
        near = nearest(name, dir(module)) if isinstance(error, AttributeError) else ""
        raise UsageError(f"{option}={path}: cannot be had ({reason}){near}") from error
    return partial(made, **arguments) if arguments and made is found else made


def call_text(path: str, arguments: Mapping[str, Any]) -> str:
    """What tables call a function with these arguments: `package.function(name=value)`."""
    given = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f"{path}({given})" if given else path


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


def open_options(of: Any = Config, prefix: str = "") -> Iterator[str]:
    """Options that hold a dictionary: its keys are the user's, not the schema's, and may be added without a `+`."""
    for f in fields(of):
        if is_dataclass(f.type):
            yield from open_options(f.type, prefix + f.name + ".")
        elif get_origin(f.type) is dict:
            yield prefix + f.name


# Launcher that starts processes -> the extra that brings its plugin, whose settings are NAME_plugin.
EXTRAS = {"joblib": "parallel", "submitit_local": "parallel", "submitit_slurm": "parallel", "ray": "ray"}
PLUGIN = "_plugin"


def as_usage_error(error: Exception) -> UsageError:
    """One line for what Hydra or OmegaConf say in several."""
    if isinstance(error, OverrideParseException):
        return UsageError(f"{error.override}: not an option; options are key=value, see --help")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removesuffix(PLUGIN).rpartition("/")
        if group == "hydra/launcher" and name in EXTRAS:
            return UsageError(f"{group}={name}: is not installed; pip install 'initlab[{EXTRAS[name]}]'")
        if error.options:
            known = {name for name in error.options if not name.endswith(PLUGIN)}
            known |= set(EXTRAS) if group == "hydra/launcher" else set()
            return not_one_of(group or "--config-name", name, known)
        return UsageError(f"{error.missing_cfg_file}: no such file below the folders of configurations")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    said = (str(getattr(cause, "msg", None) or error) or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return UsageError(_explain(cause, str(cause.full_key), said))
    if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return UsageError(f"{several[1]}: several values need a sweep; put -m before the options")
    if absent := re.match(r"You must specify '(\w+)'", str(error)):
        return not_one_of(absent[1], "???", list_files(absent[1]))
    if twice := re.match(r"Could not append to config. An item is already at '(.*?)'", str(error)):
        return UsageError(f"+{twice[1]}: is there already; write {twice[1]}=VALUE")
    return UsageError(str(error) or type(error).__name__)


def list_files(group: str) -> list[str]:
    """The files of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _explain(error: OmegaConfBaseException, key: str, said: str) -> str:
    """What is wrong with the value of an option, in our words; `said` are the first of OmegaConf's."""
    if re.match(r"Key '.*' (is )?not in", said):
        return f"{key}: no such option{nearest(key, option_names())}; see --help"
    if isinstance(error, MissingMandatoryValue) or "missing mandatory value" in said:
        return f"{key}=???: must have a value"
    if "is not Optional" in said:
        return f"{key}=null: must have a value"
    given = getattr(error, "value", None)
    match = re.match(r"Value '(.*?)'( \(| of|$| could| is)", said) or re.search(
        r"(?:of|assigned:|assign|type) `?(\w+)", said
    )
    text = given if isinstance(given, str) else show(given) if given is not None else match[1] if match else ""
    wanted = next((words for kind, words in _WANTED.items() if kind in said), "")
    if wanted:
        return f"{key}={text}: {wanted}"
    if inner := [name for name in option_names() if name.startswith(f"{key}.") and "is not a subclass of" in said]:
        return f"{key}: holds options of its own: {', '.join(inner)}"
    return f"{key}: {said[0].lower()}{said[1:]}"


# What OmegaConf says of a value -> what we say.
_WANTED = {
    "Integer": "must be an integer",
    "hint 'int'": "must be an integer",
    "Float": "must be a number",
    "hint 'float'": "must be a number",
    "valid bool": "must be true or false",
    "is not a ListConfig": "must be a list, as in [VALUE,VALUE]",
    "to Dict[": "must be a dictionary, as in {NAME:VALUE}",
    "Cannot convert": "must be text",
}


def columns(config: Config) -> dict[str, Any]:
    """The configuration as columns of every table, so that a shard explains itself."""
    found = {}
    for name, option in OPTION_OF.items():
        value: Any = config
        for part in option.split("."):
            value = getattr(value, part)
        found[name] = value
    return found | {"inputs": config.width if config.inputs is None else config.inputs}


def seeds(config: Config) -> Sequence[int]:
    """Those of all networks of a job, or of one point of its grid."""
    return range(config.seed, config.seed + config.seeds) if config.sweep.seed is None else config.sweep.seed
