"""Run directories of all kinds, made by hand."""

import json
from pathlib import Path
from typing import Any

OPTIONS = {"type": "Swarm", "lr": 0.01, "bs": 20, "seed": 0, "results_dir": "results", "gpu": None, "cpu_threads": 1}
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63f8cfc0f01f0005000201a5f645400000000049454e44ae426082"
)


def write_clustering(path: Path, loss: float, *, seconds: float = 60.0, n_rows: int = 3, **options: Any) -> Path:
    """A finished clustering run whose validation cross entropy ends at `loss`."""
    path.mkdir(parents=True)
    seed = options.get("seed", 0)
    result = {
        "script": "amortised_clustering",
        "name": path.name,
        "seed": seed,
        "protocol": "the best of all epochs",
        "parameters": 9226,
        "seconds": seconds,
        "model": {"cross_entropy": loss, "accuracy": 1 - loss / 3, "rand_index": 0.5},
        "chance": {"cross_entropy": 2.3},
        "oracle": {"cross_entropy": 0.1},
    }
    (path / "args.json").write_text(json.dumps(OPTIONS | options))
    (path / "result.json").write_text(json.dumps(result))
    (path / "metrics.csv").write_text(metrics(loss, seconds, n_rows))
    (path / "log").write_text(f"{path.name} begins\nit ends\n")
    for name in ("metrics.png", "samples.png"):
        (path / name).write_bytes(PIXEL)
    return path


def metrics(loss: float, seconds: float, n_rows: int) -> str:
    rows = [f"{i},{10 * i},{seconds * i / n_rows},{loss + n_rows - i},0.01" for i in range(1, n_rows + 1)]
    return "\n".join(["epoch,step,seconds,val_loss,lr", *rows]) + "\n"
