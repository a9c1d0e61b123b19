"""Limits of models and of PyTorch: found at construction, explained in a sentence, or made to work.

A table of schemes is tried in every dtype and batch size, and each of PyTorch's errors is made in a
training step.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optgen.data.images import Batch, Images
from optgen.data.loading import Loader
from optgen.games import Game, Player
from optgen.inner import Refinement
from optgen.limits import ModelError
from optgen.models.autoregressive import AutoregressiveVAE
from optgen.models.diffusion import Denoiser, UNet
from optgen.models.flow import Logit, image_flow, maf
from optgen.models.gan import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator
from optgen.models.pixels import MADE, PixelCNN, PixelLSTM
from optgen.models.vae import VAE, ConvVAE, GaussianVAE
from optgen.optim import Adam
from optgen.rules import Consensus, input_gradient_penalty
from optgen.schemes.assisted import Assisted
from optgen.schemes.couplings import Agreement, Denoising, Reconstruction
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.schemes.networks import METHODS, build_networks
from optgen.testing import generator
from optgen.training.trainer import fit

SHAPE = (1, 8, 8)
GRAY = torch.randint(256, (6, *SHAPE), generator=generator(0)) / 255
BINARY, LABELS = GRAY.round(), torch.arange(6) % 3
Dtype = torch.dtype


def vae(make: Callable[[], nn.Module], dtype: Dtype, **settings: Any) -> BetaVAE:
    """Return the scheme of a VAE in a dtype."""
    return BetaVAE(make().to(dtype), **settings)


def small_vae() -> VAE:
    """Return a VAE of the images of this file."""
    return VAE(64, 8, 6, 3)


def assisted(method: str, dtype: Dtype) -> Assisted:
    """Return the scheme of a method of assistance in a dtype."""
    parts = build_networks(method, (64, 8, 3), 3)
    for name in ("classifier", "generator", "features"):
        if parts[name] is not None:
            parts[name].to(dtype)
    return Assisted(**parts)


def gan(dtype: Dtype, conv: bool = False, **settings: Any) -> FeedbackGAN:
    """Return a small GAN in a dtype."""
    if conv:
        networks = ConvGenerator(SHAPE, 3, width=4), ConvDiscriminator(SHAPE, width=4)
    else:
        networks = MLPGenerator(3, [8], SHAPE, out="sigmoid"), MLPDiscriminator(SHAPE, [8])
    return FeedbackGAN(*(net.to(dtype) for net in networks), **settings)


def likelihood(make: Callable[[], nn.Module], data: str, dtype: Dtype) -> MaximumLikelihood:
    """Return the scheme of a model with a likelihood in a dtype."""
    return MaximumLikelihood(make().to(dtype), data)


def diffusion(target: str, dtype: Dtype) -> DenoisingDiffusion:
    """Return a small diffusion model in a dtype."""
    return DenoisingDiffusion(Denoiser(UNet(SHAPE, 4, [1, 1], 1), SHAPE, target).to(dtype), target)


def before() -> list[nn.Module]:
    """Return the first transforms of a flow of images."""
    return [Logit(1e-6)]


# By name: the scheme in a dtype, and images for it.
SCHEMES = {
    "vae": (lambda dtype: vae(small_vae, dtype), BINARY),
    "gaussian vae": (lambda dtype: vae(lambda: GaussianVAE(64, 8, 6, 3), dtype), GRAY),
    "conv vae": (lambda dtype: vae(lambda: ConvVAE(SHAPE, 3), dtype), BINARY),
    "iwae": (lambda dtype: vae(small_vae, dtype, estimator="iwae", k=3), BINARY),
    "pixel vae": (lambda dtype: vae(lambda: AutoregressiveVAE(SHAPE, 3), dtype), BINARY),
    "semi": (lambda dtype: vae(small_vae, dtype, inner=Refinement(2)), BINARY),
    **{name: (lambda dtype, name=name: assisted(name, dtype), GRAY) for name in METHODS},
    "gan": (gan, GRAY),
    "hinge": (lambda dtype: gan(dtype, loss="hinge"), GRAY),
    "conv gan": (lambda dtype: gan(dtype, conv=True, r1=1.0, r2=1.0), GRAY),
    "consensus": (lambda dtype: gan(dtype, rule=Consensus(0.1)), GRAY),
    "made": (lambda dtype: likelihood(lambda: MADE(SHAPE, [8], 2), "binary", dtype), BINARY),
    "lstm": (lambda dtype: likelihood(lambda: PixelLSTM(SHAPE, 4, 1, 2), "binary", dtype), BINARY),
    "pixelcnn": (
        lambda dtype: likelihood(lambda: PixelCNN(SHAPE, 4, 2, levels=9), "levels", dtype),
        GRAY,
    ),
    "realnvp": (
        lambda dtype: likelihood(
            lambda: image_flow(SHAPE, 1, 1, 4, 1, preprocessing=before()), "dequantized", dtype
        ),
        GRAY,
    ),
    "maf": (
        lambda dtype: likelihood(
            lambda: maf(64, 2, [8], preprocessing=before()), "dequantized", dtype
        ),
        GRAY,
    ),
    **{
        target: (lambda dtype, target=target: diffusion(target, dtype), GRAY)
        for target in ("eps", "v", "flow")
    },
}
DEQUANTIZED = {"realnvp", "maf", "eps", "v", "flow"}
LADDERS = {"ladder", "gamma"}


def make(name: str, dtype: Dtype = torch.float32) -> Game:
    """Return a scheme of the table, with the same weights at each call."""
    torch.manual_seed(1)
    return SCHEMES[name][0](dtype)


def use(scheme: Game, x: Tensor) -> dict[str, Tensor]:
    """Step, evaluate and sample a scheme, and return the losses of the step."""
    torch.manual_seed(2)
    losses = scheme.step(Batch(x, LABELS[: len(x)]))
    scheme.train(False).evaluate([Batch(x, LABELS[: len(x)])])
    scheme.sample(2)
    return losses


@pytest.mark.parametrize("name", SCHEMES)
def test_images_get_the_dtype_of_a_double_model(name):
    found, x = make(name, torch.float64), SCHEMES[name][1]
    losses = use(found, x)
    expected = use(make(name, torch.float64), x.double())  # what is double already is not cast
    assert losses == expected and all(loss.dtype == torch.float64 for loss in losses.values())
    for player in found.players.values():
        assert all(p.dtype == torch.float64 for p in player.params.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_half_precision_trains_or_is_refused_in_a_sentence(name):
    scheme, x = make(name, torch.bfloat16), SCHEMES[name][1]
    if name in DEQUANTIZED:
        with pytest.raises(ValueError, match="bfloat16 can't hold numbers between two of 256"):
            use(scheme, x)
    elif name in LADDERS:
        with pytest.raises(ModelError, match="a layer does not take this dtype"):
            use(scheme, x)
    else:
        assert all(loss.isfinite() for loss in use(scheme, x).values())


@pytest.mark.parametrize("name", SCHEMES)
def test_float16_with_an_eps_of_zero_is_refused(name):
    with pytest.raises(ValueError, match="float16, in which the optimizer's eps of 1e-08 is zero"):
        use(make(name, torch.float16), SCHEMES[name][1])


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEMES)
def test_odd_batches_train_or_are_refused_in_a_sentence(name, n):
    scheme, x = make(name), SCHEMES[name][1][:n]
    batch = Batch(x, LABELS[:n])
    if n == 1 and name in LADDERS | {"realnvp", "maf"}:
        with pytest.raises(ValueError, match="one image|at least two examples"):
            scheme.step(batch)
        return
    assert all(loss.isfinite() for loss in scheme.step(batch).values())
    for player in scheme.players.values():
        assert all(p.isfinite().all() for p in player.params.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_memory_format_of_images_changes_no_loss(name):
    x = SCHEMES[name][1]
    expected = make(name).step(Batch(x, LABELS))  # noise of the same seed
    scheme = make(name).to(memory_format=torch.channels_last)
    found = scheme.step(Batch(x.to(memory_format=torch.channels_last), LABELS))
    for key, loss in expected.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_images_on_another_device_are_refused(name):
    with pytest.raises(ValueError, match="the batch is on meta, the model on cpu. Fix: pass x.to"):
        make(name).step(Batch(SCHEMES[name][1].to("meta"), LABELS))


# Images that no model of the table takes.
WRONG = {
    "three channels": lambda x: x.expand(-1, 3, -1, -1),
    "sixteen pixels a side": lambda x: F.interpolate(x, scale_factor=2),
    "two pixels a side": lambda x: x[..., :2, :2],
    "bytes": lambda x: (255 * x).byte(),
}
# Without a fixed size of the images, or with embeddings of levels.
TAKES = {("pixelcnn", "sixteen pixels a side"), ("pixelcnn", "two pixels a side")}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", SCHEMES)
def test_images_of_another_kind_are_refused_in_a_sentence(name, kind):
    x = WRONG[kind](SCHEMES[name][1])
    for method in ("step", "evaluate"):
        scheme = make(name).train(method == "step")
        batch = Batch(x, LABELS)
        try:
            getattr(scheme, method)(batch if method == "step" else [batch])
        except ValueError as error:  # ModelError and DataError are of this class
            assert str(error) and "\n" not in str(error)
        else:
            assert kind != "bytes" or name in LADDERS  # their noise makes bytes numbers


class Lacking(nn.Module):
    """A module with some attributes, each of which is the identity.

    Args:
        *names: of the attributes.
        **values: further attributes.
    """

    def __init__(self, *names: str, **values: Any) -> None:
        super().__init__()
        self.net = nn.Linear(64, 3)
        for name in names:
            setattr(self, name, nn.Identity())
        for name, value in values.items():
            setattr(self, name, value)


VAE_PARTS = ("encoder", "decoder", "log_likelihood")
LACKING = {
    "vae without z_dim": (lambda: BetaVAE(Lacking(*VAE_PARTS)), "lacks z_dim"),
    "vae without likelihood": (
        lambda: BetaVAE(Lacking("encoder", "decoder", z_dim=2)),
        "lacks log_likelihood",
    ),
    "vae of no latents": (lambda: BetaVAE(Lacking(*VAE_PARTS, z_dim=0)), "z_dim must be .* got 0"),
    "vae of half a latent": (lambda: BetaVAE(Lacking(*VAE_PARTS, z_dim=1.5)), "z_dim must be"),
    "vae that is a function": (lambda: BetaVAE(abs), "model must be a torch.nn.Module"),
    "vae of two players": (
        lambda: BetaVAE(
            Lacking(*VAE_PARTS, z_dim=2), optimizer=(Adam([Tensor([1])]), Adam([Tensor([1])]))
        ),
        "lacks q_net, p_net",
    ),
    "gan without z_dim": (lambda: FeedbackGAN(Lacking(), Lacking()), "generator .* lacks z_dim"),
    "gan with a function": (
        lambda: FeedbackGAN(Lacking(z_dim=2), abs),
        "discriminator must be a torch.nn.Module",
    ),
    "agreement": (
        lambda: Assisted(Lacking(), Lacking("bound"), Agreement()),
        "Agreement: generator .* lacks decoder, log_prior, z_dim",
    ),
    "reconstruction": (
        lambda: Assisted(Lacking(), Lacking(), Reconstruction()),
        "Reconstruction: classifier .* lacks features",
    ),
    "denoising": (
        lambda: Assisted(Lacking(), Lacking(), Denoising()),
        "Denoising: classifier .* lacks activations",
    ),
    "features": (
        lambda: Assisted(Lacking(), features=Lacking(*VAE_PARTS, z_dim=2)),
        "features .* lacks reparameterize",
    ),
    "classifier": (lambda: Assisted(abs), "classifier must be a torch.nn.Module"),
    "density": (lambda: MaximumLikelihood(Lacking(), "dequantized"), "has no log_prob"),
    "denoiser": (lambda: DenoisingDiffusion(nn.Linear(2, 2)), "lacks output, shape, target, std"),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_model_that_lacks_something_is_refused_at_construction(name):
    build, words = LACKING[name]
    with pytest.raises(ValueError, match=words):
        build()


def game_of(net: nn.Module, loss: Callable[[Tensor], Tensor], **settings: Any) -> Game:
    """Return a game of one player with a loss of one's own."""
    return Game(model=Player(net, loss, Adam(net.parameters())), **settings)


