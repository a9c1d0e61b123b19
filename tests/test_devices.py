"""Devices without float64, and other accelerators than CUDA: evaluations, generators, states."""

import math
import threading
import warnings

import numpy
import pytest
import torch
from fake_mps import FakeMPSTensor, fake_mps, move_module
from torch import nn

from optgen.averaging import Exponential, Power
from optgen.controllers import Constant, ControlVAE, Cyclical, FreeBits, Geco, SigmaVAE
from optgen.data.images import Batch, Images, digits
from optgen.metrics import auroc, mutual_information, to_float64
from optgen.models.conditional import ConditionalVAE
from optgen.models.diffusion import Denoiser, UNet, ddim
from optgen.models.flow import Logit, realnvp
from optgen.models.gan import MLPDiscriminator, MLPGenerator
from optgen.models.pixels import MADE
from optgen.models.synthetic import SyntheticSequences
from optgen.models.vae import VAE
from optgen.multipliers import AugmentedLagrangian, NuPI
from optgen.posthoc import posthoc_coefficients
from optgen.sample_quality import feature_stats
from optgen.schemes.assisted import Assisted
from optgen.schemes.couplings import Agreement
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.levels import AdaptiveLevels, optimal_coupling
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.testing import generator
from optgen.training import checkpoint
from optgen.training.guards import seeded
from optgen.training.trainer import fit
from optgen.viz import phase_portrait

DIGITS = digits("train")
SMALL = DIGITS.images[:60, :, 4:28:3, 4:28:3].contiguous() / 255  # 8 x 8
GRAY = torch.randint(256, (40, 1, 4, 4), generator=generator(3)) / 255


