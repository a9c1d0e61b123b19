"Training beyond what its page checks: compilation, streams, schedules, devices."

import itertools

import pytest
import torch
from PIL import Image
from torch import nn

from optgen.controllers import Geco
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.images import Batch, Images, digits
from optgen.data.loading import Loader
from optgen.games import Game, Player
from optgen.models.vae import VAE, ConvVAE
from optgen.optim import Adam
from optgen.schemes.elbo import BetaVAE
from optgen.training import checkpoint
from optgen.training.guards import NonFinite, NonFiniteWatch
from optgen.training.loop import clear_small_moments
from optgen.training.trainer import fit


def few(n=400):
    """Return the first digits."""
    return Images(digits("train").images[:n])


def small_vae():
    """Return a small VAE."""
    return VAE(784, 32, 16, 4)


def small_conv_vae():
    """Return a small convolutional VAE."""
    return ConvVAE((1, 28, 28), 4, width=8)


def scheme(seed=0, make=small_vae, device=None, beta=1.0):
    """Return a scheme whose first weights follow from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(device)
    return BetaVAE(model, beta, optimizer=Adam(model.parameters(), lr=1e-3))


def weights(s):
    """Return the weights of a scheme as one vector on the CPU."""
    return torch.cat([p.detach().cpu().flatten() for p in s.model.parameters()])


def test_compiled_is_eager():
    eager, compiled = (scheme(beta=Geco(200.0, smoothing=0.9)) for _ in range(2))
    for s, c in ((eager, False), (compiled, True)):
        fit(s, few(), epochs=2, binarize="dynamic", compile=c, progress="none")
    assert torch.allclose(weights(eager), weights(compiled), rtol=1e-3, atol=1e-5)
    assert (
        torch.allclose(eager.beta.value, compiled.beta.value, rtol=1e-3) and eager.beta.value < 0.9
    )
    walked = (weights(eager) - weights(scheme())).norm()
    assert walked > 100 * (weights(eager) - weights(compiled)).norm()


@pytest.mark.parametrize("best", [1, 2])
def test_patience_gives_the_weights_of_the_best_epoch(best, tmp_path, monkeypatch):
    options = {"binarize": "static", "progress": "none", "samples": 0, "valid": few(50)}
    shorter = scheme()
    fit(shorter, few(), epochs=best, **options)
    first_seen = [9.0, 5.0, 4.0][2 - best :]  # the first one is the rehearsal's
    losses = iter([*first_seen, 4.0, 7.0])  # an equal loss is not smaller
    longer = scheme()
    monkeypatch.setattr(longer, "evaluate", lambda batches: {"loss": next(losses)})
    records = fit(longer, few(), epochs=9, patience=2, out=tmp_path / "run", **options)
    assert len(records) == best + 2
    assert torch.equal(weights(longer), weights(shorter))


def test_bfloat16_learns_as_much():
    def final_loss(epochs, precision="float32"):
        """Return the loss on validation data after so many epochs."""
        options = {"valid": few(), "binarize": "static", "progress": "none"}
        records = fit(scheme(), few(2000), epochs=epochs, precision=precision, **options)
        return records[-1]["valid"]["loss"]

    full, half, first = final_loss(4), final_loss(4, "bfloat16"), final_loss(1)
    assert abs(half - full) < 0.1 * (first - full)


def test_a_stream_from_disk_trains_as_the_same_images_in_memory(tmp_path):
    for i, x in enumerate(few(60).images):
        Image.fromarray(x[0].numpy()).save(tmp_path / f"{i:02d}.png")
    stream = image_folder(tmp_path, "train", memory_limit=0)
    assert isinstance(stream, ImageFiles)
    a, b = scheme(), scheme()
    for s, data in ((a, stream), (b, stream.to_memory())):
        fit(s, data, valid=data, epochs=2, batch_size=10, binarize="dynamic", progress="none")
    assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize("drop_last, steps", [(False, 5), (True, 4)])
def test_a_last_batch_that_is_smaller(drop_last, steps):
    loader = Loader(few(450), 100, drop_last=drop_last)
    records = fit(scheme(), loader, epochs=2, progress="none")
    assert [r["step"] for r in records] == [steps, 2 * steps]


def test_any_optimizer_resumes(tmp_path):
    def new():
        """Return a game with an optimizer of PyTorch."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(784, 1)
        opt = torch.optim.NAdam(model.parameters(), lr=0.01)
        return Game(net=Player(model, lambda b: model(b.x.flatten(1)).square().mean(), opt))

    whole, first, second = new(), new(), new()
    fit(whole, few(), epochs=4, out=tmp_path / "a", progress="none")
    fit(first, few(), epochs=2, out=tmp_path / "b", progress="none")
    fit(second, few(), epochs=4, out=tmp_path / "b", resume=True, progress="none")
    a, b = (g.players["net"].module.weight for g in (whole, second))
    assert torch.equal(a, b)