def mean_square(net: nn.Module) -> Game:
    """Return a game that makes the output of a network small."""
    return game_of(net, lambda x: net(x).square().mean())


class InPlace(nn.Linear):
    """A layer that changes what its gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the exponential of the layer, changed in place."""
        return super().forward(x).exp_().add_(1).exp().mul_(2).relu_().sigmoid().add_(1)


class Views(nn.Linear):
    """A layer that takes images apart by a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer of the rows of an image."""
        return super().forward(x.view(len(x), -1))


class Pair(nn.Linear):
    """A layer that returns its output twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two outputs."""
        out = super().forward(x)
        return out, out


class Attention(nn.Module):
    """One head of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each image."""
        rows = self.net(x.flatten(0, 1))
        return F.scaled_dot_product_attention(rows, rows, rows).flatten(1).mean(1)


def penalized(net: nn.Module) -> Game:
    """Return a game whose loss has a gradient penalty."""
    return game_of(net, lambda x: input_gradient_penalty(net, x))


FLAT = GRAY.flatten(1)
# What a step is tried on, and the cause that its error names.
ERRORS = {
    "one image for BatchNorm": (
        lambda: mean_square(nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4))),
        FLAT[:1],
        "BatchNorm cannot normalize a batch of one image",
    ),
    "one pixel for InstanceNorm": (
        lambda: mean_square(nn.Sequential(nn.Conv2d(1, 2, 8), nn.InstanceNorm2d(2, affine=True))),
        GRAY,
        "InstanceNorm cannot normalize one pixel",
    ),
    "kernel larger than the image": (
        lambda: mean_square(nn.Conv2d(1, 2, 9)),
        GRAY,
        "the images are too small for the model's convolutions",
    ),
    "pooling of nothing": (
        lambda: mean_square(nn.Sequential(nn.Conv2d(1, 2, 8), nn.MaxPool2d(2))),
        GRAY,
        "the images are too small for the model's convolutions",
    ),
    "three channels wanted": (
        lambda: mean_square(nn.Conv2d(3, 2, 3)),
        GRAY,
        "made for another number of channels",
    ),
    "other image size": (
        lambda: mean_square(nn.Linear(784, 3)),
        FLAT,
        "a layer or a loss does not fit its input",
    ),
    "other targets": (
        lambda: game_of(net := nn.Linear(64, 3), lambda x: F.mse_loss(net(x), x[:, :2])),
        FLAT,
        "a layer or a loss does not fit its input",
    ),
    "double model": (
        lambda: mean_square(nn.Linear(64, 3).double()),
        FLAT,
        "a layer does not take this dtype",
    ),
    "double convolution": (
        lambda: mean_square(nn.Conv2d(1, 2, 3).double()),
        GRAY,
        "a layer does not take this dtype",
    ),
    "integers": (
        lambda: mean_square(nn.Linear(64, 3)),
        FLAT.long(),
        "a layer does not take this dtype",
    ),
    "mean of integers": (
        lambda: game_of(net := nn.Linear(64, 3), lambda x: net(x.float()).sum() + x.mean()),
        FLAT.long(),
        "a layer does not take this dtype",
    ),
    "part of the model in double precision": (
        lambda: mean_square(nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 3).double())),
        FLAT,
        "a layer does not take this dtype",
    ),
    "model on another device": (
        lambda: mean_square(nn.Linear(64, 3)),
        FLAT.to("meta"),
        "on different devices",
    ),
    "in place": (
        lambda: game_of(
            net := nn.Linear(64, 3), lambda x: (y := net(x).exp()).mul(y.add_(1)).mean()
        ),
        FLAT,
        "changes a tensor in place",
    ),
    "a view of a transposed image": (
        lambda: mean_square(Views(64, 3)),
        GRAY.permute(0, 1, 3, 2),
        "calls view on images that are not contiguous",
    ),
    "a pair where a tensor is expected": (
        lambda: mean_square(Pair(64, 3)),
        FLAT,
        "returns several values where one tensor is expected",
    ),
    "a pair in a loss of torch's": (
        lambda: game_of(net := Pair(64, 3), lambda x: F.cross_entropy(net(x), LABELS)),
        FLAT,
        "returns several values where one tensor is expected",
    ),
    "fused attention": (
        lambda: penalized(Attention()),
        GRAY,
        "differentiates the model twice",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_pytorch_is_explained(name):
    build, x, words = ERRORS[name]
    with pytest.raises(ModelError, match=words) as raised:
        build().step(x)
    message = str(raised.value)
    assert "\n" not in message and f"shape {tuple(x.shape)}" in message
    assert raised.value.__cause__ is not None  # PyTorch's own error stays behind it


def test_other_errors_pass_as_they_are():
    def loss(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        game_of(nn.Linear(64, 3), loss).step(FLAT)


def test_a_loss_under_compilation_that_differentiates_twice_is_explained(monkeypatch):
    import torch._functorch.aot_autograd  # noqa: F401  what torch.compile uses

    net = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    compiled = torch.compile(net, backend="aot_eager")
    with pytest.raises(ModelError, match="differentiates the model twice.*without compile"):
        game_of(net, lambda x: input_gradient_penalty(compiled, x)).step(FLAT)


@pytest.mark.parametrize("output", ["tuple", "vector", "dict", "image"])
def test_a_classifier_returns_logits_alone(output):
    class Own(nn.Linear):
        """A classifier with another kind of output."""

        def forward(self, x: Tensor) -> Any:
            """Return something else than logits (B, K)."""
            logits = super().forward(x.flatten(1))
            kinds = {
                "tuple": (logits, logits),
                "vector": logits[:, 0],
                "dict": {"logits": logits},
                "image": logits[..., None],
            }
            return kinds[output]

    with pytest.raises(ValueError, match="classifier must return one tensor of 2 dimensions"):
        Assisted(Own(64, 3)).step(Batch(GRAY, LABELS))


def images(n: int) -> Images:
    """Return gray images with labels."""
    return Images((255 * GRAY).byte().repeat(4, 1, 1, 1)[:n], LABELS.repeat(4)[:n])


def normalized() -> Assisted:
    """Return a classifier with BatchNorm."""
    return Assisted(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)))


