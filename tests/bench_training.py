"""How fast: `python tests/bench_training.py [ROUNDS]`, one thread, one process, a few minutes.

Each row times two ways to do the same work in turns and prints the median ratio with its quartiles. That
both compute the same is asserted first. Ratios travel from machine to machine, seconds do not. The last
column is the share of this machine's float32 matrix-product speed that our side reaches (bfloat16 may
exceed 1).
"""

import statistics
import sys
import time
import warnings
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnb.data import Batches, Images
from kdnb.kd import KD
from kdnb.models import create_model
from kdnb.tfkd import TfKD, tf_kd_reg_loss
from kdnb.training import Supervised, fit


def clock(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def matmul_peak():
    "Float32 FLOP/s of a 1024 x 1024 product: the best of ten."
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(clock(lambda: a @ a) for _ in range(10))


def begin(more=""):
    "Quiet and on one thread; prints the head of the table, returns the speed of matrix products."
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    peak = matmul_peak()
    print(f"PyTorch {torch.__version__}, one thread, {peak / 1e9:.0f} GFLOP/s in float32 products")
    print(f"{'work: ours / peer':50} {'ratio':>7} [quartiles]    target{more}")
    return peak


def rounds_asked():
    return int(sys.argv[1]) if len(sys.argv) > 1 else 5


def report(work, ratios, target="", share="     -", more=""):
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{work:50} {middle:7.2f} [{low:.2f}, {high:.2f}]  {target:>7} {share}{more}", flush=True)


def compare(work, ours, peer, rounds, flops=0.0, peak=1.0, target=""):
    "Both once for warming up, then in turns."
    ours(), peer()
    times = [(clock(ours), clock(peer)) for _ in range(rounds)]
    share = f"{flops / statistics.median(o for o, _ in times) / peak:6.2f}" if flops else "     -"
    report(work, [p / o for o, p in times], target, share)


def in_bf16(method, *data):
    "A step in bfloat16 as `fit` makes it: weights are cast anew once an optimiser has moved them."
    for part in vars(method).values():
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_post_hook(lambda *_: torch.clear_autocast_cache())

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            method.step(*data)

    return step


def random_images(n, channels, size):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=g)
    return Images(x, torch.randint(0, 10, (n,), generator=g), tuple("0123456789"))


# ---- data: one gather on the device against one image at a time


def bench_data(rounds):
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms as T

    images = random_images(50_000, 3, 32)
    pixels = images.x.permute(0, 2, 3, 1).numpy()

    class Pictures(Dataset):
        "As torchvision.datasets.CIFAR10: a PIL image, transformed one by one."

        def __init__(self, transform):
            self.transform = transform

        def __len__(self):
            return len(pixels)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(pixels[i])), int(images.y[i])

    plain = DataLoader(Pictures(T.ToTensor()), 128)
    for (a, b), (c, d), _ in zip(Batches(images, 128, shuffle=False), plain, range(3), strict=False):
        assert a.equal(c) and b.equal(d)
    usual = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])
    loader, epoch = DataLoader(Pictures(usual), 128, shuffle=True), []
    ours = Batches(images, 128, augment="crop_flip")

    def whole():
        for x, _ in ours:
            epoch.append(len(x))

    def piece():
        for (_x, _y), _ in zip(loader, range(20), strict=False):
            pass

    whole(), piece()
    rates = [((390 * 128) / clock(whole), (20 * 128) / clock(piece)) for _ in range(rounds)]
    mine, theirs = (statistics.median(r) for r in zip(*rates, strict=True))
    more = f"   ({mine:,.0f} / {theirs:,.0f} images/s)"
    report("50,000 images, crop, flip: Batches / DataLoader", [a / b for a, b in rates], ">= 20", more=more)


# ---- the loop: fit against the bare loop, with the same step


def bench_fit(rounds):
    images = random_images(128 * 40, 1, 28)
    make = lambda name, seed=0: create_model(name, in_channels=1, image_size=28, seed=seed)  # noqa: E731
    methods = {
        "teacher MLP, supervised": lambda: Supervised(make("mlp_1200_1200"), lr=0.01),
        "student MLP, supervised": lambda: Supervised(make("mlp_400"), lr=0.01),
        "student MLP, distilled": lambda: KD(make("mlp_400"), make("mlp_1200_1200", 1), lr=0.01),
    }
    for name, new in methods.items():
        a, b, batches = new(), new(), Batches(images, 128)

        def bare(method, batches=batches):
            for x, y in batches.epoch(0):
                method.step(x, y)

        ours = lambda a=a, batches=batches: fit(a, batches, epochs=1, progress="off")  # noqa: E731
        peer = lambda b=b, bare=bare: bare(b)  # noqa: E731
        ours(), peer()
        assert all(p.equal(q) for p, q in zip(a.student.parameters(), b.student.parameters(), strict=True))
        compare(f"{name}: fit / bare loop", ours, peer, 3 * rounds, target=">= .95")


