"""FeedbackGAN: its losses, rules, resumption and evaluation, and a training from end to end."""

import copy
import math
from functools import partial

import pytest
import torch

from optgen.data.images import Batch, Images, digits
from optgen.models.features import downsampled_pixels
from optgen.models.gan import (
    GAN_LOSSES,
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from optgen.opponents import CompetitiveGradient, Unrolled
from optgen.optim import SGD, Adam, Momentum
from optgen.rules import (
    Alternating,
    Consensus,
    Extragradient,
    Feedback,
    Lookahead,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
)
from optgen.schemes.feedback import FeedbackGAN, GANBatch
from optgen.testing import finite_difference, flat_weights, raises
from optgen.training.checkpoint import load, save
from optgen.training.trainer import fit


def feedback_and_consensus():
    """Return a list of two corrections."""
    return [Feedback("G", "D", "D", 0.2), Consensus(0.1)]


def lookahead():
    """Return a lookahead around another rule."""
    return Lookahead(Alternating(), every=3)


RULES = {
    "simultaneous": Simultaneous,
    "alternating": partial(Alternating, repeats={"D": 2}),
    "extragradient": partial(Extragradient, past=True),
    "optimistic": Optimistic,
    "article": partial(Feedback, "G", "D", "G", 0.5),
    "nagarajan-kolter": partial(Feedback, "G", "D", "D", 0.5),
    "smoothing": partial(Feedback, "D", "D", "G", 0.5),
    "list": feedback_and_consensus,
    "consensus": partial(Consensus, 1.0),
    "symplectic": partial(SymplecticAdjustment, 1.0),
    "lookahead": lookahead,
    "unrolled": partial(Unrolled, "D", 2),
    "competitive": CompetitiveGradient,
}
every_rule = pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES.keys())
IMAGES = digits("train").images[:200, :, 4:28:3, 4:28:3].contiguous()


def conv_gan(rule=None, seed=0, **kwargs):
    """Return a convolutional GAN on 8 x 8 images, seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = ConvGenerator((1, 8, 8), 3, 4), ConvDiscriminator((1, 8, 8), 4)
        return FeedbackGAN(*networks, rule=rule, **kwargs)


def all_params(scheme):
    """Return the parameters of both players, G's before D's."""
    return [*scheme.params("G"), *scheme.params("D")]


def train(scheme, steps, seed=0):
    """Train on random batches and return all weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            scheme.step(Batch(IMAGES[torch.randperm(200)[:16]] / 255))
    return flat_weights(all_params(scheme))


