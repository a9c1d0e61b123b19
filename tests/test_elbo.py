"BetaVAE of the installed package with every controller, estimator, inner optimizer and its two players: resumption, devices and dtypes, torch.compile, training by `fit`."

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.controllers import (
    Capacity,
    Constant,
    ControlVAE,
    Cyclical,
    FreeBits,
    Geco,
    LinearWarmup,
    SigmaVAE,
)
from optgen.data.images import Batch, Images, digits
from optgen.estimators import ESTIMATORS
from optgen.games import Game, Player
from optgen.inner import DECODER_PASSES, Refinement
from optgen.models.autoregressive import AutoregressiveVAE, SequenceVAE
from optgen.models.synthetic import synthetic_sequences
from optgen.models.vae import VAE, GaussianVAE
from optgen.optim import SGD, Adam
from optgen.rules import Alternating
from optgen.schemes.elbo import Aggressive, BetaVAE
from optgen.training import checkpoint
from optgen.training.trainer import fit

F64 = torch.float64
IMAGES = digits("train").images[:200, :, 4:28:3, 4:28:3].contiguous()

CONTROLLERS = {
    "constant": lambda: Constant(0.5),
    "warmup": lambda: LinearWarmup(7, 0.8),
    "cyclical": lambda: Cyclical(11, cycles=2),
    "capacity": lambda: Capacity(1.0, 9, 2.0),
    "free-bits": lambda: FreeBits(0.05),
    "free-bits-groups": lambda: FreeBits(0.1, groups=1),
    "geco": lambda: Geco(40.0, rate=0.01, smoothing=0.8),
    "control": lambda: ControlVAE(1.0, kp=0.1, ki=0.05),
    "sigma": lambda: SigmaVAE(64),
}
ESTIMATES = {
    "stl": dict(estimator="stl", k=2),
    "elbo-k": dict(k=3),
    **{
        f"{name}{' sampled' * sampled}": dict(estimator=name, k=3, sampled=sampled)
        for name in ("iwae", "dreg")
        for sampled in (False, True)
    },
}
PARTS = {  # what a BetaVAE is made of, by name
    **{name: lambda make=make: dict(beta=make()) for name, make in CONTROLLERS.items()},
    **{name: lambda kw=kw: kw for name, kw in ESTIMATES.items()},
    **{
        f"semi {mode}": lambda mode=mode: dict(inner=Refinement(2, mode=mode))
        for mode in DECODER_PASSES
    },
    "together": lambda: dict(optimizer=2),
    "alternating": lambda: dict(optimizer=2, rule=Alternating()),
    "aggressive": lambda: dict(optimizer=2, rule=Aggressive(2, 3, 4)),
    "sigma, alternating": lambda: dict(beta=SigmaVAE(64), optimizer=2, rule=Alternating()),
    "sigma, semi": lambda: dict(beta=SigmaVAE(64), inner=Refinement(2)),
    "geco, alternating, dreg": lambda: dict(
        beta=Geco(40.0, rate=0.01), optimizer=2, rule=Alternating(), estimator="dreg", k=2
    ),
    "free bits, aggressive, semi, iwae sampled": lambda: dict(
        beta=FreeBits(0.05),
        optimizer=2,
        rule=Aggressive(2, 3, 4),
        inner=Refinement(1),
        estimator="iwae",
        k=2,
        sampled=True,
    ),
}
everyone = pytest.mark.parametrize("name", PARTS)
calm = pytest.mark.parametrize(
    "name", [name for name in PARTS if "aggressive" not in name]
)  # those that read nothing on the host


def tiny(
    name,
    seed=0,
    dtype=torch.float32,
    device="cpu",
    make=lambda params: Adam(params, lr=3e-3),
    **more,
):
    parts = PARTS[name]() | more
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = (GaussianVAE if isinstance(parts.get("beta"), SigmaVAE) else VAE)(64, 12, 8, 3).to(
            dtype
        )
    two = parts.pop("optimizer", 1) == 2
    return BetaVAE(
        model,
        optimizer=tuple(make(net.parameters()) for net in (model.q_net, model.p_net))
        if two
        else make(model.parameters()),
        **parts,
    )


