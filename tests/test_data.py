"Damaged, missing and odd files: each is one clear line. And what must hold for any batch size."

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdnb.data import _MNIST_SHA256, Batches, Images, _split, check_data, load_data, moons, read_images, rings


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


def test_processed_files_beside_good_ones_are_not_read(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    fake_mnist(raw)
    (raw.parent / "processed").mkdir()
    black = torch.zeros(20, 28, 28, dtype=torch.uint8), torch.full((20,), 7)
    for part in ("training", "test"):
        torch.save(black, raw.parent / "processed" / f"{part}.pt")
    assert load_data("fashion_mnist", tmp_path).test.y.tolist() == [*range(10)]


def test_mnists_own_files_are_no_fashion_mnist(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    fake_mnist(raw)
    file = raw / "t10k-labels-idx1-ubyte"
    monkeypatch.setitem(_MNIST_SHA256, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    refuses("t10k-labels-.* is damaged or another set's", lambda: load_data("fashion_mnist", tmp_path))


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
    refuses("one size, HxW: .* is 9x12, others are 8x8", lambda: load_data("folder:birds", where))
    assert load_data("folder:birds", where, image_size=6).image_size == 6
    (birds / "train" / "owl" / "wide.png").write_text("hello")
    refuses("not a readable image: train/owl/wide.png", lambda: load_data("folder:birds", where))
    (birds / "train" / "owl" / "wide.png").unlink()
    (birds / "test" / "crow").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(birds / "test" / "crow" / "0.png")
    refuses(r"classes that train/ lacks: \['crow'\]", lambda: load_data("folder:birds", where))


def test_pictures_need_not_be_square(tmp_path):
    "Height first; what covers the size is cut in the middle; equal sides are one number, in the cache too."
    for n, (part, kind) in enumerate([(p, k) for p in ("train", "test") for k in ("owl", "wren")]):
        for k in range(2): paint(tmp_path / part / kind / f"{k}.png", np.full((12, 30), 40 * n, np.uint8))
    name = f"folder:{tmp_path}"
    data = load_data(name)
    assert data.image_size == (12, 30) and data.train.x.shape[1:] == (1, 12, 30)
    for size in ((6, 10), [6, 10], "6x10"):
        cut = load_data(name, image_size=size)
        assert cut.image_size == (6, 10) and cut.train.x.shape[1:] == (1, 6, 10)
    square = load_data(name, image_size=6)
    assert square.image_size == 6 and load_data(name, image_size="6x6").sha256 == square.sha256
    ramp = np.arange(12 * 30, dtype=np.uint8).reshape(12, 30)
    paint(tmp_path / "ramp.png", ramp)
    assert read_images([tmp_path / "ramp.png"], (12, 20))[0, 0].equal(torch.from_numpy(ramp[:, 5:25]))
    for size in ("6x", "6x0", (0, 6), (6,), (6, 10, 2), "6X10", "-6x10", 2.5, [6, True]):
        rule = r"image_size must be a whole number >= 0, or two of them as \(H, W\) or HxW, got"
        refuses(rule, lambda: load_data(name, image_size=size))  # noqa: B023


def paint(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)


RGB = np.zeros((8, 8, 3), np.uint8)


def chunk_broken(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"IDAT", b"\xa4o\x9bv", 1))


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda t: (t / "crow").mkdir(), "class folder train/crow holds no images"),
        (lambda t: link(t / "owl/x.png", t / "nowhere.png"), "train/owl/x.png is a broken link"),
        (lambda t: link(t / "owl/x.png", t / "wren/0.png"), "owl/x.png|wren/0.png is a link to"),
        (lambda t: link(t / "crow", t / "wren"), "is a link to a picture of another class"),
        (lambda t: (t / "owl/x").mkdir(), "train/owl/x is a folder"),
        (lambda t: shutil.rmtree(t / "owl") or shutil.rmtree(t.parent / "test/owl"), "single class 'wren'"),
        (lambda t: chunk_broken(t / "owl/1.png"), "not a readable image: train/owl/1.png"),
        (lambda t: Image.new("L", (13500, 13500)).save(t / "owl/1.png"), "train/owl/1.png .*Bomb"),
        (lambda t: Image.new("L", (9500, 9500)).save(t / "owl/1.png"), "train/owl/1.png .*Bomb"),
        (lambda t: Image.new("F", (8, 8)).save(t / "owl/1.tif"), "train/owl/1.tif .*32-bit"),
        (lambda t: (t / "owl/notes.txt").write_text("x"), "train/owl/notes.txt"),
    ],
)
def test_what_cannot_be_meant_is_named(birds, damage, words):
    damage(birds / "train")
    refuses(words, lambda: load_data(f"folder:{birds}", image_size=8))


