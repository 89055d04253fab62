"""Whether layers are numbered in the order in which they were first called."""

from itertools import pairwise

from tests.probes.by_hand import PARAMETERS, Watched


def misplaced(seen: Watched) -> list[str]:
    """Neighbours whose numbers do not grow; activations have the number of the layer below and are left out."""
    modules = dict(seen.model.named_modules())
    rows = seen.rows[seen.rows["direction"].eq("forward") & ~seen.rows["tensor"].isin([*PARAMETERS, "activation"])]
    lowest = rows.groupby("name", observed=True)["layer"].min().to_dict()
    called = dict.fromkeys(place.name for place in seen.trace.values if place.direction == "forward" and not place.word)
    leaves = [name for name in called if name in seen.trace.leaves and name in lowest and name in modules]
    layers = [name for name in leaves if any(True for _ in modules[name].parameters(recurse=False))]
    return [f"{a} {lowest[a]}, {b} {lowest[b]}" for a, b in pairwise(layers) if lowest[a] >= lowest[b]]
