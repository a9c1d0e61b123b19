"Assisted of the installed package with every coupling: resumption, devices and dtypes, training by `fit` with few labels."

import copy

import pytest
import torch
from conftest import rng
from torch import nn
from torch._dynamo.testing import CompileCounter

from optgen.controllers import ControlVAE, Geco
from optgen.data.images import Batch, Images, digits
from optgen.models.conditional import ConditionalVAE
from optgen.models.ladder import LadderDecoder, LadderEncoder
from optgen.models.vae import VAE
from optgen.optim import Adam
from optgen.schemes.assisted import (
    RECEIVERS,
    Agreement,
    Assisted,
    Balanced,
    Denoising,
    Reconstruction,
)
from optgen.training import checkpoint
from optgen.training.trainer import fit

IMAGES = Images(
    digits("train").images[:, :, 4:28:3, 4:28:3].contiguous()[:300], digits("train").labels[:300]
)
FEW = IMAGES.subset(torch.arange(40))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 12), nn.ReLU()), nn.Linear(12, 10)

    def features(self, x):
        return self.body(x.flatten(1))

    def forward(self, x):
        return self.head(self.features(x))


PARTS = {  # name -> classifier, generator, coupling, and more
    "plain": lambda: (Net(), None, None, {}),
    **{
        f"agreement {kind}": lambda kind=kind: (
            Net(),
            ConditionalVAE(64, 10, 3, 12),
            Agreement(kind),
            {},
        )
        for kind in ("classifier", "generator", "jensen-shannon")
    },
    **{
        f"reconstruction to {to}": lambda to=to: (
            Net(),
            nn.Linear(12, 64),
            Reconstruction(to=to),
            {},
        )
        for to in RECEIVERS
    },
    "squared, controlled": lambda: (
        Net(),
        nn.Linear(12, 64),
        Reconstruction("squared"),
        dict(weight=ControlVAE(2.0, ki=0.01)),
    ),
    "agreement, geco": lambda: (
        Net(),
        ConditionalVAE(64, 10, 3, 12),
        Agreement(),
        dict(weight=Geco(0.5, rate=0.01)),
    ),
    "balanced": lambda: (
        Net(),
        nn.Linear(12, 64),
        Reconstruction(),
        dict(rule=Balanced(project=True)),
    ),
    "ladder": lambda: (
        LadderEncoder((64, 12, 10)),
        LadderDecoder((64, 12, 10), (10.0, 1.0, 0.1)),
        Denoising(),
        {},
    ),
    "gamma": lambda: (
        LadderEncoder((64, 12, 10)),
        LadderDecoder((64, 12, 10), (0.0, 0.0, 1.0)),
        Denoising(),
        {},
    ),
    "m1": lambda: (nn.Linear(3, 10), None, None, dict(features=VAE(64, 12, 8, 3))),
    "m1+m2": lambda: (
        nn.Linear(3, 10),
        ConditionalVAE(3, 10, 2, 12, "gaussian"),
        Agreement(),
        dict(features=VAE(64, 12, 8, 3)),
    ),
}
everyone = pytest.mark.parametrize("name", PARTS)


def tiny(name, seed=0, dtype=torch.float32, device="cpu", labelled=FEW):
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        classifier, generator, coupling, more = PARTS[name]()
    modules = {"classifier": classifier, "generator": generator, "features": more.get("features")}
    modules = {k: m.to(dtype) for k, m in modules.items() if m is not None}
    return Assisted(
        classifier,
        generator,
        coupling,
        labeled=labelled,
        optimizers={k: Adam(m.parameters(), lr=3e-3) for k, m in modules.items()},
        **more,
    )


def train(scheme, steps, seed=0):
    like = next(scheme.classifier.parameters())
    for t in range(steps):
        torch.manual_seed(1000 * seed + t)
        places = torch.randperm(300, generator=rng(1000 * seed + t))[:16]
        losses = scheme.step(
            Batch((IMAGES.images[places] / 255).to(like), IMAGES.labels[places].to(like.device))
        )
    return losses


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@everyone
def test_it_resumes_to_the_last_bit(name, tmp_path):
    whole, one, other = (tiny(name, seed=s) for s in (0, 0, 5))
    train(whole, 4)
    train(whole, 3, seed=1)
    train(one, 4)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    train(other, 3, seed=1)
    assert same(whole.state_dict(), other.state_dict())


