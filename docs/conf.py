"Sphinx reads this; `docs/site.py` writes the sources and calls it."

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project, author = "kdnb", "kdnb authors"
copyright = "the kdnb authors, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", "kdnb"
html_static_path, html_extra_path = ["_static"], ["extra"]
html_css_files, html_favicon = ["site.css"], "_static/logo.svg"
html_show_sphinx, html_copy_source, html_show_sourcelink = False, False, False
html_math_renderer = "mathml"       # no script, no font and no other host is needed
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"
add_module_names = False
autodoc_inherit_docstrings = False  # or every `forward` shows PyTorch's text
autodoc_typehints = "none"          # types stand with their parameters
python_maximum_signature_line_length = 88


def mathml(self, node, display):
    latex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad\\text{(\1)}", node.astext())
    if display == "block": latex = latex.replace(r"\tfrac", r"\frac")
    self.body.append(convert(latex, display=display))
    raise nodes.SkipNode


def plain(text):
    "A docstring as reStructuredText: `code` in backquotes, nothing else has a meaning."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(f"`{p}`" if p[:1] == "`" else re.sub(r"([\\*|_])", r"\\\1", p) for p in parts)


def fields(obj):
    "{field: comment} of a NamedTuple."
    found = re.findall(r"(?m)^    (\w+): .*?# (.*)$", inspect.getsource(obj))
    return {name: {"docment": words} for name, words in found}


def no_aliases(app, what, name, obj, skip, options):
    "`Alias for field number 0` says nothing."
    return True if "Alias for field" in (getattr(obj, "__doc__", None) or "") else None


def parameters(app, what, name, obj, options, lines):
    "Docstrings, and the comments of the parameters: shapes, units, ranges."
    lines[:] = [plain(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    try:
        known = fields(obj) if hasattr(obj, "_fields") else docments(obj, full=True)
    except (TypeError, ValueError, AttributeError, OSError, SyntaxError):
        return
    rows = []
    for key, about in known.items():
        if key in ("self", "args", "kwargs") or not about.get("docment"):
            continue
        kind = getattr(about.get("anno"), "__name__", "") if isinstance(about.get("anno"), type) else ""
        field = "returns" if key == "return" else f"param {kind} {key}".replace("  ", " ")
        kind = f"{kind}, " if field == "returns" and kind not in ("", "_empty") else ""
        rows.append(f":{field.replace('_empty ', '')}: {kind}{plain(' '.join(about['docment'].split()))}")
    lines += ["", *rows, ""]


def setup(app):
    app.add_html_math_renderer("mathml", (lambda self, node: mathml(self, node, "inline"), None),
                               (lambda self, node: mathml(self, node, "block"), None))
    app.connect("autodoc-skip-member", no_aliases)
    app.connect("autodoc-process-docstring", parameters)
