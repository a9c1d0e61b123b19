"""Our optimizers beside torch.optim's: trajectories, states, errors, devices and precisions."""

import copy
import functools
import inspect
import io
import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from optgen import optim
from optgen.optim import SGD, Adam, AdamW, Momentum, RMSProp
from optgen.testing import generator, randn

STEPS = 100
# ours, torch's, options
SETTINGS = {
    "sgd": (SGD, "SGD", dict()),
    "sgd-decay": (SGD, "SGD", dict(weight_decay=0.1)),
    "sgd-maximize": (SGD, "SGD", dict(maximize=True, weight_decay=0.1)),
    "momentum": (Momentum, "SGD", dict(momentum=0.9)),
    "momentum-dampened": (SGD, "SGD", dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "nesterov": (Momentum, "SGD", dict(momentum=0.9, nesterov=True)),
    "nesterov-decay": (SGD, "SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    "rmsprop": (RMSProp, "RMSprop", dict()),
    "rmsprop-momentum-decay": (RMSProp, "RMSprop", dict(momentum=0.9, weight_decay=0.1)),
    "rmsprop-centered": (RMSProp, "RMSprop", dict(centered=True)),
    "rmsprop-all": (
        RMSProp,
        "RMSprop",
        dict(centered=True, momentum=0.9, weight_decay=0.1, alpha=0.9, maximize=True),
    ),
    "adam": (Adam, "Adam", dict()),
    "adam-decay": (Adam, "Adam", dict(weight_decay=0.1, betas=(0.5, 0.99))),
    "adam-amsgrad": (Adam, "Adam", dict(amsgrad=True, weight_decay=0.1)),
    "adam-decoupled": (Adam, "Adam", dict(decoupled_weight_decay=True, weight_decay=0.1)),
    "adam-maximize": (Adam, "Adam", dict(maximize=True, amsgrad=True)),
    "adamw": (AdamW, "AdamW", dict()),
    "adamw-all": (AdamW, "AdamW", dict(weight_decay=0.1, amsgrad=True, maximize=True, eps=1e-4)),
}
LR = {"SGD": 2e-4, "RMSprop": 1e-3, "Adam": 3e-3, "AdamW": 3e-3}


def normal(*shape, seed, dtype):
    """Return standard normal numbers, drawn in float64."""
    return randn(*shape, seed=seed).to(dtype)


def quadratic(dtype):
    """Return the start and the loss of a quadratic."""
    h, x = torch.logspace(0, 2, 6, dtype=dtype), normal(6, seed=0, dtype=dtype)
    return [x], lambda p, t: (h * p[0] ** 2).sum() / 2


def rosenbrock(dtype):
    """Return the start and the loss of Rosenbrock's function."""

    def loss(p, t):
        return ((1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2).sum()

    return [torch.tensor(-1.2, dtype=dtype), torch.tensor([1.0], dtype=dtype)], loss


def mlp(dtype):
    """Return the start and the loss of a perceptron."""
    X = normal(32, 5, seed=1, dtype=dtype)
    y = torch.randint(3, (32,), generator=generator(2))
    sizes = (8, 5), (8,), (3, 8), (3,)

    def loss(p, t):
        return nn.functional.cross_entropy(torch.tanh(X @ p[0].T + p[1]) @ p[2].T + p[3], y)

    return [normal(*s, seed=i + 3, dtype=dtype) / 2 for i, s in enumerate(sizes)], loss


def noisy(dtype):
    """Return the start and the loss of a quadratic with noisy gradients."""
    noise = normal(STEPS, 2, 3, seed=8, dtype=dtype)
    start = [normal(2, 3, seed=9, dtype=dtype), normal(2, 3, seed=10, dtype=dtype)]
    return start, lambda p, t: ((p[0] - p[1]) ** 2).sum() + ((p[0] + p[1]) * noise[t]).sum()


PROBLEMS = dict(quadratic=quadratic, rosenbrock=rosenbrock, mlp=mlp, noisy=noisy)


def follow(make, problem, dtype, steps=STEPS, absent=lambda i, t: False, nudge=0.0):
    """Return the parameters, (steps, n), after each step of the optimizer `make(params)`.

    There is no gradient where `absent(i, t)`; `nudge` stretches the start.
    """
    start, f = problem(dtype)
    params = [(x * (1 + nudge)).requires_grad_() for x in start]
    opt, path = make(params), []
    sign = -1 if opt.defaults["maximize"] else 1
    for t in range(steps):
        opt.zero_grad()
        (sign * f(params, t)).backward()
        for i, p in enumerate(params):
            if absent(i, t):
                p.grad = None
        opt.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path)


def apart(ours, theirs):
    """Return the largest distance between two paths, relative to the size of the second."""
    assert theirs.isfinite().all()
    return ((ours - theirs).norm(dim=1).double().max() / theirs.norm(dim=1).double().max()).item()


# Each side rounds at most 16 times a step, by 2^-24 (float64: 2^-53) of what it rounds; at worst
# such errors add up over the steps. Where the path itself magnifies a small change (a centered
# RMSProp divides by differences), torch's own path in float64 shows by how much.
# All other settings keep to 1e-12 in float64.
TOLERANCE = {torch.float64: STEPS * 16 * 2.0**-53, torch.float32: STEPS * 16 * 2.0**-24}


def torchs(setting):
    """Return what makes the optimizer of torch that a setting is compared with."""
    _, name, options = SETTINGS[setting]
    return partial(getattr(torch.optim, name), lr=LR[name], **options)


@functools.cache
def magnified(setting, problem, eps=1e-8):
    """Return the factor by which torch's path magnifies a small change of the start, at least 1."""
    nudged, path = (
        follow(torchs(setting), PROBLEMS[problem], torch.float64, nudge=nudge)
        for nudge in (eps, 0.0)
    )
    return max(1.0, apart(nudged, path) / eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_follows_torch(setting, problem, dtype):
    method, name, options = SETTINGS[setting]
    options = dict(lr=LR[name], **options)
    theirs = follow(torchs(setting), PROBLEMS[problem], dtype)
    tolerance = 1e-12
    if options.get("centered") or dtype != torch.float64:
        tolerance = TOLERANCE[dtype] * magnified(setting, problem)
    for foreach in (False, True, None):
        ours = follow(partial(method, **options, foreach=foreach), PROBLEMS[problem], dtype)
        assert apart(ours, theirs) <= tolerance, foreach


@pytest.mark.parametrize("foreach", (False, True, None))
@pytest.mark.parametrize("setting", SETTINGS)
def test_groups_and_missing_gradients(setting, foreach):
    method, name, options = SETTINGS[setting]

    def make(cls, more):
        """Return a function that makes an optimizer with three groups."""

        def grouped(p):
            opt = cls(
                [dict(params=p[:1], lr=LR[name] / 2), dict(params=p[1:3], weight_decay=0.03)],
                lr=LR[name],
                **more,
            )
            opt.add_param_group(dict(params=p[3:]))
            return opt

        return grouped

    def absent(i, t):
        return i == 3 or (i == 1 and t % 3 == 1) or (i == 0 and t < 5)  # never, at times, late

    theirs = follow(make(getattr(torch.optim, name), options), mlp, torch.float64, absent=absent)
    assert (
        apart(
            follow(
                make(method, options | dict(foreach=foreach)), mlp, torch.float64, absent=absent
            ),
            theirs,
        )
        <= 1e-12
    )


FUSED_SETTINGS = [name for name, (method, *_) in SETTINGS.items() if method is not RMSProp]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("setting", FUSED_SETTINGS)
def test_the_fused_form_is_torchs_to_the_last_bit(setting, dtype, seed):
    """Parameters come and go, and one is of a convolution in channels-last order."""
    method, name, options = SETTINGS[setting]
    ends = []
    for make in (method, partial(getattr(torch.optim, name), fused=True)):
        noise = generator(seed)
        shapes = ((300,), (7, 9), (), (4, 3, 2, 2))
        params = [torch.randn(shape, generator=noise).to(dtype) for shape in shapes]
        params[3] = params[3].contiguous(memory_format=torch.channels_last)
        params = [x.requires_grad_() for x in params]
        opt = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], lr=0.1, **options)
        for t in range(12):
            for i, x in enumerate(params):
                g = torch.randn(x.shape, generator=noise).to(dtype)
                x.grad = None if t and (i + t) % 4 == 0 else torch.empty_like(x).copy_(g)
            opt.step()
        ends.append((params, [opt.state[x] for x in params]))
    (ours, our_states), (theirs, their_states) = ends
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    for a, b in zip(our_states, their_states):
        assert a.keys() == {k for k, v in b.items() if v is not None}
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "arrange",
    (
        lambda x, g: (x, g.T.contiguous().T),
        lambda x, g: (x.T.contiguous().T, g),
        lambda x, g: (x, g[:1].expand(6, 4)),
        lambda x, g: (x, torch.stack([g, g], -1)[..., 0]),
        lambda x, g: (torch.stack([x, x], -1)[..., 0], g),
    ),
    ids=("transposed gradient", "transposed parameter", "expanded", "sliced", "sliced parameter"),
)
@pytest.mark.parametrize("setting", FUSED_SETTINGS)
def test_other_strides_step_the_right_entries(setting, arrange):
    """PyTorch's fused kernels read memory in order, whatever the strides."""
    method, name, options = SETTINGS[setting]
    ends = []
    for make in (method, partial(getattr(torch.optim, name), foreach=False)):
        x, g = arrange(
            normal(6, 4, seed=0, dtype=torch.float64), normal(6, 4, seed=1, dtype=torch.float64)
        )
        x = x.detach().requires_grad_()
        opt = make([x], lr=0.1, **options)
        for t in range(3):
            x.grad = g
            opt.step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", (SGD, Momentum, Adam, AdamW))
