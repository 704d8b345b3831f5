"""The SWARM scripts in two processes of torchrun: a test starts this program, and checks the files that it leaves.

torchrun --nproc-per-node=2 tests/parallel_swarm.py FOLDER kill KIND RANK N  # SIGKILL to process RANK in its N-th step
torchrun --nproc-per-node=2 tests/parallel_swarm.py FOLDER                   # all else, one after the other, in one group
"""

import contextlib
import importlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common import parallel
from common.datasets import clustering
from common.models.mixture import log_likelihood
from common.run.clock import Clock
from common.run.state import State
from tests.command_lines import exit_status
from tests.interruptions.cases import Case, make_case, save_often_draw_nothing
from tests.stopping import Signals

KINDS = ("clustering", "mixture", "images")
# batches that do not halve, no dropout
LINES = {
    "clustering": "amortised_clustering -type Swarm -n_hidden 8 -n_iter 2 -tasks 30 -bs 7 -max_epochs 2 -results_dir RESULTS",
    "mixture": "amortised_mog -n_hidden 12 -n_iter 2 -pma -bs 3 -max_epochs 2 -results_dir RESULTS",
    "images": "swarm_transformer -data FashionMNIST -n_hidden 4 -n_iter 2 -bs 5 -epoch_images 12 -max_epochs 2 -n_samples 1 "
    "-results_dir RESULTS -data_dir DATA",
}
# a line, and a part of the one line that refuses it
REFUSED = {
    "amortised_clustering -type Swarm -tasks 10 -bs 1": "a batch of 1 tasks is too small for 2 processes",
    "amortised_clustering -type Swarm -tasks 10 -bs 8": "a batch of 1 tasks is too small for 2 processes",
    "amortised_mog -bs 1": "a batch of 1 sets is too small for 2 processes",
    "swarm_transformer -data FashionMNIST -n_hidden 4 -bs 1": "a batch of 1 images is too small for 2 processes",
    "swarm_transformer -data MNIST -n_hidden 4 -data_dir nowhere": "MNIST is not there",
    "amortised_mog -bs 0": "argument -bs: 0 is too small: at least 1",
    "amortised_mog -resume nowhere.pkl": "there is no checkpoint nowhere.pkl",
    "amortised_mog -n_hidden 4": "process 1 has other options than the first",
    "amortised_clustering -type Swarm -tasks 20 -bs 5 -n_hidden 4": "process 1 has other tasks than the first",
}


def steps_of(kind: str, double: bool, data: Path, results: Path) -> torch.Tensor:
    """A row a step of a run: gradients and, last, the loss; in double precision on request. Its files stay in `results`."""
    script_name, *words = LINES[kind].split()
    script = importlib.import_module(script_name)
    steps: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        make_model, is_finite = script.make_model, State.is_finite
        if double:
            patch.setattr(script, "make_model", lambda args: make_model(args).double())
            if kind == "clustering":
                patch.setattr(script, "log_probs", lambda model, x, mask, _: model(x.double(), mask).log_softmax(2))
            elif kind == "mixture":
                patch.setattr(script, "likelihood", likelihood)
            else:
                patch.setattr(script, "nats", nats)

        def noted(state: State, *losses: torch.Tensor) -> bool:
            gradients = [p.grad.flatten().double() for p in state.model.parameters() if p.grad is not None]
            steps.append(torch.cat([*gradients, losses[0].detach().double().reshape(1)]))
            return is_finite(state, *losses)

        patch.setattr(State, "is_finite", noted)
        line = [word.replace("RESULTS", str(results)).replace("DATA", str(data)) for word in words]
        assert exit_status(script.main, line) == 0
    return torch.stack(steps)


def nats(model: torch.nn.Module, batch: Any, *_: Any) -> torch.Tensor:
    log_p, values = model(batch.images).log_softmax(4), batch.images.permute(0, 2, 3, 1).long()
    return -log_p.gather(4, values.unsqueeze(4)).mean((1, 2, 3, 4))


