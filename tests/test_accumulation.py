"Micro-batches against the joined batch: every rule and scheme, memory, means, commands."

import json

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cli_helpers import assert_one_line, read_options, run, train_args
from optgen.accumulation import slice_batch, split_batch
from optgen.controllers import Geco
from optgen.data.images import Batch, Images, digits
from optgen.fields import Field
from optgen.games import Game, Player
from optgen.models.conditional import ConditionalVAE
from optgen.models.diffusion import Denoiser
from optgen.models.vae import VAE, GaussianVAE
from optgen.optim import Adam, Momentum
from optgen.schemes.assisted import Assisted, Balanced
from optgen.schemes.couplings import Reconstruction
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.levels import AdaptiveLevels, Uncertainty
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.training import checkpoint
from optgen.training.trainer import fit
from spread import ASSISTED, ELBOS, LIKELIHOODS, RULES, SIZES, Net, gan

PARTS = (2, 3, 5)


def batches(steps=8, seed=1):
    """Return batches of changing size in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZES[i % 4], 2, generator=g, dtype=torch.float64) for i in range(steps)]


def walk(game, steps, micro_batches, seed=0):
    """Take steps and return the weights and the last losses."""
    game.micro_batches = micro_batches
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in steps:
            losses = game.step(batch)
    flat = [
        p.detach().flatten() for player in game.players.values() for p in player.params.values()
    ]
    return torch.cat([*flat, *(loss[None] for loss in losses.values())])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_the_steps_of_the_joined_batch(rule):
    expected = walk(gan(rule=RULES[rule]()), batches(), 1)
    start = walk(gan(), batches(1), 1)
    assert (expected - start).abs().max() > 0.01
    for parts in PARTS:
        found = walk(gan(rule=RULES[rule]()), batches(), parts)
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_a_smaller_last_part_has_a_smaller_weight():
    "Seven rows in three parts, against the gradient of the plain mean over all rows."
    x = torch.arange(1.0, 8.0, dtype=torch.float64)
    w = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    game = Game(m=Player([w], lambda b: (w * b).square().mean(), torch.optim.SGD([w], 0.01)))
    game.micro_batches = 3
    loss = game.step(x)["m"].item()
    squares = sum(i * i for i in range(1, 8)) / 7
    assert loss == pytest.approx(4 * squares, rel=1e-14)
    assert w.item() == pytest.approx(2 - 0.01 * 2 * 2 * squares, rel=1e-14)
    parts = split_batch({"x": x, "scale": torch.tensor(3.0), "name": "a"}, 3)
    assert [len(part["x"]) for part, _ in parts] == [2, 2, 3]
    assert [share for _, share in parts] == [2 / 7, 2 / 7, 3 / 7]
    assert all(part["scale"] == 3 and part["name"] == "a" for part, _ in parts)
    assert len(split_batch(x[:2], 5)) == 2 and split_batch(None, 4) == [(None, 1.0)]
    for bad in ((x, x[:3]), x[:0]):
        with pytest.raises(ValueError, match="spread along dimension 0"):
            split_batch(bad, 2)


@pytest.mark.parametrize("name", ELBOS)
def test_a_vae_takes_the_steps_of_the_joined_batch(name):
    def train(parts):
        """Return weights, loss, beta and phase after some steps."""
        options = ELBOS[name]()
        torch.manual_seed(0)
        model = VAE(6, 8, 5, 2, activation=nn.Tanh).double()
        if name == "sigma":
            model = GaussianVAE(6, 8, 5, 2, activation=nn.Tanh).double()
        own = [model.q_net, model.p_net] if options.pop("players", 1) == 2 else [model]
        optimizers = tuple(Momentum(m.parameters(), lr=0.02, momentum=0.5) for m in own)
        game = BetaVAE(model, optimizer=optimizers if len(own) == 2 else optimizers[0], **options)
        g = torch.Generator().manual_seed(1)
        steps = [
            Batch(torch.rand(SIZES[i % 4], 6, generator=g, dtype=torch.float64).round())
            for i in range(14)
        ]
        weights = walk(game, steps, parts)
        memory = {k: float(v) for k, v in game.rule.memory.items()}
        return torch.cat([weights, game.beta.value.flatten()]), int(game.beta.t), memory

    expected, updates, memory = train(1)
    for parts in PARTS:
        found, count, remembered = train(parts)
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
        assert count == updates == 14
        assert remembered == pytest.approx(memory, rel=1e-11)


def labeled():
    """Return labeled images of six pixels, and a generator."""
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (11, 6), generator=g, dtype=torch.uint8)
    return Images(pixels.view(11, 1, 2, 3), torch.arange(11) % 3), g


class FlatNet(Net):
    """A small classifier of images."""

    def features(self, x):
        """Return the features."""
        return super().features(x.flatten(1))


def assisted(name):
    """Return an `Assisted` in float64 and batches for it."""
    images, g = labeled()
    torch.manual_seed(0)
    if name == "labeled, geco":
        generator, coupling = ConditionalVAE(6, 3, 2, 5), None
        more = {"labeled": images, "weight": Geco(0.5, rate=0.02, smoothing=0.5)}
    elif name == "labeled, balanced":
        generator, coupling = nn.Linear(5, 6), Reconstruction()
        more = {"labeled": images, "rule": Balanced(project=True)}
    else:
        generator, coupling, more = ASSISTED[name]()
    classifier = FlatNet(2 if "features" in more else 6)
    modules = {"classifier": classifier, "generator": generator, "features": more.get("features")}
    optimizers = {
        k: Momentum(m.double().parameters(), lr=0.02, momentum=0.5) for k, m in modules.items() if m
    }
    game = Assisted(classifier, generator, coupling, optimizers=optimizers, **more)
    steps = [
        Batch(
            torch.rand(n, 1, 2, 3, generator=g, dtype=torch.float64).round(),
            torch.randint(3, (n,), generator=g),
        )
        for n in (12, 7, 3, 1, 12)
    ]
    return game, steps


@pytest.mark.parametrize("name", [*ASSISTED, "labeled, geco", "labeled, balanced"])
def test_an_assisted_classifier_takes_the_steps_of_the_joined_batch(name):
    def train(parts):
        """Return the weights, losses and lambda."""
        game, steps = assisted(name)
        return torch.cat([walk(game, steps, parts), game.weight.value.flatten()])

    expected = train(1)
    for parts in PARTS:
        assert (train(parts) - expected).abs().max() < 1e-12 * expected.abs().max()


class SmoothNet(nn.Module):
    """A small network of a denoiser."""

    def __init__(self):
        super().__init__()
        self.mix, self.level = nn.Linear(6, 6), nn.Linear(1, 6)

    def forward(self, y, c):
        """Return the output for images and a quarter of log sigma."""
        return (self.mix(y.flatten(1)) + self.level(c[:, None])).tanh().view_as(y)


def diffusion(seed=0):
    """Return a diffusion model with all that looks at a batch, and batches for it."""
    torch.manual_seed(seed)
    model = Denoiser(SmoothNet(), (1, 2, 3)).double()
    q = Uncertainty(3).double()
    nn.init.normal_(q.out.weight, std=0.1)
    scheme = DenoisingDiffusion(
        model,
        levels=AdaptiveLevels(3, decay=0.5),
        coupling=True,
        uncertainty=q,
        optimizers=(
            Momentum(model.parameters(), lr=0.02, momentum=0.5),
            Momentum(q.parameters(), lr=0.02, momentum=0.5),
        ),
    )
    g = torch.Generator().manual_seed(seed + 1)
    steps = [
        Batch(torch.randint(256, (n, 1, 2, 3), generator=g).double() / 255)
        for n in (12, 7, 3, 1, 12, 5)
    ]
    return scheme, steps


def test_a_diffusion_model_takes_the_steps_of_the_joined_batch():
    scheme, steps = diffusion()
    expected = torch.cat([walk(scheme, steps, 1), scheme.levels.square])
    assert (scheme.levels.met > 0).all()
    for parts in PARTS:
        other, steps = diffusion()
        found = torch.cat([walk(other, steps, parts), other.levels.square])
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
        assert torch.equal(other.levels.met, scheme.levels.met)


@pytest.mark.parametrize("data", LIKELIHOODS)
def test_a_likelihood_takes_the_steps_of_the_joined_batch(data):
    def train(parts):
        """Return the weights and the loss."""
        torch.manual_seed(0)
        model = LIKELIHOODS[data]().double()
        game = MaximumLikelihood(model, data, Momentum(model.parameters(), lr=0.01, momentum=0.5))
        g, top = torch.Generator().manual_seed(1), 2 if data == "binary" else 256
        steps = [
            Batch(torch.randint(top, (n, 1, 2, 3), generator=g).double() / (top - 1))
            for n in (12, 7, 3, 2)
        ]
        return walk(game, steps, parts)

    expected = train(1)
    for parts in PARTS:
        assert (train(parts) - expected).abs().max() < 1e-12 * expected.abs().max()


class Peak:
    """The most bytes of saved activations that were alive at once."""

    def __init__(self):
        self.alive = self.most = 0

    def __enter__(self):
        self.hooks = saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        """Count a saved tensor until it is released."""
        return Held(self, tensor)


class Held:
    """A saved tensor; parameters are not counted."""

    def __init__(self, peak, tensor):
        self.peak, self.tensor = peak, tensor.detach()  # a saved output would own its own graph
        self.size = 0 if tensor.is_leaf else tensor.numel() * tensor.element_size()
        peak.alive += self.size
        peak.most = max(peak.most, peak.alive)

    def __del__(self):
        self.peak.alive -= self.size


@pytest.mark.parametrize(
    "rule", ["simultaneous", "consensus", "symplectic", "competitive", "unrolled", "a list"]
)
def test_the_memory_is_that_of_one_micro_batch(rule):
    def peak(rows, parts):
        """Return the peak of a step."""
        game = gan(rule=RULES[rule]())
        game.micro_batches = parts
        x = torch.randn(rows, 2, dtype=torch.float64)
        with Peak() as found:
            game.step(x)
        assert found.alive == 0
        return found.most

    part, whole = peak(64, 1), peak(512, 1)
    assert whole > 5 * part  # activations of the batch dominate
    assert peak(512, 8) <= 1.1 * part
    assert part < peak(512, 4) < 2.5 * part


def test_products_see_the_masks_that_the_gradient_saw():
    "Dropout: the pullback of each micro-batch, against explicit graphs of the same masks."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    x = torch.randn(7, 3, dtype=torch.float64)

    def loss(x):
        """Return a smooth loss."""
        return net(x).square().mean()

    game = Game(m=Player(net, loss, torch.optim.SGD(net.parameters(), 0.1)))
    game.micro_batches = 2
    torch.manual_seed(5)
    at = game.at(x, graph=True)
    v = at.v
    after = torch.rand(3)
    product = at.vjp(v)["m"]
    later = torch.rand(3)
    torch.manual_seed(5)
    total = 3 / 7 * loss(x[:3]) + 4 / 7 * loss(x[3:])
    grads = torch.autograd.grad(total, list(net.parameters()), create_graph=True)
    assert torch.equal(torch.rand(3), after) and torch.equal(torch.rand(3), later)
    for a, b in zip(v["m"], grads):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-15)
    along = sum((g * h.detach()).sum() for g, h in zip(grads, grads))
    expected = torch.autograd.grad(along, list(net.parameters()), allow_unused=True)
    for a, b in zip(product, expected):
        torch.testing.assert_close(
            torch.zeros(()).double() if a is None else a,
            torch.zeros(()).double() if b is None else b,
            rtol=1e-12,
            atol=1e-15,
        )


@pytest.mark.parametrize("rule", [None, "consensus"])
def test_a_loss_may_ask_for_means_over_the_batch(rule):
    def train(parts):
        """Return the weights after steps on a loss that asks twice."""
        torch.manual_seed(1)
        net = nn.Linear(3, 1).double()

        def loss(x):
            """Return the spread around the batch's mean, weighted by another mean."""
            y = net(x)
            (m,) = game.average_over_batch([y.mean()])
            (s,) = game.average_over_batch([(y - m).square().mean()])
            return ((y - m) ** 2 / (1 + s)).mean()

        game = Game(
            m=Player(net, loss, torch.optim.SGD(net.parameters(), 0.1)),
            rule=RULES[rule]() if rule else None,
        )
        g = torch.Generator().manual_seed(2)
        steps = [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (7, 4, 5)]
        return walk(game, steps, parts)

    expected = train(1)
    for parts in PARTS:
        assert (train(parts) - expected).abs().max() < 1e-12