def test_the_fused_form_is_chosen_where_it_is_legal(method, monkeypatch):
    forms = []
    for form in ("reference_step", "foreach_step", "fused_step"):
        step = getattr(method, form)

        def note(self, *args, form=form, step=step, **options):
            forms.append(form)
            return step(self, *args, **options)

        monkeypatch.setattr(method, form, note)
    cases = (
        ({}, "fused_step"),
        ({"fused": True}, "fused_step"),
        ({"fused": False}, "foreach_step"),
        ({"foreach": True}, "foreach_step"),
        ({"foreach": False}, "reference_step"),
        ({"weight_decay": torch.tensor(0.1)}, "reference_step"),
        ({"differentiable": True}, "reference_step"),
    )
    for options, expected in cases:
        x = torch.ones(3, requires_grad="differentiable" not in options)
        opt = method([x], lr=0.1, **options)
        for _ in range(2):
            x.grad = torch.ones(3)
            opt.step()
        assert forms[-1] == expected, options


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("setting", SETTINGS)
def test_forms_agree_from_other_starts(setting, seed):
    method, name, options = SETTINGS[setting]

    def problem(dtype):
        return [normal(5, seed=100 + seed, dtype=dtype)], lambda p, t: (p[0].sin() * p[0]).sum()

    reference, *others = (
        follow(lambda p: method(p, lr=LR[name], foreach=foreach, **options), problem, torch.float64)
        for foreach in (False, True, None)
    )
    assert max(apart(reference, other) for other in others) <= 1e-12


