"""The frames of a walked graph as text: a table of the nodes, and the tree from the loss down."""

import pandas as pd


def frames_as_text(nodes: pd.DataFrame, edges: pd.DataFrame, unreached: tuple[str, ...] = (), limit: int = 100) -> str:
    """The table and the tree, each at most `limit` rows long."""
    parts = [_nodes_table(nodes, limit), "", *_tree_lines(nodes, edges, limit)]
    if unreached:
        parts += ["", f"No gradient reaches {', '.join(unreached)}."]
    return "\n".join(parts)


def _nodes_table(nodes: pd.DataFrame, limit: int) -> str:
    """Columns as wide as they need to be, and those left out that say nothing; values are kept for the frame."""
    shown = nodes.drop(columns="saved_values").head(limit).astype(str)
    shown = shown[[name for name in shown if (shown[name] != "").any()]]
    lines = [list(shown.columns), *shown.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + _more_rows(len(nodes) - len(shown)))


def _more_rows(count: int) -> list[str]:
    return [f"... and {count:,} more"] if count > 0 else []


def _tree_lines(nodes: pd.DataFrame, edges: pd.DataFrame, limit: int) -> list[str]:
    """Depth first, each node written out once and referred to afterwards."""
    below = {source: list(rows["target"]) for source, rows in edges.groupby("source")}
    label = {row.id: f"{row.node} {row.leaf}".rstrip() for row in nodes.itertuples()}
    lines: list[str] = []
    written: set[int] = set()
    waiting = [(0, 0)]
    while waiting and len(lines) < limit:
        node, depth = waiting.pop()
        again = node in written and bool(below.get(node))
        lines.append(f"{'  ' * depth}[{node}] {label[node]}{', written out above' if again else ''}")
        if node not in written:
            written.add(node)
            waiting += [(target, depth + 1) for target in reversed(below.get(node, []))]
    return lines + _more_rows(len(nodes) - len(written))
