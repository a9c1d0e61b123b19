"""Fail if a training command imports the compiler or torchvision, a quarter of its start."""

import sys

from optgen.cli.main import main

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torchvision")

try:
    main(["train", "beta-vae", "--hidden", "16,8", "--epochs", "1", "--out", sys.argv[1]])
finally:
    imported = [name for name in HEAVY if name in sys.modules]
    assert not imported, f"optgen train imports {imported}"
