"""The figure of the gains of all activations: how large they are, and what a gradient meets at the fixed point of each.

At a fixed point of the variance, chi_1 is the factor by which a layer multiplies the second moment of a gradient.
"""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from initlab.figures.axes import name_rows, new_figure

KINDS = {"chi": "o", "rms": "s", "std": "D", "torch": "^"}  # kind -> marker; published tables are in the text
STABLE = ("stable", "marginal")
KIND_GAP = 0.17  # between the kinds of one activation, in rows


def draw_gains(frame: pd.DataFrame) -> Figure:
    """Left the gains, right chi_1; a hollow marker where the fixed point is unstable or no signal is left."""
    order = list(frame["activation"].unique())
    shown = frame[frame["kind"].isin(list(KINDS))]
    lasting = shown[(shown["kind"] == "chi") & shown["stability"].isin(STABLE) & (shown["gradient"] == "kept")]
    keeps = ", ".join(lasting["activation"])
    figure, (left, right) = new_figure(
        f"A gain that keeps gradients at q = 1 goes on keeping them only where phi has no scale of its own: {keeps}",
        1, 2, sharey=True,
    )  # fmt: skip
    figure.set_size_inches(8.5, 0.42 * len(order) + 1.6)
    colours = sns.color_palette("colorblind", len(KINDS))
    for ax, value in ((left, "gain"), (right, "chi_1")):
        for k, (kind, marker) in enumerate(KINDS.items()):  # activations from top to bottom
            mine = shown[shown["kind"] == kind]
            for name, x, stability in mine[["activation", value, "stability"]].itertuples(index=False):
                ax.plot(
                    [x], [order.index(name) + KIND_GAP * (k - 1.5)], marker, markersize=7, markeredgecolor=colours[k],
                    markerfacecolor=colours[k] if stability in STABLE else "white", markeredgewidth=1.5,
                )  # fmt: skip
            ax.plot([], [], marker, color=colours[k], label=kind)
        name_rows(ax, order)
        if (shown[value] > 0).any():
            ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("gain")
    right.set_xlabel("chi_1: factor of a gradient's mean square")
    right.axvline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    right.plot(
        [], [], "o", markerfacecolor="white", markeredgecolor="0.3", label="fixed point unstable, or signal gone"
    )
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS) + 1, frameon=False)
    return figure
