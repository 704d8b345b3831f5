"""Stitching penalties by layer, of one sweep, or of chunks of a sweep put together."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import InputError


def best_runs(select: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best run of each pair and layer, by test accuracy if `select` is "test", else by validation accuracy."""
    by = "accuracy" if select == "test" else "val_accuracy"
    best: dict[tuple[int, ...], dict[str, Any]] = {}
    for record in records:
        key = (*record["pair"], record["layer"])
        if key not in best or record[by] > best[key][by]:
            best[key] = record
    return list(best.values())


def by_layer(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation (n - 1) of the penalty over pairs, layer by layer."""
    layers = []
    for layer in sorted({record["layer"] for record in records}):
        own = [record for record in records if record["layer"] == layer]
        penalties = np.array([record["penalty"] for record in own])
        metrics = {
            "layer": layer,
            **{name: own[0][name] for name in ("inside_block", "channels", "joint_parameters")},
            "n": len(penalties),
            "penalty": float(penalties.mean()),
            "deviation": float(penalties.std(ddof=1)) if len(penalties) > 1 else None,
            "accuracy": float(np.mean([record["accuracy"] for record in own])),
        }
        if "sparsity" in own[0]:
            metrics["sparsity"] = float(np.mean([record["sparsity"] for record in own]))
        layers.append(metrics)
    return layers


def penalty_table(result: dict[str, Any]) -> str:
    """The penalties of a sweep as text."""
    lines = [f"{result['kind']}: penalty in % of accuracy, mean and deviation over pairs (* inside a residual block)"]
    for metrics in result["layers"]:
        layer, deviation = f"{metrics['layer']:>3}{'*' if metrics['inside_block'] else ' '}", metrics["deviation"]
        spread = "" if deviation is None else f" +- {deviation:.2f}"
        lines.append(f"  layer {layer} {metrics['penalty']:7.2f}{spread}  (n = {metrics['n']})")
    return "\n".join(lines)


def merge_chunks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result for each kind of stitching layer: results of one kind are chunks, and their pairs are put together.

    Raises InputError for results of different architectures or data sets, for chunks of different seeds or protocols, and for
    a pair that two of them have.
    """
    if len({(result["arch"], result["dataset"]) for result in results}) > 1:
        raise InputError("these runs are not of one architecture on one data set: compare like with like")
    for name in ("seed", "select"):
        if len({(result["kind"], result[name]) for result in results}) > len({result["kind"] for result in results}):
            raise InputError(f"runs of one kind of stitching layer differ in {name}: they are no chunks of one sweep")
    merged: dict[str, dict[str, Any]] = {}
    for result in results:
        known = merged.setdefault(result["kind"], result | {"cells": []})
        known["cells"] = known["cells"] + result["cells"]
    for kind, result in merged.items():
        jobs = [(*record["pair"], record["layer"], record["run"]) for record in result["cells"]]
        if len(set(jobs)) < len(jobs):
            raise InputError(f"two of these runs have stitched the same pair by {kind}: compare one of them")
        result["layers"] = by_layer(best_runs(result["select"], result["cells"]))
    return list(merged.values())