def batches(steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [IMAGES[torch.randperm(200, generator=g)[:16]] / 255 for _ in range(steps)]


def train(scheme, steps, seed=0):
    like = next(scheme.model.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        losses = [next(iter(scheme.step(Batch(x.to(like))).values())) for x in batches(steps, seed)]
    return torch.stack(losses)


def weights(scheme):
    return torch.cat([p.detach().flatten() for p in scheme.model.parameters()])


def same(a, b):
    "Are two states alike to the last bit?"
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_every_part_is_tried():
    import inspect

    from optgen import controllers

    offered = {
        c
        for _, c in inspect.getmembers(controllers, inspect.isclass)
        if issubclass(c, controllers.Controller)
    } - {controllers.Controller}
    assert {type(make()) for make in CONTROLLERS.values()} == offered
    assert {tiny(name).estimator for name in PARTS} == set(ESTIMATORS) and {
        s.inner.mode for name in PARTS if (s := tiny(name)).inner
    } == set(DECODER_PASSES)


@everyone
def test_the_controller_is_told_once_a_step(name):
    "However often the loss is evaluated."
    scheme = tiny(name)
    for steps in (1, 2, 3):
        train(scheme, 1, seed=steps)
        assert scheme.beta.t == steps


# State
@pytest.mark.parametrize("steps", [4, 9])
@everyone
def test_resumes_bit_for_bit_through_a_file(name, steps, tmp_path):
    one, other = tiny(name), tiny(name, seed=5)
    train(one, steps)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    x = IMAGES[:20] / 255
    assert torch.equal(one.reconstruct(x), other.reconstruct(x)) and one.evaluate(
        [Batch(x)]
    ) == other.evaluate([Batch(x)])
    assert torch.equal(train(one, 7, seed=1), train(other, 7, seed=1)) and same(
        one.state_dict(), other.state_dict()
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 13, 18, 19, 23])
def test_aggressive_resumes_from_anywhere(steps, tmp_path):
    "In a window, after one, and after it has ended."
    name = "aggressive"
    whole, one, other = (tiny(name, seed=seed) for seed in (0, 0, 5))
    data = [Batch(x) for x in batches(24)]

    def go(scheme, part):
        for batch in part:
            scheme.step(batch)

    for scheme in (whole, one):
        scheme.draw = lambda b, draw=scheme.draw: (torch.manual_seed(int(b.x.sum())), draw(b))[1]
    other.draw = lambda b, draw=other.draw: (torch.manual_seed(int(b.x.sum())), draw(b))[1]
    with torch.random.fork_rng():
        go(whole, data)
        go(one, data[:steps])
        checkpoint.save(tmp_path / "state.pt", one.state_dict())
        other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
        go(other, data[steps:])
    assert same(whole.state_dict(), other.state_dict())


def test_the_variance_comes_back(tmp_path):
    one, other = tiny("sigma"), tiny("sigma", seed=5)
    train(one, 5)
    assert 0 < one.beta.value < 0.3
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    assert other.model.variance == one.beta.value


@pytest.mark.parametrize("gone", [("beta",), ("beta", "rule")], ids=["0.2", "0.1"])
def test_states_of_earlier_versions_load(gone):
    one = tiny("constant")
    train(one, 3)
    old = copy.deepcopy({k: v for k, v in one.state_dict().items() if k not in gone})
    other = tiny("constant", seed=5)
    other.load_state_dict(old)
    assert old.keys() == one.state_dict().keys() - set(gone)
    assert torch.equal(train(one, 3, seed=1), train(other, 3, seed=1)) and torch.equal(
        weights(one), weights(other)
    )


@pytest.mark.parametrize("mine", CONTROLLERS)
def test_another_controllers_state_is_refused_and_nothing_changes(mine):
    scheme = tiny(mine)
    train(scheme, 2)
    for theirs in CONTROLLERS:
        if type(CONTROLLERS[theirs]()) is type(scheme.beta):
            continue
        other = tiny(theirs, seed=5)
        train(other, 3)
        before = copy.deepcopy(scheme.state_dict())
        with pytest.raises(
            ValueError,
            match=f"the controller {type(other.beta).__name__} .* this is {type(scheme.beta).__name__}",
        ):
            scheme.load_state_dict(other.state_dict())
        assert same(before, scheme.state_dict())


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda s: s | {"encoder": s["model"]}, "players"),
        (lambda s: s | {"rule": s["rule"] | {"name": "Aggressive"}}, "the rule Aggressive"),
        (
            lambda s: (
                s
                | {
                    "model": {
                        **s["model"],
                        "weights": {k: w[:1] for k, w in s["model"]["weights"].items()},
                    }
                }
            ),
            "shape",
        ),
    ],
)
def test_what_is_refused_leaves_the_controller(spoil, word):
    scheme, other = tiny("geco"), tiny("geco", seed=5)
    train(scheme, 2)
    train(other, 5)
    before = copy.deepcopy(scheme.state_dict())
    with pytest.raises(ValueError, match=word):
        scheme.load_state_dict(spoil(other.state_dict()))
    assert same(before, scheme.state_dict())


