"""Muon of the installed package: dtypes, devices, resumption, schedules, in a game."""

import copy
import math

import pytest
import torch
from torch import nn

from optgen.combined import CombinedOptimizer
from optgen.data.images import Batch
from optgen.games import Game, Player
from optgen.models.vae import VAE
from optgen.muon import Muon, muon_groups, orthogonalize
from optgen.optim import Adam
from optgen.schemes.elbo import BetaVAE
from optgen.testing import flat_weights, generator, randn
from optgen.training import checkpoint


def game(dtype=torch.float32, device="cpu"):
    """Return a small VAE whose matrices are stepped by Muon."""
    with torch.device(device):
        model = VAE(12, 8, 6, 3).to(dtype)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return BetaVAE(model, optimizer=CombinedOptimizer(Muon(matrices), Adam(rest)))


def batches(n, seed=0):
    """Return batches of ten binary images with twelve pixels."""
    return [
        Batch((torch.rand(10, 12, generator=generator(seed + i)) < 0.4).float()) for i in range(n)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_trains_in_the_parameters_dtype(dtype):
    def losses(scheme, dtype):
        """Return the losses of sixty steps whose noise is seeded."""
        torch.manual_seed(0)
        steps = (scheme.step(Batch(b.x.to(dtype))) for b in batches(1) * 60)
        return [step["model"].item() for step in steps]

    scheme, wide = game(dtype), game(torch.float64)
    wide.load_state_dict(copy.deepcopy(scheme.state_dict()))
    found, expected = (losses(s, d) for s, d in ((scheme, dtype), (wide, torch.float64)))
    fall = sum(expected[:10]) / 10 - sum(expected[-10:]) / 10
    assert fall > 1
    assert abs(sum(found[-10:]) / 10 - sum(expected[-10:]) / 10) < 0.5 * fall
    assert all(p.dtype == dtype and p.isfinite().all() for p in scheme.model.parameters())


def test_on_meta():
    assert game(device="meta").step(Batch(torch.empty(5, 12, device="meta")))["model"].is_meta


def test_it_resumes_to_the_last_bit(tmp_path):
    whole, other = game(), game()
    data = batches(8)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))

    def train(scheme, data):
        """Step on every batch, with noise that depends on the batch alone."""
        for batch in data:
            torch.manual_seed(int(batch.x.sum()))
            scheme.step(batch)

    train(whole, data)
    train(other, data[:3])
    third = game()
    checkpoint.save(tmp_path / "state.pt", other.state_dict())
    third.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    train(third, data[3:])
    assert torch.equal(flat_weights(whole.model), flat_weights(third.model))


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (20, 20), (1, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_float32_follows_float64(shape, seed):
    G = randn(*shape, seed=seed)
    assert (orthogonalize(G.float()) - orthogonalize(G)).abs().max() < 1e-4


def test_the_size_of_the_gradient_does_not_matter_and_a_schedule_does():
    def stepped(scale, lr):
        """Return a matrix after a step on a gradient of the given scale."""
        W = nn.Parameter(torch.zeros(5, 3))
        optimizer = Muon([W], lr=lr)
        W.grad = scale * torch.randn(5, 3, generator=generator(0))
        optimizer.step()
        return W.detach()

    assert torch.allclose(stepped(1.0, 0.1), stepped(1000.0, 0.1), atol=1e-6)
    assert torch.allclose(stepped(1.0, 0.1), 2 * stepped(1.0, 0.05), atol=1e-7)
    assert stepped(0.0, 0.1).eq(0).all()


def test_a_tensor_without_a_gradient_stays_and_a_vector_is_refused():
    W, V = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    opt = Muon([W, V], weight_decay=0.5)
    W.grad = torch.eye(3)
    opt.step()
    assert V.eq(1).all() and not W.eq(1).any() and V not in opt.state
    with pytest.raises(ValueError, match="CombinedOptimizer"):
        Game(model=Player(VAE(4, 3, 3, 1), lambda b: b, Muon(VAE(4, 3, 3, 1).parameters())))


@pytest.mark.cuda
def test_cuda_as_on_the_cpu():
    G = randn(40, 20)
    assert torch.allclose(orthogonalize(G.cuda()).cpu(), orthogonalize(G), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_convolutions_train_transposed_and_in_groups(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 6, 3, 2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 4, 2, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 1, 3, padding=2),
    ).to(dtype)
    matrices, rest = muon_groups(net)
    kinds = {(group["transposed"], group["blocks"]) for group in matrices}
    assert kinds == {(False, 2), (True, 2), (True, 1)}
    assert any(p is net[4].weight for p in rest)
    opt = CombinedOptimizer(Muon(matrices, 0.02), Adam(rest, 1e-3))
    x = torch.rand(8, 1, 8, 8, generator=generator(1)).to(dtype)
    shape, losses = net(x).shape, []
    for _ in range(60):
        opt.zero_grad()
        loss = (net(x) - x.mean()).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert len(shape) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == dtype for p in net.parameters())


