"Sphinx's settings; what differs between projects is read from settings.ini."

import ast
import functools
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))
from build import repo, settings
from pages import tag

cfg = settings()
project, author, release, language = cfg["title"], cfg["author"], cfg["version"], "en"
copyright = cfg["copyright"]
extensions = ["myst_nb", "sphinx.ext.linkcode"]
exclude_patterns = ["_extra"]
nitpicky, nitpick_ignore_regex = (
    True,
    [("py:class", ".*")],
)  # our links use py:obj; annotations may name anything
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
html_theme_options = dict(
    top_of_page_buttons=[],
    light_css_variables={
        "color-brand-primary": "#1d5a9f",
        "color-brand-content": "#1d5a9f",
        "color-api-name": "#8a2f6b",
    },
    dark_css_variables={
        "color-brand-primary": "#8ab8f0",
        "color-brand-content": "#8ab8f0",
        "color-api-name": "#f0a3d0",
    },
)
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "github-dark"


@functools.cache
def lines(module):
    "Name -> line of each definition in an exported module."
    path = repo / (module.replace(".", "/") + ".py")
    if not path.exists():
        return {}
    body = ast.parse(path.read_text(encoding="utf-8")).body
    inner = {
        f"{n.name}.{m.name}": m.lineno
        for n in body
        if isinstance(n, ast.ClassDef)
        for m in n.body
        if hasattr(m, "name")
    }
    return {**{n.name: n.lineno for n in body if hasattr(n, "name")}, **inner}


def linkcode_resolve(domain, info):
    line = lines(info["module"]).get(info["fullname"])
    return (
        line
        and f"{cfg['git_url']}/blob/{cfg['branch']}/{info['module'].replace('.', '/')}.py#L{line}"
    )


# Mathematics as written, for the MathJax that lies beside the pages. (Sphinx's own renderer wraps `\\` in a split, where `\tag` is an error.)


def inline_math(self, node):
    formula = (
        self.starttag(node, "span", "", CLASS="math") + rf"\({self.encode(node.astext())}\)</span>"
    )
    self.body.append(
        f'<span class="nowrap">{formula}{self.encode(node["tail"])}</span>'
        if "tail" in node
        else formula
    )
    raise nodes.SkipNode


def display_math(self, node):
    "One `\\tag` is set by the page beside the formula, where a narrow screen can put it below; several stay with their lines."
    text, names = node.astext(), tag.findall(node.astext())
    if len(names) == 1:
        text = tag.sub("", text)
    anchors = "".join(f'<span id="eq-{name}"></span>' for name in names)
    label = f'<a class="eqno" href="#eq-{names[0]}">({names[0]})</a>' if len(names) == 1 else ""
    formula = (
        self.starttag(node, "div", "", CLASS="math") + rf"\[{self.encode(text.strip())}\]</div>"
    )
    self.body.append(f'<div class="equation">{anchors}{formula}{label}</div>')
    raise nodes.SkipNode


def keep_punctuation(app, doctree, docname):
    "A comma stays with the formula before it."
    for node in list(doctree.findall(nodes.math)):
        i = node.parent.index(node) + 1
        after = node.parent[i] if i < len(node.parent) else None
        if isinstance(after, nodes.Text) and (m := re.match(r"[,.;:!?)’”-]+", after)):
            node["tail"], node.parent[i] = m[0], nodes.Text(after[m.end() :])


def copy_mathjax(app, error):
    if error:
        return
    mathjax, out = (
        Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax",
        Path(app.outdir) / "_static" / "mathjax",
    )
    (out / "input" / "tex").mkdir(parents=True, exist_ok=True)
    shutil.copy(mathjax / "tex-svg.js", out)
    shutil.copytree(
        mathjax / "input" / "tex" / "extensions",
        out / "input" / "tex" / "extensions",
        dirs_exist_ok=True,
    )


def has_math(app, pagename, templatename, context, doctree):
    if (
        doctree is not None
        and next(doctree.findall(lambda n: n.tagname in ("math", "math_block")), None) is not None
    ):
        app.add_js_file("mathjax/tex-svg.js", loading_method="defer", priority=900)


def setup(app):
    app.add_html_math_renderer("plain", (inline_math, None), (display_math, None))
    app.config.html_math_renderer = "plain"
    app.connect("doctree-resolved", keep_punctuation)
    app.connect("html-page-context", has_math)
    app.connect("build-finished", copy_mathjax)