# Devices and dtypes
class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        return sum(op in ("_local_scalar_dense", "item", "is_nonzero", "equal") for op in self.seen)


@everyone
def test_runs_on_meta(name):
    scheme = tiny(name, device="meta")
    x = torch.ones(16, 1, 8, 8, device="meta")
    for _ in range(2):
        losses = scheme.step(Batch(x))
    assert losses.keys() == scheme.players.keys() and all(
        loss.is_meta and not loss.dim() for loss in losses.values()
    )
    assert (
        scheme.beta.value.is_meta
        and scheme.sample(3).is_meta
        and scheme.reconstruct(x).shape == x.shape
    )


@pytest.mark.parametrize("name", ["sigma", "sigma, semi", "sigma, alternating"])
@pytest.mark.parametrize(
    "where",
    [dict(dtype=F64), pytest.param(dict(device="cuda"), marks=pytest.mark.cuda)],
    ids=["float64", "cuda"],
)
def test_the_variance_goes_where_the_model_goes(name, where):
    scheme = tiny(name)
    train(scheme, 2)
    scheme.to(**where)
    assert all(
        t.device.type == where.get("device", "cpu") and t.dtype == where.get("dtype", torch.float32)
        for t in (scheme.model.variance, *scheme.model.parameters())
    )
    scheme.step(Batch((IMAGES[:16] / 255).to(**where)))


@everyone
def test_precision(name):
    "The same noise to all: double precision tells how far the others are off."
    found = {}
    for dtype, low in ((F64, False), (torch.float32, False), (torch.float32, True)):
        scheme = tiny(name).to(dtype)
        draw = scheme.draw

        def drawn(batch, draw=draw, dtype=dtype):
            noisy, g = draw(batch), torch.Generator().manual_seed(int(batch.x.sum()))
            return type(noisy)(
                noisy.x,
                *(
                    f(t.shape, generator=g, dtype=F64).to(dtype)
                    for f, t in zip((torch.randn, torch.rand, torch.randn), noisy[1:])
                ),
            )

        scheme.draw = drawn
        scheme.autocast = lambda low=low: torch.autocast("cpu", torch.bfloat16, enabled=low)
        found[dtype, low] = train(scheme, 5), scheme.beta.value
        assert weights(scheme).dtype == dtype and weights(scheme).isfinite().all()
    (exact, beta), (single, near), (half, far) = found.values()
    assert (
        exact.dtype == F64 == beta.dtype
        and single.dtype == half.dtype == near.dtype == far.dtype == torch.float32
    )
    assert torch.allclose(
        single.double(), exact, rtol=1e-4 if "difference" in name else 1e-5
    )  # a difference of losses has half the digits
    if name != "capacity":
        assert torch.allclose(half.double(), exact, rtol=2e-3)  # rounding may tip a sign
    assert torch.allclose(near.double(), beta, rtol=1e-4)


def plain(params):
    return SGD(params, lr=0.01)  # Adam counts its steps on the host


@calm
def test_a_step_reads_nothing_on_the_host(name):
    scheme = tiny(name, make=plain)
    train(scheme, 2)
    with Ops() as ops:
        train(scheme, 3)
    assert len(ops.seen) > 100 and ops.reads == 0


