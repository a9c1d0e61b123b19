"""Run commands of optgen, and fail if one imports a module that it does not use.

`python imports_of_command.py COMMANDS`: a list in JSON; an entry is names of modules, split by
commas, and a command. Each command runs in a process of its own; they are forked, so that PyTorch,
which all of them need, is imported once.
"""

import json
import os
import sys
import traceback

import torch  # noqa: F401

from optgen.cli.main import main


def run(modules, command):
    """Run a command, end the process, and fail if it imported one of the modules."""
    code = 1
    try:
        try:
            main(command.split())
        finally:
            imported = [name for name in modules.split(",") if name in sys.modules]
            assert not imported, f"optgen {command} imports {imported}"
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


for modules, command in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        run(modules, command)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"optgen {command} ends with {code}"
