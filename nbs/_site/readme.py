"""Write README.md from nbs/index.ipynb, as it was saved; running it again changes nothing.

python nbs/_site/readme.py
"""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

from build import repo, settings
from notebooks import directives, figure_count, is_hidden


def relink(text: str, folder: str) -> str:
    """Return Markdown whose links are relative to the repository's root.

    Args:
        text: Markdown whose links are relative to `folder`.
        folder: path from the root.
    """
    return re.sub(r"(\]\()(?![a-z]+:|#|/)([^)\s]+\))", rf"\1{folder}/\2", text)


def select(nb: NotebookNode, folder: str) -> list[str]:
    """Keep the cells that the README shows, and return the alternative text of each figure.

    Args:
        nb: the landing page, changed in place.
        folder: where it lies, from the repository's root.
    """
    kept, alternatives = [], []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, folder)
            kept.append(cell)
        if cell.cell_type != "code":
            continue
        flags, options, cell.source = directives(cell.source)
        if is_hidden(flags, options):
            continue
        if options.get("output") is False:
            cell.outputs = []
        figures = figure_count(cell.outputs)
        alternatives += [options.get("fig-alt", "")] * figures
        if options.get("echo", not figures) is False:
            cell.metadata["tags"] = ["remove-input"]
        kept.append(cell)
    nb.cells, nb.metadata["language_info"] = kept, {"name": "python"}
    return alternatives


def write_figures(text: str, outputs: dict[str, Any], folder: Path) -> str:
    """Write the figures into a folder made anew, and return the text with links to them.

    Args:
        text: the README, whose links name the figures only.
        outputs: content of each figure, by name.
        folder: the folder, absent where there is no figure.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in outputs.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        text = text.replace(f"]({name})", f"]({folder.name}/{name})")
    return text


def main() -> None:
    """Write README.md and its figures."""
    config = settings()
    nb = nbformat.read(repo / config["nbs_path"] / config["readme_nb"], as_version=4)
    alternatives = iter(select(nb, config["nbs_path"]))
    removal = {"enabled": True, "remove_input_tags": {"remove-input"}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=removal))
    text, resources = exporter.from_notebook_node(nb)
    text = write_figures(text, resources.get("outputs", {}), repo / "README_files")
    text = re.sub(r"!\[(?:png|svg)\]", lambda _: f"![{next(alternatives)}]", text)
    text = re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text).strip() + "\n"
    (repo / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
