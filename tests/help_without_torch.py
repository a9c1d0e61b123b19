"""Fail if `optgen --help` imports PyTorch."""

import sys

from optgen.cli.main import main

try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules, "optgen --help imports torch"
