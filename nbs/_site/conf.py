"""Sphinx's settings; what differs between projects is read from settings.ini."""

import ast
import functools
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Never

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))
from build import repo, settings
from notebooks import TAG

cfg = settings()
project, author, release, language = cfg["title"], cfg["author"], cfg["version"], "en"
copyright = cfg["copyright"]
extensions = ["myst_nb", "sphinx.ext.linkcode"]
exclude_patterns = ["_extra"]
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # our links use py:obj; annotations may name anything
smartquotes_action = "qe"

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # else a table in an output stays text
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]
python_maximum_signature_line_length = 70
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = project
html_baseurl = cfg["doc_host"] + cfg["doc_baseurl"] + "/"
html_static_path = [str(here / "static")]
html_favicon = str(here / "static" / "favicon.svg")
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = html_show_sourcelink = html_use_index = False
html_logo = str(here / "static" / "favicon.svg")


def colors(brand: str, name: str) -> dict[str, str]:
    """Return the theme's variables of a color scheme: of links, and of names in signatures."""
    keys = ("color-brand-primary", "color-brand-content", "color-api-name")
    return dict(zip(keys, (brand, brand, name)))


html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": colors("#1d5a9f", "#8a2f6b"),
    "dark_css_variables": colors("#8ab8f0", "#f0a3d0"),
}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"


@functools.cache
def lines(module: str) -> dict[str, int]:
    """Return the line of each definition in an exported module, by name."""
    path = repo / (module.replace(".", "/") + ".py")
    if not path.exists():
        return {}
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if hasattr(node, "name"):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            members = [member for member in node.body if hasattr(member, "name")]
            found |= {f"{node.name}.{member.name}": member.lineno for member in members}
    return found


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return the address of a definition's line, None where there is none.

    Args:
        domain: the language.
        info: `module` and `fullname` of what is defined.
    """
    line = lines(info["module"]).get(info["fullname"])
    path = info["module"].replace(".", "/")
    return line and f"{cfg['git_url']}/blob/{cfg['branch']}/{path}.py#L{line}"


# Mathematics as written, for the MathJax that lies beside the pages. Sphinx's own renderer wraps
# `\\` in a split, where `\tag` is an error.


def inline_math(self: HTML5Translator, node: nodes.math) -> Never:
    """Write a formula of a line, with the punctuation that must not leave it."""
    start = self.starttag(node, "span", "", CLASS="math")
    formula = rf"{start}\({self.encode(node.astext())}\)</span>"
    if "tail" in node:
        formula = f'<span class="nowrap">{formula}{self.encode(node["tail"])}</span>'
    self.body.append(formula)
    raise nodes.SkipNode


def display_math(self: HTML5Translator, node: nodes.math_block) -> Never:
    r"""Write a displayed equation.

    One `\tag` is set by the page beside the formula, where a narrow screen can put it below;
    several stay with their lines.
    """
    text, names = node.astext(), TAG.findall(node.astext())
    label = ""
    if len(names) == 1:
        text = TAG.sub("", text)
        label = f'<a class="eqno" href="#eq-{names[0]}">({names[0]})</a>'
    anchors = "".join(f'<span id="eq-{name}"></span>' for name in names)
    start = self.starttag(node, "div", "", CLASS="math")
    formula = rf"{start}\[{self.encode(text.strip())}\]</div>"
    self.body.append(f'<div class="equation">{anchors}{formula}{label}</div>')
    raise nodes.SkipNode


def keep_punctuation(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Keep a comma with the formula before it."""
    for node in list(doctree.findall(nodes.math)):
        i = node.parent.index(node) + 1
        after = node.parent[i] if i < len(node.parent) else None
        mark = re.match(r"[,.;:!?)’”-]+", after) if isinstance(after, nodes.Text) else None
        if mark:
            node["tail"], node.parent[i] = mark[0], nodes.Text(after[mark.end() :])


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax beside the pages: they ask no other host."""
    if error:
        return
    package = Path(find_spec("sphinx-mathjax-offline").origin).parent
    source, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
    extensions = Path("input", "tex", "extensions")
    shutil.copytree(source / extensions, target / extensions, dirs_exist_ok=True)
    shutil.copy(source / "tex-svg.js", target)


def has_math(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    """Load MathJax on pages with mathematics."""
    math = (nodes.math, nodes.math_block)
    if doctree is not None and any(isinstance(node, math) for node in doctree.findall()):
        app.add_js_file("mathjax/tex-svg.js", loading_method="defer", priority=900)


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx's events."""
    app.add_html_math_renderer("plain", (inline_math, None), (display_math, None))
    app.config.html_math_renderer = "plain"
    app.connect("doctree-resolved", keep_punctuation)
    app.connect("html-page-context", has_math)
    app.connect("build-finished", copy_mathjax)
