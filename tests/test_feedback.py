"FeedbackGAN of the installed package: its losses, its rules, resumption, evaluation, and a training from end to end."

import copy
import math

import pytest
import torch

from optgen.data.images import Batch, Images, digits
from optgen.models.gan import (
    GAN_LOSSES,
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from optgen.optim import SGD, Momentum
from optgen.rules import (
    Alternating,
    CompetitiveGradient,
    Consensus,
    Extragradient,
    Feedback,
    Lookahead,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
    Unrolled,
)
from optgen.schemes.feedback import FeedbackGAN, GANBatch, downsampled_pixels
from optgen.testing import finite_difference
from optgen.training.checkpoint import load, save
from optgen.training.trainer import fit

RULES = {
    "simultaneous": lambda: Simultaneous(),
    "alternating": lambda: Alternating(repeats={"D": 2}),
    "extragradient": lambda: Extragradient(past=True),
    "optimistic": lambda: Optimistic(),
    "literal": lambda: Feedback("G", "D", "G", 0.5),
    "nagarajan-kolter": lambda: Feedback("G", "D", "D", 0.5),
    "smoothing": lambda: Feedback("D", "D", "G", 0.5),
    "list": lambda: [Feedback("G", "D", "D", 0.2), Consensus(0.1)],
    "consensus": lambda: Consensus(1.0),
    "symplectic": lambda: SymplecticAdjustment(1.0),
    "lookahead": lambda: Lookahead(Alternating(), every=3),
    "unrolled": lambda: Unrolled("D", 2),
    "competitive": lambda: CompetitiveGradient(),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
IMAGES = digits("train").images[:200, :, 4:28:3, 4:28:3].contiguous()


def tiny(rule=None, seed=0, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FeedbackGAN(
            ConvGenerator((1, 8, 8), 3, 4), ConvDiscriminator((1, 8, 8), 4), rule=rule, **kw
        )


def train(scheme, steps, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            scheme.step(Batch(IMAGES[torch.randperm(200)[:16]] / 255))
    return torch.cat([p.detach().flatten() for name in ("G", "D") for p in scheme.params(name)])


def small(seed=0, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        G, D = MLPGenerator(2, (5,)).double(), MLPDiscriminator((2,), (6,)).double()
        return FeedbackGAN(
            G, D, optimizers=[SGD(m.parameters(), lr=0.1) for m in (G, D)], **kw
        ), GANBatch(torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64))


@every_rule
def test_resumes_bit_for_bit_through_a_file(rule, tmp_path):
    one, other = tiny(rule(), loss="relativistic"), tiny(rule(), seed=5, loss="relativistic")
    train(one, 4)
    save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(load(tmp_path / "state.pt"))
    assert torch.equal(train(one, 3, seed=1), train(other, 3, seed=1))


@pytest.mark.parametrize(
    "to, loss, wrt",
    [("G", "D", "G"), ("G", "D", "D"), ("D", "D", "G"), ("D", "G", "D"), ("G", "G", "G")],
)
def test_weight_zero_is_no_feedback_bit_for_bit(to, loss, wrt):
    assert torch.equal(train(tiny(Feedback(to, loss, wrt, 0.0)), 4), train(tiny(), 4))


@pytest.mark.parametrize(
    "to, loss, wrt", [("G", "D", "G"), ("G", "D", "D"), ("D", "D", "G"), ("D", "G", "D")]
)
def test_feedback_is_the_gradient_of_the_penalised_loss(to, loss, wrt):
    scheme, b = small(rule=Feedback(to, loss, wrt, 0.7), loss="saturating")
    losses = {"G": scheme.g_loss, "D": scheme.d_loss}
    penalty = sum(
        g.square().sum()
        for g in torch.autograd.grad(losses[loss](b), scheme.params(wrt), create_graph=True)
    )
    u = scheme.rule.direction(scheme.at(b, graph=True))
    for name in ("G", "D"):
        expected = torch.autograd.grad(
            losses[name](b) + 0.7 * penalty * (name == to), scheme.params(name), retain_graph=True
        )
        assert all(torch.allclose(a, c, rtol=1e-10, atol=1e-14) for a, c in zip(u[name], expected))


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_input_penalties_are_those_of_finite_differences(loss):
    scheme, b = small(loss=loss, r1=0.8, r2=0.4)
    plain, _ = small(loss=loss)
    norm = lambda x: (
        finite_difference(lambda x: scheme.discriminator(x).sum(), x.detach())
        .square()
        .sum(1)
        .mean()
    )
    assert (
        abs(
            scheme.d_loss(b) - plain.d_loss(b) - 0.4 * norm(b.x) - 0.2 * norm(scheme.generator(b.z))
        )
        < 1e-8
    )


def test_simultaneous_is_the_loop_by_hand():
    scheme, b = small()
    twin = copy.deepcopy((scheme.generator, scheme.discriminator))
    scheme.draw = lambda batch: b
    for _ in range(20):
        scheme.step(Batch(b.x))
    for _ in range(20):
        G, D = twin
        g = torch.autograd.grad(-D(G(b.z)).sigmoid().log().mean(), list(G.parameters()))
        d = torch.autograd.grad(
            -D(b.x).sigmoid().log().mean() - (1 - D(G(b.z)).sigmoid()).log().mean(),
            list(D.parameters()),
        )
        with torch.no_grad():
            for p, grad in zip((*G.parameters(), *D.parameters()), (*g, *d)):
                p -= 0.1 * grad
    assert all(
        torch.allclose(p, q, rtol=1e-10)
        for a, b in zip((scheme.generator, scheme.discriminator), twin)
        for p, q in zip(a.parameters(), b.parameters())
    )


@every_rule
@pytest.mark.parametrize(
    "where", [dict(device="meta"), dict(dtype=torch.float64)], ids=["meta", "float64"]
)
def test_any_device_and_dtype(rule, where):
    with torch.device(where.get("device", "cpu")):
        scheme = tiny(rule(), r1=1.0)
    scheme.to(**where)
    losses = scheme.step(Batch((IMAGES[:8] / 255).to(**where)))
    assert set(losses) == {"G", "D"} and all(
        l.dim() == 0 and l.device.type == where.get("device", "cpu") for l in losses.values()
    )
    assert scheme.sample(3).shape == (3, 1, 8, 8) and scheme.sample(3).dtype == where.get(
        "dtype", torch.float32
    )


@pytest.mark.cuda
@every_rule
def test_on_a_gpu_as_on_the_cpu(rule):
    here, there = (
        tiny(rule(), r1=1.0, optimizers=None).to(torch.float64),
        tiny(rule(), r1=1.0).to(torch.float64).to("cuda"),
    )
    x, z = (IMAGES[:8] / 255).double(), torch.randn(8, 3, dtype=torch.float64)
    for scheme, device in ((here, "cpu"), (there, "cuda")):
        scheme.draw = lambda batch, device=device: GANBatch(batch.x, z.to(device))
        for _ in range(2):
            scheme.step(Batch(x.to(device)))
    assert all(
        torch.allclose(p, q.cpu(), rtol=1e-6, atol=1e-9)
        for n in "GD"
        for p, q in zip(here.params(n), there.params(n))
    )


def test_fits_resumes_samples_and_evaluates(tmp_path):
    data = Images(IMAGES)
    make = lambda: tiny(Feedback("G", "D", "D", 0.5), r1=0.1, features=downsampled_pixels)
    kwargs = dict(
        batch_size=50, valid=data.subset(torch.arange(100)), progress="none", ema=0.9, samples=4
    )
    whole, parts = make(), make()
    records = fit(whole, data, epochs=2, out=tmp_path / "whole", **kwargs)
    fit(parts, data, epochs=1, out=tmp_path / "parts", **kwargs)
    fit(parts, data, epochs=2, out=tmp_path / "parts", resume=True, **kwargs)
    assert all(torch.equal(p, q) for n in "GD" for p, q in zip(whole.params(n), parts.params(n)))
    assert {"G", "D", whole.criterion} <= set(records[-1]["valid"]) and all(
        math.isfinite(v) for v in records[-1]["valid"].values()
    )
    assert set(records[-1]["train"]) == {"G", "D"} and (tmp_path / "whole" / "samples").is_dir()


def test_evaluation_repeats_with_its_seed_and_leaves_modes():
    scheme = tiny(features=downsampled_pixels)
    batches = [Batch(x / 255) for x in IMAGES.split(60)]
    scheme.discriminator.eval()
    a, b, c = (
        scheme.evaluate(batches, seed=1),
        scheme.evaluate(batches, seed=1),
        scheme.evaluate(batches, seed=2),
    )
    assert a == b != c and scheme.generator.training and not scheme.discriminator.training


def test_training_a_toy_mixture_moves_towards_it():
    "A line of three points and nothing tuned: the Fréchet distance falls a long way."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G, D = MLPGenerator(2, (32,)), MLPDiscriminator((2,), (32,))
        scheme = FeedbackGAN(
            G,
            D,
            rule=Feedback("G", "D", "D", 0.5),
            optimizers=[Momentum(m.parameters(), lr=0.05, momentum=0.0) for m in (G, D)],
            r1=0.3,
        )
        data = [
            Batch(
                torch.randint(3, (200, 1)) * torch.tensor([2.0, -1.0]) + 0.1 * torch.randn(200, 2)
            )
            for _ in range(10)
        ]
        before = scheme.evaluate(data, seed=0)["fid"]
        for _ in range(40):
            for batch in data:
                scheme.step(batch)
        assert scheme.evaluate(data, seed=0)["fid"] < 0.2 * before


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: tiny(loss="ls"), "'hinge'"),
        (lambda: tiny(r1=-1.0), "r1"),
        (lambda: tiny(r2=math.inf), "r2"),
        (lambda: tiny(Feedback("G", "D", "E", 1.0)), "'E'"),
        (
            lambda: FeedbackGAN(ConvGenerator((1, 9, 9), 3, 2), ConvDiscriminator((1, 8, 8), 2)),
            "(1, 9, 9)",
        ),
        (lambda: tiny().evaluate([]), "two examples"),
        (lambda: tiny(r2=1.0).compile(), "R2"),
        (lambda: tiny(Consensus(1.0)).compile(), "Consensus"),
    ],
)
def test_bad_input_is_told(call, word):
    with pytest.raises(ValueError) as e:
        call()
    assert word in str(e.value)
