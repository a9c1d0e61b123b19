"""The autoregressive VAEs of the installed package: order, draws, gradients, devices, collapse."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli, Categorical
from torch.nn.functional import linear

from optgen.data.images import digits
from optgen.games import Game, Player
from optgen.metrics import evaluate_vae, importance_nll
from optgen.models.autoregressive import AutoregressiveVAE, SequenceVAE, causal_window, lstm_step
from optgen.models.vae import VAE, elbo_terms
from optgen.testing import assert_mean, check_gradient, generator, jacobian, raises


def images(n, shape=(1, 8, 8)):
    """Return n random binary images."""
    return (torch.rand(n, *shape, generator=generator(n)) < 0.3).float()


def tokens(n, vocab=30, length=6):
    """Return n random sequences."""
    return torch.randint(vocab, (n, length), generator=generator(n))


BUILD = {
    "image": (lambda: AutoregressiveVAE((1, 8, 8), 3, hidden=20), images),
    "sequence": (lambda: SequenceVAE(30, 6, 3), tokens),
}
TINY = {
    "image": (
        lambda: AutoregressiveVAE((1, 2, 3), 2, hidden=5, width=6, radius=2, x_mean=torch.rand(6)),
        torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64),
    ),
    "sequence": (
        lambda: SequenceVAE(4, 3, 2, 5, 4),
        torch.tensor(list(itertools.product(range(4), repeat=3))),
    ),
}
both, tiny = (pytest.mark.parametrize("build, x", d.values(), ids=d.keys()) for d in (BUILD, TINY))


def far(model, scale=1.7):
    """Return the model in float64, its weights scaled so that z matters."""
    for p in model.double().parameters():
        p.data.mul_(scale)
    return model


@pytest.mark.parametrize("radius", [1, 3, 9])
def test_a_pixel_sees_its_window_and_nothing_else(radius):
    H, W = 6, 5
    model = far(AutoregressiveVAE((1, H, W), 2, hidden=8, width=64, radius=radius))
    x = torch.rand(1, H * W, dtype=torch.float64, requires_grad=True)
    J = jacobian(model.logits(x, torch.randn(1, 2, dtype=torch.float64)), x)
    i, j = torch.meshgrid(torch.arange(H * W), torch.arange(H * W), indexing="ij")
    near = (i // W - j // W <= radius) & ((i % W - j % W).abs() <= radius)
    seen = (j < i) & near
    assert torch.equal(J != 0, seen) and (J[1:] != 0).any(1).all()
    assert causal_window(x.view(1, H, W), radius).shape == (2 * radius * (radius + 1), 1, H * W)


def test_a_token_sees_all_earlier_ones():
    model, z = far(SequenceVAE(5, 7, 2, 4, 6)), torch.randn(1, 2, dtype=torch.float64)
    x = tokens(1, 5, 7)
    for j in range(7):
        other = x.clone()
        other[0, j] = (other[0, j] + 1) % 5
        moved = (model.logits(other, z) != model.logits(x, z)).any(-1)[0]
        assert not moved[: j + 1].any() and moved[j + 1 :].all()


@tiny
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_sum_to_one_and_draws_follow_them(build, x, seed):
    torch.manual_seed(seed)
    model, n = far(build()), 20_000
    z = torch.randn(2, 1, 2, generator=generator(seed), dtype=torch.float64)
    p = model.log_likelihood(x, z.expand(2, 64, 2)).exp()
    assert (p.sum(1) - 1).abs().max() < 1e-12 and (p[0] - p[1]).abs().max() > 1e-5
    drawn = model.decoder(z[1].expand(n, 2), generator=generator(seed)).flatten(1)
    hit = (drawn[:, None] == x).all(-1).double()
    assert (hit.sum(1) == 1).all()
    assert_mean(hit[:, p[1] > 1e-3], p[1][p[1] > 1e-3])
    chi2 = ((hit.sum(0) - n * p[1]) ** 2 / (n * p[1])).sum()
    assert abs(chi2 - 63) < 5 * (126 + (1 / p[1]).sum() / n) ** 0.5


@tiny
def test_draws_at_several_z_follow_each(build, x):
    model, z = far(build()), torch.randn(3, 2, dtype=torch.float64)
    drawn = model.decoder(z.expand(4000, 3, 2), generator=generator(1))
    assert drawn.shape[:2] == (4000, 3)
    assert drawn.dtype == x.dtype
    p = model.log_likelihood(x, z[:, None].expand(3, 64, 2)).exp()
    assert_mean(drawn.flatten(2).double(), p @ x.double())


def test_the_recurrence_is_torchs():
    a, c, h = (torch.randn(5, n, generator=generator(n), dtype=torch.float64) for n in (24, 6, 7))
    cell = torch.nn.LSTMCell(7, 6).double()
    gates = linear(h, cell.weight_ih, cell.bias_ih) + linear(c, cell.weight_hh, cell.bias_hh)
    i, f, g, o = gates.chunk(4, -1)
    ours = lstm_step(torch.cat([i, f, o, g], -1), a[:, :6])
    for found, known in zip(ours, cell(h, (c, a[:, :6]))):
        assert torch.allclose(found, known, rtol=1e-12)


def torch_gate_order(w):
    """Return the rows of a matrix, ordered i, f, o, g, in PyTorch's order i, f, g, o."""
    return torch.cat([w.chunk(4)[k] for k in (0, 1, 3, 2)])