# ---- the switches: layout and fused optimiser, bfloat16, compilation


class Usual:
    "Supervised training as usually written: the default layout and optimiser."

    def __init__(self, student):
        self.student = student.train()
        self.optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def step(self, x, y):
        loss = nn.functional.cross_entropy(self.student(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


def bench_switches(name, channels, size, rounds, peak):
    images, losses = random_images(128 * 6, channels, size), {}

    def new():
        return create_model(name, in_channels=channels, image_size=size, seed=0)

    def usual(method):
        for x, y in Batches(images, 128).epoch(0):
            losses["usual"] = method.step(x.contiguous(), y)["loss"].item()

    def ours(method, key, precision="fp32"):
        history = fit(method, Batches(images, 128), epochs=1, progress="off", precision=precision)
        losses.setdefault(key, history["loss"][0])

    x, y = next(iter(Batches(images, 128)))
    with FlopCounterMode(display=False) as counter:
        Supervised(new(), lr=0.01).step(x, y)
    work = rounds, counter.get_total_flops() * 6, peak
    plain, slow, bf16, compiled = (
        Supervised(new(), lr=0.01),
        Usual(new()),
        *(Supervised(new(), lr=0.01) for _ in "ab"),
    )
    compiled.student.compile()  # once for all rounds: fit would drop the code after each
    compare(f"{name}: fit / usual step", lambda: ours(plain, "fp32"), lambda: usual(slow), *work)
    for key, method in (("bf16", bf16), ("bf16 + compile", compiled)):
        compare(
            f"{name}: {key} / fp32", partial(ours, method, key, "bf16"), partial(ours, plain, "fp32"), *work
        )
        assert abs(losses[key] / losses["fp32"] - 1) < 0.02, losses


# ---- the virtual teacher: one scatter against a loop over the batch, as the published code has it


def published_reg_loss(logits, y):
    "The steps of the published loss: a table filled row by row, softened, KLDivLoss with its default mean."
    table = torch.full_like(logits, 0.01 / (logits.shape[1] - 1))
    for i in range(len(table)):
        table[i, y[i]] = 0.99
    soft = nn.KLDivLoss()(logits.log_softmax(1), (table / 20).softmax(1))
    return 0.9 * nn.functional.cross_entropy(logits, y) + 0.1 * 100 * soft


class PublishedReg(Usual):
    def step(self, x, y):
        loss = published_reg_loss(self.student(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


def bench_tfkd(rounds):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(128, 3, 32, 32, generator=g), torch.randint(0, 100, (128,), generator=g)
    logits = torch.randn(128, 100, generator=g)
    ours = partial(tf_kd_reg_loss, logits, y, variant="official", multiplier=100.0)
    torch.testing.assert_close(ours(), published_reg_loss(logits, y))

    def many(loss):
        for _ in range(100):
            loss()

    peer = partial(published_reg_loss, logits, y)
    mine, theirs = partial(many, ours), partial(many, peer)
    compare("Tf-KD reg, 100 classes, the loss", mine, theirs, rounds, target=">= 3")

    def new():
        return create_model("resnet8", num_classes=100, seed=0)

    mine, theirs = TfKD(new(), variant="official", multiplier=100.0, lr=0.01), PublishedReg(new())
    mine.student.to(memory_format=torch.channels_last)
    wide = x.contiguous(memory_format=torch.channels_last)
    a, b = mine.step(wide, y)["loss"], theirs.step(x, y)["loss"]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    step, usual = partial(mine.step, wide, y), partial(theirs.step, x, y)
    compare("Tf-KD reg, 100 classes, a step of resnet8", step, usual, 5 * rounds, target=">= 2")


if __name__ == "__main__":
    rounds, peak = rounds_asked(), begin("  of peak")
    bench_data(rounds)
    bench_fit(rounds)
    bench_switches("resnet20", 3, 32, rounds, peak)
    bench_switches("mlp_1200_1200", 1, 28, rounds, peak)
    bench_tfkd(rounds)
