"Metrics of the installed package, against a model whose likelihood is known and on the VAEs."

import math

import pytest
import torch
from conftest import rng

from optgen.data.images import digits
from optgen.data.loading import Loader
from optgen.data.toy import grid_centers, grid_mixture
from optgen.metrics import (
    active_units,
    bits_per_dim,
    distortion,
    elbo,
    evaluate_vae,
    feature_stats,
    fid,
    frechet_distance,
    frechet_floor,
    importance_nll,
    label_coverage,
    label_floor,
    latent_variance,
    log_weights,
    mode_coverage,
    mutual_information,
    rate,
)
from optgen.models.vae import VAE, ConvVAE, elbo_terms
from optgen.testing import LinearGaussian, assert_mean


def known(seed=0, n=100, dtype=torch.float64, **spoil):
    "A linear-Gaussian model with an exact posterior (unless spoilt), data from it, and log p(x)."
    W = torch.linalg.qr(torch.randn(5, 2, generator=rng(seed), dtype=dtype))[0] * torch.tensor(
        [0.6, 1.5], dtype=dtype
    )
    model = LinearGaussian(W, W[:, 1].sin(), sigma=0.8, **spoil)
    x = (
        torch.randn(n, 2, generator=rng(seed + 1), dtype=dtype) @ W.T
        + model.b
        + 0.8 * torch.randn(n, 5, generator=rng(seed + 2), dtype=dtype)
    )
    return model, x, model.marginal.log_prob(x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "spoil", [dict(shift=0.2), dict(stretch=1.3), dict(shift=-0.3, stretch=1.2)], ids=str
)
def test_nll_is_right_to_within_its_own_error(seed, spoil):
    model, x, log_p = known(seed, n=300, **spoil)
    found = importance_nll(model, x, k=2000, generator=rng(seed))
    z = (found.nll + log_p) / found.mc_se
    assert_mean(z, (found.mc_se / 2).mean())
    assert_mean((z - z.mean()) ** 2, 1.0)
    assert (found.mc_se < 0.1).all() and (1 < found.ess).all() and (found.ess <= 2000).all()


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_exact_posterior_has_no_variance(dtype, tol):
    model, x, log_p = known(3, dtype=dtype)
    found = importance_nll(model, x, k=50, generator=rng())
    assert (
        torch.allclose(found.nll, -log_p, rtol=tol)
        and found.mc_se.max() < 2e-3
        and found.nll.dtype == dtype
    )
    assert (
        log_weights(model, x, torch.randn(9, 100, 2, generator=rng(), dtype=dtype))[0].std(0).max()
        < tol * 10
    )


@pytest.mark.parametrize("seed", range(3))
def test_elbo_below_iwae_below_likelihood(seed):
    model, x, log_p = known(seed, n=1, shift=0.4, stretch=1.3)
    bound = {}
    for k in (1, 4, 32):
        log_w, _ = log_weights(model, x, torch.randn(k, 20_000, 2, generator=rng(k), dtype=x.dtype))
        log_mean = log_w.logsumexp(0) - math.log(k)
        bound[k] = log_mean.mean().item(), log_mean.std().item() / 20_000**0.5
    rising = [bound[1], bound[4], bound[32], (log_p.item(), 0.0)]
    for (low, s), (high, t) in zip(rising, rising[1:]):
        assert high - low > 5 * (s**2 + t**2) ** 0.5
    samples = torch.stack(
        [elbo(model, x, k=200, generator=g) for g in [rng(seed)] for _ in range(100)]
    )
    assert_mean(
        samples, torch.tensor(bound[1][0], dtype=x.dtype), z=7
    )  # two sampled means: root two more


def test_terms_add_up_and_agree_with_the_models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = VAE(784, 16, 16, 3), digits("test").images[:5] / 255
        eps = torch.randn(1, 5, 3, generator=rng(1))
        d, r = elbo_terms(model, x, eps[0])
    assert torch.allclose(rate(model, x), r) and torch.allclose(
        distortion(model, x, generator=rng(1)), d
    )
    assert torch.allclose(elbo(model, x, generator=rng(1)), -d - r)
    found = importance_nll(model, x, k=1, generator=rng(1))
    assert (
        torch.allclose(found.rate, r)
        and torch.allclose(found.distortion, d)
        and torch.allclose(found.ess, torch.ones(5))
    )


