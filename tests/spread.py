"""What test_parallel.py looks at: `python spread.py OUT` leaves the results of one to three ranks.

Ranks are forked, so that PyTorch is imported once."""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from optgen import opponents, rules
from optgen.averaging import averages_of
from optgen.controllers import ControlVAE, FreeBits, Geco, SigmaVAE
from optgen.data.images import Batch, Images, digits
from optgen.games import Game, Player, Simultaneous
from optgen.inner import Refinement
from optgen.models.conditional import ConditionalVAE
from optgen.models.flow import Logit, maf
from optgen.models.pixels import MADE
from optgen.models.vae import VAE, GaussianVAE
from optgen.optim import Adam, Momentum
from optgen.schemes.assisted import Assisted, Balanced
from optgen.schemes.couplings import Agreement, Reconstruction
from optgen.schemes.elbo import Aggressive, BetaVAE
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.training.callbacks import Pictures
from optgen.training.guards import Interrupted
from optgen.training.parallel import abort_all_on_error, init_ranks
from optgen.training.trainer import fit

RULES = {
    "simultaneous": Simultaneous,
    "alternating": rules.Alternating,
    "alternating twice, consensus": lambda: rules.Alternating(
        inner=rules.Consensus(0.2), repeats={"D": 2}, order=["D", "G"]
    ),
    "extragradient": rules.Extragradient,
    "extragradient of the past": lambda: rules.Extragradient(past=True),
    "optimistic": rules.Optimistic,
    "literal": lambda: rules.Feedback(to="G", loss="D", wrt="G", weight=0.5),
    "nagarajan-kolter": lambda: rules.Feedback(to="G", loss="D", wrt="D", weight=0.5),
    "smoothing": lambda: rules.Feedback(to="D", loss="D", wrt="G", weight=0.5),
    "a list": lambda: [rules.Consensus(0.2), rules.Feedback(to="G", loss="D", wrt="D", weight=0.5)],
    "consensus": lambda: rules.Consensus(0.5),
    "symplectic": rules.SymplecticAdjustment,
    "symplectic, not aligned": lambda: rules.SymplecticAdjustment(0.5, align=False),
    "lookahead of extragradient": lambda: rules.Lookahead(
        inner=rules.Extragradient(inner=rules.Consensus(0.2)), every=3
    ),
    "unrolled": lambda: opponents.Unrolled(player="D", steps=3),
    "competitive": opponents.CompetitiveGradient,
    "clipped": lambda: rules.Clipped(0.15, rules.Consensus(0.2)),
}
OPTIMIZERS = {
    "momentum": lambda p: Momentum(p, lr=0.05, momentum=0.5),
    "adam": lambda p: Adam(p, lr=0.01),
    "negative momentum": lambda p: Momentum(p, lr=0.05, momentum=-0.3),
}
SIZES = [12, 7, 3, 1]  # rows of a batch: even, uneven, and fewer than there are ranks


class Noisy(NamedTuple):
    """A batch with its noise."""

    x: Tensor
    z: Tensor
    scale: Tensor  # 0-dim: the whole batch's


def net(*sizes, g, dtype):
    """Return a network of these sizes, its weights drawn in float64."""
    layers = [
        layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o, dtype=dtype), nn.Tanh())
    ][:-1]
    for m in layers[::2]:
        m.weight.data = (
            torch.randn(m.weight.shape, generator=g, dtype=torch.float64).to(dtype)
            / m.in_features**0.5
        )
    for m in layers[::2]:
        m.bias.data = torch.randn(m.bias.shape, generator=g, dtype=torch.float64).to(dtype) / 2
    return nn.Sequential(*layers)


def some(cases, ranks):
    return (
        list(cases)[::3] if ranks and ranks.world == 3 else list(cases)
    )  # of three ranks, which two processors share, every third


