"""One notebook as the site reads it: its directives, title, equations and symbols."""

import re
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

from symbols import symbols

OPTION = re.compile(r"^#\|\s*(.*?)\s*$")
TAG = re.compile(r"\\tag\{([\w.-]+)\}")
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
HEAD = re.compile(r"^# (.+?)(?: \{#.*\})?$(?:\s*^((?:>.*\n?)+))?", re.M)

# What is no prose: fenced code, displayed equations, code, formulas.
FENCE = r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)[`~]*[ ]*$"
DISPLAY = r"\$\$.*?\$\$|^\\begin\{(?P<environment>\w+\*?)\}.*?\\end\{(?P=environment)\}"
CODE = r"`[^`\n]+`"
INLINE = r"(?<![\\$])\$(?!\s)[^$\n]*(?:\n(?!\s*\n)[^$\n]*)*(?<!\s)\$(?!\d)"
LITERAL = re.compile(
    f"(?P<fence>{FENCE})|(?P<display>{DISPLAY})|(?P<code>{CODE})|(?P<inline>{INLINE})", re.M | re.S
)


def directives(source: str) -> tuple[set[str], dict[str, Any], str]:
    """Split a code cell into nbdev's flags, Quarto's options and the source that remains."""
    flags, options, rest = set(), [], []
    for line in source.split("\n"):
        directive = OPTION.match(line)
        if not directive:
            rest.append(line)
        elif re.match(r"[\w-]+:(\s|$)", directive[1]):
            options.append(directive[1])
        elif options and re.match(r"[^\w]", directive[1]):
            options[-1] += "\n  " + directive[1]
        else:
            flags.add(directive[1].split()[0] if directive[1] else "")
    values = yaml.safe_load("\n".join(options)) if options else None
    return flags, values or {}, "\n".join(rest).strip("\n")


def is_hidden(flags: set[str], options: dict[str, Any]) -> bool:
    """Return whether a cell with these directives is left out of pages and README."""
    return bool(flags & {"hide", "default_exp"}) or options.get("include") is False


def figure_count(outputs: list[NotebookNode]) -> int:
    """Return how many of the outputs are pictures."""
    return sum(bool({"image/png", "image/svg+xml"} & set(o.get("data", {}))) for o in outputs)


def without_number(name: str) -> str:
    """Return the name of a file or folder without the number that orders it."""
    return re.sub(r"^\d+[a-z]?_", "", name)


def notebook_files(root: Path) -> list[Path]:
    """Return the notebooks below a folder, those in hidden folders left out."""
    files = sorted(root.rglob("*.ipynb"))
    return [p for p in files if not any(part[0] in "_." for part in p.relative_to(root).parts)]


class Page:
    """One notebook: its place, its title, what it defines.

    Args:
        path: the notebook.
        root: folder of all notebooks.
        lib: name of the package.
    """

    def __init__(self, path: Path, root: Path, lib: str) -> None:
        self.path, self.rel = path, path.relative_to(root)
        self.nb = nbformat.read(path, as_version=4)
        self.doc = "/".join(map(without_number, self.rel.with_suffix("").parts))
        folder = self.rel.parts[0] if len(self.rel.parts) > 1 else None
        self.part = folder and without_number(folder).replace("_", " ").capitalize()
        self.symbols, self.tags = [], []
        for cell in self.nb.cells:
            if cell.cell_type == "raw" and cell.source.startswith("---"):
                self.read_front_matter(cell)
        self.module = self.find_module(lib)
        self.title, self.lead = self.find_title()
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                self.read_tags(cell)
            elif cell.cell_type == "code":
                self.read_code(cell)

    def find_module(self, lib: str) -> str | None:
        """Return the full name of the module that the notebook is exported to."""
        found = (MODULE.search(c.source) for c in self.nb.cells if c.cell_type == "code")
        names = [f"{lib}.{m[1]}" for m in found if m]
        return names[-1] if names else None

    def find_title(self) -> tuple[str, str]:
        """Return the H1, and the blockquote below it in one line."""
        found = (HEAD.search(c.source) for c in self.nb.cells if c.cell_type == "markdown")
        head = next(filter(None, found), None)
        if not head:
            return self.rel.stem, ""
        lead = re.sub(r"^> ?", "", head[2] or "", flags=re.M).replace("\n", " ")
        return head[1].strip(), lead.strip()

    def read_front_matter(self, cell: NotebookNode) -> None:
        """Turn Quarto's title and description into an H1 and a blockquote."""
        fields = yaml.safe_load(cell.source.strip("-\n ")) or {}
        lead = f"> {fields['description']}\n" if fields.get("description") else ""
        cell.cell_type = "markdown"
        cell.source = f"# {fields.get('title', self.rel.stem)}\n\n{lead}"

    def read_tags(self, cell: NotebookNode) -> None:
        """Note the tags of the equations of a Markdown cell."""
        for literal in LITERAL.finditer(cell.source):
            self.tags += TAG.findall(literal["display"] or "")

    def read_code(self, cell: NotebookNode) -> None:
        """Note the directives of a code cell, and the symbols that it exports."""
        cell.flags, cell.options, cell.code = directives(cell.source)
        exported = cell.flags & {"export", "exports"} and "hide" not in cell.flags
        cell.symbols = symbols(cell.code, self.module) if exported and self.module else []
        self.symbols += cell.symbols
