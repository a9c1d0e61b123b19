"Folders of a user's own images: classes, splits, and what is refused."

import os
import warnings

import pytest
import torch
from PIL import Image

from data_helpers import refuses, write_folder
from optgen.data.folders import ImageFiles, image_folder
from optgen.data.images import DataWarning
from optgen.testing import generator


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


def test_an_empty_folder_is_refused(tmp_path):
    with refuses(tmp_path, "no image"):
        image_folder(tmp_path)


@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_a_bad_split_is_refused(split):
    with refuses(repr(split), "'train' or 'test'"):
        image_folder(".", split)


# what is in a folder: the files (a name that ends in "/" is a folder), then what is read as what

TREES = {
    "hidden file": (["a.png", ".b.png"], 1, (), "1 hidden or of the system (.b.png)"),
    "other half of a Mac's file": (["c/a.png", "c/._a.png"], 1, ("c",), "hidden"),
    "hidden folder": (["c/a.png", "d/a.png", ".git/a.png"], 2, ("c", "d"), "(.git)"),
    "notebook's checkpoints": (["c/a.png", ".ipynb_checkpoints/a.png"], 1, ("c",), "hidden"),
    "hidden folder in a class": (["c/a.png", "c/.thumbnails/a.png"], 1, ("c",), "hidden"),
    "__MACOSX": (["c/a.png", "__MACOSX/c/a.png"], 1, ("c",), "(__MACOSX)"),
    "__pycache__": (["c/a.png", "__pycache__/a.png"], 1, ("c",), "hidden or of the system"),
    "Synology": (["c/a.png", "c/@eaDir/a.png"], 1, ("c",), "(@eaDir)"),
    "Windows' bin": (["c/a.png", "$RECYCLE.BIN/a.png"], 1, ("c",), "($RECYCLE.BIN)"),
    "lost and found": (["c/a.png", "lost+found/a.png"], 1, ("c",), "(lost+found)"),
    ".DS_Store": (["a.png", ".DS_Store"], 1, (), None),
    "labels": (["a.png", "labels.csv", "README"], 1, (), "2 of another kind (README, labels.csv)"),
    "other pictures": (["a.png", "b.gif", "c.heic"], 1, (), "2 of another kind (b.gif, c.heic)"),
    "many others": (["a.png", *(f"{i}.txt" for i in range(5))], 1, (), "5 of another kind"),
    "folder like a file": (
        ["cats.png/a.png", "dogs/b.png", "dogs/c.JPG/d.png", "dogs/e.tif/"],
        1,
        ("dogs",),
        "3 folders with the name of an image (cats.png, c.JPG, e.tif)",
    ),
    "Windows' files": (["a.png", "Thumbs.db", "c/desktop.ini"], 1, (), None),
    "capital suffix": (["a.PNG", "b.Png"], 2, (), None),
    "capital splits": (["Train/c/a.png", "TEST/c/b.png"], 1, ("c",), None),
    "capital split alone": (["Train/c/a.png"], 1, ("c",), None),
    "capital unlabeled": (["c/a.png", "Unlabeled/b.png", "UNLABELLED/c.png"], 3, ("c",), None),
    "third split": (
        ["train/c/a.png", "test/c/b.png", "val/c/d.png"],
        1,
        ("c",),
        "1 beside train/ and test/ (val/c/d.png)",
    ),
    "loose beside splits": (["train/c/a.png", "test/c/b.png", "d.png"], 1, ("c",), "(d.png)"),
    "unlabeled test images": (
        ["train/c/a.png", "test/c/b.png", "test/unlabeled/d.png"],
        1,
        ("c",),
        None,
    ),
    "empty class": (["c/a.png", "d/"], 1, ("c",), None),
    "names of all kinds": (["c c/ä b.png", "d\n/日本.png", "-x/'q'.png"], 3, None, None),
    "link to an image": (["c/a.png", "c/b.png -> a.png"], 2, ("c",), None),
    "link to a class": (["c/a.png", "d -> c"], 2, ("c", "d"), None),
    "link out of the folder": (["c/a.png", "d -> ../elsewhere"], 2, ("c", "d"), None),
    "link to a split": (["train/c/a.png", "test -> train"], 1, ("c",), None),
    "broken link": (["c/a.png", "c/b.png -> nowhere"], 1, ("c",), "1 broken links (b.png)"),
    "circle": (["c/a.png", "c/up -> .."], 1, ("c",), "1 links in a circle (up)"),
}


def build_tree(root, names):
    "Make images, other files, folders and links under `root`."
    write_folder(root.parent / "elsewhere", ["e.png"])
    root.mkdir()
    for name in names:
        name, _, target = name.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir()
        elif path.suffix.lower() == ".png":
            Image.new("L", (8, 8), len(name)).save(path, "png")
        else:
            path.touch()


