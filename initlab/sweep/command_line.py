"""The words of the command line, checked before Hydra sees them."""

from collections.abc import Sequence
from typing import NoReturn

from initlab.errors import UsageError
from initlab.job.options import option_names
from initlab.sweep.hydra_private import get_args_parser

GROUPS = ("init", "activation", "data")  # folders of conf/: one file of each is chosen


def _refuse_flags(message: str) -> NoReturn:
    raise UsageError(f"{message}; see --help")


def check_words(words: Sequence[str]) -> list[str]:
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