@pytest.mark.parametrize(
    "kind",
    [lambda: VAE(784, 16, 16, 3), lambda: ConvVAE((1, 28, 28), 3, width=2)],
    ids=["VAE", "ConvVAE"],
)
def test_evaluation_disturbs_nothing(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
        model.q_net.append(torch.nn.Dropout(0.5))
        model.q_net.eval()  # a part of the model that is frozen
        modes = [m.training for m in model.modules()]
        state = torch.get_rng_state()
        data = digits("test").images[:60] / 255
        a = evaluate_vae(model, data.split(25), k=7, chunk=20, seed=3)
        b = evaluate_vae(model, Loader(digits("test"), 25, shuffle=False), k=1)
        assert torch.equal(state, torch.get_rng_state()) and modes == [
            m.training for m in model.modules()
        ]
        assert not any(p.grad is not None for p in model.parameters())
        assert (
            a
            == evaluate_vae(model, data.split(25), k=7, chunk=20, seed=3)
            != evaluate_vae(model, data.split(25), k=7, chunk=20, seed=4)
        )
    assert (
        a["n"] == 60
        and b["n"] == 2000
        and a["k"] == 7
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in a.values())
    )
    assert a["nll"] < -a["elbo"] and abs(a["bits_per_dim"] - a["nll"] / 784 / math.log(2)) < 1e-12


