"""Assisted with every coupling: resumption, devices and dtypes, training by `fit`."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from optgen.controllers import ControlVAE, Geco
from optgen.data.images import Batch, Images, digits
from optgen.models.conditional import ConditionalVAE
from optgen.models.ladder import LadderDecoder, LadderEncoder
from optgen.models.vae import VAE
from optgen.optim import Adam
from optgen.schemes.assisted import Assisted, Balanced
from optgen.schemes.couplings import DIVERGENCES, RECEIVERS, Agreement, Denoising, Reconstruction
from optgen.testing import generator
from optgen.training import checkpoint
from optgen.training.trainer import fit

DIGITS = digits("train")
IMAGES = Images(DIGITS.images[:, :, 4:28:3, 4:28:3].contiguous()[:300], DIGITS.labels[:300])
FEW = IMAGES.subset(torch.arange(40))


class Net(nn.Module):
    """A small classifier with features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 12), nn.ReLU()), nn.Linear(12, 10)

    def features(self, x):
        """Return the features of images."""
        return self.body(x.flatten(1))

    def forward(self, x):
        """Return the logits of images."""
        return self.head(self.features(x))


def plain():
    """Arguments of the classifier alone."""
    return {"classifier": Net()}


def agreement(divergence="classifier", **more):
    """Arguments of agreement with a conditional VAE."""
    classifier = Net()
    vae = ConditionalVAE(64, 10, 3, 12)
    return {"classifier": classifier, "generator": vae, "coupling": Agreement(divergence), **more}


def reconstruction(loss="bernoulli", to="both", **more):
    """Arguments of reconstruction by a linear decoder."""
    classifier, decoder = Net(), nn.Linear(12, 64)
    coupling = Reconstruction(loss, to)
    return {"classifier": classifier, "generator": decoder, "coupling": coupling, **more}


def ladder(*layer_weights):
    """Arguments of a ladder network."""
    sizes = (64, 12, 10)
    encoder, decoder = LadderEncoder(sizes), LadderDecoder(sizes, layer_weights)
    return {"classifier": encoder, "generator": decoder, "coupling": Denoising()}


def m1():
    """Arguments of a linear classifier of the latents of a VAE."""
    return {"classifier": nn.Linear(3, 10), "features": VAE(64, 12, 8, 3)}


def m1_m2():
    """Arguments of agreement on the latents of a VAE."""
    classifier, vae = nn.Linear(3, 10), ConditionalVAE(3, 10, 2, 12, "gaussian")
    parts = {"classifier": classifier, "generator": vae, "coupling": Agreement()}
    return parts | {"features": VAE(64, 12, 8, 3)}


def agreement_with_geco():
    """Arguments of agreement with a controlled weight."""
    return agreement(weight=Geco(0.5, rate=0.01))


def controlled_reconstruction():
    """Arguments of reconstruction by squared error with a controlled weight."""
    return reconstruction("squared", weight=ControlVAE(2.0, ki=0.01))


def balanced_reconstruction():
    """Arguments of reconstruction under the rule `Balanced`."""
    return reconstruction(rule=Balanced(project=True))


PARTS = {
    "plain": plain,
    **{f"agreement {kind}": partial(agreement, kind) for kind in DIVERGENCES},
    **{f"reconstruction to {to}": partial(reconstruction, to=to) for to in RECEIVERS},
    "squared, controlled": controlled_reconstruction,
    "agreement, geco": agreement_with_geco,
    "balanced": balanced_reconstruction,
    "ladder": partial(ladder, 10.0, 1.0, 0.1),
    "gamma": partial(ladder, 0.0, 0.0, 1.0),
    "m1": m1,
    "m1+m2": m1_m2,
}
every_method = pytest.mark.parametrize("name", PARTS)


def make(name, seed=0, dtype=torch.float32, device="cpu", labeled=FEW):
    """Return a small scheme whose networks are drawn from a seed."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        arguments = PARTS[name]()
    optimizers = {}
    for player in ("classifier", "generator", "features"):
        if arguments.get(player) is not None:
            params = arguments[player].to(dtype).parameters()
            optimizers[player] = Adam(params, lr=3e-3)
    return Assisted(labeled=labeled, optimizers=optimizers, **arguments)


def train(scheme, steps, seed=0):
    """Take some steps, whose batches and noise are seeded, and return the last losses."""
    like = next(scheme.classifier.parameters())
    for t in range(steps):
        torch.manual_seed(1000 * seed + t)
        indices = torch.randperm(300, generator=generator(1000 * seed + t))[:16]
        images = (IMAGES.images[indices] / 255).to(like)
        losses = scheme.step(Batch(images, IMAGES.labels[indices].to(like.device)))
    return losses


def equal(a, b):
    """Return whether two nested states are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@every_method
def test_it_resumes_to_the_last_bit(name, tmp_path):
    whole, stopped, resumed = (make(name, seed=s) for s in (0, 0, 5))
    train(whole, 4)
    train(whole, 3, seed=1)
    train(stopped, 4)
    checkpoint.save(tmp_path / "state.pt", stopped.state_dict())
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    train(resumed, 3, seed=1)
    assert equal(whole.state_dict(), resumed.state_dict())


