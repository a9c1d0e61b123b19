"""Players beside loops by hand: freezing, added groups, unreached tensors, hooks, refusals."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from optgen import optim
from optgen.averaging import Average
from optgen.combined import CombinedOptimizer
from optgen.games import Game, Player, Rule
from optgen.muon import Muon
from optgen.opponents import CompetitiveGradient, Unrolled
from optgen.rules import (
    Alternating,
    Clipped,
    Consensus,
    Extragradient,
    Feedback,
    Lookahead,
    Optimistic,
    SymplecticAdjustment,
)
from optgen.testing import generator
from optgen.training import checkpoint
from optgen.training.guards import NonFinite, NonFiniteWatch

F64 = torch.float64


class Net(nn.Module):
    """A body, a head, and a tensor that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.spare = nn.Parameter(torch.ones(2))
        self.extra = None

    def forward(self, x):
        """Return the head's output, after the extra layer if there is one."""
        h = self.body(x).tanh()
        return self.head(h if self.extra is None else self.extra(h))


def all_of(model):
    """Return all parameters of a model."""
    return list(model.parameters())


def without_body(model):
    """Return the parameters but those of the body, which is frozen."""
    model.body.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


# What happens before a step, by name: a function of (step, model, optimizer).
def nothing(t, model, optimizer):
    """Change nothing."""


def freeze(t, model, optimizer):
    """Freeze the body from step 3 to step 6."""
    model.body.requires_grad_(not 3 <= t < 6)


def freeze_one(t, model, optimizer):
    """Freeze one bias for good."""
    model.head.bias.requires_grad_(t < 4)


def toggle(t, model, optimizer):
    """Freeze body and head in turn."""
    model.body.requires_grad_(t % 2 == 0)
    model.head.requires_grad_(t % 2 == 1)


def unfreeze_and_add(t, model, optimizer):
    """Unfreeze the body and give it to the optimizer."""
    if t == 4:
        model.body.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.02})


def grow(t, model, optimizer):
    """Add a layer, and give it to the optimizer."""
    if t == 4:
        torch.manual_seed(9)
        model.extra = nn.Linear(4, 4).double()
        optimizer.add_param_group({"params": model.extra.parameters()})


def replace(t, model, optimizer):
    """Put a new head in the place of the old one, whose tensors leave the optimizer."""
    if t == 4:
        torch.manual_seed(9)
        model.head = nn.Linear(4, 1).double()
        optimizer.param_groups[0]["params"] = list(model.parameters())


def reparametrize(t, model, optimizer):
    """Normalize the weight of the head, which replaces its parameter."""
    if t == 4:
        torch.nn.utils.parametrizations.weight_norm(model.head)
        optimizer.param_groups[0]["params"] = list(model.parameters())


def rewrite(t, model, optimizer):
    """Overwrite a weight's data, and change an option."""
    if t == 4:
        model.head.weight.data = torch.ones_like(model.head.weight)
        optimizer.param_groups[0]["lr"] = 0.003


def hooked(t, model, optimizer):
    """Scale and clamp gradients by hooks of tensors, later removed."""
    if t == 2:
        model.handle = model.body.weight.register_hook(lambda g: 0.3 * g)
        model.head.weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
    if t == 7:
        model.handle.remove()


def accumulated(t, model, optimizer):
    """Clip in place, and count, after gradients are accumulated."""
    if t == 2:
        model.count = 0

        def clip(p):
            model.count += 1
            p.grad.clamp_(-0.05, 0.05)

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(clip)


def stepped_in_backward(t, model, optimizer):
    """Step the body inside of the hook, by an optimizer of its own."""
    if t == 2:
        own = torch.optim.SGD(model.body.parameters(), 0.05)

        def step(p):
            own.step()
            p.grad = None

        for p in model.body.parameters():
            p.register_post_accumulate_grad_hook(step)


def optimizer_hooks(t, model, optimizer):
    """Halve the gradients before the optimizer's step, and shrink the weights after it."""
    if t == 2:

        def halve(opt, args, kwargs):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.5)

        optimizer.register_step_pre_hook(halve)
        optimizer.register_step_post_hook(lambda *a: model.spare.data.mul_(0.9))


def module_hooks(t, model, optimizer):
    """Change the gradient inside of the graph."""
    if t == 2:
        model.body.register_full_backward_hook(lambda m, i, o: (None,))
        model.head.register_forward_hook(lambda m, i, o: o * 1.1)


MAKERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05, weight_decay=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.01, weight_decay=0.1),
    "ours-momentum": partial(optim.Momentum, lr=0.05, weight_decay=0.1),
    "ours-adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.5),
    "ours-reference": partial(optim.AdamW, lr=0.01, weight_decay=0.5, foreach=False),
    "ours-rmsprop": partial(optim.RMSProp, lr=0.01, momentum=0.5, weight_decay=0.1),
}
EVENTS = (nothing, freeze, freeze_one, toggle, grow, replace, reparametrize, rewrite)
HOOKS = (hooked, accumulated, stepped_in_backward, optimizer_hooks, module_hooks)
PARITY = [("all", maker, event) for maker in MAKERS for event in (nothing, freeze, toggle, grow)]
PARITY += [("all", maker, e) for maker in ("adamw", "ours-adamw") for e in (*EVENTS, *HOOKS)]
PARITY += [("without body", maker, unfreeze_and_add) for maker in MAKERS]
PARITY = list(dict.fromkeys(PARITY))


def run(params, maker, event, by_game, seed=0, schedule=None):
    """Return all parameters after twelve steps of a game, or of a loop by hand."""
    torch.manual_seed(seed)
    model, g = Net().double(), generator(seed)
    optimizer = maker(all_of(model) if params == "all" else without_body(model))
    schedule = schedule and schedule(optimizer)

    def loss(x):
        return (model(x) - x.sin().sum(1, keepdim=True)).square().mean()

    game = Game(m=Player(model, loss, optimizer))
    for t in range(12):
        event(t, model, optimizer)
        x = torch.randn(6, 3, generator=g, dtype=F64)
        if by_game:
            game.step(x)
        else:
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        if schedule:
            schedule.step(*[1.0] * isinstance(schedule, lrs.ReduceLROnPlateau))
    return model


