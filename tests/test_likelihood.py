"MaximumLikelihood of the installed package: pixel models, flows and zuko's, by hand and by `fit`, resumed, compiled, moved between dtypes and devices."

import math

import pytest
import torch
from conftest import rng
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from optgen.data.images import Batch, Images, digits
from optgen.models.flow import Logit, image_flow, maf, realnvp
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM
from optgen.optim import SGD, Adam
from optgen.rules import Extragradient
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.training import checkpoint
from optgen.training.trainer import NonFinite, fit

F64, S = torch.float64, (1, 4, 4)
IMAGES = digits("train").images[:150, :, 5:26:6, 5:26:6].contiguous()


def zuko_flow(kind, context=0):
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
    "realnvp": (lambda: realnvp(16, 2, (12,), before=[Logit()]), "dequantized"),
    "maf": (lambda: maf(16, 2, (12,), before=[Logit()]), "dequantized"),
    "image_flow": (lambda: image_flow(S, 1, 1, 4, 1, before=[Logit(0.05)]), "dequantized"),
    "zuko NSF": (lambda: zuko_flow("NSF"), "dequantized"),
    "zuko MAF": (lambda: zuko_flow("MAF"), "dequantized"),
}
everyone = pytest.mark.parametrize("name", KINDS)
some = pytest.mark.parametrize("name", ["lstm", "pixelcnn of 3", "image_flow", "zuko NSF"])


def tiny(
    name,
    seed=0,
    dtype=torch.float32,
    device="cpu",
    make=lambda params: Adam(params, lr=5e-3),
    **more,
):
    build, data = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(device, dtype)
    return MaximumLikelihood(model, data, make(model.parameters()), shape=S, **more)


def pixels(name, n=20, seed=0, dtype=torch.float32):
    x = IMAGES[torch.randint(len(IMAGES), (n,), generator=rng(seed))].to(dtype) / 255
    return x.round() if KINDS[name][1] == "binary" else x


def train(scheme, name, steps, seed=0):
    like = next(scheme.model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack(
            [
                scheme.step(Batch(pixels(name, seed=100 * seed + t).to(like)))["model"]
                for t in range(steps)
            ]
        )


def weights(scheme):
    return torch.cat([p.detach().flatten() for p in scheme.model.parameters()])


@everyone
def test_it_learns_evaluates_and_draws(name):
    for seed in (0, 1):
        scheme = tiny(name, seed)
        losses = train(scheme, name, 40, seed)
        assert losses[-5:].mean() < losses[:5].mean() - 0.3
        found = scheme.evaluate([Batch(pixels(name, 60, 1)), pixels(name, 5, 2)])
        assert (
            found["n"] == 65
            and abs(found["bits_per_dim"] - found["nll"] / 16 / math.log(2)) < 1e-9
            and found["loss"] == pytest.approx(found["nll"])
        )
        L = {"binary": 2, "dequantized": 256}.get(scheme.data, scheme.levels)
        torch.manual_seed(seed)
        x = scheme.sample(30)
        assert (
            x.shape == (30, *S)
            and 0 <= x.min()
            and x.max() <= 1
            and ((x * (L - 1)).round() / (L - 1) - x).abs().max() < 1e-6
        )
        if scheme.data != "levels":
            assert math.isfinite(scheme.evaluate([x])["nll"])
        if scheme.data == "dequantized":
            assert scheme.evaluate([x], k=5)["nll"] < scheme.evaluate([x], k=5)["loss"]


@everyone
def test_a_state_goes_on_bit_for_bit(name, tmp_path):
    one, other = tiny(name), tiny(name, seed=5)
    train(one, name, 3)
    checkpoint.save(tmp_path / "state.pt", one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    assert (
        other.begun
        and torch.equal(train(one, name, 3, 1), train(other, name, 3, 1))
        and torch.equal(weights(one), weights(other))
    )


@some
def test_fit_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "optgen.training.trainer.RunFolder.draw", lambda *args: None
    )  # to save time
    data, run = (
        Images(IMAGES),
        lambda scheme, epochs, out, **more: fit(
            scheme,
            data,
            valid=data.subset(torch.arange(30)),
            epochs=epochs,
            out=tmp_path / out,
            batch_size=50,
            seed=3,
            progress="none",
            samples=2,
            ema=0.9,
            binarize={"binary": "dynamic"}.get(KINDS[name][1]),
            **more,
        ),
    )
    whole = tiny(name)
    records = run(whole, 2, "whole")
    run(tiny(name), 1, "parts")
    parts = tiny(name, seed=7)
    run(parts, 2, "parts", resume=True)
    assert torch.equal(weights(whole), weights(parts)) and records[1]["valid"].keys() == {
        "loss",
        "nll",
        "nll_se",
        "bits_per_dim",
        "n",
    }
    assert records[1]["valid"]["loss"] < records[0]["valid"]["loss"]
    a, b = (checkpoint.load(tmp_path / out / "checkpoint.pt") for out in ("whole", "parts"))
    assert (
        all(torch.equal(v, b["ema"][0][k]) for k, v in a["ema"][0].items()) and a["scheme"]["begun"]
    )


@everyone
def test_float32_follows_float64(name, monkeypatch):
    "By plain gradient descent: Adam's first steps follow the sign of a gradient that is 0 but for rounding where ActNorm was just calibrated."
    rand = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *s, dtype=None, **kwargs: rand(*s, dtype=F64, **kwargs).to(dtype)
    )  # the same noise
    a, b = (
        train(tiny(name, dtype=dtype, make=lambda params: SGD(params, lr=1e-3)), name, 8)
        for dtype in (torch.float32, F64)
    )
    assert (
        a.dtype == torch.float32
        and b.dtype == F64
        and torch.allclose(a.double(), b, rtol=1e-4, atol=1e-3)
    )