def run_torch_lstm(inputs, net, weight, start):
    """Return what PyTorch's LSTM of 6 units computes with the weights of a network."""
    lstm = torch.nn.LSTM(weight.shape[1], 6, batch_first=True).double()
    weights = {
        "weight_ih_l0": torch_gate_order(weight),
        "weight_hh_l0": torch_gate_order(net.state.weight),
        "bias_ih_l0": torch_gate_order(net.token.bias),
        "bias_hh_l0": torch.zeros(24),
    }
    lstm.load_state_dict(weights)
    return lstm(inputs, start)


def test_encoder_and_decoder_are_torchs_lstm():
    model, x = far(SequenceVAE(11, 5, 3, 4, 6), 1.3), tokens(7, 11, 5)
    z = torch.randn(7, 3, dtype=torch.float64)
    q, p, zero = model.q_net, model.p_net, torch.zeros(1, 7, 6, dtype=torch.float64)
    last = run_torch_lstm(q.embed(x), q, q.token.weight, (zero, zero))[1][0][0]
    for found, known in zip(model.encoder(x), q.out(last).chunk(2, -1)):
        assert torch.allclose(found, known, rtol=1e-12)

    c, previous = p.start(z)[None], torch.cat([torch.full((7, 1), 11), x[:, :-1]], 1)
    inputs = torch.cat([p.embed(previous), z[:, None].expand(-1, 5, -1)], -1)
    weight = torch.cat([p.token.weight, p.latent.weight], 1)
    h, _ = run_torch_lstm(inputs, p, weight, (c.tanh(), c))
    known = Categorical(logits=p.out(h) + p.direct(z)[:, None]).log_prob(x).sum(-1)
    assert torch.allclose(model.log_likelihood(x, z), known, rtol=1e-12)


@tiny
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_bound(build, x, seed):
    torch.manual_seed(seed)
    model = far(build(), 1.3)
    x = x[torch.randperm(64)[:4]]
    eps = torch.randn(4, 2, dtype=torch.float64)
    check_gradient(lambda: sum(t.sum() for t in elbo_terms(model, x, eps)), model.parameters())


@tiny
def test_second_derivatives(build, x):
    """Rules with a Jacobian and unrolled inference differentiate a squared gradient."""
    model, x = far(build(), 1.3), x[::16]
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def penalty():
        """Return the squared gradient by the latents."""
        (g,) = torch.autograd.grad(model.log_likelihood(x, z).sum(), z, create_graph=True)
        return (g**2).sum()

    check_gradient(penalty, [z, *model.p_net.parameters()])


