"`kdnb.afd`: losses, discriminators, who learns from whom, whose gradient goes where, loops written out."

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import same, state, stream
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdnb.afd import (
    AFD,
    DML,
    Discriminator,
    TransferLayer,
    _likeness,
    compare_maps,
    discriminator_loss,
    feature_loss,
    mutual_loss,
)
from kdnb.kd import kd_loss
from kdnb.learning import weights_of
from kdnb.models import create_model, features, load_model, num_params, save_model
from kdnb.training import fit

SHAPE = dict(num_classes=4, in_channels=1, image_size=8)
MIXED = ["resnet8", "wrn_10_2"]  # 64 and 128 channels


def nets(*names):
    return [create_model(name, **SHAPE, seed=i) for i, name in enumerate(names or ["resnet8"] * 2)]


def images(n=8, seed=0):
    return torch.rand(n, 1, 8, 8, generator=stream(seed)), torch.randint(4, (n,), generator=stream(seed + 1))


def method(*names, **choices):
    return AFD(nets(*names), images(2)[0], **dict(seed=3) | choices)


def batches(count=3):
    return [images(8, 10 + k) for k in range(count)]


def modules(afd):
    return afd.networks + getattr(afd, "transfers", []) + getattr(afd, "discriminators", [])


# ---------------------------------------------------------------- losses


def test_losses_of_a_discriminator_that_knows_all_or_nothing():
    one, zero, half = torch.ones(5), torch.zeros(5), torch.full((5,), 0.5)
    assert discriminator_loss(one, zero) == 0 and feature_loss(zero) == 1  # it is never wrong
    assert discriminator_loss(half, half) == 0.5 and feature_loss(half) == 0.25
    assert discriminator_loss(zero, one) == 2 and feature_loss(one) == 0  # it always is


@given(st.integers(0, 1000))
def test_least_squares_written_out(seed):
    real, fake = torch.rand(2, 7, generator=stream(seed), dtype=torch.float64)
    wanted = sum((1 - a) ** 2 + b**2 for a, b in zip(real.tolist(), fake.tolist(), strict=True)) / 7
    assert discriminator_loss(real, fake).item() == pytest.approx(wanted)
    assert feature_loss(fake).item() == pytest.approx(sum((1 - b) ** 2 for b in fake.tolist()) / 7)
    assert 0 <= discriminator_loss(real, fake) <= 2 and 0 <= feature_loss(fake) <= 1


def test_the_peer_is_real_and_oneself_is_fake():
    real, fake = (torch.full((4,), 0.5, requires_grad=True) for _ in range(2))
    discriminator_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    feature_loss(fake).backward()
    assert (fake.grad < 0).all()  # the network wants the opposite


@given(st.integers(0, 1000))
def test_mutual_loss_written_out(seed):
    own, peer = torch.randn(2, 6, 4, dtype=torch.float64, generator=stream(seed)) * 3
    y = torch.randint(4, (6,), generator=stream(seed))
    p, q = (peer / 3).softmax(1), (own / 3).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    hard = -own.softmax(1)[torch.arange(6), y].log().mean()
    torch.testing.assert_close(mutual_loss(own, peer, y), hard + 9 * kl)
    torch.testing.assert_close(mutual_loss(own, peer, y, alpha=0.5), hard + 4.5 * kl)
    torch.testing.assert_close(mutual_loss(own, own, y), hard)
    torch.testing.assert_close(mutual_loss(own, peer, y, 1.0, 2.0), hard + 2 * kd_loss(own, peer, 1.0))


def test_gradient_of_the_mutual_loss():
    own, peer = torch.randn(2, 6, 4, dtype=torch.float64, generator=stream(0))
    y = torch.randint(4, (6,), generator=stream(1))
    own.requires_grad_()
    peer.requires_grad_()
    mutual_loss(own, peer, y).backward()
    hard = own.softmax(1) - F.one_hot(y, 4)
    soft = 3 * ((own / 3).softmax(1) - (peer / 3).softmax(1))
    torch.testing.assert_close(own.grad, ((hard + soft) / 6).detach())
    assert peer.grad.abs().sum() > 0  # no hidden detach: the method makes peers constant


def test_losses_of_bfloat16_are_float32():
    values = torch.full((5,), 0.503).bfloat16()
    for loss in (discriminator_loss(values, values), feature_loss(values)):
        assert loss.dtype == torch.float32
    maps = torch.rand(3, 2, 4, 4, generator=stream(0)).bfloat16()
    assert all(v.dtype == torch.float32 for v in compare_maps(maps, maps).values())


def test_maps_compared():
    a, b = (torch.randn(5, 3, 4, 4, generator=stream(i), dtype=torch.float64) for i in (0, 1))
    found = compare_maps(a, b)
    rows = [(u.flatten(), v.flatten()) for u, v in zip(a, b, strict=True)]
    distance = sum((u - v).square().sum().sqrt() for u, v in rows) / 5
    cosine = sum((u @ v) / (u.norm() * v.norm()) for u, v in rows) / 5
    torch.testing.assert_close(found["distance"], distance)
    torch.testing.assert_close(found["cosine"], cosine)
    alike = compare_maps(a, 2 * a)
    assert alike["cosine"].item() == pytest.approx(1)
    assert alike["distance"].item() == pytest.approx(a.flatten(1).norm(dim=1).mean().item())
    assert compare_maps(a, a)["distance"] == 0


