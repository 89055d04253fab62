"""Every gain of every activation, what each leads to, and where the numbers in use are not what they stand for."""

import pandas as pd

from initlab.meanfield.gain_table import gain_table, published_table

EXACT = 1e-5  # a published number this near is the right one, printed with fewer digits
_SHOWN = {
    "activation": "activation", "kind": "kind", "gain": "gain", "q": "q*", "slope": "V'", "chi_1": "chi_1",
    "stability": "fixed point", "gradient": "gradients",
}  # fmt: skip


def gains() -> pd.DataFrame:
    """Every gain of every activation and every number in use: `gain_table` and `published_table` as one table.

    Sorted by activation; torch's numbers stand there once.

    >>> frame = gains().set_index(["activation", "kind"])
    >>> round(float(frame.loc[("tanh", "chi"), "gain"]), 5), round(float(frame.loc[("tanh", "torch"), "gain"]), 5)
    (1.46741, 1.66667)
    """
    published = published_table()
    derived_table = gain_table().drop(columns="why")
    derived = derived_table[derived_table["kind"] != "torch"].assign(source="", deviation=0.0, why="")
    derived = derived.assign(meant=derived["kind"], right=derived["gain"])
    torch_has = derived_table.drop_duplicates("activation").set_index("activation")["torch"]
    published = published.assign(torch=published["activation"].map(torch_has))
    published = published.assign(ratio=published["gain"] / published["torch"])
    both = pd.concat([derived, published], ignore_index=True)
    order = {name: k for k, name in enumerate(derived_table["activation"].unique())}
    return both.sort_values("activation", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def gains_as_text(frame: pd.DataFrame) -> str:
    """The table, and a line for every number in use that is not the gain that it stands for.

    frame: what `gains` returns.
    """
    table = frame.loc[frame["source"].isin(["", "torch.nn.init.calculate_gain"]), list(_SHOWN)].rename(columns=_SHOWN)
    text = table.to_string(index=False, float_format=lambda value: f"{value:.6g}")
    wrong = frame[frame["deviation"].abs() > EXACT]
    lines = ["", "Numbers in use that are not the gain that they stand for:"]
    for (kind, source), rows in wrong.groupby(["kind", "source"], sort=False):
        shared = rows["why"].nunique() == 1
        lines.append(f"{kind} ({source}){': ' + rows['why'].iloc[0] if shared else ''}")
        for _, row in rows.iterrows():
            side = "above" if row["deviation"] > 0 else "below"
            size = f"{100 * abs(row['deviation']):.3g} % {side} {row['meant']} {row['right']:.6g}"
            lines.append(f"  {row['activation']} {row['gain']:.6g}: {size}{'' if shared else '; ' + row['why']}")
    right = frame[(frame["source"] != "") & (frame["deviation"].abs() <= EXACT)]
    named = [f"{kind} {', '.join(rows['activation'])}" for kind, rows in right.groupby("kind", sort=False)]
    lines += [f"Right: {'; '.join(named)}.", _PROMISES]
    return "\n".join([text, *lines])


_PROMISES = (
    "chi keeps gradients and rms preactivations where q = 1, std gives activations of unit variance; at the fixed point"
    " q* to which a gain leads, chi_1 is what a gradient's second moment is multiplied by in every layer, and q* is"
    " stable where V' < 1. init=kaiming takes chi; init.gain_kind= takes another."
)
