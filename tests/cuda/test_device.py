"""The simulated GPU shows what is wrong: planted waits, tensors and generators in the wrong place, forgotten random numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cuda.processes import ROOT, simulated

STEPS = """
import torch

weight = torch.zeros(3, device="cuda", requires_grad=True)
positions = torch.arange(3)
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(4):
    loss = (weight - 1).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
# a line in a step, and what it is reported as
PLANTED = {
    "loss.item()": "wait",
    "if loss > 0: pass": "wait",
    "weight.tolist()": "blocking copy back",
    "weight.cpu()": "blocking copy back",
    "torch.tensor([1.0], device='cuda')": "blocking copy",
    "torch.zeros(2).to('cuda', non_blocking=True)": "async copy",
    "weight.detach().to('cpu', non_blocking=True)": "async copy back",
    "weight[positions]": "blocking copy",
    "weight[weight > 0]": "wait inside index",
    "weight.nonzero()": "wait inside nonzero",
    "torch.linalg.svd(weight.detach().diag())": "wait inside _linalg_svd",
    "torch.cuda.synchronize()": "synchronize",
}

ERRORS = """
import torch
import numpy as np

def message(code):
    try:
        exec(code, {"torch": torch, "np": np})
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "nothing"

codes = CODES
for code, expected in codes.items():
    assert expected in message(code), (code, message(code))
"""
CODES = {
    "torch.zeros(2, device='cuda') + torch.zeros(2)": "Expected all tensors to be on the same device",
    "torch.nn.Linear(2, 2)(torch.zeros(1, 2, device='cuda'))": "Expected all tensors to be on the same device",
    "torch.stack([torch.zeros((), device='cuda'), torch.zeros(())])": "Expected all tensors to be on the same device",
    "torch.zeros(3)[torch.arange(2, device='cuda')]": "indices should be either on cpu or on the same device",
    "torch.rand(2, device='cuda', generator=torch.Generator())": "Expected a 'cuda' device type for generator",
    "torch.randperm(2, generator=torch.Generator('cuda'))": "Expected a 'cpu' device type for generator",
    "torch.ones(2, 2, device='cuda').long() @ torch.ones(2, 2, device='cuda').long()": "not implemented for torch.int64",
    "torch.zeros(2, device='cuda').numpy()": "can't convert cuda:0 device type tensor to numpy",
    "np.asarray(torch.zeros(2, device='cuda'))": "can't convert cuda:0 device type tensor to numpy",
    "torch.zeros(2, device='cuda') + torch.tensor(1.0)": "nothing",
    "torch.zeros(3, device='cuda')[torch.arange(2)]": "nothing",
    "torch.rand(2, device='cuda', generator=torch.Generator('cuda'))": "nothing",
}

RANDOM = """
import torch
from common.run.state import rng_state, set_rng_state

def draw():
    return torch.rand(5, device="cuda").cpu()

torch.manual_seed(1)
before, state = torch.get_rng_state(), rng_state()
first = draw()
assert torch.equal(torch.get_rng_state(), before)  # the device's generator is its own
assert not torch.equal(draw(), first)
set_rng_state(state)
assert torch.equal(draw(), first)
set_rng_state(state | {"cuda": []})  # forgotten
assert not torch.equal(draw(), first)
"""


def run(folder: Path, code: str) -> dict[str, Any]:
    """The report of a script of this text."""
    script = folder / "script.py"
    script.write_text(code)
    return simulated(folder / "report.json", str(script))


def test_planted_waits_are_reported_with_their_lines(tmp_path: Path) -> None:
    report = run(tmp_path, STEPS + "".join(f"    {line}\n" for line in PLANTED))
    first = STEPS.count("\n") + 1
    assert report["events"] == {f"{kind} script.py:{line}": 1 for line, kind in enumerate(PLANTED.values(), first)}
    assert report["steps"] == 4 and report["waits"] == sum("async" not in kind for kind in PLANTED.values())
    assert report["kernels"] > len(PLANTED)


def test_errors_of_a_gpu_are_raised(tmp_path: Path) -> None:
    run(tmp_path, ERRORS.replace("CODES", repr(CODES)))


def test_random_numbers_are_the_devices_own(tmp_path: Path) -> None:
    run(tmp_path, RANDOM)


def test_it_comes_before_torch() -> None:
    code = "import torch\nfrom tests.cuda.device import simulate\nsimulate()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch has been imported" in done.stderr
