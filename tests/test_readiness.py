"""What a CPU can prove for a GPU: no step reads a number on the host, and all run in bfloat16.

On the `meta` device every read of a number raises. On the CPU reads are counted, those of an
optimizer's own counters left out, which stay on the host.
"""

import functools
import warnings

import pytest
import torch
from test_options import SMALL, build
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.data.images import Batch, Images
from optgen.named_controllers import CONTROLLERS
from optgen.rules import RULES
from optgen.schemes.command import OPTIMIZERS

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}
CASES = [(scheme, "") for scheme in SMALL]
CASES += [("beta-vae", f"--optimizer {name}") for name in OPTIMIZERS]
CASES += [("assisted", f"--method m1+m2 --optimizer {name}") for name in OPTIMIZERS]
CASES += [("feedback-gan", f"--rule {name}") for name in RULES]
CASES += [("feedback-gan", text) for text in ("--model conv --width 4", "--r1 1 --r2 1")]
BETAS = {
    "constant": "0.5",
    "warmup": "warmup",
    "cyclical": "cyclical",
    "capacity": "capacity:target=3",
    "free-bits": "free-bits:minimum=0.1",
    "geco": "geco:target=40",
    "control": "control:target=3",
    "nu-pi": "nu-pi:target=3",
    "augmented": "augmented:target=3",
    "sigma": "sigma --likelihood gaussian --binarize none",
}
CASES += [("beta-vae", f"--beta {text}") for text in BETAS.values()]
CASES += [("beta-vae", f"--estimator {name} --k 3") for name in ("iwae", "stl", "dreg")]
CASES += [("beta-vae", f"--inference {name}") for name in ("semi",)]
CASES += [("beta-vae", f"--model {name}") for name in ("conv", "autoregressive")]
CASES += [
    ("assisted", f"--method {name}") for name in ("reconstruction", "m1", "m1+m2", "agreement")
]
CASES += [("ddpm", "--levels adaptive --uncertainty --weight min-snr")]


def batch(device, seed=0):
    """Return images of 8 x 8 in [0, 1], black or white, with labels."""
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(12, 1, 8, 8, generator=random).round()
    return Batch(x.to(device), torch.randint(10, (12,), generator=random).to(device))


def clipped(scheme, text):
    """Return the scheme that some options build, its gradients clipped."""
    game = build(scheme, text)
    if scheme == "assisted":
        images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8, device="cpu")
        game.labeled = Images(images, torch.arange(20, device="cpu") % 10)
    for player in game.players.values():
        player.clip = 0.5
    return game


class CountedReads(TorchDispatchMode):
    """Note the operations that read a number of a tensor which is no counter of an optimizer."""

    def __init__(self, game):
        super().__init__()
        self.reads = []
        optimizers = [player.optimizer for player in game.players.values()]
        parts = [p for o in optimizers for p in getattr(o, "optimizers", [o])]
        states = [state for part in parts for state in part.state.values()]
        self.counters = {id(state["step"]) for state in states if "step" in state}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS and id(args[0]) not in self.counters:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme, text", CASES)
def test_no_step_after_the_first_reads_a_number(scheme, text):
    game = clipped(scheme, text).train()
    game.step(batch("cpu"))  # the first batch is checked
    with CountedReads(game) as counted:
        for i in range(2):
            losses = game.step(batch("cpu", i + 1))
    assert not counted.reads
    assert all(loss.isfinite() for loss in losses.values())


def test_aggressive_inference_reads_one_number_every_so_many_batches():
    """Its page says so: whether the decoder waits depends on a loss of the last batches."""
    game = clipped("beta-vae", "--inference aggressive:check=3").train()
    reads = []
    for i in range(7):
        with CountedReads(game) as counted:
            game.step(batch("cpu", i))
        reads.append(len(counted.reads))
    assert reads[1:] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("scheme, text", CASES)
def test_a_step_on_meta(scheme, text):
    with torch.device("meta"):
        game = clipped(scheme, text).train()
    for _ in range(2):
        losses = game.step(batch("meta"))
    assert all(loss.is_meta and loss.shape == () for loss in losses.values())
    for player in game.players.values():
        assert player.gradient_norm().is_meta


@pytest.mark.parametrize("scheme, text", CASES)
def test_steps_under_bfloat16_autocast(scheme, text):
    game = clipped(scheme, text).train()
    game.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2):
            losses = game.step(batch("cpu", i))
    assert all(loss.isfinite() for loss in losses.values())
    for name in game.players:
        assert {p.dtype for p in game.params(name)} == {torch.float32}
        assert all(p.isfinite().all() for p in game.params(name))


def test_every_controller_is_tried():
    assert BETAS.keys() >= CONTROLLERS.keys() - {"none"}