def same(a, b):
    """Return whether all parameters of two models are the same to the bit."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(torch.equal(p, q) and (p.grad is None) == (q.grad is None) for p, q in pairs)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("params, maker, event", PARITY, ids=lambda x: getattr(x, "__name__", x))
def test_a_loop_by_hand(params, maker, event):
    "To the bit, and without a gradient where the loop has none."
    game, hand = (run(params, MAKERS[maker], event, by_game) for by_game in (True, False))
    assert same(game, hand)
    if event is not optimizer_hooks:
        assert torch.equal(game.spare, torch.ones(2, dtype=F64)) and game.spare.grad is None
    assert getattr(game, "count", 0) == getattr(hand, "count", 0)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_events_matter():
    "Each event changes the run: an event without effect would be seen."
    plain = run("all", MAKERS["adamw"], nothing, True)
    for event in (*EVENTS[1:], *HOOKS):
        changed = run("all", MAKERS["adamw"], event, True)
        assert not torch.equal(changed.body.bias, plain.body.bias), event.__name__
    assert run("all", MAKERS["adamw"], accumulated, True).count == 10 * 4


SCHEDULES = {
    "step": partial(lrs.StepLR, step_size=3, gamma=0.5),
    "lambda": partial(lrs.LambdaLR, lr_lambda=lambda t: 0.9**t),
    "one cycle": partial(lrs.OneCycleLR, max_lr=0.05, total_steps=13),
    "cyclic": partial(lrs.CyclicLR, base_lr=0.001, max_lr=0.05, step_size_up=4),
    "restarts": partial(lrs.CosineAnnealingWarmRestarts, T_0=4),
    "plateau": partial(lrs.ReduceLROnPlateau, patience=2),
    "sequence": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=3), lrs.ExponentialLR(o, 0.8)], [3]
    ),
}


def combined(params, adam=torch.optim.Adam):
    """Return momentum for matrices and Adam for the rest, as one optimizer."""
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    first = torch.optim.SGD(matrices, 0.05, momentum=0.9)
    return CombinedOptimizer(first, adam(rest, 0.01))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("maker", ["adamw", "ours-adamw", "combined"])
def test_schedules_of_torch(maker, schedule):
    make = combined if maker == "combined" else MAKERS[maker]
    make_schedule = SCHEDULES[schedule]
    game, hand = (run("all", make, freeze, b, schedule=make_schedule) for b in (True, False))
    assert same(game, hand)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_combined_optimizers_are_scheduled_as_alone(schedule):
    "Rates and the cycled momentum, or first decay, are those of each optimizer under its own."

    class Both:
        def __init__(self, parts):
            self.parts = parts

        def step(self, *args):
            for part in self.parts:
                part.step(*args)

    ends = []
    for together in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s, dtype=F64)) for s in ((3, 2), (4,), (2, 2))]
        optimizer, make = combined(params), SCHEDULES[schedule]
        if together:
            schedules = make(optimizer)
        else:
            schedules = Both([make(o) for o in optimizer.optimizers])
        for t in range(12):
            for p in params:
                p.grad = (p + t).sin()
            optimizer.step()
            schedules.step(*[1.0] * (schedule == "plateau"))
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends))


def test_combined_groups():
    a, b, c = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))
    opt = CombinedOptimizer(Muon([a]), optim.Adam([b]))
    with pytest.raises(ValueError, match=r"cannot know which of its optimizers \(Muon, Adam\)"):
        opt.add_param_group({"params": [c]})
    opt.optimizers[1].add_param_group({"params": [c], "lr": 0.5})
    assert [group["lr"] for group in opt.param_groups] == [2e-2, 1e-3, 0.5]
    schedule = lrs.ExponentialLR(opt, 0.5)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    before = c.detach().clone()
    opt.step()
    schedule.step()
    assert not torch.equal(c, before) and opt.param_groups[2]["lr"] == 0.25
    opt.zero_grad()
    assert c.grad is None
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert [type(o) for o in other.optimizers] == [Muon, optim.Adam]
        assert len(other.param_groups) == 3 and opt.defaults.items() <= other.defaults.items()
    smaller = CombinedOptimizer(Muon([a]), optim.Adam([b]))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        smaller.load_state_dict(opt.state_dict())
    assert CombinedOptimizer(torch.optim.Adam([a]), optim.AdamW([b])).defaults["betas"]
    assert "momentum" not in CombinedOptimizer(Muon([a]), torch.optim.Adagrad([b])).defaults


# A rule sees a game without the tensors that are frozen or that nothing reaches.
RULES = {
    "simultaneous": lambda: None,
    "alternating": lambda: Alternating(repeats={"D": 2}),
    "extragradient": lambda: Extragradient(),
    "past": lambda: Extragradient(past=True),
    "optimistic": lambda: Optimistic(),
    "lookahead": lambda: Lookahead(Extragradient(), every=2),
    "clipped": lambda: Clipped(0.2),
    "consensus": lambda: Consensus(0.2),
    "feedback": lambda: Feedback("G", "D", "D", 0.3),
    "smoothing": lambda: Feedback("D", "D", "G", 0.3),
    "list": lambda: [Feedback("G", "D", "D", 0.3), Consensus(0.1)],
    "symplectic": lambda: SymplecticAdjustment(0.3, align=False),
    "unrolled": lambda: Unrolled("D", 2),
    "competitive": lambda: CompetitiveGradient(iterations=3),
}


def duel(rule, extended, seed=0):
    """Return the weights and losses of two players, with two more tensors each if `extended`."""
    g = generator(seed)
    x, y, fixed = (torch.randn(3, generator=g, dtype=F64) for _ in range(3))
    A = torch.randn(3, 3, generator=g, dtype=F64)
    x, y = x.requires_grad_(), y.requires_grad_()
    f, h = fixed.clone().requires_grad_(), fixed.clone().requires_grad_()
    more = [torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2)]

    def loss_g(b):
        return x @ A @ y.tanh() + (x**2).sum() * (f[0] ** 2) + b

    def loss_d(b):
        return -x @ A @ y.tanh() + (y**4).sum() + h[1] * y.sum() + b

    def adam(*params):
        return torch.optim.AdamW(params, lr=0.05, weight_decay=0.3)

    if extended:
        players = {
            "G": Player([f, x, more[0]], loss_g, adam(f, x, more[0])),
            "D": Player([y, more[1], h], loss_d, adam(y, more[1], h)),
        }
    else:
        players = {"G": Player([x], loss_g, adam(x)), "D": Player([y], loss_d, adam(y))}
    for p in (f, h):
        p.requires_grad_(False)
    game, losses = Game(rule=rule, **players), []
    watch = NonFiniteWatch()
    for t in range(5):
        found = game.step(torch.tensor(t, dtype=F64))
        losses += [found["G"].item(), found["D"].item()]
        watch.update(t, found, game)
    watch.check(game)
    assert all(torch.equal(p, torch.ones_like(p)) and p.grad is None for p in more)
    assert torch.equal(f, fixed) and torch.equal(h, fixed)
    return torch.cat([x, y]).detach(), torch.tensor(losses)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_does_not_see_what_stands_still(rule):
    for seed in range(2):
        (weights, losses), (expected, values) = (
            duel(RULES[rule](), b, seed) for b in (True, False)
        )
        assert (weights - expected).abs().max() < 1e-13 and torch.equal(losses, values)


@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_player_stands_still_and_others_go_on(rule):
    "The mover takes the steps that it takes when the other's tensors are constants."
    x, y = (torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True) for _ in range(2))
    z = y.detach().clone()
    game = Game(
        G=Player([x], lambda b: (x * y).sum() + (x**4).sum(), torch.optim.SGD([x], 0.1)),
        D=Player([y], lambda b: -(x * y).sum() + (y**4).sum(), torch.optim.SGD([y], 0.1)),
        rule=RULES[rule](),
    )
    y.requires_grad_(False)
    for _ in range(3):
        losses = game.step(None)
    assert torch.equal(y, z) and losses.keys() == {"G", "D"}
    start = x.detach().clone()
    y.requires_grad_(True)
    for _ in range(2):
        game.step(None)
    assert not torch.equal(y, z) and not torch.equal(x, start)
    x.requires_grad_(False), y.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters of the game are frozen"):
        game.step(None)


@pytest.mark.parametrize("rule", RULES)
def test_complex_tensors_move_as_pairs_of_reals(rule):
    g = generator(0)
    start = torch.randn(2, 3, 2, generator=g, dtype=F64)
    a = torch.randn(3, 2, generator=g, dtype=F64)
    ends = []
    for complex_ in (True, False):
        x, y = start.clone()
        x, y = (torch.view_as_complex(t) if complex_ else t for t in (x, y))
        x, y = x.requires_grad_(), y.requires_grad_()

        def loss_g(b, x=x, y=y, view=torch.view_as_real if complex_ else lambda t: t):
            return (view(x) * view(y) * a).sum() + (view(x) ** 2).sum() / 4

        def loss_d(b, x=x, y=y, view=torch.view_as_real if complex_ else lambda t: t):
            return -(view(x) * view(y) * a).sum() + (view(y) ** 2).sum() / 4

        game = Game(
            G=Player([x], loss_g, torch.optim.SGD([x], 0.05)),
            D=Player([y], loss_d, torch.optim.SGD([y], 0.05)),
            rule=RULES[rule](),
        )
        for _ in range(4):
            game.step(None)
        ends.append([torch.view_as_real(t) if complex_ else t for t in (x.detach(), y.detach())])
    assert all((p - q).abs().max() < 1e-14 for p, q in zip(*ends))


def test_tensors_that_a_list_did_not_have():
    "A tensor added to the optimizer moves, is saved, and belongs to one player."
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    opt = torch.optim.SGD([a], 0.1)
    game = Game(
        x=Player([a], lambda _: (a * b * c).sum(), opt),
        y=Player([c], lambda _: -(a * c).sum(), torch.optim.SGD([c], 0.1)),
    )
    opt.add_param_group({"params": [b], "lr": 0.2})
    game.step(None)
    assert torch.allclose(b, torch.full((2,), 0.8)) and list(game.players["x"].params) == ["0", "1"]
    assert game.state_dict()["x"]["weights"].keys() == {"0", "1"}
    opt.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match="'0' of player 'y' belongs to player 'x' too"):
        game.step(None)


def test_a_tensor_that_was_frozen_from_the_start():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2)
    opt = torch.optim.SGD([a, b], 0.1)
    game = Game(x=Player([a, b], lambda _: (a * b).sum(), opt))
    game.step(None)
    assert list(game.state_dict()["x"]["weights"]) == ["0"] and torch.equal(b, torch.ones(2))
    b.requires_grad_(True)
    game.step(None)
    assert torch.allclose(b, torch.full((2,), 0.91)) and "1" in game.state_dict()["x"]["weights"]
    b.requires_grad_(False)
    assert not opt.zero_grad() and list(game.players["x"].params) == ["0"]


def test_a_stale_gradient_does_not_move_a_frozen_tensor():
    a = torch.ones(1, requires_grad=True)
    b = torch.ones(1, requires_grad=True)
    game = Game(x=Player([a, b], lambda _: (a * b).sum(), torch.optim.SGD([a, b], 0.1, momentum=1)))
    game.step(None)
    b.requires_grad_(False)
    game.step(None)
    assert b.grad is None and torch.allclose(b, torch.tensor([0.9]))


def test_tied_weights_and_buffers():
    "A tied weight is one parameter, and a state restores it and the buffers."

    def new():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        model[2].weight = model[0].weight
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return Game(m=Player(model, lambda x: model(x).square().mean(), optimizer)), model

    (game, model), (_, hand), (later, restored) = new(), new(), new()
    x = torch.randn(5, 3, dtype=F64)
    opt = torch.optim.SGD(hand.parameters(), 0.1, momentum=0.9)
    for t in range(4):
        game.step(x)
        opt.zero_grad()
        hand(x).square().mean().backward()
        opt.step()
        if t == 1:
            later.load_state_dict(copy.deepcopy(game.state_dict()))
        elif t > 1:
            later.step(x)
    for other in (hand, restored):
        pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("rule", [*RULES][:8])
def test_sparse_gradients(rule):
    "They reach optimizers that take them, through every rule of the first order and more."
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=sparse).double()
        optimizer = torch.optim.SGD(table.parameters(), 0.01)
        rules = RULES | {"alternating": Alternating}
        game = Game(m=Player(table, lambda i: (table(i) ** 3).sum(), optimizer), rule=rules[rule]())
        for _ in range(3):
            game.step(torch.tensor([1, 3, 1]))
        watch = NonFiniteWatch()
        watch.update(0, game.step(torch.tensor([0])), game)
        watch.check(game)
        ends.append(table.weight.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-14


def test_compiled_modules_and_two_precisions():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    low = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)

    def game_of(net, module):
        b = low.detach().clone().requires_grad_()
        params = [*module.parameters(), b]
        module.b = nn.Parameter(b)
        return Game(
            m=Player(
                module,
                lambda x: net(x).square().mean() * module.b.float().square().sum(),
                torch.optim.SGD([*params[:2], module.b], 0.1),
            )
        )

    first, second = game_of(compiled, model), game_of(twin, twin)
    for _ in range(2):
        x = torch.ones(4, 3)
        assert torch.allclose(first.step(x)["m"], second.step(x)["m"])
    assert torch.allclose(model.weight, twin.weight) and model.b.dtype == torch.bfloat16
    whole = Player(compiled, None, torch.optim.SGD(compiled.parameters(), 0.1))
    assert list(whole.params)[0].endswith("weight")


# What is refused
def linear():
    """Return a layer and its gradient descent."""
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), 0.1)


def step_of(loss, wrap=lambda step: step(torch.ones(4, 2)), **kwargs):
    """Take a step of a layer with a loss, a function of (model, batch)."""
    model, opt = linear()
    wrap(Game(m=Player(model, lambda x: loss(model, x), opt), **kwargs).step)


def unfrozen_elsewhere():
    """Unfreeze a layer that the optimizer does not have."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    opt = torch.optim.SGD(model[1].parameters(), 0.1)
    game = Game(net=Player(model, lambda x: model(x).mean(), opt))
    game.step(torch.ones(1, 2))
    model[0].weight.requires_grad_(True)
    game.step(torch.ones(1, 2))


