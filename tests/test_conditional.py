"""Class-conditional models: guidance, projection, flows of classes, their commands and measures."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from cli_helpers import assert_one_line, edit_config, read_options, run, train_args
from optgen.data.images import Batch, DataError, digits
from optgen.models.classifier import mnist_classifier
from optgen.models.diffusion import Denoiser, Embedding, PerceptronDenoiser, UNet
from optgen.models.flow import image_flow, realnvp
from optgen.models.gan import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator
from optgen.models.schedules import StraightSchedule
from optgen.rules import build_rule
from optgen.schemes.classes import class_accuracy, digits_classifier, sample_labels
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.likelihood import MaximumLikelihood, evaluate_bayes
from optgen.testing import generator, randn
from optgen.training.callbacks import class_columns
from optgen.training.measurement import grid_samples

LABELS = torch.tensor([2, 0, 1, 2, 2])


def perturb(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Return a module in float64 whose parameters all have noise added."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn_like(p)
    return module


# diffusion


def test_a_label_of_minus_one_adds_nothing_and_others_add_their_vector():
    embed, c = perturb(Embedding(8, 3)), randn(5)
    wave = c[:, None] * embed.frequency
    h = torch.cat([wave.sin(), wave.cos()], 1)
    assert torch.equal(embed(c, torch.full((5,), -1)), embed.net(h))
    assert torch.equal(embed(c, LABELS), embed.net(h + embed.classes.weight[LABELS]))
    mixed = torch.tensor([-1, 0, -1, 2, 2])
    expected = torch.where((mixed < 0)[:, None], h, h + embed.classes.weight[mixed.clamp(min=0)])
    assert torch.equal(embed(c, mixed), embed.net(expected))


class GaussianClass(nn.Module):
    """Exact denoiser of N(0, 1), and of N(m, v) for any class."""

    target, std, shape, n_classes = "x0", 1.0, (1,), 2

    def __init__(self, m: float, v: float) -> None:
        super().__init__()
        self.m, self.v = m, v
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, y, sigma, labels):
        "Return the posterior means (B, 1)."
        known, square = (labels >= 0).double()[:, None], sigma[:, None] ** 2
        m, v = known * self.m, 1 - known + known * self.v
        return self.scale * (m * square + y * v) / (v + square)

    output = forward


def gaussian_scheme(**settings) -> DenoisingDiffusion:
    schedule = StraightSchedule(low=0.002, high=1000.0)
    model = GaussianClass(0.0, 0.25)
    return DenoisingDiffusion(
        model, "x0", schedule, conditional=True, pixels=False, **{"label_dropout": 0.1, **settings}
    )


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_guided_samples_have_the_variance_of_the_closed_form(w):
    drawn = gaussian_scheme().sample(
        6000, steps=60, guidance=w, labels=torch.arange(6000) % 2, generator=generator(3)
    )
    expected = 0.25**w
    assert abs(drawn.var().item() - expected) < 6 * expected * math.sqrt(2 / 6000)


def small_diffusion(seed: int = 0, **settings) -> DenoisingDiffusion:
    torch.manual_seed(seed)
    model = perturb(Denoiser(PerceptronDenoiser(6, 16, 2, 3), (6,)))
    return DenoisingDiffusion(model, conditional=True, pixels=False, **settings)


def test_guidance_extrapolates_from_no_class_through_the_class():
    scheme, y, sigma = small_diffusion(label_dropout=0.1), randn(5, 6), torch.rand(5).double() + 0.1
    of_none = scheme.model(y, sigma, torch.full((5,), -1))
    of_class = scheme.model(y, sigma, LABELS)
    for w in (0.0, 0.5, 1.0, 4.0):
        found = scheme.denoiser(LABELS, w)(y, sigma)
        assert torch.allclose(found, (1 - w) * of_none + w * of_class, rtol=1e-12, atol=1e-12)
    assert (of_none - of_class).abs().max() > 0.01


def test_labels_are_dropped_in_training_after_everything_else_is_drawn():
    batch = Batch(randn(4000, 6), torch.arange(4000) % 3)
    kept, dropping = small_diffusion(), small_diffusion(label_dropout=0.3)
    a, b = kept.draw_noise(batch, generator(1)), dropping.draw_noise(batch, generator(1))
    for name in ("x", "eps", "sigma", "weight", "u"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.labels, batch.y)
    dropped = b.labels == -1
    assert abs(dropped.double().mean() - 0.3) < 5 * math.sqrt(0.21 / 4000)
    assert torch.equal(b.labels[~dropped], batch.y[~dropped])
    dropping.train(False)
    assert torch.equal(dropping.draw_noise(batch, generator(1)).labels, batch.y)


def test_dropping_with_a_coupling_pairs_within_the_classes():
    scheme = small_diffusion(label_dropout=0.5, coupling=True)
    plain = small_diffusion(coupling=True)
    batch = Batch(randn(12, 6), torch.arange(12) % 3)
    a, b = (s.draw_noise(batch, generator(2)) for s in (scheme, plain))
    assert torch.equal(a.eps, b.eps) and (a.labels == -1).any() and (a.labels >= 0).any()


@pytest.mark.parametrize(
    "make, arguments, words",
    [
        (lambda: small_diffusion(), {"guidance": 2.0}, "label_dropout"),
        (lambda: small_diffusion(label_dropout=0.1), {"guidance": -1.0}, "guidance"),
        (lambda: small_diffusion(label_dropout=0.1), {"guidance": math.nan}, "guidance"),
        (lambda: small_diffusion(), {"labels": LABELS + 1}, "0 to 2"),
        (lambda: small_diffusion(), {"labels": LABELS - 1}, "0 to 2"),
        (lambda: small_diffusion(), {"labels": LABELS[:4]}, "int64 with shape"),
        (lambda: small_diffusion(), {"labels": LABELS.double()}, "int64"),
    ],
)
def test_other_labels_and_guidances_are_refused(make, arguments, words):
    with pytest.raises(ValueError, match=words):
        make().sample(5, steps=2, **arguments)


def test_an_unconditional_model_takes_neither_labels_nor_guidance():
    model = Denoiser(PerceptronDenoiser(6, 8, 1), (6,))
    scheme = DenoisingDiffusion(model, pixels=False)
    for arguments, words in (({"guidance": 2.0}, "conditional"), ({"labels": LABELS}, "labels go")):
        with pytest.raises(ValueError, match=words):
            scheme.sample(5, steps=2, **arguments)
    with pytest.raises(ValueError, match="label_dropout"):
        DenoisingDiffusion(model, pixels=False, label_dropout=0.1)


def test_a_foreign_network_says_how_many_classes_it_has():
    scheme = gaussian_scheme()
    assert scheme.n_classes == 2
    scheme.n_classes = None
    with pytest.raises(ValueError, match="n_classes"):
        scheme.sample(3, steps=2)


def test_meta_and_bfloat16_do_not_matter_to_the_null_class():
    with torch.device("meta"):
        net = UNet((1, 8, 8), 8, (1, 2), classes=3)
        out = net(torch.empty(2, 1, 8, 8), torch.empty(2), torch.empty(2, dtype=torch.int64))
    assert out.shape == (2, 1, 8, 8)


# samples without labels


def conditional_gan(seed: int = 0, **settings) -> FeedbackGAN:
    torch.manual_seed(seed)
    G, D = MLPGenerator(4, (8,), (6,), n_classes=3), MLPDiscriminator((6,), (8, 8), n_classes=3)
    return FeedbackGAN(perturb(G, 0.1), perturb(D, 0.1), **settings)


def conditional_flow(seed: int = 0) -> MaximumLikelihood:
    torch.manual_seed(seed)
    return MaximumLikelihood(perturb(realnvp(6, 4, (8,), n_classes=3)), "dequantized")


@pytest.mark.parametrize("make", [small_diffusion, conditional_gan, conditional_flow])
def test_without_labels_the_classes_are_drawn_in_turn(make):
    scheme = make()
    torch.manual_seed(1)
    given = scheme.sample(7, labels=torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    torch.manual_seed(1)
    assert torch.equal(scheme.sample(7), given)
    torch.manual_seed(1)
    other = scheme.sample(7, labels=torch.tensor([1, 1, 2, 0, 1, 2, 0]))
    assert not torch.equal(other[0], given[0]) and torch.equal(other[1:], given[1:])
    assert scheme.conditional and scheme.n_classes == 3
    for labels in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(DataError, match="0 to 2"):
            scheme.sample(1, labels=labels)


@pytest.mark.parametrize("make", [small_diffusion, conditional_gan, conditional_flow])
def test_batches_without_a_class_are_refused(make):
    for y, words in ((None, "no labels"), (LABELS + 1, "0 to 2"), (LABELS - 1, "unknown class")):
        with pytest.raises(DataError, match=words):
            make().step(Batch(torch.rand(5, 6).mul(255).round().double() / 255, y))


def test_a_grid_shows_a_class_in_each_column():
    scheme = SimpleNamespace(conditional=True, n_classes=10)
    assert [(grid_samples(scheme, n), class_columns(scheme, n)) for n in (16, 64, 10, 9)] == [
        (20, 10),
        (70, 10),
        (10, 10),
        (9, None),
    ]
    for other in (SimpleNamespace(), SimpleNamespace(conditional=True, n_classes=None)):
        assert (grid_samples(other, 16), class_columns(other, 16)) == (16, None)
    assert sample_labels("x", 7, None, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample_labels("x", 7, None, 0) is None


# flows


def jacobian_log_det(flow: nn.Module, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return log |det| of a flow at one example, from the whole Jacobian."""
    J = torch.autograd.functional.jacobian(lambda x: flow(x[None], label[None])[0].flatten(), x)
    return torch.linalg.slogdet(J.reshape(x.numel(), x.numel()))[1]


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: realnvp(5, 4, (16,), n_classes=3), (5,)),
        (lambda: image_flow((1, 4, 4), 2, 2, 8, 1, n_classes=3), (1, 4, 4)),
    ],
)
def test_a_flow_of_classes_has_the_jacobian_and_the_inverse_of_each_class(make, shape):
    flow, x = perturb(make(), 0.2), randn(5, *shape)
    z, log_det = flow(x, LABELS)
    for i in range(5):
        assert torch.isclose(log_det[i], jacobian_log_det(flow, x[i], LABELS[i]), rtol=1e-9)
    assert torch.allclose(flow.inverse(z, LABELS), x, atol=1e-9)
    normal = -0.5 * (z.flatten(1) ** 2 + math.log(2 * math.pi)).sum(1)
    assert torch.allclose(flow.log_prob(x, LABELS), normal + log_det)
    others = flow.log_prob(x, (LABELS + 1) % 3)
    assert (others - flow.log_prob(x, LABELS)).abs().min() > 1e-3
    with pytest.raises(ValueError, match="labels"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="labels"):
        type(flow)(shape, flow.transforms[:1]).log_prob(x, LABELS)