@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_active_units_do_not_depend_on_the_batches(size):
    means = torch.randn(1000, 4, generator=rng()) * torch.tensor([1.0, 0.12, 0.08, 0.0]) - 200
    assert torch.allclose(
        latent_variance(means.split(size)), means.double().var(0, correction=0).float(), rtol=2e-3
    )
    assert active_units(means.split(size)) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "spoil", [{}, dict(shift=0.6), dict(stretch=2.0), dict(shift=-1.0, stretch=0.7)], ids=str
)
def test_information_of_the_linear_model(seed, spoil):
    model, x, _ = known(seed, n=4000, **spoil)
    s2 = 1 / model.precision.diagonal()
    t2 = model.stretch**2 * s2
    exact, kl_of_aggregate = (
        ((1 - s2 + t2) / t2).log().sum() / 2,
        (1 - s2 + t2 + model.shift**2 - 1 - (1 - s2 + t2).log()).sum() / 2,
    )
    found = torch.stack(
        [
            mutual_information(*model.encoder(part), generator=g)
            for g in [rng(seed)]
            for part in x.split(200)
        ]
    )
    assert_mean(found + (2 * exact).expm1() / 400, exact)  # the bias is at most twice what is added
    assert_mean(
        rate(model, x) - kl_of_aggregate, exact
    )  # the rate, less what it spends on the aggregate posterior
    assert (found <= math.log(200)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread, log_var", [(1.0, -2.0), (30.0, -20.0), (0.1, 1.0), (1e-3, -8.0)])
def test_information_is_bounded_and_is_the_direct_formula(dtype, spread, log_var):
    mean, log_var = (
        (spread * torch.randn(90, 3, generator=rng()) + 2 * spread).to(dtype),
        (log_var + torch.randn(90, 3, generator=rng(1))).to(dtype),
    )
    m, v = mean.double() - mean.double().mean(0), log_var.double()
    z = m + (v / 2).exp() * torch.randn(90, 3, generator=rng(2), dtype=torch.float64)
    log_q = -((z[:, None] - m) ** 2 / v.exp() + v).sum(-1) / 2
    want = math.log(90) + (log_q.diagonal() - log_q.logsumexp(1)).mean()
    for chunk in (1, 32, 90, 1000):
        found = mutual_information(mean, log_var, chunk=chunk, generator=rng(2))
        assert found <= math.log(90) and torch.allclose(found, want, rtol=1e-9, atol=1e-9)


def test_information_does_not_depend_on_the_origin():
    mean, log_var = torch.randn(2, 80, 3, generator=rng(), dtype=torch.float64)
    found = [
        mutual_information(mean + far, log_var - 14, generator=rng(1)) for far in (0.0, 2.0**13)
    ]
    assert abs(found[0] - found[1]) < 1e-9 and torch.allclose(
        *[
            mutual_information(2.0**far * mean, log_var + 2 * far * math.log(2), generator=rng(1))
            for far in (0, 9)
        ],
        rtol=1e-9,
    )


def test_information_of_groups():
    for n, K in ((2, 1), (100, 1), (100, 4), (64, 64), (1, 1)):
        mean = 1e3 * torch.arange(n)[:, None].remainder(K).float().expand(n, 7)
        assert (
            abs(
                mutual_information(mean, torch.zeros_like(mean), k=2, generator=rng()) - math.log(K)
            )
            < 1e-12
        )


class Tokens(torch.nn.Module):
    "Sequences of tokens, independent given one latent; the encoder is linear in how often each occurs."

    def __init__(self, vocab=5, length=4):
        super().__init__()
        self.q, self.p, self.length, self.z_dim = (
            torch.nn.Linear(vocab, 2),
            torch.nn.Linear(1, length * vocab),
            length,
            1,
        )

    def encoder(self, x):
        return self.q(
            torch.nn.functional.one_hot(x, self.q.in_features).to(self.q.weight.dtype).mean(1)
        ).split(1, 1)

    def log_likelihood(self, x, z):
        log_p = self.p(z).unflatten(-1, (self.length, -1)).log_softmax(-1)
        return log_p.gather(-1, x.expand(*z.shape[:-1], -1).unsqueeze(-1)).sum((-1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_of_integers_are_evaluated(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Tokens().to(dtype), torch.randint(5, (300, 4))
    z = torch.linspace(-9, 9, 2001, dtype=dtype)[:, None, None].expand(-1, 300, 1)
    with torch.no_grad():
        exact = torch.trapezoid(
            (model.log_likelihood(x, z) - z[..., 0] ** 2 / 2).exp() / (2 * math.pi) ** 0.5,
            z[..., 0],
            dim=0,
        ).log()
    found = evaluate_vae(model, x.split(70), k=500, information=100)
    assert (
        importance_nll(model, x, k=2).nll.dtype == dtype
        and abs(found["nll"] + exact.mean()) < 5 * found["nll_mc_se"] < 0.01
    )
    assert found["bits_per_dim"] == pytest.approx(found["nll"] / 4 / math.log(2)) and found[
        "mutual_information_ceiling"
    ] == math.log(100)
    assert -0.1 < found["mutual_information"] < found["rate"]


def test_meta_device():
    with torch.device("meta"):
        model, x = VAE(784, 16, 16, 3), torch.rand(6, 1, 28, 28)
    assert all(t.is_meta and t.shape == (6,) for t in importance_nll(model, x, k=5, chunk=4))
    assert (
        elbo(model, x, k=3).is_meta
        and active_units([model.encoder(x)[0]]).is_meta
        and mutual_information(*model.encoder(x)).is_meta
    )


def close_on(device, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = VAE(784, 32, 16, 3), (digits("test").images[:50] > 127).float()
    exact = importance_nll(model, x, k=200, generator=rng())
    model, x = model.to(device), x.to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        found = importance_nll(model, x, k=200, generator=torch.Generator(device).manual_seed(0))
        assert evaluate_vae(model, x.split(20), k=20)["n"] == 50
        information = mutual_information(
            *(t.detach() for t in model.encoder(x)),
            k=20,
            generator=torch.Generator(device).manual_seed(0),
        )
    assert information.device == x.device and 0 < information <= math.log(50)
    assert all(t.dtype == torch.float32 and t.device == x.device for t in found)
    assert torch.allclose(
        found.nll.cpu(), exact.nll, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3
    )


def test_bfloat16_autocast():
    close_on("cpu", torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    close_on("cuda", dtype)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, x: importance_nll(m, x, k=0), "k"),
        (lambda m, x: importance_nll(m, x, chunk=-1), "chunk"),
        (lambda m, x: importance_nll(m, x[:0]), "images"),
        (lambda m, x: importance_nll(m, x.where(x > x.min(), math.nan), k=2), "NaN"),
        (lambda m, x: evaluate_vae(m, []), "no batches"),
        (lambda m, x: mutual_information(x, x, k=0), "k"),
        (lambda m, x: mutual_information(x, x, chunk=0), "chunk"),
        (lambda m, x: mutual_information(x[:0], x[:0]), "images"),
        (lambda m, x: evaluate_vae(m, [x], k=2, information=0), "images"),
        (lambda m, x: bits_per_dim(1.0, 0), "dim"),
        (lambda m, x: active_units([]), "empty"),
        (lambda m, x: importance_nll(VAE(784, 4, 4, 2), x, k=2), "784 pixels"),
    ],
)
def test_bad_input_is_one_clear_error(call, word):
    model, x, _ = known()
    with pytest.raises(ValueError) as e:
        call(model, x)
    assert word in str(e.value)


def spread(d, seed, dtype=torch.float64, rank=None):
    W = torch.randn(d, rank or d, generator=rng(seed), dtype=torch.float64)
    return (W @ W.T / d).to(dtype)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-7), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rank", [8, 3])
def test_frechet_is_the_eigenvalues_of_the_product(dtype, tol, rank):
    a, b = spread(8, 0), spread(8, 1, rank=rank)
    m, n = torch.randn(2, 8, generator=rng(2), dtype=torch.float64)
    exact = (
        ((m - n) ** 2).sum()
        + a.trace()
        + b.trace()
        - 2 * torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    )
    found = frechet_distance(*(t.to(dtype) for t in (m, a, n, b)))
    assert found.dtype == dtype and torch.allclose(found.double(), exact, rtol=tol)


def test_distance_of_two_real_sets_is_their_floor():
    images = digits().images / 255
    project = torch.linalg.qr(torch.randn(784, 16, generator=rng()))[0]
    features = lambda x: x.flatten(1) @ project
    cov = feature_stats([images], features).cov
    distances = []
    for seed in range(12):
        p = torch.randperm(len(images), generator=rng(seed))
        distances.append(fid([images[p[:2000]]], images[p[2000:6000]].split(777), features))
    assert abs(sum(distances) / 12 / frechet_floor(cov, 2000, 4000) - 1) < 0.15


def test_coverage_counts_what_it_should():
    mu = grid_centers()
    x = grid_mixture(10_000, generator=rng())[0]
    found = mode_coverage(x, mu, 0.05)
    by_hand = ((x[:, None] - mu).norm(dim=2) <= 0.15).sum(0)
    assert (
        torch.equal(found.counts.long(), by_hand)
        and found.modes == 25
        and found.share.item() == pytest.approx(by_hand.sum().item() / 10_000)
    )
    assert mode_coverage(x[:, :1].expand(-1, 2) * 0 + 99, mu, 0.05).modes == 0


def test_labels_of_a_perfect_sampler():
    modes, kl = label_coverage(torch.randint(1000, (26_000,), generator=rng()), 1000)
    want, nats = label_floor(26_000, 1000)
    assert modes == round(want) == 1000 and abs(kl - nats) < 0.005


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: mode_coverage(torch.zeros(0, 2), torch.zeros(3, 2), 1.0), "0 samples"),
        (lambda: label_coverage(torch.tensor([5]), 5), "label 5"),
        (lambda: label_coverage(torch.tensor([], dtype=torch.int64), 5), "no labels"),
        (lambda: fid([torch.zeros(1, 2)], [torch.zeros(9, 2)]), "two images"),
        (lambda: feature_stats([torch.full((9, 2), math.nan)]), "not finite"),
    ],
)
def test_bad_samples_are_one_clear_error(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.cuda
def test_information_waits_for_no_device():
    mean, log_var = torch.randn(2, 1000, 50, generator=rng()).cuda()
    mutual_information(mean, log_var)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mutual_information(mean, log_var, k=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_sample_metrics_on_the_device():
    x = grid_mixture(5000, generator=rng())[0]
    here, there = (
        mode_coverage(x, grid_centers(), 0.05),
        mode_coverage(x.cuda(), grid_centers().cuda(), 0.05),
    )
    assert torch.equal(here.counts, there.counts.cpu()) and there.share.is_cuda
    assert fid([x.cuda()], [x.cuda() + 1]) == pytest.approx(fid([x], [x + 1]), rel=1e-5)
