"""The installed package: it imports, its layers point down, its public names have docstrings.

The layers are those of the page *Architecture*: its table of floors is read here.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import optgen
from cli_helpers import run

REPO = Path(__file__).resolve().parent.parent
ARCHITECTURE = REPO / "nbs" / "00_foundations" / "00_architecture.ipynb"
DEPENDENCIES = {"torch", "torchvision", "matplotlib", "tqdm", "click", "scipy", "schedulefree"}
DEPENDENCIES |= {"filelock", "safetensors", "numpy"}  # numpy is torchvision's and matplotlib's
# What comes with an extra is imported by the function that needs it.
OPTIONAL = {"torchdata", "tensorboard", "trackio", "wandb", "mlflow", "huggingface_hub"}
OPTIONAL |= {"torchdiffeq"}
# What a benchmark compares with is imported where it is measured, and left out where it is absent.
MEASURED = {
    "bench.trainers": {"pythae"},
    "evidence.search": {"cma", "ioh"},
    "evidence.tuning": {"optuna"},
}
ALLOWED = DEPENDENCIES | {"optgen", "PIL"}  # PIL is torchvision's
MODULES = sorted(
    m.name.removeprefix("optgen.")
    for m in pkgutil.walk_packages(optgen.__path__, "optgen.")
    if not m.ispkg and not m.name.endswith(("_modidx", "__main__"))
)


def read_floors() -> dict[int, list[str]]:
    """Return the rooms of each floor, from the table `| floor | rooms |` of the page."""
    cells = json.loads(ARCHITECTURE.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    table = re.search(r"^\| floor \| rooms \|.*\n\|[-| ]+\n((?:\|.*\n?)+)", text, re.M)[1]
    rows = [row.strip("| ").split("|") for row in table.splitlines()]
    return {int(row[0]): re.findall(r"`([\w.*]+)`", row[1]) for row in rows}


FLOORS = read_floors()


def floors_of(name: str) -> list[int]:
    """Return the floors whose rooms match a module's name."""
    return [floor for floor, rooms in FLOORS.items() for room in rooms if fnmatch(name, room)]


def path_of(name: str) -> Path:
    """Return the file of a module."""
    return Path(optgen.__file__).parent / f"{name.replace('.', '/')}.py"


