"""What holds for the project as a whole: who imports whom, the README's code, the benchmarks' pieces."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import similarity as similarity_benchmark
from benchmarks import stitching, swarm_layer, swarm_transformer, train_ssl
from benchmarks import zoo as zoo_benchmark

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_nodes = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{alias.name}" for node in from_nodes for alias in node.names}


@pytest.mark.parametrize("path", sorted((ROOT / "common").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """common never imports a script; what is not of a run or a picture imports neither, so that it is of use elsewhere."""
    imported = imports(path)
    assert not any(name.split(".")[0] in SCRIPTS for name in imported)
    if path.parent.name not in ("run", "gallery", "zoo"):
        assert not any(name.startswith("common.run") for name in imported)
    if path.parent.name not in ("run", "gallery") and path.name not in ("plotting.py", "pictures.py"):
        assert not any(name.startswith("common.plotting") for name in imported)


@pytest.mark.slow
def test_importing_touches_no_device_and_no_file(tmp_path: Path) -> None:
    modules = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in (ROOT / "common").rglob("*.py")]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import importlib, torch
for name in {SCRIPTS + modules!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_code_in_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_benchmark_steps_run() -> None:
    batch = swarm_layer.one_set(30)
    before = torch.get_rng_state()
    for kind in ("plain", "layer", "bf16", "products"):
        assert swarm_layer.seconds(swarm_layer.make_step(kind, batch, "cpu")) > 0
        if kind != "bf16":
            assert swarm_layer.seconds(swarm_transformer.make_step(kind, 1, 5, "cpu")) > 0
    torch.set_rng_state(before)
    assert swarm_layer.a_batch(300)[0].shape[0] == swarm_layer.BATCH


def test_benchmark_of_the_ssl_step_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_ssl.main(["--batch-size", "4", "--encoder-width", "1", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    for part in (*train_ssl.PARTS, "images per second", "times as fast as plain"):
        assert part in out


@pytest.mark.slow
def test_benchmark_of_stitching_runs(capsys: pytest.CaptureFixture[str]) -> None:
    stitching.compare_steps([14], width=1, rounds=1, device="cpu")
    assert "times as fast" in capsys.readouterr().out
    assert stitching.peak_memory("stitched", 14, width=1, threads=1) > 0


@pytest.mark.slow
def test_benchmark_of_a_zoo_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo_benchmark.main(["--width", "1", "--steps", "1", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 16 and "models/hour" in lines[1] and all(line.endswith("x") for line in lines[2:])


@pytest.mark.slow
def test_benchmark_of_similarity_runs(capsys: pytest.CaptureFixture[str]) -> None:
    similarity_benchmark.compare_cka([(12, 2, 4, 4)], rounds=1)
    similarity_benchmark.compare_procrustes([(12, 2, 4, 4)], rounds=1)
    similarity_benchmark.growth([8], [2], rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert sum("as fast as plain" in line for line in lines) == 2
    assert all(float(line.split("off by")[1]) < 1e-5 for line in lines if "off by" in line)
    peak, time = similarity_benchmark.measure_in_own_process("wreath_cka", (12, 2, 4, 4))
    assert peak > 0 and time > 0
