"""Rows of metrics for TensorBoard and Weights & Biases, where they are asked for and installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import parallel
from common.errors import InputError

CREDENTIALS = Path(".wandb.yaml")
KEYS = ("WANDB_API_KEY", "WANDB_BASE_URL")
FILES = ("tensorboard/*", "wandb/*", "wandb-id")  # in the folder of a tracked training


def check(args: argparse.Namespace, dash: str = "--") -> None:
    """Check that the trackers in `args` can work, and take the credentials from .wandb.yaml. Raises InputError if not."""
    board, project = getattr(args, "tensorboard", False), getattr(args, "wandb_project", None)
    wandb_option = f"{dash}wandb{'_' if dash == '-' else '-'}project"
    for option, package, wanted in ((f"{dash}tensorboard", "tensorboard", board), (wandb_option, "wandb", project is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{option} needs a package that is not installed: pip install {package}")
    if project is None:
        return
    if CREDENTIALS.exists():
        os.environ.update(_read_credentials())
    elif "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise InputError(
            f"{wandb_option} needs credentials: a file {CREDENTIALS} with WANDB_API_KEY and WANDB_BASE_URL, or these in the "
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
    """The trackers that `args` asks for; none in other processes than the first.

    A training that is resumed is the same run for them. `folder` takes their files. Nothing is made before `open`.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, name: str):
        self.folder, self.name, self.args = folder, name, args
        self.wants_board = bool(getattr(args, "tensorboard", False)) and parallel.is_main()
        self.project = getattr(args, "wandb_project", None) if parallel.is_main() else None
        self._board: Any = None  # of the group of the last row
        self._wandb: Any = None
        self._group: str | None = None

    def open(self) -> None:
        """Start, or continue, the run in Weights & Biases. Raises InputError if that cannot be reached."""
        if self.project is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = self.folder / "wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
        options = {"project": self.project, "name": self.name, "config": vars(self.args), "dir": str(self.folder)}
        try:
            self._wandb = importlib.import_module("wandb").init(**options, id=identity.read_text(), resume="allow")
        except Exception as error:  # of the key, the server, the network
            first, *_ = str(error).splitlines() or [type(error).__name__]
            raise InputError(
                f"Weights & Biases cannot be reached: {first}; WANDB_MODE=offline works without, and resuming continues"
            ) from None

    def log(self, row: Mapping[str, float], step: int, group: str = "") -> None:
        """Add metrics of an epoch or a step; NaN is left out. The rows of each job of a run are a `group` of their own."""
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        if self.wants_board:
            if self._board is None or group != self._group:
                self._close_board()
                writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
                # rows from `step` on that are there are of a process that was killed after its last save
                self._board = writer(str(self.folder / "tensorboard" / group), purge_step=step)
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            prefix = f"{group}/" if group else ""
            if group != self._group:
                self._wandb.define_metric(f"{prefix}*", step_metric=f"{prefix}epoch")
            self._wandb.log({prefix + name: value for name, value in {"epoch": step, **row}.items()})
        self._group = group

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def close(self) -> None:
        """Write what is left to write."""
        self._close_board()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