def draw_in_float32(scheme):
    """Let a scheme draw its noise as in float32, then convert it to the dtype of the images."""
    draw = scheme.draw

    def converted(batch):
        """Return the batch with its noise, in the dtype of its images."""
        found = draw(Batch(batch.x.float(), batch.y))
        tensors = (t.to(batch.x.dtype) if t.is_floating_point() else t for t in found)
        return type(found)(*tensors)

    scheme.draw = converted


@every_method
def test_float32_follows_float64(name, monkeypatch):
    wide, narrow = make(name, dtype=torch.float64), make(name)
    wide.load_state_dict(copy.deepcopy(narrow.state_dict()))
    draw_in_float32(wide)
    draw_in_float32(narrow)
    randn = torch.randn

    def randn_in_float32(*shape, dtype=None, **more):
        """Draw in float32, so that both schemes see the same numbers."""
        return randn(*shape, **more).to(dtype)

    monkeypatch.setattr(torch, "randn", randn_in_float32)
    a, b = train(wide, 6), train(narrow, 6)
    for player in a:
        error = abs(a[player] - b[player])
        assert error < 1e-3 * abs(a[player]) + 1e-3, (player, a[player], b[player])


@every_method
def test_bfloat16_autocast_trains(name):
    scheme, single = make(name), make(name)
    scheme.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    few = [Batch(FEW.images / 255, FEW.labels)]
    first = scheme.evaluate(few)["nll"]
    last = train(scheme, 100)
    train(single, 100)
    assert all(torch.isfinite(x) for x in last.values())
    found, expected = (s.evaluate(few)["nll"] for s in (scheme, single))
    assert expected < first and abs(found - expected) < 0.25 * (first - expected)
    assert all(p.dtype == torch.float32 for p in scheme.classifier.parameters())


@every_method
def test_on_meta(name):
    scheme = make(name, device="meta", labeled=None)
    images = torch.empty(6, 1, 8, 8, device="meta")
    losses = scheme.step(Batch(images, torch.empty(6, dtype=torch.int64, device="meta")))
    assert all(x.is_meta and x.shape == () for x in losses.values())


@every_method
def test_compiles_once_and_trains_alike(name, monkeypatch):
    eager, compiled = (make(name, dtype=torch.float64) for _ in range(2))
    counter, compile = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda loss, mode: compile(loss, backend=counter))
    compiled.compile()
    train(eager, 3)
    train(compiled, 3)
    once = counter.frame_count
    a, b = train(eager, 8, seed=1), train(compiled, 8, seed=1)
    assert counter.frame_count == once
    assert once or name == "balanced"  # Balanced differentiates the terms, not the loss
    for player in a:
        assert torch.allclose(a[player], b[player], rtol=1e-9), player
    for one, other in zip(eager.players.values(), compiled.players.values()):
        for p, q in zip(one.params.values(), other.params.values()):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["agreement, geco", "balanced", "ladder"])
def test_fit_goes_on_where_it_stopped_and_measures(name, tmp_path):
    valid = IMAGES.subset(torch.arange(200, 300))
    settings = {"valid": valid, "batch_size": 50, "progress": "none", "samples": 0}
    whole, half, rest = (make(name) for _ in range(3))
    records = fit(whole, IMAGES, epochs=2, out=tmp_path / "whole", **settings)
    fit(half, IMAGES, epochs=1, out=tmp_path / "half", **settings)
    fit(rest, IMAGES, epochs=2, out=tmp_path / "half", resume=True, **settings)
    assert equal(whole.state_dict(), rest.state_dict())
    found = records[-1]["valid"]
    assert 0 <= found["error_low"] <= found["error"] <= found["error_high"] <= 1
    assert found["nll"] > 0 and 0 <= found["ece"] <= 1


def test_every_label_is_seen_once_before_any_twice():
    scheme = make("plain")
    _, y = scheme.draw_labeled(torch.empty(40, 1, 8, 8))
    assert torch.equal(y.sort().values, FEW.labels.sort().values)
    _, y = scheme.draw_labeled(torch.empty(100, 1, 8, 8))
    counts = torch.bincount(y, minlength=10) - 2 * torch.bincount(FEW.labels, minlength=10)
    assert (counts >= 0).all() and counts.sum() == 20


@pytest.mark.cuda
@every_method
def test_cuda_as_on_the_cpu(name):
    a, b = make(name, dtype=torch.float64), make(name, dtype=torch.float64)
    b.to("cuda")
    for t in range(3):
        torch.manual_seed(t)
        batch = a.draw_noise(Batch(IMAGES.images[:16].double() / 255, IMAGES.labels[:16]))
        on_cuda = type(batch)(*(x.cuda() for x in batch))
        a.draw, b.draw = (lambda _: batch), (lambda _: on_cuda)
        losses, losses_on_cuda = a.step(None), b.step(None)
        for player in losses:
            assert abs(losses[player] - losses_on_cuda[player].cpu()) < 1e-9
