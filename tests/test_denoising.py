"DenoisingDiffusion of the installed package with every weight, target and way to draw: training by `fit`, resumption, devices and dtypes, torch.compile, spreading over ranks."

import math

import pytest
import torch
from conftest import rng
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.data.images import Batch, Images, digits
from optgen.models.diffusion import CosineSchedule, Denoiser, LinearSchedule, StraightSchedule, UNet
from optgen.rules import Extragradient
from optgen.schemes.denoising import WEIGHTS, AdaptiveLevels, DenoisingDiffusion, Uncertainty
from optgen.training.parallel import batch_tensors, slice_batch
from optgen.training.trainer import fit

DIGITS = digits("train")
IMAGES = Images(
    DIGITS.images[:200, :, 2:26:3, 2:26:3].contiguous(), DIGITS.labels[:200], classes=DIGITS.classes
)
PARTS = {
    "ddpm": lambda: dict(target="eps", weight="eps", schedule=LinearSchedule()),
    "improved": lambda: dict(target="eps", weight="min-snr", schedule=CosineSchedule()),
    "edm": dict,
    "flow matching": lambda: dict(
        target="flow", weight="flow", schedule=StraightSchedule(), coupling=True
    ),
    "x0, p2": lambda: dict(target="x0", weight="p2"),
    "elbo, adaptive": lambda: dict(weight="elbo", levels=AdaptiveLevels(5)),
    "uncertainty": lambda: dict(uncertainty=Uncertainty()),
    "conditional": lambda: dict(classes=10, coupling=True),
    "all, looking ahead": lambda: dict(
        weight="min-snr",
        uncertainty=Uncertainty(),
        levels=AdaptiveLevels(5),
        classes=10,
        rule=Extragradient(),
    ),
}
everyone = pytest.mark.parametrize("name", PARTS)


def tiny(name, seed=0, device="cpu"):
    with torch.device(device):
        parts = PARTS[name]()
    target, classes = parts.pop("target", "v"), parts.pop("classes", 0)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = Denoiser(
            UNet((1, 8, 8), 4, (1, 2), attention=False, classes=classes), (1, 8, 8), target
        )
    return DenoisingDiffusion(model, conditional=bool(classes), **parts)


def batch(seed, n=20, like=torch.zeros(())):
    rows = torch.randint(200, (n,), generator=rng(seed))
    return Batch((IMAGES.images[rows] / 255).to(like), IMAGES.labels[rows].to(like.device))