# ---------------------------------------------------------------- discriminators, transfer layers


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (4, 4), (1, 1), (5, 3)])
def test_a_discriminator_gives_one_value_an_image(size):
    maps = torch.randn(6, 64, *size, generator=stream(0))
    values = Discriminator(64)(maps)
    assert values.shape == (6,) and (values > 0).all() and (values < 1).all()
    assert Discriminator(64, 3)(maps).shape == (6, 3)


def test_a_discriminator_written_out():
    made, x = Discriminator(8), torch.randn(6, 8, 7, 7, generator=stream(0))
    first, second, last = (m for m in made.layers if isinstance(m, nn.Conv2d))
    values = x
    for conv in (first, second):
        values = F.conv2d(values, conv.weight, stride=2, padding=1)
        mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), keepdim=True, correction=0)
        values = F.leaky_relu((values - mean) / (var + 1e-5).sqrt(), 0.2)
    scores = (values * last.weight.view(1, -1, 1, 1)).sum(1).mean((1, 2)) + last.bias
    torch.testing.assert_close(made(x), 1 / (1 + torch.exp(-scores)), rtol=1e-4, atol=1e-5)


def test_discriminators_and_transfer_layers_keep_no_statistics():
    for made in (Discriminator(16), TransferLayer(16, 8)):
        x = torch.randn(6, 16, 4, 4, generator=stream(0))
        found = made(x)
        assert not list(made.buffers()) and torch.equal(made.eval()(x), found)


def test_a_transfer_layer_of_equal_channels_is_nothing():
    x = torch.randn(2, 5, 4, 4, generator=stream(0))
    made = TransferLayer(5, 5)
    assert made(x) is x and num_params(made) == 0
    changed = TransferLayer(5, 7)(x)
    assert changed.shape == (2, 7, 4, 4) and (changed >= 0).all()


def test_all_maps_come_to_the_most_channels():
    afd = method(*MIXED, "wrn_10_1")
    x = images()[0]
    shapes = []
    for net, transfer in zip(afd.networks, afd.transfers, strict=True):
        shapes.append(transfer(list(features(net, x)[1].values())[-1]).shape)
    assert set(shapes) == {(8, 128, 2, 2)}
    assert [num_params(t) > 0 for t in afd.transfers] == [True, False, True]
    assert all(num_params(t) == 0 for t in method("resnet8", "resnet14").transfers)


