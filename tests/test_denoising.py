"""`DenoisingDiffusion` of the installed package with every weight, target and choice of levels.

Training by `fit`, resumption, devices and dtypes, torch.compile, shards.
"""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.accumulation import batch_tensors, slice_batch
from optgen.data.images import Batch, Images, digits
from optgen.models.diffusion import Denoiser, UNet
from optgen.models.schedules import CosineSchedule, LinearSchedule, StraightSchedule
from optgen.rules import Extragradient
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.levels import (
    AdaptiveLevels,
    Uncertainty,
    min_snr_weight,
    optimal_coupling,
    p2_weight,
)
from optgen.testing import generator
from optgen.training.trainer import fit

DIGITS = digits("train")
IMAGES = Images(
    DIGITS.images[:200, :, 2:26:3, 2:26:3].contiguous(), DIGITS.labels[:200], classes=DIGITS.classes
)
SETTINGS = {  # name: makes the settings anew for each scheme
    "ddpm": lambda: {"target": "eps", "weight": "eps", "schedule": LinearSchedule()},
    "improved": lambda: {"target": "eps", "weight": "min-snr", "schedule": CosineSchedule()},
    "edm": dict,
    "flow matching": lambda: {
        "target": "flow",
        "weight": "flow",
        "schedule": StraightSchedule(),
        "coupling": True,
    },
    "x0, p2": lambda: {"target": "x0", "weight": "p2"},
    "elbo, adaptive": lambda: {"weight": "elbo", "levels": AdaptiveLevels(5)},
    "uncertainty": lambda: {"uncertainty": Uncertainty()},
    "conditional": lambda: {"classes": 10, "coupling": True},
    "all, looking ahead": lambda: {
        "weight": "min-snr",
        "uncertainty": Uncertainty(),
        "levels": AdaptiveLevels(5),
        "classes": 10,
        "rule": Extragradient(),
    },
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def tiny(name, seed=0, device="cpu"):
    """Return the scheme of a small U-Net with the settings of a name."""
    with torch.device(device):
        settings = SETTINGS[name]()
    target, classes = settings.pop("target", "v"), settings.pop("classes", 0)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        unet = UNet((1, 8, 8), 4, (1, 2), attention=False, classes=classes)
        model = Denoiser(unet, (1, 8, 8), target)
    return DenoisingDiffusion(model, conditional=bool(classes), **settings)


def make_batch(seed, n=20, like=torch.zeros(())):
    """Return n digits with labels, of the dtype and on the device of `like`."""
    rows = torch.randint(200, (n,), generator=generator(seed))
    return Batch((IMAGES.images[rows] / 255).to(like), IMAGES.labels[rows].to(like.device))


def map_tensors(batch, function):
    """Return the batch with the function applied to each of its tensors."""
    return type(batch)(*[function(t) if torch.is_tensor(t) else t for t in batch])


def train(scheme, steps, seed=0):
    """Return the losses of some steps on seeded batches."""
    like, losses = next(scheme.model.parameters()), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for t in range(steps):
            losses.append(scheme.step(make_batch(seed + t, like=like))["model"])
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["flow matching", "elbo, adaptive", "all, looking ahead"])
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    images, valid = IMAGES.subset(torch.arange(100)), IMAGES.subset(torch.arange(20))
    settings = {"batch_size": 50, "valid": valid, "progress": "none", "ema": 0.9, "samples": 0}
    whole, parts = tiny(name), tiny(name, 1)
    records = fit(whole, images, epochs=2, out=tmp_path / "whole", **settings)
    fit(tiny(name), images, epochs=1, out=tmp_path / "parts", **settings)
    fit(parts, images, epochs=2, out=tmp_path / "parts", resume=True, **settings)
    for player in whole.players:
        assert all(map(torch.equal, whole.params(player), parts.params(player)))
    levels = parts.levels.state_dict()
    for key, value in whole.levels.state_dict().items():
        assert torch.equal(value, levels[key])
    assert math.isfinite(records[-1]["valid"]["loss"])


class NoHostReads(TorchDispatchMode):
    """Error where a number is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number is read on the host")
        return func(*args, **(kwargs or {}))


@every_setting
def test_nothing_waits_for_the_device(name):
    scheme = tiny(name)
    if not scheme.coupling:
        scheme.draw(make_batch(1))  # the check of the first batch waits
        with NoHostReads():
            scheme.loss(scheme.draw(make_batch(0))).backward()
            scheme.levels.update(*scheme.last_levels)


@every_setting
def test_a_step_on_meta(name):
    meta = torch.empty((), device="meta")
    assert tiny(name, device="meta").step(make_batch(0, like=meta))["model"].is_meta


def to_double(tensor):
    """Return a floating-point tensor in float64, and any other as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", ["ddpm", "all, looking ahead"])
