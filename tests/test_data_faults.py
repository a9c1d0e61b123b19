"""Data that are not what a model says: each refused in one line, with the likely cause.

A row of a table is a case: how the data are made, and words of the message.
"""

import math

import pytest
import torch
from PIL import Image
from torch import nn

from data_helpers import refuses
from optgen.data.images import Batch, Images
from optgen.data.loading import Loader, balanced_indices, split_holdout
from optgen.data.sequences import Sequences
from optgen.metrics import auroc, evaluate_vae, measure_calibration
from optgen.models.autoregressive import AutoregressiveVAE, SequenceVAE
from optgen.models.classifier import Classifier, Perceptron
from optgen.models.conditional import ConditionalVAE
from optgen.models.diffusion import Denoiser, PerceptronDenoiser, UNet
from optgen.models.flow import maf
from optgen.models.gan import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator
from optgen.models.pixels import MADE
from optgen.models.vae import VAE, ConvVAE, GaussianVAE
from optgen.sample_quality import feature_stats, fid, label_coverage
from optgen.schemes.assisted import Assisted
from optgen.schemes.denoising import DenoisingDiffusion
from optgen.schemes.elbo import BetaVAE
from optgen.schemes.feedback import FeedbackGAN
from optgen.schemes.levels import optimal_coupling
from optgen.schemes.likelihood import MaximumLikelihood
from optgen.schemes.networks import build_networks
from optgen.testing import generator
from optgen.training.trainer import fit
from optgen.viz import image_grid

GRAY = torch.randint(256, (6, 1, 8, 8), generator=generator(0)) / 255
Y = torch.tensor([0, 1, 2, 2, 1, 0])
NAN, INF = GRAY.clone(), GRAY.clone()
NAN[2, 0, 3, 3], INF[5, 0, 0, 0] = math.nan, math.inf
BYTES = (255 * GRAY).round().to(torch.uint8)
COLOR = BYTES.expand(-1, 3, -1, -1)


# sets