def test_the_average_is_what_is_validated_and_sampled(tmp_path):
    options = {"valid": few(), "epochs": 2, "batch_size": 10, "binarize": "static"}
    plain, averaged = (
        fit(scheme(), few(), ema=ema, progress="none", **options) for ema in (None, 0.9)
    )
    assert averaged[0]["valid"]["loss"] > plain[0]["valid"]["loss"] + 1


def test_a_scheme_without_evaluation_or_samples_still_trains(tmp_path):
    model = nn.Linear(784, 2)
    game = Game(
        net=Player(
            model,
            lambda b: nn.functional.mse_loss(model(b.x.flatten(1)), b.x.flatten(1)[:, :2]),
            torch.optim.SGD(model.parameters(), lr=0.01),
        )
    )
    records = fit(game, few(), epochs=2, out=tmp_path / "run", progress="none")
    assert [set(r) for r in records] == [
        {"epoch", "step", "seconds", "images_per_second", "train"}
    ] * 2
    assert (tmp_path / "run/curves.png").exists() and not (tmp_path / "run/samples").exists()


def test_a_scheme_that_draws_no_samples_has_no_grid(tmp_path):
    game, asked = scheme(), []

    def sample(n):
        """Return no samples, as `Assisted` without a generator of images does."""
        asked.append(n)

    game.sample = sample
    records = fit(game, few(), epochs=2, samples=9, out=tmp_path / "run", progress="none")
    assert asked == [1, 9, 9] and len(records) == 2  # 1 is the rehearsal's
    assert (tmp_path / "run/curves.png").exists() and not (tmp_path / "run/samples").exists()


def test_a_large_finite_gradient_is_not_taken_for_a_bad_one():
    model = nn.Linear(3, 1)
    game = Game(
        net=Player(
            model, lambda b: model(b.x).sum() * 1e18, torch.optim.SGD(model.parameters(), lr=0.0)
        )
    )
    watch = NonFiniteWatch()
    watch.update(1, game.step(Batch(torch.ones(9, 3))), game)
    watch.check(game)


def test_the_bar_on_a_terminal_shows_losses_and_speed(capsys):
    fit(scheme(), few(), valid=few(), epochs=2, progress="bar")
    said = capsys.readouterr().err
    assert "loss=" in said and "img/s" in said and "epoch" in said and "\n" in said


@pytest.mark.cuda
@pytest.mark.parametrize("make", [small_vae, small_conv_vae])
def test_on_a_gpu(tmp_path, make):
    whole, second = scheme(make=make, device="cuda"), scheme(seed=1, make=make, device="cuda")
    options = {"valid": few(), "binarize": "dynamic", "progress": "none"}
    fit(whole, few(), epochs=2, out=tmp_path / "a", **options)
    fit(scheme(make=make), few(), epochs=1, out=tmp_path / "b", device="cuda", **options)
    fit(second, few(), epochs=2, out=tmp_path / "b", resume=True, **options)
    assert torch.allclose(weights(whole), weights(second), rtol=1e-4, atol=1e-6)
    state = checkpoint.load(tmp_path / "a/checkpoint.pt", map_location="cpu")
    assert all(w.device.type == "cpu" for w in state["scheme"]["model"]["weights"].values())


class LastStepOverflows(torch.optim.SGD):
    """Gradient descent whose last step of an epoch makes a weight infinite."""

    def step(self, closure=None):
        """Take a step; losses and gradients up to here are finite."""
        super().step(closure)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 4:
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.inf


