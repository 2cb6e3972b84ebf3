"""How fast training is, beside RepDistiller's and mdistiller's loops, a bare loop, torchvision's data path.

`python tests/bench_training.py [-k WORDS] [--rounds N] [--markdown]`; see stopwatch.py.
"""

import copy
import statistics
from functools import partial

import torch
from stopwatch import (
    bare,
    check_weights,
    compare,
    flops_of,
    in_bf16,
    main,
    network,
    noise,
    normalised,
    race,
    report,
    row,
    wide,
)
from torch import nn
from torch.nn import functional as F

from kdnb.data import Batches, Images
from kdnb.kd import KD
from kdnb.models import create_model, features
from kdnb.tfkd import TfKD, tf_kd_reg_loss
from kdnb.training import Supervised, fit


def random_images(n, channels, size):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=g)
    return Images(x, torch.randint(0, 10, (n,), generator=g), tuple("0123456789"))


# ---- data: one gather on the device against one image at a time


@row
def data():
    "50,000 images: Batches beside a DataLoader."
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
    loader, ours = DataLoader(Pictures(usual), 128, shuffle=True), Batches(images, 128, augment="crop_flip")

    def whole():
        for _ in ours:
            pass

    def piece():
        for _ in zip(loader, range(20), strict=False):
            pass

    times = race({"ours": whole, "peer": piece})
    rates = [(390 * 128 / a, 20 * 128 / b) for a, b in zip(times["ours"], times["peer"], strict=True)]
    mine, theirs = (statistics.median(r) for r in zip(*rates, strict=True))
    note = f"{mine:,.0f} and {theirs:,.0f} images/s"
    peer = "`DataLoader` with torchvision's transforms"
    report("50,000 images of 32 x 32, crop and flip", peer, [a / b for a, b in rates], note)


# ---- the loop: fit against the bare loop, with the same step


@row
def loop():
    "fit beside a bare loop with the same step, MNIST MLPs."
    images = random_images(128 * 40, 1, 28)
    make = lambda name, seed=0: create_model(name, in_channels=1, image_size=28, seed=seed)  # noqa: E731
    methods = {
        "MLP 1200-1200, labels": lambda: Supervised(make("mlp_1200_1200"), lr=0.01),
        "MLP 400, labels": lambda: Supervised(make("mlp_400"), lr=0.01),
        "MLP 400, distilled": lambda: KD(make("mlp_400"), make("mlp_1200_1200", 1), lr=0.01),
    }
    for name, new in methods.items():
        a, b, batches = new(), new(), Batches(images, 128)

        def bare_loop(method, batches=batches):
            for x, y in batches.epoch(0):
                method.step(x, y)

        ours = lambda a=a, batches=batches: fit(a, batches, epochs=1, progress="off")  # noqa: E731
        peer = lambda b=b, bare_loop=bare_loop: bare_loop(b)  # noqa: E731
        ours()
        peer()
        assert all(p.equal(q) for p, q in zip(a.student.parameters(), b.student.parameters(), strict=True))
        compare(f"`fit`, {name}", {"": ours}, {"a bare loop with the same step": peer})


# ---- a step of training and of distilling: RepDistiller (helper/loops.py) and mdistiller (engine/trainer.py)


class Meter:
    "Their running average."

    def __init__(self):
        self.sum = self.count = self.avg = 0

    def update(self, value, n):
        self.sum, self.count = self.sum + value * n, self.count + n
        self.avg = self.sum / self.count


def top_1_and_5(logits, y):
    "Per cent, as both count it after each batch."
    with torch.no_grad():
        hit = logits.topk(5, 1, True, True)[1].t().eq(y.view(1, -1).expand(5, -1))
        return [hit[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100 / len(y)) for k in (1, 5)]


