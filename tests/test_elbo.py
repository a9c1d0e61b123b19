"""BetaVAE with every controller, estimator and inference: resumption, devices, compile, `fit`."""

import copy
import inspect
import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen import controllers
from optgen.controllers import (
    Capacity,
    Constant,
    Controller,
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
from optgen.testing import flat_weights, generator
from optgen.training import checkpoint
from optgen.training.trainer import fit

F64 = torch.float64
IMAGES = digits("train").images[:200, :, 4:28:3, 4:28:3].contiguous()

CONTROLLERS = {
    "constant": partial(Constant, 0.5),
    "warmup": partial(LinearWarmup, 7, 0.8),
    "cyclical": partial(Cyclical, 11, cycles=2),
    "capacity": partial(Capacity, 1.0, 9, 2.0),
    "free-bits": partial(FreeBits, 0.05),
    "free-bits-groups": partial(FreeBits, 0.1, groups=1),
    "geco": partial(Geco, 40.0, rate=0.01, smoothing=0.8),
    "control": partial(ControlVAE, 1.0, kp=0.1, ki=0.05),
    "sigma": partial(SigmaVAE, 64),
}
# Arguments of BetaVAE by name of the variant. Classes and partials are called for each scheme,
# since it owns its controller, rule and inner optimizer. `optimizer` counts the optimizers.
VARIANTS = {
    **{name: {"beta": make} for name, make in CONTROLLERS.items()},
    "stl": {"estimator": "stl", "k": 2},
    "elbo-k": {"k": 3},
    "iwae": {"estimator": "iwae", "k": 3, "sampled": False},
    "iwae sampled": {"estimator": "iwae", "k": 3, "sampled": True},
    "dreg": {"estimator": "dreg", "k": 3, "sampled": False},
    "dreg sampled": {"estimator": "dreg", "k": 3, "sampled": True},
    **{f"semi {mode}": {"inner": partial(Refinement, 2, mode=mode)} for mode in DECODER_PASSES},
    "two players": {"optimizer": 2},
    "alternating": {"optimizer": 2, "rule": Alternating},
    "aggressive": {"optimizer": 2, "rule": partial(Aggressive, 2, 3, 4)},
    "sigma, alternating": {"beta": CONTROLLERS["sigma"], "optimizer": 2, "rule": Alternating},
    "sigma, semi": {"beta": CONTROLLERS["sigma"], "inner": partial(Refinement, 2)},
    "geco, alternating, dreg": {
        "beta": partial(Geco, 40.0, rate=0.01),
        "optimizer": 2,
        "rule": Alternating,
        "estimator": "dreg",
        "k": 2,
    },
    "free bits, aggressive, semi, iwae sampled": {
        "beta": partial(FreeBits, 0.05),
        "optimizer": 2,
        "rule": partial(Aggressive, 2, 3, 4),
        "inner": partial(Refinement, 1),
        "estimator": "iwae",
        "k": 2,
        "sampled": True,
    },
}
READING_NOTHING = [name for name in VARIANTS if "aggressive" not in name]
every_variant = pytest.mark.parametrize("name", VARIANTS)
variants_reading_nothing = pytest.mark.parametrize("name", READING_NOTHING)


def adam(params):
    """Return the optimizer of most tests."""
    return Adam(params, lr=3e-3)


def plain_descent(params):
    """Return an optimizer that reads nothing on the host; Adam counts its steps there."""
    return SGD(params, lr=0.01)


def build_arguments(name):
    """Return the arguments of a variant, with its parts built anew."""
    return {
        key: value() if isinstance(value, (partial, type)) else value
        for key, value in VARIANTS[name].items()
    }


def tiny(name, seed=0, dtype=torch.float32, device="cpu", make_optimizer=adam, **changes):
    """Return a small BetaVAE of a variant for 8 x 8 images, seeded."""
    arguments = build_arguments(name) | changes
    kind = GaussianVAE if isinstance(arguments.get("beta"), SigmaVAE) else VAE
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = kind(64, 12, 8, 3).to(dtype)
    if arguments.pop("optimizer", 1) == 2:
        optimizer = tuple(make_optimizer(net.parameters()) for net in (model.q_net, model.p_net))
    else:
        optimizer = make_optimizer(model.parameters())
    return BetaVAE(model, optimizer=optimizer, **arguments)


def random_batches(steps, seed=0):
    """Return batches of 16 images, the same for the same seed."""
    rng = generator(seed)
    return [IMAGES[torch.randperm(200, generator=rng)[:16]] / 255 for _ in range(steps)]


def train(scheme, steps, seed=0):
    """Train on random batches and return the first player's losses."""
    like = next(scheme.model.parameters())
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for x in random_batches(steps, seed):
            losses.append(next(iter(scheme.step(Batch(x.to(like))).values())))
    return torch.stack(losses)


def same(a, b):
    """Return whether two states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def copy_through_file(source, target, folder):
    """Load the state of one scheme into another through a checkpoint."""
    checkpoint.save(folder / "state.pt", source.state_dict())
    target.load_state_dict(checkpoint.load(folder / "state.pt"))


def record_movers(game):
    """Return a list that receives the names of the players of every step."""
    movers, step_optimizers = [], game.step_optimizers

    def recording_step(u):
        """Record the players and step their optimizers."""
        movers.append(tuple(u))
        step_optimizers(u)

    game.step_optimizers = recording_step
    return movers


def test_every_part_is_tried():
    classes = {kind for _, kind in inspect.getmembers(controllers, inspect.isclass)}
    offered = {kind for kind in classes if issubclass(kind, Controller)} - {Controller}
    assert {type(make()) for make in CONTROLLERS.values()} == offered
    schemes = [tiny(name) for name in VARIANTS]
    assert {scheme.estimator for scheme in schemes} == set(ESTIMATORS)
    assert {scheme.inner.mode for scheme in schemes if scheme.inner} == set(DECODER_PASSES)


@every_variant
def test_the_controller_is_updated_once_a_step(name):
    scheme = tiny(name)
    for steps in (1, 2, 3):
        train(scheme, 1, seed=steps)
        assert scheme.beta.t == steps


# State
@pytest.mark.parametrize("steps", [4, 9])
@every_variant
def test_resumes_bit_for_bit_through_a_file(name, steps, tmp_path):
    one, other = tiny(name), tiny(name, seed=5)
    train(one, steps)
    copy_through_file(one, other, tmp_path)
    x = IMAGES[:20] / 255
    assert torch.equal(one.reconstruct(x), other.reconstruct(x))
    assert one.evaluate([Batch(x)]) == other.evaluate([Batch(x)])
    assert torch.equal(train(one, 7, seed=1), train(other, 7, seed=1))
    assert same(one.state_dict(), other.state_dict())


def seed_noise_by_batch(scheme):
    """Make the noise of a scheme a function of the batch."""
    draw = scheme.draw

    def seeded_draw(batch):
        """Draw the noise with a seed that the images give."""
        torch.manual_seed(int(batch.x.sum()))
        return draw(batch)

    scheme.draw = seeded_draw


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 13, 18, 19, 23])
def test_aggressive_resumes_from_anywhere(steps, tmp_path):
    # Within a window, after one, and after the phase has ended.
    whole, one, other = (tiny("aggressive", seed=seed) for seed in (0, 0, 5))
    batches = [Batch(x) for x in random_batches(24)]
    for scheme in (whole, one, other):
        seed_noise_by_batch(scheme)
    with torch.random.fork_rng():
        for batch in batches:
            whole.step(batch)
        for batch in batches[:steps]:
            one.step(batch)
        copy_through_file(one, other, tmp_path)
        for batch in batches[steps:]:
            other.step(batch)
    assert same(whole.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "beta, weight", [(2.5, 2.5), (LinearWarmup(7, 0.8), 1.0), (Geco(40.0), 1.0)]
)
def test_the_reported_loss_weighs_the_rate_by_a_constant_beta_only(beta, weight):
    model, x = VAE(64, 16, 8, 3).to(F64), (IMAGES.to(F64) / 255).round()
    (first,) = (m for m in model.modules() if getattr(m, "in_features", None) == 3)
    torch.nn.init.zeros_(first.weight)  # the decoder ignores z, so that its noise does not matter
    with torch.no_grad():
        mean, log_var = model.encoder(x)
        logits = model.logits(torch.zeros_like(mean))
    encoder = torch.distributions.Normal(mean, (log_var / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    rate = torch.distributions.kl_divergence(encoder, prior).sum(1).mean().item()
    pixels = torch.distributions.Bernoulli(logits=logits.reshape(len(x), -1))
    distortion = -pixels.log_prob(x.flatten(1)).sum(1).mean().item()
    found = BetaVAE(model, beta).evaluate([Batch(x)])
    assert found["rate"] == pytest.approx(rate) and rate > 0.01
    assert found["distortion"] == pytest.approx(distortion)
    assert found["elbo"] == pytest.approx(-distortion - rate)
    assert found["loss"] == pytest.approx(distortion + weight * rate)


def test_the_variance_is_restored(tmp_path):
    one, other = tiny("sigma"), tiny("sigma", seed=5)
    train(one, 5)
    assert 0 < one.beta.value < 0.3
    copy_through_file(one, other, tmp_path)
    assert other.model.variance == one.beta.value


@pytest.mark.parametrize("missing", [("beta",), ("beta", "rule")], ids=["0.2", "0.1"])
def test_states_of_earlier_versions_load(missing):
    one = tiny("constant")
    train(one, 3)
    old = {key: value for key, value in one.state_dict().items() if key not in missing}
    other = tiny("constant", seed=5)
    other.load_state_dict(copy.deepcopy(old))
    assert old.keys() == one.state_dict().keys() - set(missing)
    assert torch.equal(train(one, 3, seed=1), train(other, 3, seed=1))
    assert torch.equal(flat_weights(one.model), flat_weights(other.model))


@pytest.mark.parametrize("own", CONTROLLERS)
def test_the_state_of_another_controller_is_refused_and_nothing_changes(own):
    scheme = tiny(own)
    train(scheme, 2)
    for foreign in CONTROLLERS:
        other = tiny(foreign, seed=5)
        if type(other.beta) is type(scheme.beta):
            continue
        train(other, 3)
        before = copy.deepcopy(scheme.state_dict())
        theirs, ours = type(other.beta).__name__, type(scheme.beta).__name__
        with pytest.raises(ValueError, match=f"the controller {theirs} .* this is {ours}"):
            scheme.load_state_dict(other.state_dict())
        assert same(before, scheme.state_dict())


def with_other_player(state):
    """Return a state with a player that the scheme does not have."""
    return state | {"encoder": state["model"]}


def with_other_rule(state):
    """Return a state of another rule."""
    return state | {"rule": state["rule"] | {"name": "Aggressive"}}


def with_other_shapes(state):
    """Return a state whose weights have other shapes."""
    weights = {name: w[:1] for name, w in state["model"]["weights"].items()}
    return state | {"model": state["model"] | {"weights": weights}}


@pytest.mark.parametrize(
    "change, word",
    [
        (with_other_player, "players"),
        (with_other_rule, "the rule Aggressive"),
        (with_other_shapes, "shape"),
    ],
)
def test_a_refused_state_leaves_the_controller(change, word):
    scheme, other = tiny("geco"), tiny("geco", seed=5)
    train(scheme, 2)
    train(other, 5)
    before = copy.deepcopy(scheme.state_dict())
    with pytest.raises(ValueError, match=word):
        scheme.load_state_dict(change(other.state_dict()))
    assert same(before, scheme.state_dict())


# Devices and dtypes
class RecordedOperations(TorchDispatchMode):
    """Records the names of all operations, and counts those that read a number on the host."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        """Number of operations that read a number on the host."""
        return sum(name in self.READS for name in self.names)


@every_variant
def test_runs_on_meta(name):
    scheme = tiny(name, device="meta")
    x = torch.ones(16, 1, 8, 8, device="meta")
    for _ in range(2):
        losses = scheme.step(Batch(x))
    assert losses.keys() == scheme.players.keys()
    assert all(loss.is_meta and not loss.dim() for loss in losses.values())
    assert scheme.beta.value.is_meta and scheme.sample(3).is_meta
    assert scheme.reconstruct(x).shape == x.shape


@pytest.mark.parametrize("name", ["sigma", "sigma, semi", "sigma, alternating"])
@pytest.mark.parametrize(
    "where",
    [{"dtype": F64}, pytest.param({"device": "cuda"}, marks=pytest.mark.cuda)],
    ids=["float64", "cuda"],
)
def test_the_variance_moves_with_the_model(name, where):
    scheme = tiny(name)
    train(scheme, 2)
    scheme.to(**where)
    for tensor in (scheme.model.variance, *scheme.model.parameters()):
        assert tensor.device.type == where.get("device", "cpu")
        assert tensor.dtype == where.get("dtype", torch.float32)
    scheme.step(Batch((IMAGES[:16] / 255).to(**where)))


def draw_in_double_precision(scheme, dtype):
    """Draw the noise of a scheme in float64, seeded by the batch, and round it to `dtype`."""
    draw, functions = scheme.draw, (torch.randn, torch.rand, torch.randn)

    def rounded_draw(batch):
        """Draw noise that depends on the images and, but for rounding, not on `dtype`."""
        noisy, rng = draw(batch), generator(int(batch.x.sum()))
        noise = [
            function(like.shape, generator=rng, dtype=F64).to(dtype)
            for function, like in zip(functions, noisy[1:])
        ]
        return type(noisy)(noisy.x, *noise)

    scheme.draw = rounded_draw


@every_variant
def test_precision(name):
    # All have the same noise; float64 shows the errors of the others.
    found = []
    for dtype, autocast in ((F64, False), (torch.float32, False), (torch.float32, True)):
        scheme = tiny(name).to(dtype)
        draw_in_double_precision(scheme, dtype)
        scheme.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        found.append((train(scheme, 5), scheme.beta.value))
        weights = flat_weights(scheme.model)
        assert weights.dtype == dtype and weights.isfinite().all()
    (exact, exact_beta), (single, single_beta), (half, half_beta) = found
    assert exact.dtype == exact_beta.dtype == F64
    assert single.dtype == half.dtype == torch.float32
    assert single_beta.dtype == half_beta.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-5)
    if name != "capacity":  # Rounding may change the sign of a difference there.
        assert torch.allclose(half.double(), exact, rtol=2e-3)
    assert torch.allclose(single_beta.double(), exact_beta, rtol=1e-4)


@variants_reading_nothing
def test_a_step_reads_nothing_on_the_host(name):
    scheme = tiny(name, make_optimizer=plain_descent)
    train(scheme, 2)
    with RecordedOperations() as operations:
        train(scheme, 3)
    assert len(operations.names) > 100 and operations.reads == 0


class PrescribedGame(Game):
    """Encoder and decoder with prescribed losses and information."""

    def __init__(self, losses, information, rule):
        weights = {name: torch.nn.Parameter(torch.zeros(())) for name in ("encoder", "decoder")}
        losses = iter(losses)

        def loss(batch):
            """Return the batch, which is a loss, as a function of both weights."""
            return batch + 0 * sum(weights.values())

        players = {name: Player([w], loss, SGD([w], lr=1.0)) for name, w in weights.items()}
        super().__init__(**players, draw=lambda batch: next(losses), rule=rule)
        self.prescribed_information = iter(information)

    def information(self, batch):
        """Return the next prescribed information."""
        return torch.tensor(next(self.prescribed_information))


@pytest.mark.parametrize(
    "losses, information, expected",
    [
        ([2.0, 2.0, 9.0], [1.0], "eed"),
        ([2.0, 3.0, 9.0], [1.0], "eed"),
        ([4.0, 3.0, 2.0, 9.0], [1.0], "eeed"),
        # At most three steps; an equal loss does not fall.
        ([4.0, 3.0, 2.0, 9.0, 5.0, 5.0, 9.0], [1.0, 2.0], "eeedeed"),
        # Equal information does not rise.
        ([1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 7.0, 7.0], [1.0, 1.0], "eedeed**"),
        ([1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 7.0], [1.0, 2.0, 1.5], "eedeedeed*"),
    ],
)
def test_aggressive_moves_the_prescribed_player(losses, information, expected):
    # Windows of one batch; `*` is a step of both, once the information no longer rises.
    game = PrescribedGame(losses, information, Aggressive(check=1, most=3, window=1))
    movers = record_movers(game)
    for _ in expected:
        game.step(None)
    assert "".join("*" if len(names) == 2 else names[0][0] for names in movers) == expected


def test_aggressive_reads_seldom():
    # One number every `check` batches and one every `window` steps of the decoder; later none.
    rule = Aggressive(check=5, most=10, window=2)
    scheme = tiny("constant", make_optimizer=plain_descent, optimizer=2, rule=rule)
    movers = record_movers(scheme)
    with RecordedOperations() as operations:
        train(scheme, 60)
    encoder, decoder = movers.count(("encoder",)), movers.count(("decoder",))
    both = movers.count(("encoder", "decoder"))
    assert decoder >= 2 and operations.reads <= encoder // 5 + decoder // 2 + 1
    scheme.rule.memory["waiting"] = False
    with RecordedOperations() as operations:
        train(scheme, 5)
    assert operations.reads == 0 and movers.count(("encoder", "decoder")) == both + 5


def share_noise(source, target, device):
    """Make one scheme repeat the noise of another, which must be stepped first."""
    drawn, draw = [], source.draw

    def recording_draw(batch):
        """Draw and record the noise."""
        drawn.append(draw(batch))
        return drawn[-1]

    def repeating_draw(batch):
        """Return the recorded noise on the device."""
        target.draw_noise(batch)
        noisy = drawn.pop(0)
        return type(noisy)(batch.x, *(noise.to(device) for noise in noisy[1:]))

    source.draw, target.draw = recording_draw, repeating_draw


@pytest.mark.cuda
@every_variant
def test_cuda_agrees_with_the_cpu_without_a_sync(name):
    here, there = tiny(name, dtype=F64), tiny(name, dtype=F64).to("cuda")
    share_noise(here, there, "cuda")
    a, b = train(here, 4), train(there, 4)
    assert b.is_cuda and there.beta.value.is_cuda
    assert torch.allclose(a, b.cpu(), rtol=1e-9)
    weights = flat_weights(there.model).cpu()
    assert torch.allclose(flat_weights(here.model), weights, rtol=1e-6, atol=1e-9)
    if "aggressive" in name:
        return
    there.draw = there.draw_noise
    batches = [Batch(x.cuda().double()) for x in random_batches(3)]
    there.step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            there.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    low = tiny(name).to("cuda")
    low.autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    assert train(low, 3).isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["geco", "sigma", "aggressive", "semi adjoint"])
def test_a_state_moves_between_cpu_and_cuda(name, tmp_path):
    one, other = tiny(name, dtype=F64), tiny(name, dtype=F64, seed=5).to("cuda")
    train(one, 5)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt", map_location="cuda"))
    assert train(other, 5).isfinite().all()
    checkpoint.save(tmp_path / "back.pt", other.state_dict())
    one.load_state_dict(checkpoint.load(tmp_path / "back.pt", map_location="cpu"))
    assert train(one, 5).isfinite().all()


# torch.compile
@variants_reading_nothing
def test_compiles_once_and_trains_as_in_eager_mode(name, monkeypatch):
    eager, scheme = tiny(name, dtype=F64), tiny(name, dtype=F64)
    if eager.inner:
        with pytest.raises(ValueError, match="train without compile"):
            scheme.compile()
        return
    counter, compile_function = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda loss, mode: compile_function(loss, backend=counter)
    )
    scheme.compile()
    eager_losses, losses = train(eager, 3), train(scheme, 3)
    compiled_frames = counter.frame_count
    eager_losses = torch.cat([eager_losses, train(eager, 8, seed=1)])
    losses = torch.cat([losses, train(scheme, 8, seed=1)])
    assert compiled_frames and counter.frame_count == compiled_frames
    assert torch.allclose(eager_losses, losses, rtol=1e-9)
    weights = flat_weights(scheme.model)
    assert torch.allclose(flat_weights(eager.model), weights, rtol=1e-6, atol=1e-9)
    assert torch.allclose(eager.beta.value, scheme.beta.value, rtol=1e-9)
    assert eager.beta.t == scheme.beta.t


# Training by `fit`
def fit_tiny(scheme, data, epochs, out, **more):
    """Fit with the settings that the tests share and return the records."""
    settings = {"batch_size": 20, "seed": 3, "progress": "none", "samples": 4}
    return fit(scheme, data, epochs=epochs, out=out, **settings, **more)


def fit_with_and_without_a_break(make, data, tmp_path, **more):
    """Check that an interrupted fit equals a whole one; return that scheme and its records."""
    whole, interrupted = make(), make()
    records = fit_tiny(whole, data, 2, tmp_path / "whole", **more)
    fit_tiny(interrupted, data, 1, tmp_path / "interrupted", **more)
    resumed = make()
    fit_tiny(resumed, data, 2, tmp_path / "interrupted", resume=True, **more)
    assert same(whole.state_dict(), resumed.state_dict())
    return whole, records


def make_seeded(make):
    """Return what a function makes, with torch's own generator at 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("name", ["geco", "sigma", "free bits, aggressive, semi, iwae sampled"])
def test_fits_and_resumes(name, tmp_path):
    data = Images(IMAGES)
    settings = {
        "valid": data.subset(torch.arange(60)),
        "binarize": None if "sigma" in name else "dynamic",
        "ema": 0.9,
    }
    _, records = fit_with_and_without_a_break(partial(tiny, name), data, tmp_path, **settings)
    valid, train_losses = records[-1]["valid"], records[-1]["train"]
    parts = {"elbo", "rate", "distortion", "mutual_information", "active_units"}
    assert {"loss", "beta", *parts} <= valid.keys()
    assert all(math.isfinite(value) for value in valid.values())
    expected = {"encoder", "decoder"} if "aggressive" in name else {"loss"}
    assert set(train_losses) == expected


def make_sequence_scheme():
    """Return a BetaVAE on sequences, with free bits."""
    return BetaVAE(SequenceVAE(1000, 10, 2, 8, 16), beta=FreeBits(0.1))


def make_sequence_players():
    """Return a BetaVAE on sequences whose encoder and decoder are two players."""
    model = SequenceVAE(1000, 10, 2, 8, 16)
    optimizers = Adam(model.q_net.parameters()), Adam(model.p_net.parameters())
    return BetaVAE(model, optimizer=optimizers, rule=Aggressive(2, 3, 4), estimator="iwae", k=2)


def make_autoregressive_scheme():
    """Return a BetaVAE whose decoder is autoregressive, for 8 x 8 images."""
    model = AutoregressiveVAE((1, 8, 8), 2, hidden=16, width=8, radius=2)
    return BetaVAE(model, beta=ControlVAE(2.0))


def test_sequences(tmp_path):
    data = synthetic_sequences("test").subset(torch.arange(200))
    make, valid = partial(make_seeded, make_sequence_scheme), data.subset(torch.arange(60))
    scheme, records = fit_with_and_without_a_break(make, data, tmp_path, valid=valid)
    assert records[1]["valid"]["elbo"] > records[0]["valid"]["elbo"]
    x = scheme.sample(5)
    assert x.shape == (5, 10) and x.dtype == torch.int64 and 0 <= x.min() and x.max() < 1000


def test_sequences_of_two_players(tmp_path):
    data = synthetic_sequences("test").subset(torch.arange(200))
    fit_with_and_without_a_break(partial(make_seeded, make_sequence_players), data, tmp_path)


def test_autoregressive_images(tmp_path):
    data, make = Images(IMAGES), partial(make_seeded, make_autoregressive_scheme)
    settings = {"valid": data, "binarize": "dynamic", "ema": 0.9}
    scheme, records = fit_with_and_without_a_break(make, data, tmp_path, **settings)
    assert records[1]["valid"]["elbo"] > records[0]["valid"]["elbo"]
    x = scheme.sample(5)
    assert x.shape[0] == 5 and x.numel() == 5 * 64
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (tmp_path / "whole/samples/epoch-0002.png").is_file()


class ByLatent(Controller):
    """A multiplier for each latent, made from the rate's shape alone."""

    measured = ()

    def multiplier(self, rate, distortion):
        """Return 1, 2, ..., one number for each latent."""
        return torch.ones_like(rate).cumsum(0)


def test_a_controller_that_measures_nothing_is_given_the_rate_of_each_latent():
    torch.manual_seed(0)
    scheme = BetaVAE(VAE(6, 5, 4, 3), beta=ByLatent(1.0))
    assert scheme.step(Batch(torch.rand(7, 6).round()))["model"].isfinite()
    assert scheme.beta.value.tolist() == [1.0, 2.0, 3.0]
