"""Games as a user meets them: any optimizer, schedules, precision, state, and mistakes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optgen import optim
from optgen.fields import Field
from optgen.games import Game, Player, Rule, Simultaneous
from optgen.rules import Alternating, Consensus, Lookahead
from optgen.testing import finite_difference, flat_weights, generator, jacobian, raises
from optgen.training import checkpoint

F64 = torch.float64


def sgd(*params):
    """Return gradient descent on some tensors."""
    return torch.optim.SGD(params, lr=0.1)


def net(*sizes, seed, dtype=F64):
    """Return a perceptron whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Softplus())
        ]
    return nn.Sequential(*layers[:-1]).to(dtype)


def plain_sgd(params):
    """Return gradient descent on the parameters of a network."""
    return torch.optim.SGD(params, lr=0.1)


def gan(make=plain_sgd, dtype=F64, device="cpu", seed=0, **options):
    """Return a small GAN whose data are the cosines of its noise."""
    G, D = (net(2, 4, k, seed=seed + k, dtype=dtype).to(device) for k in (2, 1))

    def g_loss(z):
        return F.softplus(-D(G(z))).mean()

    def d_loss(z):
        return (F.softplus(D(G(z))) + F.softplus(-D(z.cos()))).mean()

    return Game(
        G=Player(G, g_loss, make(G.parameters())),
        D=Player(D, d_loss, make(D.parameters())),
        **options,
    )


def batch(seed=0, dtype=F64):
    """Return a batch of noise."""
    return torch.randn(8, 2, generator=generator(seed), dtype=F64).to(dtype)


def flat(field):
    """Return all entries of a field as one vector."""
    return flat_weights([x for xs in field.values() for x in xs])


def record(player, name, calls):
    """Add `name` to `calls` whenever the loss of a player is evaluated."""
    loss = player.loss

    def recorded(z):
        calls.append(name)
        return loss(z)

    player.loss = recorded


@pytest.mark.parametrize("seed", range(3))
def test_field_and_products_against_explicit_derivatives(seed):
    game, z = gan(seed=seed), batch(seed)
    v = game.at(z).v
    for name in game.players:
        for p, g in zip(game.params(name), v[name]):
            assert (
                finite_difference(lambda _: game.players[name].loss(z), p) - g
            ).abs().max() < 1e-7
    at = game.at(z, graph=True)
    params = [p for name in game.players for p in game.params(name)]
    grads = [
        g
        for name in game.players
        for g in torch.autograd.grad(
            game.players[name].loss(z), game.params(name), create_graph=True
        )
    ]
    J, n = jacobian(grads, params), sum(p.numel() for p in game.params("G"))
    off = J.clone()
    off[:n, :n] = 0
    off[n:, n:] = 0
    u = Field({k: [torch.randn_like(p) for p in game.params(k)] for k in game.players})
    for got, matrix in (
        (at.jvp(u), J),
        (at.vjp(u), J.T),
        (at.jvp(u, diagonal=False), off),
        (at.vjp(u, diagonal=False), off.T),
    ):
        assert (flat(got) - matrix @ flat(u)).abs().max() < 1e-12
    assert (flat(at.with_movers("D").vjp(u)) - (J.T @ flat(u))[n:]).abs().max() < 1e-12
    pulled = flat(at.pullback([("D", "G", u["G"])], to=["D"]))
    assert (pulled - explicit_pullback(game, z, "D", "G", u["G"], "D")).abs().max() < 1e-12


def explicit_pullback(game, z, loss, wrt, u, to):
    """Return Eq. (pull) by two passes of autograd."""
    grads = torch.autograd.grad(game.players[loss].loss(z), game.params(wrt), create_graph=True)
    along = sum((a * b).sum() for a, b in zip(grads, u))
    return flat_weights(torch.autograd.grad(along, game.params(to)))


