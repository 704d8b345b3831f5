"""The state of a training, last.pkl: everything that is needed to continue exactly where it stood.

It holds options, a fingerprint of the data, progress (epoch, batch, step), extra values, the random generators, the model, a
description of it (common/trained.py), and named parts: optimizer, clock, meter, metrics, traces, best. In runs of many jobs
each job has a file NAME.last.pkl of its own, and the run's last.pkl only marks that it can be resumed.

state = State(run.last, options, run, model=model, optimizer=optimizer, meter=meter, metrics=metrics)
if run.status == "unfinished":
    state.resume()
run.open()
while state.epoch < epochs:
    for batch in batches_of(state.epoch)[state.batch :]:
        loss = ...
        if not state.is_finite(loss):  # on a GPU it is looked at every 20 steps
            break
        ...
        state.after_step()
    if not state.fetch_losses():
        raise Failed("the loss is not finite")
    state.end_epoch()
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, parallel
from common.checkpoint import CheckpointError
from common.errors import Failed, InputError, Interrupted
from common.run.command import Command
from common.run.options import check_same_options

SAVE_SECONDS = 60.0  # between two saves, apart from those that a signal or a script asks for
FETCH_STEPS = 20  # steps of the run between two looks at losses that are on a GPU


class Part(Protocol):
    """An object with a state: model, optimiser, clock, meter, metrics, traces, backtracking."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class State:
    """`batch` batches of epoch `epoch` are done, `step` steps in all; further `extra` values, and named parts.

    `options` are those that make the training what it is, `data` is a fingerprint: it resumes only with the same ones.
    `description` says what the model is made of (common/trained.py).
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        command: Command,
        *,
        data: str = "",
        description: Mapping[str, Any] | None = None,
        model: nn.Module,
        **parts: Part,
    ):
        self.path, self.options, self.command, self.data = path, dict(options), command, data
        self.model, self.parts, self.description = model, parts, dict(description or {})
        self.epoch = self.batch = self.step = 0
        self.extra: dict[str, Any] = {}  # plain values and tensors
        self.saved_at = time.monotonic()
        self.fetch_every = 1 if next(model.parameters()).device.type == "cpu" else FETCH_STEPS
        self.losses: list[float] = []  # the last that were fetched
        self.losses_finite = True  # all that were fetched
        self._on_device: list[Tensor] = []  # losses (L) of the steps since then
        self._flags: list[Tensor] = []  # of the last step, summed over all processes, where there are several
        self._signal_came = self._time_is_up = False  # in the flags that were fetched

    def sum_gradients(self, loss: Tensor, *, time_is_up: bool = False) -> Tensor:
        """Sum the gradients, and the loss, over all processes. To be called after each backward pass; returns the sum.

        In the same reduction all learn whether a signal has come to any of them, and whether the first finds the time up.
        They look at these flags when they look at the losses: at the same step.
        """
        if parallel.world_size() > 1:
            flags = float(self.command.signal is not None), float(time_is_up and parallel.is_main())
            loss, *self._flags = parallel.sum_gradients(self.model.parameters(), loss.detach(), *flags)
        return loss

    def is_finite(self, *losses: Tensor) -> bool:
        """Look at the losses of a step, before the optimiser takes it; False if they, or earlier ones, are not finite.

        On a GPU they stay there, and the host does not wait for them, until the number of the step is a multiple of 20. So
        the answer may be up to 19 steps late, always at the same step of a run, whenever it was saved or resumed in between.
        """
        self._on_device.append(torch.stack([loss.detach().double() for loss in (*losses, *self._flags)]))
        return (self.step + 1) % self.fetch_every != 0 or self.fetch_losses()

    def fetch_losses(self) -> bool:
        """Fetch the losses that are still on the device, in one transfer. False if one that was ever fetched is not finite."""
        if self._on_device:
            losses = torch.stack(self._on_device).cpu()
            self._on_device.clear()
            if self._flags:
                losses, flags = losses[:, :-2], losses[:, -2:].any(0).tolist()
                self._signal_came, self._time_is_up = self._signal_came or flags[0], self._time_is_up or flags[1]
            self.losses = losses[-1].tolist()
            self.losses_finite &= bool(losses.isfinite().all())
        return self.losses_finite

    def save(self) -> None:
        """Write last.pkl. Skipped if a loss or a weight is not finite: the file then keeps the last finite ones."""
        self.saved_at = time.monotonic()
        if not parallel.is_main() or not self.fetch_losses() or not checkpoint.has_finite_weights(self.model):
            return
        state = {
            "options": self.options,
            "data": self.data,
            "progress": (self.epoch, self.batch, self.step),
            "processes": parallel.world_size(),
            "extra": self.extra,
            "rng": rng_state(),
            "description": self.description,
            "model": self.model.state_dict(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        checkpoint.save(state, self.path)

    def resume(self) -> None:
        """Put everything back as it was when last.pkl was written. Writes nothing.

        Raises InputError if the file is damaged, or was written with other options, another model or other data.
        """
        again = f"{self.command.dash}overwrite starts again"
        if self.path.name != "last.pkl":  # of a job
            again = "without the file, it begins again"
        try:
            state = checkpoint.read(self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {again}") from None
        needed = ("options", "data", "progress", "extra", "rng", "model", *self.parts)
        missing = [name for name in needed if not isinstance(state, dict) or name not in state]
        if missing:
            raise CheckpointError(f"{self.path} has no entry {missing[0]!r}, it is of another version or script; {again}")
        check_same_options(state["options"], self.options, f"{self.path} was made", again)
        if state["data"] != self.data:
            raise CheckpointError(
                f"{self.path} was made with other data (fingerprint {state['data']}, now {self.data}): name the place where "
                f"those are; {again}"
            )
        processes = state.get("processes", parallel.world_size())
        if processes != parallel.world_size():
            how = "without torchrun" if processes == 1 else f"torchrun with {processes} processes, of all nodes together,"
            raise CheckpointError(
                f"{self.path} was made by {processes} processes, this is one of {parallel.world_size()}, which would go on "
                f"differently: {how} continues it; {again}"
            )
        checkpoint.load_model(self.model, state["model"], self.path)
        name = "progress"
        try:
            self.epoch, self.batch, self.step = (int(n) for n in state["progress"])
            self.extra = {**state["extra"]}
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            name = "rng"
            set_rng_state(state["rng"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
            raise CheckpointError(f"{self.path} is damaged, or of another version: {name} cannot be read; {again}") from None

    def check_same(self) -> None:
        """Check that all processes train the same model on the same data. Raises InputError, in all of them, if not."""
        weights = self.model.state_dict()
        parallel.check_same(torch=torch.__version__, options=self.options, data=self.data, weights=weights)

    def after_step(self) -> None:
        """Count a step. Saves once a minute; after a signal, saves and raises Interrupted."""
        self.batch, self.step = self.batch + 1, self.step + 1
        if not self._flags:
            self.check_signal()
        elif self._signal_came and self._all_have_flags():
            self._stop()
        self.save_if_due()

    def _all_have_flags(self) -> bool:
        """True after the steps at which all processes fetch the flags; one that saves may have fetched some before."""
        return self.step % self.fetch_every == 0

    def flags_say_time_is_up(self) -> bool:
        """True if the first process has found the time up, in all processes after the same step."""
        return self._time_is_up and self._all_have_flags()

    def check_signal(self) -> None:
        """Save and raise Interrupted if a signal has come to any process. To be called by all of them, between batches."""
        if parallel.agree(parallel.STOP if self.command.signal is not None else parallel.GO_ON) == parallel.STOP:
            self._stop()

    def _stop(self) -> NoReturn:
        self.save()
        parallel.wait_for_all()  # torchrun ends the others when the first has gone
        job = self.path.name.removesuffix("last.pkl").rstrip(".")
        raise Interrupted(f"after step {self.step}" + (f" of job {job}" if job else ""))

    def save_if_due(self) -> None:
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def end_epoch(self) -> None:
        """The next epoch begins."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.save_if_due()


def check_finite(loss: float, of: str, option: str = "--lr") -> None:
    """Raises Failed if a loss is not finite."""
    if not np.isfinite(loss):
        raise Failed(f"the loss of {of} is not finite: a smaller {option} may help")


def rng_state() -> dict[str, Any]:
    """The state of all global random generators, as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # a run on a CPU leaves GPUs alone
        "numpy": (kind, np.asarray(keys).tolist(), *rest),  # arrays would not load with weights_only=True
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the global random generators; those of devices that are not here any more are left out."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
