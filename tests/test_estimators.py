"""Gradient estimators on real models: compiled, on other devices and dtypes, in a loop."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from optgen.estimators import ESTIMATORS, bound_loss, check_estimator
from optgen.metrics import log_weights
from optgen.models.vae import VAE, ConvVAE, elbo_terms
from optgen.testing import LinearGaussian, assert_mean, check_gradient, generator, randn

BUILD = {"VAE": lambda: VAE(784, 32, 16, 3), "ConvVAE": lambda: ConvVAE((1, 28, 28), 3, width=4)}
KINDS = [(name, False) for name in ESTIMATORS] + [("iwae", True), ("dreg", True)]
both = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
kinds = pytest.mark.parametrize("name, sampled", KINDS, ids=[n + "-one" * s for n, s in KINDS])


def batch(k=3, n=4, seed=0, dtype=torch.float32):
    """Return random images, and the noise of the samples and of the draw."""
    x = (torch.rand(n, 1, 28, 28, generator=generator(seed)) < 0.3).to(dtype)
    eps = randn(k, n, 3, seed=seed + 1, dtype=dtype)
    return x, eps, torch.rand(n, generator=generator(seed + 2), dtype=dtype)


def gradient(loss, model):
    """Return the gradient by all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@both
@pytest.mark.parametrize("seed", range(3))
def test_values_are_the_bounds(build, seed):
    model = build().double()
    x, eps, u = batch(seed=seed, dtype=torch.float64)
    mean, log_var = model.encoder(x)
    q, p = Normal(mean, (log_var / 2).exp()), Normal(torch.zeros_like(mean), 1.0)
    log_lik = model.log_likelihood(x, q.loc + q.scale * eps)
    log_ratio = q.log_prob(q.loc + q.scale * eps) - p.log_prob(q.loc + q.scale * eps)
    beta = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    log_w = log_lik - (beta * log_ratio).sum(-1)
    shift = 0 if log_w.min() > -700 else log_w.max(0).values
    iwae = -(log_w - shift).exp().mean(0).log() - shift
    elbo = (beta * kl_divergence(q, p)).sum(-1) - log_lik.mean(0)
    expected = {"elbo": elbo, "stl": -log_w.mean(0), "iwae": iwae, "dreg": iwae}
    for name, sampled in KINDS:
        loss = bound_loss(model, x, eps, name, beta, sampled=sampled, u=u)
        assert torch.allclose(loss, expected[name], rtol=1e-12)


@both
def test_reduces_to_its_parents(build):
    model = build().double()
    x, eps, _ = batch(k=1, dtype=torch.float64)
    distortion, rate = elbo_terms(model, x, eps[0])
    loss, expected = bound_loss(model, x, eps, beta=0.7), distortion + 0.7 * rate
    assert torch.allclose(loss, expected, rtol=1e-12)
    found, true = gradient(loss.sum(), model), gradient(expected.sum(), model)
    assert torch.allclose(found, true, rtol=1e-9, atol=1e-12)
    loss, expected = bound_loss(model, x, eps, "iwae"), -log_weights(model, x, eps)[0][0]
    assert torch.allclose(loss, expected, rtol=1e-12)
    found, true = gradient(loss.sum(), model), gradient(expected.sum(), model)
    assert torch.allclose(found, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["elbo", "iwae"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_gradient_is_that_of_the_value(name, beta):
    model = VAE(6, 5, 4, 2).double()
    x, eps = (torch.rand(3, 6, generator=generator()) < 0.5).double(), randn(4, 3, 2, seed=1)
    check_gradient(lambda: bound_loss(model, x, eps, name, beta).sum(), model.parameters())


@pytest.mark.parametrize("beta", [0.4, 1.0, 2.0])
def test_estimators_of_one_bound_share_a_mean(beta):
    # STL with the ELBO; DReG, and one of k, with IWAE. Differences of gradients by the same noise
    # have mean zero.
    model = VAE(6, 5, 4, 2).double()
    for p in model.parameters():
        p.data.mul_(2)
    x, g = (torch.rand(3, 6, generator=generator()) < 0.5).double().repeat(8, 1), generator(1)
    diffs = {kind: [] for kind in KINDS if kind not in [("elbo", False), ("iwae", False)]}
    for _ in range(200):
        eps = torch.randn(3, 24, 2, generator=g, dtype=torch.float64)
        u = torch.rand(24, generator=g, dtype=torch.float64)
        found = {}
        for name, sampled in KINDS:
            loss = bound_loss(model, x, eps, name, beta, sampled=sampled, u=u).mean()
            found[name, sampled] = gradient(loss, model)
        for kind in diffs:
            diffs[kind].append(found[kind] - found["elbo" if kind[0] == "stl" else "iwae", False])
    for kind, d in diffs.items():
        d = torch.stack(d)
        d = d[:, d.std(0) > 1e-10]  # where nothing is drawn, the decoder's are equal
        assert d.shape[1] and assert_mean(d, 0.0)


def test_noise_of_stl_and_dreg_vanishes_at_the_posterior():
    W = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    model = LinearGaussian(W, torch.zeros(3, dtype=torch.float64), 0.7)
    x, eps = randn(5, 3), randn(4, 5, 2, seed=1)
    for name, sampled in KINDS:
        q = [t.clone().requires_grad_() for t in model.encoder(x)]
        loss = bound_loss(model, x, eps, name, q=q, sampled=sampled)
        size = max(g.abs().max() for g in torch.autograd.grad(loss.sum(), q))
        assert (size < 1e-12) == (name in ("stl", "dreg"))
        assert torch.allclose(loss, -model.marginal.log_prob(x), rtol=1e-12) == (name != "elbo")


@kinds
def test_controller_is_called_once_and_its_weight_is_differentiable(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    weight, calls = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0])), []

    def beta(distortion, rate):
        """Record the call and return the weight."""
        assert distortion.shape == (4,) and not distortion.requires_grad
        assert rate.shape == (4, 3) and not rate.requires_grad
        calls.append(1)
        return weight

    bound_loss(model, x, eps, name, beta, sampled=sampled, u=u).sum().backward()
    assert len(calls) == 1
    assert weight.grad.isfinite().all() and (weight.grad != 0).all()


