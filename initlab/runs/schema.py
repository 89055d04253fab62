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