def test_a_loss_that_asks_on_some_micro_batches_only_is_refused():
    w = torch.ones(1, requires_grad=True)

    def loss(x):
        """Ask where the first row is 0."""
        if x[0] == 0:
            game.average_over_batch([x.mean()])
        return (w * x).sum()

    game = Game(m=Player([w], loss, torch.optim.SGD([w], 0.1)))
    game.micro_batches = 2
    with pytest.raises(RuntimeError, match="on some micro-batches and not on others"):
        game.step(torch.arange(4.0))
    assert game.batch_means is None and w.item() == 1


@pytest.mark.parametrize("bad", [0, -1, 2.5, "2", True])
def test_a_number_of_micro_batches_out_of_range_is_refused(bad):
    game = gan()
    game.micro_batches = bad
    if bad is True:
        game.known_micro_batches = 0
    with pytest.raises(ValueError, match="micro_batches must be an integer, at least 1"):
        game.step(batches()[0])


def test_batch_normalization_is_named_once(recwarn):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    game = Game(m=Player(net, lambda x: net(x).square().mean(), optimizer))
    game.step(torch.randn(8, 2))
    assert not recwarn.list
    game.micro_batches = 2
    for _ in range(2):
        game.step(torch.randn(8, 2))
    (found,) = recwarn.list
    assert "1 (BatchNorm1d) normalizes each micro-batch by itself" in str(found.message)
    assert found.filename == __file__


