"""Committed, executed notebooks become the sources that MyST-NB reads: nbdev's directives and
Quarto's habits are mapped, nothing is run."""

import os
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from notebooks import LITERAL, Page, figure_count, is_hidden, notebook_files
from prose import Prose
from symbols import Symbol, is_check, only_imports

METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python", "pygments_lexer": "python"},
}
PROGRAMS = ("bench", "cli", "evidence")  # rooms whose functions serve a command or an experiment
SHOW_DOC = re.compile(r"^show_doc\(([\w.]+)", re.M)


class Site:
    """All pages, and what they need to know of one another.

    Args:
        root: folder of the notebooks.
        lib: name of the package.
        git: address of the repository.
        branch: the branch that links lead to.
        repo: folder of the repository.
    """

    def __init__(self, root: Path, lib: str, git: str, branch: str, repo: Path) -> None:
        self.root, self.lib, self.repo = Path(root), lib, Path(repo)
        self.blob = f"{git}/blob/{branch}"
        self.problems = []
        self.pages = [Page(path, self.root, lib) for path in notebook_files(self.root)]
        self.by_path = {page.path.resolve(): page for page in self.pages}
        self.equations, self.known, self.local_words = {}, {}, set()
        for page in self.pages:
            for tag in page.tags:
                self.equations.setdefault(tag, page)
            for symbol in page.symbols:
                for named in (symbol, *symbol.members()):
                    self.learn(named)

    def learn(self, symbol: Symbol) -> None:
        """Enter a symbol under each name that prose may call it by, and its arguments' names."""
        self.local_words |= {a.name for a in (*symbol.arguments, *symbol.attributes)}
        if symbol.owner:
            self.local_words.add(symbol.name.rpartition(".")[2])
        module = symbol.module.removeprefix(f"{self.lib}.")
        prefixes = ("", f"{symbol.module}.", f"{module}.", f"{module.split('.')[-1]}.")
        for name in {prefix + symbol.name for prefix in prefixes}:
            self.known.setdefault(name, []).append(symbol)

    def find(self, name: str, page: Page) -> Symbol | None:
        """Return what a name means on a page: its own symbol first, else the only one so called.

        A word alone, such as `sample`, may be meant as an argument, a method or an option. Away
        from its page it means a function only if nothing else is called so, and no program's.
        """
        found = self.known.get(name, [])
        own = [symbol for symbol in found if symbol.module == page.module]
        if own or len(found) != 1:
            return own[0] if own else None
        room = found[0].module.removeprefix(f"{self.lib}.").partition(".")[0]
        unclear = name in self.local_words or room in PROGRAMS
        return None if "." not in name and unclear else found[0]

    def problem(self, page: Page, text: str) -> None:
        """Note a complaint about a page, once."""
        line = f"{page.rel}: {text}"
        if line not in self.problems:
            self.problems.append(line)

    # Cells

    def convert(self, page: Page) -> list[NotebookNode]:
        """Return the cells of a page as MyST-NB reads them."""
        cells, headed, prose = [], False, Prose(self, page)
        code = [c.source for c in page.nb.cells if c.cell_type == "code"]
        explicit = set(SHOW_DOC.findall("\n".join(code)))
        for n, cell in enumerate(page.nb.cells):
            if cell.cell_type == "code":
                cells += self.code_cell(cell, n, page, explicit)
            if cell.cell_type != "markdown":
                continue
            source = prose(cell.source)
            if page.doc == "index":
                source = self.with_cards(source, page)
            if not headed and re.match(r"#[^#]", source.lstrip()):
                source, headed = self.head(source, page), True
            elif headed and re.search(r"^# ", LITERAL.sub("", cell.source), re.M):
                self.problem(page, f"cell {n}: a second H1")
            cells.append(new_markdown_cell(source))
        if not headed:
            self.problem(page, "no H1")
        return cells

    def head(self, source: str, page: Page) -> str:
        """Set below title and lead: the module, the notebook at the repository, the notebook."""
        up, links = "../" * page.doc.count("/"), []
        if page.symbols:
            anchor = re.sub(r"[._]", "-", page.module)
            name = f"<code>{page.module}</code>"
            links.append(f'<a class="module" href="{up}api.html#{anchor}">{name}</a>')
        there = escape(os.path.relpath(page.path, self.repo))
        links.append(f'<a href="{self.blob}/{there}">source notebook</a>')
        links.append(f'<a href="{up}notebooks/{page.rel.as_posix()}" download>download</a>')
        title = re.match(r"\s*# .*\n?(?:\s*(?:^>.*\n?)+)?", source, re.M)
        meta = f'<p class="nb-meta">{" ".join(links)}</p>'
        return f"{title[0].rstrip()}\n\n{meta}\n\n{source[title.end() :].lstrip()}"

    def code_cell(
        self, cell: NotebookNode, n: int, page: Page, explicit: set[str]
    ) -> list[NotebookNode]:
        """Return a code cell, its directives obeyed, and the API entries of what it exports.

        Args:
            cell: the cell.
            n: its number, for complaints.
            page: the page that it stands on.
            explicit: names that a `show_doc` of the page places elsewhere.
        """
        shown = SHOW_DOC.findall(cell.source)
        documented = [s for s in cell.symbols if s.name not in explicit]
        documented += filter(None, (self.find(name, page) for name in shown))
        entries = [new_markdown_cell(s.markdown(Prose(self, page))) for s in documented]
        if is_hidden(cell.flags, cell.options):
            return []
        if shown or not cell.code.strip():
            return entries
        outputs = self.outputs(cell, n, page)
        metadata = self.metadata(cell, n, page, drawn=figure_count(outputs) > 0)
        if cell.options.get("output") is False:
            outputs = []
        return [new_code_cell(cell.code, outputs=outputs, metadata=metadata), *entries]

    def metadata(self, cell: NotebookNode, n: int, page: Page, drawn: bool) -> dict[str, Any]:
        """Return MyST-NB's metadata of a cell.

        The code of a figure, imports and checks are folded behind one word, and their outputs stay
        in sight. `#| code-fold:` overrides this, and `#| code-summary:` the word.

        Args:
            cell: the cell.
            n: its number, for complaints.
            page: the page that it stands on.
            drawn: whether it draws a figure.
        """
        options, tags = cell.options, []
        alt = str(options.get("fig-alt", ""))
        mystnb = {"image": {"alt": alt}}
        if drawn and not alt.strip():
            self.problem(page, f'cell {n} draws a figure without `#| fig-alt: "..."`')
        if options.get("fig-cap"):
            mystnb["figure"] = {"caption": options["fig-cap"]}
        if options.get("echo") is False:
            tags.append("remove-input")
        summary = fold_summary(cell, drawn)
        if options.get("code-fold", bool(summary)) in (True, "true"):
            tags.append("hide-input")
            summary = options.get("code-summary", summary or "Code")
            mystnb["code_prompt_show"] = mystnb["code_prompt_hide"] = summary
        return {"tags": tags, "mystnb": mystnb}

    def outputs(self, cell: NotebookNode, n: int, page: Page) -> list[NotebookNode]:
        """Return outputs as they were saved; a progress bar keeps its last state only."""
        for output in cell.outputs:
            if output.output_type == "stream":
                text = output.text.replace("\r\n", "\n")
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", text).strip("\n") + "\n"
            if output.output_type == "error":
                error = f"{output.ename}: {output.evalue}"
                self.problem(page, f"cell {n} was saved with an error: {error}")
            html = output.get("data", {}).get("text/html", "")
            if re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", html):
                self.problem(page, f"cell {n} shows an <img> without alt text")
        return [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]

    # Pages of our own

    def parts(self) -> dict[str, list[Page]]:
        """Return the pages of each part, in the order of the folders."""
        found = {}
        for page in self.pages:
            if page.part:
                found.setdefault(page.part, []).append(page)
        return found

    def with_cards(self, source: str, index: Page) -> str:
        """Return the landing page with a card for each part where the README has its table."""
        prose, cards = Prose(self, index), []
        for part, pages in self.parts().items():
            leads = [f" — {prose(page.lead)}" if page.lead else "" for page in pages]
            items = [f"- [{p.title}](/{p.doc}.ipynb){lead}" for p, lead in zip(pages, leads)]
            listed = "\n".join(items)
            cards.append(f"::::{{container}} card\n**{part}**\n\n{listed}\n::::")
        whole = ":::::{container} cards\n" + "\n\n".join(cards) + "\n:::::\n"
        table = r"^\| part \| pages \|\n(?:\|.*\n?)+"
        return re.sub(table, lambda _: whole, source, flags=re.M)

    def tree(self) -> str:
        """Return the sidebar: parts and their pages, then the API."""
        parts = {part: [f"/{page.doc}" for page in pages] for part, pages in self.parts().items()}
        blocks = []
        for part, docs in (*parts.items(), ("Reference", ["/api"])):
            entries = "\n".join(docs)
            blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n{entries}\n```")
        return "\n\n".join(blocks)

    def api(self) -> str:
        """Return the page of every public name, by module, with its one line."""
        lead = f"> Every public name of `{self.lib}`, by module, with its summary."
        out = [f"# API\n\n{lead} Each leads to its signature and its derivation.\n"]
        for page in self.pages:
            if not page.symbols:
                continue
            prose, anchor = Prose(self, page, here="api"), page.module.replace(".", "-")
            out.append(
                f"({anchor})=\n## `{page.module}`\n\nFrom [{page.title}](/{page.doc}.ipynb).\n"
            )
            out += ["| Name | What it is |", "| --- | --- |"]
            for symbol in page.symbols:
                summary = prose(symbol.doc.summary).replace("|", r"\|")
                out.append(f"| {{py:obj}}`{symbol.name} <{symbol.full}>` | {summary} |")
            out.append("")
        return "\n".join(out)

    def write(self, out: Path) -> None:
        """Write all sources, and the notebooks that can be downloaded.

        Args:
            out: folder that is made anew.

        Raises:
            SystemExit: if there is no landing page.
        """
        self.out = Path(out)
        shutil.rmtree(self.out, ignore_errors=True)
        (self.out / "_extra").mkdir(parents=True)
        for page in self.pages:
            cells = self.convert(page)
            if page.doc == "index":
                cells.append(new_markdown_cell(self.tree()))
            target = self.out / f"{page.doc}.ipynb"
            copy = self.out / "_extra" / "notebooks" / page.rel
            for path in (target, copy):
                path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(new_notebook(cells=cells, metadata=METADATA), target)
            shutil.copy(page.path, copy)
        (self.out / "api.md").write_text(self.api(), encoding="utf-8")
        if not any(page.doc == "index" for page in self.pages):
            raise SystemExit(f"{self.root}: no index.ipynb")


def fold_summary(cell: NotebookNode, drawn: bool) -> str | None:
    """Return the word behind which the code of a cell is folded, None where it is shown.

    Args:
        cell: a code cell of a page.
        drawn: whether it draws a figure.
    """
    if only_imports(cell.code):
        return "Imports"
    if drawn:
        return "Code of the figure"
    exported = cell.flags & {"export", "exports"}
    return "Check" if is_check(cell.code) and not exported else None
