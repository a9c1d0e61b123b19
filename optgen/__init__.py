"""Optimizers coupled with generative models.

`optgen.load` opens a run. It is imported when it is first used, so that `import optgen` and
`optgen --help` do not wait for PyTorch. nbdev writes only the line of the version.
"""

__version__ = "0.6.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli.runs import load

__all__ = ["load"]
HOMES = {"load": "cli.runs"}  # module of each name


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
