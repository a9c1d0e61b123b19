"""What a code cell defines, read from its text alone: signatures and docstrings become Sphinx's
Python directives. Nothing is imported or run."""

import ast
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from docstrings import parse_docstring

Function = ast.FunctionDef | ast.AsyncFunctionDef
EXCEPTION = re.compile(r"(Error|Exception|Warning)$")
CHECKS = {"raises", "check_gradient"}


@functools.lru_cache(maxsize=8)
def encoded_lines(source: str) -> list[bytes]:
    """Return the lines of a source in UTF-8, whose bytes the columns of its nodes count."""
    return source.encode().split(b"\n")


class Argument(NamedTuple):
    """One row of a table of arguments or attributes, each entry the text of the source."""

    name: str
    type: str = ""
    default: str = ""
    details: str = ""


class Symbol:
    """A public function, class, method or property of a notebook.

    Args:
        node: its definition.
        source: text of the cell that holds the definition.
        module: full name of the module that the cell is exported to.
        owner: the class that it belongs to, if any.
    """

    def __init__(
        self, node: Function | ast.ClassDef, source: str, module: str, owner: str | None = None
    ) -> None:
        self.node, self.source, self.module = node, source, module
        self.decorators = {last_name(decorator) for decorator in node.decorator_list}
        self.is_class = isinstance(node, ast.ClassDef)
        if "patch" in self.decorators and not self.is_class:
            owner = ast.unparse(node.args.args[0].annotation)
        self.owner = owner
        self.name = f"{owner}.{node.name}" if owner else node.name
        self.bases = [last_name(base) for base in node.bases] if self.is_class else []
        self.function = self.constructor() if self.is_class else node
        self.doc = parse_docstring(ast.get_docstring(node))
        self.returns = self.annotation(self.function.returns) if self.function else ""
        self.arguments = self.documented(self.signature_arguments())

    @property
    def full(self) -> str:
        """Full name, the module's included."""
        return f"{self.module}.{self.name}"

    @property
    def kind(self) -> str:
        """Name of Sphinx's directive."""
        if self.is_class:
            is_exception = any(EXCEPTION.search(base) for base in self.bases)
            return "exception" if is_exception else "class"
        if self.decorators & {"property", "cached_property"}:
            return "property"
        return "method" if self.owner else "function"

    @property
    def is_record(self) -> bool:
        """Whether the fields of the class are its arguments."""
        return "dataclass" in self.decorators or "NamedTuple" in self.bases

    @property
    def is_documented(self) -> bool:
        """Whether the docstring says anything."""
        return bool(self.doc.text or self.doc.returns)

    def text(self, node: ast.expr | None) -> str:
        """Return the source of an expression, in one line."""
        if node is None:
            return ""
        lines = encoded_lines(self.source)[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return re.sub(r"\s+", " ", b" ".join(lines).decode())

    def annotation(self, node: ast.expr | None) -> str:
        """Return the source of a type; names that are quoted, being defined later, lose quotes."""
        text = self.text(node)
        return text if "Literal" in text else re.sub(r"[\"']([\w.| ]+)[\"']", r"\1", text)

    def constructor(self) -> Function | None:
        """Return the class's own `__init__`."""
        found = (n for n in self.node.body if isinstance(n, Function) and n.name == "__init__")
        return next(found, None)

    def fields(self) -> dict[str, Argument]:
        """Return the annotated names in the body of a class."""
        annotated = [n for n in self.node.body if isinstance(n, ast.AnnAssign)] * self.is_class
        return {
            n.target.id: Argument(n.target.id, self.annotation(n.annotation), self.text(n.value))
            for n in annotated
        }

    def signature_arguments(self) -> list[Argument]:
        """Return the arguments as the signature shows them, a bare `*` included."""
        if self.function is None:
            return list(self.fields().values()) if self.is_record else []
        given = self.function.args
        plain = given.posonlyargs + given.args
        defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
        found = [self.argument("", *pair) for pair in zip(plain, defaults)]
        if self.owner and "staticmethod" not in self.decorators or self.is_class:
            found = found[1:]
        if given.vararg:
            found.append(self.argument("*", given.vararg))
        elif given.kwonlyargs:
            found.append(Argument("*"))
        found += [self.argument("", *pair) for pair in zip(given.kwonlyargs, given.kw_defaults)]
        if given.kwarg:
            found.append(self.argument("**", given.kwarg))
        return found

    def argument(self, stars: str, node: ast.arg, default: ast.expr | None = None) -> Argument:
        """Return an argument of the signature, still without its details."""
        return Argument(stars + node.arg, self.annotation(node.annotation), self.text(default))

    def documented(self, found: list[Argument]) -> list[Argument]:
        """Return arguments with the details that the docstring gives.

        Args:
            found: the arguments of the signature. What the docstring names beside them, such as
                arguments of a parent class, follows at the end.
        """
        details = dict(self.doc.args)
        if self.is_record and self.function is None:
            details |= self.doc.attributes
        known = [a._replace(details=details.pop(a.name.lstrip("*"), "")) for a in found]
        return known + [Argument(name, details=text) for name, text in details.items()]

    @property
    def attributes(self) -> list[Argument]:
        """The attributes that the docstring describes and the table of arguments does not."""
        shown, annotated = {a.name for a in self.arguments}, self.fields()
        return [
            annotated.get(name, Argument(name))._replace(default="", details=details)
            for name, details in self.doc.attributes.items()
            if name not in shown
        ]

    @property
    def signature(self) -> str:
        """Arguments and what is returned, as Sphinx's directive takes them."""
        arguments = self.signature_arguments()
        if self.kind == "property" or self.is_class and not arguments:
            return ""
        shown = []
        for a in arguments:
            kind = f": {a.type}" if a.type else ""
            equals = " = " if a.type else "="
            shown.append(a.name + kind + (equals + a.default if a.default else ""))
        arrow = f" -> {self.returns}" if self.returns and not self.is_class else ""
        return f"({', '.join(shown)}){arrow}"

    def members(self) -> list["Symbol"]:
        """Return the public methods and properties of a class that have a docstring."""
        methods = [n for n in self.node.body if isinstance(n, Function)] * self.is_class
        found = [Symbol(n, self.source, self.module, self.name) for n in methods]
        return [
            s
            for s in found
            if not s.node.name.startswith("_") and s.is_documented and "setter" not in s.decorators
        ]

    def markdown(self, prose: Callable[[str], str], depth: int = 3) -> str:
        """Return the MyST directive: signature, docstring, tables and members.

        Args:
            prose: maps Markdown of a docstring to that of the site.
            depth: 3 for what stands by itself, 2 for a member.
        """
        fence = "`" * (depth + 3)
        lines = [f"{fence}{{py:{self.kind}}} {self.name}{self.signature}"]
        lines.append(f":module: {self.module}")
        lines += [f":{o}:" for o in ("staticmethod", "classmethod") if o in self.decorators]
        if self.kind == "property" and self.returns:
            lines.append(f":type: {self.returns}")
        lines += ["", prose(self.doc.text), ""]
        lines += table("Argument", [a for a in self.arguments if a.name != "*"], prose)
        lines += table("Attribute", self.attributes, prose)
        if self.doc.returns:
            lines += [f"*Returns* {prose(quoted(self.doc.returns))}", ""]
        for name, details in self.doc.raises.items():
            lines += [f"*Raises* `{name}` {prose(quoted(details))}", ""]
        for member in self.members():
            lines += [member.markdown(prose, depth - 1), ""]
        return "\n".join([*lines, fence])


def last_name(node: ast.expr) -> str:
    """Return the last word of a dotted name, its call or subscript left out."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return ast.unparse(node).split(".")[-1]


def quoted(text: str) -> str:
    """Set words in double quotes as code, for they are values of arguments."""
    return re.sub(r'(?<![`\w])"[\w.-]*"(?!`)', r"`\g<0>`", text)


def table(head: str, rows: list[Argument], prose: Callable[[str], str]) -> list[str]:
    """Return the lines of a Markdown table, none where no row has details.

    Args:
        head: title of the first column.
        rows: the arguments or attributes.
        prose: maps Markdown of a docstring to that of the site.
    """
    if not any(row.details for row in rows):
        return []
    cells = [
        [f"`{text}`" if text else "" for text in row[:3]] + [prose(quoted(row.details))]
        for row in rows
    ]
    used = [i for i in range(4) if i == 0 or any(row[i] for row in cells)]
    escaped = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in cells]
    lines = [[head, "Type", "Default", "Details"], ["---"] * 4, *escaped]
    return ["| " + " | ".join(line[i] for i in used) + " |" for line in lines] + [""]


def parse(source: str) -> list[ast.stmt]:
    """Return the statements of a cell, none where it is not plain Python."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def symbols(source: str, module: str) -> list[Symbol]:
    """Return the public functions and classes that a cell defines.

    Args:
        source: text of the cell.
        module: full name of the module that it is exported to.
    """
    public = [
        n
        for n in parse(source)
        if isinstance(n, (Function, ast.ClassDef)) and not n.name.startswith("_")
    ]
    return [Symbol(n, source, module) for n in public]


def only_imports(source: str) -> bool:
    """Return whether a cell imports and does nothing else but list what it exports again."""
    body = parse(source)
    return bool(body) and all(map(is_import, body))


def is_import(node: ast.stmt) -> bool:
    """Return whether a statement imports, for type checkers only or with warnings off as well."""
    if isinstance(node, (ast.If, ast.With)):
        calls = all(isinstance(n, ast.Expr) for n in node.body if not is_import(n))
        return any(map(is_import, node.body)) and calls
    if isinstance(node, ast.Assign):
        return last_name(node.targets[0]) == "_all_"
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_check(source: str) -> bool:
    """Return whether a cell asserts something, by itself or through a helper of checks."""
    nodes = [n for statement in parse(source) for n in ast.walk(statement)]
    called = {last_name(n.func) for n in nodes if isinstance(n, ast.Call)}
    asserts = any(isinstance(n, ast.Assert) for n in nodes)
    return asserts or bool(called & CHECKS) or any(n.startswith("assert_") for n in called)