def replaced_head():
    """Replace a layer without a word to the optimizer."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    game = Game(
        net=Player(model, lambda x: model(x).mean(), torch.optim.SGD(model.parameters(), 0.1))
    )
    model[1] = nn.Linear(2, 1)
    game.step(torch.ones(1, 2))


def foreign_group():
    """Give the optimizer of a module a tensor that is not the module's."""
    model, opt = linear()
    game = Game(net=Player(model, lambda x: model(x).mean(), opt))
    opt.add_param_group({"params": [torch.ones(7, requires_grad=True)]})
    game.step(torch.ones(1, 2))


def toggling(order):
    """Freeze and unfreeze the other player in the losses, as GAN scripts do."""
    G, D = (nn.Linear(2, 2) for _ in range(2))

    def loss_g(x):
        D.requires_grad_(False)
        return D(G(x)).mean()

    def loss_d(x):
        D.requires_grad_(True)
        return D(x).mean() - D(G(x).detach()).mean()

    players = {
        "G": Player(G, loss_g, torch.optim.SGD(G.parameters(), 0.1)),
        "D": Player(D, loss_d, torch.optim.SGD(D.parameters(), 0.1)),
    }
    game = Game(**{name: players[name] for name in order})
    for _ in range(2):
        game.step(torch.ones(3, 2))


