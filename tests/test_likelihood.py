"""`MaximumLikelihood` of the installed package.

Pixel models, flows and zuko's, by hand and by `fit`, resumed, compiled, moved between dtypes and
devices.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.data.images import Batch, Images, digits
from optgen.models.flow import Logit, image_flow, maf, realnvp
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM
from optgen.optim import SGD, Adam
from optgen.rules import Extragradient
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.testing import flat_weights, generator
from optgen.training import checkpoint
from optgen.training.guards import NonFinite
from optgen.training.trainer import fit

F64, S = torch.float64, (1, 4, 4)
IMAGES = digits("train").images[:150, :, 5:26:6, 5:26:6].contiguous()


def zuko_flow(kind, context=0):
    """Return a flow of zuko's of sixteen numbers, behind a logit."""
    zuko = pytest.importorskip("zuko")
    flow = getattr(zuko.flows, kind)(16, context, transforms=2, hidden_features=(12,))
    logit = zuko.flows.UnconditionalTransform(lambda: torch.distributions.SigmoidTransform().inv)
    return zuko.flows.Flow([logit, *flow.transform.transforms], flow.base)


KINDS = {
    "made": (lambda: MADE(S, (20,)), "binary"),
    "lstm": (lambda: PixelLSTM(S, 6), "binary"),
    "pixelcnn": (lambda: PixelCNN(S, 4, 2), "binary"),
    "made of 256": (lambda: MADE(S, (8,), 256), "levels"),
    "lstm of 8": (lambda: PixelLSTM(S, 6, levels=8), "levels"),
    "pixelcnn of 3": (lambda: PixelCNN(S, 4, 2, levels=3), "levels"),
    "realnvp": (lambda: realnvp(16, 2, (12,), preprocessing=[Logit()]), "dequantized"),
    "maf": (lambda: maf(16, 2, (12,), preprocessing=[Logit()]), "dequantized"),
    "image_flow": (lambda: image_flow(S, 1, 1, 4, 1, preprocessing=[Logit(0.05)]), "dequantized"),
    "zuko NSF": (lambda: zuko_flow("NSF"), "dequantized"),
    "zuko MAF": (lambda: zuko_flow("MAF"), "dequantized"),
}
every_kind = pytest.mark.parametrize("name", KINDS)
some_kinds = pytest.mark.parametrize("name", ["lstm", "pixelcnn of 3", "image_flow", "zuko NSF"])


def adam(params):
    """Return Adam as the tests use it."""
    return Adam(params, lr=5e-3)


def small_sgd(params):
    """Return gradient descent with small steps."""
    return SGD(params, lr=1e-3)


def tiny(name, seed=0, dtype=torch.float32, device="cpu", make_optimizer=adam, **more):
    """Return the scheme of a small model of `KINDS`; further arguments are the scheme's."""
    build, data = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(device, dtype)
    return MaximumLikelihood(model, data, make_optimizer(model.parameters()), shape=S, **more)


def pixels(name, n=20, seed=0, dtype=torch.float32):
    """Return n images as the data of a kind has them."""
    x = IMAGES[torch.randint(len(IMAGES), (n,), generator=generator(seed))].to(dtype) / 255
    return x.round() if KINDS[name][1] == "binary" else x


def train(scheme, name, steps, seed=0):
    """Return the losses of some steps on seeded batches."""
    like, losses = next(scheme.model.parameters()), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for t in range(steps):
            batch = Batch(pixels(name, seed=100 * seed + t).to(like))
            losses.append(scheme.step(batch)["model"])
    return torch.stack(losses)


