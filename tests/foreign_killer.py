"""Train in children that kill themselves: `python foreign_killer.py OUT STEPS KIND...`.

Each kind is trained once in OUT/KIND-whole without interruption, and once in OUT/KIND-killed by
children that send SIGKILL to themselves in the steps STEPS, a list in JSON, and are resumed.
"""

import json
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from optgen.data.sources import as_loader
from optgen.models.vae import GaussianVAE
from optgen.schemes.elbo import BetaVAE
from optgen.training.callbacks import Pictures
from optgen.training.trainer import fit

N, BATCH, EPOCHS = 60, 9, 3  # seven batches an epoch, the last one smaller


def noise():
    """Return three random numbers, one of each generator of the process."""
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


class Noisy(Dataset):
    """Vectors with a random transform."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.tensor([i / N, (i % 7) / 7, *noise()]), i % 3


class Stream(IterableDataset):
    """The same vectors one after the other, shared among the workers."""

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, N, step):
            yield torch.tensor([i / N, (i % 7) / 7, *noise()])


class StatefulStream(IterableDataset):
    """A stream that saves its position and the state of its own generator."""

    def __init__(self):
        self.i, self.generator = 0, np.random.default_rng(5)

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        self.i = max(self.i, first)
        while self.i < N:
            drawn = noise()[0] if worker is None else 0.0  # those of workers are not saved
            vector = [self.i / N, drawn, *self.generator.random(3)]
            self.i += step
            yield torch.tensor(vector, dtype=torch.float32)
        self.i = 0

    def state_dict(self):
        """Return the position, with an array."""
        return {"i": np.array([self.i]), "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state):
        """Continue from a position."""
        self.i, self.generator.bit_generator.state = int(state["i"][0]), state["generator"]


KINDS = {
    "dataset": lambda workers: as_loader(Noisy(), BATCH, workers=workers, seed=3),
    "loader": lambda workers: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers),
    "stateful": lambda workers: StatefulDataLoader(
        Noisy(), BATCH, shuffle=True, num_workers=workers
    ),
    "stream": lambda workers: DataLoader(Stream(), BATCH, num_workers=workers),
    "stateful-stream": lambda workers: StatefulDataLoader(
        StatefulStream(), BATCH, num_workers=workers
    ),
}


class KillAt:
    """Callback that kills its process in a step, after the step and before its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run, batch, losses):
        """Send SIGKILL to this process in the step."""
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(out, kind, workers, kill_step):
    """Begin or resume the run of a kind of data."""
    torch.manual_seed(0)
    scheme = BetaVAE(GaussianVAE(5, 8, 8, 2, out="linear"))
    torch.manual_seed(11)  # a loader that draws its seed at once shuffles alike in both runs
    data, valid = KINDS[kind](workers), KINDS[kind](0)
    torch.manual_seed(os.getpid())  # the generators of the process are others in every life
    np.random.seed(os.getpid())
    options = {"checkpoint_steps": 3, "progress": "none", "resume": (out / "config.json").exists()}
    callbacks = [KillAt(kill_step)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(scheme, data, valid=valid, out=out, epochs=EPOCHS, callbacks=callbacks, **options)
    said = [str(w.message) for w in caught if "resumed by epoch" in str(w.message)]
    (out / "said.json").write_text(json.dumps(said))


def live(out, kind, workers, kill_step):
    """Train in a child, and return whether it was killed."""
    child = os.fork()
    if not child:
        try:
            train(out, kind, workers, kill_step)
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{kind} failed"
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    Pictures.on_epoch = lambda *args: None  # to save time
    folder, steps, kinds = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    kills = {}
    for name in kinds:
        kind, workers = name.rsplit("-", 1)
        live(folder / f"{name}-whole", kind, int(workers), -1)
        kills[name] = sum(live(folder / f"{name}-killed", kind, int(workers), n) for n in steps)
        live(folder / f"{name}-killed", kind, int(workers), -1)
    print(json.dumps(kills))