def test_sparse_gradients_are_summed():
    torch.manual_seed(0)
    table, rows = nn.Embedding(5, 2, sparse=True), torch.tensor([0, 1, 1, 4, 2])
    before = table.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    game = Game(m=Player(table, lambda i: table(i).square().mean(), optimizer))
    game.micro_batches = 2
    game.step(rows)
    before[rows].square().mean().backward()
    torch.testing.assert_close(table.weight, before - 0.1 * before.grad)


def test_half_precision_gradients_are_summed_in_single_precision():
    "A hundred parts of 1/256 after one of 1: in bfloat16 the sum would stay at 1."
    w = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((101,), 101 / 256, dtype=torch.bfloat16)
    x[0] = 101
    game = Game(m=Player([w], lambda b: (w * b).sum() / len(b), torch.optim.SGD([w], 0.0)))
    game.micro_batches = 101
    game.step(x)
    assert w.grad.item() == pytest.approx(1 + 100 / 256, rel=0.01)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_compiled_loss_asks_for_its_means(parts):
    def train(compiled):
        """Return beta, the loss and the updates of the controller."""
        torch.manual_seed(0)
        scheme = BetaVAE(VAE(6, 8, 5, 2).double(), beta=Geco(4.0, rate=0.02, smoothing=0.5))
        scheme.micro_batches = parts
        if compiled:
            loss = torch.compile(scheme.loss, backend="eager")
            scheme.players["model"].loss = loss
        for _ in range(3):
            losses = scheme.step(Batch(torch.rand(7, 6).round()))
        return scheme.beta.value.item(), losses["model"].item(), int(scheme.beta.t)

    assert train(True) == pytest.approx(train(False), rel=1e-12)


