"Muon of the installed package: dtypes, devices, resumption, schedules, and as a player's optimizer."

import copy

import pytest
import torch
from conftest import rng
from torch import nn

from optgen.data.images import Batch
from optgen.games import Game, Player
from optgen.models.vae import VAE
from optgen.muon import Muon, muon_groups, orthogonal
from optgen.optim import Adam, CombinedOptimizer
from optgen.schemes.elbo import BetaVAE
from optgen.training import checkpoint


def game(dtype=torch.float32, device="cpu"):
    with torch.device(device):
        model = VAE(12, 8, 6, 3).to(dtype)
    matrices, rest = (
        [p for p in model.parameters() if (p.ndim == 2) is flat] for flat in (True, False)
    )
    return BetaVAE(model, optimizer=CombinedOptimizer(Muon(matrices), Adam(rest)))


def batches(n, seed=0):
    return [Batch((torch.rand(10, 12, generator=rng(seed + i)) < 0.4).float()) for i in range(n)]


def weights(scheme):
    return torch.cat([p.detach().flatten() for p in scheme.model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_trains_in_the_parameters_dtype(dtype):
    scheme = game(dtype)
    losses = [scheme.step(Batch(b.x.to(dtype)))["model"].item() for b in batches(1) * 60]
    assert losses[-1] < losses[0] - 1 and all(
        p.dtype == dtype and p.isfinite().all() for p in scheme.model.parameters()
    )


def test_on_meta():
    assert game(device="meta").step(Batch(torch.empty(5, 12, device="meta")))["model"].is_meta


def test_it_resumes_to_the_last_bit(tmp_path):
    whole, other = game(), game()
    data = batches(8)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))

    def go(scheme, part):
        for b in part:
            torch.manual_seed(int(b.x.sum()))
            scheme.step(b)

    go(whole, data)
    go(other, data[:3])
    third = game()
    checkpoint.save(tmp_path / "state.pt", other.state_dict())
    third.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    go(third, data[3:])
    assert torch.equal(weights(whole), weights(third))


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (20, 20), (1, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_float32_follows_float64(shape, seed):
    G = torch.randn(*shape, generator=rng(seed), dtype=torch.float64)
    assert (orthogonal(G.float()) - orthogonal(G)).abs().max() < 1e-4


def test_its_own_size_does_not_matter_and_a_schedule_does():
    "A gradient a thousand times as large makes the same step; half the rate makes half of it."

    def moved(scale, rate):
        W = torch.nn.Parameter(torch.zeros(5, 3))
        opt = Muon([W], lr=rate)
        W.grad = scale * torch.randn(5, 3, generator=rng(0))
        opt.step()
        return W.detach()

    assert torch.allclose(moved(1.0, 0.1), moved(1000.0, 0.1), atol=1e-6) and torch.allclose(
        moved(1.0, 0.1), 2 * moved(1.0, 0.05), atol=1e-7
    )
    assert moved(0.0, 0.1).eq(0).all()


def test_a_tensor_without_a_gradient_stays_and_a_vector_is_refused():
    W, V = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    opt = Muon([W, V], weight_decay=0.5)
    W.grad = torch.eye(3)
    opt.step()
    assert V.eq(1).all() and not W.eq(1).any() and V not in opt.state
    with pytest.raises(ValueError, match="Together"):
        Game(model=Player(VAE(4, 3, 3, 1), lambda b: b, Muon(VAE(4, 3, 3, 1).parameters())))


@pytest.mark.cuda
def test_cuda_as_on_the_cpu():
    G = torch.randn(40, 20, generator=rng(0), dtype=torch.float64)
    assert torch.allclose(orthogonal(G.cuda()).cpu(), orthogonal(G), atol=1e-9)


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
    assert {(g["transposed"], g["blocks"]) for g in matrices} == {
        (False, 2),
        (True, 2),
        (True, 1),
    } and any(p is net[4].weight for p in rest)
    opt, x = (
        CombinedOptimizer(Muon(matrices, 0.02), Adam(rest, 1e-3)),
        torch.rand(8, 1, 8, 8, generator=rng(1)).to(dtype),
    )
    shape, losses = net(x).shape, []
    for _ in range(60):
        opt.zero_grad()
        loss = (net(x) - x.mean()).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert (
        len(shape) == 4
        and losses[-1] < 0.5 * losses[0]
        and all(p.dtype == dtype for p in net.parameters())
    )


def test_a_state_of_matrices_alone_still_loads():
    "As optgen 0.3 wrote it, and as `torch.optim.Muon` does."
    W = torch.nn.Parameter(torch.eye(3))
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


def test_a_bundle_of_matrices_is_each_by_itself():
    G = torch.randn(3, 5, 4, generator=rng(0), dtype=torch.float64)
    assert (orthogonal(G) - torch.stack([orthogonal(g) for g in G])).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(2))
def test_frozen_shared_and_parametrised_weights_are_told_apart(seed):
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
    assert (
        [id(p) for p in moved] == [id(net[2].weight)]
        and len(rest) + 1 == sum(p.requires_grad for p in net.parameters())
        and all(p is not net[3].weight for p in rest)
    )
    with pytest.raises(ValueError, match="no layer's name"):
        muon_groups(net, others="out")
    with pytest.raises(ValueError, match="no hidden matrix"):
        muon_groups(net, others=["2", "5"])
