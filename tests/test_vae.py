"""The VAE of the installed package: the article's listing, both losses, shapes, devices, dtypes."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor
from torchvision.transforms.functional import to_pil_image

from optgen.data.images import digits
from optgen.models.vae import (
    VAE,
    ConvVAE,
    GaussianVAE,
    bernoulli_log_likelihood,
    elbo_terms,
    gaussian_kl,
    vae_loss,
)
from optgen.testing import check_gradient, generator, raises, randn

BUILD = {"VAE": lambda: VAE(784, 32, 16, 3), "ConvVAE": lambda: ConvVAE((1, 28, 28), 3, width=4)}
both = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
MORE = {
    **BUILD,
    "tanh": lambda: VAE(784, 32, 16, 3, activation=torch.nn.Tanh),
    "GaussianVAE": lambda: GaussianVAE(784, 32, 16, 3),
}
every = pytest.mark.parametrize("build", MORE.values(), ids=MORE.keys())


class PILDigits(torch.utils.data.Dataset):
    """The embedded digits as torchvision's MNIST gives them: PIL image, transform, label."""

    def __init__(self, n, transform):
        self.data = digits("train")
        self.n = n
        self.transform = transform

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.transform(to_pil_image(self.data.images[i])), int(self.data.labels[i])


@pytest.mark.parametrize("flat", [True, False])
def test_the_articles_listing_runs_unchanged(flat):
    x_dim, h_dim1, h_dim2, z_dim, kl_weight = 784, 512, 256, 2, 1.0
    vae = VAE(x_dim, h_dim1, h_dim2, z_dim)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    train_loader = DataLoader(PILDigits(2000, ToTensor()), batch_size=100, shuffle=True)
    losses = []
    for epoch in range(2):
        for x, _ in train_loader:
            if flat:
                x = x.view(-1, x_dim)
            optimizer.zero_grad()
            x_recon, mean, log_var = vae(x)
            loss = vae_loss(x, x_recon, mean, log_var, kl_weight)
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / len(x))
    assert abs(losses[0] - 784 * math.log(2)) < 5 and sum(losses[-5:]) / 5 < 260
    with torch.no_grad():
        z = vae.reparameterize(*vae.encoder(x))
        assert z.shape == (100, 2) and vae.decoder(torch.randn(16, z_dim)).shape == (16, 784)


@both
@pytest.mark.parametrize("seed", range(3))
def test_both_losses_agree_in_float64_where_both_are_finite(build, seed):
    model = build().double()
    x = torch.rand(4, 1, 28, 28, generator=generator(seed), dtype=torch.float64)
    eps = torch.randn(4, 3, generator=generator(seed), dtype=torch.float64)
    mean, log_var = model.encoder(x)
    article = vae_loss(
        x, model.decoder(model.reparameterize(mean, log_var, eps)), mean, log_var, kl_weight=0.7
    )
    distortion, rate = elbo_terms(model, x, eps)
    ours = (distortion + 0.7 * rate).sum()
    assert torch.allclose(article, ours, rtol=1e-12)
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(loss, parameters) for loss in (article, ours))
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


@every
def test_reparameterized_noise_is_the_encoders_gaussian(build):
    mean, log_var, eps = (
        torch.randn(4, 3, generator=generator(i), dtype=torch.float64) for i in range(3)
    )
    z = build().reparameterize(mean, log_var, eps)
    assert torch.allclose(
        Normal(mean, (log_var / 2).exp()).cdf(z), torch.special.ndtr(eps), rtol=1e-9
    )
    assert torch.equal(build().reparameterize(mean, log_var, torch.stack([eps, -eps]))[0], z)


