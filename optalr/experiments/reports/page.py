"""A comparison as one HTML file that needs no other."""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from optalr.experiments.studies.compare import Comparison
from optalr.experiments.studies.curves import WINDOW, reaching_matrix

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --code: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --code: #262626; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
img { max-width: 100%; background: white; }
pre { background: var(--code); padding: .8rem; overflow-x: auto; }
"""


class TextTable(NamedTuple):
    """A table of text.

    Attributes:
      title: the text above it.
      header: the columns' names.
      rows: the cells, one per column.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def html_page(comparison: Comparison, table: TextTable, *, target: float, picture: bytes) -> str:
    """Return the page: the table, the picture inside it, the configs and the environment.

    Args:
      comparison: the runs.
      table: the numbers of ``curves.summarize`` as text.
      target: a training loss; the table reports when it is first reached.
      picture: a PNG of the curves.
    """
    names, matrix = reaching_matrix(comparison)
    reach = [
        (name, *("-" if math.isnan(step) else f"{step:.0f}" for step in row))
        for name, row in zip(names, matrix, strict=True)
    ]
    title = html.escape(table.title)
    # Inside the page, which can then be sent as one file.
    image = base64.b64encode(picture).decode()
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _html_table(table.header, table.rows),
        f"<p>Final losses are over whole splits. Steps and seconds to {target:.3g} are those after "
        f"which the mean of the last {WINDOW} minibatch losses is there, as the curves "
        "show it (where a step is an epoch, the loss itself); seconds are of training alone, "
        "without compilation and evaluation. (k/n): reached by k of n seeds.</p>",
        f"<img alt='curves' src='data:image/png;base64,{image}'>",
        "<p>Lines are means over seeds, bands reach from the lowest to the highest seed; the test "
        "loss is cut off above the highest mean after the first evaluation. Shaded: the second "
        f"phase; dotted: the training loss {target:.3g}.</p>",
        "<h2>Steps until the final training loss of another config is reached</h2>",
        _html_table(("this config reaches that of", *names), reach),
        "<h2>Configs</h2>",
        *(_config_section(comparison.path, name) for name in comparison.configs),
        "<h2>Environment</h2>",
        f"<pre>{html.escape(_environment(comparison))}</pre></body></html>",
    ]
    return "\n".join(parts)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _config_section(path: Path, name: str) -> str:
    text = (path / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    summary = f"<summary>{html.escape(name)}</summary>"
    return f"<details>{summary}<pre>{html.escape(text)}</pre></details>"


def _environment(comparison: Comparison) -> str:
    """Return what the first run recorded about its machine, which stands for the others."""
    for name in comparison.configs:
        for folder in comparison.runs(name):
            return json.dumps(folder.environment(), indent=2)
    return ""