def test_dtypes(name):
    single, double = tiny(name), tiny(name)
    double.model.double()
    double.to(torch.float64)
    batch = single.draw_noise(make_batch(3), generator(1))
    in_double = double.loss(map_tensors(batch, to_double))
    assert torch.allclose(single.loss(batch).double(), in_double, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = single.loss(batch)
    assert low.dtype == torch.float32
    assert torch.allclose(low, single.loss(batch), rtol=0.05)


def test_compiled_once_it_is_the_eager_one():
    name, counter = "all, looking ahead", CompileCounter()
    scheme, eager = tiny(name), tiny(name)
    compiled = torch.compile(scheme.loss, backend=counter)
    for player in scheme.players.values():
        player.loss = compiled
    assert torch.allclose(train(scheme, 3), train(eager, 3), rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["edm", "conditional", "elbo, adaptive"])
def test_shards_make_the_whole(name):
    scheme = tiny(name).to(torch.float64)
    scheme.model.double()
    like = torch.zeros((), dtype=torch.float64)
    b = scheme.draw_noise(make_batch(2, like=like), generator(1))
    assert {len(t) for t in batch_tensors(b)} == {20}
    halves = [slice_batch(b, slice(10 * r, 10 * r + 10)) for r in range(2)]
    assert torch.allclose(sum(map(scheme.loss, halves)) / 2, scheme.loss(b))


def test_evaluates():
    scheme = tiny("conditional")
    train(scheme, 3)
    batches = [make_batch(t) for t in range(3)]
    steps = {"k": 2, "ode_steps": 2, "fid_steps": 2}
    found = scheme.evaluate(batches, **steps)
    assert found == scheme.evaluate(batches, **steps)
    assert found != scheme.evaluate(batches, seed=1, **steps)
    assert scheme.model.training
    assert found["n"] == 60 and all(map(math.isfinite, found.values()))


def test_samples_are_seeded_and_conditioned():
    scheme = tiny("conditional")
    train(scheme, 3)
    labels = torch.arange(5)
    drawn, again, of_others = (
        scheme.sample(5, "heun", 3, labels=classes, generator=generator(1))
        for classes in (labels, labels, labels + 1)
    )
    assert drawn.shape == (5, 1, 8, 8) and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(drawn, again) and not torch.equal(drawn, of_others)


@pytest.mark.cuda
@every_setting
def test_cuda_as_on_the_cpu(name):
    here, there = tiny(name), tiny(name).to("cuda")
    b = here.draw_noise(make_batch(1), generator(1))
    on_cuda = there.loss(map_tensors(b, torch.Tensor.cuda)).cpu()
    assert torch.allclose(here.loss(b), on_cuda, rtol=1e-3)
    train(there, 2)


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 1, 1]])
def test_pairs_are_the_cheapest_of_all_permutations_within_classes(labels):
    for seed in range(5):
        x, eps = torch.randn(2, 5, 3, generator=generator(seed), dtype=torch.float64)
        y = torch.zeros(5, dtype=torch.int64) if labels is None else torch.tensor(labels)
        orders = [o for o in itertools.permutations(range(5)) if torch.equal(y[list(o)], y)]
        best = min(orders, key=lambda order: (x - eps[list(order)]).square().sum().item())
        paired = optimal_coupling(x, eps, None if labels is None else y)
        assert torch.equal(paired, eps[list(best)])


def test_adaptive_draws_have_the_density_that_they_report():
    levels, like = AdaptiveLevels(10), torch.zeros((), dtype=torch.float64)
    for seed in range(20):
        u, _ = levels.draw(64, like, generator(seed))
        levels.update(u, 0.1 + 5 * (u > 0.7))
    u, density = levels.draw(20_000, like, generator(99))
    assert density.max() > 2 * density.min()
    # Means over stratified draws, divided by the density, are integrals over [0, 1].
    for f, integral in ((torch.ones_like(u), 1.0), (u, 1 / 2), (u.square(), 1 / 3)):
        assert abs((f / density).mean() - integral) < 5e-3


def test_bounded_weights_take_their_parameters():
    for sigma in (0.1, 0.6, 3.0):
        at, snr = torch.tensor([sigma]), sigma**-2
        assert min_snr_weight(at, 0.5, 2.0).item() == pytest.approx(min(snr, 2.0))
        assert min_snr_weight(at).item() == pytest.approx(min(snr, 5.0))
        assert p2_weight(at, 0.5, 3.0, 0.5).item() == pytest.approx(snr / (3.0 + snr) ** 0.5)
        assert p2_weight(at).item() == pytest.approx(snr / (1.0 + snr))


def test_levels_stay_uniform_until_every_bin_has_a_loss_and_skip_losses_that_are_not_finite():
    levels, u = AdaptiveLevels(3, decay=0.5), torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    levels.draw(1, u)
    levels.update(u, torch.tensor([1.0, 3.0, math.inf], dtype=torch.float64))
    assert levels.square.tolist() == [5.0, 0.0, 0.0] and levels.met.tolist() == [1, 0, 0]
    assert torch.equal(levels.shares(), torch.full((3,), 1 / 3, dtype=torch.float64))
    levels.update(
        torch.tensor([0.5, 0.9], dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64)
    )
    assert levels.square.tolist() == [5.0, 4.0, 16.0] and levels.met.tolist() == [1, 1, 1]
    root = torch.tensor([5**0.5, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(levels.shares(), 0.1 / 3 + 0.9 * root / root.sum())
