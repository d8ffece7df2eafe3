"""Draws the pictures of docs/kernels.md: windows, tiles and masks, with the package's own window formulas.

python docs/draw_tiles.py        # writes docs/images/*.svg; needs matplotlib
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from jax_natten import Neighborhood

plt.switch_backend("svg")
# The hash salt makes the same file in every run.
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "jax_natten", "font.size": 9})

IMAGES = Path(__file__).resolve().parent / "images"
QUERY, WINDOW, SKIP, WHOLE, MASKED = "#3b6ea8", "#222222", "#e8e8e8", "#9fd0a0", "#f2c27a"


def span(axis, first: int, last: int):
    """Keys that some query of first..last sees, and keys that all of them see."""
    low, high = (axis.window_of_query(i, axis.length) for i in (first, last))
    return (int(low[0]), int(high[1])), (int(high[0]), int(low[1]))


def box(plot, corner, size, **style) -> None:
    """A rectangle of positions; corner and size are (row, column)."""
    plot.add_patch(Rectangle((corner[1], corner[0]), size[1], size[0], **style))


def prepare(plot, grid, title: str) -> None:
    plot.set_xlim(0, grid[1])
    plot.set_ylim(grid[0], 0)
    plot.set_aspect("equal")
    plot.set_xticks(range(0, grid[1] + 1, 4))
    plot.set_yticks(range(0, grid[0] + 1, 4))
    plot.grid(True, linewidth=0.3, color="#cccccc")
    plot.set_axisbelow(True)
    plot.set_title(title)


def save(figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def draw_classes() -> None:
    """Key tiles of one query tile, as each of its two parts sees them."""
    grid, query, part, keys = (48, 48), ((16, 20), (16, 8)), (8, 8), (4, 8)
    axes = Neighborhood.make((25, 25)).axes(grid)
    any_seen = [span(axis, at, at + n - 1)[0] for axis, at, n in zip(axes, *query)]
    figure, plots = plt.subplots(1, 2, figsize=(9, 4.6))
    for number, plot in enumerate(plots):
        first = (query[0][0] + number * part[0], query[0][1])
        spans = [span(axis, at, at + n - 1) for axis, at, n in zip(axes, first, part)]
        prepare(plot, grid, f"warpgroup {number}")
        for y in range(any_seen[0][0], any_seen[0][1], keys[0]):
            for x in range(any_seen[1][0], any_seen[1][1], keys[1]):
                begins = (y, x)
                seen = all(b < s[0][1] and b + n > s[0][0] for b, n, s in zip(begins, keys, spans))
                whole = all(b >= s[1][0] and b + n <= s[1][1] for b, n, s in zip(begins, keys, spans))
                color = SKIP if not seen else WHOLE if whole else MASKED
                box(plot, begins, keys, facecolor=color, edgecolor="white", linewidth=1.5)
        for (rows, columns), line in (((s[0] for s in spans), "-"), ((s[1] for s in spans), "--")):
            corner, size = (rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0])
            box(plot, corner, size, fill=False, edgecolor=WINDOW, linestyle=line, linewidth=1.3)
        box(plot, query[0], query[1], fill=False, edgecolor=QUERY, linewidth=1)
        box(plot, first, part, facecolor=QUERY, alpha=0.55)
    handles = [Rectangle((0, 0), 1, 1, facecolor=c) for c in (SKIP, MASKED, WHOLE, QUERY)]
    handles += [plt.Line2D([], [], color=WINDOW, linestyle=line) for line in ("-", "--")]
    names = ("skipped", "masked", "whole", "its queries", "keys that some query sees", "keys that all queries see")
    figure.legend(handles, names, loc="lower center", ncols=6, frameon=False, fontsize=8)
    save(figure, "tile_classes.svg")


def draw_mask() -> None:
    """The mask of one query in one key tile, from one mask per axis."""
    tile, window = (4, 8), ((1, 4), (3, 8))  # in the tile's coordinates
    figure, plots = plt.subplots(1, 3, figsize=(9, 1.9))
    titles = ("rows 1 .. 3", "columns 3 .. 7", "both")
    for plot, title, use in zip(plots, titles, ((True, False), (False, True), (True, True))):
        prepare(plot, tile, title)
        inside = [
            [all(not u or w[0] <= i < w[1] for u, w, i in zip(use, window, (y, x))) for x in range(tile[1])]
            for y in range(tile[0])
        ]
        plot.pcolormesh(inside, cmap=ListedColormap([SKIP, WHOLE]), edgecolor="white")
        for x in range(tile[1]):
            plot.text(x + 0.5, 0.5, str(x // 2), ha="center", va="center", fontsize=7, color="#555555")
    save(figure, "mask.svg")


def draw_warp() -> None:
    """A query tile of the warp kernel, its box of keys, and what one warp gathers from it."""
    grid, query, part = (24, 24), ((8, 8), (8, 8)), (4, 4)
    axes = Neighborhood.make((7, 7)).axes(grid)
    figure, plot = plt.subplots(figsize=(4.6, 4.6))
    prepare(plot, grid, "window 7 x 7")
    seen = [span(axis, at, at + n - 1)[0] for axis, at, n in zip(axes, *query)]
    corner, size = tuple(s[0] for s in seen), tuple(s[1] - s[0] for s in seen)
    box(plot, corner, size, facecolor=SKIP, edgecolor=WINDOW)
    first = (query[0][0], query[0][1] + part[1])
    own = [span(axis, at, at + n - 1)[0] for axis, at, n in zip(axes, first, part)]
    box(plot, tuple(s[0] for s in own), tuple(s[1] - s[0] for s in own), facecolor=MASKED, edgecolor=WINDOW)
    for y in range(0, query[1][0], part[0]):
        for x in range(0, query[1][1], part[1]):
            box(plot, (query[0][0] + y, query[0][1] + x), part, fill=False, edgecolor=QUERY)
    box(plot, first, part, facecolor=QUERY, alpha=0.6)
    handles = [Rectangle((0, 0), 1, 1, facecolor=c) for c in (SKIP, MASKED, QUERY)]
    names = (f"box of {size[0]} x {size[1]} keys", "list of one warp: 10 x 10", "its 4 x 4 queries")
    plot.legend(handles, names, loc="lower left", fontsize=8)
    save(figure, "warp_box.svg")


def draw_schedule() -> None:
    """Who works when in the wide kernel, over four key tiles."""
    figure, plot = plt.subplots(figsize=(9, 2.3))
    colors = {"load": "#c9d7ea", "products": QUERY, "softmax": MASKED}
    for tile in range(5):
        plot.broken_barh([(tile * 4 - 3.2, 3)], (2.1, 0.8), facecolor=colors["load"])
        plot.text(tile * 4 - 1.7, 2.5, f"K, V {tile}", ha="center", va="center", fontsize=7)
    for group in range(2):
        for tile in range(4):
            begin = tile * 4 + 2 * group
            text = f"QK {tile}" if tile == 0 else f"QK {tile}, PV {tile - 1}"
            for kind, at, name in (("products", begin, text), ("softmax", begin + 2, f"softmax {tile}")):
                plot.broken_barh([(at, 1.95)], (1 - group + 0.1, 0.8), facecolor=colors[kind])
                color = "white" if kind == "products" else "black"
                plot.text(at + 1, 1 - group + 0.5, name, ha="center", va="center", fontsize=7, color=color)
    plot.set_yticks((0.5, 1.5, 2.5), ("warpgroup 1", "warpgroup 0", "producer"))
    plot.set_xticks([])
    plot.set_xlabel("time")
    for side in ("top", "right", "left"):
        plot.spines[side].set_visible(False)
    save(figure, "wide_schedule.svg")


if __name__ == "__main__":
    draw_classes()
    draw_mask()
    draw_warp()
    draw_schedule()