@pytest.mark.parametrize(
    "losses, information, moved",
    [
        ([2.0, 2.0, 9.0], [1.0], "eed"),
        ([2.0, 3.0, 9.0], [1.0], "eed"),
        ([4.0, 3.0, 2.0, 9.0], [1.0], "eeed"),
        (
            [4.0, 3.0, 2.0, 9.0, 5.0, 5.0, 9.0],
            [1.0, 2.0],
            "eeedeed",
        ),  # three moves at most; a tie is no fall
        (
            [1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 7.0, 7.0],
            [1.0, 1.0],
            "eedeed**",
        ),  # information that stays is no climb
        ([1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 7.0], [1.0, 2.0, 1.5], "eedeedeed*"),
    ],
)
def test_aggressive_moves_as_written(losses, information, moved):
    "Windows of one batch; `*` is a step of both, once the information no longer climbs."
    who = {name: torch.nn.Parameter(torch.zeros(())) for name in ("encoder", "decoder")}
    losses, told = iter(losses), iter(information)

    class Script(Game):
        def information(self, batch):
            return torch.tensor(next(told))

    game = Script(
        **{
            name: Player([p], lambda batch: batch + 0 * sum(who.values()), SGD([p], lr=1.0))
            for name, p in who.items()
        },
        draw=lambda b: next(losses),
        rule=Aggressive(check=1, most=3, window=1),
    )
    seen, apply = [], game.step_optimizers
    game.step_optimizers = lambda u: (
        seen.append("*" if len(u) == 2 else next(iter(u))[0]),
        apply(u),
    )
    for _ in moved:
        game.step(None)
    assert "".join(seen) == moved


def test_aggressive_reads_seldom():
    "One number every `check` batches and one every `window` moves of the decoder, until it ends; then none."
    scheme = tiny("constant", make=plain, optimizer=2, rule=Aggressive(check=5, most=10, window=2))
    moved = []
    apply = scheme.step_optimizers
    scheme.step_optimizers = lambda u: (moved.append(tuple(u)), apply(u))
    with Ops() as ops:
        train(scheme, 60)
    decoder = moved.count(("decoder",))
    together = moved.count(("encoder", "decoder"))
    assert decoder >= 2 and ops.reads <= moved.count(("encoder",)) // 5 + decoder // 2 + 1
    scheme.rule.memory["waiting"] = False
    with Ops() as ops:
        train(scheme, 5)
    assert ops.reads == 0 and moved.count(("encoder", "decoder")) == together + 5


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu_without_a_sync(name):
    here, there = tiny(name, dtype=F64), tiny(name, dtype=F64).to("cuda")
    noise = []
    here.draw = lambda b, draw=here.draw: (noise.append(draw(b)), noise[-1])[1]

    def again(b):
        there.draw_noise(b)
        n = noise.pop(0)
        return type(n)(b.x, *(t.cuda() for t in n[1:]))

    there.draw = again
    a, b = train(here, 4), train(there, 4)
    assert (
        b.is_cuda
        and torch.allclose(a, b.cpu(), rtol=1e-9)
        and torch.allclose(weights(here), weights(there).cpu(), rtol=1e-6, atol=1e-9)
        and there.beta.value.is_cuda
    )
    if "aggressive" in name:
        return
    there.draw = there.draw_noise
    x = [Batch(x.cuda().double()) for x in batches(3)]
    there.step(x[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in x:
            there.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    low = tiny(name).to("cuda")
    low.autocast = lambda: torch.autocast("cuda", torch.bfloat16)
    assert train(low, 3).isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["geco", "sigma", "aggressive", "semi adjoint"])
def test_a_state_of_the_cpu_goes_on_there(name, tmp_path):
    one, other = tiny(name, dtype=F64), tiny(name, dtype=F64, seed=5).to("cuda")
    train(one, 5)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt", map_location="cuda"))
    assert train(other, 5).isfinite().all()
    checkpoint.save(tmp_path / "back.pt", other.state_dict())
    one.load_state_dict(checkpoint.load(tmp_path / "back.pt", map_location="cpu"))
    assert train(one, 5).isfinite().all()


# torch.compile
@calm
def test_compiles_once_and_trains_alike(name, monkeypatch):
    eager, scheme, counter, real = (
        tiny(name, dtype=F64),
        tiny(name, dtype=F64),
        CompileCounter(),
        torch.compile,
    )
    if eager.inner:
        with pytest.raises(ValueError, match="train without compile"):
            scheme.compile()
        return
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda loss, mode: real(loss, backend=counter))
    scheme.compile()
    a, b = train(eager, 3), train(scheme, 3)
    once = counter.frame_count
    a, b = torch.cat([a, train(eager, 8, seed=1)]), torch.cat([b, train(scheme, 8, seed=1)])
    assert once and counter.frame_count == once
    assert torch.allclose(a, b, rtol=1e-9) and torch.allclose(
        weights(eager), weights(scheme), rtol=1e-6, atol=1e-9
    )
    assert (
        torch.allclose(eager.beta.value, scheme.beta.value, rtol=1e-9)
        and eager.beta.t == scheme.beta.t
    )