@everyone
def test_bfloat16_autocast_trains(name):
    scheme = tiny(name)
    scheme.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    losses = train(scheme, name, 25)
    assert (
        losses.isfinite().all()
        and losses[-3:].mean() < losses[:3].mean()
        and all(p.dtype == torch.float32 for p in scheme.model.parameters())
    )


@everyone
def test_a_step_on_meta(name):
    scheme = tiny(name, device="meta")
    assert scheme.step(Batch(torch.zeros(4, *S, device="meta")))["model"].is_meta and scheme.begun


class Reads(TorchDispatchMode):
    "Counts numbers read on the host."

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in KINDS if "zuko" not in name])
def test_only_the_first_step_reads(name):
    scheme = tiny(name)
    train(scheme, name, 1)
    x = pixels(name, 200)
    with Reads() as reads:
        scheme.loss(scheme.draw(Batch(x))).backward()
    assert reads.count == 0
    with Reads() as reads:
        scheme.begin(x, scheme.treat(x))
    assert reads.count == 1


@pytest.mark.parametrize("name", ["made", "maf"])
def test_compiles_once_and_trains_alike(name, monkeypatch):
    eager, scheme, counter, real = (
        tiny(name, dtype=F64),
        tiny(name, dtype=F64),
        CompileCounter(),
        torch.compile,
    )
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda loss, mode: real(loss, backend=counter))
    scheme.compile()
    a, b = train(eager, name, 3), train(scheme, name, 3)
    once = counter.frame_count
    assert (
        once
        and torch.allclose(
            torch.cat([a, train(eager, name, 4, 1)]),
            torch.cat([b, train(scheme, name, 4, 1)]),
            rtol=1e-9,
        )
        and counter.frame_count == once
    )
    assert torch.allclose(weights(eager), weights(scheme), rtol=1e-6, atol=1e-9)


def test_other_rules_move_it():
    scheme = tiny("maf", rule=Extragradient())
    losses = train(scheme, "maf", 30)
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


def test_a_run_on_grey_images_ends_at_once(tmp_path):
    with pytest.raises(ValueError, match="images of 0 or 1 are expected.*binarize='dynamic'"):
        fit(tiny("made"), Images(IMAGES), batch_size=50, progress="none")
    scheme = tiny("maf")
    before = weights(scheme).clone()
    with pytest.raises(ValueError, match="batch_size of two"):
        fit(scheme, Images(IMAGES), batch_size=1, progress="none")
    assert torch.equal(weights(scheme), before) and not scheme.begun


def test_conditional_flows_are_refused():
    for kind in ("NSF", "MAF"):
        with pytest.raises(ValueError, match="conditional flow"):
            MaximumLikelihood(zuko_flow(kind, 3), "dequantized")


@pytest.mark.cuda
@everyone
def test_cuda_as_on_the_cpu_without_a_sync(name):
    here, there = tiny(name, dtype=F64), tiny(name, dtype=F64, device="cuda")
    x = pixels(name, dtype=F64)
    here.step(Batch(x))
    there.load_state_dict(here.state_dict())
    noise = here.draw(Batch(x))
    assert (
        torch.allclose(here.loss(noise), there.loss(Batch(noise.x.cuda())).cpu(), rtol=1e-9)
        and there.sample(3).is_cuda
    )
    batch = Batch(x.cuda())
    there.step(batch)
    if "zuko" not in name:
        torch.cuda.set_sync_debug_mode("error")
        try:
            there.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(there.evaluate([batch])["nll"])