def test_each_class_has_a_density_whose_integral_is_one():
    flow = perturb(realnvp(2, 4, (8,), n_classes=2), 0.2)
    side = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid, cell = torch.cartesian_prod(side, side), (side[1] - side[0]) ** 2
    with torch.no_grad():
        for c in range(2):
            mass = flow.log_prob(grid, torch.full((len(grid),), c)).exp().sum() * cell
            assert abs(mass - 1) < 1e-3


def test_actnorm_is_calibrated_with_the_labels():
    flow, x = perturb(realnvp(4, 3, (8,), n_classes=3)), 3 + 2 * randn(50, 4)
    labels = torch.arange(50) % 3
    flow.calibrate(x, labels)
    z, _ = flow.transforms[0](x)
    for coupling, norm in itertools.pairwise(flow.transforms[1:5]):
        z, _ = (
            coupling(z, labels) if coupling.__class__.__name__ == "AffineCoupling" else coupling(z)
        )
        if norm.__class__.__name__ == "ActNorm":
            out, _ = norm(z)
            assert (
                out.mean(0).abs().max() < 1e-9 and (out.std(0, correction=0) - 1).abs().max() < 1e-9
            )


class BernoulliClasses(nn.Module):
    """Independent pixels whose probability depends on the class."""

    n_classes, levels = 3, 2

    def __init__(self, D: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3, D, dtype=torch.float64))

    def log_prob(self, x, labels):
        "Return the log-probabilities (B,)."
        on = self.logits[labels]
        return (x * on - nn.functional.softplus(on)).flatten(1).sum(1)

    def sample(self, n, labels):
        "Draw an image of each class."
        return torch.bernoulli(self.logits[labels].sigmoid())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bayes_rule_is_that_of_the_table_of_all_images(seed):
    torch.manual_seed(seed)
    model, D = BernoulliClasses(4), 4
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=D)), dtype=torch.float64)
    y = torch.randint(3, (16,))
    scheme = MaximumLikelihood(model, "binary")
    p1 = model.logits.detach().sigmoid()
    table = torch.stack([(p1[c] ** x * (1 - p1[c]) ** (1 - x)).prod(1) for c in range(3)])
    assert torch.allclose(table.sum(1), torch.ones(3).double())
    given = scheme.evaluate([Batch(x, y)], chunk=5)
    assert math.isclose(given["nll"], -table[y, torch.arange(16)].log().mean(), rel_tol=1e-12)
    found = evaluate_bayes(scheme, [Batch(x[:7], y[:7]), Batch(x[7:], y[7:])], chunk=5)
    assert math.isclose(found["nll_marginal"], -table.mean(0).log().mean(), rel_tol=1e-12)
    bits = found["nll_marginal"] / (4 * math.log(2))
    assert math.isclose(found["bits_per_dim_marginal"], bits, rel_tol=1e-12)
    assert found["bayes_accuracy"] == (table.argmax(0) == y).double().mean().item()
    assert found["bayes_accuracy_low"] < found["bayes_accuracy"] < found["bayes_accuracy_high"]


