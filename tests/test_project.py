"""What holds for the project as a whole: who imports whom, code in the docs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", ["README.md", "docs/layers.md"])
def test_code_in_the_docs_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
