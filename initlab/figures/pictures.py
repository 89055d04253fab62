"""The figures of a run as files and as pictures for a page: each is drawn once, and becomes a PNG, inline SVG, or both.

A picture brings a text alternative along: its title, which states the finding, and what its axes are.
"""

import base64
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:  # pages without figures need not wait for it
    from matplotlib.figure import Figure


DENSE = 6000  # points in a figure from which a PNG is smaller than what SVG says of each


class Picture(NamedTuple):
    """A figure as a page shows it: its name, its title, a text alternative, and the image as HTML without a frame."""

    name: str
    title: str
    about: str
    image: Markup


def draw_pictures(figures: "Iterable[tuple[str, Figure]]", folder: Path | None, inline: bool) -> list[Picture]:
    """Write figures as PNG into a folder, unless it is None; as pictures for a page where `inline` asks for them."""
    pictures = []
    for name, figure in figures:
        if folder is not None:
            figure.savefig(folder / f"{name}.png")
            figure.set_layout_engine(None)  # where everything stands is known now, and no file is drawn twice
        title = " ".join(figure.get_suptitle().split())
        about = f"{title}. {describe_axes(figure)}".strip()
        if inline and count_points(figure) > DENSE:
            png = BytesIO()
            if folder is None:
                figure.savefig(png, format="png")
            drawn = png.getvalue() if folder is None else (folder / f"{name}.png").read_bytes()
            pictures.append(Picture(name, title, about, make_png(drawn, about)))
        elif inline:
            pictures.append(Picture(name, title, about, make_svg(figure, name, about)))
        else:
            pictures.append(Picture(name, title, about, Markup()))
    return pictures


def describe_axes(figure: "Figure") -> str:
    """What is drawn over what, once for panels that repeat it."""
    said = [f"{ax.get_ylabel() or ax.get_title()} over {ax.get_xlabel()}" for ax in figure.axes if ax.get_xlabel()]
    return "; ".join(dict.fromkeys(" ".join(one.split()) for one in said))


def count_points(figure: "Figure") -> int:
    """How many points the lines and areas of a figure have; images, which are pixels already, have none."""
    total = 0
    for ax in figure.axes:
        total += sum(np.size(line.get_xdata()) for line in ax.lines)
        for one in ax.collections:
            if hasattr(one, "get_coordinates"):  # of a heat map, whose paths are made when they are asked for
                total += 0 if one.get_rasterized() else np.size(one.get_coordinates())
                continue
            paths = one.get_paths()
            points = sum(np.size(path.vertices) // 2 for path in paths)
            total += max(points, np.size(one.get_offsets()) // 2 if len(paths) == 1 else 0)
    return total


def make_png(png: bytes, about: str) -> Markup:
    """An image in the page itself."""
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(base64.b64encode(png).decode(), about)


def make_svg(figure: "Figure", name: str, about: str) -> Markup:
    """A figure as an SVG element for a page: its text is text, its ids begin with `name`, it names no address."""
    import matplotlib

    file = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue().decode()
    box = re.search(r'viewBox="([-\d. ]+)"', text)
    inner = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r' id="', f' id="{name}-', inner)
    inner = re.sub(r'xlink:href="', 'href="', inner)
    inner = re.sub(r'url\(#|href="#', lambda found: f"{found[0]}{name}-", inner)
    inner = re.sub(r">\s+<", ">\n<", inner)
    start = Markup(
        '<svg role="img" aria-labelledby="{0}-title" viewBox="{1}" stroke-linejoin="round"><title id="{0}-title">{2}'
        "</title>"
    )
    return start.format(name, box[1] if box else "0 0 720 480", about) + Markup(inner) + Markup("</svg>")