def test_seed_of_discriminators_is_their_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (method(*MIXED, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(same, a.discriminators + a.transfers, b.discriminators + b.transfers))
    assert not same(a.discriminators[0], c.discriminators[0])
    assert not same(a.discriminators[0], a.discriminators[1])


# ---------------------------------------------------------------- who learns from whom


@pytest.mark.parametrize("scheme", ["cyclic", "ensemble"])
@pytest.mark.parametrize(("count", "wanted"), [(2, [1, 0]), (3, [2, 0, 1]), (5, [4, 0, 1, 2, 3])])
def test_cyclic_peers(scheme, count, wanted):
    afd = method(*["resnet8"] * count, scheme=scheme)
    assert afd.peers == {k: [j] for k, j in enumerate(wanted)}
    assert len(afd.discriminators) == count


def test_other_peers_and_their_discriminators():
    three = ["resnet8"] * 3
    assert method(*three, scheme="pairs").peers == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    assert method(*three, scheme="offline").peers == {0: [2], 1: [2]}
    for choices, count in (({"scheme": "pairs"}, 6), ({"scheme": "offline"}, 2)):
        assert len(method(*three, **choices).discriminators) == count
        one = method(*three, **choices, discriminator="one").discriminators
        assert len(one) == 1 and one[0](torch.rand(2, 64, 2, 2)).shape == (2, 3)
        assert method(*three, **choices, discriminator="none").discriminators == []


ORDERS = ["fresh", "shared", "joint"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("discriminator", ["each", "one", "none"])
def test_two_in_a_circle_are_a_pair_bit_by_bit(order, discriminator):
    found = []
    for scheme in ("cyclic", "pairs"):
        afd = method(*MIXED, scheme=scheme, order=order, discriminator=discriminator, feature_lr=1e-3)
        losses = [afd.step(*batch) for batch in batches()]
        found.append((afd, losses))
    (a, first), (b, second) = found
    assert first == second and all(map(same, modules(a), modules(b)))


@pytest.mark.parametrize("scheme", ["cyclic", "pairs", "ensemble", "offline"])
def test_without_feature_weight_it_is_dml_bit_by_bit(scheme):
    recipe = dict(scheme=scheme, temperature=2.0, lr=0.05)
    schedules = dict(schedule=halve, feature_schedule=halve)
    afd = method(*["resnet8"] * 3, beta=0, **recipe, **schedules)
    dml = DML(nets(*["resnet8"] * 3), **recipe, schedule=halve)
    histories = [fit(m, batches(), epochs=2, progress="off") for m in (afd, dml)]
    assert all(map(same, afd.networks, dml.networks))
    assert [h["loss"] for h in histories][0] == histories[1]["loss"]
    assert not afd.feature_schedules  # of an optimiser that never steps PyTorch would warn
    before = method(*["resnet8"] * 3, **recipe)
    assert all(map(same, before.discriminators, afd.discriminators))  # never touched


def halve(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


# ---------------------------------------------------------------- an iteration written out


def peer_logits(afd, logits, k):
    if afd.scheme == "ensemble":
        return [torch.stack(list(logits)).mean(0).detach()]
    return [logits[j].detach() for j in afd.peers[k]]


def own_loss(afd, k, z, peers, y):
    soft = sum(kd_loss(z, p, afd.temperature) for p in peers) / len(peers)
    return F.cross_entropy(z, y) + afd.alpha * soft


def judge_loss(afd, maps):
    "Of all discriminators; maps are constants."
    maps = [m.detach() for m in maps]
    if afd.discriminator == "one":
        return sum(
            F.cross_entropy(afd.discriminators[0](m), torch.full((len(m),), k)) for k, m in enumerate(maps)
        )
    total = 0
    links = [(a, b) for a in afd.peers for b in afd.peers[a]]
    for d, (k, j) in zip(afd.discriminators, links, strict=True):
        total = total + (1 - d(maps[j])).square().mean() + d(maps[k]).square().mean()
    return total


def fool_loss(afd, k, maps):
    "Of network k."
    terms = []
    for j in afd.peers[k]:
        if afd.discriminator == "one":
            label = torch.full((len(maps[k]),), j)
            terms.append(F.cross_entropy(afd.discriminators[0](maps[k]), label))
        elif afd.discriminator == "none":
            terms.append((maps[k] - maps[j].detach()).abs().mean())
        else:
            at = [(a, b) for a in afd.peers for b in afd.peers[a]].index((k, j))
            terms.append((1 - afd.discriminators[at](maps[k])).square().mean())
    return sum(terms) / len(terms)


def written_out(afd, x, y):
    "The definition: every gradient asked for by itself, network by network. `afd` serves as a bag of parts."

    def passed():
        both = [features(net, x) for net in afd.networks]
        maps = [t(list(m.values())[-1]) for t, (_, m) in zip(afd.transfers, both, strict=True)]
        return [z for z, _ in both], maps

    def give(gradients):
        for p, g in gradients:
            p.grad = g if p.grad is None or g is None else p.grad + g

    def slopes(loss, module):
        weights = list(module.parameters())
        return list(
            zip(
                weights,
                torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else [],
                strict=True,
            )
        )

    def logit_gradients(logits):
        return [
            pair
            for k in afd.peers
            for pair in slopes(own_loss(afd, k, logits[k], peer_logits(afd, logits, k), y), afd.networks[k])
        ]

    def take(optimizer, gradients):
        give(gradients)
        optimizer.step()
        for module in modules(afd):
            module.zero_grad()

    logits, maps = passed()
    if afd.order == "fresh":
        take(afd.optimizer, logit_gradients(logits))
        logits, maps = passed()
    if afd.discriminators:
        loss = judge_loss(afd, maps)
        take(afd.discriminator_optimizer, [pair for d in afd.discriminators for pair in slopes(loss, d)])
    learners = {k: nn.ModuleList([afd.networks[k], afd.transfers[k]]) for k in afd.peers}
    fooling = [pair for k in afd.peers for pair in slopes(afd.beta * fool_loss(afd, k, maps), learners[k])]
    if afd.order == "joint":
        ours = {id(p) for net in afd.networks for p in net.parameters()}
        give([(p, g) for p, g in fooling if id(p) not in ours])
        logit = {id(p): g for p, g in logit_gradients(logits)}
        give([(p, logit[id(p)] if g is None else g + logit[id(p)]) for p, g in fooling if id(p) in ours])
        afd.optimizer.step()
        if afd.feature_optimizer:
            afd.feature_optimizer.step()
        for part in modules(afd):
            part.zero_grad()
        return
    later = logit_gradients(logits) if afd.order == "shared" else []
    if later:
        take(afd.optimizer, later)
    take(afd.feature_optimizer, fooling)


SCHEMES = ["cyclic", "pairs", "ensemble", "offline"]
CASES = [dict(scheme=s, order=o) for s in SCHEMES for o in ("fresh", "shared")]
CASES += [dict(order=o, discriminator=d) for o in ORDERS for d in ("each", "one", "none")]
CASES += [dict(scheme="pairs", discriminator="one", order="shared"), dict(beta=0.3, alpha=0.5, order="joint")]
CASES += [dict(scheme="offline", order="joint")]


@pytest.mark.parametrize("choices", CASES, ids=str)
def test_iterations_are_the_algorithm_written_out(choices):
    names = ["resnet8", "wrn_10_2", "resnet8"]
    rates = dict(feature_lr=1e-3, discriminator_lr=2e-3, lr=0.02)
    ours, theirs = (method(*names, **rates, **choices) for _ in range(2))
    for module in modules(ours) + modules(theirs):
        module.double()
    for x, y in batches(2):
        ours.step(x.double(), y)
        written_out(theirs, x.double(), y)
    for found, wanted in zip(modules(ours), modules(theirs), strict=True):
        for (name, value), other in zip(
            found.state_dict().items(), wanted.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-8, msg=name)


def test_the_orders_compute_different_things():
    found = []
    for order in ORDERS:
        afd = method(order=order, feature_lr=1e-3)
        afd.step(*images())
        found.append(afd.student)
    assert not (same(found[0], found[1]) or same(found[1], found[2]) or same(found[0], found[2]))


def test_reported_losses_are_those_of_the_step():
    afd = method(order="shared")
    x, y = images()
    logits = [net(x) for net in copy.deepcopy(afd.networks)]
    found = afd.step(x, y)
    wanted = [own_loss(afd, k, logits[k], peer_logits(afd, logits, k), y) for k in (0, 1)]
    torch.testing.assert_close(found["loss_1"], wanted[0].detach())
    torch.testing.assert_close(found["loss_2"], wanted[1].detach())
    torch.testing.assert_close(found["loss"], (sum(wanted) / 2).detach())


# ---------------------------------------------------------------- whose gradient, who moves


def receivers(afd, step):
    "For every optimiser, in the order of their steps: which parameters hold a gradient when it begins."
    names = {}
    for kind, parts in (("net", afd.networks), ("T", afd.transfers), ("D", afd.discriminators)):
        for k, part in enumerate(parts):
            names |= {f"{kind}{k}.{n}": p for n, p in part.named_parameters()}
    seen = []

    def look(optimizer, *_):
        which = [k for k, v in vars(afd).items() if v is optimizer][0]
        seen.append((which, {n for n, p in names.items() if p.grad is not None and p.grad.abs().sum() > 0}))

    optimizers = [afd.optimizer, afd.discriminator_optimizer, afd.feature_optimizer]
    handles = [o.register_step_pre_hook(look) for o in optimizers if o]
    step()
    for handle in handles:
        handle.remove()
    return seen, names


SEQUENCES = {
    "fresh": ["optimizer", "discriminator_optimizer", "feature_optimizer"],
    "shared": ["discriminator_optimizer", "optimizer", "feature_optimizer"],
}


@pytest.mark.parametrize("order", SEQUENCES)
@pytest.mark.parametrize("learner", [0, 1])
def test_gradients_of_one_link_land_where_they_should(learner, order):
    "Only the one network learns: nothing reaches its peer, and the head nothing from the maps."
    afd = method(*MIXED, order=order)
    peer = 1 - learner
    afd.peers, afd.links = {learner: [peer]}, [(learner, peer)]
    afd.discriminators = [afd.discriminators[learner]]
    seen, names = receivers(afd, lambda: afd.step(*images()))
    assert [name for name, _ in seen] == SEQUENCES[order]
    whole = {n for n in names if n.startswith(f"net{learner}.")}
    head = {n for n in whole if ".linear." in n or ".head." in n}
    judge = {n for n in names if n.startswith("D0.")}
    transfer = {n for n in names if n.startswith(f"T{learner}.")}
    assert head and bool(transfer) == (learner == 0)
    wanted = dict(zip(SEQUENCES["fresh"], (whole, judge, (whole - head) | transfer), strict=True))
    assert dict(seen) == wanted


@pytest.mark.parametrize("discriminator", ["each", "one"])
@pytest.mark.parametrize("scheme", ["cyclic", "pairs", "offline"])
@pytest.mark.parametrize("order", SEQUENCES)
def test_each_optimiser_moves_its_own_and_nothing_else(order, scheme, discriminator):
    afd = method("resnet8", "wrn_10_2", "resnet8", scheme=scheme, discriminator=discriminator, order=order)
    parts = {"net": afd.networks, "T": afd.transfers, "D": afd.discriminators}
    values = {
        f"{kind}{k}.{n}": p
        for kind, each in parts.items()
        for k, part in enumerate(each)
        for n, p in part.named_parameters()
    }
    seen = [{n: p.detach().clone() for n, p in values.items()}]
    for name in SEQUENCES[order]:
        getattr(afd, name).register_step_post_hook(
            lambda *_: seen.append({n: p.detach().clone() for n, p in values.items()})
        )
    afd.step(*images())
    moved = [{n for n in values if not torch.equal(a[n], b[n])} for a, b in zip(seen, seen[1:], strict=False)]
    learns = {n for n in values if n.startswith("net") and int(n[3]) in afd.peers}
    heads = {n for n in learns if ".linear." in n or ".head." in n}
    transfers = {n for n in values if n.startswith("T") and int(n[1]) in afd.peers}
    critics = {n for n in values if n.startswith("D")}
    wanted = dict(zip(SEQUENCES["fresh"], (learns, critics, (learns - heads) | transfers), strict=True))
    assert moved == [wanted[name] for name in SEQUENCES[order]]
    assert not any(name in afd.feature_optimizer.state for n, name in values.items() if n in heads)


def test_gradients_reported_are_those_of_the_steps():
    afd, lengths = method(*MIXED), {}
    for name in ("discriminator", "feature"):

        def look(optimizer, *_, name=name):
            slopes = [
                p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None
            ]
            lengths[f"{name}_gradient"] = torch.cat(slopes).norm()

        getattr(afd, f"{name}_optimizer").register_step_pre_hook(look)
    found = afd.step(*images())
    for name, length in lengths.items():
        torch.testing.assert_close(found[name], length, rtol=1e-4, atol=0)  # a sum of 10^5 squares


@pytest.mark.parametrize("order", ORDERS)
def test_clip_shortens_the_logit_step_alone(order):
    "In the joint order the step of the sum; what is reported is the gradient that was gone down."
    clip, found, lengths = 1e-3, [], {}
    for kind in ("optimizer", "feature_optimizer", "discriminator_optimizer"):

        def look(optimizer, *_, kind=kind):
            slopes = [p.grad.flatten() for p in weights_of(optimizer) if p.grad is not None]
            lengths.setdefault(kind, []).append(torch.cat(slopes).norm().item())

        for limit in (clip, 1e6):
            afd = method(*MIXED, order=order, clip=limit)
            getattr(afd, kind).register_step_post_hook(look)
            found.append(afd.step(*images()))
    short, long = lengths.pop("optimizer")
    assert short == pytest.approx(clip, rel=1e-3) and long > 10 * clip
    assert found[0]["feature_gradient"].item() == pytest.approx(
        short if order == "joint" else lengths["feature_optimizer"][0], rel=1e-3
    )
    if order == "fresh":
        lengths = {}  # new weights, new maps
    for short, long in lengths.values():
        assert short == pytest.approx(long, rel=1e-5) and short > 0


def test_any_optimiser_makes_the_logit_step():
    afd = method(optimizer=torch.optim.AdamW, schedule=halve)
    before = state(afd.student)
    fit(afd, batches(1), epochs=1, progress="off")
    assert isinstance(afd.optimizer, torch.optim.AdamW) and afd.optimizer.param_groups[0]["lr"] == 5e-4
    assert not torch.equal(before["linear.weight"], afd.student.linear.weight)


def test_likeness_is_the_mean_over_links():
    afd = method("resnet8", "resnet8", "resnet8", scheme="pairs")
    maps = [torch.rand(4, 64, 2, 2, generator=stream(k)) for k in range(3)]
    each = [compare_maps(maps[k], maps[j]) for k in range(3) for j in range(3) if j != k]
    for name, value in _likeness(afd.links, maps).items():
        torch.testing.assert_close(value, torch.stack([found[name] for found in each]).mean())


def test_nobody_keeps_a_gradient():
    for choices in CASES:
        afd = method(*MIXED, **choices)
        found = afd.step(*images())
        assert all(p.grad is None for part in modules(afd) for p in part.parameters())
        assert all(v.ndim == 0 and not v.requires_grad and v.isfinite() for v in found.values())


def test_a_fixed_teacher_stays_as_it_is():
    afd = method(scheme="offline")
    before = state(afd.networks[-1])
    afd.step(*images())
    teacher = afd.networks[-1]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert afd.student.training and afd.student is afd.networks[0]


@pytest.mark.parametrize(("order", "passes"), [("fresh", 2), ("shared", 1), ("joint", 1)])
def test_batch_norm_counts_the_passes(order, passes):
    afd = method("resnet8", "resnet8", "resnet8", order=order, scheme="offline", fold=False)
    for _ in range(3):
        afd.step(*images())
    for net, wanted in zip(afd.networks, (3 * passes, 3 * passes, 0), strict=True):
        counts = {m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
        assert counts == {wanted}


def test_identical_networks_have_nothing_to_teach():
    first = nets()[0]
    dml = DML([first, copy.deepcopy(first)])
    x, y = images()
    wanted = F.cross_entropy(copy.deepcopy(first)(x), y)
    torch.testing.assert_close(dml.step(x, y)["loss"], wanted.detach())


def test_frozen_weights_stay():
    networks = nets()
    networks[0].stem.requires_grad_(False)
    before = state(networks[0].stem[0])
    afd = AFD(networks, images(2)[0], feature_lr=1e-3)
    afd.step(*images())
    assert all(torch.equal(v, before[k]) for k, v in afd.student.stem[0].state_dict().items())
    assert not networks[0].stem[0].weight.requires_grad


# ---------------------------------------------------------------- what is watched


class Knows(nn.Module):
    "A discriminator that looks at a mark in the map."

    def __init__(self, says):
        super().__init__()
        self.says, self.weight = says, nn.Parameter(torch.zeros(()))

    def forward(self, maps):
        return self.says(maps.mean((1, 2, 3))) + 0 * self.weight


def test_accuracy_counts_both_sides():
    afd = method()
    x, y = images()
    means = [list(features(net, x)[1].values())[-1].mean((1, 2, 3)) for net in copy.deepcopy(afd.networks)]
    border = (means[0].median() + means[1].median()).item() / 2
    right = []
    for sign in (1, -1):
        afd = method(order="shared")
        afd.discriminators = [Knows(lambda m, s=sign: (s * 50 * (m - border)).sigmoid()) for _ in range(2)]
        afd.discriminator_optimizer = torch.optim.SGD(afd.discriminators[0].parameters(), 0.1)
        wanted = [s * (real - border) > 0 for real, s in ((means[1], sign), (means[0], -sign))]
        wanted += [s * (real - border) > 0 for real, s in ((means[0], sign), (means[1], -sign))]
        found = afd.step(x, y)["discriminator_accuracy"].item()
        assert found == pytest.approx(torch.cat(wanted).float().mean().item())
        right.append(found)
    constant = method()
    constant.discriminators = [Knows(lambda m: 0 * m + 0.9) for _ in range(2)]
    constant.discriminator_optimizer = torch.optim.SGD(constant.discriminators[0].parameters(), 0.1)
    found = constant.step(x, y)
    assert found["discriminator_accuracy"] == 0.5
    assert found["discriminator"].item() == pytest.approx(0.01 + 0.81)
    assert found["feature"].item() == pytest.approx(0.01)


def test_likeness_is_that_of_the_maps():
    afd = method(order="shared")
    x, y = images()
    a, b = (list(features(net, x)[1].values())[-1] for net in copy.deepcopy(afd.networks))
    found, wanted = afd.step(x, y), compare_maps(a.detach(), b.detach())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("discriminator", ["each", "one"])
def test_a_discriminator_learns_to_tell_two_networks_apart(discriminator):
    afd = method(discriminator=discriminator, feature_lr=1e-9, discriminator_lr=1e-2, lr=1e-9)
    history = [afd.step(*images(16))["discriminator_accuracy"] for _ in range(40)]
    assert torch.stack(history[:3]).mean() < 0.8 and torch.stack(history[-5:]).mean() > 0.9


def test_networks_learn_to_fool_a_discriminator_that_stands_still():
    afd = method("resnet8", "wrn_10_2", feature_lr=1e-3, discriminator_lr=1e-12, lr=1e-9)
    x, y = images(16)
    found = [afd.step(x, y)["feature"].item() for _ in range(15)]
    assert found[-1] < 0.8 * found[0]


def test_direct_alignment_makes_maps_alike():
    afd = method(discriminator="none", feature_lr=1e-3, lr=1e-9, feature_weight_decay=0.0)
    x, y = images(16)
    found = [afd.step(x, y) for _ in range(20)]
    assert found[-1]["feature"] < 0.7 * found[0]["feature"]
    assert found[-1]["cosine"] > found[0]["cosine"]


# ---------------------------------------------------------------- rates, fit, checkpoints, export


def test_rates_follow_schedules_of_their_own():
    def at(*milestones):
        return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)

    afd = method(schedule=at(2, 3), feature_schedule=at(1, 2), discriminator_lr=3e-5)
    found = []
    for _ in range(4):
        optimizers = (afd.optimizer, afd.feature_optimizer, afd.discriminator_optimizer)
        found.append([o.param_groups[0]["lr"] for o in optimizers])
        fit(afd, batches(1), epochs=1, progress="off")
    wanted = [(0.1, 2e-5, 3e-5), (0.1, 2e-6, 3e-6), (0.01, 2e-7, 3e-7), (0.001, 2e-7, 3e-7)]
    for row, rates in zip(found, wanted, strict=True):
        assert row == pytest.approx(rates, rel=1e-6)


def test_the_papers_settings():
    afd = method()
    (group,) = afd.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)
    for optimizer in (afd.feature_optimizer, afd.discriminator_optimizer):
        assert isinstance(optimizer, torch.optim.Adam)
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (2e-5, 0.1)
    assert afd.temperature == 3 and afd.scheme == "cyclic" and afd.order == "shared"


@pytest.mark.parametrize("order", ORDERS)
def test_four_networks_and_three_optimisers_resume_to_the_same_bits(tmp_path, order):
    def train(**more):
        schedules = dict(schedule=halve, feature_schedule=halve)
        names = ["resnet8", "wrn_10_2", "resnet8", "wrn_10_1"]
        afd = method(*names, order=order, feature_lr=1e-3, **schedules)
        return afd, fit(afd, batches(2), epochs=3, seed=1, progress="off", **more)

    straight, history = train()
    for stop in (1, 2, 5):
        file = dict(checkpoint=tmp_path / f"{stop}.pt")
        train(max_steps=stop, **file)
        resumed, again = train(**file)
        assert all(map(same, modules(straight), modules(resumed)))
        for name in ("loss", "loss_4", "feature", "discriminator_accuracy", "cosine"):
            assert again[name] == history[name]
    assert len(history) == 3


CHANGES = [dict(scheme="pairs"), dict(beta=2.0), dict(discriminator="one"), dict(order="fresh")]
CHANGES += [dict(temperature=2.0), dict(alpha=0.5), dict(lr=0.01), dict(feature_lr=1e-3)]
CHANGES += [dict(discriminator_lr=1e-3), dict(feature_weight_decay=0.0), dict(layers="stage2")]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_checkpoint_of_other_choices_is_refused(tmp_path, change):
    file = tmp_path / "one.pt"
    three = ["resnet8"] * 3
    fit(method(*three), batches(2), epochs=1, max_steps=1, checkpoint=file, progress="off")
    with pytest.raises(ValueError, match="another run"):
        fit(method(*three, **change), batches(2), epochs=1, checkpoint=file, progress="off")


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    file = tmp_path / "one.pt"
    fit(DML(nets()), batches(2), epochs=1, max_steps=1, checkpoint=file, progress="off")
    with pytest.raises(ValueError, match="another run"):
        fit(DML(nets("resnet8", "resnet14")), batches(2), epochs=1, checkpoint=file, progress="off")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_of_a_discriminator_in_bfloat16(size):
    "On a CPU torch 2.15 gives chance numbers for a padded stride over one pixel."
    made, x = Discriminator(64), torch.randn(16, 64, size, size, generator=stream(0))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = feature_loss(made(x))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.parameters()))]))
    assert (found[1] - found[0]).norm() < 0.3 * found[0].norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("discriminator", ["each", "one", "none"])