def test_saturated_pixels_keep_loss_and_gradient():
    logits = torch.tensor([[40.0, 200.0, -200.0]], requires_grad=True)
    x = torch.tensor([[0.0, 0.0, 1.0]])
    loss = -bernoulli_log_likelihood(x, logits).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(loss, torch.tensor(440.0))
    assert torch.equal(slope, torch.tensor([[1.0, 1.0, -1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_forms(dtype):
    mean = torch.randn(50, 4, generator=generator(1), dtype=dtype)
    log_var = torch.randn(50, 4, generator=generator(2), dtype=dtype)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    known = kl_divergence(Normal(mean, (log_var / 2).exp()), prior)
    assert torch.allclose(gaussian_kl(mean, log_var), known, rtol=1e-5, atol=1e-6)
    logits = 6 * torch.randn(5, 7, 3, 2, generator=generator(3), dtype=dtype)
    x = (torch.rand(7, 3, 2, generator=generator(4)) < 0.5).to(dtype)
    known = Bernoulli(logits=logits).log_prob(x).sum((-1, -2))
    found = bernoulli_log_likelihood(x, logits)
    assert torch.allclose(found, known, rtol=1e-5)
    # Pixels may be stored as booleans.
    assert torch.allclose(bernoulli_log_likelihood(x.bool(), logits), found)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_bound(seed):
    torch.manual_seed(seed)
    model = VAE(6, 5, 4, 2).double()
    x, eps = torch.rand(3, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    check_gradient(lambda: sum(t.sum() for t in elbo_terms(model, x, eps)), model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [1.0, 0.02, 7.0])
def test_gaussian_decoder_is_torchs(dtype, variance):
    model = GaussianVAE(12, 5, 4, 2).to(dtype)
    assert model.variance == 1
    assert model.variance.dtype == dtype
    assert "variance" in model.state_dict()
    model.variance.fill_(variance)
    x, z = torch.rand(7, 3, 4, dtype=dtype), torch.randn(5, 7, 2, dtype=dtype)
    known = Normal(model.decoder(z).double(), variance**0.5).log_prob(x.double().flatten(1)).sum(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(model.log_likelihood(x, z).double(), known, rtol=tolerance)
    assert model.log_likelihood(x.double(), z).dtype == torch.float64
    if dtype == torch.float64:
        check_gradient(lambda: sum(t.sum() for t in elbo_terms(model, x, z[0])), model.parameters())


@pytest.mark.parametrize(
    "kind, more",
    [
        (VAE, dict(activation=torch.nn.Tanh)),
        (GaussianVAE, {}),
        (GaussianVAE, dict(activation=torch.nn.Tanh)),
    ],
)
def test_relatives_start_from_the_same_weights(kind, more):
    def build(kind, **more):
        """Return a model and the state of the random numbers after it."""
        torch.manual_seed(3)
        return kind(20, 8, 6, 2, torch.full((20,), 0.2), **more), torch.get_rng_state()

    (a, s), (b, t) = build(VAE), build(kind, **more)
    assert torch.equal(s, t) and all(map(torch.equal, a.parameters(), b.parameters()))
    assert sum(isinstance(m, torch.nn.Tanh) for m in b.modules()) == (4 if more else 0)
    hidden = b.p_net[0](torch.ones(1, 2))
    activation = torch.tanh if more else torch.relu
    assert torch.equal(b.p_net[1](hidden), activation(hidden))


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 32, 32), (1, 4, 4), (2, 5, 7), (4, 11, 30), (1, 64, 48)]
)
def test_conv_gives_back_the_size_it_got(shape):
    model, x = ConvVAE(shape, 3, width=4), torch.rand(2, *shape)
    x_recon, mean, log_var = model(x)
    assert x_recon.shape == x.shape and mean.shape == log_var.shape == (2, 3)
    assert model.logits(torch.randn(5, 2, 3)).shape == (5, 2, *shape)
    assert model.log_likelihood(x, torch.randn(5, 2, 3)).shape == (5, 2)


@every
def test_noise_can_be_drawn_first(build):
    model, x = build(), torch.rand(4, 1, 28, 28)
    eps = torch.randn(4, 3)
    state = torch.get_rng_state()
    a, b = elbo_terms(model, x, eps), elbo_terms(model, x.flatten(1), eps)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, a, b))


@every
def test_meta_device_and_whole_graph(build):
    with torch.device("meta"):
        model, x = build(), torch.rand(3, 1, 28, 28)
    assert all(t.is_meta and t.shape == (3,) for t in elbo_terms(model, x))
    model, x, eps = build(), torch.rand(3, 1, 28, 28), torch.randn(3, 3)
    # The compiler refuses a graph that depends on a value.
    compiled = torch.compile(elbo_terms, fullgraph=True, backend="eager")
    assert all(map(torch.allclose, compiled(model, x, eps), elbo_terms(model, x, eps)))


def check_same_on(model, x, eps, device, dtype):
    """Assert that the terms on a device and under autocast are those on the CPU in float32."""
    exact = [t.detach() for t in elbo_terms(model, x, eps)]
    model, x, eps = model.to(device), x.to(device), eps.to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        found = elbo_terms(model, x, eps)
    sum(t.sum() for t in found).backward()
    assert all(p.grad.isfinite().all() and p.grad.device == x.device for p in model.parameters())
    for a, b in zip(exact, found):
        assert b.device == x.device and b.dtype == torch.float32
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(a, b.detach().cpu(), rtol=tolerance, atol=1e-3)


@every
def test_bfloat16_autocast(build):
    model, x, eps = build(), (torch.rand(4, 1, 28, 28) < 0.3).float(), torch.randn(4, 3)
    check_same_on(model, x, eps, "cpu", torch.bfloat16)


@every
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(build, dtype):
    model, x, eps = build(), (torch.rand(4, 1, 28, 28) < 0.3).float(), torch.randn(4, 3)
    check_same_on(model, x, eps, "cuda", dtype)


@every
def test_state_dict_round_trip(build):
    a, b, x, eps = build(), build(), torch.rand(2, 784), torch.randn(2, 3)
    b.load_state_dict(a.state_dict())
    assert all(map(torch.equal, elbo_terms(a, x, eps), elbo_terms(b, x, eps)))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: VAE(784, 0, 2, 2), "h_dim1"),
        (lambda: VAE(784, 2, 2, -1), "z_dim"),
        (lambda: ConvVAE((1, 3, 9), 2), "4 x 4"),
        (lambda: ConvVAE((1, 9, 9), 0), "z_dim"),
        (lambda: VAE(784, 2, 2, 2)(torch.rand(2, 783)), "784 pixels"),
        (lambda: ConvVAE((3, 8, 8), 2)(torch.rand(3, 8, 8)), "192 pixels"),
        (lambda: elbo_terms(VAE(4, 2, 2, 2), torch.rand(3, 4), torch.randn(3, 1)), "noise"),
        (
            lambda: vae_loss(
                torch.rand(3, 4), torch.rand(2, 4), torch.zeros(2, 1), torch.zeros(2, 1)
            ),
            "(2, 4)",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, word):
    with raises(ValueError, word):
        call()