def test_a_last_batch_of_one_image_is_left_out_for_batch_norm():
    steps = []
    for n in (8, 9, 10, 12):
        scheme = normalized()
        fit(scheme, images(n), epochs=1, batch_size=4, progress="none")
        steps.append(int(scheme.classifier[2].num_batches_tracked))
    assert steps == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "build",
    [
        lambda: (Loader(images(9), 4), {}),
        lambda: (images(9), {"batch_size": 1}),
        lambda: (images(1), {"batch_size": 4}),
    ],
)
def test_a_batch_of_one_image_is_refused_before_the_first_step(build, tmp_path):
    data, settings = build()
    with pytest.raises(ValueError, match="the last batch has one, which BatchNorm cannot"):
        fit(normalized(), data, out=tmp_path / "run", progress="none", **settings)
    assert not (tmp_path / "run").exists()


def test_without_batch_norm_a_last_batch_of_one_image_is_trained_on():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    fit(Assisted(net), images(9), epochs=1, batch_size=4, progress="none")
    assert seen[-3:] == [4, 4, 1]  # after a look at the first images for their classes


SPAWN = """
import multiprocessing
import sys

from optgen.data.folders import image_folder
from optgen.data.loading import Loader

multiprocessing.set_start_method("spawn", force=True)
for batch in Loader(image_folder(sys.argv[1], "train", 8, memory_limit=0), 30, workers=1):
    print(len(batch.x))
"""


def test_processes_that_cannot_start_are_explained(few_images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    words = [sys.executable, str(script), str(few_images)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "bootstrapping" not in done.stderr
    assert "if __name__ == '__main__':" in done.stderr.splitlines()[-1]