def small_fit(**options):
    """Fit a small VAE to a few digits; return its weights and records."""
    images = Images(digits("train").images[:95])
    torch.manual_seed(0)
    model = VAE(784, 16, 8, 2).double()
    scheme = BetaVAE(
        model,
        beta=Geco(300.0, rate=0.002, smoothing=0.9),
        optimizer=Adam(model.parameters(), lr=1e-3, eps=1e-3),
    )
    records = fit(scheme, images, batch_size=20, progress="none", **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), records, scheme


def test_fit_trains_as_without_accumulation(tmp_path):
    expected, records, _ = small_fit(epochs=3)
    found, same, scheme = small_fit(epochs=3, accumulate=3)
    assert (found - expected).abs().max() < 1e-12 and scheme.micro_batches == 1
    for a, b in zip(records, same):
        assert a["train"] == pytest.approx(b["train"], rel=1e-6)
    small_fit(epochs=1, accumulate=4, out=tmp_path)
    small_fit(epochs=2, accumulate=4, out=tmp_path, resume=True)
    assert "accumulate" not in json.dumps(
        checkpoint.load(tmp_path / "checkpoint.pt")["arguments"]["fixed"]
    )
    found, _, _ = small_fit(epochs=3, out=tmp_path, resume=True)
    assert (found - expected).abs().max() < 1e-12
    changed = json.loads((tmp_path / "config.json").read_text())["resumed"][-1]["changed"]
    assert changed["accumulate"] == [4, 1]