def likelihood(_: Any, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    points = batch.points.double()
    return log_likelihood(points, model(points, batch.mask), batch.mask)


def all_steps(folder: Path) -> dict[str, torch.Tensor]:
    """Of all scripts, in both precisions, with as many processes as there are."""
    n, left = parallel.world_size(), {}
    for kind in KINDS:
        for double in (True, False):
            name = f"{kind} {'double' if double else 'single'}"
            left[name] = steps_of(kind, double, folder / "data", folder / f"{n}" / name)
    return left


def stop_again_and_again(kind: str, folder: Path, name: str, fetch_every: int = 1) -> list[int]:
    """One of the processes gets a signal at its first look, in the resumed run at its second, ...: statuses of all starts.

    `fetch_every`: steps between two looks at what is on the device, as on a GPU.
    """
    statuses: list[int] = []
    case = make_case(kind, folder / "data", folder / "stopped" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "fetch_every", property(lambda _: fetch_every, lambda *_: None), raising=False)
        looks = Signals(patch)
        for start in range(40):
            looks.left = 1 + start if parallel.rank() == start % 2 else -1
            looks.number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[start % 3]
            statuses.append(case.run())
            if statuses[-1] == 0:
                break
    return statuses


def run_out_of_time(folder: Path) -> int:
    """The clock of the first process says in its third step that the time is up, that of the second never."""
    script, *words = LINES["clustering"].split()
    calls = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "is_up", lambda _: parallel.rank() == 0 and next(calls) >= 3)
        return Case(script, [word.replace("RESULTS", str(folder / "out of time")) for word in words], folder).run()


@contextlib.contextmanager
def short_of_memory() -> Iterator[None]:
    """Process 1 has memory for 2 images in training, and process 0 for one in validation."""
    script = importlib.import_module("swarm_transformer")
    nats = script.nats

    def short(model: torch.nn.Module, batch: Any, *more: Any) -> torch.Tensor:
        if len(batch) > ((9, 2) if torch.is_grad_enabled() else (1, 9))[parallel.rank()]:
            raise torch.OutOfMemoryError
        return nats(model, batch, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "nats", short)
        yield


def other_tasks(make_tasks: Callable) -> Callable:
    return lambda n, seed: make_tasks(n, seed + 1)


def refuse_all(folder: Path) -> dict[str, Any]:
    """Statuses, and what both processes have said, of lines that are refused."""
    said = {}
    one = make_case("clustering", folder / "data", folder / "of_one")  # of one process, interrupted
    lines = {**REFUSED, " ".join([one.script, *one.line]): ""}
    for number, line in enumerate(lines):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number + 1)  # torchrun itself starts none twice
        script, *words = line.split()
        if "-results_dir" not in words:
            words += ["-results_dir", str(folder / "refused"), "-wc", "0.001"]
        if script == "swarm_transformer" and "-data_dir" not in words:
            words += ["-data_dir", str(folder / "data")]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
            if parallel.rank() == 1 and "other options" in lines[line]:
                words += ["-lr", "0.2"]
            if parallel.rank() == 1 and "other tasks" in lines[line]:
                patch.setattr(clustering, "make_tasks", other_tasks(clustering.make_tasks))
            status = exit_status(importlib.import_module(script).main, words)
        everybodys: list[Any] = [None, None]
        dist.all_gather_object(everybodys, (status, error.getvalue()))
        said[line] = {"statuses": [s for s, _ in everybodys], "text": "".join(text for _, text in everybodys)}
    return said


def main(folder: Path) -> None:
    with parallel.process_group("cpu"):
        left: dict[str, Any] = {"steps": all_steps(folder)}
        left["whole"] = {kind: make_case(kind, folder / "data", folder / "whole" / kind).run() for kind in KINDS}
        left["killed"] = make_case("clustering", folder / "data", folder / "killed").run()
        left["stopped"] = {kind: stop_again_and_again(kind, folder, kind) for kind in KINDS}
        left["stopped"]["late"] = stop_again_and_again("clustering", folder, "late", fetch_every=3)
        left["out of time"] = run_out_of_time(folder)
        with short_of_memory():
            steps_of("images", False, folder / "data", folder / "short")
        left["refused"] = refuse_all(folder)
        assert parallel.largest(0) == 0  # nobody is ahead
        rank = parallel.rank()
    left["threads"] = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    torch.save(left, folder / f"left by {rank}.pt")


def killed(folder: Path, kind: str, rank: int, n: int) -> int:
    """Train until process `rank` kills itself in its n-th step."""
    steps, sum_gradients = iter(range(1, n + 1)), State.sum_gradients

    def die(state: State, *args: Any, **named: Any) -> torch.Tensor:
        if parallel.rank() == rank and next(steps) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return sum_gradients(state, *args, **named)

    State.sum_gradients = die  # type: ignore[method-assign]
    return make_case(kind, folder / "data", folder / "killed").run()


if __name__ == "__main__":
    place, *how = sys.argv[1:]
    save_often_draw_nothing(pytest.MonkeyPatch())
    if how:
        sys.exit(killed(Path(place), how[1], int(how[2]), int(how[3])))
    main(Path(place))