def test_bayes_rule_averages_k_samples_of_the_noise_for_each_class():
    scheme, D = conditional_flow(), 6
    x, y = torch.randint(256, (4, 6)).double() / 255, torch.tensor([0, 1, 2, 0])
    found = evaluate_bayes(scheme, [Batch(x, y)], seed=5, k=3)
    rng, draws = generator(5), []
    for _ in range(3):
        u = torch.rand(x.shape, generator=rng, dtype=x.dtype)
        v = (255 * x + u) / 256
        draws.append([scheme.model.log_prob(v, torch.full((4,), c)) for c in range(3)])
    log_p = torch.stack([torch.stack(d) for d in draws]) - D * math.log(256)
    p = log_p.exp().mean(0).mean(0)
    assert math.isclose(found["nll_marginal"], -p.log().mean().item(), rel_tol=1e-10)
    with pytest.raises(ValueError, match="no classes"):
        evaluate_bayes(MaximumLikelihood(realnvp(6), "dequantized"), [Batch(x, y)])


# GANs


def test_a_projection_is_an_inner_product_with_the_vector_of_the_class():
    torch.manual_seed(0)
    D, x = ConvDiscriminator((1, 8, 8), 4, n_classes=3).double(), torch.rand(5, 1, 8, 8).double()
    h = D.net[:-1](2 * x - 1)
    plain = (h * D.net[-1].weight).sum(1) + D.net[-1].bias
    assert torch.allclose(D(x, LABELS), plain)  # the vectors of the classes are 0 at first
    perturb(D)
    h = D.net[:-1](2 * x - 1)
    plain = (h * D.net[-1].weight).sum(1) + D.net[-1].bias
    assert torch.allclose(D(x, LABELS), plain + (h * D.projection.weight[LABELS]).sum(1))
    with pytest.raises(ValueError, match="labels"):
        D(x)
    with pytest.raises(ValueError, match="labels"):
        ConvDiscriminator((1, 8, 8), 4).double()(x, LABELS)


