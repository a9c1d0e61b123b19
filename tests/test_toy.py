"Stacked digits of the installed package."

import pytest
import torch

from data_helpers import refuses
from optgen.data.images import Images, digits
from optgen.data.loading import Loader
from optgen.data.toy import stacked_digits


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_stacks_are_images_with_their_numbers(channels):
    source = digits("test")
    few = stacked_digits(source, 50, channels, seed=channels)
    label_of = {x.numpy().tobytes(): y for x, y in zip(source.images, source.labels.tolist())}
    for x, y in zip(few.images, few.labels.tolist()):
        assert int("".join(str(label_of[c.numpy().tobytes()]) for c in x)) == y
    again = stacked_digits(source, 50, channels, seed=channels)
    assert few.shape == (channels, 28, 28) and torch.equal(few.labels, again.labels)
    assert next(iter(Loader(few, 10))).x.shape == (10, channels, 28, 28)


def test_only_gray_images_with_labels_are_stacked():
    source = digits("test")
    with refuses("gray"):
        stacked_digits(stacked_digits(source, 9))
    with refuses("labels"):
        stacked_digits(Images(source.images))
    with pytest.raises(ValueError, match="n must be an integer, at least 1; got 0"):
        stacked_digits(source, 0)


@pytest.mark.cuda
def test_stacks_are_the_same_on_every_device():
    source = digits("test")
    there = stacked_digits(Images(source.images.cuda(), source.labels.cuda()), 99)
    here = stacked_digits(source, 99)
    assert there.images.is_cuda and torch.equal(there.images.cpu(), here.images)
