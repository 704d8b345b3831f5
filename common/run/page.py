"""The page of collect_results.py: one HTML file with style, script and data in it, and pictures beside it.

It asks nothing of a network, and its policy lets no other script run. Whatever a run is called or has logged is data in it, and
text on it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from common.run.records import write_text

HERE = Path(__file__).parent


def write_page(path: Path, data: dict[str, Any]) -> None:
    """Write the page of these data, in one step. Raises OSError, and ValueError for a number that is not finite."""
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "DATA": harmless(data), "SCRIPT": script}
    page = re.sub("@([A-Z]+)@", lambda found: parts[found[1]], (HERE / "page.html").read_text())
    write_text(path, page)


def digest(text: str) -> str:
    """How a content security policy names a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def harmless(data: dict[str, Any]) -> str:
    """JSON that ends no script element and begins no comment."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
