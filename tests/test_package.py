"The package as it is installed: it imports, its layers point down, and all that is public is documented."

import ast
import importlib
import inspect
import pkgutil
import sys
from configparser import ConfigParser
from importlib.util import resolve_name
from pathlib import Path

import pytest

import optgen

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(optgen.__path__, "optgen.")
    if not m.ispkg and not m.name.endswith(("_modidx", "__main__"))
)
LAYERS = [
    (
        "checks",
        "data.images",
        "data.folders",
        "data.sequences",
        "data.toy",
        "data.loading",
        "metrics",
        "viz",
        "testing",
    ),
    ("optim", "averaging", "muon"),
    ("games", "rules", "controllers", "inner", "estimators"),
    (
        "models.vae",
        "models.gan",
        "models.classifier",
        "models.autoregressive",
        "models.ladder",
        "models.conditional",
        "models.pixels",
        "models.flow",
        "models.diffusion",
        "models.synthetic",
    ),
    (
        "schemes.command", "schemes.elbo",
        "schemes.assisted",
        "schemes.feedback",
        "schemes.likelihood",
        "schemes.denoising",
    ),
    ("training.checkpoint", "training.parallel", "training.trainer"),
    (
        "evidence.reproduce",
        "bench.rules",
        "bench.elbo",
        "bench.assisted",
        "bench.generative",
        "evidence.feedback",
        "evidence.elbo",
        "evidence.assisted",
        "evidence.likelihood",
        "evidence.denoising",
        "bench.epochs",
    ),
    ("cli.main",),
]
DEPTH = {f"optgen.{name}": depth for depth, names in enumerate(LAYERS) for name in names}


def imports(name):
    "Full names that a module imports, its own package's relative imports resolved."
    for node in ast.walk(ast.parse(Path(importlib.import_module(name).__file__).read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = (
                resolve_name("." * node.level + (node.module or ""), name.rpartition(".")[0])
                if node.level
                else node.module
            )
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)


def test_every_module_has_a_layer():
    assert set(MODULES) == set(DEPTH)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for target in imports(name):
        if target in DEPTH:
            assert DEPTH[target] <= DEPTH[name], f"{name} imports {target}, which lies above it"


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__ and module.__all__
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and thing.__doc__.strip(), f"{name}.{symbol} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_only_declared_dependencies_are_imported(name):
    declared = {
        "torch",
        "torchvision",
        "matplotlib",
        "tqdm",
        "click",
        "scipy",
        "schedulefree",
        "optgen",
        "PIL",
    }  # PIL is torchvision's
    for root in {target.split(".")[0] for target in imports(name)}:
        assert root in declared or root in sys.stdlib_module_names, f"{name} imports {root}"


def test_versions_agree():
    settings = Path(__file__).parent.parent / "settings.ini"
    config = ConfigParser(delimiters=["="])
    config.read(settings)
    assert config["DEFAULT"]["version"] == optgen.__version__
    assert f"## {optgen.__version__}" in (settings.parent / "CHANGELOG.md").read_text()
