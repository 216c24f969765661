r"""What the site needs beyond its theme: formulas without a script, and the notebooks as pages.

Formulas are written in LaTeX, ``\(...\)`` in a line and ``$$...$$`` on lines of their own. They
become MathML when the site is built, which every current browser sets by itself. So a page loads
nothing from another network. Notebooks become pages with the outputs that they are stored with.
For narrow screens, pictures are links to themselves and the cells of tables are marked by length.
"""

import base64
import html
import json
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
PICTURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
CELL = re.compile(r"<td>(.*?)</td>", re.DOTALL)
# Cells of more characters need a column of some width. Cells of fewer are numbers with units, which
# must not be broken.
LONG, SHORT = 40, 16
# What the reference says of an argument of any type.
ANY_TYPE = re.compile(r"\(<code>Any</code>(?:, (default: <code>.*?</code>))?\s*\)")
INLINE_CODE = re.compile(r"<code>([^<]*)</code>")
OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")
# A colour that a terminal would show.
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_page_content(content: str, **_) -> str:
    """Set a page's formulas, and fit its tables, pictures and commands to narrow screens."""
    content = FORMULA.sub(lambda found: as_mathml(found[1], found[2]), content)
    content = CELL.sub(lambda found: as_cell(found[1]), content)
    # A plot of ten panels can't be read at 390 pixels: a tap opens it alone, to be enlarged.
    content = PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', content)
    content = ANY_TYPE.sub(lambda found: f"({found[1]})" if found[1] else "", content)
    return INLINE_CODE.sub(lambda found: f"<code>{unbroken(found[1])}</code>", content)


def as_cell(inside: str) -> str:
    """Return a table's cell, marked where it is long or short."""
    length = len(html.unescape(re.sub(r"<[^>]+>", "", inside)))
    mark = " data-long" if length > LONG else " data-short" if length <= SHORT else ""
    return f"<td{mark}>{inside}</td>"


def unbroken(code: str) -> str:
    """Return code in a line whose options are not broken after their dashes."""
    return OPTION.sub(r'<span class="option">\g<0></span>', code)


def as_mathml(tag: str, formula: str) -> str:
    """Return a formula, with its delimiters, as MathML."""
    latex = html.unescape(formula).strip()[2:-2]
    try:
        mathml = convert(latex, display="inline" if tag == "span" else "block")
    except Exception as error:
        raise PluginError(f"not understood as LaTeX: {latex}") from error
    return mathml if tag == "span" else f'<div class="formula">{mathml}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    folder = pathlib.Path(config.config_file_path).parent / "notebooks"
    for path in sorted(folder.glob("*.ipynb")):
        text, pictures = as_markdown(path)
        name = f"notebooks/{path.stem}"
        files.append(File.generated(config, f"{name}.md", content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def as_markdown(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for index, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # A notebook writes $...$ in a line.
            parts.append(re.sub(r"(?<!\$)\$([^$\n]+)\$(?!\$)", r"\\(\1\\)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for number, output in enumerate(cell["outputs"]):
            name = f"{path.stem}_{index}_{number}.png"
            parts.append(shown(output, name, pictures))
    where = f"!!! note\n    This page is the notebook `notebooks/{path.name}`, with its outputs."
    head, _, rest = parts[0].partition("\n")
    return "\n\n".join([head, where, rest, *parts[1:]]), pictures


def shown(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    """Return one output of a cell as Markdown; put its picture under ``name``."""
    data = output.get("data", {})
    if "image/png" in data:
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![Output of the cell above]({name})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    # The class sets what a cell printed apart from code.
    head = "``` { .text .output }"
    return f"{head}\n{ESCAPES.sub('', text).rstrip()}\n```" if text.strip() else ""