@everyone
def test_float32_follows_float64(name):
    wide, narrow = tiny(name, dtype=torch.float64), tiny(name)
    wide.load_state_dict(copy.deepcopy(narrow.state_dict()))
    draw = lambda scheme: (
        lambda b, own=scheme.draw: type(found := own(Batch(b.x.float(), b.y)))(
            *(t.to(b.x.dtype) if t.is_floating_point() else t for t in found)
        )
    )
    wide.draw, narrow.draw, old = draw(wide), draw(narrow), torch.randn
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "randn", lambda *a, dtype=None, **k: old(*a, **k).to(dtype))
        a, b = train(wide, 6), train(narrow, 6)
    for k in a:
        assert abs(a[k] - b[k]) < 1e-3 * abs(a[k]) + 1e-3, (k, a[k], b[k])


@everyone
def test_bfloat16_autocast_trains(name):
    scheme = tiny(name)
    scheme.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    few = [Batch(FEW.images / 255, FEW.labels)]
    first = scheme.evaluate(few)["nll"]
    last = train(scheme, 100)
    assert all(torch.isfinite(x) for x in last.values()) and scheme.evaluate(few)["nll"] < first
    assert all(p.dtype == torch.float32 for p in scheme.classifier.parameters())


@everyone
def test_on_meta(name):
    scheme = tiny(name, device="meta", labelled=None)
    losses = scheme.step(
        Batch(
            torch.empty(6, 1, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
        )
    )
    assert all(x.is_meta and x.shape == () for x in losses.values())


@everyone
def test_compiles_once_and_trains_alike(name, monkeypatch):
    eager, scheme, counter, real = (
        tiny(name, dtype=torch.float64),
        tiny(name, dtype=torch.float64),
        CompileCounter(),
        torch.compile,
    )
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda loss, mode: real(loss, backend=counter))
    scheme.compile()
    train(eager, 3), train(scheme, 3)
    once = counter.frame_count
    a, b = train(eager, 8, seed=1), train(scheme, 8, seed=1)
    assert counter.frame_count == once and (
        once or name == "balanced"
    )  # Balanced takes the losses apart itself
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=1e-9), k
    for one, other in zip(eager.players.values(), scheme.players.values()):
        for p, q in zip(one.params.values(), other.params.values()):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["agreement, geco", "balanced", "ladder"])
def test_fit_goes_on_where_it_stopped_and_measures(name, tmp_path):
    kw = dict(
        valid=IMAGES.subset(torch.arange(200, 300)), batch_size=50, progress="none", samples=0
    )
    whole, half, rest = (tiny(name) for _ in range(3))
    records = fit(whole, IMAGES, epochs=2, out=tmp_path / "whole", **kw)
    fit(half, IMAGES, epochs=1, out=tmp_path / "half", **kw)
    fit(rest, IMAGES, epochs=2, out=tmp_path / "half", resume=True, **kw)
    assert same(whole.state_dict(), rest.state_dict())
    found = records[-1]["valid"]
    assert (
        0 <= found["error_low"] <= found["error"] <= found["error_high"] <= 1
        and found["nll"] > 0
        and 0 <= found["ece"] <= 1
    )


def test_every_label_is_seen_once_before_any_twice():
    scheme = tiny("plain")
    _, y = scheme.some_labelled(torch.empty(40, 1, 8, 8))
    assert torch.equal(y.sort().values, FEW.labels.sort().values)
    _, y = scheme.some_labelled(torch.empty(100, 1, 8, 8))
    counts = torch.bincount(y, minlength=10) - 2 * torch.bincount(FEW.labels, minlength=10)
    assert (counts >= 0).all() and counts.sum() == 20


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu(name):
    a, b = tiny(name, dtype=torch.float64), tiny(name, dtype=torch.float64)
    b.to("cuda")
    for t in range(3):
        torch.manual_seed(t)
        batch = a.draw_noise(Batch(IMAGES.images[:16].double() / 255, IMAGES.labels[:16]))
        a.draw, b.draw = (lambda _: batch), (lambda _: type(batch)(*(x.cuda() for x in batch)))
        la, lb = a.step(None), b.step(None)
        for k in la:
            assert abs(la[k] - lb[k].cpu()) < 1e-9