def mlp_gan(seed=0, **kwargs):
    """Return a small GAN in float64 with plain gradient descent, and a batch with its noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = MLPGenerator(2, (5,)).double(), MLPDiscriminator((2,), (6,)).double()
        optimizers = [SGD(net.parameters(), lr=0.1) for net in networks]
        scheme = FeedbackGAN(*networks, optimizers=optimizers, **kwargs)
        x, z = (torch.randn(7, 2, dtype=torch.float64) for _ in range(2))
        return scheme, GANBatch(x, z)


@every_rule
def test_resumes_bit_for_bit_through_a_file(make_rule, tmp_path):
    one = conv_gan(make_rule(), loss="relativistic")
    other = conv_gan(make_rule(), seed=5, loss="relativistic")
    train(one, 4)
    save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(load(tmp_path / "state.pt"))
    assert torch.equal(train(one, 3, seed=1), train(other, 3, seed=1))


@pytest.mark.parametrize(
    "to, loss, wrt",
    [("G", "D", "G"), ("G", "D", "D"), ("D", "D", "G"), ("D", "G", "D"), ("G", "G", "G")],
)
def test_weight_zero_is_no_feedback_bit_for_bit(to, loss, wrt):
    without_feedback = train(conv_gan(), 4)
    assert torch.equal(train(conv_gan(Feedback(to, loss, wrt, 0.0)), 4), without_feedback)


@pytest.mark.parametrize(
    "to, loss, wrt", [("G", "D", "G"), ("G", "D", "D"), ("D", "D", "G"), ("D", "G", "D")]
)
def test_feedback_is_the_gradient_of_the_penalized_loss(to, loss, wrt):
    scheme, batch = mlp_gan(rule=Feedback(to, loss, wrt, 0.7), loss="saturating")
    losses = {"G": scheme.g_loss, "D": scheme.d_loss}
    grads = torch.autograd.grad(losses[loss](batch), scheme.params(wrt), create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    u = scheme.rule.direction(scheme.at(batch, graph=True))
    for name in ("G", "D"):
        penalized = losses[name](batch) + 0.7 * penalty * (name == to)
        expected = torch.autograd.grad(penalized, scheme.params(name), retain_graph=True)
        assert all(torch.allclose(a, g, rtol=1e-10, atol=1e-14) for a, g in zip(u[name], expected))


def mean_squared_slope(D, x):
    """Return the mean squared input gradient of the logits, by finite differences."""
    slopes = finite_difference(lambda x: D(x).sum(), x.detach())
    return slopes.square().sum(1).mean()


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_input_penalties_agree_with_finite_differences(loss):
    scheme, batch = mlp_gan(loss=loss, r1=0.8, r2=0.4)
    plain, _ = mlp_gan(loss=loss)
    D, fake = scheme.discriminator, scheme.generator(batch.z)
    expected = 0.4 * mean_squared_slope(D, batch.x) + 0.2 * mean_squared_slope(D, fake)
    assert abs(scheme.d_loss(batch) - plain.d_loss(batch) - expected) < 1e-8


def test_the_default_optimizers_are_those_of_dcgan():
    for player in conv_gan().players.values():
        group = player.optimizer.param_groups[0]
        assert group["lr"] == 2e-4 and tuple(group["betas"]) == (0.5, 0.999)


def test_simultaneous_is_the_loop_by_hand():
    scheme, batch = mlp_gan()
    G, D = copy.deepcopy((scheme.generator, scheme.discriminator))
    params = [*G.parameters(), *D.parameters()]
    scheme.draw = lambda _: batch
    for _ in range(20):
        scheme.step(Batch(batch.x))
    for _ in range(20):
        g_loss = -D(G(batch.z)).sigmoid().log().mean()
        d_loss = -D(batch.x).sigmoid().log().mean() - (1 - D(G(batch.z)).sigmoid()).log().mean()
        g_grads = torch.autograd.grad(g_loss, list(G.parameters()))
        d_grads = torch.autograd.grad(d_loss, list(D.parameters()))
        with torch.no_grad():
            for p, grad in zip(params, (*g_grads, *d_grads)):
                p -= 0.1 * grad
    assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(all_params(scheme), params))


@every_rule
@pytest.mark.parametrize(
    "where", [{"device": "meta"}, {"dtype": torch.float64}], ids=["meta", "float64"]
)
def test_any_device_and_dtype(make_rule, where):
    device, dtype = where.get("device", "cpu"), where.get("dtype", torch.float32)
    with torch.device(device):
        scheme = conv_gan(make_rule(), r1=1.0)
    scheme.to(**where)
    losses = scheme.step(Batch((IMAGES[:8] / 255).to(**where)))
    assert set(losses) == {"G", "D"}
    assert all(loss.dim() == 0 and loss.device.type == device for loss in losses.values())
    sample = scheme.sample(3)
    assert sample.shape == (3, 1, 8, 8) and sample.dtype == dtype


@pytest.mark.cuda
@every_rule
def test_cuda_agrees_with_the_cpu(make_rule):
    x, z = (IMAGES[:8] / 255).double(), torch.randn(8, 3, dtype=torch.float64)
    schemes = []
    for device in ("cpu", "cuda"):
        scheme = conv_gan(make_rule(), r1=1.0).to(torch.float64).to(device)
        noise = z.to(device)
        scheme.draw = lambda batch: GANBatch(batch.x, noise)
        for _ in range(2):
            scheme.step(Batch(x.to(device)))
        schemes.append(scheme)
    for p, q in zip(*map(all_params, schemes)):
        assert torch.allclose(p, q.cpu(), rtol=1e-6, atol=1e-9)


def test_fits_resumes_samples_and_evaluates(tmp_path):
    data = Images(IMAGES)
    valid = data.subset(torch.arange(100))
    settings = {"batch_size": 50, "valid": valid, "progress": "none", "ema": 0.9, "samples": 4}
    whole, interrupted = (
        conv_gan(Feedback("G", "D", "D", 0.5), r1=0.1, features=downsampled_pixels)
        for _ in range(2)
    )
    records = fit(whole, data, epochs=2, out=tmp_path / "whole", **settings)
    fit(interrupted, data, epochs=1, out=tmp_path / "interrupted", **settings)
    fit(interrupted, data, epochs=2, out=tmp_path / "interrupted", resume=True, **settings)
    assert all(torch.equal(p, q) for p, q in zip(all_params(whole), all_params(interrupted)))
    measured = records[-1]["valid"]
    assert {"G", "D", whole.criterion} <= set(measured)
    assert all(math.isfinite(value) for value in measured.values())
    assert set(records[-1]["train"]) == {"G", "D"}
    assert (tmp_path / "whole" / "samples").is_dir()


def test_evaluation_repeats_with_its_seed_and_leaves_modes():
    scheme = conv_gan(features=downsampled_pixels)
    batches = [Batch(x / 255) for x in IMAGES.split(60)]
    scheme.discriminator.eval()
    first, again, other = (scheme.evaluate(batches, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert scheme.generator.training and not scheme.discriminator.training


def test_training_approaches_a_toy_mixture():
    # Three points on a line and no tuning: the Fréchet distance falls to less than a fifth.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = MLPGenerator(2, (32,)), MLPDiscriminator((2,), (32,))
        optimizers = [Momentum(net.parameters(), lr=0.05, momentum=0.0) for net in networks]
        rule = Feedback("G", "D", "D", 0.5)
        scheme = FeedbackGAN(*networks, rule=rule, optimizers=optimizers, r1=0.3)
        data = []
        for _ in range(10):
            points = torch.randint(3, (200, 1)) * torch.tensor([2.0, -1.0])
            data.append(Batch(points + 0.1 * torch.randn(200, 2)))
        before = scheme.evaluate(data, seed=0)["fid"]
        for _ in range(40):
            for batch in data:
                scheme.step(batch)
        assert scheme.evaluate(data, seed=0)["fid"] < 0.2 * before


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"loss": "ls"}, "'hinge'"),
        ({"r1": -1.0}, "r1"),
        ({"r2": math.inf}, "r2"),
        ({"rule": Feedback("G", "D", "E", 1.0)}, "'E'"),
    ],
    ids=["loss", "r1", "r2", "rule"],
)
def test_invalid_arguments_raise(kwargs, word):
    with raises(ValueError, word):
        conv_gan(**kwargs)


def test_networks_of_different_shapes_raise():
    with raises(ValueError, "(1, 9, 9)"):
        FeedbackGAN(ConvGenerator((1, 9, 9), 3, 2), ConvDiscriminator((1, 8, 8), 2))


def test_an_evaluation_without_examples_raises():
    with raises(ValueError, "two examples"):
        conv_gan().evaluate([])


@pytest.mark.parametrize(
    "kwargs, word",
    [({"r2": 1.0}, "R2"), ({"rule": Consensus(1.0)}, "Consensus")],
    ids=["r2", "rule"],
)
def test_what_differentiates_twice_is_not_compiled(kwargs, word):
    with raises(ValueError, word):
        conv_gan(**kwargs).compile()


SHARING_RULES = {
    "simultaneous": lambda: None,
    "alternating, D first": lambda: Alternating(order=("D", "G")),
    "alternating, G first": lambda: Alternating(order=("G", "D"), repeats={"D": 2}),
    "feedback": lambda: Feedback("G", "D", "D", 0.3),
    "extragradient": Extragradient,
    "consensus": lambda: Consensus(0.1),
}


@pytest.mark.parametrize("method", ("fused", "foreach", "torch"))
@pytest.mark.parametrize("rule", SHARING_RULES)
def test_examples_that_both_losses_share_change_no_step(rule, method):
    """As if each loss had generated its own, whatever moves G between the losses."""
    make = {
        "fused": lambda p: Adam(p, lr=0.01),
        "foreach": lambda p: Adam(p, lr=0.01, fused=False),
        "torch": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True),
    }[method]
    ends = []
    for shares in (True, False):
        torch.manual_seed(3)
        G = MLPGenerator(3, (5,), (1, 2, 2), "sigmoid").double()
        D = MLPDiscriminator((1, 2, 2), (6,)).double()
        optimizers = [make(net.parameters()) for net in (G, D)]
        gan = FeedbackGAN(G, D, rule=SHARING_RULES[rule](), optimizers=optimizers, r1=0.2, r2=0.1)
        if not shares:
            gan.share_examples = gan.generate
        for _ in range(4):
            losses = gan.step(Batch(torch.rand(8, 1, 2, 2, dtype=torch.float64), None))
        assert gan.shared is None
        ends.append([*G.parameters(), *D.parameters(), *losses.values()])
    for a, b in zip(*ends):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule, count", (("simultaneous", 1), ("alternating, D first", 1)))
def test_a_step_generates_once(rule, count):
    torch.manual_seed(0)
    G, D = MLPGenerator(3, (5,), (1, 2, 2), "sigmoid"), MLPDiscriminator((1, 2, 2), (6,))
    gan, calls = FeedbackGAN(G, D, rule=SHARING_RULES[rule]()), []
    G.register_forward_hook(lambda *_: calls.append(0))
    for _ in range(3):
        gan.step(Batch(torch.rand(8, 1, 2, 2), None))
    assert len(calls) == 3 * count


def small_gan():
    """Return a GAN of images of 2 x 2 and a batch of it with its noise, in float64."""
    torch.manual_seed(1)
    G, D = MLPGenerator(3, (5,), (1, 2, 2)).double(), MLPDiscriminator((1, 2, 2), (6,)).double()
    gan = FeedbackGAN(G, D)
    return gan, gan.draw_noise(Batch(torch.rand(8, 1, 2, 2, dtype=torch.float64), None))


def test_losses_outside_of_a_step_have_graphs_of_their_own():
    "Two backward passes of a loop of one's own; then the game is copied."
    gan, batch = small_gan()
    fields = []
    for _ in range(2):
        for network, loss in ((gan.discriminator, gan.d_loss), (gan.generator, gan.g_loss)):
            network.zero_grad()
            loss(batch).backward()
            fields.append(flat_weights([p.grad for p in network.parameters()]))
    assert torch.equal(fields[0], fields[2]) and torch.equal(fields[1], fields[3])
    before = gan.g_loss(batch)
    next(gan.generator.parameters()).data.add_(1.0)  # which no version counts
    after = copy.deepcopy(gan).g_loss(batch)
    assert gan.g_loss(batch) == after != before


class Doubling(torch.nn.Module):
    """A discriminator that doubles its input in place, or beside it."""

    def __init__(self, inner, in_place):
        super().__init__()
        self.inner, self.in_place, self.shape = inner, in_place, inner.shape

    def forward(self, x):
        """Return the logits (B,)."""
        x = x.clone() if x.is_leaf else x  # real images stay
        return self.inner(x.mul_(2) if self.in_place else 2 * x)


def test_a_discriminator_may_change_generated_examples_in_place():
    ends = []
    for in_place in (True, False):
        torch.manual_seed(2)
        G, D = MLPGenerator(3, (5,), (1, 2, 2)).double(), MLPDiscriminator((1, 2, 2), (6,)).double()
        gan = FeedbackGAN(G, Doubling(D, in_place))
        for _ in range(3):
            gan.step(Batch(torch.rand(8, 1, 2, 2, dtype=torch.float64), None))
        ends.append(flat_weights([*G.parameters(), *D.parameters()]))
    assert torch.allclose(*ends, rtol=1e-12)
