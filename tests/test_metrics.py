"Metrics of the installed package, against a model whose likelihood is known and on the VAEs."

import math

import pytest
import torch
from torch import nn

from optgen.data.images import digits
from optgen.data.loading import Loader
from optgen.metrics import (
    active_units,
    auroc,
    bits_per_dim,
    distortion,
    elbo,
    eval_mode,
    evaluate_vae,
    importance_nll,
    latent_variance,
    log_weights,
    log_weights_in_cache,
    measure_calibration,
    mutual_information,
    rate,
    wilson_interval,
)
from optgen.models.vae import VAE, ConvVAE, elbo_terms
from optgen.testing import LinearGaussian, assert_mean, generator, randn


def linear_gaussian(seed=0, n=100, dtype=torch.float64, **spoil):
    "Return a model with an exact posterior (unless spoiled), data from it, and log p(x)."
    scales = torch.tensor([0.6, 1.5], dtype=dtype)
    W = torch.linalg.qr(randn(5, 2, seed=seed, dtype=dtype))[0] * scales
    model = LinearGaussian(W, W[:, 1].sin(), sigma=0.8, **spoil)
    z, noise = randn(n, 2, seed=seed + 1, dtype=dtype), randn(n, 5, seed=seed + 2, dtype=dtype)
    x = z @ W.T + model.b + 0.8 * noise
    return model, x, model.marginal.log_prob(x)


def small_vae():
    "Return a VAE of 784 pixels with three latents."
    return VAE(784, 16, 16, 3)


def small_conv_vae():
    "Return a convolutional VAE with three latents."
    return ConvVAE((1, 28, 28), 3, width=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "spoil", [dict(shift=0.2), dict(stretch=1.3), dict(shift=-0.3, stretch=1.2)], ids=str
)
def test_nll_is_right_to_within_its_own_error(seed, spoil):
    model, x, log_p = linear_gaussian(seed, n=300, **spoil)
    found = importance_nll(model, x, k=2000, generator=generator(seed))
    z = (found.nll + log_p) / found.mc_se
    assert_mean(z, (found.mc_se / 2).mean())
    assert_mean((z - z.mean()) ** 2, 1.0)
    assert (found.mc_se < 0.1).all() and (1 < found.ess).all() and (found.ess <= 2000).all()


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_exact_posterior_has_no_variance(dtype, tol):
    model, x, log_p = linear_gaussian(3, dtype=dtype)
    found = importance_nll(model, x, k=50, generator=generator())
    assert torch.allclose(found.nll, -log_p, rtol=tol)
    assert found.mc_se.max() < 2e-3 and found.nll.dtype == dtype
    log_w, _ = log_weights(model, x, randn(9, 100, 2, dtype=dtype))
    assert log_w.std(0).max() < tol * 10


@pytest.mark.parametrize("seed", range(3))
def test_elbo_below_iwae_below_likelihood(seed):
    model, x, log_p = linear_gaussian(seed, n=1, shift=0.4, stretch=1.3)
    bound = {}
    for k in (1, 4, 32):
        log_w, _ = log_weights(model, x, randn(k, 20_000, 2, seed=k, dtype=x.dtype))
        log_mean = log_w.logsumexp(0) - math.log(k)
        bound[k] = log_mean.mean().item(), log_mean.std().item() / 20_000**0.5
    rising = [bound[1], bound[4], bound[32], (log_p.item(), 0.0)]
    for (low, s), (high, t) in zip(rising, rising[1:]):
        assert high - low > 5 * (s**2 + t**2) ** 0.5
    rng = generator(seed)
    samples = torch.stack([elbo(model, x, k=200, generator=rng) for _ in range(100)])
    # The difference of two sampled means: root two more.
    assert_mean(samples, torch.tensor(bound[1][0], dtype=x.dtype), z=7)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("samples", [1, 2, 5, 11])
