"""Train in children, kill each, and resume: `python killer.py OUT SEED ARGUMENTS`.

The parent forks them, so that what a run imports is imported once and not twenty times.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from optgen.cli.main import main
from optgen.training import checkpoint

IMPORTED_BY_RUNS = (
    "controllers",
    "data.loading",
    "inner",
    "models.autoregressive",
    "models.vae",
    "schemes.elbo",
    "training.trainer",
)


def train(out, arguments):
    """Begin the run in `out` with these arguments, or resume it, and end the process."""
    if (out / "config.json").exists():
        main(["train", "--resume", str(out), "--progress", "none"])
    else:
        main([*arguments, "--out", str(out), "--epochs", "400", "--checkpoint-steps", "1"])
    os._exit(0)


def kill(child, out, while_writing):
    """Kill a child after a random time, or in the write that follows."""
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0.05, 0.4))
    while while_writing and not (out / ".checkpoint.pt.tmp").exists():
        pass
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before it was killed"


def kill_and_resume(out, arguments, times=20):
    """Kill a run so many times; count the kills inside a write, and return the last step."""
    inside = 0
    for n in range(times):
        (out / ".checkpoint.pt.tmp").unlink(missing_ok=True)
        child = os.fork()
        if not child:
            train(out, arguments)
        kill(child, out, while_writing=n % 2 == 1)
        inside += (out / ".checkpoint.pt.tmp").exists()
        step = checkpoint.load(out / "checkpoint.pt")["step"]
    return {"kills": times, "inside": inside, "step": step}


if __name__ == "__main__":
    for module in IMPORTED_BY_RUNS:
        importlib.import_module(f"optgen.{module}")
    random.seed(int(sys.argv[2]))
    print(json.dumps(kill_and_resume(Path(sys.argv[1]), json.loads(sys.argv[3]))))