@every_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_evaluates_and_draws(name, seed):
    scheme = tiny(name, seed)
    losses = train(scheme, name, 40, seed)
    assert losses[-5:].mean() < losses[:5].mean() - 0.3

    found = scheme.evaluate([Batch(pixels(name, 60, 1)), pixels(name, 5, 2)])
    assert found["n"] == 65
    assert abs(found["bits_per_dim"] - found["nll"] / 16 / math.log(2)) < 1e-9
    assert found["loss"] == pytest.approx(found["nll"])

    L = {"binary": 2, "dequantized": 256}.get(scheme.data, scheme.levels)
    torch.manual_seed(seed)
    x = scheme.sample(30)
    assert x.shape == (30, *S)
    assert 0 <= x.min() and x.max() <= 1
    assert ((x * (L - 1)).round() / (L - 1) - x).abs().max() < 1e-6
    if scheme.data != "levels":
        assert math.isfinite(scheme.evaluate([x])["nll"])
    if scheme.data == "dequantized":
        assert scheme.evaluate([x], k=5)["nll"] < scheme.evaluate([x], k=5)["loss"]


@every_kind
def test_a_state_goes_on_bit_for_bit(name, tmp_path):
    one, other = tiny(name), tiny(name, seed=5)
    train(one, name, 3)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    assert other.begun
    assert torch.equal(train(one, name, 3, 1), train(other, name, 3, 1))
    assert torch.equal(flat_weights(one.model), flat_weights(other.model))


def fit_tiny(scheme, name, epochs, out, **more):
    """Fit a scheme to the images in a run folder and return its records."""
    data = Images(IMAGES)
    return fit(
        scheme,
        data,
        valid=data.subset(torch.arange(30)),
        epochs=epochs,
        out=out,
        batch_size=50,
        seed=3,
        progress="none",
        samples=2,
        ema=0.9,
        binarize="dynamic" if KINDS[name][1] == "binary" else None,
        **more,
    )


@some_kinds
def test_fit_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    def draw_nothing(*args):
        """Draw no pictures, to save time."""

    monkeypatch.setattr("optgen.training.callbacks.Pictures.on_epoch", draw_nothing)
    whole = tiny(name)
    records = fit_tiny(whole, name, 2, tmp_path / "whole")
    fit_tiny(tiny(name), name, 1, tmp_path / "parts")
    parts = tiny(name, seed=7)
    fit_tiny(parts, name, 2, tmp_path / "parts", resume=True)
    assert torch.equal(flat_weights(whole.model), flat_weights(parts.model))
    assert records[1]["valid"].keys() == {"loss", "nll", "nll_se", "bits_per_dim", "n"}
    assert records[1]["valid"]["loss"] < records[0]["valid"]["loss"]

    a, b = (checkpoint.load(tmp_path / out / "checkpoint.pt") for out in ("whole", "parts"))
    assert all(torch.equal(average, b["ema"][0][key]) for key, average in a["ema"][0].items())
    assert a["scheme"]["begun"]


@every_kind
def test_float32_follows_float64(name, monkeypatch):
    # By gradient descent: Adam's first steps follow the sign of a gradient that is zero, but for
    # rounding, where ActNorm was just calibrated.
    rand = torch.rand

    def rand_of_float64(*shape, dtype=None, **kwargs):
        """Return the same noise in every dtype."""
        return rand(*shape, dtype=F64, **kwargs).to(dtype)

    monkeypatch.setattr(torch, "rand", rand_of_float64)
    single, double = (
        train(tiny(name, dtype=dtype, make_optimizer=small_sgd), name, 8)
        for dtype in (torch.float32, F64)
    )
    assert single.dtype == torch.float32 and double.dtype == F64
    assert torch.allclose(single.double(), double, rtol=1e-4, atol=1e-3)


@every_kind
def test_bfloat16_autocast_trains(name):
    scheme = tiny(name)
    scheme.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    losses, exact = train(scheme, name, 25), train(tiny(name), name, 25)
    assert torch.allclose(losses, exact, rtol=0.02, atol=0.2)
    assert all(p.dtype == torch.float32 for p in scheme.model.parameters())


@every_kind
def test_a_step_on_meta(name):
    scheme = tiny(name, device="meta")
    loss = scheme.step(Batch(torch.zeros(4, *S, device="meta")))["model"]
    assert loss.is_meta and scheme.begun


