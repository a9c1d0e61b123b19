"""What test_sharding.py looks at: `python shards.py OUT` leaves the results of one to three ranks.

Each rank brings its own part of a batch: uneven, some empty; or slices the joined one."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from test_accumulation import assisted, batches, diffusion
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from optgen.controllers import Geco
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.foreign import has_distributed_sampler
from optgen.data.images import Batch
from optgen.data.loading import Loader
from optgen.models.vae import VAE
from optgen.optim import Momentum
from optgen.schemes.elbo import Aggressive, BetaVAE
from optgen.training.parallel import abort_all_on_error, distribute, init_ranks
from optgen.training.trainer import fit
from spread import RULES, gan, launch, some


def own_part(batch, ranks, step):
    """Return this rank's rows: the parts differ in size, and some are empty."""
    tensors = [t for t in (batch if isinstance(batch, tuple) else (batch,)) if t is not None]
    n, world = len(tensors[0]), ranks.world
    inner = sorted((7 * step + 3 * k * k) % (n + 1) for k in range(1, world))
    ends = [0, *inner, n]
    rows = slice(ends[ranks.rank], ends[ranks.rank + 1])
    if isinstance(batch, tuple):
        return type(batch)(*(None if t is None else t[rows] for t in batch))
    return batch[rows]


def walk(game, steps, sharded, micro_batches=1, first=0):
    """Take steps and return weights, losses and the rest of the state as one vector."""
    game.micro_batches = micro_batches
    ranks = init_ranks()
    distribute(game, sharded)
    for i, batch in enumerate(steps, start=first):
        if ranks and sharded:
            torch.rand(3 * ranks.rank)  # augmentations of a rank's own
            batch = own_part(batch, ranks, i)
        losses = game.step(batch)
    weights = [p.detach().flatten() for ps in game.weights().values() for p in ps]
    numbers = [loss.reshape(1) for loss in losses.values()]
    for part in ("beta", "weight"):
        controller = getattr(game, part, None)
        numbers += [controller.value.flatten()] if hasattr(controller, "value") else []
    if hasattr(game, "levels"):
        numbers += [game.levels.square, game.levels.met]
    return torch.cat([t.double() for t in (*weights, *numbers)])


def seed_apart(sharded):
    """Seed each rank differently where each has its own part; rank 0 as one process."""
    ranks = init_ranks()
    torch.manual_seed(100 + ranks.rank if ranks and sharded and ranks.rank else 0)


def vae(name):
    """Return a small VAE of two players, and batches for it."""
    torch.manual_seed(0)
    model = VAE(6, 8, 5, 2).double()
    optimizers = tuple(Momentum(m.parameters(), lr=0.02) for m in (model.q_net, model.p_net))
    rule = Aggressive(2, 3, 1) if name == "aggressive" else None
    game = BetaVAE(model, Geco(4.0, rate=0.02, smoothing=0.5), optimizers, rule=rule)
    g = torch.Generator().manual_seed(1)
    sizes = (12, 7, 3, 2, 12, 5, 9, 4)
    rows = [torch.rand(n, 6, generator=g, dtype=torch.float64).round() for n in sizes]
    return game, [Batch(x) for x in rows]


SCHEMES = {
    "geco": lambda: vae("geco"),
    "aggressive": lambda: vae("aggressive"),
    "diffusion": diffusion,
    "labeled, geco": lambda: assisted("labeled, geco"),
    "labeled, balanced": lambda: assisted("labeled, balanced"),
}


def resumed():
    """Return the weights of a loop of own parts that is stopped, and goes on in a new game."""
    steps = batches(8)
    seed_apart(True)
    game = gan(rule=RULES["extragradient of the past"](), optimizer="adam")
    walk(game, steps[:4], True)
    state, random = game.state_dict(), torch.get_rng_state()
    other = gan(rule=RULES["extragradient of the past"](), optimizer="adam", seed=5)
    ranks = init_ranks()
    if not (ranks and ranks.rank):  # rank 0 alone has a file
        other.load_state_dict(state)
        torch.set_rng_state(random)
    return walk(other, steps[4:], True, first=4)


def whole_walk():
    """Return the weights of the same loop without a stop."""
    seed_apart(True)
    return walk(gan(rule=RULES["extragradient of the past"](), optimizer="adam"), batches(8), True)


def message_of(do, *kinds):
    """Return the message of the error that a call raises."""
    try:
        do()
    except kinds as error:
        return str(error)
    return ""