@kinds
def test_loss_is_a_function_of_parameters_and_noise(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    state = torch.get_rng_state()
    losses = [bound_loss(model, x, eps, name, sampled=sampled, u=u).sum() for _ in range(2)]
    assert torch.equal(*[gradient(loss, model) for loss in losses])
    assert torch.equal(state, torch.get_rng_state())


def test_a_drawn_index_is_torchs_own_without_u():
    model, (x, eps, _) = BUILD["VAE"](), batch()
    x, eps = x.repeat(20, 1, 1, 1), torch.randn(3, 80, 3)

    def drawn_gradient(seed):
        """Return the gradient with the draw of torch's own generator at a seed."""
        torch.manual_seed(seed)
        return gradient(bound_loss(model, x, eps, "iwae", beta=0.0, sampled=True).sum(), model)

    assert torch.equal(drawn_gradient(1), drawn_gradient(1))
    assert not torch.equal(drawn_gradient(1), drawn_gradient(2))


@kinds
def test_no_grad_gives_the_value(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    with torch.no_grad():
        loss = bound_loss(model, x, eps, name, sampled=sampled, u=u)
    assert not loss.requires_grad
    assert torch.allclose(loss, bound_loss(model, x, eps, name, sampled=sampled, u=u))


@kinds
def test_frozen_decoder_and_frozen_encoder(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    for net, other in ((model.q_net, model.p_net), (model.p_net, model.q_net)):
        bound_loss(model, x, eps, name, sampled=sampled, u=u).sum().backward()
        full = [p.grad.clone() for p in net.parameters()]
        model.zero_grad()
        other.requires_grad_(False)
        bound_loss(model, x, eps, name, sampled=sampled, u=u).sum().backward()
        for p, g in zip(net.parameters(), full):
            assert torch.allclose(p.grad, g, rtol=1e-5, atol=1e-7)
        model.zero_grad()
        other.requires_grad_(True)


@both
@kinds
def test_meta_device(build, name, sampled):
    with torch.device("meta"):
        model, x, eps = build(), torch.rand(4, 1, 28, 28), torch.randn(3, 4, 3)
    loss = bound_loss(model, x, eps, name, sampled=sampled)
    loss.sum().backward()
    assert loss.is_meta and loss.shape == (4,) and all(p.grad.is_meta for p in model.parameters())


@kinds
def test_compiles_as_one_graph(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    torch.compiler.reset()
    compiled = torch.compile(bound_loss, fullgraph=True, backend="aot_eager")
    for beta in (0.5, lambda distortion, rate: rate.mean(0).tanh()):
        a, b = (f(model, x, eps, name, beta, sampled=sampled, u=u) for f in (compiled, bound_loss))
        assert torch.allclose(a, b, rtol=1e-5)
        found, true = gradient(a.sum(), model), gradient(b.sum(), model)
        assert torch.allclose(found, true, rtol=1e-3, atol=1e-4)


def test_a_changing_number_is_not_compiled_anew():
    model, (x, eps, _) = BUILD["VAE"](), batch()
    torch.compiler.reset()
    # It raises where it would be compiled more than eight times.
    compiled = torch.compile(bound_loss, fullgraph=True, backend="eager")
    for i in range(12):
        a, b = (f(model, x, eps, "iwae", 0.3 + i / 10) for f in (compiled, bound_loss))
        assert torch.allclose(a, b, rtol=1e-5)


def assert_same_on(model, name, sampled, device, dtype):
    """Assert that a loss on a device, under autocast to `dtype`, is that of the CPU in float32."""
    x, eps, u = batch()
    exact = bound_loss(model, x, eps, name, sampled=sampled, u=u).detach()
    model, x, eps, u = model.to(device), x.to(device), eps.to(device), u.to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        loss = bound_loss(model, x, eps, name, sampled=sampled, u=u)
    loss.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.device == x.device for p in model.parameters())
    assert loss.device == x.device and loss.dtype == torch.float32
    rtol = 5e-2 if dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(exact, loss.detach().cpu(), rtol=rtol, atol=1e-3)


@both
@kinds
def test_bfloat16_autocast(build, name, sampled):
    assert_same_on(build(), name, sampled, "cpu", torch.bfloat16)


@both
@kinds
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_without_a_sync(build, name, sampled, dtype):
    assert_same_on(build(), name, sampled, "cuda", dtype)
    model, (x, eps, u) = build().cuda(), (t.cuda() for t in batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        bound_loss(model, x, eps, name, sampled=sampled, u=u).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kinds
def test_descends(name, sampled):
    model, (x, _, _), g = VAE(784, 32, 16, 3), batch(n=16), generator(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        eps, u = torch.randn(4, 16, 3, generator=g), torch.rand(16, generator=g)
        loss = bound_loss(model, x, eps, name, sampled=sampled, u=u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 784 * math.log(2) - 40


@kinds
def test_a_nan_is_not_hidden(name, sampled):
    model, (x, eps, u) = BUILD["VAE"](), batch()
    x[1] = math.nan
    loss = bound_loss(model, x, eps, name, sampled=sampled, u=u)
    assert loss[1].isnan() and loss[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_the_only_possible_sample_is_drawn(place, u):
    class Positive:
        """Model whose samples with a negative sum are impossible."""

        def log_likelihood(self, x, z):
            """Return the sum of z, or -inf."""
            return z.sum(-1).masked_fill(z.sum(-1) < 0, -math.inf)

    eps = torch.full((3, 5, 2), -1.0)
    eps[place] = 1.0
    q = torch.zeros(5, 2, requires_grad=True), torch.zeros(5, 2)
    for name in ("iwae", "dreg"):
        x, every_u = torch.zeros(5, 1), torch.full((5,), u)
        loss = bound_loss(Positive(), x, eps, name, q=q, sampled=True, u=every_u)
        assert torch.allclose(loss, torch.tensor(math.log(3) - 2.0))
        assert torch.autograd.grad(loss.sum(), q[0])[0].isfinite().all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, x, e: check_estimator("IWAE"), "'elbo', 'stl', 'iwae', 'dreg'; got 'IWAE'"),
        (lambda m, x, e: check_estimator("iwae", True), "k must be an integer"),
        (lambda m, x, e: check_estimator("elbo", 5, sampled=True), "no weights to draw"),
        (lambda m, x, e: bound_loss(m, x, e[:0]), "at least 1; got 0"),
        (lambda m, x, e: bound_loss(m, x, e[..., :2]), "(k, 4, 3), got (3, 4, 2)"),
        (lambda m, x, e: bound_loss(m, x, e, beta=math.nan), "beta must be a finite number"),
        (lambda m, x, e: bound_loss(m, x, e, beta=lambda d, r: -1), "beta must be a finite number"),
        (
            lambda m, x, e: bound_loss(m, x, e, beta=torch.ones(4, 3)),
            "for each of 3 latents; got shape (4, 3)",
        ),
        (
            lambda m, x, e: bound_loss(m, x, e, "dreg", sampled=True, u=torch.rand(3)),
            "each of 4 images",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, words):
    x, eps, _ = batch()
    with pytest.raises(ValueError) as e:
        call(BUILD["VAE"](), x, eps)
    assert words in str(e.value)