IMAGES = {
    "floats in [0, 1]": (GRAY, "float32", "(255 * x).round().to(torch.uint8)"),
    "doubles in [0, 1]": (GRAY.double(), "float64", "(255 * x).round()"),
    "floats in [0, 255]": (255 * GRAY, "float32", "0..255 already"),
    "floats in [-1, 1]": (2 * GRAY - 1, "float32", "(x + 1) / 2"),
    "standardized": (4 * (GRAY - 0.5), "float32", "standardized"),
    "half": (GRAY.half(), "float16", "(255 * x)"),
    "NaN": (NAN, "float32", "not finite"),
    "infinity": (INF, "float32", "not finite"),
    "bool": (GRAY > 0.5, "torch.bool", "(255 * x)"),
    "int64": (BYTES.long(), "int64", "x.round().to(torch.uint8)"),
    "int32": (BYTES.int(), "int32", ".to(torch.uint8)"),
    "uint16": ((257 * BYTES.long()).to(torch.uint16), "uint16", "16 bits"),
    "int16 below 0": (-BYTES.short(), "int16", "standardized"),
    "complex": (GRAY + 0j, "complex64", "scale to 0..255"),
    "NHWC color": (COLOR.permute(0, 2, 3, 1), "(6, 8, 8, 3)", "permute(0, 3, 1, 2)"),
    "NHWC gray": (BYTES.permute(0, 2, 3, 1), "(6, 8, 8, 1)", "permute(0, 3, 1, 2)"),
    "NHWC with alpha": (torch.zeros(2, 9, 7, 4).byte(), "(2, 9, 7, 4)", "permute"),
    "no channels": (BYTES[:, 0], "(6, 8, 8)", "unsqueeze(1)"),
    "flat": (BYTES.flatten(1), "(6, 64)", "view(N, C, H, W)"),
    "five axes": (BYTES[None], "(1, 6, 1, 8, 8)", "view(N, C, H, W)"),
    "no height": (BYTES[:, :, :0], "(6, 1, 0, 8)", "no size of 0"),
    "numpy": (BYTES.numpy(), "numpy.ndarray of uint8", "torch.from_numpy"),
    "numpy int64": (BYTES.long().numpy(), "ndarray of int64", "torch.from_numpy"),
    "list of tensors": (list(BYTES), "list of length 6", "torch.stack"),
    "picture": (Image.new("L", (8, 8)), "PIL.Image", "from_numpy"),
    "list of pictures": ([Image.new("L", (8, 8))], "list of length 1", "torch.stack"),
    "a path": ("images.pt", "a str", "torch.Tensor"),
    "nothing": (None, "NoneType", "torch.Tensor"),
}
LABELS = {
    "numpy int64": (Y.numpy(), "numpy.ndarray of int64 with shape (6,)", "from_numpy"),
    "list": (Y.tolist(), "list of length 6", "torch.tensor(x)"),
    "floats": (Y.float(), "float32", "y.long()"),
    "int32": (Y.int(), "int32", "y.long()"),
    "bool": (Y > 0, "bool", "y.long()"),
    "one-hot": (nn.functional.one_hot(Y), "(6, 3)", "y.argmax(1)"),
    "a column": (Y[:, None], "(6, 1)", "y.flatten()"),
    "too few": (Y[:5], "(5,)", "one label an image"),
    "too many": (torch.cat([Y, Y]), "(12,)", "one label an image"),
    "10, 20, 30": (10 * Y + 10, "10 to 30, expected 0 to 2", "unique(return_inverse=True)"),
    "1 to 3": (Y + 1, "1 to 3, expected 0 to 2", "number the classes from 0"),
    "-100": (torch.where(Y == 0, -100, Y), "-100 to 2", "-1 for unknown"),
    "a string": ("cat", "a str of length 3", "torch.Tensor"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_set_of_other_things_than_bytes_is_refused(case):
    images, *words = IMAGES[case]
    with refuses("images are", "expected uint8 (N, C, H, W)", *words):
        Images(images)


@pytest.mark.parametrize("case", LABELS)
def test_a_set_with_other_labels_is_refused(case):
    labels, *words = LABELS[case]
    with refuses("labels are", *words):
        Images(BYTES, labels, classes=("a", "b", "c"))
    if "1 to 3" not in case and "10" not in case:
        with refuses("labels are"):
            Sequences(BYTES.flatten(1).long(), labels, classes=("a", "b", "c"))


@pytest.mark.parametrize(
    "tokens, word",
    [
        (BYTES.flatten(1), "uint8"),
        (BYTES.flatten(1).long().numpy(), "numpy.ndarray of int64"),
        (BYTES.flatten(1).tolist(), "list of length 6"),
        (GRAY.flatten(1), "float32"),
        (BYTES.flatten(1).long() - 300, "a token is -"),
    ],
)
def test_other_things_than_tokens_are_refused(tokens, word):
    with refuses(word):
        Sequences(tokens)


@pytest.mark.parametrize(
    "data, word",
    [
        (BYTES, "Tensor"),
        (BYTES.numpy(), "ndarray"),
        (list(BYTES), "list"),
        (torch.utils.data.TensorDataset(BYTES), "TensorDataset"),
        (torch.utils.data.DataLoader(BYTES), "DataLoader"),
        ("digits", "str"),
        (None, "NoneType"),
    ],
)
def test_other_things_than_sets_are_no_data_of_a_loader(data, word):
    with refuses(word, "expected an ImageSet", "Images(x"):
        Loader(data, 2)


@pytest.mark.parametrize("data, word", [(list(BYTES), "list"), ("digits", "str"), (None, "None")])
def test_what_is_neither_data_nor_a_loader_is_refused_by_a_training(data, word):
    with refuses(word, "expected tensors, a Dataset or a DataLoader"):
        fit(vae(), data, progress="none")


def test_what_is_unusual_and_right_is_taken():
    Images(torch.zeros(2, 3, 1, 1, dtype=torch.uint8))
    Images(torch.zeros(2, 1, 1, 3, dtype=torch.uint8))
    Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    Images(torch.zeros(2, 8, 64, 1, dtype=torch.uint8))  # eight channels of a signal
    Images(BYTES, torch.full((6,), -1), classes=("a",))
    assert len(Images(BYTES[:0], Y[:0])) == 0


# batches


def vae(model=None):
    "Return a VAE of images of 8 x 8."
    return BetaVAE(model or VAE(64, 8, 8, 2))


def conv_vae():
    "Return a convolutional VAE."
    return vae(ConvVAE((1, 8, 8), 2, width=2))


def gaussian_vae():
    "Return a VAE with a Gaussian decoder."
    return vae(GaussianVAE(64, 8, 8, 2))


def autoregressive_vae():
    "Return a VAE of binary images."
    return vae(AutoregressiveVAE((1, 8, 8), 2, hidden=8, width=4, radius=1))


def sequence_vae():
    "Return a VAE of 64 tokens out of 300."
    return vae(SequenceVAE(300, 64, 2, 4, 4))


def gan():
    "Return a GAN of pixels in [0, 1]."
    return FeedbackGAN(ConvGenerator((1, 8, 8), 2, 2), ConvDiscriminator((1, 8, 8), 2))


def linear_gan():
    "Return a GAN of any numbers."
    return FeedbackGAN(MLPGenerator(2, (4,), (1, 8, 8)), MLPDiscriminator((1, 8, 8), (4,)))


def plain():
    "Return a classifier of three classes."
    return Assisted(Perceptron(64, 3, (8,)))


def conv_classifier():
    "Return a convolutional classifier of three classes."
    return Assisted(Classifier((1, 8, 8), 3, 2, 4))


def agreement():
    "Return a classifier with a conditional VAE."
    return Assisted(Perceptron(64, 3, (8,)), ConditionalVAE(64, 3, 2, 8))


def with_method(method):
    "Return a method of assistance for three classes."
    return Assisted(**build_networks(method, (64, 8, 8, 3), z_dim=2))


def reconstruction():
    "Return a classifier with a Bernoulli decoder."
    return with_method("reconstruction")


def ladder():
    "Return a ladder network."
    return with_method("ladder")


def few_labels():
    "Return a classifier with labeled images of its own."
    return Assisted(Perceptron(64, 3, (8,)), labeled=Images(BYTES, Y))


def made():
    "Return a likelihood of gray levels."
    return MaximumLikelihood(MADE((1, 8, 8), (8,), 4), "levels")


def binary_made():
    "Return a likelihood of binary images."
    return MaximumLikelihood(MADE((1, 8, 8), (8,), 2), "binary")


def flow():
    "Return a density of dequantized images."
    return MaximumLikelihood(maf(64, 1, (8,)), "dequantized")


def diffusion():
    "Return a diffusion model of pixels."
    return DenoisingDiffusion(Denoiser(UNet((1, 8, 8), 4, (1,), 1), (1, 8, 8)))


def conditional_diffusion():
    "Return a diffusion model of pixels of three classes, paired with the noise."
    network = PerceptronDenoiser(64, 8, 1, classes=3)
    model = Denoiser(Flatten(network), (1, 8, 8))
    return DenoisingDiffusion(model, conditional=True, coupling=True)


class Flatten(nn.Module):
    """A network of vectors, applied to images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, *rest):
        """Return the output, shaped as the images."""
        return self.net(x.flatten(1), *rest).view_as(x)


UNIT = [vae, conv_vae, gaussian_vae, gan, agreement, reconstruction, few_labels]
LEVELS = [made, flow, diffusion, conditional_diffusion]
BINARY = [autoregressive_vae, binary_made]
FINITE = [linear_gan, plain, conv_classifier, ladder]
PIXELS = UNIT + LEVELS + BINARY + FINITE
LABELED = [plain, conv_classifier, agreement, reconstruction, ladder, conditional_diffusion]

RANGES = {
    "[-1, 1]": (2 * GRAY - 1, "(x + 1) / 2"),
    "[0, 255]": (255 * GRAY, "x / 255"),
    "16 bits": (65535 * GRAY, "x / 65535"),
    "standardized": (4 * (GRAY - 0.5), "standardized"),
}
NOT_FINITE = {"NaN": NAN, "infinity": INF, "minus infinity": -INF}
NO_BATCH = {
    "a tensor": (GRAY, "Batch(x, y)"),
    "a tuple": ((GRAY, Y), "tuple of length 2"),
    "a dict": ({"x": GRAY}, "dict of length 1"),
    "nothing": (None, "NoneType"),
    "numpy": (Batch(GRAY.numpy(), Y), "numpy.ndarray of float32"),
    "a list": (Batch(GRAY.tolist(), Y), "list of length 6"),
    "a picture": (Batch(Image.new("L", (8, 8)), Y), "PIL.Image"),
    "bytes": (Batch(BYTES, Y), "x.float() / 255"),
    "int64": (Batch(BYTES.long(), Y), "int64"),
    "uint16": (Batch(BYTES.to(torch.uint16), Y), "uint16"),
    "bool": (Batch(GRAY > 0.5, Y), "bool"),
    "complex": (Batch(GRAY + 0j, Y), "complex64"),
    "an empty batch": (Batch(GRAY[:0], Y[:0]), "at least one example"),
    "one flat image": (Batch(GRAY.flatten(), Y), "(384,)"),
    "a number": (Batch(torch.tensor(0.5), Y), "()"),
}
SHAPES = {
    "color": (GRAY.expand(-1, 3, -1, -1), "(6, 3, 8, 8)"),
    "larger": (torch.zeros(6, 1, 9, 9), "(6, 1, 9, 9)"),
    "flat and short": (torch.zeros(6, 63), "(6, 63)"),
}


def good_batch(make):
    "Return a batch that the scheme takes."
    return Batch(GRAY.round() if make in BINARY else GRAY, Y)


@pytest.mark.parametrize("make", PIXELS)
def test_a_good_batch_passes_also_without_an_axis_of_channels(make):
    scheme, batch = make(), good_batch(make)
    for x in (batch.x, batch.x.flatten(1)):
        if x.ndim == 2 and make in (gan, linear_gan):
            continue
        losses = scheme.step(Batch(x, Y))
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("make", UNIT + LEVELS + BINARY)
def test_pixels_of_another_scale_are_refused_by_step_and_evaluate(make):
    scheme = make()
    for x, word in RANGES.values():
        with refuses("are expected, and image", "has a pixel", word):
            scheme.step(Batch(x, Y))
        with refuses("are expected, and image", word):
            scheme.evaluate([good_batch(make), Batch(x, Y)])


@pytest.mark.parametrize("make", FINITE)
def test_a_model_of_any_numbers_takes_any_scale(make):
    for x, _ in RANGES.values():
        make().step(Batch(x / x.abs().max(), Y))


@pytest.mark.parametrize("make", PIXELS)
def test_numbers_that_are_not_finite_are_refused_by_step_and_evaluate(make):
    scheme = make()
    for x in NOT_FINITE.values():
        with refuses("are expected, and image", "~x.isfinite()"):
            scheme.step(Batch(x, Y))
        with refuses("are expected, and image", "~x.isfinite()"):
            scheme.evaluate([good_batch(make), Batch(x, Y)])


@pytest.mark.parametrize("make", BINARY)
def test_gray_is_not_binary(make):
    with refuses("0 or 1", "binarize='dynamic'"):
        make().step(Batch(GRAY, Y))


@pytest.mark.parametrize("make", LEVELS)
def test_numbers_between_gray_levels_are_refused(make):
    with refuses("gray levels n / 255", "as Loader does"):
        make().step(Batch((GRAY + 0.5 / 255).clamp(max=1), Y))


@pytest.mark.parametrize("make", PIXELS)
def test_what_is_no_batch_of_floats_is_refused(make):
    scheme = make()
    for batch, word in NO_BATCH.values():
        with refuses(type(scheme).__name__, word):
            scheme.step(batch)


@pytest.mark.parametrize("make", PIXELS)
def test_examples_of_another_shape_are_refused_in_any_step(make):
    scheme = make()
    scheme.step(good_batch(make))
    for x, word in SHAPES.values():
        with refuses(type(scheme).__name__, word, "expected"):
            scheme.step(Batch(x, Y))
        with refuses(type(scheme).__name__, word, "expected"):
            scheme.evaluate([Batch(x, Y)])


def test_channels_in_the_last_place_are_named():
    color = DenoisingDiffusion(Denoiser(UNet((3, 8, 8), 4, (1,), 1), (3, 8, 8)))
    for scheme, x in ((color, GRAY.expand(-1, 3, -1, -1)), (conv_vae(), GRAY), (gan(), GRAY)):
        with refuses("permute(0, 3, 1, 2)"):
            scheme.step(Batch(x.permute(0, 2, 3, 1)))


TOKENS = BYTES.flatten(1).long()


@pytest.mark.parametrize(
    "x, word",
    [
        (TOKENS - 300, "expected 0 to 299"),
        (TOKENS + 300, "expected 0 to 299"),
        (GRAY.flatten(1), "float32"),
        (TOKENS.int(), "int32"),
        (TOKENS.numpy(), "numpy.ndarray of int64"),
        (TOKENS.tolist(), "list of length 6"),
        (TOKENS[:, :63], "(6, 63)"),
        (TOKENS[:0], "at least one example"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(x, word):
    for use in (lambda s: s.step(Batch(x)), lambda s: s.evaluate([Batch(x)])):
        with refuses("BetaVAE", word):
            use(sequence_vae())
    sequence_vae().step(Batch(TOKENS))


def test_a_token_that_comes_later_is_found_before_the_first_step():
    tokens = TOKENS.clone()
    tokens[-1, -1] = 300
    scheme = sequence_vae()
    before = [p.clone() for p in scheme.params("model")]
    with refuses("tokens are", "to 300, expected 0 to 299"):
        fit(scheme, Sequences(tokens), batch_size=2, progress="none")
    assert all(map(torch.equal, before, scheme.params("model")))


# labels

BATCH_LABELS = {
    "numpy": (Y.numpy(), "numpy.ndarray of int64"),
    "list": (Y.tolist(), "list of length 6"),
    "floats": (Y.float(), "y.long()"),
    "int32": (Y.int(), "y.long()"),
    "one-hot": (nn.functional.one_hot(Y, 3), "y.argmax(1)"),
    "one-hot floats": (nn.functional.one_hot(Y, 3).float(), "y.argmax(1)"),
    "a column": (Y[:, None], "y.flatten()"),
    "too few": (Y[:5], "(5,)"),
    "none": (None, "no labels"),
    "10, 20, 30": (10 * Y + 10, "10 to 30, expected 0 to 2"),
    "1 to 3": (Y + 1, "1 to 3, expected 0 to 2"),
    "-1": (Y - 1, "-1 to 1, expected 0 to 2"),
    "-100": (torch.where(Y == 0, -100, Y), "-100 to 2, expected 0 to 2"),
}


@pytest.mark.parametrize("make", LABELED)
def test_other_labels_are_refused(make):
    scheme = make()
    for y, word in BATCH_LABELS.values():
        with refuses(type(scheme).__name__, "label", word):
            scheme.step(Batch(GRAY, y))


@pytest.mark.parametrize("make", [*LABELED, few_labels])
def test_other_labels_are_refused_by_evaluate(make):
    scheme = make()
    for case, (y, word) in BATCH_LABELS.items():
        if case not in ("none", "-1", "-100"):  # a classifier leaves these out
            with refuses(type(scheme).__name__, word):
                scheme.evaluate([Batch(GRAY, y)])


def test_unknown_classes_are_left_out_of_an_evaluation_of_a_classifier():
    scheme, y = plain(), Y.clone()
    y[3:] = -1
    want = scheme.evaluate([Batch(GRAY[:3], Y[:3])])
    assert scheme.evaluate([Batch(GRAY, y)]) == pytest.approx(want) and want["n"] == 3


@pytest.mark.parametrize("where", ["train", "valid", "labeled"])
def test_a_label_that_comes_later_is_found_before_the_first_step(where):
    y, good = torch.tensor([0, 1, 2, 2, 1, 3]), Images(BYTES, Y)
    bad = Images(BYTES, y)
    classifier = Perceptron(64, 3, (8,))
    scheme = Assisted(classifier, labeled=bad if where == "labeled" else None)
    before = [p.clone() for p in classifier.parameters()]
    with refuses("labels are 0 to 3, expected 0 to 2", "number the classes"):
        train, valid = (bad if where == name else good for name in ("train", "valid"))
        fit(scheme, train, valid=valid, batch_size=2, seed=1, progress="none")
    assert all(map(torch.equal, before, classifier.parameters()))


def test_labels_do_not_matter_where_they_are_not_used():
    for y in (None, Y - 7, Y.float(), Y[:2]):
        vae().step(Batch(GRAY, y))
        few_labels().step(Batch(GRAY, y))


# runs


@pytest.mark.parametrize("make", PIXELS)
def test_values_are_checked_once_a_run(make, monkeypatch):
    calls, scheme, batch = [], make(), good_batch(make)
    monkeypatch.setattr("optgen.data.expectations.check_pixels", lambda *args: calls.append(args))
    for _ in range(3):
        scheme.step(batch)
    assert len(calls) == 1
    scheme.evaluate([batch, batch])
    assert len(calls) == 3  # each batch of an evaluation
    scheme.step(batch)
    assert len(calls) == 3
    kind = {"binarize": "static"} if make in BINARY else {}
    fit(scheme, Images(BYTES, Y), epochs=2, batch_size=3, progress="none", **kind)
    assert len(calls) == 4


@pytest.mark.parametrize("make", PIXELS)
def test_an_evaluation_does_not_spend_the_check_of_the_first_step(make):
    scheme = make()
    scheme.evaluate([good_batch(make)])
    with refuses("are expected"):
        scheme.step(Batch(NAN, Y))


@pytest.mark.parametrize("make", PIXELS)
def test_the_check_draws_no_random_number_and_changes_no_mode(make):
    scheme, batch = make(), good_batch(make)
    state, modes = torch.get_rng_state(), [p.module.training for p in scheme.players.values()]
    scheme.batch_check.step(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [p.module.training for p in scheme.players.values()]


def test_a_batch_on_another_device_is_named():
    scheme = vae(VAE(64, 8, 8, 2).to("meta"))
    with refuses("the batch is on cpu, the model on meta", "x.to('meta')"):
        scheme.step(Batch(GRAY))


@pytest.mark.parametrize("make", PIXELS)
def test_nothing_and_a_lone_batch_are_no_batches_to_evaluate(make):
    with pytest.raises(ValueError, match="nothing to evaluate|at least two examples"):
        make().evaluate([])
    with refuses("given one batch", "[batch]"):
        make().evaluate(good_batch(make))


# numbers that are measured


def test_metrics_refuse_what_is_no_probability_label_or_score():
    p = torch.full((4, 3), 1 / 3)
    y = torch.tensor([0, 1, 2, 0])
    measure_calibration(p, y)
    for probabilities, labels, word in (
        (p, y - 1, "labels are -1 to 1"),
        (p, 10 * y, "labels are 0 to 20"),
        (p, y[:3], "shape (4,)"),
        (p, y.float(), "int64"),
        (p[:0], y[:0], "(0, 3)"),
        (p * torch.nan, y, "probabilities"),
        (9 * p, y, "probabilities"),
        (p.log(), y, "probabilities"),
    ):
        with pytest.raises(ValueError) as error:
            measure_calibration(probabilities, labels)
        assert word in str(error.value)
    for inside, outside in ((p[0], p[0] * torch.nan), (p[0] * torch.nan, p[0]), (p[0][:0], p[0])):
        with pytest.raises(ValueError, match="auroc"):
            auroc(inside, outside)
    assert auroc(torch.tensor([torch.inf, 1.0]), torch.tensor([0.0, -torch.inf])) == 1
    for labels in (torch.tensor([-1, 0]), torch.tensor([0.5]), torch.tensor([3])):
        with pytest.raises(ValueError, match="label"):
            label_coverage(labels, 3)


def test_features_and_assignments_refuse_what_is_not_finite():
    for x in NOT_FINITE.values():
        with pytest.raises(ValueError, match="not finite"):
            feature_stats([x.flatten(1)])
        with pytest.raises(ValueError, match="not finite"):
            optimal_coupling(x, torch.randn_like(x))
        with pytest.raises(ValueError, match="NaN|not finite"):
            evaluate_vae(VAE(64, 8, 8, 2), [x], k=2)
    with pytest.raises(ValueError, match="at least two images"):
        feature_stats([])
    with pytest.raises(ValueError, match="64 and 63 numbers"):
        fid([GRAY.flatten(1)], [GRAY.flatten(1)[:, 1:]])


def test_a_grid_refuses_whole_numbers_that_are_no_bytes():
    for x in (BYTES.long(), BYTES > 9, BYTES.int()):
        with pytest.raises(ValueError, match="floats in"):
            image_grid(x)


def test_float64_batches_train_a_float32_model_to_the_same_weights():
    for make in (vae, gan, plain, flow, diffusion):
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            scheme = make()
            torch.manual_seed(1)
            scheme.step(Batch((255 * GRAY).round().to(dtype) / 255, Y))
            found.append(
                [p.detach().clone() for name in scheme.players for p in scheme.params(name)]
            )
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [vae, gan, plain, made, diffusion])
def test_a_validation_set_that_cannot_be_measured_is_found_before_the_first_step(make):
    scheme = make()
    before = [p.clone() for name in scheme.players for p in scheme.params(name)]
    others = [(Images(COLOR.contiguous(), Y), "(1, 3, 8, 8)")]
    if make is plain:
        others += [(Images(BYTES), "have no labels"), (Images(BYTES, Y * 0 - 1), "have no labels")]
    for valid, word in others:
        with refuses(type(scheme).__name__, word):
            fit(scheme, Images(BYTES, Y), valid=valid, batch_size=3, progress="none")
    after = [p for name in scheme.players for p in scheme.params(name)]
    assert all(map(torch.equal, before, after))


def test_functions_that_take_images_alone_check_them_too():
    for use in (vae().reconstruct, plain().predict):
        for x, word in ((BYTES, "expected floats"), (GRAY.numpy(), "ndarray"), (GRAY[:0], "one")):
            with refuses(word):
                use(x)
    with refuses("VAE", "(x + 1) / 2"):
        evaluate_vae(VAE(64, 8, 8, 2), [2 * GRAY - 1], k=2)


def test_counts_and_shares_of_a_loader_are_checked():
    data = Images(BYTES, Y)
    for fraction in (math.nan, math.inf, -1.0, 0.0, 1.0, 2.0):
        with refuses(f"fraction={fraction}"):
            split_holdout(data, fraction)
    for n in (2.5, True, "4"):
        with refuses(f"n={n}", "whole number"):
            balanced_indices(data, n)
    for size in (True, 0, -1, 2.0, "4", None):
        with refuses("batch_size", "whole number"):
            Loader(data, size)
    assert len(list(Loader(data, 10**30))) == 1
