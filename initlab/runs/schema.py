"""The columns that a table has of its own, known before anything is measured; beside them stands the configuration.

A misspelt column of a study is found by these before its sweep begins. Tables that are not named here are asked later.
"""

from initlab.stats.statistics import STATISTICS

_KEYS = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")

OWN: dict[str, tuple[str, ...]] = {
    "stats": (*_KEYS, *STATISTICS, "log2_rms_true", "log2_std_true", "std_torch"),
    "theory": (*_KEYS, "statistic", "measured", "predicted", "band_low", "band_high", "z", "limit", "method"),
    "losses": ("implementation", "seed", "step", "loss", "accuracy"),
    "parity": ("seed", "step", "layer", "tensor", "direction", "relative_error", "n_nonfinite"),
}
BESIDE = ("gain", "device", "run")  # in every table, and no option

# Column of the tables -> option; a name of the trained network that the stack has too gets the prefix `train_`.
OPTION_OF = {
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