def gan(rule=None, dtype=torch.float64, optimizer="momentum", seed=0):
    "A small smooth GAN whose batch's noise is drawn from the default generator."
    gen = torch.Generator().manual_seed(seed)
    G, D = net(3, 8, 2, g=gen, dtype=dtype), net(2, 8, 1, g=gen, dtype=dtype)

    def draw(x):
        return Noisy(x, torch.randn(len(x), 3, dtype=dtype), x.new_tensor(0.9))

    def loss_d(b):
        return (
            softplus(-D(b.x)).mean()
            + softplus(D(G(b.z) * b.scale)).mean()
            + 0.1 * rules.input_gradient_penalty(D, b.x)
        )

    def loss_g(b):
        return softplus(-D(G(b.z) * b.scale)).mean()

    make = OPTIMIZERS[optimizer]
    return Game(
        G=Player(G, loss_g, make(G.parameters())),
        D=Player(D, loss_d, make(D.parameters())),
        draw=draw,
        rule=rule,
    )


def train(ranks=None, steps=12, dtype=torch.float64, seed=0, **kwargs):
    "Weights and losses after some steps on batches of changing size."
    game = gan(dtype=dtype, seed=seed, **kwargs)
    game.ranks = ranks
    g = torch.Generator().manual_seed(seed + 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(steps):
            losses = game.step(
                torch.randn(SIZES[i % len(SIZES)], 2, generator=g, dtype=torch.float64).to(dtype)
            )
    return torch.cat([p.flatten() for ps in game.weights().values() for p in ps]), {
        k: loss.item() for k, loss in losses.items()
    }


def every(ranks=None):
    "{(rule, optimizer, dtype): weights and losses}"
    cases = [(rule, "momentum", "float64") for rule in RULES] + [
        (rule, "momentum", "float32") for rule in list(RULES)[::3]
    ]
    cases += [
        (rule, optimizer, "float64")
        for rule in ("simultaneous", "consensus")
        for optimizer in ("adam", "negative momentum")
    ]
    return {
        case: train(ranks, rule=RULES[case[0]](), optimizer=case[1], dtype=getattr(torch, case[2]))
        for case in some(cases, ranks)
    }


ELBOS = {  # what a BetaVAE is made of
    "geco": lambda: dict(beta=Geco(4.0, rate=0.02, smoothing=0.5)),
    "free bits": lambda: dict(beta=FreeBits(0.02)),
    "sigma": lambda: dict(beta=SigmaVAE(6)),
    "iwae, sampled": lambda: dict(estimator="iwae", k=3, sampled=True),
    "dreg, geco": lambda: dict(estimator="dreg", k=3, beta=Geco(4.0, rate=0.02)),
    "semi": lambda: dict(inner=Refinement(2), beta=Geco(4.0, rate=0.02)),
    "semi, adjoint": lambda: dict(inner=Refinement(2, mode="adjoint")),
    "alternating": lambda: dict(players=2, rule=rules.Alternating(), beta=Geco(4.0, rate=0.02)),
    "aggressive": lambda: dict(players=2, rule=Aggressive(2, 3), beta=FreeBits(0.02)),
    "aggressive to its end": lambda: dict(
        players=2, rule=Aggressive(2, 3, 1)
    ),  # each rank measures information in its own rows
}


def vae(name, dtype=torch.float64, seed=0, steps=30, ranks=None):
    "Weights, the last losses and beta of a BetaVAE after some steps on batches of changing size."
    parts = ELBOS[name]()
    players = parts.pop("players", 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (GaussianVAE if isinstance(parts.get("beta"), SigmaVAE) else VAE)(
            6, 8, 5, 2, activation=nn.Tanh
        ).to(dtype)
        optimizer = (
            Momentum(model.parameters(), lr=0.02, momentum=0.5)
            if players == 1
            else tuple(
                Momentum(m.parameters(), lr=0.02, momentum=0.5) for m in (model.q_net, model.p_net)
            )
        )
        game = BetaVAE(model, optimizer=optimizer, **parts)
        game.ranks = ranks
        g = torch.Generator().manual_seed(seed + 1)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        for i in range(steps):
            losses = game.step(
                Batch(
                    torch.rand(SIZES[i % len(SIZES)], 6, generator=g, dtype=torch.float64)
                    .round()
                    .to(dtype)
                )
            )
    return (
        torch.cat([p.detach().flatten() for p in model.parameters()]),
        torch.stack([*losses.values(), game.beta.value.mean()]),
        start,
        game.rule.memory.get("waiting"),
    )


def elbos(ranks=None):
    """{(name, dtype): what `vae` returns}"""
    return {
        (name, dtype): vae(name, getattr(torch, dtype), ranks=ranks)
        for name, dtype in some(
            [(name, "float64") for name in ELBOS]
            + [(name, "float32") for name in list(ELBOS)[::3]],
            ranks,
        )
    }


ASSISTED = {  # generator, coupling, and more
    "agreement": lambda: (
        ConditionalVAE(6, 3, 2, 5),
        Agreement(),
        dict(weight=ControlVAE(0.1, ki=0.05)),
    ),
    "reconstruction": lambda: (nn.Linear(5, 6), Reconstruction(to="classifier"), {}),
    "balanced": lambda: (nn.Linear(5, 6), Reconstruction(), dict(rule=Balanced(project=True))),
    "m1+m2": lambda: (
        ConditionalVAE(2, 3, 2, 5, "gaussian"),
        Agreement("jensen-shannon"),
        dict(features=VAE(6, 8, 5, 2, activation=nn.Tanh)),
    ),
}


class Net(nn.Module):
    """A small classifier with features."""

    def __init__(self, inputs):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh()), nn.Linear(5, 3)

    def features(self, x):
        """Return the features."""
        return self.body(x)

    def forward(self, x):
        """Return the logits."""
        return self.head(self.features(x))


def assisted(name, ranks=None, steps=12):
    "Weights, the last losses and lambda of an Assisted after steps on batches of changing size."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator, coupling, more = ASSISTED[name]()
        classifier = Net(2 if "features" in more else 6)
        modules = {"classifier": classifier, "generator": generator} | {
            k: m for k, m in more.items() if k == "features"
        }
        game = Assisted(
            classifier,
            generator,
            coupling,
            optimizers={
                k: Momentum(m.double().parameters(), lr=0.02, momentum=0.5)
                for k, m in modules.items()
            },
            **more,
        )
        game.ranks = ranks
        start, g = (
            torch.cat([p.flatten() for ps in game.weights().values() for p in ps]),
            torch.Generator().manual_seed(1),
        )
        for i in range(steps):
            n = SIZES[i % len(SIZES)]
            losses = game.step(
                Batch(
                    torch.rand(n, 6, generator=g, dtype=torch.float64).round(),
                    torch.randint(3, (n,), generator=g),
                )
            )
    return (
        torch.cat([p.flatten() for ps in game.weights().values() for p in ps]),
        torch.stack([*losses.values(), game.weight.value]),
        start,
    )


LIKELIHOODS = {
    "binary": lambda: MADE((1, 2, 3), (8,)),
    "levels": lambda: MADE((1, 2, 3), (8,), 4),
    "dequantized": lambda: maf(6, 2, (8,), preprocessing=[Logit(0.05)]),
}


def likelihood(data, ranks=None, steps=20):
    "Weights, the last loss and the first weights of a MaximumLikelihood, on uneven batches."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LIKELIHOODS[data]().double()
        game = MaximumLikelihood(model, data, Momentum(model.parameters(), lr=0.01, momentum=0.5))
        game.ranks = ranks
        start, g = (
            torch.cat([p.flatten() for p in game.weights()["model"]]),
            torch.Generator().manual_seed(1),
        )
        for i in range(steps):
            losses = game.step(
                Batch(
                    torch.randint(
                        2 if data == "binary" else 256,
                        (SIZES[i % len(SIZES)], 1, 2, 3),
                        generator=g,
                    ).double()
                    / (1 if data == "binary" else 255)
                )
            )
    return torch.cat([p.flatten() for p in game.weights()["model"]]), losses["model"][None], start


def own_norms(ranks=None):
    "Consensus with each rank's own penalty, whose gradients are averaged."

    class Own(rules.Consensus):
        def correction(self, at):
            game, mean = at.game, at.game.ranks
            game.ranks = None
            found = super().correction(game.at(at.batch, graph=True))
            game.ranks = mean
            flat = iter(game.average_over_ranks([t for ts in found.values() for t in ts]))
            return type(found)({k: [next(flat) for _ in ts] for k, ts in found.items()})

    return train(ranks, rule=Own(0.5))


def batches(steps=6):
    """Return batches of changing size, the same on every rank."""
    g = torch.Generator().manual_seed(5)
    return [torch.randn(SIZES[i % 4], 2, generator=g, dtype=torch.float64) for i in range(steps)]


def begun_apart(ranks):
    "Weights, averages and Adam's state of a loop of one's own, begun with other weights on each."
    rank = ranks.rank if ranks else 0
    game = gan(seed=rank, optimizer="adam", rule=rules.Extragradient(past=True))
    if not rank:  # a state of an earlier run, which only the first rank has loaded
        torch.manual_seed(1)
        game.step(batches()[0])
    game.averages = averages_of(game, 0.5)
    game.ranks = ranks
    torch.manual_seed(2)
    for x in batches():
        game.step(x)
        for average in game.averages:
            average.update()
    moments = [s["exp_avg"] for p in game.players.values() for s in p.optimizer.state.values()]
    means = [mean for average in game.averages for mean in average.means]
    return torch.cat([t.flatten() for t in (*flatten(game), *means, *moments)])


def flatten(game):
    """Return all weights of a game."""
    return [p.detach() for ps in game.weights().values() for p in ps]


def routed(ranks):
    "Weights of experts, of which each rank reaches others, and one is reached by none."
    experts = torch.ones(4, 2, dtype=torch.float64).unbind()
    experts = [e.clone().requires_grad_() for e in experts]
    optimizer = torch.optim.AdamW(experts, lr=0.05, weight_decay=0.5)

    def loss(x):
        parts = [x[:, 0] * 0]
        for k in x[:, 1].long().unique().tolist():
            chosen = (x[:, 1] == k).to(x.dtype)
            parts.append(chosen * (experts[k].square().sum() - x[:, 0]) ** 2)
        return sum(parts).mean()

    game = Game(rule=rules.Consensus(0.05), m=Player(experts, loss, optimizer))
    game.ranks = ranks
    for t in range(8):
        x = torch.linspace(-1, 1, 6, dtype=torch.float64)
        k = torch.tensor([0, 0, 0, 1, 1, 2]) if t % 2 else torch.tensor([0, 0, 1, 1, 1, 1])
        game.step(torch.stack([x, k.to(x.dtype)], 1))
        experts[1].requires_grad_(t not in (3, 4))
    assert experts[3].grad is None and torch.equal(experts[3], torch.ones_like(experts[3]))
    return torch.cat([e.detach() for e in experts])


def lone_warnings(ranks):
    "What a game says that does not know its ranks."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        game = gan()
        game.step(batches()[0])
        game.step(batches()[0])
    return [str(w.message) for w in caught]


def sparse_error(ranks):
    "What ranks say of sparse gradients."
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    game = Game(m=Player(table, lambda i: table(i).square().mean(), optimizer))
    game.ranks = ranks
    try:
        game.step(torch.arange(3))
    except TypeError as error:
        return str(error)
    return ""


def parallel_error(ranks):
    "What a game says of PyTorch's own data parallelism."
    net = nn.Linear(2, 1)
    wrapped = DistributedDataParallel(net) if ranks else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    game = Game(m=Player(net, lambda x: wrapped(x).square().mean(), optimizer))
    game.ranks = ranks
    try:
        game.step(torch.ones(4, 2))
    except ValueError as error:
        return str(error)
    return ""


OWN_LOOPS = {
    f.__name__: f for f in (begun_apart, routed, lone_warnings, sparse_error, parallel_error)
}


def follow_one(out):
    """Take the steps of every rule and scheme, and leave the results."""
    ranks = init_ranks()
    with abort_all_on_error(ranks):
        torch.save(
            {
                "every": every(ranks),
                "own": own_norms(ranks),
                "elbos": elbos(ranks),
                "assisted": {name: assisted(name, ranks) for name in ASSISTED},
                "loops": {name: loop(ranks) for name, loop in OWN_LOOPS.items()},
                "likelihoods": {data: likelihood(data, ranks) for data in LIKELIHOODS},
            },
            out / f"{ranks.rank if ranks else 0}-of-{ranks.world if ranks else 1}.pt",
        )


def few(n=190):
    """Return the first digits."""
    return Images(digits("train").images[:n])


def scheme(seed=0, hidden=16):
    """Return a small VAE that is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VAE(784, hidden, 8, 2)
    return BetaVAE(model, optimizer=Adam(model.parameters(), lr=1e-3, eps=1e-3))


def at_step(game, step, do):
    "Call `do` when that step's noise is drawn."
    draw, count = game.draw, iter(range(1, 10**9))

    def drawn(batch):
        if next(count) == step:
            do()
        return draw(batch)

    game.draw = drawn
    return game


def run(out, name, game=None, epochs=3, **kwargs):
    "Fit a small run and leave what it ended with; ten steps an epoch, the last batch smaller."
    game = game or scheme()
    images = kwargs.pop("images", None) or few()
    usual = {
        "valid": few(60),
        "batch_size": 20,
        "binarize": "dynamic",
        "ema": 0.9,
        "samples": 4,
        "progress": "lines",
        "flip": True,  # of which the ranks agree without a message
    }
    try:
        records = fit(game, images, epochs=epochs, out=out / name, **{**usual, **kwargs})
    except Interrupted as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(128 + e.signum)
    rank = init_ranks().rank if init_ranks() else 0
    torch.save({"state": game.state_dict(), "records": records}, out / f"{name}-{rank}.pt")


class CallNotes:
    """Callback that notes every call: its name, the finished epochs and the steps."""

    def __init__(self):
        self.calls = []

    def note(self, name, run):
        """Note a call."""
        self.calls.append([name, run.epoch, run.step])

    def on_train_begin(self, run):
        """Note the beginning."""
        self.note("on_train_begin", run)

    def on_step(self, run, batch, losses):
        """Note the step."""
        self.note("on_step", run)

    def on_epoch(self, run, record):
        """Note the epoch."""
        self.note("on_epoch", run)

    def on_checkpoint(self, run, path):
        """Note the checkpoint."""
        self.note("on_checkpoint", run)

    def on_train_end(self, run):
        """Note the end."""
        self.note("on_train_end", run)


def noted(out, name):
    """Fit a small run, and leave the calls of its callback by rank."""
    notes = CallNotes()
    run(out, name, callbacks=[notes])
    rank = init_ranks().rank if init_ranks() else 0
    (out / f"{name}-{rank}-calls.json").write_text(json.dumps(notes.calls))


def mine(rank, do):
    """Return `do` on that rank, and nothing to do on others."""
    return do if init_ranks() and init_ranks().rank == rank else lambda: None


def fault(out, how):
    """Fit a small run in which something goes wrong on one rank."""
    game = scheme()
    if how == "raise":
        at_step(game, 13, mine(1, lambda: 1 / 0))
    if how == "kill 1":
        at_step(game, 13, mine(1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if how == "kill 0":
        at_step(game, 13, mine(0, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if how == "signal":
        at_step(game, 13, mine(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    if how == "weights":
        at_step(game, 13, mine(1, lambda: next(game.model.parameters()).data.add_(0.01)))
    if how == "nan":
        loss, step = game.players["model"].loss, []
        at_step(game, 7, mine(1, lambda: step.append(7)))
        game.players["model"].loss = lambda b: loss(b) * (torch.nan if step and step.pop() else 1)
    if how == "measured":
        evaluations = iter(range(9))  # the first one is the rehearsal's

        def evaluate(batches):
            """Measure for long; in the epoch a signal comes."""
            if next(evaluations) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return {"loss": 1.0}

        game.evaluate = evaluate
    if how == "evaluate":
        game.evaluate = lambda batches: {"loss": 1 / 0}
    if how == "model":
        game = scheme(hidden=16 + init_ranks().rank)
    if how == "noise":
        loss = game.players["model"].loss
        game.players["model"].loss = lambda b: loss(b) + 0 * torch.randn(len(b.x)).sum()
    run(
        out,
        how,
        game,
        images=few(190 + init_ranks().rank)
        if how == "data"
        else few(195)
        if how == "noise"
        else None,
        checkpoint_steps=5,
    )


FAULTS = [
    "raise",
    "kill 1",
    "kill 0",
    "signal",
    "measured",
    "weights",
    "nan",
    "evaluate",
    "model",
    "noise",
    "data",
]


def moved(out, epochs):
    """Begin a run, or resume it on other ranks."""
    run(out, "moved", epochs=epochs, resume=epochs > 1)


def resume(out, how):
    """Resume a run that was stopped."""
    run(out, how, scheme(seed=9), resume=True, checkpoint_steps=5)


def stop_early(out, name):
    """Fit a run that ends by its patience."""
    game = scheme()
    bits = iter([9.0, 3.0, 2.0, 4.0, 5.0, 1.0])  # the first one is the rehearsal's
    game.evaluate = lambda batches: {"bits": next(bits)}
    game.criterion = "bits"
    run(out, name, game, epochs=5, patience=2)


def mistake(out, *args):
    """Call the command line with a mistake."""
    from optgen.cli.main import main

    main(["train", "beta-vae", *args, "--out", str(out / "mistake")])


def host_store():
    "Keep the store in a process that is no rank, as torchrun does; its id and variables."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    child = os.fork()
    if not child:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while store:
            signal.pause()
    return child, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def leave_after(work):
    """Do the work and end this process with its exit code."""
    "As the interpreter ends, but without taking a forked PyTorch apart, which takes seconds."
    try:
        work()
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(out, world, work, *args):
    "Fork ranks that do the work, and wait; exit codes and output. The guard ends what hangs."
    children, store = [], host_store() if world > 1 else None
    for rank in range(world):
        if (child := os.fork()) == 0:
            os.dup2(os.open(out / f"said-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            os.dup2(2, 1)
            if store:
                os.environ.update(
                    store[1], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
                )
            leave_after(lambda: work(out, *args))
        children.append(child)
    guard = threading.Timer(100, lambda: [os.kill(child, signal.SIGKILL) for child in children])
    guard.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    guard.cancel()
    if store:
        os.kill(store[0], signal.SIGKILL)
        os.waitpid(store[0], 0)
    return {"codes": codes, "said": [(out / f"said-{rank}").read_text() for rank in range(world)]}


if __name__ == "__main__":
    out, outcomes = Path(sys.argv[1]), {}
    for world in (1, 2, 3):
        outcomes[f"rules {world}"] = launch(out, world, follow_one)
    outcomes["whole"] = launch(out, 1, noted, "whole")
    outcomes["spread"] = launch(out, 3, noted, "spread")
    del Pictures.on_epoch  # to save time
    for how in FAULTS:
        outcomes[how] = launch(out, 2, fault, how)
    for world, epochs in ((2, 1), (3, 2), (1, 3)):
        outcomes[f"moved {world}"] = launch(out, world, moved, epochs)
    for how, world in (("signal", 3), ("kill 1", 2)):
        outcomes[f"{how} resumed"] = launch(out, world, resume, how)
    outcomes["early"] = launch(out, 2, stop_early, "early")
    outcomes["usage"] = launch(out, 2, mistake, "--epochs", "0")
    outcomes["missing"] = launch(out, 2, mistake, "--data", "nowhere")
    (out / "outcomes.json").write_text(json.dumps(outcomes))