def test_a_weight_that_its_update_made_infinite_ends_the_run(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    optimizer = LastStepOverflows(net.parameters(), 0.01)
    game = Game(net=Player(net, lambda batch: net(batch.x).square().mean(), optimizer))
    with pytest.raises(NonFinite, match=r"step 4: the parameter '1.weight' of player 'net'"):
        fit(game, few(40), batch_size=10, out=tmp_path / "run", progress="none")
    assert checkpoint.load(tmp_path / "run/checkpoint.pt")["step"] == 1


def test_a_bad_gradient_is_named_though_only_the_next_loss_shows_it():
    net, evaluation = nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), itertools.count(1)

    def loss(batch):
        """Return a loss whose gradient by the bias is not finite in the third step."""
        bias = net[1].bias
        kink = (bias - bias.detach()).abs().sqrt().sum() if next(evaluation) == 3 else 0.0
        return net(batch.x).square().mean() + kink

    game = Game(net=Player(net, loss, torch.optim.SGD(net.parameters(), 0.01)))
    with pytest.raises(NonFinite, match=r"^step 3: the gradient of '1.bias' of player 'net' is"):
        fit(game, few(100), batch_size=10, progress="none")
    assert game.on_loss is None


def dead_images():
    """Return digits whose right half is black, so that some weights never have a gradient."""
    images = digits("train").images[:200].clone()
    images[..., 14:] = 0
    return Images(images)


def dead_moments(s):
    """Return the moments of the first layer's weights from the right half of the pixels."""
    first = next(iter(s.model.parameters()))
    is_dead = torch.zeros(28, 28, dtype=torch.bool).index_fill(1, torch.arange(14, 28), True)
    state = s.players["model"].optimizer.state[first]
    return state["exp_avg"][:, is_dead.flatten()]


class StopAt:
    """Callback that ends a run after a step."""

    def __init__(self, step):
        self.last = step

    def on_step(self, run, batch, losses):
        """End the run if this is the step."""
        if run.step == self.last:
            run.stop()


class FillDeadMoments:
    """Callback that gives dead weights a small moment in the first step."""

    def on_step(self, run, batch, losses):
        """Fill the moments after the first step."""
        if run.step == 1:
            first = next(iter(run.scheme.model.parameters()))
            moment = run.scheme.players["model"].optimizer.state[first]["exp_avg"]
            moment[:, 14:28] = 1e-31


@pytest.mark.parametrize("optimizer", (Adam, torch.optim.Adam))
def test_small_moments_are_cleared_and_change_no_weight(optimizer, monkeypatch):
    ends = []
    for every in (100, 10**9):
        monkeypatch.setattr("optgen.training.loop.CLEAR_EVERY", every)
        s = scheme()
        s.players["model"].optimizer = optimizer(s.model.parameters(), lr=1e-3)
        fit(
            s,
            dead_images(),
            batch_size=4,
            epochs=2,
            callbacks=[FillDeadMoments()],
            progress="none",
        )
        ends.append((weights(s), dead_moments(s).abs().max().item()))
    (cleared, moment), (kept, small) = ends
    assert moment == 0 < small < 1e-34
    assert torch.equal(cleared, kept)


@pytest.mark.parametrize("stop", (2, 3, 4))
def test_small_moments_are_cleared_at_the_same_steps_of_a_resumed_run(stop, tmp_path, monkeypatch):
    monkeypatch.setattr("optgen.training.loop.CLEAR_EVERY", 3)
    options = dict(batch_size=40, epochs=2, out=tmp_path / "b", progress="none")
    whole = scheme()
    fit(
        whole,
        dead_images(),
        **options | {"out": tmp_path / "a"},
        callbacks=[FillDeadMoments()],
    )
    fit(scheme(), dead_images(), **options, callbacks=[FillDeadMoments(), StopAt(stop)])
    resumed = scheme()
    fit(resumed, dead_images(), **options, resume=True, callbacks=[FillDeadMoments()])
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(dead_moments(whole), dead_moments(resumed))
    assert dead_moments(whole).abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("eps_is_enough", (True, False))
def test_only_what_eps_outweighs_is_cleared(dtype, eps_is_enough):
    """Any number below eps / 2^24 leaves the sum of its root and eps as it is."""
    least = torch.finfo(dtype).smallest_normal * 2**24
    eps = least**0.5 * 2**24 * (1.01 if eps_is_enough else 0.99)
    x = torch.zeros(4, dtype=dtype, requires_grad=True)
    x.grad = torch.ones_like(x)
    optimizer = torch.optim.Adam([x], eps=eps)
    optimizer.step()
    values = torch.tensor([0.9 * least, -0.9 * least, 1.1 * least, 1.0], dtype=dtype)
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[x][name].copy_(values)
    clear_small_moments(optimizer)
    expected = values * torch.tensor([0, 0, 1, 1] if eps_is_enough else [1, 1, 1, 1])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[x][name], expected.to(dtype))
    assert optimizer.state[x]["step"] == 1