class HostReads(TorchDispatchMode):
    """Count of the numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in KINDS if "zuko" not in name])
def test_only_the_first_step_reads(name):
    scheme = tiny(name)
    train(scheme, name, 1)
    x = pixels(name, 200)
    with HostReads() as reads:
        scheme.loss(scheme.draw(Batch(x))).backward()
    assert reads.count == 0
    fresh = tiny(name)
    with HostReads() as reads:
        fresh.draw(Batch(x))
    assert reads.count == 1


@pytest.mark.parametrize("name", ["made", "maf"])
def test_compiles_once_and_trains_alike(name, monkeypatch):
    eager, compiled = tiny(name, dtype=F64), tiny(name, dtype=F64)
    counter, real_compile = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda loss, mode: real_compile(loss, backend=counter))
    compiled.compile()
    a, b = train(eager, name, 3), train(compiled, name, 3)
    frames = counter.frame_count
    assert frames
    a = torch.cat([a, train(eager, name, 4, 1)])
    b = torch.cat([b, train(compiled, name, 4, 1)])
    assert torch.allclose(a, b, rtol=1e-9)
    assert counter.frame_count == frames
    weights = flat_weights(eager.model)
    assert torch.allclose(weights, flat_weights(compiled.model), rtol=1e-6, atol=1e-9)


def test_another_rule_trains_it():
    losses = train(tiny("maf", rule=Extragradient()), "maf", 30)
    assert losses[-5:].mean() < losses[:5].mean() - 0.3


def test_nan_is_found_and_named():
    bad = pixels("maf")
    bad[3, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="image 3 of the batch has a pixel nan"):
        tiny("maf").step(Batch(bad))
    scheme = tiny("made")
    next(scheme.model.parameters()).data[0, 0] = math.nan
    with pytest.raises(ValueError, match="likelihood of image 0 is NaN"):
        scheme.evaluate([pixels("made")])
    with pytest.raises(NonFinite, match="the loss of player 'model'"):
        fit(scheme, Images(IMAGES), binarize="dynamic", batch_size=50, progress="none")


def test_a_run_on_the_wrong_pixels_ends_at_once():
    with pytest.raises(ValueError, match="images of 0 or 1 are expected.*binarize='dynamic'"):
        fit(tiny("made"), Images(IMAGES), batch_size=50, progress="none")


def test_a_flow_does_not_start_from_one_image():
    scheme = tiny("maf")
    before = flat_weights(scheme.model).clone()
    with pytest.raises(ValueError, match="batch_size of two"):
        fit(scheme, Images(IMAGES), batch_size=1, progress="none")
    assert torch.equal(flat_weights(scheme.model), before) and not scheme.begun


@pytest.mark.parametrize("kind", ["NSF", "MAF"])
def test_conditional_flows_are_refused(kind):
    with pytest.raises(ValueError, match="conditional flow"):
        MaximumLikelihood(zuko_flow(kind, 3), "dequantized")


def test_a_model_without_a_likelihood_is_refused():
    class ReturnsTensor(torch.nn.Linear):
        def forward(self):
            return self.weight

    with pytest.raises(ValueError, match="Linear has no log_prob.*it raises TypeError"):
        MaximumLikelihood(torch.nn.Linear(2, 2), "dequantized")
    with pytest.raises(ValueError, match="ReturnsTensor has no log_prob.*it returns a Parameter"):
        MaximumLikelihood(ReturnsTensor(2, 2), "dequantized")


@pytest.mark.cuda
@every_kind
def test_cuda_as_on_the_cpu_without_a_sync(name):
    here, there = tiny(name, dtype=F64), tiny(name, dtype=F64, device="cuda")
    x = pixels(name, dtype=F64)
    here.step(Batch(x))
    there.load_state_dict(here.state_dict())
    noise = here.draw(Batch(x))
    loss = there.loss(Batch(noise.x.cuda())).cpu()
    assert torch.allclose(here.loss(noise), loss, rtol=1e-9)
    assert there.sample(3).is_cuda
    batch = Batch(x.cuda())
    there.step(batch)
    if "zuko" not in name:
        torch.cuda.set_sync_debug_mode("error")
        try:
            there.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(there.evaluate([batch])["nll"])
