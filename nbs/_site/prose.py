"""Markdown of notebooks and docstrings, mapped to what MyST reads."""

import os
import re
import shutil
from typing import TYPE_CHECKING

from notebooks import LITERAL, Page

if TYPE_CHECKING:
    from pages import Site

CITED = re.compile(r"Eqs?\.\s*\([\w.-]+\)(?:(?:,| and|, and| or| to|[–-])\s*\([\w.-]+\))*")
EQREF = re.compile(r"\$?\\eqref\{([\w.-]+)\}\$?")
CALLOUT = re.compile(r"^(:{3,})\s*\{\s*\.callout-(\w+)([^}]*)\}\s*\n(.*?)^\1\s*$", re.M | re.S)
LINK = re.compile(r"(!?)(\[[^\]]*\]|\])\(([^)\s]+)((?:\s+\"[^\"]*\")?)\)")


class Prose:
    """Maps Markdown of one page: equations get anchors; citations of equations and names of the
    API get links; callouts become directives.

    Args:
        site: the pages that can be linked to.
        page: the page that the text belongs to: its own symbols and equations come first.
        here: the document that shows the text, if another than the page.
    """

    def __init__(self, site: "Site", page: Page, here: str | None = None) -> None:
        self.site, self.page = site, page
        self.up = "../" * (here or page.doc).count("/")

    def __call__(self, text: str) -> str:
        """Return the text as MyST wants it."""
        text = CALLOUT.sub(self.callout, text)
        out, end = [], 0
        for literal in LITERAL.finditer(text):
            out += [self.words(text[end : literal.start()]), self.literal(literal)]
            end = literal.end()
        return "".join(out) + self.words(text[end:])

    def literal(self, found: re.Match) -> str:
        """Map code or mathematics: names become links, and so do references to equations."""
        if found["code"]:
            return self.code(found)
        if (found["display"] or found["inline"]) and EQREF.fullmatch(found[0]):
            return self.words(found[0])
        return found[0]

    def code(self, found: re.Match) -> str:
        """Link a name of the API, unless it stands in a heading or in a link already."""
        text, words = found.string, found[0].strip("`")
        name = re.sub(r"\(\w*\)$", "", words)
        symbol = self.site.find(name, self.page)
        if symbol is None:  # An attribute of a class; `tune.json` is none of the function `tune`.
            owner = self.site.find(name.rpartition(".")[0], self.page)
            symbol = owner if owner and owner.is_class else None
        line = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        in_link = re.match(r"[^\[\]\n]*\]\(", text[found.end() :])
        if not symbol or line.startswith("#") or in_link:
            return found[0]
        return f"{{py:obj}}`{words} <{symbol.full}>`"

    def callout(self, found: re.Match) -> str:
        """Turn Quarto's callout into an admonition."""
        fence, kind, options, body = found.groups()
        named = re.search(r'title="([^"]*)"', options) or re.match(r"\s*#+ (.*)\n", body)
        title = named[1] if named else kind.capitalize()
        body = re.sub(r"^\s*#+ .*\n", "", body)
        return f"{fence}{{admonition}} {title}\n:class: {kind}\n\n{body}{fence}"

    def words(self, text: str) -> str:
        """Map prose without code and mathematics: anchors, links, citations of equations."""
        text = re.sub(r"^(#+ .*?)\s*\{#([\w-]+)[^}]*\}\s*$", r"(\2)=\n\1", text, flags=re.M)
        text = re.sub(r"^:{3,}\s*(\{[^}]*\})?\s*$", "", text, flags=re.M)
        text = re.sub(r"(\]\([^)\s]*\))\{[^}]*\}", r"\1", text)
        text = LINK.sub(self.relinked, text)
        text = CITED.sub(self.citation, text)
        return EQREF.sub(lambda m: self.equation(m[1]), text)

    def citation(self, found: re.Match) -> str:
        """Link each equation of "Eq. (a) and (b)", and keep the first beside its "Eq."."""
        text = re.sub(r"\.\s*\(", ".\N{NO-BREAK SPACE}(", found[0], count=1)
        return re.sub(r"\(([\w.-]+)\)", lambda m: self.equation(m[1]), text)

    def equation(self, name: str) -> str:
        """Return the link to an equation."""
        page = self.page
        target = page if name in page.tags else self.site.equations.get(name)
        if target is None:
            self.site.problem(page, f"Eq. ({name}) is cited and defined nowhere")
            return f"({name})"
        return f'<a class="eqref" href="{self.up}{target.doc}.html#eq-{name}">({name})</a>'

    def relinked(self, found: re.Match) -> str:
        """Return a Markdown link or image with the target that it has on the site."""
        image, label, target, title = found.groups()
        return f"{image}{label}({self.link(target, bool(image))}{title})"

    def link(self, target: str, image: bool = False) -> str:
        """Return the target of a link on the site, and copy it there if it is an image."""
        if re.match(r"[a-z]+:|#|/", target):
            return target
        name, _, anchor = target.partition("#")
        path = (self.page.path.parent / name).resolve()
        if path in self.site.by_path:
            return f"/{self.site.by_path[path].doc}.ipynb" + (f"#{anchor}" if anchor else "")
        if not path.exists():
            self.site.problem(self.page, f"link to {target}, which does not exist")
            return target
        if image:
            copy = self.site.out / "_images" / path.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
            return f"/_images/{path.name}"
        return f"{self.site.blob}/{os.path.relpath(path, self.site.repo)}"