def test_bfloat16_reaches_every_weight(order, discriminator):
    "Autocast keeps copies of weights: one made without gradient would leave a part untrained."
    afd = method(*MIXED, order=order, discriminator=discriminator, feature_lr=1e-3)
    before = [state(part) for part in modules(afd)]
    history = fit(afd, batches(2), epochs=1, precision="bf16", progress="off")
    for old, part in zip(before, modules(afd), strict=True):
        assert all(not torch.equal(old[n], p) for n, p in part.named_parameters())
    assert all(math.isfinite(v) for v in history.rows[-1].values())


def test_bfloat16_is_near_float32():
    rows = [
        fit(method(*MIXED), batches(1), epochs=1, precision=p, progress="off").rows[-1]
        for p in ("fp32", "bf16")
    ]
    for name in ("loss", "discriminator", "feature", "cosine"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.1)


def test_a_step_by_itself_in_bfloat16_is_that_of_fit():
    "Autocast's copies of weights are thrown away when an optimiser has moved them."
    for order in ORDERS:
        ours, fitted = (method(*MIXED, order=order, feature_lr=1e-3) for _ in range(2))
        batch = images()
        for part in modules(ours):  # as fit does
            part.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours.step(*batch)
        row = fit(fitted, [batch], epochs=1, precision="bf16", progress="off").rows[-1]
        for name in ("loss", "discriminator", "feature"):
            assert found[name].item() == pytest.approx(row[name], abs=1e-7)
        assert all(map(same, modules(ours), modules(fitted)))