def test_the_articles_loss_has_its_kl_weight_and_the_decoder_starts_at_the_mean_image():
    x, recon = torch.rand(2, 3, 6, generator=generator(1), dtype=torch.float64)
    mean, log_var = randn(2, 3, 2, seed=2)
    q = Normal(mean, (log_var / 2).exp())
    kl = kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum()
    bits = -(x * recon.log() + (1 - x) * (1 - recon).log()).sum()
    torch.testing.assert_close(vae_loss(x, recon, mean, log_var, 0.3), bits + 0.3 * kl)
    average = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.7, 0.4])
    model = VAE(6, 5, 4, 2, x_mean=average, activation=torch.nn.Tanh)
    for p in list(model.p_net.parameters())[:-1]:
        torch.nn.init.zeros_(p)
    torch.testing.assert_close(model.decoder(torch.randn(3, 2)), average.expand(3, 6))
    kinds = [type(m) for net in (model.q_net, model.p_net) for m in net]
    assert kinds.count(torch.nn.Tanh) == 4 and torch.nn.ReLU not in kinds


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7)])
def test_a_convolutional_vae_has_the_width_that_is_asked_for(shape):
    model = ConvVAE(shape, 2, width=3)
    channels = [m.out_channels for m in model.modules() if hasattr(m, "out_channels")]
    assert channels == [3, 6, 3, shape[0]]
    x = torch.rand(2, *shape, generator=generator(1)).round()
    z = torch.randn(4, 2, 2, generator=generator(2))
    one_by_one = [
        Bernoulli(logits=model.p_net(z[i, j][None])).log_prob(x[j][None]).sum()
        for i, j in itertools.product(range(4), range(2))
    ]
    expected = torch.stack(one_by_one).view(4, 2)
    torch.testing.assert_close(model.log_likelihood(x, z), expected)


@pytest.mark.parametrize("seed", [1, 2])
def test_draws_have_the_noise_of_the_decoder(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bernoulli, gaussian = VAE(5, 8, 8, 2), GaussianVAE(5, 8, 8, 2, out="linear")
    gaussian.variance.fill_(0.25)
    z, n = torch.randn(1, 2, generator=generator(seed)).expand(20_000, 2), 20_000
    for model in (bernoulli, gaussian):
        mean = model.decoder(z[:1])[0].detach()
        variance = mean * (1 - mean) if model is bernoulli else torch.full_like(mean, 0.25)
        x = model.draw(z, generator(seed + 10)).detach()
        assert ((x.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
        assert torch.allclose(x.var(0), variance, atol=0.02)
        assert torch.equal(x, model.draw(z, generator(seed + 10)))
    assert set(bernoulli.draw(z, generator(3)).unique().tolist()) == {0.0, 1.0}