def test_resuming_with_the_same_accumulation_is_bit_for_bit(tmp_path):
    whole, _, _ = small_fit(epochs=2, accumulate=3)
    small_fit(epochs=1, accumulate=3, out=tmp_path)
    found, _, _ = small_fit(epochs=2, accumulate=3, out=tmp_path, resume=True)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("bad", [0, 1.5, 21])
def test_fit_refuses_a_number_of_parts(bad):
    with pytest.raises(ValueError, match="accumulate"):
        small_fit(accumulate=bad)


def test_the_command_line_trains_as_without_accumulation(tmp_path, few_images, capsys):
    args = train_args("beta-vae --z-dim 2 --epochs 1", few_images)
    assert run(*args, "--out", tmp_path / "a") == 0
    assert run(*args, "--out", tmp_path / "b", "--accumulate 3") == 0
    records = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in "ab"
    ]
    assert records[1]["train"] == pytest.approx(records[0]["train"], rel=1e-5)
    assert records[1]["valid"] == pytest.approx(records[0]["valid"], rel=1e-3)
    assert read_options(tmp_path / "b")["accumulate"] == 3
    capsys.readouterr()
    assert run("train --resume", tmp_path / "b", "--accumulate 2 --epochs 2 --progress none") == 0
    assert "accumulate was 3, is 2" in capsys.readouterr().out
    for word in ("11", "0", "x"):
        assert run(*args, "--out", tmp_path / "bad", "--accumulate", word) == 2
        assert_one_line(capsys.readouterr().err, "accumulate")
        assert not (tmp_path / "bad").exists()


def test_a_field_of_parts_is_the_field_of_the_whole():
    "Whoever steps by `game.at` has the same field, without a step."
    game, x = gan(), batches()[0]
    whole = game.at(game.draw(x))
    batch = whole.batch
    game.micro_batches = 5
    parts = game.at(batch)
    assert isinstance(parts.v, Field) and len(parts.micro_batches) == 5
    for name, blocks in whole.v.items():
        for a, b in zip(blocks, parts.v[name]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert whole.losses[name].item() == pytest.approx(parts.losses[name].item(), rel=1e-14)
    assert torch.equal(slice_batch(batch, slice(2, 4)).x, x[2:4])