class Classifier(nn.Module):
    """A classifier with features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 12), nn.Linear(12, 10)

    def features(self, x):
        """Return the features of images."""
        return self.body(x.flatten(1)).relu()

    def forward(self, x):
        """Return the logits of images."""
        return self.head(self.features(x))


def diffusion(**more):
    """Return a diffusion model of 8 x 8 images."""
    unet = UNet((1, 8, 8), 4, (1, 2), attention=False)
    return DenoisingDiffusion(Denoiser(unet, (1, 8, 8), "flow"), **more)


def gan():
    """Return a GAN of 8 x 8 images, with the pixels as features."""
    networks = MLPGenerator(3, (8,), (1, 8, 8), out="sigmoid"), MLPDiscriminator((1, 8, 8), (8,))
    return FeedbackGAN(*networks, features=lambda x: x.flatten(1))


def assisted():
    """Return a classifier with a conditional VAE."""
    return Assisted(Classifier(), ConditionalVAE(64, 10, 3, 12), coupling=Agreement())


def likelihood(model, data):
    """Return the scheme of a model of 4 x 4 images."""
    return MaximumLikelihood(model, data, shape=(1, 4, 4))


# Scheme, images, and arguments of its evaluation.
EVALUATIONS = {
    "VAE": (lambda: BetaVAE(VAE(64, 12, 8, 3)), SMALL, {"k": 6}),
    "diffusion": (diffusion, SMALL, {"k": 2, "fid_steps": 2}),
    "GAN": (gan, SMALL, {"seed": 1}),
    "assisted": (assisted, SMALL, {}),
    "flow": (
        lambda: likelihood(realnvp(16, 2, (12,), preprocessing=[Logit()]), "dequantized"),
        GRAY,
        {},
    ),
    "pixels": (lambda: likelihood(MADE((1, 4, 4), (20,)), "binary"), GRAY.round(), {}),
}


def build(make, on_mps):
    """Return a scheme with seeded weights, on the CPU or on the stand-in for MPS."""
    torch.manual_seed(0)
    scheme = make()
    if on_mps:
        parts = [player.module for player in scheme.players.values()]
        parts += [part for part in vars(scheme).values() if isinstance(part, nn.Module)]
        for part in {id(part): part for part in parts}.values():
            move_module(part)
    return scheme


def evaluate(name, on_mps=False):
    """Return what the evaluation of a scheme gives."""
    make, images, arguments = EVALUATIONS[name]
    scheme = build(make, on_mps)
    move = FakeMPSTensor if on_mps else torch.clone
    labels = DIGITS.labels[: len(images)]
    batches = [Batch(move(x), move(y)) for x, y in zip(images.split(25), labels.split(25))]
    return scheme.evaluate(batches, **arguments)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_without_float64_gives_the_same_numbers(name, monkeypatch):
    expected = evaluate(name)
    with fake_mps(monkeypatch):
        found = evaluate(name, on_mps=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # The noise of the information is drawn in another dtype: other numbers of the same law.
        wide = {"abs": 0.3} if key == "mutual_information" else {"rel": 1e-4, "abs": 1e-5}
        assert found[key] == pytest.approx(value, **wide), key


def test_the_stand_in_refuses_float64(monkeypatch):
    with fake_mps(monkeypatch):
        x = torch.zeros(2, device="mps")
        assert x.device.type == "mps" and (x @ x).item() == 0
        for make_double in (
            lambda: x.double(),
            lambda: x.to(torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.zeros(2, dtype=torch.float64).to(x.device),
        ):
            with pytest.raises(TypeError, match="float64"):
                make_double()


def test_functions_in_double_precision_run_without_it(monkeypatch):
    x, y = torch.randn(2, 30, 5, generator=generator(1))
    moments = feature_stats([x])
    ranks = auroc(x.flatten(), y.flatten())
    order = optimal_coupling(x, y)
    with fake_mps(monkeypatch):
        a, b = FakeMPSTensor(x), FakeMPSTensor(y)
        assert to_float64(a).device.type == "cpu" and to_float64(a).dtype == torch.float64
        assert torch.equal(feature_stats([a]).cov, moments.cov)
        assert torch.equal(auroc(a.flatten(), b.flatten()), ranks)
        assert torch.equal(optimal_coupling(a, b).numbers, order)
        # log-variances of -20: the posteriors do not overlap, and the information is log N.
        rng = torch.Generator("mps").manual_seed(0)
        information = mutual_information(a, a.new_full(a.shape, -20.0), generator=rng)
        assert information.item() == pytest.approx(math.log(30), abs=1e-6)
        levels = torch.tensor([2.0, 1.0, 0.0])
        drawn = ddim(lambda y, sigma: 0 * y, a, FakeMPSTensor(levels))
        assert torch.allclose(drawn.numbers, ddim(lambda y, sigma: 0 * y, x, levels))


def test_float64_stays_float64_and_where_it_was():
    x = torch.randn(30, 5, generator=generator(1))
    for values in (x, x.double()):
        assert to_float64(values).dtype == torch.float64
    assert to_float64(x.double()).data_ptr() != 0 and torch.equal(to_float64(x), x.double())
    meta = to_float64(x.to("meta"))
    assert meta.is_meta and meta.dtype == torch.float64
    model = VAE(64, 12, 8, 3).double()
    found = BetaVAE(model).evaluate([Batch(SMALL.double())], k=2)
    shifted = SMALL.double() * (1 - 1e-12)  # far below float32's resolution
    other = BetaVAE(model).evaluate([Batch(shifted)], k=2)
    assert 0 < abs(other["distortion"] - found["distortion"]) < 1e-6


CONTROLLERS = {
    "constant": lambda: Constant(0.5),
    "cyclical": lambda: Cyclical(8),
    "free bits": lambda: FreeBits(0.1),
    "geco": lambda: Geco(40.0),
    "control": lambda: ControlVAE(3.0),
    "nu-pi": lambda: NuPI(3.0),
    "augmented": lambda: AugmentedLagrangian(3.0),
    "sigma": lambda: SigmaVAE(64),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_under_a_default_device_without_float64(name, monkeypatch):
    rate, distortion = torch.tensor([1.0, 2.0]), torch.tensor(50.0)
    on_cpu = CONTROLLERS[name]()
    expected = [on_cpu.update(rate, distortion) for _ in range(3)]
    with fake_mps(monkeypatch), torch.device("mps"):
        controller = CONTROLLERS[name]()
        for value in expected:
            beta = controller.update(FakeMPSTensor(rate), FakeMPSTensor(distortion))
            assert torch.equal(beta.numbers, value)


def test_numbers_of_the_host_under_a_default_device_without_float64(monkeypatch):
    target, marks = Power(3.0), [(Power(2.0), 4), (Power(9.0), 4), (Exponential(0.5), 3)]
    expected, residual = posthoc_coefficients(marks, target, 4)
    uneven, _ = posthoc_coefficients(marks, lambda t: t**2, 4)
    source = SyntheticSequences(length=3)
    with fake_mps(monkeypatch), torch.device("mps"):
        found, found_residual = posthoc_coefficients(marks, target, 4)
        assert torch.equal(found, expected) and found_residual == residual
        assert torch.equal(posthoc_coefficients(marks, lambda t: t**2, 4)[0], uneven)
        assert torch.equal(SyntheticSequences(length=3).head.weight, source.head.weight)
        y = torch.zeros(2, 1)
        assert ddim(lambda y, sigma: y, y, [1.0, 0.0]).shape == y.shape
    assert phase_portrait(lambda points: points, {}) is not None


def test_levels_adapt_and_couple_without_float64(monkeypatch):
    def walk(on_mps):
        """Return the levels and the noise of a few steps without their gradients."""
        scheme = build(lambda: diffusion(levels=AdaptiveLevels(4), coupling=True), on_mps)
        batch = Batch(FakeMPSTensor(SMALL[:20]) if on_mps else SMALL[:20], None)
        torch.manual_seed(1)
        with torch.no_grad():
            for _ in range(3):
                noisy = scheme.draw_noise(batch)
                scheme.loss(noisy)
                scheme.levels.update(*scheme.last_levels)
        return scheme.levels.square, noisy.eps, noisy.sigma

    expected = walk(False)
    with fake_mps(monkeypatch):
        found = walk(True)
    assert all(torch.allclose(a.numbers, b, rtol=1e-4) for a, b in zip(found, expected))


class FakeAccelerator:
    """The module of an accelerator, such as `torch.mps`: a generator for each device."""

    def __init__(self, devices):
        self.generators = [torch.Generator().manual_seed(i) for i in range(devices)]

    def device_count(self):
        """Return the number of devices."""
        return len(self.generators)

    def get_rng_state(self, device=0):
        """Return the state of a device's generator."""
        return self.generators[device].get_state()

    def set_rng_state(self, state, device=0):
        """Set the state of a device's generator."""
        self.generators[device].set_state(state)

    def draw(self):
        """Return a number of each generator."""
        return [torch.rand((), generator=g).item() for g in self.generators]