def test_a_state_of_matrices_alone_still_loads():
    """As optgen 0.3 wrote it, and as `torch.optim.Muon` does."""
    W = nn.Parameter(torch.eye(3))
    opt = Muon([W])
    W.grad = torch.ones(3, 3)
    opt.step()
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["transposed"], group["blocks"]
    other = Muon([W])
    other.load_state_dict(state)
    other.step()
    assert other.param_groups[0]["blocks"] == 1


def test_each_matrix_of_a_batch_is_made_orthogonal_by_itself():
    G = randn(3, 5, 4)
    assert (orthogonalize(G) - torch.stack([orthogonalize(g) for g in G])).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(2))
def test_frozen_shared_and_parametrized_weights_are_not_stepped_by_muon(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Embedding(7, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
        nn.Linear(4, 7, bias=False),
    )
    net[6].weight = net[0].weight
    net[3].weight.requires_grad_(False)
    net[5].weight = net[2].weight
    matrices, rest = muon_groups(net)
    moved = [p for g in matrices for p in g["params"]]
    assert [id(p) for p in moved] == [id(net[2].weight)]
    assert len(rest) + 1 == sum(p.requires_grad for p in net.parameters())
    assert all(p is not net[3].weight for p in rest)
    with pytest.raises(ValueError, match="no layer's name"):
        muon_groups(net, exclude="out")
    with pytest.raises(ValueError, match="no hidden matrix"):
        muon_groups(net, exclude=["2", "5"])


def quintic(s, rounds):
    """Return singular values after the rounds, each by the polynomial of Jordan et al. (2024)."""
    for _ in range(rounds):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def by_singular_values(d, rounds):
    """Return the orthogonalized matrix by its singular values."""
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    return u @ torch.diag(quintic(s / s.norm(), rounds)) @ v


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    "shape, transposed, blocks",
    [((3, 7), False, 1), ((7, 3), False, 1), ((7, 3), True, 1)]
    + [((3, 7), True, 1), ((6, 2), False, 2), ((6, 4), False, 3)],
)
def test_three_steps_by_singular_values(shape, transposed, blocks, nesterov):
    lr, mu, decay = 0.03, 0.8, 0.2
    theta = nn.Parameter(randn(*shape, seed=1))
    group = {"params": [theta], "transposed": transposed, "blocks": blocks}
    optimizer = Muon([group], lr, mu, nesterov, decay, ns_steps=4)
    expected, m = theta.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for t in range(3):
        g = theta.grad = randn(*shape, seed=10 + t)
        m = mu * m + (1 - mu) * g
        d = mu * m + (1 - mu) * g if nesterov else m
        parts = [by_singular_values(part, 4) for part in d.chunk(blocks)]
        rows, columns = parts[0].shape[::-1] if transposed else parts[0].shape
        scale = math.sqrt(max(1, rows / columns))
        expected = (1 - lr * decay) * expected - lr * scale * torch.cat(parts)
        optimizer.step()
        assert torch.allclose(theta, expected, rtol=1e-9, atol=1e-12)


def test_rates_set_after_loading_are_those_of_the_parts():
    def made(seed):
        """Return parameters and their optimizer after a step."""
        params = [nn.Parameter(randn(3, 4, seed=seed)), nn.Parameter(randn(4, seed=seed))]
        optimizer = CombinedOptimizer(Muon(params[:1]), Adam(params[1:]))
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return params, optimizer

    (_, saved), (params, optimizer) = made(0), made(1)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, before, params))