def test_the_generator_learns_a_bias_for_each_class_of_unit_mean_square():
    torch.manual_seed(0)
    G, z = ConvGenerator((1, 8, 8), 4, 4, n_classes=3).double(), randn(5, 4)
    W, b = G.net[0].weight, G.net[0].bias
    by_hand = z @ W[:, :4].T + b + math.sqrt(3) * W[:, 4:].T[LABELS]
    assert torch.allclose(G(z, LABELS), G.net[1:](by_hand).sigmoid())
    with pytest.raises(ValueError, match="n_classes"):
        FeedbackGAN(G, ConvDiscriminator((1, 8, 8), 4))


@pytest.mark.parametrize("loss", ["non-saturating", "relativistic"])
def test_losses_and_penalties_are_those_of_examples_of_the_same_class(loss):
    scheme = conditional_gan(loss=loss, r1=0.7, r2=0.4)
    batch = scheme.draw_noise(Batch(randn(5, 6), LABELS), generator(0))
    G, D = scheme.generator, scheme.discriminator
    fake = G(batch.z, LABELS)
    real_logit, fake_logit = D(batch.x, LABELS), D(fake, LABELS)
    softplus = nn.functional.softplus
    if loss == "relativistic":
        d, g = softplus(fake_logit - real_logit), softplus(real_logit - fake_logit)
    else:
        d, g = softplus(-real_logit) + softplus(fake_logit), softplus(-fake_logit)
    penalty = 0.0
    for weight, x in ((0.7, batch.x), (0.4, fake)):
        slopes = [
            torch.autograd.functional.jacobian(lambda t: D(t[None], label[None]).sum(), row)
            for row, label in zip(x.detach(), LABELS)
        ]
        penalty += weight / 2 * torch.stack(slopes).square().sum() / 5
    assert torch.allclose(scheme.d_loss(batch), d.mean() + penalty)
    assert torch.allclose(scheme.g_loss(batch), g.mean())


