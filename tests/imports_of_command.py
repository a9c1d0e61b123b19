"""Run a command of optgen, and fail if it imports one of the modules named first."""

import sys

from optgen.cli.main import main

names, *command = sys.argv[1:]
try:
    main(command)
finally:
    imported = [name for name in names.split(",") if name in sys.modules]
    assert not imported, f"optgen {command[0]} imports {imported}"
