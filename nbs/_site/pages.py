"Committed, executed notebooks -> sources that MyST-NB reads: nbdev's directives and Quarto's habits are mapped, nothing is run."

import os
import re
import shutil
from html import escape
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_markdown_cell
from symbols import only_imports, symbols

option = re.compile(r"^#\|\s*(.*?)\s*$")
fence = r"^(?P<f>`{3,}|~{3,}).*?^(?P=f)[`~]*[ ]*$"
display, inline = (
    r"\$\$.*?\$\$|^\\begin\{(\w+\*?)\}.*?\\end\{\4\}",
    r"(?<![\\$])\$(?!\s)[^$\n]*(?:\n(?!\s*\n)[^$\n]*)*(?<!\s)\$(?!\d)",
)
literal = re.compile(f"({fence})|({display})|(`[^`\n]+`)|({inline})", re.M | re.S)
tag = re.compile(r"\\tag\{([\w.-]+)\}")
cited = re.compile(r"Eqs?\.\s*\([\w.-]+\)(?:(?:,| and|, and| or| to|[–-])\s*\([\w.-]+\))*")
eqref = re.compile(r"\$?\\eqref\{([\w.-]+)\}\$?")
callout = re.compile(r"^(:{3,})\s*\{\s*\.callout-(\w+)([^}]*)\}\s*\n(.*?)^\1\s*$", re.M | re.S)
bare = lambda name: re.sub(r"^\d+[a-z]?_", "", name)


def directives(source):
    "nbdev flags, Quarto options and the remaining source of a code cell."
    lines, flags, options = source.split("\n"), set(), []
    rest = [l for l in lines if not option.match(l)]
    for text in (m[1] for m in map(option.match, lines) if m):
        if re.match(r"[\w-]+:(\s|$)", text):
            options.append(text)
        elif options and re.match(r"[^\w]", text):
            options[-1] += "\n  " + text
        else:
            flags.add(text.split()[0] if text else "")
    return (
        flags,
        (yaml.safe_load("\n".join(options)) or {}) if options else {},
        "\n".join(rest).strip("\n"),
    )


class Page:
    "One notebook: where it lies, what it is called, what it defines."

    def __init__(self, path, root, lib):
        self.path, self.rel = path, path.relative_to(root)
        self.nb = nbformat.read(path, as_version=4)
        self.doc = "/".join(map(bare, self.rel.with_suffix("").parts))
        self.part = (
            bare(self.rel.parts[0]).replace("_", " ").capitalize()
            if len(self.rel.parts) > 1
            else None
        )
        self.title, self.lead, self.symbols, self.tags, self.module = (
            self.rel.stem,
            "",
            [],
            [],
            None,
        )
        for cell in self.nb.cells:
            if cell.cell_type == "code" and (
                m := re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M)
            ):
                self.module = f"{lib}.{m[1]}"
            if cell.cell_type == "raw" and cell.source.startswith("---"):
                self.front_matter(cell)
        heads = (
            re.search(r"^# (.+?)(?: \{#.*\})?$(?:\s*^((?:>.*\n?)+))?", c.source, re.M)
            for c in self.nb.cells
            if c.cell_type == "markdown"
        )
        if m := next(filter(None, heads), None):
            self.title, self.lead = (
                m[1].strip(),
                re.sub(r"^> ?", "", m[2] or "", flags=re.M).replace("\n", " ").strip(),
            )
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                self.tags += [
                    t for m in literal.finditer(cell.source) if m[3] for t in tag.findall(m[3])
                ]
            else:
                flags, options, source = directives(cell.source)
                cell.flags, cell.options, cell.code = flags, options, source
                if flags & {"export", "exports"} and "hide" not in flags and self.module:
                    cell.symbols = symbols(source, self.module)
                self.symbols += cell.get("symbols", [])

    def front_matter(self, cell):
        "Quarto's title and description become what every other notebook writes: an H1 and a blockquote."
        fields = yaml.safe_load(cell.source.strip("-\n ")) or {}
        lead = f"> {fields['description']}\n" if fields.get("description") else ""
        cell.cell_type, cell.source = (
            "markdown",
            f"# {fields.get('title', self.rel.stem)}\n\n{lead}",
        )