@both
def test_leading_sample_dimensions_are_a_loop(build, x):
    model, z = far(build()), torch.randn(3, 2, 4, 3, dtype=torch.float64)
    x = x(4) if x is tokens else x(4).double()
    loop = torch.stack([torch.stack([model.log_likelihood(x, s) for s in t]) for t in z])
    assert torch.allclose(model.log_likelihood(x, z), loop, rtol=1e-12)
    logits = model.logits(x, z[0, 0])
    if x.dtype == torch.int64:
        known = Categorical(logits=logits).log_prob(x)
    else:
        known = Bernoulli(logits=logits).log_prob(x.flatten(1))
    assert torch.allclose(loop[0, 0], known.sum(-1), rtol=1e-10)


@both
def test_encoder_and_decoder_are_players(build, x):
    model, x = build(), x(4)
    q, p = list(model.q_net.parameters()), list(model.p_net.parameters())
    assert {*map(id, q), *map(id, p)} == {*map(id, model.parameters())}
    assert len(q) + len(p) == len(list(model.parameters()))
    eps = torch.randn(4, 3)

    def loss(_):
        """Return the loss that both players descend."""
        return sum(elbo_terms(model, x, eps)).mean()

    game = Game(
        q=Player(q, loss, torch.optim.Adam(q, 1e-2)), p=Player(p, loss, torch.optim.SGD(p, 1e-2))
    )
    first = game.step(None)["p"].item()
    for _ in range(30):
        last = game.step(None)["p"].item()
    assert last < 0.97 * first


@both
def test_no_random_numbers_but_ones_own_and_no_modes(build, x):
    model, x, eps = build(), x(4), torch.randn(4, 3)
    state = torch.get_rng_state()
    a, b = elbo_terms(model.train(), x, eps), elbo_terms(model.eval(), x, eps)
    draws = [model.decoder(eps, generator=generator(s)) for s in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state()) and all(map(torch.equal, a, b))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad and len(model(x)) == 3


@both
def test_meta_device_and_whole_graph(build, x):
    with torch.device("meta"):
        model, y = build(), x(1).to("meta").expand(3, *x(1).shape[1:])
    assert all(t.is_meta and t.shape == (3,) for t in elbo_terms(model, y))
    model, y, eps = build(), x(3), torch.randn(3, 3)
    # The compiler refuses a graph that depends on a value.
    compiled = torch.compile(elbo_terms, fullgraph=True, backend="eager")
    assert all(map(torch.allclose, compiled(model, y, eps), elbo_terms(model, y, eps)))


def check_same_on(build, data, device, dtype):
    """Assert that the terms on a device and under autocast are those on the CPU in float32."""
    model, x, eps = build(), data(4), torch.randn(4, 3)
    exact = [t.detach() for t in elbo_terms(model, x, eps)]
    model, x, eps = model.to(device), x.to(device), eps.to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        found = elbo_terms(model.eval(), x, eps)
        drawn = model.decoder(eps)
    sum(t.sum() for t in found).backward()
    assert all(p.grad.isfinite().all() and p.grad.device == x.device for p in model.parameters())
    assert drawn.device == x.device
    assert drawn.shape == x.shape and drawn.dtype == x.dtype
    for a, b in zip(exact, found):
        assert b.device == x.device and b.dtype == torch.float32
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(a, b.detach().cpu(), rtol=tolerance, atol=1e-2)


@both
def test_bfloat16_autocast(build, x):
    check_same_on(build, x, "cpu", torch.bfloat16)


@both
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(build, x, dtype):
    check_same_on(build, x, "cuda", dtype)