@pytest.mark.parametrize("case", TREES)
def test_one_scan_skips_what_is_no_image_of_the_set_and_says_so(tmp_path, case):
    names, n, classes, said = TREES[case]
    build_tree(tmp_path / "mine", names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = image_folder(tmp_path / "mine", size=8, holdout=0.0)
    assert len(data) == n
    assert classes is None or data.classes == classes
    assert len(caught) == (said is not None)
    if said:
        message = str(caught[0].message)
        assert issubclass(caught[0].category, DataWarning) and "\n" not in message
        assert message.startswith(f"{tmp_path / 'mine'}: skipped ") and said in message


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    write_folder(tmp_path / ".hidden", ["c/a.png"])
    (tmp_path / "link").symlink_to(tmp_path / ".hidden")
    for name in (".hidden", ".hidden/", "link"):
        assert image_folder(f"{tmp_path}/{name}", size=8, holdout=0.0).classes == ("c",)


def test_what_is_no_file_is_skipped_without_waiting(tmp_path):
    write_folder(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "b.png")
    with pytest.warns(DataWarning, match=r"1 no files \(b.png\)"):
        assert len(image_folder(tmp_path, size=8, holdout=0.0)) == 1


@pytest.mark.parametrize("names", [["train/a.png", "Train/b.png"], ["TEST/a.png", "test/b.png"]])
def test_two_folders_of_a_split_are_refused(tmp_path, names):
    write_folder(tmp_path, names)
    with refuses("both the", "move the images of one into the other"):
        image_folder(tmp_path, names[0].partition("/")[0].lower())


@pytest.mark.parametrize("path", ["", " "])
def test_no_folder_is_not_this_folder(path):
    with refuses("no folder is named"):
        image_folder(path)


def damage(path, how):
    "Make an image one that cannot be read."
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"not a picture")
    elif how == "float":
        Image.new("F", (8, 8)).save(path, "tiff")
    else:
        random = torch.randint(256, (64, 64), dtype=torch.uint8, generator=generator())
        Image.fromarray(random.numpy()).save(path, "jpeg" if how == "cut jpeg" else "png")
        path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize("how", ["empty", "text", "float", "cut png", "cut jpeg"])
@pytest.mark.parametrize("where", ["test/c/1.png", "test/d/0.png", "train/c/0.png", "held out"])
@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_an_image_that_cannot_be_read_is_left_out_and_named(tmp_path, where, how, memory_limit):
    split = "held out" not in where
    names = [f"{s}/c/{i}.png" for s in ("train", "test") for i in range(3)] + ["test/d/0.png"]
    write_folder(tmp_path, names if split else [f"c/{i}.png" for i in range(10)])
    settings = {"size": 8, "holdout": 0.5, "memory_limit": memory_limit}
    if not split:
        kept = {f.name for f in image_folder(tmp_path, **settings | {"memory_limit": 0}).files}
        where = next(f"c/{i}.png" for i in range(10) if f"{i}.png" not in kept)
    before = {s: image_folder(tmp_path, s, **settings) for s in ("train", "test")}
    damage(tmp_path / where, how)
    is_held_out = not where.startswith("train/")
    for s, whole in before.items():
        affected = is_held_out == (s == "test")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = image_folder(tmp_path, s, **settings)
        assert len(data) == len(whole) - affected and data.classes == whole.classes
        assert len(caught) == (affected or s == "train")
        for warning in caught:
            message = str(warning.message)
            n = len(whole) if s == "test" else sum(map(len, before.values()))
            assert f"left out 1 of {n} images; the first is {tmp_path / where}: " in message
            assert ("32 bits" if how == "float" else "cannot be read as an image") in message
            assert "\n" not in message
        if not affected:
            assert torch.equal(data.to_memory().images, whole.to_memory().images)


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_the_images_left_keep_their_order_and_labels(tmp_path, memory_limit):
    names = [f"{c}/{i}.png" for c in "abc" for i in range(4)]
    write_folder(tmp_path, names)
    whole = image_folder(tmp_path, size=8, holdout=0.0)
    bad = [0, 5, 11]
    for i in bad:
        damage(tmp_path / names[i], "text")
    left = [i for i in range(12) if i not in bad]
    with pytest.warns(DataWarning, match=r"left out 3 of 12 images; the first is .*a/0\.png: "):
        data = image_folder(tmp_path, size=8, holdout=0.0, memory_limit=memory_limit)
    assert torch.equal(data.to_memory().images, whole.images[left])
    assert torch.equal(data.labels, whole.labels[left]) and data.classes == whole.classes


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_a_split_without_a_readable_image_is_refused(tmp_path, memory_limit):
    write_folder(tmp_path, [f"{s}/{i}.png" for s in ("train", "test") for i in range(3)])
    for i in range(3):
        damage(tmp_path / f"test/{i}.png", "text")
    with refuses(tmp_path / "test/0.png", "(2 more cannot be read either)"):
        image_folder(tmp_path, "test", size=8, memory_limit=memory_limit)
    with pytest.warns(DataWarning, match="left out 3 of 6 images"):
        assert len(image_folder(tmp_path, size=8, memory_limit=memory_limit)) == 3


@pytest.mark.parametrize("color", ["train/0.png", "test/0.png", "unlabeled/0.png"])
def test_both_splits_have_color_where_one_image_has(tmp_path, color):
    write_folder(tmp_path, ["train/0.png", "train/1.png", "test/0.png", "test/1.png"])
    write_folder(tmp_path, [color], channels=3)
    for split in ("train", "test"):
        with pytest.warns(DataWarning, match="gray and 1 color images"):
            assert image_folder(tmp_path, split, size=8).shape == (3, 8, 8)