class Site:
    "All pages, and what they need to know of one another."

    def __init__(self, root, lib, git, branch, repo):
        self.root, self.lib, self.blob, self.repo, self.problems = (
            Path(root),
            lib,
            f"{git}/blob/{branch}",
            Path(repo),
            [],
        )
        files = sorted(
            p
            for p in self.root.rglob("*.ipynb")
            if not any(part[0] in "_." for part in p.relative_to(self.root).parts)
        )
        self.pages = [Page(p, self.root, lib) for p in files]
        self.by_path = {p.path.resolve(): p for p in self.pages}
        self.equations, self.known = {}, {}
        for page in self.pages:
            for t in page.tags:
                self.equations.setdefault(t, page)
            for s in [s for o in page.symbols for s in (o, *o.members())]:
                short = s.module.removeprefix(f"{lib}.")
                for name in {
                    s.name,
                    s.full,
                    f"{short}.{s.name}",
                    f"{short.split('.')[-1]}.{s.name}",
                }:
                    self.known.setdefault(name, []).append(s)

    def find(self, name, page):
        "What a name means on a page: its own symbol first, else the only one so called."
        found = self.known.get(name, [])
        return next(
            (s for s in found if s.module == page.module), found[0] if len(found) == 1 else None
        )

    def problem(self, page, text):
        if (line := f"{page.rel}: {text}") not in self.problems:
            self.problems.append(line)

    # Markdown

    def prose(self, text, page):
        "Markdown as MyST wants it: equations get anchors, citations and names of the API get links, callouts their directive."
        out, end = [], 0
        for m in literal.finditer(text := callout.sub(self.callout, text)):
            out += [self.words(text[end : m.start()], page), self.keep(m, text, page)]
            end = m.end()
        return "".join(out) + self.words(text[end:], page)

    def keep(self, m, text, page):
        if m[3]:
            return self.words(m[0], page) if eqref.fullmatch(m[0]) else m[0]
        if m[5]:
            return self.code(m[0], text, m, page)
        if m[6] and eqref.fullmatch(m[0]):
            return self.words(m[0], page)
        return m[0]

    def code(self, code, text, m, page):
        "A name of the API becomes a link, unless it stands in a heading or in a link already."
        name, line = (
            re.sub(r"\(\w*\)$", "", code.strip("`")),
            text[text.rfind("\n", 0, m.start()) + 1 : m.start()],
        )
        found = self.find(name, page) or self.find(name.rpartition(".")[0], page)
        if not found or line.startswith("#") or re.match(r"[^\[\]\n]*\]\(", text[m.end() :]):
            return code
        return f"{{py:obj}}`{code.strip('`')} <{found.full}>`"

    def callout(self, m):
        title = (re.search(r'title="([^"]*)"', m[3]) or [0, ""])[1] or (
            t[1] if (t := re.match(r"\s*#+ (.*)\n", m[4])) else m[2].capitalize()
        )
        return (
            f"{m[1]}{{admonition}} {title}\n:class: {m[2]}\n\n"
            + re.sub(r"^\s*#+ .*\n", "", m[4])
            + m[1]
        )

    def words(self, text, page):
        text = re.sub(r"^(#+ .*?)\s*\{#([\w-]+)[^}]*\}\s*$", r"(\2)=\n\1", text, flags=re.M)
        text = re.sub(r"^:{3,}\s*(\{[^}]*\})?\s*$", "", text, flags=re.M)
        text = re.sub(r"(\]\([^)\s]*\))\{[^}]*\}", r"\1", text)
        text = re.sub(
            r"(!?)(\[[^\]]*\]|\])\(([^)\s]+)((?:\s+\"[^\"]*\")?)\)",
            lambda m: f"{m[1]}{m[2]}({self.link(m[3], page, bool(m[1]))}{m[4]})",
            text,
        )
        whole = lambda m: re.sub(r"\.\s*\(", ".\N{NO-BREAK SPACE}(", m[0], count=1)
        text = cited.sub(
            lambda m: re.sub(r"\(([\w.-]+)\)", lambda e: self.equation(e[1], page), whole(m)), text
        )
        return eqref.sub(lambda m: self.equation(m[1], page), text)

    def equation(self, name, page):
        target = page if name in page.tags else self.equations.get(name)
        if target is None:
            self.problem(page, f"Eq. ({name}) is cited and defined nowhere")
            return f"({name})"
        return f'<a class="eqref" href="{"../" * self.here.count("/")}{target.doc}.html#eq-{name}">({name})</a>'

    def link(self, target, page, image=False):
        if re.match(r"[a-z]+:|#|/", target):
            return target
        path, _, anchor = target.partition("#")
        path = (page.path.parent / path).resolve()
        if path in self.by_path:
            return f"/{self.by_path[path].doc}.ipynb" + (f"#{anchor}" if anchor else "")
        if not path.exists():
            self.problem(page, f"link to {target}, which does not exist")
            return target
        if image:
            copy = self.out / "_images" / path.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
            return f"/_images/{path.name}"
        return f"{self.blob}/{os.path.relpath(path, self.repo)}"

    # Cells

    def convert(self, page):
        cells, headed, self.here = [], False, page.doc
        explicit = {
            m
            for c in page.nb.cells
            if c.cell_type == "code"
            for m in re.findall(r"^show_doc\(([\w.]+)", c.source, re.M)
        }
        for n, cell in enumerate(page.nb.cells):
            if cell.cell_type == "markdown":
                source = self.prose(cell.source, page)
                if page.doc == "index":
                    source = re.sub(
                        r"^\| part \| pages \|\n(?:\|.*\n?)+",
                        lambda m: self.cards(page),
                        source,
                        flags=re.M,
                    )
                if not headed and re.match(r"#[^#]", source.lstrip()):
                    source, headed = self.head(source, page), True
                elif headed and re.search(r"^# ", literal.sub("", cell.source), re.M):
                    self.problem(page, f"cell {n}: a second H1")
                cells.append(new_markdown_cell(source))
            elif cell.cell_type == "code":
                cells += self.code_cell(cell, n, page, explicit)
        if not headed:
            self.problem(page, "no H1")
        nb = nbformat.v4.new_notebook(
            cells=cells,
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3"},
                "language_info": {"name": "python", "pygments_lexer": "python"},
            },
        )
        target = self.out / f"{page.doc}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.doc == "index":
            cells.append(new_markdown_cell(self.tree()))
        nbformat.write(nb, target)
        copy = self.out / "_extra" / "notebooks" / page.rel
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page.path, copy)

    def head(self, source, page):
        "Below title and lead: the module, the notebook at the repository, the notebook itself."
        up = "../" * page.doc.count("/")
        links = (
            [
                f'<a class="module" href="{up}api.html#{re.sub(r"[._]", "-", page.module)}"><code>{page.module}</code></a>'
            ]
            if page.symbols
            else []
        )
        links += [
            f'<a href="{self.blob}/{escape(os.path.relpath(page.path, self.repo))}">source notebook</a>'
        ]
        links += [f'<a href="{up}notebooks/{page.rel.as_posix()}" download>download</a>']
        m = re.match(r"\s*# .*\n?(?:\s*(?:^>.*\n?)+)?", source, re.M)
        return f'{m[0].rstrip()}\n\n<p class="nb-meta">{" ".join(links)}</p>\n\n{source[m.end() :].lstrip()}'

    def code_cell(self, cell, n, page, explicit):
        flags, options = cell.flags, cell.options
        shown = [m for m in re.findall(r"^show_doc\(([\w.]+)", cell.source, re.M)]
        docs = [s for s in cell.get("symbols", []) if s.name not in explicit] + [
            s for name in shown if (s := self.find(name, page))
        ]
        entries = [new_markdown_cell(s.markdown(lambda text: self.prose(text, page))) for s in docs]
        if flags & {"hide", "default_exp"} or options.get("include") is False:
            return []
        if shown:
            return entries
        if not cell.code.strip():
            return entries
        cell.source, tags, outputs = cell.code, [], self.outputs(cell, n, page)
        drawn = any(
            "image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {})
            for o in outputs
        )
        if options.get("echo") is False:
            tags.append("remove-input")
        if options.get("output") is False:
            outputs = []
        mystnb = {"image": {"alt": options.get("fig-alt", "")}}
        if drawn and not str(options.get("fig-alt", "")).strip():
            self.problem(page, f'cell {n} draws a figure without `#| fig-alt: "..."`')
        imports = only_imports(cell.source)
        if options.get("code-fold", drawn or imports) in (True, "true"):
            tags.append("hide-input")
            summary = options.get(
                "code-summary", "Imports" if imports else "Code of the figure" if drawn else "Code"
            )
            mystnb["code_prompt_show"] = mystnb["code_prompt_hide"] = summary
        if options.get("fig-cap"):
            mystnb["figure"] = {"caption": options["fig-cap"]}
        return [
            nbformat.v4.new_code_cell(
                cell.source, outputs=outputs, metadata={"tags": tags, "mystnb": mystnb}
            ),
            *entries,
        ]

    def outputs(self, cell, n, page):
        "Outputs as they were saved; a progress bar keeps its last state only."
        for o in cell.outputs:
            if o.output_type == "stream":
                o.text = (
                    re.sub(r"[^\n]*\r(?!\n)", "", o.text.replace("\r\n", "\n")).strip("\n") + "\n"
                )
            if o.output_type == "error":
                self.problem(page, f"cell {n} was saved with an error: {o.ename}: {o.evalue}")
            for html in [o.get("data", {}).get("text/html", "")]:
                if re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", html):
                    self.problem(page, f"cell {n} shows an <img> without alt text")
        return [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]

    # Pages of our own

    def parts(self):
        "Part -> its pages, in the order of the folders."
        found = {}
        for p in self.pages:
            if p.part:
                found.setdefault(p.part, []).append(p)
        return found

    def cards(self, index):
        "A card for each part, its pages and their leads: the landing page has them where the README has its table."
        cards = []
        for part, pages in self.parts().items():
            items = "\n".join(
                f"- [{p.title}](/{p.doc}.ipynb)"
                + (f" — {self.prose(p.lead, index)}" if p.lead else "")
                for p in pages
            )
            cards.append(f"::::{{container}} card\n**{part}**\n\n{items}\n::::")
        return ":::::{container} cards\n" + "\n\n".join(cards) + "\n:::::\n"

    def tree(self):
        "The sidebar: parts and their pages, then the API."
        parts = {part: [f"/{p.doc}" for p in pages] for part, pages in self.parts().items()} | {
            "Reference": ["/api"]
        }
        return "\n\n".join(
            f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n" + "\n".join(docs) + "\n```"
            for part, docs in parts.items()
        )

    def api(self):
        "Every public name, by module, with its one line."
        self.here = "api"
        out = [
            f"# API\n\n> Every public name of `{self.lib}`, by module. Each leads to its signature, its arguments and its derivation.\n"
        ]
        for page in self.pages:
            if not page.symbols:
                continue
            out += [
                f"({page.module.replace('.', '-')})=\n## `{page.module}`\n\nFrom [{page.title}](/{page.doc}.ipynb).\n"
            ]
            out += ["| Name | What it is |", "| --- | --- |"]
            out += [
                f"| {{py:obj}}`{s.name} <{s.full}>` | "
                + self.prose(s.summary, page).replace("|", r"\|")
                + " |"
                for s in page.symbols
            ] + [""]
        return "\n".join(out)

    def write(self, out):
        self.out = Path(out)
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        (self.out / "_extra").mkdir()
        for page in self.pages:
            self.convert(page)
        (self.out / "api.md").write_text(self.api(), encoding="utf-8")
        if not any(p.doc == "index" for p in self.pages):
            raise SystemExit(f"{self.root}: no index.ipynb")