def test_hidden_files_are_passed_over(birds):
    before = load_data(f"folder:{birds}")
    (birds / "train/.ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "owl/Thumbs.db", "owl/._1.png", "wren/desktop.ini"):
        (birds / "train" / name).write_bytes(b"x")
    assert load_data(f"folder:{birds}").sha256 == before.sha256


def test_images_one_folder_deeper(birds):
    before = load_data(f"folder:{birds}")
    for kind in ("owl", "wren"):
        (birds / "train" / kind).rename(birds / "train/images")
        (birds / "train" / kind).mkdir()
        (birds / "train/images").rename(birds / "train" / kind / "images")
        (birds / "train" / kind / "boxes.txt").write_text("0 0 8 8")
    assert load_data(f"folder:{birds}").sha256 == before.sha256


def test_sixteen_bits_are_scaled_and_orientation_is_applied(birds):
    for path in birds.rglob("*.png"):
        paint(path, np.full((8, 8), 257 * 100, np.uint16))
    data = load_data(f"folder:{birds}")
    assert data.in_channels == 1 and data.train.x.unique().tolist() == [100]
    exif, upper = Image.Exif(), RGB.copy()
    exif[0x0112], upper[:4] = 6, 255
    for path in birds.rglob("*.png"):
        paint(path, upper, exif=exif)
    right = load_data(f"folder:{birds}").train.x
    assert (right[..., 4:] == 255).all() and (right[..., :4] == 0).all()


@pytest.mark.parametrize("which", ["train/owl/0.png", "train/wren/5.png", "test/wren/1.png"])
def test_one_coloured_picture_makes_the_set_coloured(birds, which):
    for path in birds.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    paint(birds / which, RGB + np.array([9, 90, 200], np.uint8))
    data = load_data(f"folder:{birds}", val_fraction=0.0)
    assert data.in_channels == 3
    part = data.train if which.startswith("train") else data.test
    assert (part.x == torch.tensor([9, 90, 200])[:, None, None]).flatten(1).all(1).sum() == 1


def test_content_decides_not_size_and_time(birds):
    one, other = birds / "train/owl/1.png", birds / "train/owl/2.png"
    a, b = (np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8) for k in range(2))
    Image.fromarray(a).save(one.with_suffix(".bmp")), Image.fromarray(b).save(other.with_suffix(".bmp"))
    one.unlink(), other.unlink()
    one, other = one.with_suffix(".bmp"), other.with_suffix(".bmp")
    os.utime(one, ns=(10**18, 10**18)), os.utime(other, ns=(10**18, 10**18))
    before = load_data(f"folder:{birds}", val_fraction=0.0)
    one.rename(birds / "x"), other.rename(one), (birds / "x").rename(other)
    assert load_data(f"folder:{birds}", val_fraction=0.0).sha256 != before.sha256


def test_a_swapped_cache_is_refused(birds):
    cache = birds.parent / "cache"
    load_data(f"folder:{birds}"), load_data(f"folder:{birds}", image_size=8)
    one, other = sorted(cache.iterdir())
    shutil.copy(one, other)
    with pytest.raises(ValueError, match="is damaged: delete it"):
        load_data(f"folder:{birds}"), load_data(f"folder:{birds}", image_size=8)


def test_relative_paths_are_the_shells(birds, tmp_path, monkeypatch):
    monkeypatch.delenv("KDNB_DATA", raising=False)
    whole = load_data(f"folder:{birds}")
    monkeypatch.chdir(birds.parent)
    assert load_data("folder:./birds", tmp_path / "none").sha256 == whole.sha256
    assert load_data("folder:birds", tmp_path / "none").sha256 == whole.sha256
    monkeypatch.chdir(birds)
    assert load_data("folder:../birds").name == load_data("folder:.").name == "birds"
    paint(tmp_path / "root/birds/train/a/0.png", RGB), paint(tmp_path / "root/birds/train/b/0.png", RGB)
    paint(tmp_path / "root/birds/test/a/0.png", RGB)
    monkeypatch.chdir(birds.parent)
    assert load_data("folder:birds", tmp_path / "root").train.classes == ("a", "b")  # below root first


