"""Optimizers coupled with generative models.

`optgen.load` opens a run, and `optgen.from_pretrained` a model that was shared. They are imported
when they are first used, so that `import optgen` and `optgen --help` do not wait for PyTorch.
nbdev writes only the line of the version.
"""

__version__ = "0.7.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli.export import from_pretrained
    from .cli.runs import load
    from .training.sharing import push_to_hub

HOMES = {  # module of each name
    "load": "cli.runs",
    "from_pretrained": "cli.export",
    "push_to_hub": "training.sharing",
}
__all__ = ["from_pretrained", "load", "push_to_hub"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the module, those not yet imported too."""
    return sorted({*globals(), *__all__})