def under(context):
    """Return a wrapper that takes a step in a context."""

    def wrap(step):
        with context:
            step(torch.ones(4, 2))

    return wrap


def scaled(operations, **kwargs):
    """Step on a loss that a GradScaler has scaled, after further operations."""
    scaler = torch.amp.GradScaler("cpu", **kwargs)
    step_of(lambda m, x: operations(scaler, m(x).square().mean()))


class NeedsClosure(torch.optim.SGD):
    """An optimizer of another package."""

    def step(self, closure):
        """Evaluate the loss again."""


def mean(m, x):
    """Return a loss."""
    return m(x).mean()


def player(params, optimizer, loss=None):
    """Return a function that makes a player from functions of a model and its optimizer."""

    def make():
        model, opt = linear()
        return Player(params(model, opt), loss, optimizer(model, opt))

    return make


def table_step(make_optimizer):
    """Take a step on the sparse gradient of a table."""
    table = nn.Embedding(3, 2, sparse=True)
    loss_player = Player(table, lambda i: table(i).sum(), make_optimizer(table.parameters()))
    Game(m=loss_player).step(torch.tensor([0]))


def model(m, o):
    """Return the model."""
    return m


def opt(m, o):
    """Return the optimizer."""
    return o


def lazy_player():
    """Make a player of a layer that has no shape."""
    layer = nn.LazyLinear(3)
    return Player(layer, None, torch.optim.SGD(layer.parameters(), 0.1))