def imported_names(name: str, in_functions: bool = True) -> Iterator[str]:
    """Yield the full names that a module imports, in functions too or only where it is loaded."""
    parent = f"optgen.{name}".rpartition(".")[0]
    tree = ast.parse(path_of(name).read_text(encoding="utf-8"))
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), parent)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(name: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    return {target.removeprefix("optgen.") for target in imported_names(name)} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor(name):
    assert len(floors_of(name)) == 1, f"{name} needs a floor in {ARCHITECTURE.name}"


def test_every_room_has_modules():
    rooms = [room for rooms in FLOORS.values() for room in rooms]
    assert not [room for room in rooms if not any(fnmatch(name, room) for name in MODULES)]


def test_there_are_at_most_nine_floors():
    assert list(FLOORS) == list(range(1, len(FLOORS) + 1)) and len(FLOORS) <= 9


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    above = [o for o in imported_modules(name) if floors_of(o) > floors_of(name)]
    assert not above, f"{name} imports {', '.join(above)} from a floor above its own"


def test_imports_have_no_cycle():
    TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(f"optgen.{name}")
    assert module.__doc__ and module.__all__
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and thing.__doc__.strip(), f"{name}.{symbol} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_only_declared_dependencies_are_imported(name):
    roots = {target.split(".")[0] for target in imported_names(name)} - MEASURED.get(name, set())
    assert not roots - ALLOWED - OPTIONAL - sys.stdlib_module_names
    at_import = {target.split(".")[0] for target in imported_names(name, in_functions=False)}
    assert not at_import & OPTIONAL, "import what is optional in the function that needs it"


def test_optional_dependencies_are_extras():
    config = ConfigParser(delimiters=["="])
    config.read(REPO / "settings.ini", encoding="utf-8")
    facts = config["DEFAULT"]
    listed = [facts[f"{name}_requirements"] for name in facts["extras"].split()]
    names = {re.match(r"[\w-]+", entry)[0] for line in listed for entry in line.split()}
    assert {name.replace("mlflow-skinny", "mlflow") for name in names} == OPTIONAL
    in_dev = {re.match(r"[\w-]+", entry)[0] for entry in facts["dev_requirements"].split()}
    assert names <= in_dev, "what an extra brings is tested"


def test_versions_agree():
    config = ConfigParser(delimiters=["="])
    config.read(REPO / "settings.ini", encoding="utf-8")
    assert config["DEFAULT"]["version"] == optgen.__version__
    changelog = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {optgen.__version__}" in changelog


def names_of_the_changelog() -> list[str]:
    """Return the names that classes and functions were given, but those given another one since."""
    text = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    old, new = set(), set()
    headings = (
        "Renamed classes and functions:",
        *(f"Renamed or moved since 0.{n}:" for n in (5, 6)),
    )
    for heading in headings:
        table = re.search(rf"{heading}\n\n(?:\|.*\n){{2}}((?:\|.*\n)+)", text)[1]
        for row in table.splitlines():
            columns = [re.findall(r"`(\w+\.[\w.]+)`", column) for column in row.split("|")[1:3]]
            old, new = old | set(columns[0]), new | set(columns[1])
    return sorted(new - old)


def test_the_new_names_of_the_changelog_exist():
    names = names_of_the_changelog()
    assert len(names) > 50
    for name in names:
        module, _, last = f"optgen.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def pages() -> list[Path]:
    """Return the notebooks, in order."""
    paths = sorted((REPO / "nbs").rglob("*.ipynb"))
    return [path for path in paths if ".ipynb_checkpoints" not in path.parts]


def test_every_page_has_its_own_number():
    numbers = [path.stem.partition("_")[0] for path in pages()]
    assert len(numbers) > 100
    assert sorted(numbers) == sorted(set(numbers))


def committed_outputs() -> Iterator[tuple[str, dict]]:
    """Yield the page and each output of the notebooks."""
    for path in pages():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield from ((path.name, output) for output in cell.get("outputs", ()))


def test_outputs_of_the_pages_have_no_warning_and_no_path_of_a_machine():
    somewhere = re.compile(r"site-packages|(?<![\w.:/])/(?:home|root|tmp|Users|var)/")
    for page, output in committed_outputs():
        text = output.get("text", "")
        data = {k: v for k, v in output.get("data", {}).items() if k.startswith("text/")}
        found = somewhere.search("".join(text) + json.dumps(data))
        assert output.get("name") != "stderr", f"{page} shows what was written to stderr: {text}"
        assert not found, f"{page} shows a path of the machine that ran it: {found[0]}"


def test_no_page_shows_the_address_of_an_object():
    for page, output in committed_outputs():
        data = output.get("data", {})
        if {*data} == {"text/plain"}:
            assert " at 0x" not in "".join(data["text/plain"]), f"{page}: {data['text/plain']}"


def test_the_help_on_the_pages_is_todays(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for page, output in committed_outputs():
        for block in re.split(r"^(?=\$ optgen )", "".join(output.get("text", "")), flags=re.M):
            command, _, printed = block.partition("\n")
            if command.endswith("--help"):
                assert run(command.removeprefix("$ optgen ")) == 0
                assert capsys.readouterr().out.split() == printed.split(), (page, command)
                shown.append(command)
    assert "$ optgen train feedback-gan --help" in shown


def test_each_run_of_the_readme_has_a_folder_of_its_own():
    """What is typed in the order of the README never meets the folder of another run."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    calls = re.findall(r"fit\((?:[^()]|\([^()]*\))*\)", text)
    folders = [re.search(r'out="([^"]+)"', call) for call in calls if "resume=" not in call]
    begun = [found[1] for found in folders if found]
    begun += re.findall(r"optgen train [^`\n]*--out (\S+)", text)
    assert len(begun) >= 3 and len(set(begun)) == len(begun), begun