def train(scheme, steps, seed=0):
    like = next(scheme.model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([scheme.step(batch(seed + t, like=like))["model"] for t in range(steps)])


@pytest.mark.parametrize("name", ["flow matching", "elbo, adaptive", "all, looking ahead"])
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    more = dict(
        batch_size=50, valid=IMAGES.subset(torch.arange(20)), progress="none", ema=0.9, samples=0
    )
    whole, parts = tiny(name), tiny(name, 1)
    some = IMAGES.subset(torch.arange(100))
    records = fit(whole, some, epochs=2, out=tmp_path / "whole", **more)
    fit(tiny(name), some, epochs=1, out=tmp_path / "parts", **more)
    fit(parts, some, epochs=2, out=tmp_path / "parts", resume=True, **more)
    assert all(
        torch.equal(p, q) for n in whole.players for p, q in zip(whole.params(n), parts.params(n))
    )
    assert all(
        torch.equal(a, parts.levels.state_dict()[k]) for k, a in whole.levels.state_dict().items()
    ) and math.isfinite(records[-1]["valid"]["loss"])


@everyone
def test_nothing_waits_for_the_device(name):
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                raise AssertionError("a number is read on the host")
            return func(*args, **(kwargs or {}))

    scheme = tiny(name)
    if not scheme.coupling:
        scheme.draw(batch(1))  # the first is checked, which waits
        with Waits():
            scheme.loss(scheme.draw(batch(0))).backward()
            scheme.levels.update(*scheme.last_levels)
    tiny(name, device="meta").step(batch(0, like=torch.empty((), device="meta")))


@pytest.mark.parametrize("name", ["ddpm", "all, looking ahead"])
def test_dtypes(name):
    single, double = tiny(name), tiny(name)
    double.model.double()
    double.to(torch.float64)
    same = single.draw_noise(batch(3), rng(1))
    wide = type(same)(
        *[t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in same]
    )
    assert torch.allclose(single.loss(same).double(), double.loss(wide), rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = single.loss(same)
    assert low.dtype == torch.float32 and torch.allclose(low, single.loss(same), rtol=0.05)


def test_compiled_once_it_is_the_eager_one():
    scheme, eager, counter = (
        tiny("all, looking ahead"),
        tiny("all, looking ahead"),
        CompileCounter(),
    )
    compiled = torch.compile(scheme.loss, backend=counter)
    for player in scheme.players.values():
        player.loss = compiled
    assert torch.allclose(train(scheme, 3), train(eager, 3), rtol=1e-5) and counter.frame_count == 1


@pytest.mark.parametrize("name", ["edm", "conditional", "elbo, adaptive"])
def test_shards_make_the_whole(name):
    scheme = tiny(name).to(torch.float64)
    scheme.model.double()
    b = scheme.draw_noise(batch(2, like=torch.zeros((), dtype=torch.float64)), rng(1))
    assert {len(t) for t in batch_tensors(b)} == {20}
    halves = [slice_batch(b, slice(10 * r, 10 * r + 10)) for r in range(2)]
    assert torch.allclose(sum(map(scheme.loss, halves)) / 2, scheme.loss(b))
    one, two = AdaptiveLevels(5), AdaptiveLevels(5)
    losses = scheme.errors(b).detach()
    sums = []
    for levels in (one, two):
        levels.draw(1, losses)

    def mean(tensors):
        sums.append(tensors)
        return [sum(t) / len(sums) for t in zip(*sums)]

    AdaptiveLevels.update(AdaptiveLevels(5), b.u[:10], losses[:10], mean)
    two.update(b.u[10:], losses[10:], mean)
    one.update(b.u, losses)
    assert torch.allclose(one.square.double(), two.square.double())


def test_evaluates_and_samples():
    scheme = tiny("conditional")
    train(scheme, 3)
    batches = [batch(t) for t in range(3)]
    found = scheme.evaluate(batches, k=2, ode=2, fid_steps=2)
    assert (
        found
        == scheme.evaluate(batches, k=2, ode=2, fid_steps=2)
        != scheme.evaluate(batches, seed=1, k=2, ode=2, fid_steps=2)
    )
    assert (
        found["n"] == 60
        and found.keys()
        == {
            "n",
            "loss",
            "bound",
            "bound_se",
            "bound_bits_per_dim",
            "nll",
            "nll_se",
            "nll_bits_per_dim",
            "fid",
            "fid_floor",
        }
        and all(map(math.isfinite, found.values()))
        and scheme.model.training
    )
    drawn = scheme.sample(5, "heun", 3, labels=torch.arange(5), generator=rng(1))
    assert drawn.shape == (5, 1, 8, 8) and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(
        drawn, scheme.sample(5, "heun", 3, labels=torch.arange(5), generator=rng(1))
    ) and not torch.equal(
        drawn, scheme.sample(5, "heun", 3, labels=torch.arange(5) + 1, generator=rng(1))
    )


def test_weights_have_names():
    assert WEIGHTS.keys() == {"x0", "eps", "v", "flow", "min-snr", "p2"}


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu(name):
    here, there = tiny(name), tiny(name).to("cuda")
    b = here.draw_noise(batch(1), rng(1))
    assert torch.allclose(
        here.loss(b),
        there.loss(type(b)(*[t.cuda() if torch.is_tensor(t) else t for t in b])).cpu(),
        rtol=1e-3,
    )
    train(there, 2)
