"What a code cell defines, read from its text: signatures and docments, as Sphinx's Python directives. Nothing is imported or run."

import ast
import io
import re
import tokenize
from inspect import cleandoc

functions = ast.FunctionDef, ast.AsyncFunctionDef


def comments(source):
    "Line number -> text of the comment on it."
    return {
        t.start[0]: t.string.lstrip("#").strip()
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


def arguments(node):
    "(prefix, ast.arg, default or None) of each argument, in order."
    a = node.args
    plain = a.posonlyargs + a.args
    rows = [("", *o) for o in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults)]
    if a.vararg:
        rows.append(("*", a.vararg, None))
    rows += [("", *o) for o in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        rows.append(("**", a.kwarg, None))
    return rows


class Symbol:
    "A public function, class, method or property of a notebook."

    def __init__(self, node, source, notes, module, owner=None):
        self.node, self.source, self.notes, self.module = node, source, notes, module
        self.decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
        self.is_class = isinstance(node, ast.ClassDef)
        if not self.is_class and "patch" in self.decorators:
            owner = ast.unparse(node.args.args[0].annotation)
        self.owner, self.name = owner, f"{owner}.{node.name}" if owner else node.name
        self.doc = cleandoc(ast.get_docstring(node) or "")
        self.bases = [ast.unparse(b) for b in node.bases] if self.is_class else []
        self.rows, self.returns = self.table()

    @property
    def full(self):
        return f"{self.module}.{self.name}"

    @property
    def summary(self):
        return self.doc.split("\n\n")[0].replace("\n", " ")

    @property
    def kind(self):
        if self.is_class:
            return (
                "exception"
                if re.search(r"(Error|Exception|Warning)$", " ".join(self.bases))
                else "class"
            )
        if self.decorators & {"property", "cached_property"}:
            return "property"
        return "method" if self.owner else "function"

    def text(self, node):
        return re.sub(r"\s+", " ", ast.get_source_segment(self.source, node)) if node else ""

    def alone(self, line):
        return self.lines[line - 1].lstrip().startswith("#")

    def note(self, node, taken, body):
        "The comment beside an argument, else the comment lines above it."
        line = node.end_lineno
        if line >= body:
            return ""
        if line in self.notes:
            return self.notes[line]
        above = []
        while (line := line - 1) in self.notes and line not in taken and self.alone(line):
            above.insert(0, self.notes[line])
        return " ".join(above)

    def table(self):
        "Rows (name, type, default, details) of the arguments, and the (type, details) of what is returned."
        self.lines = self.source.splitlines()
        if not self.is_class:
            return self.rows_of(
                self.node, skip=bool(self.owner) and "staticmethod" not in self.decorators
            )
        init = next(
            (n for n in self.node.body if isinstance(n, functions) and n.name == "__init__"), None
        )
        if init:
            if not self.doc:
                self.doc = cleandoc(ast.get_docstring(init) or "")
            return self.rows_of(init, skip=True)[0], ("", "")
        if self.decorators & {"dataclass"} or {"NamedTuple"} & {
            b.split(".")[-1] for b in self.bases
        }:
            fields = [n for n in self.node.body if isinstance(n, ast.AnnAssign)]
            taken = {n.end_lineno for n in fields}
            return [
                (
                    n.target.id,
                    self.text(n.annotation),
                    self.text(n.value),
                    self.note(n, taken, 1 << 30),
                )
                for n in fields
            ], ("", "")
        return [], ("", "")

    def rows_of(self, node, skip):
        args, body = arguments(node)[skip:], node.body[0].lineno
        ends = [
            max((n for n in (a, default) if n), key=lambda n: (n.end_lineno, n.end_col_offset))
            for _, a, default in args
        ]
        taken = {e.end_lineno for e in ends}
        rows = [
            (
                prefix + a.arg,
                self.text(a.annotation),
                self.text(default),
                self.note(end, taken, body),
            )
            for (prefix, a, default), end in zip(args, ends)
        ]
        last = max(taken | {node.lineno})
        if (
            last == node.lineno and last in self.notes
        ):  # a signature of one line: its comment tells of the result, or of the whole
            rows = [(*row[:3], "") for row in rows]
            if node.returns and body > last:
                return rows, (self.text(node.returns), self.notes[last])
            if not self.doc:
                self.doc = self.notes[last]
        details = next(
            (
                self.notes[n]
                for n in range(body - 1, last, -1)
                if n in self.notes and not self.alone(n)
            ),
            "",
        )
        return rows, (self.text(node.returns), details)

    @property
    def signature(self):
        if self.kind == "property" or self.is_class and not self.rows:
            return ""
        args = [
            name
            + (f": {kind}" if kind else "")
            + ((" = " if kind else "=") + default if default else "")
            for name, kind, default, _ in self.rows_with_marks()
        ]
        return f"({', '.join(args)})" + (f" -> {self.returns[0]}" if self.returns[0] else "")

    def rows_with_marks(self):
        "The rows, with the bare `*` and `/` that a signature shows and a table does not."
        rows = list(self.rows)
        node = (
            self.node
            if not self.is_class
            else next(
                (n for n in self.node.body if isinstance(n, functions) and n.name == "__init__"),
                None,
            )
        )
        if node and node.args.kwonlyargs and not node.args.vararg:
            rows.insert(
                next(i for i, r in enumerate(rows) if r[0] == node.args.kwonlyargs[0].arg),
                ("*", "", "", ""),
            )
        return rows

    def members(self):
        "The documented public methods and properties of a class."
        if not self.is_class:
            return []
        found = [
            Symbol(n, self.source, self.notes, self.module, self.name)
            for n in self.node.body
            if isinstance(n, functions)
        ]
        return [
            s
            for s in found
            if not s.node.name.startswith("_")
            and (s.doc or s.returns[1])
            and "setter" not in s.decorators
        ]

    def markdown(self, prose, depth=3):
        "The MyST directive: signature, docstring, table of arguments, members. `prose` maps the text."
        details = lambda text: prose(re.sub(r'(?<![`\w])"[\w.-]*"(?!`)', r"`\g<0>`", text))
        cell = lambda text: details(text).replace("|", r"\|").replace("\n", " ")
        code = lambda text: f"`{text}`".replace("|", r"\|") if text else ""
        rows = [(code(n), code(k), code(d), cell(t)) for n, k, d, t in self.rows]
        if not any(r[3] for r in rows):
            rows = []
        lone = f"*Returns* {details(self.returns[1])}" if self.returns[1] and not rows else ""
        if any(self.returns) and rows:
            rows.append(("*returns*", code(self.returns[0]), "", cell(self.returns[1])))
        heads = ["Argument", "Type", "Default", "Details"]
        used = [i for i in range(4) if i == 0 or any(r[i] for r in rows)]
        fence = "`" * (depth + 3)
        out = [f"{fence}{{py:{self.kind}}} {self.name}{self.signature}", f":module: {self.module}"]
        out += [f":{flag}:" for flag in ("staticmethod", "classmethod") if flag in self.decorators]
        if self.kind == "property" and self.returns[0]:
            out.append(f":type: {self.returns[0]}")
        out += ["", prose(self.doc), "", lone, ""]
        if rows:
            out += [
                "| " + " | ".join(row[i] for i in used) + " |"
                for row in (heads, ["---"] * 4, *rows)
            ] + [""]
        for m in self.members():
            out += [m.markdown(prose, depth - 1), ""]
        return "\n".join(out + [fence])


def symbols(source, module):
    "The public symbols a cell defines, `_private` ones left out."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    notes = comments(source)
    return [
        Symbol(n, source, notes, module)
        for n in body
        if isinstance(n, (*functions, ast.ClassDef)) and not n.name.startswith("_")
    ]


def only_imports(source):
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