@pytest.fixture
def accelerator(monkeypatch):
    """Return a function that gives this machine an accelerator of some devices."""
    real_module, real_seed = torch.get_device_module, torch.manual_seed

    def install(kind, devices):
        """Return the module of a new accelerator."""
        module = FakeAccelerator(devices)

        def get_module(device=None):
            """Return the module of a type of device."""
            return module if torch.device(device).type == kind else real_module(device)

        def seed_all(seed):
            """Seed the CPU's generator and the accelerator's, as `torch.manual_seed` does."""
            for g in module.generators:
                g.manual_seed(seed)
            return real_seed(seed)

        monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch, "get_device_module", get_module)
        monkeypatch.setattr(torch, "manual_seed", seed_all)
        return module

    return install


KINDS = [("mps", 1), ("xpu", 2), ("cuda", 3)]


@pytest.mark.parametrize("kind, devices", KINDS)
def test_seeded_puts_every_generator_back(kind, devices, accelerator):
    module = accelerator(kind, devices)
    twin = FakeAccelerator(devices)
    for error in (None, LookupError):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                with seeded(7):
                    inside = module.draw()
                    if error:
                        raise error
            except LookupError:
                pass
        expected = torch.rand((), generator=torch.Generator().manual_seed(7)).item()
        assert inside == [expected] * devices
        assert module.draw() == twin.draw()


@pytest.mark.parametrize("kind, devices", KINDS)
def test_a_checkpoint_restores_every_generator(kind, devices, accelerator, tmp_path):
    module = accelerator(kind, devices)
    checkpoint.save(tmp_path / "state.pt", checkpoint.rng_state())
    expected = module.draw(), torch.rand(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "state.pt"))
    assert module.draw() == expected[0] and torch.equal(torch.rand(2), expected[1])


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
@pytest.mark.parametrize("saved, here", [(2, 1), (1, 2), (1, 0), (0, 1), (4, 3)])
def test_generators_of_another_number_of_devices_are_warned_about(kind, saved, here, accelerator):
    accelerator(kind, saved)
    state = checkpoint.rng_state()
    module, twin = accelerator(kind, here), FakeAccelerator(saved)
    module.draw()  # so that these generators are elsewhere
    message = f"{saved} {kind} devices, and here are {here}: {min(saved, here)} of them"
    with pytest.warns(UserWarning, match=message):
        checkpoint.set_rng_state(state)
    restored = min(saved, here)
    assert module.draw()[:restored] == twin.draw()[:restored]