def mistakes(ranks):
    """Return what is said of batches that the ranks cannot step on together."""
    rank = ranks.rank
    different, mixed = gan(), gan()
    distribute(different)
    distribute(mixed, sharded=True)
    kind = torch.float32 if rank else torch.float64
    found = {
        "different": message_of(
            lambda: different.step(torch.full((4, 2), rank).double()), RuntimeError
        ),
        "mixed": message_of(lambda: mixed.step(torch.ones(4, 2, dtype=kind)), RuntimeError),
    }
    loader = DataLoader(TensorDataset(torch.ones(4)), sampler=DistributedSampler(range(4)))
    found["own parts"] = [
        has_distributed_sampler(loader),
        has_distributed_sampler(DataLoader([1.0, 2.0])),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        game = gan()
        for _ in range(3):
            game.step(batches()[0])
        list(DataLoader(WorkerSteps(), num_workers=1))
    found["alone"] = [str(w.message) for w in caught]
    return found


class WorkerSteps(torch.utils.data.Dataset):
    """A data set that takes a step of a game to make an example."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gan().step(batches()[0])
        return i


def follow(out):
    """Take the steps of every rule and scheme with own parts and with slices."""
    ranks = init_ranks()
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    with abort_all_on_error(ranks):
        found = {}
        for sharded in (False, True) if ranks else (False,):
            for rule in some(RULES, ranks):
                parts = 1 if rule == "simultaneous" else 2
                seed_apart(sharded)
                game = gan(rule=RULES[rule]())
                found[rule, sharded] = walk(game, batches(), sharded, parts)
            for name, make in SCHEMES.items():
                seed_apart(sharded)
                game, steps = make()
                seed_apart(sharded)
                found[name, sharded] = walk(game, steps, sharded, 2 if world > 1 else 1)
        found["resumed", True], found["whole", True] = resumed(), whole_walk()
        torch.save(found, out / f"{rank}-of-{world}.pt")
        if ranks:
            (out / f"mistakes-{rank}-of-{world}.json").write_text(json.dumps(mistakes(ranks)))


def late(out):
    """Take a step before the process group is there, and steps after."""
    rank, world = int(os.environ["RANK"]), int(os.environ.pop("WORLD_SIZE"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        game = gan()
        game.step(batches()[0])
        before = len(caught)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        for _ in range(2):
            game.step(batches()[0])
        said = [str(w.message) for w in caught]
    distribute(game)
    game.step(batches()[0])
    (out / f"late-{rank}.json").write_text(json.dumps([before, said, game.ranks.world]))


def read(out, name):
    """Fit on a streamed folder, and leave the weights and which files this rank decoded."""
    decoded, original = [], ImageFiles.__getitem__

    def counted(self, i):
        """Note the file and decode it."""
        decoded.append(str(self.files[i]))
        return original(self, i)

    ImageFiles.__getitem__ = counted
    data = image_folder(out / "images", size=8, memory_limit=0)
    torch.manual_seed(0)
    scheme = BetaVAE(VAE(64, 8, 5, 2).double())
    # Workers would count in processes of their own.
    loader = Loader(data, 10, binarize="dynamic", workers=0)
    fit(scheme, loader, epochs=1, progress="none")
    rank = init_ranks().rank if init_ranks() else 0
    weights = torch.cat([p.detach().flatten() for p in scheme.model.parameters()])
    torch.save([weights, decoded], out / f"{name}-{rank}.pt")


def own_loader(out, name):
    """Fit on a loader that gives each rank its own part; alone, on the batches they make."""
    ranks = init_ranks()
    data = TensorDataset(some_pixels(22))
    torch.manual_seed(0)
    scheme = BetaVAE(VAE(64, 8, 5, 2).double())
    if ranks:
        sampler = DistributedSampler(data, seed=3, drop_last=True)
        loader = DataLoader(data, 4, sampler=sampler)
    else:
        loader = DataLoader(data, batch_sampler=JoinedBatches(len(data), int(name[-1])))
    records = fit(scheme, loader, epochs=2, progress="none")
    weights = torch.cat([p.detach().flatten() for p in scheme.model.parameters()])
    losses = [record["train"]["loss"] for record in records]
    examples = [round(r["images_per_second"] * r["seconds"]) for r in records]
    found = [weights, losses, examples]
    torch.save(found, out / f"{name}-{ranks.rank if ranks else 'alone'}.pt")


def some_pixels(n):
    """Return n images of 8 x 8, the same on every rank."""
    return torch.rand(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class JoinedBatches:
    """The batches that ranks make together, each rank's rows after those of the one before."""

    def __init__(self, n, world):
        self.n, self.world, self.epoch = n, world, 0

    def set_epoch(self, epoch):
        """Set the number of the epoch, as a `DistributedSampler` does."""
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(3 + self.epoch)  # as DistributedSampler's
        order = torch.randperm(self.n, generator=generator).tolist()
        own = self.n // self.world
        parts = [order[: own * self.world][rank :: self.world] for rank in range(self.world)]
        for start in range(0, own, 4):
            yield [i for part in parts for i in part[start : start + 4]]

    def __len__(self):
        return -(-(self.n // self.world) // 4)


if __name__ == "__main__":
    out, outcomes = Path(sys.argv[1]), {}
    for world in (1, 2, 3):
        outcomes[f"follow {world}"] = launch(out, world, follow)
    outcomes["late"] = launch(out, 2, late)
    for world in (1, 2, 3):
        outcomes[f"read {world}"] = launch(out, world, read, f"read{world}")
    for world in (2, 3):
        outcomes[f"own loader {world}"] = launch(out, world, own_loader, f"own{world}")
        outcomes[f"alone {world}"] = launch(out, 1, own_loader, f"own{world}")
    (out / "outcomes.json").write_text(json.dumps(outcomes))
