"""The documentation site: `make docs` builds docs/en and docs/zh with Sphinx. A broken link is an error."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

project = "Xinglin 杏林"
author = "The Xinglin authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # examples of files have no lexer of their own
html_theme = "furo"
html_title = f"Xinglin 杏林 {release}"
html_copy_source = False
html_show_sphinx = False
