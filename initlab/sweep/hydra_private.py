"""The names beginning with an underscore that initlab takes from Hydra, each with its reason; no other file has any.

`get_args_parser`: Hydra's own command-line parser. Only with it a wrong flag can be told in one line before Hydra
prints its own page of usage and ends the process.
"""

from hydra._internal.utils import get_args_parser as get_args_parser