@pytest.mark.parametrize("sizes, fraction", [((20, 2), 0.3), ((40, 2, 2, 1), 0.2), ((10, 10), 0.5)])
def test_the_split_takes_its_share_of_every_class(sizes, fraction):
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    for seed in range(60):
        for split in ("auto", "class"):
            kept, held, how = _split(labels, fraction, seed, split)
            assert torch.cat([kept, held]).sort().values.equal(torch.arange(len(labels)))
            counts = torch.bincount(labels[held], minlength=len(sizes))
            for n, taken in zip(sizes, counts.tolist(), strict=True):
                assert taken < n and (how == "plain" or abs(taken - fraction * n) < 1), (seed, split)
    assert any(_split(labels, fraction, seed, "plain")[2] == "plain" for seed in range(3))


def test_the_recorded_split_stays(birds):
    data = load_data("digits")
    assert data.describe()["split"] == "plain" and data.sha256 == load_data("digits", split="plain").sha256
    assert data.sha256.startswith("f557e6bcf281")
    by_class = load_data("digits", split="class")
    assert by_class.describe()["split"] == "class" and by_class.sha256 != data.sha256


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
    refuses("whole numbers", lambda: Images(grey, labels + 0.5, ("a",)))
    assert Images(grey + 1 + 1e-7, labels, ("a",)).x.unique().tolist() == [255]
    refuses("got 1.001 to 1.001", lambda: Images(grey + 1.001, labels, ("a",)))
    images = Images(grey, labels, ("a",))
    refuses("augment must be", lambda: Batches(images, 1, augment="flip"))
    refuses(r"batch_size must be a whole number in \[1, 3\]", lambda: Batches(images, 4))
    refuses("padding", lambda: Batches(images, 1, augment="crop", padding=-1))


@pytest.mark.parametrize("bad", [float("nan"), -1, "4", None, True])
def test_numbers_are_numbers(bad):
    images = Images(torch.zeros(3, 1, 4, 4), torch.zeros(3), ("a",))
    refuses("val_fraction", lambda: load_data("digits", val_fraction=bad))
    refuses("image_size", lambda: load_data("digits", image_size=bad))
    refuses("batch_size", lambda: Batches(images, bad))
    refuses("padding", lambda: Batches(images, 1, padding=bad))
    for toy in (moons, rings):
        refuses("noise must", lambda: toy(noise=bad))  # noqa: B023
        refuses("n must", lambda: toy(bad))  # noqa: B023
    refuses("split must be auto, plain or class", lambda: load_data("digits", split=bad))
    refuses("unknown data", lambda: check_data(bad))


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


@pytest.mark.parametrize("count", [1, 255, 256, 600])
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_padded_pixels_are_those_of_the_plain_recipe(count, augment):
    x = torch.randint(0, 256, (count, 3, 5, 7), dtype=torch.uint8)
    images = Images(x.transpose(2, 3), torch.zeros(count), ("a",))      # in any layout
    made = Batches(images, 1, augment=augment, padding=2).pixels
    padded = torch.nn.functional.pad(images.x, [0 if augment == "none" else 2] * 4)
    if augment == "crop_flip":
        padded = torch.cat([padded, padded.flip(3)])
    assert made.is_contiguous() and made.equal(padded.permute(0, 2, 3, 1))


PEAK = """
import re, sys, torch
from kdnb.data import Batches, Images

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

x = torch.randint(0, 256, (20000, 3, 32, 32), dtype=torch.uint8)
images = Images(x, torch.zeros(len(x)), ("a",))
Batches(images.first(300), 1, augment="crop_flip")
before = peak()
batches = Batches(images, 1, augment="crop_flip")
print((peak() - before) / batches.pixels.numel())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
def test_batches_take_no_more_memory_than_they_keep():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.1      # whole copies, padded and permuted, took 2
