"What the tests of the data share."

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from optgen.data.images import Batch, DataError
from optgen.testing import generator


@contextlib.contextmanager
def refuses(*words: object) -> Iterator[None]:
    "Assert that the block raises a one-line DataError with a fix, whose message has all the words."
    with pytest.raises(DataError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and ". Fix: " in message, message
    assert all(str(word) in message for word in words), message


def same_batches(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    "Return whether two lists hold the same batches, bit for bit."
    pairs = [(p, q) for a, b in zip(left, right, strict=True) for p, q in zip(a, b, strict=True)]
    return all(torch.equal(p, q) for p, q in pairs)


def write_folder(root: Path, names: Sequence[str], channels: int = 1, seed: int = 0) -> Path:
    "Write random pictures of 8 x 8 pixels under `root`, and return it."
    draw = generator(seed)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, channels), dtype=torch.uint8, generator=draw)
        Image.fromarray(pixels.squeeze(-1).numpy()).save(path)
    return root
