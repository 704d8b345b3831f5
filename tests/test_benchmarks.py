"""The benchmarks: how they measure, what they write, and that each of them runs."""

import importlib
import json
import os
import pickle
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    measure,
    parallel,
    peak,
    records,
    routing,
    similarity,
    stitching,
    swarm_layer,
    swarm_transformer,
    table,
    train_ssl,
    zoo,
)
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.measure import Bench, Kind, Step, Timings, run_benchmark

ON_REQUEST = {"precision", "similarity_pairs", "parallel"}  # not a part of `make bench`


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "peaks", lambda: {"fp32": 100.0, "bf16": 200.0})


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds take one step each in this process."""

    def alternate(kinds: dict[str, Kind], rounds: int, threads: int, counted: str | None = None) -> dict[str, Timings]:
        timings = {}
        for name, kind in kinds.items():
            wall, cpu, parts = measure._turn(kind.make(), 1, kind.times)
            timings[name] = Timings([wall], [cpu], [parts], None, 10**9 if name == counted else 0)
        return timings

    monkeypatch.setattr(measure, "alternate", alternate)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def one_set(kind: str) -> Step:
    return swarm_layer.make_step(kind, swarm_layer.one_set(30), n_hidden=8)


def test_kinds_alternate_in_processes_of_their_own() -> None:
    names = ("plain", "layer", "products")
    bench = Bench("swarm_layer", 1)
    timings = bench.compare("step", {name: Kind(partial(one_set, name), name != "plain") for name in names}, rounds=3)
    assert all(len(values.wall) == len(values.cpu) == 3 for values in timings.values())
    # the input product, 9 iterations and the output, each of which has two products more in the backward pass
    E, H, labels = 30, 8, swarm_layer.N_LABELS
    operations = 2 * E * 4 * H * 2 * 2 + 9 * 3 * 2 * (E * H * 4 * H + H * 4 * H) + 3 * 2 * E * 2 * H * labels
    assert timings["products"].operations == operations
    plain, layer, products = bench.record["measurements"]
    assert [m["kind"] for m in (plain, layer, products)] == list(names) and {m["work"] for m in (plain, layer, products)} == {
        "step"
    }
    assert set(layer) == {"work", "kind", "n", "seconds", "cpu_seconds", "mib", "speedup", "overhead", "at_peak"}
    assert set(layer["speedup"]) == {"plain"} and set(layer["overhead"]) == {"products", "peak"}
    assert layer["at_peak"] == pytest.approx(operations / 100e9)
    assert layer["overhead"]["peak"] == layer["cpu_seconds"] / layer["at_peak"]
    assert "speedup" not in products and set(products["overhead"]) == {"peak"}
    assert json.loads(json.dumps(bench.record)) == bench.record


def test_ratios_are_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {
        "plain": Timings([8, 9, 30], [4, 4, 40], [{}] * 3, 5.0, 0),
        "suite": Timings([4, 3, 3], [2, 1, 5], [{}] * 3, 5.0, 0),
    }
    monkeypatch.setattr(measure, "alternate", lambda *_: timings)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for threads, gain in ((1, 4.0), (2, 3.0)):  # CPU time, wall time
        bench = Bench("test", threads)
        bench.compare("step", {"plain": Kind(int), "suite": Kind(int)}, 3)
        assert bench.record["measurements"][1]["speedup"] == {"plain": gain}


def test_a_failure_keeps_what_was_measured(one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(bench: Bench) -> None:
        bench.compare("first", {"suite": Kind(lambda: list)}, 1)
        raise RuntimeError("suite: Traceback\nValueError: out of luck")

    monkeypatch.setattr(records.save, "__defaults__", (tmp_path,))
    monkeypatch.setattr(table.write, "__defaults__", (tmp_path,))
    assert run_benchmark("test", run, None, ["--save", "--threads", "1"]) == 1
    (path,) = tmp_path.glob("*.json")
    (record,) = json.loads(path.read_text())["runs"]
    assert record["error"] == "ValueError: out of luck" and [m["work"] for m in record["measurements"]] == ["first"]
    assert "test (1) failed: ValueError: out of luck" in (tmp_path / "README.md").read_text()


def broken() -> Step:
    raise ValueError("no such step")


def test_error_of_a_kind_reaches_the_benchmark() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)bad: .*no such step"):
        measure.alternate({"good": Kind(partial(one_set, "products")), "bad": Kind(broken)}, 1, 1)


# ---- the processor -----------------------------------------------------------------------------------------------------------


def test_peak_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SECONDS", 0.01)
    monkeypatch.setattr(peak, "SHAPES", ((64, 64, 64),))
    for dtype in peak.DTYPES.values():
        rates = peak.measure(dtype)
        assert len(rates) >= 2 and all(0.01 < rate < 1e5 for rate in rates.values())
    assert peak._rate(lambda: time.sleep(0.01), 10**7) <= 1
    monkeypatch.setattr(peak, "measure", lambda dtype: {"a": 1.0, "b": 3.0 if dtype == torch.float32 else 5.0})
    assert peak.peaks() == {"fp32": 3.0, "bf16": 5.0}


def test_machine_is_described() -> None:
    machine = peak.machine()
    assert machine["name"] and machine["cores"] >= 1 and json.loads(json.dumps(machine)) == machine
    assert not peak.multiplies_bf16(machine | {"instructions": ["avx2", "avx512f"]})
    assert peak.multiplies_bf16(machine | {"instructions": ["avx512_bf16"]})


# ---- files and table ---------------------------------------------------------------------------------------------------------

MACHINE = {"name": "A CPU (R) 3.0", "vendor": "V", "family": "6", "model": "1", "cores": 2, "caches": {"L2": "1024K"}} | {
    "instructions": []
}


def record(benchmark: str, threads: int = 1, quick: bool = False, seconds: float = 1.0) -> dict:
    measurements = [{"work": "start of amortised_clustering.py to its first step", "kind": "suite", "seconds": seconds}]
    return records.new(benchmark, threads, quick, {"fp32": 100.0}) | {"measurements": measurements}


def test_file_is_never_another_machines(tmp_path: Path) -> None:
    first = records.save(MACHINE, record("a"), tmp_path)
    assert first.name == "a_cpu_r_3_0_family_6_model_1_2_cores.json"
    content = first.read_bytes()
    other = records.save(MACHINE | {"caches": {"L2": "2048K"}}, record("a"), tmp_path)
    assert other != first and first.read_bytes() == content
    assert records.save(MACHINE | {"caches": {"L2": "2048K"}}, record("b"), tmp_path) == other
    assert [run["benchmark"] for run in json.loads(other.read_text())["runs"]] == ["a", "b"]


def test_runs_replace_those_of_their_benchmark_and_threads(tmp_path: Path) -> None:
    for run in (record("b"), record("a", 2), record("a", 1, seconds=1.0), record("a", 1, seconds=2 / 3)):
        path = records.save(MACHINE, run, tmp_path)
    runs = json.loads(path.read_text())["runs"]
    assert [(run["benchmark"], run["threads"]) for run in runs] == [("a", 1), ("a", 2), ("b", 1)]
    assert runs[0]["measurements"][0]["seconds"] == 0.6667


def test_quick_runs_stay_out_of_full_ones(tmp_path: Path) -> None:
    quick = records.save(MACHINE, record("clustering_data", quick=True, seconds=2.0), tmp_path)
    assert "quick" in table.markdown(tmp_path) and "| 2 s (1) |" in table.markdown(tmp_path)
    full = records.save(MACHINE, record("clustering_data", seconds=4.0), tmp_path)
    assert quick != full and "| 4 s (1) **missed** |" in table.markdown(tmp_path)
    assert "| 2 s" not in table.markdown(tmp_path)


def test_published_table_is_that_of_the_files() -> None:
    assert (records.FOLDER / "README.md").read_text() == table.markdown()


def test_published_files_have_what_a_table_needs() -> None:
    files = records.load()
    assert len(files) >= 2
    for file in files.values():
        assert set(MACHINE) == set(file["machine"])
        for run in file["runs"]:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]) and run["revision"] and run["torch"]
            assert run["measurements"] and all({"work", "kind"} < set(m) for m in run["measurements"])


# ---- each benchmark ----------------------------------------------------------------------------------------------------------


def test_steps_run() -> None:
    before = torch.get_rng_state()
    for kind in ("plain", "plain, tuned", "layer", "bf16", "products", "bf16 products"):
        assert measure.seconds(one_set(kind)) > 0
        if kind != "bf16":
            assert measure.seconds(swarm_transformer.make_step(kind, 1, 5)) > 0
    assert measure.seconds(swarm_transformer.make_sampling(1, 3)) > 0
    assert measure.seconds(swarm_transformer.make_forward("layer", 1, 3)) > 0
    torch.set_rng_state(before)
    assert swarm_layer.a_batch(300)[0].shape[0] == swarm_layer.BATCH


def test_small_benchmarks_run(one_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench("test", 1, quick=True)
    train_ssl.run(bench, batch_size=4, width=1)
    out = capsys.readouterr().out
    assert all(part in out for part in train_ssl.PARTS)
    similarity.compare_cka(bench, [(12, 2, 4, 4)], 1)
    similarity.compare_procrustes(bench, [(12, 2, 4, 4)], 1)
    similarity.compare_libraries(bench, (12, 2, 4, 4), 1)
    routing.run(bench, (4, 8))
    assert "as fast as plain" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmarks_of_networks_run(one_process: None) -> None:
    bench = Bench("test", 1, quick=True)
    stitching.run(bench, width=1)
    zoo.run(bench, width=1)
    kinds = {m["kind"] for m in bench.record["measurements"]}
    assert {"stitched", "channels last", "bf16, channels-last"} <= kinds


@pytest.mark.slow
def test_processes_take_a_step_together() -> None:
    timings = measure.alternate({"2 processes": Kind(partial(parallel.make_step, "clustering", 4, 2, 1))}, 1, 2)
    (parts,) = timings["2 processes"].parts
    assert set(parts) == {"computation", "communication"} and all(value > 0 for value in parts.values())


def test_make_bench_runs_all_and_measures_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {path.stem for path in Path(measure.__file__).parent.glob("*.py") if "return run_benchmark(" in path.read_text()}
    scripts |= {
        path.stem for path in Path(measure.__file__).parent.glob("*.py") if "sys.exit(run_benchmark(" in path.read_text()
    }
    assert scripts == set(BENCHMARKS) | ON_REQUEST
    work: set[tuple[str, str, str]] = set()
    for name in sorted(scripts - {"peak"}):
        module = importlib.import_module(f"benchmarks.{name}")
        for function in ("seconds", "clustering_losses", "zoo_accuracies", "kept_bytes"):  # what measures outside of compare
            if hasattr(module, function):
                value = [1.0, 2.0] if name == "precision" else 1.0
                monkeypatch.setattr(module, function, lambda *_, value=value: value)

        def compare(bench: Bench, title: str, kinds: dict[str, Kind], *_: object, name: str = name, **__: object) -> dict:
            pickle.dumps(kinds)
            work.update((name, title, kind) for kind in kinds)
            return {}

        def add(bench: Bench, title: str, kind: str, name: str = name, **_: object) -> None:
            work.add((name, title, kind))

        monkeypatch.setattr(Bench, "compare", compare)
        monkeypatch.setattr(Bench, "add", add)
        for quick in (True, False):
            module.run(Bench(name, 1, quick))
    absent = {(t.benchmark, t.work, t.kind) for t in table.TARGETS if t.benchmark in scripts} - work
    assert not absent


def test_make_bench_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, "benchmarks.zoo" in command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main([]) == 1
    assert commands == [[f"benchmarks.{name}", "--threads", n, "--save"] for name in BENCHMARKS for n in "12"]
    assert capsys.readouterr().out.endswith("failed: zoo with 1 threads, zoo with 2 threads\n")
    commands.clear()
    assert main(["--quick"]) == 1
    assert commands == [[f"benchmarks.{name}", "--threads", "2", "--save", "--quick"] for name in BENCHMARKS]