OPT = "is an object that steps its parameters, as in .*; got a "
LIST = "a player's params are a module or a list of tensors, got "
SCALED = "loss of player 'm' is scaled by a GradScaler, .* bfloat16"
BY_NAME = {
    "unfrozen layer": (unfrozen_elsewhere, r"player 'net' .* misses 1 .*'0.weight'"),
    "replaced layer": (replaced_head, r"steps 2 .*misses 2 .*'1.weight', '1.bias'"),
    "foreign group": (foreign_group, r"steps 1 tensors .*one of shape \(7,\)"),
    "loss unfreezes": (partial(toggling, "DG"), "'D' unfreezes its parameters within the step"),
    "loss freezes all": (
        lambda: step_of(lambda m, x: mean(m.requires_grad_(False), x)),
        "'m' freezes a parameter within the step",
    ),
    "loss freezes one": (
        lambda: step_of(lambda m, x: mean(m, x) + m.bias.requires_grad_(False).sum()),
        "'m' freezes a parameter within the step",
    ),
    "no_grad": (lambda: step_of(mean, under(torch.no_grad())), "gradients are switched off"),
    "inference": (lambda: step_of(mean, under(torch.inference_mode())), "switched off"),
    "complex loss": (lambda: step_of(lambda m, x: mean(m, x) * 1j), "'m' is complex"),
    "scaled": (lambda: scaled(lambda s, v: s.scale(v)), SCALED),
    "scaled, divided": (lambda: scaled(lambda s, v: s.scale(v) / 4), SCALED),
    "scaled sum": (lambda: scaled(lambda s, v: s.scale(v) + s.scale(2 * v)), SCALED),
    "scaled and added": (lambda: scaled(lambda s, v: 0.5 * s.scale(v + 1) - 1), SCALED),
    "lbfgs": (
        player(model, lambda m, o: torch.optim.LBFGS(m.parameters())),
        "LBFGS evaluates the loss itself",
    ),
    "closure": (
        player(model, lambda m, o: NeedsClosure(m.parameters(), 0.1)),
        "NeedsClosure evaluates the loss itself",
    ),
    "combined closure": (
        lambda: CombinedOptimizer(torch.optim.LBFGS([nn.Parameter(torch.ones(1))])),
        "LBFGS evaluates the loss itself",
    ),
    "lazy": (lazy_player, "'weight' has no shape yet: run the model"),
}
BY_TYPE = {
    "combined list": (lambda: CombinedOptimizer([linear()[1]]), "one by one.*got a list"),
    "combined class": (lambda: CombinedOptimizer(torch.optim.SGD), "one by one.*got a type"),
    "class": (player(model, lambda m, o: torch.optim.SGD), OPT + "type"),
    "partial": (player(model, lambda m, o: MAKERS["sgd"]), OPT + "partial"),
    "swapped": (player(model, lambda m, o: mean), OPT + "function"),
    "schedule": (player(model, lambda m, o: lrs.StepLR(o, 1)), OPT + "StepLR"),
    "optimizers": (player(model, lambda m, o: [o]), OPT + "list"),
    "no optimizer": (player(model, lambda m, o: None), OPT + "NoneType"),
    "one tensor": (player(lambda m, o: m.weight, opt), LIST + "one tensor"),
    "named": (player(lambda m, o: m.named_parameters(), opt), LIST + "a list with a tuple"),
    "groups": (player(lambda m, o: o.param_groups, opt), LIST + "a list with a dict"),
    "number": (player(lambda m, o: 3, opt), LIST + "a int"),
    "no loss": (lambda: Game(m=player(model, opt)()).step(None), "'m' is a NoneType, not a func"),
    "not a player": (lambda: Game(m=nn.Linear(1, 1)), r"'m' is a Linear: write Game\(m=Player"),
    "draw": (lambda: step_of(mean, draw=3), "draw must be a function"),
    "sparse, ours": (lambda: table_step(optim.Adam), "Adam cannot step on a sparse gradient"),
    "sparse, muon": (lambda: table_step(Muon), "Muon cannot step on a sparse gradient"),
    "group of a list": (
        lambda: optim.Adam([nn.Parameter(torch.ones(1))]).add_param_group([1]),
        "must be a dict with params, got a list",
    ),
}
REFUSED = [(name, ValueError, *case) for name, case in BY_NAME.items()]
REFUSED += [(name, TypeError, *case) for name, case in BY_TYPE.items()]


