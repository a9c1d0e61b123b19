"""Google-style docstrings, split into their text and their sections."""

import re
from dataclasses import dataclass, field
from inspect import cleandoc

SECTIONS = {
    "Args": "args",
    "Attributes": "attributes",
    "Raises": "raises",
    "Returns": "returns",
    "Yields": "returns",
}
HEADER = re.compile(rf"({'|'.join(SECTIONS)}):\s*$")
ITEM = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*):(?:\s+|$)(.*)")


@dataclass
class Docstring:
    """A docstring by its sections.

    Attributes:
        text: summary and description: what stands outside of the sections.
        args: details of each argument, by name without its stars.
        attributes: details of each attribute, by name.
        raises: when each exception is raised, by the exception's name.
        returns: what is returned or yielded.
    """

    text: str = ""
    args: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)
    returns: str = ""

    @property
    def summary(self) -> str:
        """First paragraph, in one line."""
        return self.text.split("\n\n")[0].replace("\n", " ")


def parse_docstring(raw: str | None) -> Docstring:
    """Split a Google-style docstring into its sections.

    Args:
        raw: the docstring as it stands in the source, or None where there is none.

    Returns:
        The sections; sections with other headers stay in the text.
    """
    blocks = {name: [] for name in ("text", *SECTIONS.values())}
    current = "text"
    for line in cleandoc(raw or "").splitlines():
        header = HEADER.match(line)
        if header:
            current = SECTIONS[header[1]]
            continue
        if line and not line[0].isspace():
            current = "text"
        blocks[current].append(line)
    dedented = {name: cleandoc("\n" + "\n".join(lines)) for name, lines in blocks.items()}
    return Docstring(
        text=dedented["text"],
        args={name.lstrip("*"): details for name, details in items(dedented["args"])},
        attributes=dict(items(dedented["attributes"])),
        raises=dict(items(dedented["raises"])),
        returns=dedented["returns"],
    )


def items(section: str) -> list[tuple[str, str]]:
    """Return the (name, details) of each item of a section.

    Args:
        section: its lines, dedented. An item starts at the margin, and its further lines are
            indented. Names that share their details stand side by side with commas.
    """
    found = []
    for line in section.splitlines():
        start = ITEM.match(line)
        if start:
            found.append((start[1], [start[2]]))
        elif found:
            found[-1][1].append(line)
    return [
        (name, cleandoc("\n".join(lines)).strip())
        for names, lines in found
        for name in names.split(", ")
    ]