@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16(setting):
    method, name, options = SETTINGS[setting]
    start, f = quadratic(torch.bfloat16)
    sign = -1 if options.get("maximize") else 1
    for foreach in (False, True):
        params = [start[0].clone().requires_grad_()]
        first = f(params, 0).item()
        opt = method(params, lr=2e-3 if name == "SGD" else 0.01, foreach=foreach, **options)
        for t in range(100):
            opt.zero_grad()
            (sign * f(params, t)).backward()
            opt.step()
        assert f(params, 0).item() < 0.5 * first
        assert (
            all(v.dtype == torch.bfloat16 for k, v in opt.state[params[0]].items() if k != "step")
            and params[0].dtype == torch.bfloat16
        )


@pytest.mark.parametrize(
    "method,name", ((Momentum, "SGD"), (RMSProp, "RMSprop"), (Adam, "Adam"), (AdamW, "AdamW"))
)
def test_bfloat16_autocast(method, name):
    def problem(dtype):
        start, f = mlp(dtype)

        def loss(p, t):
            with torch.autocast("cpu", torch.bfloat16):
                return f(p, t)

        return start, loss

    options = dict(lr=LR[name], **(dict(momentum=0.9) if name == "SGD" else {}))
    ours, theirs = (
        follow(lambda p: cls(p, **options), problem, torch.float32, 50)
        for cls in (method, getattr(torch.optim, name))
    )
    assert apart(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("setting", SETTINGS)
def test_complex(setting):
    method, name, options = SETTINGS[setting]

    def loss(p, t):
        return (
            ((p[0] if p[0].is_complex() else torch.view_as_complex(p[0])) - 1j).abs().pow(4).sum()
        )

    def problem(dtype):
        return [normal(4, 2, seed=3, dtype=dtype)], loss

    def complex_problem(dtype):
        x, f = problem(dtype)
        return [torch.view_as_complex(x[0])], f

    pairs = follow(lambda p: method(p, lr=LR[name], **options), problem, torch.float64, 50)
    theirs = follow(
        lambda p: getattr(torch.optim, name)(p, lr=LR[name], **options),
        complex_problem,
        torch.float64,
        50,
    )
    for foreach in (False, True, None):
        ours = follow(
            lambda p: method(p, lr=LR[name], foreach=foreach, **options),
            complex_problem,
            torch.float64,
            50,
        )
        assert (
            apart(ours, theirs) <= 1e-12
            and apart(torch.view_as_real(ours).flatten(1), pairs) <= 1e-12
        )


@pytest.mark.parametrize("foreach", (False, True, None))
@pytest.mark.parametrize("setting", SETTINGS)
def test_leaves_gradients_alone(setting, foreach):
    method, name, options = SETTINGS[setting]
    x, g = (
        normal(5, seed=0, dtype=torch.float64).requires_grad_(),
        normal(5, seed=1, dtype=torch.float64),
    )
    opt = method([x], lr=LR[name], foreach=foreach, **options)
    for _ in range(3):
        x.grad = g.clone()
        opt.step()
        assert torch.equal(x.grad, g)


@pytest.mark.parametrize(
    "method, name", ((SGD, "SGD"), (RMSProp, "RMSprop"), (Adam, "Adam"), (AdamW, "AdamW"))
)
def test_arguments_are_torchs(method, name):
    theirs = getattr(torch.optim, name)
    parameters = inspect.signature(theirs).parameters
    for ours, torchs in zip(inspect.signature(method).parameters.values(), parameters.values()):
        if ours.kind is ours.VAR_KEYWORD:
            break
        assert (ours.name, ours.kind, ours.default) == (torchs.name, torchs.kind, torchs.default)
    x = torch.zeros(1, requires_grad=True)
    defaults = {name: p.default for name, p in parameters.items() if name != "params"}
    assert method([x], **defaults).param_groups == theirs([x], **defaults).param_groups


def test_public_names():
    assert {"SGD", "Momentum", "RMSProp", "Adam", "AdamW"} <= set(optim.__all__)


def pull(opt, params, ts):
    """Take steps along a fixed field of gradients."""
    for t in ts:
        for p in params:
            p.grad = torch.sin(p.detach() * (t + 1))
        opt.step()


def stored(opt):
    """Return the state as a checkpoint returns it."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def handed_over(makers, dtype=torch.float64, n=10):
    """Return parameters and optimizer after `n` steps of each, from the state before."""
    params, opt = (
        [
            normal(4, seed=0, dtype=dtype).requires_grad_(),
            normal(2, 2, seed=1, dtype=dtype).requires_grad_(),
        ],
        None,
    )
    for i, make in enumerate(makers):
        new = make(params)
        if opt is not None:
            new.load_state_dict(stored(opt))
        opt = new
        pull(opt, params, range(i * n, (i + 1) * n))
    return torch.cat([p.detach().flatten() for p in params]), opt


@pytest.mark.parametrize("setting", SETTINGS)
def test_state_is_torchs(setting):
    method, name, options = SETTINGS[setting]
    theirs = partial(getattr(torch.optim, name), lr=0.01, **options)
    blank = partial(method, lr=0.7)
    alone, a = handed_over([theirs] * 3)
    mixed, b = handed_over([theirs, blank, theirs])
    assert (alone - mixed).abs().max() <= 1e-14
    ours, c = handed_over([lambda p: method(p, lr=0.01, **options)])
    fresh, d = handed_over([theirs])
    assert (
        ours.allclose(fresh, rtol=1e-12)
        and c.state_dict()["param_groups"] == d.state_dict()["param_groups"]
    )
    assert {i: list(s) for i, s in c.state_dict()["state"].items()} == {
        i: list(s) for i, s in d.state_dict()["state"].items()
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_state_round_trip_is_exact(setting):
    method, name, options = SETTINGS[setting]
    through, _ = handed_over(
        [
            lambda p: method(p, lr=0.01, **options),
            lambda p: method(p, lr=0.7),
            lambda p: method(p, lr=0.7),
        ]
    )
    without, _ = handed_over([lambda p: method(p, lr=0.01, **options)], n=30)
    assert torch.equal(through, without)


def test_state_of_fused_and_older_torch():
    theirs = partial(torch.optim.Adam, lr=0.01, fused=True)
    mixed, opt = handed_over([theirs, lambda p: Adam(p, lr=0.7)])
    alone, _ = handed_over([theirs] * 2)
    assert torch.equal(mixed, alone) and opt.param_groups[0]["fused"] is True
    x = torch.ones(2, requires_grad=True)
    old = torch.optim.Adam([x])
    pull(old, [x], range(3))
    state = old.state_dict()
    for key in (
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "decoupled_weight_decay",
        "fused",
    ):
        state["param_groups"][0].pop(key)
    state["state"][0]["step"] = 3  # a number, as it once was
    new = Adam([x])
    new.load_state_dict(state)
    pull(new, [x], range(1))
    assert new.state[x]["step"].item() == 4 and new.param_groups[0]["maximize"] is False


def test_amsgrad_switched_on_later():
    x = torch.ones(2, requires_grad=True)
    opt = Adam([x])
    pull(opt, [x], range(3))
    opt.param_groups[0]["amsgrad"] = True
    pull(opt, [x], range(3))
    assert (opt.state[x]["max_exp_avg_sq"] >= opt.state[x]["exp_avg_sq"]).all()


def test_deepcopy_and_pickle():
    x = torch.ones(3, requires_grad=True)
    opt = Adam([x])
    pull(opt, [x], range(3))
    twin = copy.deepcopy(opt)
    y = twin.param_groups[0]["params"][0]
    pull(opt, [x], range(3))
    pull(twin, [y], range(3))
    assert torch.equal(x, y) and x is not y


@pytest.mark.parametrize("method", (SGD, Momentum, RMSProp, Adam, AdamW))
def test_closure(method):
    x = torch.ones(3, requires_grad=True)
    opt = method([x], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss.item() == 3 and (x < 1).all() and opt.step() is None


@pytest.mark.parametrize("foreach", (False, True))
@pytest.mark.parametrize("setting", SETTINGS)
def test_tensor_learning_rate(setting, foreach):
    method, name, options = SETTINGS[setting]
    lr = torch.tensor([LR[name]], dtype=torch.float64)
    plain = follow(
        lambda p: method(p, lr=LR[name], foreach=foreach, **options), mlp, torch.float64, 50
    )
    assert (
        apart(
            follow(lambda p: method(p, lr=lr, foreach=foreach, **options), mlp, torch.float64, 50),
            plain,
        )
        <= 1e-12
    )
    x = torch.ones(2, requires_grad=True)
    lr = torch.tensor([0.5])
    opt = SGD([x], lr=lr)
    x.grad = torch.ones(2)
    lr.fill_(0.25)
    opt.step()
    assert torch.equal(x, torch.full((2,), 0.75))  # the user's own tensor, not a copy


def test_schedulers():
    def scheduled(library):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        opt = library.Adam([x], lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20)
        for t in range(20):
            pull(opt, [x], [t])
            schedule.step()
        return x.detach()

    assert scheduled(optim).allclose(scheduled(torch.optim), rtol=1e-13)


@pytest.mark.parametrize("foreach", (False, True))
@pytest.mark.parametrize("setting", [s for s, (m, n, _) in SETTINGS.items() if n != "SGD"])
def test_capturable_changes_nothing(setting, foreach):
    method, name, options = SETTINGS[setting]
    for dtype, tolerance in {**TOLERANCE, torch.float64: 1e-12}.items():
        plain = follow(lambda p: method(p, lr=LR[name], foreach=foreach, **options), mlp, dtype)
        assert (
            apart(
                follow(
                    lambda p: method(p, lr=LR[name], foreach=foreach, capturable=True, **options),
                    mlp,
                    dtype,
                ),
                plain,
            )
            <= tolerance
        )


@pytest.mark.parametrize("foreach", (False, True, None))
@pytest.mark.parametrize("setting", SETTINGS)
def test_meta(setting, foreach):
    """No value is read: on this device there is none."""
    method, name, options = SETTINGS[setting]
    x = torch.zeros(3, device="meta", requires_grad=True)
    opt = method(
        [x],
        lr=torch.zeros((), device="meta"),
        foreach=foreach,
        **options,
        **({} if name == "SGD" else dict(capturable=True)),
    )
    for _ in range(2):
        x.grad = torch.zeros_like(x)
        opt.step()
    assert all(v.is_meta for v in opt.state[x].values())


def test_step_count_lives_on_the_host():
    x = torch.zeros(3, device="meta", requires_grad=True)
    opt = Adam([x])
    x.grad = torch.zeros_like(x)
    opt.step()
    opt.step()
    assert opt.state[x]["step"].is_cpu and opt.state[x]["step"].item() == 2


def test_tensor_subclasses_take_the_reference_form():
    class Tagged(torch.Tensor):
        pass

    start = normal(4, seed=0, dtype=torch.float64)
    x, y = start.clone().as_subclass(Tagged).requires_grad_(), start.clone().requires_grad_()
    for p, opt in ((x, Adam([x], lr=0.1)), (y, Adam([y], lr=0.1))):
        pull(opt, [p], range(20))
    assert torch.allclose(x.detach().as_subclass(torch.Tensor), y.detach(), rtol=1e-12)


@pytest.mark.parametrize("method, finite", ((torch.optim.RMSprop, False), (RMSProp, True)))
def test_centered_stays_finite_where_torch_does_not(method, finite):
    g = torch.rand(500, generator=generator(4))
    x = torch.zeros(500, requires_grad=True)
    optimizer = method([x], centered=True, alpha=0.9)
    for _ in range(300):
        x.grad = g.clone()
        optimizer.step()
    assert x.isfinite().all() == finite


def test_negative_momentum_is_the_recursion():
    x, m, y = (
        torch.ones(3, dtype=torch.float64, requires_grad=True),
        0.0,
        torch.ones(3, dtype=torch.float64),
    )
    opt = Momentum([x], lr=0.1, momentum=-0.4)
    for t in range(30):
        pull(opt, [x], [t])
        m = -0.4 * m + torch.sin(y * (t + 1))
        y = y - 0.1 * m
    assert torch.allclose(x, y, rtol=1e-13)


@pytest.mark.parametrize(
    "method,options",
    (
        (SGD, dict(weight_decay=0.1)),
        (Momentum, dict(nesterov=True)),
        (RMSProp, dict(centered=True, momentum=0.3, alpha=0.5)),
        (Adam, dict(amsgrad=True)),
        (AdamW, {}),
    ),
)
def test_differentiable(method, options):
    def unrolled(lr, x):
        x = x.clone()
        opt = method([x], lr=lr, differentiable=True, **options)
        for _ in range(4):
            y = x.clone()
            (x.grad,) = torch.autograd.grad((y**4).sum() / 4, y, create_graph=True)
            opt.step()
        return x

    inputs = (
        torch.tensor(0.05, dtype=torch.float64, requires_grad=True),
        torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(unrolled, inputs)


X = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    "method,options,word",
    (
        (SGD, dict(lr=-1.0), "lr"),
        (SGD, dict(lr=math.nan), "lr"),
        (SGD, dict(momentum=-0.1), "momentum"),
        (SGD, dict(nesterov=True), "needs a momentum"),
        (SGD, dict(momentum=0.9, dampening=0.1, nesterov=True), "dampening"),
        (SGD, dict(weight_decay=-1), "weight_decay"),
        (Momentum, dict(momentum=1.0), "at least -1, below 1"),
        (Momentum, dict(momentum=-1.1), "momentum"),
        (RMSProp, dict(alpha=1.0), "alpha"),
        (RMSProp, dict(alpha=torch.tensor(0.9)), "alpha"),
        (RMSProp, dict(eps=-1), "eps"),
        (Adam, dict(betas=(0.9, 1.0)), "betas"),
        (Adam, dict(betas=(0.9,)), "pair"),
        (Adam, dict(betas=0.9), "pair"),
        (Adam, dict(lr="0.1"), "number"),
        (Adam, dict(lr=None), "number"),
        (Adam, dict(lr=torch.ones(2)), "one element"),
        (Adam, dict(fused=True, foreach=True), "two forms"),
        (Adam, dict(fused=True, differentiable=True), "fused"),
        (SGD, dict(fused=True, momentum=torch.tensor(0.5)), "fused"),
        (Adam, dict(params=[torch.ones(2, dtype=torch.cfloat)], fused=True), "complex64"),
        (AdamW, dict(params=[torch.ones(2, device="meta")], fused=True), "meta"),
        (Adam, dict(foreach=True, differentiable=True), "foreach"),
        (SGD, dict(foreach=True, momentum=torch.tensor(0.5)), "foreach"),
        (Adam, dict(params=[dict(params=[X], eps=-1)]), "eps"),
    ),
)
def test_bad_options(method, options, word):
    with pytest.raises((ValueError, TypeError)) as e:
        method(**{"params": [X], **options})
    assert word in str(e.value) and method.__name__ in str(e.value)


@pytest.mark.parametrize("method", (SGD, Momentum, RMSProp, Adam, AdamW))
def test_sparse_is_refused_before_anything_moves(method):
    dense, table = torch.ones(2, requires_grad=True), nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    opt = method([dict(params=[dense]), dict(params=table.parameters())], lr=0.1)
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=rf"{method.__name__}.*\(4, 2\).*sparse=False"):
        opt.step()
    assert torch.equal(dense, torch.ones(2)) and torch.equal(table.weight, before)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler on the host",
)
@pytest.mark.parametrize(
    "method,options",
    (
        SETTINGS["nesterov"][::2],
        SETTINGS["rmsprop-all"][::2],
        SETTINGS["adam-amsgrad"][::2],
        (Adam, dict(amsgrad=True, betas=(0.0, 0.0))),
    ),
)
def test_compiled_step(method, options):
    torch._dynamo.reset()

    def run(compiled):
        params = [
            normal(4, seed=0, dtype=torch.float64).requires_grad_(),
            normal(2, 2, seed=1, dtype=torch.float64).requires_grad_(),
        ]
        opt = method(params, lr=0.01, **options)
        step = torch.compile(opt.step) if compiled else opt.step
        for t in range(30):
            for p in params:
                p.grad = torch.sin(p.detach() * (t + 1) + 0.3)
            if compiled and t == 1:
                step = torch.compile(
                    opt.step, fullgraph=True
                )  # once the memory is there, in one graph
            step()
            tensors = [v.data_ptr() for p in params for v in (p, p.grad, *opt.state[p].values())]
            assert len(set(tensors)) == len(tensors)  # no memory serves twice
        return torch.cat([p.detach().flatten() for p in params])

    assert apart(run(True)[None], run(False)[None]) <= 1e-12


@pytest.mark.cuda
@pytest.mark.parametrize("setting", SETTINGS)
def test_cuda(setting):
    """Torch's path, without synchronization, and the same under graph capture."""
    method, name, options = SETTINGS[setting]
    capturable = {} if name == "SGD" else dict(capturable=True)

    def run(make, steps=30, captured=False, watched=False):
        params = [normal(40, seed=i, dtype=torch.float64).cuda().requires_grad_() for i in range(3)]
        opt = make(params)
        for p in params:
            p.grad = p.detach().clone()

        def turn():
            for p in params:
                p.grad.copy_(p.detach().sin())
            opt.step()

        if not captured:
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                for _ in range(steps):
                    turn()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    turn()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                turn()
            for _ in range(steps - 3):
                graph.replay()
        return torch.cat([p.detach() for p in params])[None].cpu()

    theirs = run(lambda p: getattr(torch.optim, name)(p, lr=LR[name], **options))
    for foreach in (False, True, None):
        assert (
            apart(
                run(lambda p: method(p, lr=LR[name], foreach=foreach, **options), watched=True),
                theirs,
            )
            <= 1e-12
        )
    assert (
        apart(run(lambda p: method(p, lr=LR[name], **options, **capturable), captured=True), theirs)
        <= 1e-12
    )