@pytest.mark.parametrize("name, kind, make, message", REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_by_name(name, kind, make, message):
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_loss_that_calls_backward_is_named():
    def loss(m, x):
        value = m(x).square().mean()
        value.backward()
        return value

    with pytest.raises(RuntimeError, match="'m' cannot be differentiated: return the loss without"):
        step_of(loss)


def test_not_refused():
    "What looks like a refused case, and is none."
    toggling("GD")
    scaled(lambda s, v: s.scale(v), enabled=False)
    weight = torch.tensor(65536.0)
    torch.amp.GradScaler("cpu").scale(torch.ones(1))
    step_of(lambda m, x: weight * m(x).square().mean())
    step_of(lambda m, x: m(x).square().mean() * torch.tensor(2.0) + 1)


# States
def test_states_of_grown_groups():
    "A state with an added group needs the group first; then the runs agree to the bit."

    def new(grown):
        torch.manual_seed(0)
        net = Net().double()
        optimizer = torch.optim.Adam(without_body(net), 0.01)
        game = Game(m=Player(net, lambda x: net(x).square().mean(), optimizer))
        if grown:
            unfreeze_and_add(4, net, optimizer)
        return game

    x = torch.ones(4, 3, dtype=F64)
    whole = new(grown=True)
    whole.step(x)
    state = copy.deepcopy(whole.state_dict())
    late, before = new(grown=False), new(grown=False)
    with pytest.raises(
        ValueError, match=r"groups of \[3, 2\] tensors, and this player's has \[3\]"
    ):
        late.load_state_dict(state)
    assert same(late.players["m"].module, before.players["m"].module)
    late = new(grown=True)
    late.load_state_dict(state)
    late.step(x), whole.step(x)
    assert same(late.players["m"].module, whole.players["m"].module)


def test_a_memory_of_other_parameters():
    "What a rule remembers is forgotten when parameters change, and refused when it is loaded."

    def new():
        torch.manual_seed(0)
        net = Net().double()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loss_player = Player(net, lambda x: net(x).square().mean(), optimizer)
        return Game(m=loss_player, rule=Lookahead(Extragradient(past=True), every=3)), net

    x = torch.ones(4, 3, dtype=F64)
    game, net = new()
    game.step(x), game.step(x)
    state = copy.deepcopy(game.state_dict())
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    net.body.requires_grad_(False)
    game.step(x), game.step(x)
    assert torch.equal(net.body.weight, weights["body.weight"])
    assert len(game.rule.memory["slow"]["m"]) == 3 and game.rule.memory["count"] == 1
    with pytest.raises(
        ValueError, match="memory 'slow' of the rule Lookahead is of other parameters"
    ):
        game.load_state_dict(state)
    net.body.requires_grad_(True)
    game.load_state_dict(state)
    other, twin = new()
    other.load_state_dict(state)
    game.step(x), other.step(x)
    assert same(net, twin)


@pytest.mark.parametrize("rule", ["past", "optimistic", "lookahead", "competitive"])
def test_memories_with_none_go_through_a_file(rule, tmp_path):
    ends = []
    for saved in (False, True):
        a, b, spare = (torch.full((2,), x, requires_grad=True) for x in (1.0, -0.5, 3.0))

        def new(a=a, b=b, spare=spare):
            opt = torch.optim.AdamW([spare, a], 0.1, weight_decay=0.5)
            return Game(
                G=Player([spare, a], lambda _: (a * b).sum() + a.square().sum(), opt),
                D=Player([b], lambda _: -(a * b).sum(), torch.optim.SGD([b], 0.1)),
                rule=RULES[rule](),
            )

        game = new()
        game.step(None), game.step(None)
        if saved:
            checkpoint.save(tmp_path / "game.pt", game.state_dict())
            game = new()
            game.load_state_dict(checkpoint.load(tmp_path / "game.pt"))
        game.step(None), game.step(None)
        assert torch.equal(spare, torch.full((2,), 3.0))
        ends.append(torch.cat([a, b]).detach())
    assert torch.equal(*ends)


def test_a_rule_of_ones_own_forgets_fields_alone():
    class Counting(Rule):
        def direction(self, at):
            count = self.memory.get("count", 0) + 1
            self.memory = {"count": count, "last": at.v.clone()}
            return at.v

    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    player = Player([a, b], lambda _: (a * b).sum(), torch.optim.SGD([a, b], 0.1))
    game = Game(x=player, rule=Counting())
    game.step(None)
    b.requires_grad_(False)
    game.step(None)
    assert game.rule.memory["count"] == 2 and len(game.rule.memory["last"]["x"]) == 1


def test_the_watch_follows_what_is_frozen_and_added():
    "The first bad step and tensor are named, whichever set of parameters it belongs to."
    for bad_step in range(6):
        a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
        opt = torch.optim.SGD([a], 0.1)
        game = Game(x=Player([a], lambda s: (s * a * b.detach() + s * a * b).sum(), opt))
        b.requires_grad_(False)
        watch = NonFiniteWatch()
        for t in range(6):
            b.requires_grad_(t % 3 == 2)
            opt.param_groups[0]["params"] = [a, b] if t % 3 == 2 else [a]
            bad = torch.tensor(float("nan") if t == bad_step else 1.0)
            watch.update(t, game.step(bad), game)
        count = 2 if bad_step % 3 == 2 else 1
        with pytest.raises(NonFinite, match=rf"step {bad_step}: the loss .*\(and {count} more\)"):
            watch.check(game)


def kinked(bad_step, b):
    """Return a loss whose gradient by `b` is not finite in one step, where the loss is."""

    def loss(t):
        """Return the loss of step t."""
        kink = (b - b.detach()).abs().sqrt().sum()
        return b.sum() + (kink if t == bad_step else 0.0)

    return loss


@pytest.mark.parametrize("bad_step", [1, 2, 63, 64, 65, 70])
@pytest.mark.parametrize("rule", ["simultaneous", "alternating", "optimistic", "lookahead"])
def test_the_watch_names_a_bad_gradient_by_the_next_loss(rule, bad_step):
    "A gradient is read only then, and in every 64th step."
    rules = RULES | {"alternating": Alternating}
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizers = [torch.optim.SGD([p], 0.01) for p in (a, b)]
    game = Game(
        a=Player([a], lambda t: a.square().sum(), optimizers[0]),
        b=Player([b], kinked(bad_step, b), optimizers[1]),
        rule=rules[rule](),
    )
    watch = NonFiniteWatch()
    game.on_loss = watch.see_loss
    for t in range(1, 71):
        watch.update(t, game.step(t), game)
        if t < bad_step:
            assert len(watch.rows) == t // 64
    more = r" \(and 1 more\)" if rule == "extragradient" else ""
    with pytest.raises(NonFinite, match=rf"step {bad_step}: the .* of .*'b' is not finite{more}$"):
        watch.check(game)


class SkipsBadGradients(torch.optim.SGD):
    """Gradient descent that leaves a step out whose gradient is not finite."""

    def step(self, closure=None):
        """Take a step, or leave it out."""
        if all(p.grad.isfinite().all() for p in self.param_groups[0]["params"]):
            super().step(closure)


def always_kinked(b, t):
    """Return a finite loss whose gradient is not."""
    return kinked(t, b)(t)


def test_the_watch_finds_in_time_what_no_loss_shows():
    "The optimizer skips bad gradients; every 64th step is read, and the last one at a check."
    for last in (63, 64, 65):
        b = torch.ones(2, requires_grad=True)
        game = Game(b=Player([b], partial(always_kinked, b), SkipsBadGradients([b], 0.1)))
        watch = NonFiniteWatch()
        game.on_loss = watch.see_loss
        for t in range(1, last + 1):
            watch.update(t, game.step(t), game)
        with pytest.raises(NonFinite, match=f"step {min(last, 64)}: the gradient of '0' of player"):
            watch.check(game)


def test_averages_of_a_frozen_layer():
    "An average holds all parameters of a module, frozen ones too."
    model = Net()
    params = without_body(model)
    game = Game(m=Player(model, lambda x: model(x).square().mean(), torch.optim.SGD(params, 0.1)))
    average = Average(model, 0.5)
    game.step(torch.ones(2, 3))
    average.update()
    assert len(average.means) == 5


def test_parameters_are_read_anew_whatever_changes_between_steps():
    """Names are read only where a tensor is another one; what is found is the same."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    game = Game(net=Player(net, lambda x: net(x).sum(), optimizer))
    player, x = game.players["net"], torch.ones(2, 3)

    def check():
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        game.step(x)
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        assert list(player.last_params) == list(trained)
        assert all(player.last_params[name] is p for name, p in trained.items())
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= trained.keys() and any(name.startswith("head") for name in moved)

    check()
    check()
    net.body.requires_grad_(False)
    check()
    net.body.requires_grad_(True)
    check()
    net.body.requires_grad_(False)
    player.load_state_dict(player.state_dict())
    net.body.requires_grad_(True)
    check()
    net.head = nn.Linear(4, 1)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    check()
    net.more = nn.Linear(1, 1)
    optimizer.add_param_group({"params": net.more.parameters()})
    check()
    net.head.bias = None
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups[1:] = []
    optimizer.param_groups[0]["params"] = [p for p in kept if any(p is q for q in net.parameters())]
    check()


def test_names_are_read_once():
    net, calls = Net(), []
    game = Game(net=Player(net, lambda x: net(x).sum(), torch.optim.SGD(net.parameters(), lr=0.1)))
    read = type(game.players["net"]).named_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "named_tensors", lambda self: calls.append(0) or read(self))
        for _ in range(5):
            game.step(torch.ones(2, 3))
    assert len(calls) <= 2