def test_a_cpu_decodes_what_its_cache_holds_and_the_weights_stay(samples, n, monkeypatch):
    model, x, _ = linear_gaussian(n=n, shift=0.3)
    sizes, likelihood = [], LinearGaussian.log_likelihood

    def note_size(self, x, z):
        """Note the number of samples."""
        sizes.append(len(z))
        return likelihood(self, x, z)

    eps, q = randn(samples, n, 2, seed=3), model.encoder(x)
    whole = log_weights(model, x, eps, q)
    monkeypatch.setattr(LinearGaussian, "log_likelihood", note_size)
    for fit, bytes in ((samples, 2**20), (2, 2 * n * 5 * 8), (1, n * 5 * 8), (1, 1)):
        monkeypatch.setattr("optgen.metrics.CACHED", bytes)
        sizes.clear()
        parts = log_weights_in_cache(model, x, eps, q)
        assert max(sizes) <= fit and sum(sizes) == samples
        assert len(sizes) == -(-samples // fit)
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_noise_of_an_estimate_does_not_depend_on_the_cache(monkeypatch):
    model, x, _ = linear_gaussian(n=30, shift=0.3)
    found = []
    for bytes in (1, 2**20):
        monkeypatch.setattr("optgen.metrics.CACHED", bytes)
        found.append(importance_nll(model, x, k=50, chunk=300, generator=generator(4)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_terms_add_up_and_agree_with_the_models():
    model, x = small_vae(), digits("test").images[:5] / 255
    eps = torch.randn(1, 5, 3, generator=generator(1))
    d, r = elbo_terms(model, x, eps[0])
    assert torch.allclose(rate(model, x), r)
    assert torch.allclose(distortion(model, x, generator=generator(1)), d)
    assert torch.allclose(elbo(model, x, generator=generator(1)), -d - r)
    found = importance_nll(model, x, k=1, generator=generator(1))
    assert torch.allclose(found.rate, r) and torch.allclose(found.distortion, d)
    assert torch.allclose(found.ess, torch.ones(5))


def test_eval_mode_restores_every_part():
    net, other = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())), nn.Dropout()
    net[1].eval()  # a frozen part
    modules = (*net.modules(), other)
    before = [m.training for m in modules]
    assert before == [True, True, False, False, True]
    with eval_mode(net, other):
        assert not any(m.training for m in modules)
    assert [m.training for m in modules] == before
    with pytest.raises(RuntimeError, match="inside"), eval_mode(net, other):
        raise RuntimeError("inside")
    assert [m.training for m in modules] == before


@pytest.mark.parametrize("build", [small_vae, small_conv_vae])
def test_evaluation_disturbs_nothing(build):
    model = build()
    model.q_net.append(nn.Dropout(0.5))
    model.q_net.eval()  # a part of the model that is frozen
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    data = digits("test").images[:60] / 255
    a = evaluate_vae(model, data.split(25), k=7, chunk=20, seed=3)
    b = evaluate_vae(model, Loader(digits("test"), 25, shuffle=False), k=1)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert not any(p.grad is not None for p in model.parameters())
    assert a == evaluate_vae(model, data.split(25), k=7, chunk=20, seed=3)
    assert a != evaluate_vae(model, data.split(25), k=7, chunk=20, seed=4)
    assert a["n"] == 60 and b["n"] == 2000 and a["k"] == 7
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in a.values())
    assert a["nll"] < -a["elbo"] and abs(a["bits_per_dim"] - a["nll"] / 784 / math.log(2)) < 1e-12


