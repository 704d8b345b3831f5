"""Pictures of README.md and docs/reading_runs.md, from pictures and figures of committed runs.

    python docs/make_pictures.py                 # docs/strip.png and docs/traces.png

Parts are cut out of pictures as the scripts draw them, with edges in shares of width and height.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "results"
TRACES = {  # what was wrong with a run, and where it is
    "as it should be": "clustering/Swarm-long-seed0",
    "learning rate too high": "traces/rate-too-high",
    "learning rate too low": "traces/rate-too-low",
    "too few data": "traces/few-tasks",
}
JOINTS = {"full": "any matrix", "rank4": "rank 4", "rank1": "rank 1", "permutation": "permutation"}


def show_part(axes: Axes, picture: str, left: float = 0.0, right: float = 1.0, top: float = 0.0, bottom: float = 1.0) -> None:
    """A part of a picture, its edges in shares of width and height."""
    pixels = matplotlib.image.imread(RESULTS / picture)
    height, width = pixels.shape[:2]
    rows, columns = slice(round(top * height), round(bottom * height)), slice(round(left * width), round(right * width))
    axes.imshow(pixels[rows, columns], aspect="auto", interpolation="antialiased")


def draw_routing(axes: Axes, run: str) -> None:
    """Share of each task's test images that go through each module of the last layer."""
    maps = json.loads((RESULTS / run / "result.json").read_text())["maps"]
    axes.imshow(maps[-1], aspect="auto", interpolation="nearest")
    axes.set_xlabel("module")
    axes.set_ylabel("task")


def draw_penalties(axes: Axes) -> None:
    """Accuracy lost at the last stitch point, by kind of stitching layer."""
    last = [json.loads((RESULTS / "stitching" / run / "result.json").read_text())["layers"][-1] for run in JOINTS]
    penalties, deviations = [layer["penalty"] for layer in last], [layer["deviation"] for layer in last]
    axes.bar(range(len(last)), penalties, yerr=deviations, color="#0072B2", capsize=3)
    axes.set_xticks(range(len(last)), [name.replace(" ", "\n", 1) for name in JOINTS.values()], fontsize=7)
    axes.set_ylabel("points of accuracy")


def draw_strip() -> None:
    """One panel a system."""
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    panels = figure.subplots(1, 5)
    show_part(panels[0], "demo/samples.png", 0.380, 0.672, 0.074, 0.468)
    panels[0].set_title("clusters, in one pass\n(SWARM)")
    show_part(panels[1], "fashion/samples.png", 0.105, 0.497, 0.100, 0.452)
    panels[1].set_title("images, drawn value by value\n(SWARM transformer)")
    show_part(panels[2], "ssl/duet-width32-seed0/marginals.png", 0.0537, 0.4563, 0.146, 0.893)
    panels[2].set_title("the rotation, read off\na representation (DUET)")
    panels[2].set_xlabel("rotation")
    panels[2].set_ylabel("structure axis")
    draw_routing(panels[3], "routing/MNIST-MTL/routed-all-fc-aac-seed1")
    panels[3].set_title("modules that tasks choose\n(routing networks)")
    draw_penalties(panels[4])
    panels[4].set_title("two networks, stitched:\naccuracy lost")
    for axes in panels[:4]:
        axes.set_xticks([])
        axes.set_yticks([])
    save(figure, "strip.png")


def draw_traces() -> None:
    """Loss, and the traces of one parameter, of each run."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    for row, (what, run) in zip(figure.subplots(len(TRACES), 2), TRACES.items()):
        show_part(row[0], f"{run}/metrics.png")  # the first panels of the run's pictures are all that is stored
        row[0].set_title(f"{what}: loss")
        show_part(row[1], f"{run}/weights.png")
        row[1].set_title("some weights (cell.Whh)")
        for axes in row:
            axes.axis("off")
    save(figure, "traces.png")


def save(figure: Figure, name: str) -> None:
    """A PNG with a palette: a quarter of the size."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    picture = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(DOCS / name, optimize=True)


if __name__ == "__main__":
    draw_strip()
    draw_traces()
