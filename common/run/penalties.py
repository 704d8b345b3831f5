"""Stitching penalties by layer, from the metrics of joints: of a sweep, and of chunks of sweeps put together."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.run.records import RecordError


def choose_runs(select: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair and layer, the run that --select takes for the best."""
    by = "accuracy" if select == "test" else "val_accuracy"
    best: dict[tuple[int, ...], dict[str, Any]] = {}
    for metrics in found:
        key = (*metrics["pair"], metrics["layer"])
        if key not in best or metrics[by] > best[key][by]:
            best[key] = metrics
    return list(best.values())


def by_layer(selected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation (n - 1) over pairs of a layer's penalty, layer by layer."""
    layers = []
    for layer in sorted({metrics["layer"] for metrics in selected}):
        of_layer = [metrics for metrics in selected if metrics["layer"] == layer]
        penalties = np.array([metrics["penalty"] for metrics in of_layer])
        metrics = {
            "layer": layer,
            "inside_block": of_layer[0]["inside_block"],
            "channels": of_layer[0]["channels"],
            "joint_parameters": of_layer[0]["joint_parameters"],
            "n": len(penalties),
            "penalty": float(penalties.mean()),
            "deviation": float(penalties.std(ddof=1)) if len(penalties) > 1 else None,
            "accuracy": float(np.mean([metrics["accuracy"] for metrics in of_layer])),
        }
        if "sparsity" in of_layer[0]:
            metrics["sparsity"] = float(np.mean([metrics["sparsity"] for metrics in of_layer]))
        layers.append(metrics)
    return layers


def with_chunks_together(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result for each kind of joint: those of one kind are chunks, whose pairs are put together. Raises RecordError."""
    if len({(result["arch"], result["dataset"]) for result in results}) > 1:
        raise RecordError("these runs are not of one architecture on one data set: compare like with like")
    together: dict[str, dict[str, Any]] = {}
    for result in results:
        known = together.setdefault(result["kind"], result | {"cells": []})
        known["cells"] = known["cells"] + result["cells"]
    for kind, result in together.items():
        cells = [(*cell["pair"], cell["layer"], cell["run"]) for cell in result["cells"]]
        if len(set(cells)) < len(cells):
            raise RecordError(f"two of these runs have joined the same pair by {kind}: compare one of them")
        result["layers"] = by_layer(choose_runs(result["select"], result["cells"]))
    return list(together.values())
