"""Write README.md from nbs/index.ipynb, as it was saved; running it again changes nothing.

python nbs/_site/readme.py
"""

import re
import shutil

import nbformat
from build import repo, settings
from nbconvert import MarkdownExporter
from pages import directives
from traitlets.config import Config


def relink(text, folder):
    "Links relative to the notebook become relative to the repository's root."
    return re.sub(r"(\]\()(?![a-z]+:|#|/)([^)\s]+\))", rf"\1{folder}/\2", text)


def main():
    cfg = settings()
    path, files = repo / cfg["nbs_path"] / cfg["readme_nb"], repo / "README_files"
    nb, alts = nbformat.read(path, as_version=4), []
    kept = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, cfg["nbs_path"])
            kept.append(cell)
        if cell.cell_type != "code":
            continue
        flags, options, cell.source = directives(cell.source)
        if flags & {"hide", "default_exp"} or options.get("include") is False:
            continue
        if options.get("output") is False:
            cell.outputs = []
        figures = sum(
            "image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {})
            for o in cell.outputs
        )
        alts += [options.get("fig-alt", "")] * figures
        if options.get("echo", not figures) is False:
            cell.metadata["tags"] = ["remove-input"]
        kept.append(cell)
    nb.cells, nb.metadata["language_info"] = kept, {"name": "python"}
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"remove-input"}))
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb)
    shutil.rmtree(files, ignore_errors=True)
    for name, data in resources.get("outputs", {}).items():
        files.mkdir(exist_ok=True)
        (files / name).write_bytes(data)
        text = text.replace(f"]({name})", f"]({files.name}/{name})")
    alts = iter(alts)
    text = re.sub(r"!\[(?:png|svg)\]", lambda m: f"![{next(alts)}]", text)
    (repo / "README.md").write_text(
        re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text).strip() + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