@pytest.mark.parametrize("rule", ["literal", "consensus", "symplectic"])
def test_rules_of_second_order_step_the_projection(rule):
    scheme = conditional_gan(rule=build_rule(rule, None), r1=0.1)
    before = scheme.discriminator.projection.weight.clone()
    for _ in range(2):
        losses = scheme.step(Batch(randn(5, 6), LABELS))
    assert all(loss.isfinite() for loss in losses.values())
    moved = (scheme.discriminator.projection.weight - before).abs().sum(1)
    assert (moved > 0).all()


# class accuracy

TEST = digits("test")


class StoredDigits:
    """Scheme whose samples are real digits, of the class asked for shifted by some number."""

    n_classes = 10

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def sample(self, n, labels):
        "Return digits of the classes, shifted."
        rows = [
            (TEST.labels == (y + self.shift) % 10).nonzero()[i % 50, 0]
            for i, y in enumerate(labels)
        ]
        return TEST.images[torch.stack(rows)] / 255


def test_class_accuracy_is_that_of_the_digits_and_its_interval_is_wilsons():
    right = class_accuracy(StoredDigits(0), mnist_classifier(), 150, chunk=40)
    wrong = class_accuracy(StoredDigits(1), mnist_classifier(), 150, chunk=40)
    assert right["class_accuracy"] > 0.95 and wrong["class_accuracy"] < 0.05
    p, n, z = right["class_accuracy"], 150, 1.96
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert math.isclose(right["class_accuracy_low"], middle - half, rel_tol=1e-9)
    assert math.isclose(right["class_accuracy_high"], middle + half, rel_tol=1e-9)


def test_only_digits_have_the_classifier_of_digits():
    named = ["0 - zero", "1 - one", *"23456789"]
    assert digits_classifier((1, 28, 28), list("0123456789")) is not None
    assert digits_classifier((1, 28, 28), named) is not None
    for shape, names in (
        ((1, 32, 32), "0123456789"),
        ((1, 28, 28), "abcdefghij"),
        ((1, 28, 28), "012345678"),
    ):
        assert digits_classifier(shape, list(names)) is None


# the command line

TINY = {
    "flow-matching": "--channels 4 --multiples 1,1",
    "ddpm": "--channels 4 --multiples 1,1 --label-dropout 0.3",
    "feedback-gan": "--width 4 --z-dim 3",
    "realnvp": "--scales 1 --couplings 1 --channels 4",
}


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "Return a folder of forty images of cats and dogs, 8 x 8, in folders of their classes."
    root, random = tmp_path_factory.mktemp("pets") / "pets", generator(0)
    for name, brightest in (("cat", 100), ("dog", 256)):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = torch.randint(brightest, (8, 8), dtype=torch.uint8, generator=random)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i:02}.png")
    return root