# By fit
def run(scheme, data, epochs, out, **more):
    return fit(
        scheme,
        data,
        epochs=epochs,
        out=out,
        batch_size=20,
        seed=3,
        progress="none",
        samples=4,
        **more,
    )


def resumed(make, data, tmp_path, **more):
    whole, parts = make(), make()
    records = run(whole, data, 2, tmp_path / "whole", **more)
    run(parts, data, 1, tmp_path / "parts", **more)
    run(parts := make(), data, 2, tmp_path / "parts", resume=True, **more)
    assert same(whole.state_dict(), parts.state_dict())
    return whole, records


@pytest.mark.parametrize("name", ["geco", "sigma", "free bits, aggressive, semi, iwae sampled"])
def test_fits_and_resumes(name, tmp_path):
    data = Images(IMAGES)
    binarize = None if "sigma" in name else "dynamic"
    whole, records = resumed(
        lambda: tiny(name),
        data,
        tmp_path,
        valid=data.subset(torch.arange(60)),
        binarize=binarize,
        ema=0.9,
    )
    valid = records[-1]["valid"]
    assert {
        "loss",
        "beta",
        "elbo",
        "rate",
        "distortion",
        "mutual_information",
        "active_units",
    } <= valid.keys() and all(math.isfinite(v) for v in valid.values())
    assert set(records[-1]["train"]) == (
        {"encoder", "decoder"} if "aggressive" in name else {"loss"}
    )


def test_sequences(tmp_path):
    data = synthetic_sequences("test").subset(torch.arange(200))

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BetaVAE(SequenceVAE(1000, 10, 2, 8, 16), beta=FreeBits(0.1))

    scheme, records = resumed(make, data, tmp_path, valid=data.subset(torch.arange(60)))
    assert records[1]["valid"]["elbo"] > records[0]["valid"]["elbo"]
    x = scheme.sample(5)
    assert x.shape == (5, 10) and x.dtype == torch.int64 and 0 <= x.min() and x.max() < 1000


def test_sequences_of_two_players(tmp_path):
    data = synthetic_sequences("test").subset(torch.arange(200))

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = SequenceVAE(1000, 10, 2, 8, 16)
            return BetaVAE(
                model,
                optimizer=(Adam(model.q_net.parameters()), Adam(model.p_net.parameters())),
                rule=Aggressive(2, 3, 4),
                estimator="iwae",
                k=2,
            )

    resumed(make, data, tmp_path)


def test_autoregressive_images(tmp_path):
    data = Images(IMAGES)

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return BetaVAE(
                AutoregressiveVAE((1, 8, 8), 2, hidden=16, width=8, radius=2), beta=ControlVAE(2.0)
            )

    scheme, records = resumed(make, data, tmp_path, valid=data, binarize="dynamic", ema=0.9)
    assert records[1]["valid"]["elbo"] > records[0]["valid"]["elbo"]
    x = scheme.sample(5)
    assert (
        x.shape[0] == 5
        and x.numel() == 5 * 64
        and set(x.unique().tolist()) == {0.0, 1.0}
        and (tmp_path / "whole/samples/epoch-0002.png").is_file()
    )