def test_a_state_of_another_kind_of_device(accelerator):
    accelerator("xpu", 2)
    state = checkpoint.rng_state()
    assert state.keys() == {"cpu", "cuda", "xpu"} and state["cuda"] == []
    expected = torch.rand(2)
    accelerator("mps", 1)
    with pytest.warns(UserWarning) as caught:
        checkpoint.set_rng_state(state)
    assert torch.equal(torch.rand(2), expected)
    messages = sorted(str(w.message).split(", and")[0].split(" of ")[1] for w in caught)
    assert messages == ["0 mps devices", "2 xpu devices"]
    with pytest.warns(UserWarning, match="1 nobody devices, and here are 0"):
        checkpoint.set_rng_state(
            {
                "cpu": state["cpu"],
                "nobody": [torch.zeros(1)],
                "mps": [torch.Generator().get_state()],
            }
        )


def test_the_state_of_a_machine_without_accelerator_is_as_before():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    state = checkpoint.rng_state()
    assert state.keys() == {"cpu", "cuda"} and state["cuda"] == []


def test_a_checkpoint_of_doubles_loads_where_there_are_none(monkeypatch, tmp_path):
    state = {"a": torch.ones(2), "b": [torch.ones(2, dtype=torch.float64), {"n": (3, None)}]}
    checkpoint.save(tmp_path / "state.pt", state)
    load_archive = torch.load

    def load(path, map_location=None, **kwargs):
        """Load as `torch.load` does on a machine with MPS."""
        if map_location == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return load_archive(path, map_location=map_location, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    with fake_mps(monkeypatch):
        found = checkpoint.load(tmp_path / "state.pt", map_location="mps")
        assert found["a"].device.type == "mps" and torch.equal(found["a"].numbers, state["a"])
        assert found["b"][0].device.type == "cpu" and found["b"][0].dtype == torch.float64
        assert found["b"][1] == {"n": (3, None)}


class Pause:
    """A callback that lets the other thread go on in the first step, and waits for it."""

    def __init__(self, entered, leave):
        self.entered, self.leave = entered, leave

    def on_step(self, run, batch, losses):
        """Wait in the first step."""
        if not self.entered.is_set():
            self.entered.set()
            assert self.leave.wait(60)


def train_small(callbacks=()):
    """Train a small VAE for two epochs and return its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scheme = BetaVAE(VAE(784, 12, 8, 3))
    data = Images(DIGITS.images[:60])
    fit(scheme, data, epochs=2, batch_size=20, seed=3, progress="none", callbacks=callbacks)
    return [p.detach().clone() for p in scheme.model.parameters()]


def test_two_threads_do_not_share_the_generators():
    alone = train_small()
    entered, leave, found = threading.Event(), threading.Event(), []
    first = threading.Thread(
        target=lambda: found.append(train_small([Pause(entered, leave)])), daemon=True
    )
    first.start()
    assert entered.wait(60)
    try:
        for _ in range(2):  # the refusal leaves nothing behind
            with pytest.raises(RuntimeError, match="another thread is training .*: call fit in"):
                train_small()
    finally:
        leave.set()
    first.join(60)
    assert all(map(torch.equal, found[0], alone))
    # One after the other, and one inside the other, is right in any thread.
    with seeded(1):
        expected = torch.rand(2, generator=torch.Generator().manual_seed(1))
        assert all(map(torch.equal, train_small(), alone))
        assert torch.equal(torch.rand(2), expected)


def test_a_seed_beyond_64_bits_is_refused_and_the_lock_is_free():
    state = torch.get_rng_state()
    for bad in (2**64, -(2**63) - 1, 1.5, True, None, "3", math.nan):
        with pytest.raises(ValueError, match="seed must be an integer from -2"), seeded(bad):
            raise AssertionError("the block was entered")
    for good in (2**64 - 1, -1, 0, numpy.int64(5)):
        with seeded(good):
            inside = torch.rand(2)
        assert torch.equal(inside, torch.rand(2, generator=generator(int(good))))
    assert torch.equal(state, torch.get_rng_state())
