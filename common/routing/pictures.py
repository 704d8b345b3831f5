"""Pictures of routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.plotting import headline, save_figure


def plot_routing_maps(
    path: Path, title: str, epochs: Sequence[Sequence[Sequence[Sequence[float]]]], tasks: Sequence[str]
) -> None:
    """Heat maps of the share of each task's samples that go through each module: a row for each layer, up to five epochs.

    `epochs` holds a matrix (tasks, modules) for each epoch and layer.
    """
    shown = sorted({round(i) for i in np.linspace(0, len(epochs) - 1, min(5, len(epochs)))})
    n_layers = len(epochs[0])
    figure = Figure(figsize=(2.6 * len(shown) + 1.6, 2.6 * n_layers + 0.8), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(n_layers, len(shown), squeeze=False)
    for column, epoch in enumerate(shown):
        for layer, panel in enumerate(panels[:, column]):
            drawn = panel.imshow(np.asarray(epochs[epoch][layer]), cmap="viridis", vmin=0, vmax=1, aspect="auto")
            panel.set_title(f"layer {layer + 1}, epoch {epoch + 1}", fontsize=9)
            panel.set_yticks(range(len(tasks)), tasks if column == 0 else [""] * len(tasks), fontsize=6)
    for panel in panels[-1]:
        panel.set_xlabel("module")
    figure.colorbar(drawn, ax=panels, label="share of the task's test images", shrink=0.6)
    save_figure(figure, path)