def test_modes_are_restored_after_a_failed_evaluation():
    model = small_vae()
    model.q_net.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="784 pixels"):
        evaluate_vae(model, [torch.rand(3, 5)], k=2)
    assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_active_units_do_not_depend_on_the_batches(size):
    scales = torch.tensor([1.0, 0.12, 0.08, 0.0])
    means = torch.randn(1000, 4, generator=generator()) * scales - 200
    variance = means.double().var(0, correction=0).float()
    assert torch.allclose(latent_variance(means.split(size)), variance, rtol=2e-3)
    assert active_units(means.split(size)) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "spoil", [{}, dict(shift=0.6), dict(stretch=2.0), dict(shift=-1.0, stretch=0.7)], ids=str
)
def test_information_of_the_linear_model(seed, spoil):
    model, x, _ = linear_gaussian(seed, n=4000, **spoil)
    s2 = 1 / model.precision.diagonal()
    t2 = model.stretch**2 * s2
    exact = ((1 - s2 + t2) / t2).log().sum() / 2
    kl_of_aggregate = (1 - s2 + t2 + model.shift**2 - 1 - (1 - s2 + t2).log()).sum() / 2
    rng = generator(seed)
    parts = [mutual_information(*model.encoder(part), generator=rng) for part in x.split(200)]
    found = torch.stack(parts)
    assert_mean(found + (2 * exact).expm1() / 400, exact)  # the bias is at most twice what is added
    # The rate, less the part of it that the aggregate posterior costs.
    assert_mean(rate(model, x) - kl_of_aggregate, exact)
    assert (found <= math.log(200)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread, log_var", [(1.0, -2.0), (30.0, -20.0), (0.1, 1.0), (1e-3, -8.0)])
def test_information_is_bounded_and_is_the_direct_formula(dtype, spread, log_var):
    mean = torch.randn(90, 3, generator=generator())
    mean = (spread * mean + 2 * spread).to(dtype)
    log_var = (log_var + torch.randn(90, 3, generator=generator(1))).to(dtype)
    m, v = mean.double() - mean.double().mean(0), log_var.double()
    z = m + (v / 2).exp() * randn(90, 3, seed=2)
    log_q = -((z[:, None] - m) ** 2 / v.exp() + v).sum(-1) / 2
    expected = math.log(90) + (log_q.diagonal() - log_q.logsumexp(1)).mean()
    for chunk in (1, 32, 90, 1000):
        found = mutual_information(mean, log_var, chunk=chunk, generator=generator(2))
        assert found <= math.log(90) and torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_information_does_not_depend_on_the_origin_or_the_unit():
    mean, log_var = randn(2, 80, 3)
    near, far = (
        mutual_information(mean + offset, log_var - 14, generator=generator(1))
        for offset in (0.0, 2.0**13)
    )
    assert abs(near - far) < 1e-9
    one, other = (
        mutual_information(unit * mean, log_var + 2 * math.log(unit), generator=generator(1))
        for unit in (1.0, 2.0**9)
    )
    assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("n, groups", [(2, 1), (100, 1), (100, 4), (64, 64), (1, 1)])
def test_information_of_groups(n, groups):
    """The groups are corners of a cube with sides of 20 standard deviations: far apart, and yet
    near enough that the rounding error, 1e-16 (z / sigma)^2 nats, stays below the tolerance. It is
    not zero, since a matrix product may round equal columns differently."""
    group = torch.arange(n)[:, None] % groups
    mean = 20 * ((group >> torch.arange(7)) % 2).float()
    found = mutual_information(mean, torch.zeros_like(mean), k=2, generator=generator())
    assert abs(found - math.log(groups)) < 1e-12


class Tokens(nn.Module):
    "Sequences of tokens, independent given one latent; the encoder is linear in their frequencies."

    def __init__(self, vocab=5, length=4):
        super().__init__()
        self.q, self.p = nn.Linear(vocab, 2), nn.Linear(1, length * vocab)
        self.length, self.z_dim = length, 1

    def encoder(self, x):
        "Return mean and log-variance of the latent."
        one_hot = nn.functional.one_hot(x, self.q.in_features).to(self.q.weight.dtype)
        return self.q(one_hot.mean(1)).split(1, 1)

    def log_likelihood(self, x, z):
        "Return the log-likelihood of the sequences given the latent."
        log_p = self.p(z).unflatten(-1, (self.length, -1)).log_softmax(-1)
        return log_p.gather(-1, x.expand(*z.shape[:-1], -1).unsqueeze(-1)).sum((-1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_of_integers_are_evaluated(dtype):
    model, x = Tokens().to(dtype), torch.randint(5, (300, 4))
    z = torch.linspace(-9, 9, 2001, dtype=dtype)[:, None, None].expand(-1, 300, 1)
    with torch.no_grad():
        log_joint = model.log_likelihood(x, z) - z[..., 0] ** 2 / 2
        density = log_joint.exp() / (2 * math.pi) ** 0.5
        exact = torch.trapezoid(density, z[..., 0], dim=0).log()
        mean, log_var = model.encoder(x)
        q = torch.distributions.Normal(mean[:, 0], (log_var[:, 0] / 2).exp())
        second_moment = density**2 / q.log_prob(z[..., 0]).exp()  # of the importance weights
        relative = torch.trapezoid(second_moment, z[..., 0], dim=0) / (2 * exact).exp() - 1
    error = (relative.sum() / 500).sqrt().item() / 300  # of the mean, by 500 samples an image
    found = evaluate_vae(model, x.split(70), k=500, information_images=100)
    assert importance_nll(model, x, k=2).nll.dtype == dtype
    assert abs(found["nll"] + exact.mean()) < 5 * error < 0.02
    assert found["nll_mc_se"] == pytest.approx(error, rel=0.1)
    assert found["bits_per_dim"] == pytest.approx(found["nll"] / 4 / math.log(2))
    assert found["mutual_information_ceiling"] == math.log(100)
    assert -0.1 < found["mutual_information"] < found["rate"]


def test_meta_device():
    with torch.device("meta"):
        model, x = small_vae(), torch.rand(6, 1, 28, 28)
    assert all(t.is_meta and t.shape == (6,) for t in importance_nll(model, x, k=5, chunk=4))
    assert elbo(model, x, k=3).is_meta and active_units([model.encoder(x)[0]]).is_meta
    assert mutual_information(*model.encoder(x)).is_meta


def check_device(device, dtype):
    "Assert that a device and a precision give the likelihood of float32 on the CPU."
    model, x = VAE(784, 32, 16, 3), (digits("test").images[:50] > 127).float()
    exact = importance_nll(model, x, k=200, generator=generator())
    model, x = model.to(device), x.to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        found = importance_nll(model, x, k=200, generator=generator(0, device))
        assert evaluate_vae(model, x.split(20), k=20)["n"] == 50
        mean, log_var = (t.detach() for t in model.encoder(x))
        information = mutual_information(mean, log_var, k=20, generator=generator(0, device))
    assert information.device == x.device and 0 < information <= math.log(50)
    assert all(t.dtype == torch.float32 and t.device == x.device for t in found)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert torch.allclose(found.nll.cpu(), exact.nll, rtol=rtol)


def test_bfloat16_autocast():
    check_device("cpu", torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    check_device("cuda", dtype)


@pytest.mark.cuda
def test_information_waits_for_no_device():
    mean, log_var = torch.randn(2, 1000, 50, generator=generator()).cuda()
    mutual_information(mean, log_var)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mutual_information(mean, log_var, k=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_calibration_by_hand():
    claimed = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2, dtype=torch.float64)
    found = measure_calibration(claimed, torch.tensor([0, 0, 0, 1, 0, 1]), bins=5)
    assert found.counts.tolist() == [0, 0, 0, 2, 4]
    assert found.accuracy[3:].tolist() == [0.5, 0.75] and found.accuracy[:3].isnan().all()
    assert torch.allclose(found.confidence[3:], torch.tensor([0.6, 0.9], dtype=torch.float64))
    assert found.ece.item() == pytest.approx((2 * 0.1 + 4 * 0.15) / 6)


def test_auroc_counts_pairs_and_halves_ties():
    inside, outside = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])
    assert auroc(inside, outside).item() == pytest.approx(4.5 / 6)


def test_wilson_interval_solves_its_equation():
    low, high = wilson_interval(90, 100, z=2.0)
    for p in (low, high):
        assert abs(0.9 - p) == pytest.approx(2.0 * math.sqrt(p * (1 - p) / 100))
    assert low < 0.9 < high


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, x: importance_nll(m, x, k=0), "k must be"),
        (lambda m, x: importance_nll(m, x, chunk=-1), "chunk must be"),
        (lambda m, x: importance_nll(m, x[:0]), "images must be"),
        (lambda m, x: importance_nll(m, x.where(x > x.min(), math.nan), k=2), "NaN"),
        (lambda m, x: evaluate_vae(m, []), "no batches"),
        (lambda m, x: mutual_information(x, x, k=0), "k must be"),
        (lambda m, x: mutual_information(x, x, chunk=0), "chunk must be"),
        (lambda m, x: mutual_information(x[:0], x[:0]), "images must be"),
        (lambda m, x: evaluate_vae(m, [x], k=2, information_images=0), "images must be"),
        (lambda m, x: bits_per_dim(1.0, 0), "dim must be"),
        (lambda m, x: active_units([]), "empty"),
        (lambda m, x: wilson_interval(0, 0), "n must be an integer, at least 1"),
        (lambda m, x: importance_nll(VAE(784, 4, 4, 2), x, k=2), "784 pixels"),
    ],
)
def test_bad_input_is_one_clear_error(call, word):
    model, x, _ = linear_gaussian()
    with pytest.raises(ValueError, match=word):
        call(model, x)
