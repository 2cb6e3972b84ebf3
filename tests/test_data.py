"Damaged, missing and odd files: each is one clear line. And what must hold for any batch size."

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdnb.data import Batches, Images, check_data, load_data


def refuses(words, action, kinds=(ValueError, FileNotFoundError)):
    with pytest.raises(kinds, match=words) as error:
        action()
    assert "\n" not in str(error.value)


def write_idx(path, array):
    "The format of the MNIST files: magic number, sizes, bytes."
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + b"".join(struct.pack(">I", n) for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


def fake_mnist(folder):
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.zeros((n, 28, 28), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)


def test_mnist_of_the_wrong_bytes_is_refused(tmp_path):
    fake_mnist(tmp_path / "MNIST" / "raw")
    refuses("train-images-idx3-ubyte is damaged", lambda: load_data("mnist", tmp_path))


def test_fashion_mnist_is_checked_against_the_archive_beside_it(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    fake_mnist(raw)
    data = load_data("fashion_mnist", tmp_path)  # no archive: nothing to compare with, the card has the sum
    assert data.describe()["train"] == 18 and data.image_size == 28
    packed = gzip.compress((raw / "train-images-idx3-ubyte").read_bytes())
    (raw / "train-images-idx3-ubyte.gz").write_bytes(packed)
    refuses("is damaged", lambda: load_data("fashion_mnist", tmp_path))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_missing_files_say_how_to_get_them(name, tmp_path):
    refuses("download=True", lambda: load_data(name, tmp_path))
    assert not any(tmp_path.iterdir())  # nothing was fetched or made
    check_data(name, tmp_path, download=True)


def test_half_a_set_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    refuses("cifar10", lambda: load_data("cifar10", tmp_path))


@pytest.fixture
def birds(tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_CACHE", str(tmp_path / "cache"))
    for part, n in (("train", 6), ("test", 2)):
        for kind in ("owl", "wren"):
            for i in range(n):
                path = tmp_path / "birds" / part / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(path)
    return tmp_path / "birds"


def test_a_folder_is_decoded_once_and_noticed_when_it_changes(birds):
    data = load_data(f"folder:{birds}")
    assert data.name == "birds" and data.train.classes == ("owl", "wren") and data.in_channels == 3
    assert len(data.train) == 11 and len(data.test) == 4
    assert load_data("folder:birds", birds.parent).sha256 == data.sha256
    assert len(list((birds.parent / "cache").iterdir())) == 1
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(birds / "test" / "owl" / "0.png")
    assert load_data("folder:birds", birds.parent).sha256 != data.sha256


def test_grey_folders_have_one_channel(birds):
    for path in birds.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load_data("folder:birds", birds.parent).in_channels == 1


def test_odd_folders(birds):
    where = birds.parent
    refuses("no folder train/CLASS/", lambda: load_data("folder:bees", where))
    refuses("expected 00", lambda: load_data("folder:birds", where, sha256="00"))
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(birds / "train" / "owl" / "wide.png")
    refuses("12x9: images must be square", lambda: load_data("folder:birds", where))
    assert load_data("folder:birds", where, image_size=6).image_size == 6
    (birds / "train" / "owl" / "wide.png").write_text("hello")
    refuses("not a readable image: owl/wide.png", lambda: load_data("folder:birds", where))
    (birds / "train" / "owl" / "wide.png").unlink()
    (birds / "test" / "crow").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(birds / "test" / "crow" / "0.png")
    refuses(r"classes that train/ lacks: \['crow'\]", lambda: load_data("folder:birds", where))


def test_a_damaged_cache_is_named(birds):
    load_data("folder:birds", birds.parent)
    (cache,) = (birds.parent / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:40])
    refuses("is damaged: delete it", lambda: load_data("folder:birds", birds.parent))


def test_values_out_of_range():
    refuses(r"val_fraction must lie in \[0, 1\)", lambda: load_data("digits", val_fraction=1.0))
    grey, labels = torch.zeros(3, 1, 4, 4), torch.zeros(3)
    refuses("3 images but labels", lambda: Images(grey, torch.zeros(2), ("a",)))
    refuses(r"\(N, C, H, W\)", lambda: Images(grey[0], labels, ("a",)))
    refuses("got torch.int32", lambda: Images(grey.int(), labels, ("a",)))
    refuses(r"labels must lie in \[0, 1\)", lambda: Images(grey, labels - 1, ("a",)))
    images = Images(grey, labels, ("a",))
    refuses("augment must be", lambda: Batches(images, 1, augment="flip"))
    refuses(r"batch_size must lie in \[1, 3\]", lambda: Batches(images, 4))
    refuses("padding", lambda: Batches(images, 1, augment="crop", padding=-1))


@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.sampled_from(["none", "crop", "crop_flip"]))
def test_every_image_once_an_epoch(n, size, drop_last, augment):
    if drop_last and size > n:
        return
    images = Images(torch.rand(n, 2, 3, 3), torch.arange(n), tuple(map(str, range(n))))
    batches = Batches(images, size, augment=augment, padding=1, drop_last=drop_last, seed=n)
    labels = [y for _, y in batches.epoch(4)]
    seen = torch.cat(labels)
    assert len(labels) == len(batches) and len(seen.unique()) == len(seen)
    assert len(seen) == (n // size * size if drop_last else n)
    if augment == "none":
        assert all(x.equal(images.floats(y)) for x, y in batches.epoch(4))
