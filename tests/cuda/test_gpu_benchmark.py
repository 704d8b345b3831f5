"""benchmarks/gpu.py on the simulated GPU: all sections run, those that fail or are too slow are recorded, the table is made."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

RECORD = {"state": "done", "seconds": 1.0, "not simulated": [], "values": {}}


def test_all_sections_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--smoke", "--out", str(tmp_path)])
    assert status == 0, capsys.readouterr()
    result = json.loads((tmp_path / "simulated.json").read_text())
    assert list(result["sections"]) == list(gpu.SECTIONS)
    assert all(record["state"] == "done" and record["values"] for record in result["sections"].values())
    left_out = {what.split(" (")[0] for record in result["sections"].values() for what in record["not simulated"]}
    assert {"CUDA graphs", "torch.compile", "times and memory", "NCCL", "torch.cuda.set_sync_debug_mode"} <= left_out
    text = (tmp_path / "README.md").read_text()
    assert all(f"\n## {section}\n" in text for section in gpu.SECTIONS) and "None" not in text.replace("None, None", "")


# what a section's process does after its first value, and what becomes of the section
ENDINGS = {
    "": "done",
    "raise ValueError('no kernel')": "failed",
    "import time; time.sleep(100)": "ended at its limit of 2 s",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_section_keeps_what_it_has(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do those before it; the one after it runs."""

    def command(section: str, out: Path, smoke: bool) -> list[str]:
        written = {"not simulated": [], "values": {"card": "A card", "first": 1.5}}
        code = f"import pathlib; pathlib.Path({str(out)!r}).write_text({json.dumps(written)!r})"
        return [sys.executable, "-c", "\n".join([code, ending if section == "waits" else ""])]

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu, "SMOKE_LIMIT", 2)
    status = gpu.main(["--smoke", "--out", str(tmp_path), "--only", "waits", "DUET"])
    sections = json.loads((tmp_path / "A-card.json").read_text())["sections"]
    assert [record["state"] for record in sections.values()] == ["done", ENDINGS[ending], "done"]
    assert all(record["values"]["first"] == 1.5 for record in sections.values())
    assert ("error" in sections["waits"]) == ("raise" in ending) and status == (ENDINGS[ending] != "done")
    assert f"| | {ENDINGS[ending]}, " in (tmp_path / "README.md").read_text()


def test_a_wrong_value_fails_and_a_missed_target_does_not() -> None:
    def record(must: bool, value: float) -> dict[str, Any]:
        return RECORD | {"values": {"a": {"b": {"value": value, "at most": 2.0, "met": value <= 2, "must": must}}}}

    assert gpu.failures(record(True, 3)) == ["wrong: a, b"]
    assert gpu.failures(record(False, 3)) == gpu.failures(record(True, 1)) == []


def test_without_a_gpu_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--smoke simulates one" in error
    assert not list(tmp_path.glob("*"))


def test_cards_stand_beside_each_other() -> None:
    step = {"ms": 1.25, "min": 1.0, "max": 2.0, "n": 5, "peak MiB": 2048.0}
    bounded = {"value": 3.0, "at most": 2.5, "met": False, "must": False}
    first = {"card": "H100", "sections": {"zoo": RECORD | {"values": {"step": step, "ratio": bounded}}}}
    second = {"card": "A100", "sections": {"zoo": RECORD | {"values": {"ratio": bounded | {"met": True, "value": 1.0}}}}}
    lines = gpu.table([first, second]).splitlines()
    assert "| | H100 | A100 |" in lines and "| step | 1.25 ms (n = 5), 2,048 MiB |  |" in lines
    assert "| ratio | 3 (at most 2.5: **missed**) | 1 (at most 2.5: met) |" in lines