class RepDistiller:
    "One batch of train_vanilla, or of train_distill with --distill kd -r 0.1 -a 0.9, kd_T 4."

    def __init__(self, student, teacher=None):
        self.student, self.teacher = student.train(), teacher and teacher.eval()
        self.optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4)
        self.meters = [Meter() for _ in range(3)]

    def step(self, x, y):
        if self.teacher is None:
            logits = self.student(x)
            loss = F.cross_entropy(logits, y)
        else:
            logits, _maps = features(self.student, x)
            with torch.no_grad():
                answers, _theirs = features(self.teacher, x)
            soft = F.kl_div((logits / 4).log_softmax(1), (answers / 4).softmax(1), reduction="sum")
            loss = 0.1 * F.cross_entropy(logits, y) + 0.9 * (soft * 16 / len(x)) + 0.0 * 0
        values = loss.item(), *(hits[0] for hits in top_1_and_5(logits, y))
        for meter, value in zip(self.meters, values, strict=True):
            meter.update(value, len(x))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Mdistiller(RepDistiller):
    "One train_iter with the Vanilla or the KD distiller, the same weights and temperature."

    def step(self, x, y):
        self.optimizer.zero_grad()
        logits = self.student(x)
        if self.teacher is None:
            losses = [F.cross_entropy(logits, y)]
        else:
            with torch.no_grad():
                answers = self.teacher(x)
            soft = F.kl_div((logits / 4).log_softmax(1), (answers / 4).softmax(1), reduction="none")
            losses = [0.1 * F.cross_entropy(logits, y), 0.9 * (soft.sum(1).mean() * 16)]
        loss = sum(part.mean() for part in losses)
        loss.backward()
        self.optimizer.step()
        hits = top_1_and_5(logits, y)
        values = loss.cpu().detach().numpy().mean(), *(h[0] for h in hits)
        for meter, value in zip(self.meters, values, strict=True):
            meter.update(value, len(x))
        return loss.detach()


PEERS = {"RepDistiller's loop, float32": RepDistiller, "mdistiller's loop, float32": Mdistiller}


def step_rows(work, method, student, teacher, batch_size, both=False):
    "Checks in float64, three steps and all weights; then the clock."
    g = torch.Generator().manual_seed(0)
    nets = [net for net in (student, teacher) if net is not None]

    def ours(kind):
        return method(*(copy.deepcopy(net).to(kind) for net in nets), lr=0.05)

    def peer(loop, kind):
        return loop(*(bare(net).to(kind) for net in nets))

    x, y = noise(16, 32).double(), torch.randint(0, 10, (16,), generator=g)
    sides = [ours(torch.float64), *(peer(loop, torch.float64) for loop in PEERS.values())]
    for side in sides:
        for _ in range(3):
            side.step(x if side is sides[0] else normalised(student, x), y)
        check_weights(sides[0].student, side.student, rtol=1e-7, atol=1e-9)
    x, y = noise(batch_size, 32), torch.randint(0, 10, (batch_size,), generator=g)
    mine, brief = ours(torch.float32), ours(torch.float32)
    for side in (mine, brief):
        wide(side.student)
        if teacher is not None:
            wide(side.teacher)
    jobs = {"": partial(mine.step, wide(x), y), "bfloat16": in_bf16(brief, wide(x), y)}
    plain = normalised(student, x)
    loops = list(PEERS.items())[: 1 + both]
    peers = {name: partial(peer(loop, torch.float32).step, plain, y) for name, loop in loops}
    compare(f"{work}, batch {batch_size}", jobs, peers, repeat=3, flops=flops_of(jobs[""]))


@row
def supervised():
    "CE step, resnet8, beside RepDistiller."
    for batch_size in (64, 128):
        step_rows("CE step, resnet8", Supervised, network("resnet8", normalised=True), None, batch_size)


@row
def distilled():
    "KD step: resnet26 teaches resnet8, beside RepDistiller and mdistiller."
    nets = [network(name, normalised=True) for name in ("resnet8", "resnet26")]
    for batch_size in (64, 128):
        step_rows("KD step, resnet26 teaches resnet8", KD, *nets, batch_size, both=batch_size == 64)


# ---- the switches of fit: bfloat16, compilation