def test_values_of_bfloat16_maps_are_float32():
    maps = torch.rand(4, 64, 4, 4, generator=stream(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert Discriminator(64)(maps).dtype == torch.float32
    afd = method(discriminator="none")
    assert afd._feature_losses([maps, maps + 1])[0].dtype == torch.float32
    afd = DML(nets("resnet8", "resnet8", "resnet8"), scheme="ensemble", alpha=1.0)
    z, y = [torch.randn(8, 4, generator=stream(k)).bfloat16() for k in range(3)], images()[1]
    wanted = mutual_loss(z[0], torch.stack([v.float() for v in z]).mean(0), y)
    torch.testing.assert_close(afd._logit_losses(z, y)[0], wanted, rtol=0, atol=1e-6)


@pytest.fixture
def traced(monkeypatch):
    "`compile` without a C++ compiler: the graphs, forward and backward, without their code."
    usual = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: usual(self, *a, backend="aot_eager", **k))


def test_compiled_networks_learn_the_same(traced):
    "Compiled code gives the heads a gradient of zero, not none: weight decay must not reach them."
    for order in ("fresh", "shared"):
        found = []
        for compiled in (True, False):
            afd = method(order=order, feature_lr=1e-3)
            fit(afd, batches(2), epochs=1, compile=compiled, progress="off")
            heads = [p for net in afd.networks for p in net.linear.parameters()]
            assert not any(p in afd.feature_optimizer.state for p in heads)
            found.append(torch.cat([p.detach().flatten() for net in afd.networks for p in net.parameters()]))
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_only_one_network_is_exported(tmp_path):
    afd = method("resnet8", "wrn_10_2")
    fit(afd, batches(2), epochs=1, progress="off")
    save_model(afd.student, tmp_path / "one")
    loaded, fresh = load_model(tmp_path / "one"), nets()[0]
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    assert num_params(loaded) == num_params(fresh)
    x = images()[0]
    torch.testing.assert_close(loaded(x), afd.student.eval()(x))


def test_layers_by_name():
    x = images(2)[0]
    for layers in ("stage2", ["stage2", "stage2"]):
        afd = AFD(nets(), x, layers=layers)
        assert afd.transfers[0](torch.rand(1, 32, 4, 4)).shape == (1, 32, 4, 4)
        seen, _ = receivers(afd, lambda a=afd: a.step(*images()))
        assert not any(".stage3" in n for n in seen[-1][1]) and any(".stage2" in n for n in seen[-1][1])
    AFD(nets("wrn_10_1", "resnet8"), x, layers=["head.1", "stage3"]).step(*images())


def test_learners_are_put_into_training():
    afd = AFD([net.eval() for net in nets()], images(2)[0])
    assert all(m.training for net in afd.networks for m in net.modules())


def test_the_teacher_of_an_offline_scheme_keeps_its_maps():
    "Nothing trains a transfer layer of a fixed network: its students adapt to its channels."
    for names, channels in ((["wrn_10_2", "resnet8"], 64), (["resnet8", "wrn_10_2"], 128)):
        afd = method(*names, scheme="offline", feature_lr=1e-3)
        assert num_params(afd.transfers[1]) == 0 and num_params(afd.transfers[0]) > 0
        assert afd.transfers[0](torch.rand(2, 192 - channels, 2, 2)).shape == (2, channels, 2, 2)
        before = state(afd.transfers[0])
        afd.step(*images())
        assert all(not torch.equal(before[n], p) for n, p in afd.transfers[0].named_parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_extractors_that_are_frozen(order):
    "One of two: the other learns from it. Both: there is nothing for the feature step."
    both = nets()
    both[0].requires_grad_(False).linear.requires_grad_(True)
    afd = AFD(both, images(2)[0], order=order, feature_lr=1e-3, seed=0)
    before = [state(net) for net in both]
    afd.step(*images())
    moved = [
        {n for n, p in net.named_parameters() if not p.equal(b[n])}
        for net, b in zip(both, before, strict=True)
    ]
    assert moved[0] == {"linear.weight", "linear.bias"}
    assert moved[1] == {n for n, _ in both[1].named_parameters()}
    both[1].requires_grad_(False).linear.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        AFD(both, images(2)[0], order=order)


def test_any_network_with_maps_will_do():
    "Points of the plane, two numbers as a map."

    def small(seed):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2), nn.Unflatten(1, (2, 1, 1)))
        return nn.Sequential(body, nn.Flatten(), nn.Linear(2, 2))

    x = torch.rand(32, 2, generator=stream(0))
    afd = AFD([small(0), small(1)], x, layers="0", feature_lr=1e-3)
    history = fit(afd, [(x, (x[:, 0] > x[:, 1]).long())], epochs=3, progress="off")
    assert len(history["discriminator_accuracy"]) == 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(scheme="ring"), "scheme.*'ring'"),
        (dict(temperature=0.0), "temperature.*0"),
        (dict(temperature=math.nan), "temperature.*nan"),
        (dict(alpha=-1.0), "alpha.*-1"),
        (dict(beta=-1.0), "beta.*-1"),
        (dict(beta=math.inf), "beta.*inf"),
        (dict(lr=0.0), "lr.*0"),
        (dict(feature_lr=0.0), "feature_lr.*0"),
        (dict(discriminator_lr=0.0), "discriminator_lr.*0"),
        (dict(feature_weight_decay=-0.1), "feature_weight_decay.*-0.1"),
        (dict(discriminator="two"), "discriminator.*'two'"),
        (dict(order="any"), "order.*'any'"),
        (dict(layers="stage9"), "stage9"),
        (dict(layers=["stage3"]), r"layers.*2.*\['stage3'\]"),
        (dict(layers="linear"), "4-D"),
    ],
)
def test_bad_choices_are_one_clear_line(choices, message):
    with pytest.raises(ValueError, match=message) as error:
        method(**choices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("build", [DML, lambda networks: AFD(networks, images(2)[0])])
def test_fewer_than_two_networks_are_refused(build):
    one = nets()[0]
    for few in ([], [one], [one, one]):
        with pytest.raises(ValueError, match="networks must be 2 or more, all different"):
            build(few)


@pytest.mark.parametrize("scheme", ["cyclic", "offline"])
def test_networks_that_share_a_module_are_refused(scheme):
    first, second, third = nets(*["resnet8"] * 3)
    third.stem = second.stem
    with pytest.raises(ValueError, match="share stem.0.weight"):
        DML([first, second, third], scheme=scheme)
    assert all(p.requires_grad for net in (first, second, third) for p in net.parameters())


def test_discriminators_take_the_precision_of_the_student():
    afd = AFD([net.double() for net in nets(*MIXED)], images(2)[0])  # float32 example
    assert {p.dtype for part in modules(afd) for p in part.parameters()} == {torch.float64}


def test_a_leftover_gradient_enters_no_optimiser():
    for order in ORDERS:
        found = []
        for size in (None, 1.0):
            afd = method(*MIXED, order=order, feature_lr=1e-3)
            for p in (p for part in modules(afd) for p in part.parameters()):
                p.grad = None if size is None else torch.full_like(p, size)
            afd.step(*images())
            optimizers = (afd.optimizer, afd.feature_optimizer, afd.discriminator_optimizer)
            kept = [v for o in optimizers for s in o.state.values() for v in s.values()]
            weights = [v for part in modules(afd) for v in state(part).values()]
            found.append([*map(torch.clone, kept), *weights])
        assert all(map(torch.equal, *found))


def test_networks_of_different_classes_are_refused():
    a, b = create_model("resnet8", **SHAPE), create_model("resnet8", **SHAPE | dict(num_classes=5))
    with pytest.raises(ValueError, match=r"network 1 and network 2 must have the same shape \(B, K\)"):
        AFD([a, b], images(2)[0])
    before = state(a)
    dml = DML([a, b])
    with pytest.raises(ValueError, match=r"network 1 and network 2 must have the same shape \(B, K\)"):
        dml.step(*images())
    names = [n for n, _ in a.named_parameters()]
    assert all(torch.equal(before[n], a.state_dict()[n]) for n in names)


def test_what_is_no_map_is_refused_with_the_layers_to_choose():
    with pytest.raises(ValueError, match=r"maps must be 4-D, got shape \(2, 4\)") as error:
        method("resnet8", "resnet18", layers=["stage3", "linear"])
    text = str(error.value)
    assert "network 1: stage1 16 x 8 x 8, stage2 32 x 4 x 4, stage3 64 x 2 x 2; network 2: stage1 64" in text
    assert text.endswith("stage4 512 x 1 x 1") and "\n" not in text


@pytest.mark.parametrize("order", ORDERS)
def test_maps_of_different_size_are_pooled_to_the_smallest(order):
    choices = dict(scheme="offline", discriminator="none", order=order, layers=["stage1", "stage2"])
    afd, (x, y) = method("resnet8", "resnet8", lr=1e-9, **choices), images()
    student, teacher, transfer, _ = copy.deepcopy([*afd.networks, *afd.transfers])
    ours, theirs = features(student, x, "stage1")[1]["stage1"], features(teacher, x, "stage2")[1]["stage2"]
    wanted = F.l1_loss(transfer(F.avg_pool2d(ours, 2)), theirs)
    torch.testing.assert_close(afd.step(x, y)["feature"], wanted, rtol=1e-3, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8", "timm:resnet18"),
        ("mobilenet_v2", "wrn_40_2"),
        ("torchvision:resnet18", "torchvision:resnet50"),
    ],
)
def test_strangers_play(student, teacher):
    both = [create_model(name, num_classes=4, seed=k) for k, name in enumerate((student, teacher))]
    x, y = torch.rand(3, 3, 32, 32, generator=stream(0)), torch.tensor([0, 1, 2])
    afd = AFD(both, x, scheme="offline", seed=0)
    assert all(v.isfinite() for _ in range(2) for v in afd.step(x, y).values())


def test_an_example_of_other_images_is_refused():
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        AFD(nets(), torch.rand(2, 3, 8, 8))


def test_building_a_method_leaves_the_networks_as_they_were():
    networks = nets()
    before = [state(net) for net in networks]
    AFD(networks, images(2)[0])
    for net, old in zip(networks, before, strict=True):
        assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
        assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("sizes", [(0,), (8, 0), (2.5,)])
def test_discriminators_refuse_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match="a whole number >= 1"):
        Discriminator(*sizes)


def test_losses_refuse_unlike_shapes():
    with pytest.raises(ValueError, match=r"real and fake must be \(B,\) alike, got .*\(4,\) and .*\(5,\)"):
        discriminator_loss(torch.zeros(4), torch.zeros(5))
    for loss in (lambda v: discriminator_loss(v, v), feature_loss):
        with pytest.raises(ValueError, match=r"\(4, 2\)"):
            loss(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="first and second must have the same shape"):
        compare_maps(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match="same shape"):
        mutual_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