@pytest.mark.parametrize("rule", [lambda: None, lambda: Consensus(0.1)])
def test_players_with_one_loss_are_one_player(rule):
    calls, ends = [], []

    def run(split):
        layers = net(2, 4, 1, seed=0)

        def loss(z):
            calls.append(split)
            return layers(z).square().mean()

        modules = {"first": layers[0], "last": layers[2]} if split else {"all": layers}
        players = {k: Player(m, loss, sgd(*m.parameters())) for k, m in modules.items()}
        game = Game(rule=rule(), **players)
        for t in range(5):
            losses = game.step(batch(t))
        assert losses.keys() == modules.keys()
        ends.append(flat(game.weights()))

    run(split=True)
    run(split=False)
    assert calls == [True] * 5 + [False] * 5
    assert (ends[0] - ends[1]).abs().max() < 1e-14


def test_each_loss_is_evaluated_once_a_point():
    calls = []
    game = gan(rule=Consensus(0.1))
    for name, player in game.players.items():
        record(player, name, calls)
    game.step(batch())
    assert sorted(calls) == ["D", "G"]


def test_noise_is_drawn_once_a_step():
    "Every evaluation within a step sees the same batch, whatever the rule."
    g, drawn, seen = generator(0), [], []

    def draw(b):
        drawn.append(torch.randn(8, 2, generator=g, dtype=F64))
        return drawn[-1]

    def remember_batch(player):
        loss = player.loss

        def remembering(z):
            seen.append(z)
            return loss(z)

        player.loss = remembering

    game = gan(draw=draw, rule=Alternating(repeats={"D": 3}))
    for player in game.players.values():
        remember_batch(player)
    for _ in range(3):
        game.step(None)
    assert len(drawn) == 3 and len(seen) == 12
    assert all(seen[i] is drawn[i // 4] for i in range(12))


def test_field_arithmetic():
    a = Field(x=[torch.ones(2), torch.ones(())], y=[torch.full((3,), 2.0)])
    b = Field(y=[torch.ones(3)], x=[torch.arange(2.0), torch.ones(())])
    assert flat(a + b).tolist() == [1, 2, 2, 3, 3, 3]
    assert flat(a - b).tolist() == [1, 0, 0, 1, 1, 1]
    assert flat(0.5 * a).tolist() == [0.5, 0.5, 0.5, 1, 1, 1]
    assert flat(torch.tensor(3.0) * a).tolist() == [3, 3, 3, 6, 6, 6]
    assert (a @ b).item() == 1 + 1 + 6 and (a @ b).shape == ()
    c = a.clone()
    c["x"][0].zero_()
    assert a["x"][0].sum() == 2 and list(a.select(["y"])) == ["y"]


MAKERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "ours": lambda p: optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "groups": lambda p: torch.optim.SGD(
        [dict(params=[x], lr=0.01 * (i + 1), momentum=0.5 * (i % 2)) for i, x in enumerate(p)],
        lr=0.1,
    ),
    "one-group-decayed": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "capturable-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, dtype=F64)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_steps_as_the_loop_by_hand_with_schedules(maker):
    "To the last bit, with learning rates on a schedule."
    game, hand = gan(MAKERS[maker]), gan(MAKERS[maker])
    schedules = [
        [torch.optim.lr_scheduler.StepLR(p.optimizer, 3, gamma=0.5) for p in g.players.values()]
        for g in (game, hand)
    ]
    for t in range(10):
        losses = game.step(batch(t))
        by_hand = {k: p.loss(batch(t)) for k, p in hand.players.items()}
        grads = {
            k: torch.autograd.grad(loss, hand.params(k), retain_graph=True)
            for k, loss in by_hand.items()
        }
        for k, p in hand.players.items():
            for w, g in zip(hand.params(k), grads[k]):
                w.grad = g
            p.optimizer.step()
        for s in (*schedules[0], *schedules[1]):
            s.step()
        for k in game.players:
            assert losses[k].item() == by_hand[k].item()
    assert torch.equal(flat(game.weights()), flat(hand.weights()))


def test_frozen_and_unreached_parameters():
    "A frozen tensor is never stepped; one that the loss does not reach has no gradient."
    model = net(2, 4, 1, seed=0)
    model[0].weight.requires_grad_(False)
    spare = nn.Parameter(torch.ones(2, dtype=F64))
    model.register_parameter("spare", spare)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    game = Game(m=Player(model, lambda z: model(z).square().mean(), opt))
    before = copy.deepcopy(model.state_dict())
    game.step(batch())
    assert spare.grad is None and torch.equal(spare, torch.ones(2, dtype=F64))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[0].bias, before["0.bias"])
    # An optimizer may hold the frozen tensors too.
    Player(model, None, torch.optim.SGD(model.parameters(), lr=0.1))


def test_state_goes_through_a_file_with_buffers(tmp_path):
    def new():
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        x = torch.ones(3, requires_grad=True)

        def m_loss(z):
            return (model(z) * x.sum()).square().mean()

        return Game(
            m=Player(model, m_loss, torch.optim.Adam(model.parameters(), 0.01)),
            x=Player([x], lambda z: -(model(z) * x.sum()).mean(), optim.Momentum([x], 0.01)),
            rule=Lookahead(every=3),
        )

    whole, first, second = new(), new(), new()
    for t in range(8):
        whole.step(batch(t, torch.float32))
    for t in range(4):
        first.step(batch(t, torch.float32))
    checkpoint.save(tmp_path / "a.pt", first.state_dict())
    second.load_state_dict(checkpoint.load(tmp_path / "a.pt"))
    for t in range(4, 8):
        second.step(batch(t, torch.float32))
    a, b = whole.state_dict(), second.state_dict()
    for name in ("m", "x"):
        for k, w in a[name]["weights"].items():
            assert torch.equal(w, b[name]["weights"][k])
    assert a["rule"]["memory"]["count"] == b["rule"]["memory"]["count"]
    assert "1.running_mean" in a["m"]["weights"]


def test_gradients_do_not_flow_into_other_players():
    "Losses need not detach: a player's step leaves the other's weights and gradients alone."
    game = gan(rule=Alternating(order=["D", "G"]))
    weights = flat(game.weights().select(["G"]))
    u = game.at(batch(), movers=["D"]).v
    game.step_optimizers(u)
    assert torch.equal(flat(game.weights().select(["G"])), weights)
    assert all(p.grad is None for p in game.params("G"))


@pytest.mark.parametrize(
    "dtype,device",
    ((torch.float32, "meta"), (torch.bfloat16, "meta"), (F64, "cpu"), (torch.bfloat16, "cpu")),
)
def test_any_dtype_and_device(dtype, device):
    game = gan(dtype=dtype, device=device)
    losses = game.step(batch(dtype=dtype).to(device))
    assert all(
        x.dtype == dtype and x.device.type == device and not x.requires_grad
        for x in losses.values()
    )


def test_moves_between_devices_with_the_rules_memory():
    game = gan(rule=Lookahead(every=3))
    game.step(batch())
    game.to(torch.float32)
    assert all(x.dtype == torch.float32 for xs in game.rule.memory["slow"].values() for x in xs)
    assert all(p.dtype == torch.float32 for p in game.params("G"))
    game.step(batch(dtype=torch.float32))


@pytest.mark.cuda
def test_on_cuda_without_a_wait():
    game = gan(rule=Consensus(0.1)).to("cuda")
    z = batch().to("cuda")
    game.step(z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = game.step(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twin = gan(rule=Consensus(0.1))
    twin.step(batch())
    expected = twin.step(batch())
    for k in losses:
        assert abs(losses[k].item() - expected[k].item()) < 1e-10


# Mistakes
def two():
    """Return two trainable tensors."""
    return torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)


def test_a_parameter_in_two_players():
    a, b = two()
    shared = net(2, 2, seed=0)
    with pytest.raises(
        ValueError, match="'0' of player 'y' belongs to player 'x' too: a parameter has one owner"
    ):
        Game(x=Player([a, b], None, sgd(a, b)), y=Player([a], None, sgd(a)))
    whole = nn.Sequential(shared, nn.Linear(2, 1, dtype=F64))
    with pytest.raises(ValueError, match="0.0.weight.*belongs to player 'encoder'"):
        Game(
            encoder=Player(shared, None, sgd(*shared.parameters())),
            model=Player(whole, None, sgd(*whole.parameters())),
        )


def test_an_optimizer_that_does_not_own_its_players_parameters():
    a, b = two()
    with pytest.raises(
        ValueError, match="steps 1 tensors that are not its player's and misses 1 that are"
    ):
        Player([a], None, sgd(b))
    with pytest.raises(ValueError, match="misses 1"):
        Player([a, b], None, sgd(a))
    with pytest.raises(ValueError, match="steps 1 tensors"):
        Player([a], None, sgd(a, b))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Player([a.detach()], None, sgd(a))


def test_a_loss_that_does_not_depend_on_its_player():
    a, b = two()
    for rule in (None, Alternating(), Consensus(0.1), Lookahead()):
        game = Game(
            x=Player([a], lambda _: b.sum(), sgd(a)),
            y=Player([b], lambda _: b.sum(), sgd(b)),
            rule=rule,
        )
        with pytest.raises(
            ValueError, match="loss of player 'x' does not depend on its own parameters"
        ):
            game.step(None)
    with pytest.raises(ValueError, match="'x' does not depend on any parameter"):
        Game(x=Player([a], lambda _: torch.ones(()), sgd(a))).step(None)
    with pytest.raises(ValueError, match="'x' does not depend on any parameter"):
        Game(x=Player([a], lambda _: a.detach().sum(), sgd(a))).step(None)
    with pytest.raises(ValueError, match=r"shape \(2,\); a loss is one number"):
        Game(x=Player([a], lambda _: a * 2, sgd(a))).step(None)


def test_other_mistakes():
    a, b = two()
    game = Game(x=Player([a], lambda _: a.sum(), sgd(a)))
    with pytest.raises(ValueError, match="needs a player"):
        Game()
    with pytest.raises(ValueError, match=r"state is of players \['y'\], this game has \['x'\]"):
        game.load_state_dict({"y": {}})
    with pytest.raises(ValueError, match="graph=True"):
        game.at(None).vjp(Field(x=[a]))
    with pytest.raises(ValueError):
        game.step_optimizers(Field(x=[]))
    with pytest.raises(TypeError, match="not a correction"):
        Game(x=Player([a], lambda _: a.sum(), sgd(a)), rule=[Simultaneous()])

    class Mine(Rule):
        def check(self, game):
            self.require_players(game, "G")

    with pytest.raises(ValueError, match="Mine names a player 'G'; this game has 'x'"):
        Game(x=Player([a], None, sgd(a)), rule=Mine())


def test_a_rule_of_ones_own():
    "A direction, a memory and a state in five lines; it composes with the ways to step."

    class Averaged(Rule):
        def direction(self, at):
            v = at.v
            self.memory = {"mean": 0.5 * v + 0.5 * self.memory.get("mean", v)}
            return self.memory["mean"].clone()

    whole, first, second = (gan(rule=Lookahead(Averaged(), every=2)) for _ in range(3))
    for t in range(6):
        whole.step(batch(t))
    for t in range(3):
        first.step(batch(t))
    second.load_state_dict(first.state_dict())
    for t in range(3, 6):
        second.step(batch(t))
    assert torch.equal(flat(whole.weights()), flat(second.weights()))


def test_a_player_is_one_that_can_be_stepped():
    a, b = two()
    with pytest.raises(ValueError, match="same tensor twice"):
        Player([a, a], None, sgd(a))
    with pytest.raises(ValueError, match="LBFGS evaluates the loss itself"):
        Player([a], None, torch.optim.LBFGS([a]))
    with pytest.raises(ValueError, match="player 'x' is a float"):
        Game(x=Player([a], lambda _: a.sum().item(), sgd(a))).step(None)
    for rule in (Consensus, "consensus"):
        with pytest.raises(TypeError, match="a rule is an object"):
            gan(rule=rule)


@pytest.mark.parametrize(
    "rule", (Lookahead, lambda: Alternating(Consensus(0.1)), lambda: [Consensus(0.1)])
)
def test_a_rule_has_one_game(rule):
    rule = rule()
    gan(rule=rule)
    with pytest.raises(ValueError, match="already used by another game"):
        gan(rule=rule)
    with pytest.raises(ValueError, match="already used by another game"):
        gan(rule=Lookahead(rule))


@pytest.mark.parametrize(
    "state, message",
    (
        (
            lambda: gan(rule=Lookahead(Simultaneous())).state_dict(),
            "rule Simultaneous, this game steps by Consensus",
        ),
        (
            lambda: gan(rule=Consensus(0.1)).state_dict(),
            "rule Consensus, this game steps by Lookahead",
        ),
        (
            lambda: {
                **gan(rule=Lookahead(Consensus(0.1))).state_dict(),
                "D": {"weights": net(2, 5, 1, seed=1).state_dict(), "optimizer": {}},
            },
            "0.weight has shape (5, 2) there and (4, 2) here",
        ),
    ),
)
def test_a_state_that_does_not_fit_changes_nothing(state, message):
    game, fresh = (gan(rule=Lookahead(Consensus(0.1)), seed=7) for _ in range(2))
    with raises(ValueError, message):
        game.load_state_dict(state())
    assert torch.equal(flat(game.weights()), flat(fresh.weights()))


def test_bare_tensors_are_checked_too():
    a, b = two()
    player = Player({"a": a, "b": b}.values(), None, sgd(a, b))
    state = player.state_dict()
    for wrong in (
        {"0": torch.zeros(1), "1": state["weights"]["1"]},
        {"0": state["weights"]["0"]},
        {**state["weights"], "2": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="are not this player's"):
            player.load_state_dict({**state, "weights": wrong})
    assert torch.equal(a, torch.ones(2))


def test_a_state_without_a_rule_is_of_simultaneous_steps():
    old = {k: v for k, v in gan(seed=3).state_dict().items() if k != "rule"}
    game = gan()
    game.load_state_dict(old)
    assert torch.equal(flat(game.weights()), flat(gan(seed=3).weights()))
    with pytest.raises(ValueError, match="rule Simultaneous"):
        gan(rule=Lookahead()).load_state_dict(old)


def test_a_list_of_corrections_keeps_their_memories():
    class Growing(Rule):
        def correction(self, at):
            self.memory = {"count": self.memory.get("count", 0) + 1}
            return 0.1 * self.memory["count"] * at.v

    whole, first, second = (gan(rule=[Growing(), Consensus(0.1)]) for _ in range(3))
    for t in range(6):
        whole.step(batch(t))
    for t in range(3):
        first.step(batch(t))
    second.load_state_dict(first.state_dict())
    for t in range(3, 6):
        second.step(batch(t))
    assert torch.equal(flat(whole.weights()), flat(second.weights()))


@pytest.mark.parametrize("rule", (Simultaneous, Alternating, lambda: Lookahead(every=2)))
def test_two_players_compile(rule):
    eager, compiled = (gan(rule=rule(), dtype=torch.float32) for _ in range(2))
    compiled.compile()
    for t in range(3):
        for game in (eager, compiled):
            game.step(batch(t, torch.float32))
    assert torch.allclose(flat(eager.weights()), flat(compiled.weights()), rtol=1e-4, atol=1e-6)