@both
def test_metrics_take_it(build, x):
    model, y = build(), x(5)
    found = evaluate_vae(model, [y[:3], (y[3:], None)], k=30, chunk=16)
    repeated = torch.stack(
        [importance_nll(model, y, k=30, generator=generator(s)).nll.mean() for s in range(1, 21)]
    )
    assert found["n"] == 5 and abs(found["nll"] - repeated.mean()) < 5 * repeated.std()
    assert abs(found["bits_per_dim"] - found["nll"] / (y[0].numel() * 0.6931471805599453)) < 1e-6


@both
def test_state_dict_round_trip(build, x):
    a, b, x, eps = build(), build(), x(2), torch.randn(2, 3)
    b.load_state_dict(a.state_dict())
    assert all(map(torch.equal, elbo_terms(a, x, eps), elbo_terms(b, x, eps)))


def test_x_mean_is_where_the_decoder_starts():
    train = digits("train").images.float() / 255
    model = AutoregressiveVAE((1, 28, 28), 5, hidden=10, x_mean=train.mean(0))
    model.p_net.out.weight.data.zero_()
    known = train.mean(0).flatten().logit(eps=1e-3).expand(3, -1)
    assert torch.allclose(model.logits(images(3, (1, 28, 28)), torch.randn(3, 5)), known)


def train_plainly(model, data):
    """Return mean distortion and rate of the last 20 of 150 steps of plain training, nats."""
    optimizer, terms = torch.optim.Adam(model.parameters(), 3e-3), []
    for i in torch.randint(len(data), (150, 64), generator=generator(1)):
        x = torch.bernoulli(data[i], generator=generator(int(i[0])))
        distortion, rate = elbo_terms(model, x)
        optimizer.zero_grad()
        (distortion + rate).mean().backward()
        optimizer.step()
        terms.append([distortion.mean().item(), rate.mean().item()])
    return torch.tensor(terms[-20:]).mean(0).tolist()


def test_plain_training_collapses_where_a_plain_decoder_does_not():
    data = digits("train").images[:4000].float() / 255
    torch.manual_seed(1)
    d, r = train_plainly(VAE(784, 200, 200, 10, data.mean(0)), data)
    torch.manual_seed(1)
    model = AutoregressiveVAE((1, 28, 28), 10, x_mean=data.mean(0))
    d_ar, r_ar = train_plainly(model, data)
    assert r_ar < 0.7 < 3 < r
    assert d_ar + r_ar < d + r - 10


@pytest.mark.parametrize(
    "call, error, word",
    [
        (lambda: AutoregressiveVAE((3, 8, 8), 2), ValueError, "3 channels"),
        (lambda: AutoregressiveVAE((1, 8, 8), 0), ValueError, "z_dim"),
        (lambda: AutoregressiveVAE((1, 8, 8), 2, radius=0), ValueError, "radius"),
        (lambda: AutoregressiveVAE((1, 8, 0), 2), ValueError, "0"),
        (
            lambda: AutoregressiveVAE((1, 8, 8), 2, hidden=4)(torch.zeros(2, 63)),
            ValueError,
            "64 pixels",
        ),
        (
            lambda: AutoregressiveVAE((1, 8, 8), 2, hidden=4).log_likelihood(
                torch.zeros(2, 32), torch.zeros(1, 2)
            ),
            ValueError,
            "64 pixels",
        ),
        (lambda: SequenceVAE(0, 3), ValueError, "vocab"),
        (lambda: SequenceVAE(4, 3, embed=0), ValueError, "embed"),
        (lambda: SequenceVAE(4, 3).encoder(torch.zeros(2, 3)), TypeError, "int64"),
        (lambda: SequenceVAE(4, 3).encoder(torch.zeros(3).long()), ValueError, "3 tokens"),
        (
            lambda: SequenceVAE(4, 3).log_likelihood(torch.zeros(2, 5).long(), torch.zeros(2, 2)),
            ValueError,
            "3 tokens",
        ),
        (
            lambda: elbo_terms(SequenceVAE(4, 3), torch.zeros(2, 3).long(), torch.zeros(3)),
            ValueError,
            "noise",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, error, word):
    with raises(error, word):
        call()