@row
def switches():
    "fit: bfloat16 and compile beside float32, resnet20 and MLP."
    for name, channels, size in (("resnet20", 3, 32), ("mlp_1200_1200", 1, 28)):
        images, losses = random_images(128 * 6, channels, size), {}

        def new(name=name, channels=channels, size=size):
            return Supervised(create_model(name, in_channels=channels, image_size=size, seed=0), lr=0.01)

        def train(method, key, precision="fp32", images=images, losses=losses):
            history = fit(method, Batches(images, 128), epochs=1, progress="off", precision=precision)
            losses.setdefault(key, history["loss"][0])

        compiled = new()
        compiled.student.compile()  # once for all rounds: fit would drop the code after each
        jobs = {"bfloat16": partial(train, new(), "bf16", "bf16")}
        if name == "resnet20":  # compiling takes longer than all else here
            jobs["bfloat16 and compiled"] = partial(train, compiled, "compiled", "bf16")
        compare(f"`fit`, {name}", jobs, {"`fit` in float32": partial(train, new(), "fp32")})
        assert all(abs(value / losses["fp32"] - 1) < 0.02 for value in losses.values()), losses


# ---- Tf-KD (my_loss_function.py, train_kd.py): the virtual teacher is filled in row by row


def published_reg_loss(logits, y):
    table = torch.ones_like(logits)
    table = table * (1 - 0.99) / (logits.shape[1] - 1)
    for i in range(logits.shape[0]):
        table[i, y[i]] = 0.99
    soft = nn.KLDivLoss()(logits.log_softmax(1), (table / 20).softmax(1)) * 100.0
    return (1 - 0.1) * F.cross_entropy(logits, y) + 0.1 * soft


class PublishedReg:
    def __init__(self, student):
        self.student, self.loss, self.total, self.correct = student.train(), Meter(), 0, 0
        self.optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4)

    def step(self, x, y):
        self.optimizer.zero_grad()
        logits = self.student(x)
        loss = published_reg_loss(logits, y)
        loss.backward()
        self.optimizer.step()
        self.total += len(y)
        self.correct += logits.max(1)[1].eq(y).sum().item()
        self.loss.update(loss.data, len(x))
        f"{self.loss.avg:05.3f}"  # their progress bar reads it
        return loss.detach()


@row
def tfkd():
    "Tf-KD_reg with 100 classes: the loss, a step of resnet8, beside the published code."
    g = torch.Generator().manual_seed(0)
    x, y = noise(128, 32), torch.randint(0, 100, (128,), generator=g)
    logits = torch.randn(128, 100, generator=g)
    ours = partial(tf_kd_reg_loss, logits, y, variant="official", multiplier=100.0)
    torch.testing.assert_close(ours(), published_reg_loss(logits, y))
    peer = {"the published code, float32": partial(published_reg_loss, logits, y)}
    compare("Tf-KD_reg, 100 classes, batch 128, the loss", {"": ours}, peer, repeat=100)

    net = network("resnet8", normalised=True, num_classes=100)

    def method(kind=torch.float32):
        student = copy.deepcopy(net).to(kind)
        return TfKD(student, variant="official", multiplier=100.0, lr=0.1)

    mine, theirs = method(torch.float64), PublishedReg(bare(net).double())
    for _ in range(3):
        mine.step(x[:16].double(), y[:16])
        theirs.step(normalised(net, x[:16].double()), y[:16])
    check_weights(mine.student, theirs.student, rtol=1e-7, atol=1e-9)
    mine, brief, theirs = method(), method(), PublishedReg(bare(net))
    for side in (mine, brief):
        wide(side.student)
    jobs = {"": partial(mine.step, wide(x), y), "bfloat16": in_bf16(brief, wide(x), y)}
    peer = {"the published code, float32": partial(theirs.step, normalised(net, x), y)}
    compare("Tf-KD_reg, 100 classes, batch 128, a step of resnet8", jobs, peer, repeat=2)


if __name__ == "__main__":
    main(__doc__)
