"""Where initlab needs of Hydra what Hydra does not offer: private names, each with its reason, and its own plugins.

`get_args_parser` is Hydra's own command-line parser. Only with it a wrong flag can be told in one line before Hydra
prints its own page of usage and ends the process.

Hydra takes plugins from modules below `hydra_plugins` alone, and looks them up by name. A class that calls such a
module its own is put there by name; no folder of that name is needed, and other programs that use Hydra see nothing.
"""

import sys
from importlib import import_module
from types import ModuleType

from hydra._internal.utils import get_args_parser as get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

MODULE = "hydra_plugins.initlab_plugins"


def register(plugin: type, group: str, name: str, node: object) -> None:
    """Make a plugin what the choice `name` of a config group stands for.

    plugin: a class whose `__module__` is MODULE. node: a dataclass, its settings with their defaults.
    """
    known = Plugins.instance()  # looks for those that are installed, once
    parent, _, child = MODULE.partition(".")
    try:
        import_module(parent)
    except ImportError:  # none is installed
        sys.modules[parent] = _make_package(parent)
    module = sys.modules.setdefault(MODULE, _make_package(MODULE))
    setattr(sys.modules[parent], child, module)
    setattr(module, plugin.__name__, plugin)
    known.register(plugin)
    ConfigStore.instance().store(group=group, name=name, node=node, provider="initlab")


def _make_package(name: str) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = []
    return package