@pytest.mark.parametrize("scheme", TINY)
def test_a_conditional_run_is_trained_sampled_and_measured(scheme, pets, tmp_path, capsys):
    out = tmp_path / "run"
    text = f"{TINY[scheme]} --conditional --epochs 1 --holdout 0.3 --out"
    assert run(*train_args(scheme, pets, text), out) == 0
    assert "no pictures" not in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == config["options"]["classes"] == ["cat", "dog"]
    width, height = Image.open(out / "samples" / "epoch-0001.png").size
    assert width == 2 * 10 + 2 and (height - 2) % 10 == 0  # a column for each class
    guided = "--guidance 2" if scheme in ("flow-matching", "ddpm") else ""
    assert run("sample", out, "--n 4", guided) == 0
    capsys.readouterr()
    assert run("evaluate", out, guided, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert "class_accuracy" not in measured
    if scheme == "realnvp":
        assert measured["pixels"].endswith("given the class")
        assert 0 <= measured["bayes_accuracy"] <= 1 and measured["nll_marginal"] > 0
    if guided:
        assert measured["guidance"] == 2
    assert run("train --resume", out, "--epochs 2 --progress none") == 0
    assert read_options(out)["conditional"] is True


def test_a_conditional_run_of_digits_reports_the_class_accuracy(tmp_path, capsys):
    out = tmp_path / "run"
    args = "--width 2 --z-dim 2 --epochs 1 --batch-size 500 --progress none"
    assert run(f"train feedback-gan --conditional --data digits {args} --out", out) == 0
    capsys.readouterr()
    assert run("evaluate", out, "--limit 100 --class-samples 50 --json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["class_samples"] == 50
    assert measured["class_accuracy_low"] <= measured["class_accuracy"] <= 0.6
    assert measured["class_accuracy_of_images"] > 0.95


@pytest.mark.parametrize("scheme", TINY)
def test_images_without_a_class_are_refused(scheme, pets, few_images, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*train_args(scheme, few_images, f"{TINY[scheme]} --conditional --out"), out) == 2
    assert_one_line(capsys.readouterr().err, "--conditional", "images of mine have", "no class")
    assert not out.exists()


def test_some_images_without_a_class_and_one_class_alone_are_refused(pets, tmp_path, capsys):
    mixed, alone, out = tmp_path / "mixed", tmp_path / "alone", tmp_path / "run"
    for root, names in ((mixed, ("cat", "dog")), (alone, ("cat",))):
        for name in names:
            (root / name).mkdir(parents=True)
            for path in (pets / name).iterdir():
                (root / name / path.name).write_bytes(path.read_bytes())
    (mixed / "unlabeled").mkdir()
    (mixed / "unlabeled" / "loose.png").write_bytes(next((pets / "cat").iterdir()).read_bytes())
    for root, words in ((mixed, "no class"), (alone, "--conditional")):
        assert run(*train_args("realnvp", root, "--conditional --out"), out) == 2
        assert_one_line(capsys.readouterr().err, words)
        assert not out.exists()


def test_options_that_need_classes_are_refused_without(pets, tmp_path, capsys):
    out, no_null = tmp_path / "run", tmp_path / "no-null"
    assert run(*train_args("ddpm", pets, "--label-dropout 0.1 --out"), out) == 2
    assert_one_line(capsys.readouterr().err, "--label-dropout", "--conditional")
    tiny = "--channels 4 --multiples 1,1 --epochs 1 --holdout 0.3"
    assert run(*train_args("ddpm", pets, f"{tiny} --out"), out) == 0
    assert (
        run(*train_args("ddpm", pets, f"{tiny} --conditional --label-dropout 0 --out"), no_null)
        == 0
    )
    capsys.readouterr()
    for folder, word in ((out, "conditional"), (no_null, "label_dropout")):
        for command in ("sample", "evaluate"):
            assert run(command, folder, "--guidance 2") == 2
            assert_one_line(capsys.readouterr().err, "guidance 2", word)
    edit_config(no_null, classes=["cat"])
    assert run("sample", no_null) == 2
    assert_one_line(capsys.readouterr().err, "classes")
    edit_config(no_null, classes=["cat", "dog", "cow"])
    assert run("sample", no_null) == 2
    assert capsys.readouterr().err.count("\n") == 1
