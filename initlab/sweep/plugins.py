"""How Hydra comes to know initlab's own plugins, from a checkout and from a wheel alike.

Hydra takes plugins from modules below `hydra_plugins` alone, and looks them up by name. A class that calls such a
module its own is put there by name; no folder of that name is needed, and other programs that use Hydra see nothing.
"""

import sys
from importlib import import_module
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

PLACE = "hydra_plugins.initlab_plugins"


def register(plugin: type, group: str, name: str, node: object) -> None:
    """Make `plugin`, whose `__module__` is PLACE, what the choice `name` of a config group stands for."""
    known = Plugins.instance()  # looks for those that are installed, once
    parent, _, child = PLACE.partition(".")
    try:
        import_module(parent)
    except ImportError:  # none is installed
        sys.modules[parent] = _package(parent)
    module = sys.modules.setdefault(PLACE, _package(PLACE))
    setattr(sys.modules[parent], child, module)
    setattr(module, plugin.__name__, plugin)
    known.register(plugin)
    ConfigStore.instance().store(group=group, name=name, node=node, provider="initlab")


def _package(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []
    return made
