"Folders of a user's own images: classes, splits, and what is refused."

import pytest

from data_helpers import refuses, write_folder
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.images import DataWarning


def test_classes_are_numbered_over_both_splits(tmp_path):
    names = ["train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/0.png", "test/b/x/0.png"]
    write_folder(tmp_path, names)
    train, test = (image_folder(tmp_path, split, size=8) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("memory_limit", [2**31, 0])
@pytest.mark.parametrize("spelling", ["unlabeled", "unlabelled"])
def test_unlabeled_images_are_read_under_both_spellings(tmp_path, spelling, memory_limit):
    write_folder(tmp_path, ["a/0.png", "b/0.png", f"{spelling}/0.png", f"{spelling}/x/1.png"])
    data = image_folder(tmp_path, size=8, holdout=0.0, memory_limit=memory_limit)
    assert data.classes == ("a", "b") and data.labels.tolist() == [0, 1, -1, -1]
    with refuses("no image in the test split"):
        image_folder(tmp_path, "test", size=8, holdout=0.0)


def test_a_missing_or_mixed_split_is_refused(tmp_path):
    write_folder(tmp_path, ["train/a/0.png"])
    with refuses(tmp_path / "test", "no such folder beside"):
        image_folder(tmp_path, "test")
    write_folder(tmp_path, ["test/0.png"])
    with refuses("0.png", "class is unknown"):
        image_folder(tmp_path)


def test_gray_and_color_together_are_read_in_color_unless_a_number_is_chosen(tmp_path):
    write_folder(tmp_path, ["a.png"])
    write_folder(tmp_path, ["b.png"], channels=3)
    with pytest.warns(DataWarning, match="1 gray and 1 color images, all are read in color"):
        assert image_folder(tmp_path, holdout=0.0).shape == (3, 28, 28)
    with refuses("b.png", "a.png", "channels=1", "channels=3"):
        list(ImageFiles([tmp_path / "a.png", tmp_path / "b.png"]))
    for channels in (1, 3):
        data = image_folder(tmp_path, holdout=0.0, channels=channels)
        assert data.shape == (channels, 28, 28)


def test_an_empty_folder_and_a_damaged_image_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with refuses(tmp_path / "empty", "no image"):
        image_folder(tmp_path / "empty")
    write_folder(tmp_path / "bad", ["a.png", "b.png"])
    (tmp_path / "bad/b.png").write_bytes(b"\x89PNG\r\n")
    with refuses(tmp_path / "bad/b.png", "cannot be read"):
        image_folder(tmp_path / "bad", holdout=0.0)


@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(split):
    with refuses(repr(split), "'train' or 'test'"):
        image_folder(".", split)
