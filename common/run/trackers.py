"""Metrics of a run for TensorBoard and Weights & Biases, where they are asked for and installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import parallel
from common.errors import InputError
from common.run.run import Run

CREDENTIALS = Path(".wandb.yaml")
KEYS = ("WANDB_API_KEY", "WANDB_BASE_URL")


def check(args: argparse.Namespace) -> None:
    """See that the trackers in `args` can work, and take the credentials from .wandb.yaml. Raises InputError if not."""
    for option, package, wanted in (
        ("--tensorboard", "tensorboard", args.tensorboard),
        ("--wandb-project", "wandb", args.wandb_project is not None),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{option} needs a package that is not installed: pip install {package}")
    if args.wandb_project is None:
        return
    if CREDENTIALS.exists():
        os.environ.update(_read_credentials())
    elif "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise InputError(
            f"--wandb-project needs credentials: a file {CREDENTIALS} with WANDB_API_KEY and WANDB_BASE_URL, or these in the "
            "environment, or WANDB_MODE=offline"
        )


def _read_credentials() -> dict[str, str]:
    yaml = importlib.import_module("yaml")  # comes with wandb
    try:
        content = yaml.safe_load(CREDENTIALS.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {CREDENTIALS}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content.get("WANDB_API_KEY"):
        raise InputError(f"{CREDENTIALS} has no line WANDB_API_KEY: <your key>")
    return {key: str(content[key]) for key in KEYS if content.get(key)}


class Trackers:
    """`with Trackers(run, epoch) as trackers:` opens those in the run's `args`, in the first process; others do nothing.

    Files go into the run's directory. A run that is resumed, in `epoch`, is the same run for them. Raises InputError.
    """

    def __init__(self, run: Run, epoch: int):
        self._board: Any = None
        self._wandb: Any = None
        if run.args.tensorboard and parallel.is_main():
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(run.part / "tensorboard"), purge_step=epoch)
        if run.args.wandb_project is not None and parallel.is_main():
            identity = run.part / "wandb-id"
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:12])
            options = {"project": run.args.wandb_project, "name": run.name, "config": vars(run.args), "dir": str(run.part)}
            try:
                self._wandb = importlib.import_module("wandb").init(**options, id=identity.read_text(), resume="allow")
            except Exception as error:  # of the key, the server, the network
                first, *_ = str(error).splitlines() or [type(error).__name__]
                raise InputError(
                    f"Weights & Biases cannot be reached: {first}; WANDB_MODE=offline works without, and --resume continues"
                ) from None

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, epoch)
        if self._wandb is not None:
            self._wandb.log({**metrics, "epoch": epoch}, step=epoch)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left to write."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
