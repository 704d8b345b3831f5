"""Figures of a run for TensorBoard and Weights & Biases, where they are asked for and installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CREDENTIALS = Path(".wandb.yaml")
KEYS = ("WANDB_API_KEY", "WANDB_BASE_URL")


class TrackerError(Exception):
    """A tracker that cannot be used as asked; the message is one line and says what to do."""


def check(*, tensorboard: bool, wandb_project: str | None) -> None:
    """See that what is asked for can work, and take the credentials from .wandb.yaml. Raises TrackerError if not."""
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise TrackerError("--tensorboard needs a package that is not installed: pip install tensorboard")
    if wandb_project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise TrackerError("--wandb-project needs a package that is not installed: pip install wandb")
    if CREDENTIALS.exists():
        os.environ.update(_read_credentials())
    elif "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise TrackerError(
            f"--wandb-project needs credentials: a file {CREDENTIALS} with WANDB_API_KEY and WANDB_BASE_URL, or these in the "
            "environment, or WANDB_MODE=offline"
        )


def _read_credentials() -> dict[str, str]:
    yaml = importlib.import_module("yaml")  # comes with wandb
    try:
        content = yaml.safe_load(CREDENTIALS.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrackerError(f"cannot read {CREDENTIALS}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content.get("WANDB_API_KEY"):
        raise TrackerError(f"{CREDENTIALS} has no line WANDB_API_KEY: <your key>")
    return {key: str(content[key]) for key in KEYS if content.get(key)}


class Trackers:
    """Those that are asked for; none, and every call does nothing."""

    def __init__(
        self,
        folder: Path,
        name: str,
        args: Mapping[str, Any],
        *,
        epoch: int = 0,
        tensorboard: bool = False,
        wandb_project: str | None = None,
    ):
        """Files go into `folder`; a run that is resumed there, in `epoch`, goes on as the same one. Raises TrackerError."""
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard:
            self._board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
                str(folder / "tensorboard"), purge_step=epoch
            )
        if wandb_project is not None:
            identity = folder / "wandb-id"
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:12])
            wandb = importlib.import_module("wandb")
            try:
                self._wandb = wandb.init(
                    project=wandb_project,
                    name=name,
                    config=dict(args),
                    dir=str(folder),
                    id=identity.read_text(),
                    resume="allow",
                )
            except Exception as error:  # of the key, the server, the network
                first, *_ = str(error).splitlines() or [type(error).__name__]
                raise TrackerError(
                    f"Weights & Biases cannot be reached: {first}; WANDB_MODE=offline works without, and --resume goes on"
                ) from None

    def log(self, figures: Mapping[str, float], epoch: int) -> None:
        if self._board is not None:
            for key, value in figures.items():
                self._board.add_scalar(key, value, epoch)
        if self._wandb is not None:
            self._wandb.log({**figures, "epoch": epoch}, step=epoch)

    def close(self) -> None:
        """Write what is left to write."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
