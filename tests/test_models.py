"""What the lesson on models leaves out: independent oracles, foreign networks, files that lie."""

import copy
import errno
import json
import pickle
import sys
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import stream
from torch import nn

from kdnb.models import (
    Net,
    Normalize,
    PadShortcut,
    check_model,
    create_model,
    export_onnx,
    features,
    fold_batchnorm,
    list_models,
    load_model,
    load_weights,
    num_params,
    save_model,
)


def same_weights(to, give):
    "Copy the parameters and buffers of one network into another of the same order."
    weights = [v for k, v in to.state_dict().items() if not k.startswith("normalize")]
    for a, b in zip(weights, give.state_dict().values(), strict=True):
        a.copy_(b)


# ---------------------------------------------------------------- the zoo


@pytest.mark.parametrize("name", [n for n in list_models() if "_10" not in n])
@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32)])
def test_every_name_builds_and_learns_at_every_size(name, channels, size):
    model = create_model(name, 7, channels, size, seed=0)
    x = torch.rand(2, channels, size, size)
    logits, maps = features(model, x)
    assert logits.shape == (2, 7) and list(maps) == model.feature_layers
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_a_network_normalises_with():
    model = create_model("resnet8", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    for net in (model, nn.Sequential(nn.Identity(), model)):
        mean, std = Normalize.of(net)
        assert mean is model.normalize.mean and std is model.normalize.std
    assert Normalize.of(nn.Linear(2, 2)) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_wide_resnets_are_torchvisions(name):
    witness = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    witness.conv1, witness.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, x = create_model(name).eval(), torch.rand(2, 3, 32, 32)
    same_weights(ours, witness)
    torch.testing.assert_close(ours(x), witness(x), rtol=1e-3, atol=1e-4)


def batch_norm(x, state, name):
    return F.batch_norm(x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def shake(model):
    "Batch norm that does something, so that an oracle sees where it stands."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean):
                t.normal_(0, 0.2)
    return model.eval()


def test_thin_resnet_against_a_functional_oracle():
    model, x = shake(create_model("resnet14", seed=0)), torch.rand(2, 3, 32, 32)
    s = model.state_dict()
    out = F.conv2d(x, s["stem.0.weight"], padding=1)
    out = batch_norm(out, s, "stem.1").relu()
    for i in range(3):
        for j in range(2):
            stride, body = 2 if i and not j else 1, f"stage{i + 1}.{j}.body"
            short = F.avg_pool2d(out, 1, stride)  # a 1x1 average pool is a subsampling
            if stride == 2:
                short = torch.cat([short, torch.zeros_like(short)], 1)
            out = F.conv2d(out, s[f"{body}.0.weight"], stride=stride, padding=1)
            out = F.conv2d(batch_norm(out, s, f"{body}.1").relu(), s[f"{body}.3.weight"], padding=1)
            out = (batch_norm(out, s, f"{body}.4") + short).relu()
    torch.testing.assert_close(model(x), F.linear(out.mean((2, 3)), s["linear.weight"], s["linear.bias"]))


def test_wide_resnet_against_a_functional_oracle():
    "Shortcuts read the pre-activated input; a batch norm and a ReLU follow the last stage."
    model, x = shake(create_model("wrn_16_2", seed=0)), torch.rand(2, 3, 32, 32)
    s = model.state_dict()
    out = F.conv2d(x, s["stem.weight"], padding=1)
    maps = {}
    for i in range(3):
        stride, block = (1, 2, 2)[i], f"stage{i + 1}.0"
        pre = batch_norm(out, s, f"{block}.0").relu()
        hidden = F.conv2d(pre, s[f"{block}.2.body.0.weight"], stride=stride, padding=1)
        hidden = batch_norm(hidden, s, f"{block}.2.body.1").relu()
        out = F.conv2d(hidden, s[f"{block}.2.body.3.weight"], padding=1)
        out = out + F.conv2d(pre, s[f"{block}.2.shortcut.weight"], stride=stride)
        block = f"stage{i + 1}.1.body"
        hidden = F.conv2d(batch_norm(out, s, f"{block}.0").relu(), s[f"{block}.2.weight"], padding=1)
        out = out + F.conv2d(batch_norm(hidden, s, f"{block}.3").relu(), s[f"{block}.5.weight"], padding=1)
        maps[f"stage{i + 1}"] = out
    logits, got = features(model, x)
    torch.testing.assert_close(got, maps)
    out = batch_norm(out, s, "head.0").relu().mean((2, 3))
    torch.testing.assert_close(logits, F.linear(out, s["linear.weight"], s["linear.bias"]))
    assert s["linear.bias"].abs().max() == 0


def test_mlp_is_relu_layers():
    model, x = create_model("mlp_30_20", 4, 1, 8, seed=0), torch.rand(5, 1, 8, 8)
    p = list(model.parameters())
    hidden = torch.relu(torch.relu(x.flatten(1) @ p[0].T + p[1]) @ p[2].T + p[3])
    torch.testing.assert_close(model(x), hidden @ p[4].T + p[5])
    assert num_params(model) == 64 * 30 + 30 + 30 * 20 + 20 + 20 * 4 + 4
    assert num_params(model, weights_only=True) == 64 * 30 + 30 * 20 + 20 * 4


def test_dropout_has_no_weights_and_acts_in_training_only():
    plain, dropping = (create_model(f"mlp_30_20{end}", 4, 1, 8, seed=0) for end in ("", "_dropout"))
    x = torch.rand(5, 1, 8, 8)
    dropping.load_state_dict(plain.state_dict())
    assert not dropping(x).equal(plain(x)) and dropping.eval()(x).equal(plain(x))


def test_unused_block_of_trades_changes_nothing_but_the_count():
    with torch.device("meta"):
        plain, trades = create_model("wrn_34_10"), create_model("wrn_34_10_trades")
    extra = trades.state_dict().keys() - plain.state_dict().keys()
    assert extra and all(k.startswith("sub_block1.") for k in extra)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenet_v2"])
def test_channels_last_and_compile_agree(name):
    model, x = create_model(name, seed=0).eval(), torch.rand(4, 3, 32, 32, generator=stream(0))
    expected, maps = features(model, x)
    model.to(memory_format=torch.channels_last)
    got, got_maps = features(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in got_maps.values())
    traced = torch.compile(model, backend="eager", fullgraph=True)  # one graph, features included
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(traced, x)[1], maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_shortcut_is_an_index_that_keeps_the_memory_order(size, order):
    x = torch.randn(2, 4, *size).to(memory_format=order).requires_grad_()
    wanted = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 3))
    found = PadShortcut(3, 2)(x)
    slope = torch.randn_like(wanted)
    a, b = (torch.autograd.grad(z, x, slope)[0] for z in (wanted, found))
    assert found.equal(wanted) and a.equal(b) and b.is_contiguous(memory_format=order)


def test_initialisation_leaves_every_stream_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    create_model("resnet8", seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    create_model("resnet8")
    assert not torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resnet9",
        "resnet38",
        "mlp",
        "mlp_0",
        "mlp_10_",
        "wrn_16",
        "wrn_16_0",
        "wrn_4_1",
        "wrn_18_2",
        "ResNet18",
        "wrn_6000004_1",
        "mlp_9999999",
        "mlp" + "_1" * 10**5,
        None,
        8,
    ],
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="unknown model|6n \\+ 4") as error:
        check_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_classes=1),
        dict(num_classes=2.5),
        dict(in_channels=0),
        dict(image_size=0),
        dict(mean=(0.5,)),
        dict(std=(1, 1, 0)),
        dict(std=(1, 1, float("nan"))),
        dict(mean=(0, 0, float("inf"))),
        dict(std=(1, 1, -1)),
        dict(std=0.5),
        dict(mean=("a", "b", "c")),
        dict(num_classes=True),
        dict(num_classes="10"),
        dict(num_classes=10**6, name="mlp_9999"),
        dict(num_classes=10**12),
        dict(in_channels=10**9),
        dict(image_size=float("nan")),
        dict(seed="a"),
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError) as error:
        create_model(**dict(name="resnet8") | arguments)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_are_whole_numbers(tmp_path):
    model = create_model("mlp_9", np.int64(4), np.int32(1), np.int64(5), seed=np.int64(1))
    save_model(model, tmp_path / "a")
    assert load_model(tmp_path / "a")(torch.rand(2, 1, 5, 5)).shape == (2, 4)


def test_an_unknown_name_names_what_is_near_if_anything_is():
    for name, words in (("resnet21", "nearest: resnet"), ("zzz", "known: mlp_400, ")):
        with pytest.raises(ValueError, match=words):
            check_model(name)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_another_precision_work_on_float32_images(kind, tmp_path):
    model, x = create_model("resnet8", std=(0.5, 0.5, 0.5), seed=0).eval(), torch.rand(2, 3, 8, 8)
    expected = model(x)
    save_model(model.to(kind), tmp_path / "a")
    for net in (model, load_model(tmp_path / "a"), fold_batchnorm(model)):
        assert net(x).dtype == kind
        torch.testing.assert_close(net(x).float(), expected, rtol=0.05, atol=0.05)


def folds(name):
    "A network, images, its layers, and those convolutions that become another in a copy."
    model, x = shake(create_model(name, 4, seed=0)), torch.rand(2, 3, 32, 32, generator=stream(1))
    layers = [n for n, m in model.named_modules() if n and not isinstance(m, Normalize) and n != "sub_block1"]
    folded = [n for n, m in fold_batchnorm(model).named_modules() if getattr(m, "bias", None) is not None]
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    return model, x, layers, [n for n in convs if n in folded]


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("name", ["mlp_9", "resnet8", "mobilenet_v2", "timm:vit_tiny_patch16_224"])
def test_images_need_not_be_square(name, tmp_path):
    "Height first; a network that reads one size refuses the turned one, and equal sides are one number."
    model, x = create_model(name, 4, image_size=(32, 48), seed=0).eval(), torch.rand(2, 3, 32, 48)
    assert model.config["image_size"] == (32, 48) and model(x).shape == (2, 4)
    save_model(model, tmp_path / "net")
    again = load_model(tmp_path / "net")
    assert again.config == model.config and again(x).equal(model(x))
    assert create_model(name, 4, image_size=(32, 32), seed=0).config["image_size"] == 32
    if "mlp" in name or "vit" in name:
        with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 48\), got .* \(2, 3, 48, 32\)"): model(x.mT)
    else: assert model(x.mT).shape == (2, 4)


def test_what_reads_squares_alone_says_so():
    with pytest.raises(ValueError, match="vit_b_16 cannot .*: 'its images are square, got 32 x 48'"):
        create_model("torchvision:vit_b_16", image_size=(32, 48))
    with pytest.raises(ValueError, match=r"image_size must be a whole number in .*, or two .* got '32'"):
        create_model("resnet8", image_size="32")


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "resnet18", "torchvision:mobilenet_v2"])
@torch.no_grad()
def test_maps_of_a_folded_network_are_the_same(name):
    "All but those of folded convolutions, and these too once they are named."
    model, x, layers, convs = folds(name)
    wanted, maps = features(model, x, layers)
    quick, found = features(fold_batchnorm(model), x, layers)
    same = [n for n in layers if n not in convs]
    assert gap(quick, wanted) < 1e-5 and max(gap(found[n], maps[n]) for n in same) < 1e-5
    natural = features(model, x)[1], features(fold_batchnorm(model), x)[1]
    assert [*natural[0]] == [*natural[1]] and all(gap(natural[1][n], m) < 1e-5 for n, m in natural[0].items())
    for asked in (convs[0], convs[::5], convs):
        logits, found = features(fold_batchnorm(model, asked), x, asked)
        assert gap(logits, wanted) < 1e-5 and max(gap(m, maps[n]) for n, m in found.items()) < 1e-5


def test_what_cannot_be_folded_is_told():
    "TorchScript has no layers to replace; a weight that a hook computes cannot be copied."
    script = torch.jit.trace(create_model("resnet8", seed=0).eval(), torch.rand(1, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
    hooked(torch.rand(1, 3, 8, 8))
    for model in (script, nn.Sequential(script), hooked):
        with pytest.raises(ValueError, match="fold=False, fast=False"):
            fold_batchnorm(model)


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(3, 8, 8),
        torch.rand(2, 1, 8, 8),
        torch.rand(2, 8, 8, 3),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.rand(2, 3, 8),
    ],
)
def test_wrong_images(x):
    with pytest.raises(ValueError, match="images must be floats in"):
        create_model("resnet8", seed=0)(x)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(
    "name, first, last",
    [
        ("resnet18", "act1", "layer4"),
        ("mobilenetv3_small_100", "bn1", "blocks"),
        ("efficientnet_b0", "blocks.0", "bn2"),
        ("convnext_atto", "stages.0", "norm_pre"),
    ],
)
def test_features_of_timm(name, first, last):
    model, x = timm.create_model(name, pretrained=False).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits, maps = features(model, x)
        assert torch.equal(logits, model(x))
        assert torch.equal(maps[last], model.forward_features(x))
    sizes = [m.shape[-1] for m in maps.values()]
    assert list(maps)[0] == first and list(maps)[-1] == last and sizes == sorted(set(sizes), reverse=True)


def test_features_of_a_transformer_by_name():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32).eval()
    _, maps = features(model, torch.rand(2, 3, 32, 32), ["blocks.0", "blocks.11"])
    assert [tuple(m.shape) for m in maps.values()] == [(2, 5, 192)] * 2


def test_in_place_layers_do_not_reach_back():
    "torchvision's block: bn2, then `out += identity`, then ReLU in place: one memory, three meanings."
    model = torchvision.models.resnet18(weights=None).eval()
    block, x = model.layer1[0], torch.rand(1, 3, 32, 32)
    names = ["maxpool", "layer1.0.bn1", "layer1.0.bn2", "layer1.0"]
    _, maps = features(model, x, names)
    assert list(maps) == names
    with torch.no_grad():
        bn1 = block.bn1(block.conv1(maps["maxpool"]))
        bn2 = block.bn2(block.conv2(bn1.relu()))
    torch.testing.assert_close(maps["layer1.0.bn1"], bn1)
    torch.testing.assert_close(maps["layer1.0.bn2"], bn2)
    torch.testing.assert_close(maps["layer1.0"], (bn2 + maps["maxpool"]).relu())
    maps["layer1.0.bn1"].square().sum().backward()  # and autograd is content
    assert model.conv1.weight.grad.isfinite().all()


def test_zoo_layers_by_name_equal_the_stages():
    model, x = create_model("resnet8", seed=0).eval(), torch.rand(2, 3, 16, 16)
    direct, hooked = features(model, x)[1], features(model, x, ["stage1", "stage2", "stage3", "stem"])[1]
    assert list(hooked) == ["stage1", "stage2", "stage3", "stem"]
    assert all(torch.equal(direct[k], hooked[k]) for k in direct)


def test_gradients_are_those_of_a_plain_call():
    model = torchvision.models.resnet18(weights=None, num_classes=5).eval()
    grads = []
    for call in (lambda x: model(x), lambda x: features(model, x)[0]):
        x = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).requires_grad_()
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_training_statistics_move_as_in_a_plain_call():
    models, x = [create_model("resnet8", seed=0) for _ in range(2)], torch.rand(4, 3, 16, 16)
    models[0](x)
    features(models[1], x, "stage1.0.body.1")
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    assert models[1].training


def test_normalised_image_is_no_map():
    model = nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), nn.Conv2d(3, 4, 3, stride=2), nn.Flatten())
    assert list(features(model, torch.rand(1, 3, 9, 9))[1]) == ["1"]


def test_hooks_are_removed_when_something_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pair, self.unused = nn.Conv2d(3, 4, 3), nn.GRU(6, 2), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            out = self.conv(x)
            self.pair(out[0])
            if x.sum() > 0:
                raise RuntimeError("half way")
            return out.mean((2, 3))

    model, x = Fails(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match="half way"):
        features(model, x + 1)
    for name in ("unused", "pair"):
        with pytest.raises(ValueError, match=f"'{name}' gave no tensor"):
            features(model, x, ["conv", name])
    with pytest.raises(ValueError, match="unknown layer 'konv'; nearest: conv"):
        features(model, x, "konv")
    with pytest.raises(ValueError, match="name the layers"):
        features(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), x)
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    model = create_model("resnet8", 5, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), seed=1)
    save_model(model, tmp_path / "a.b", note="first")
    return model, tmp_path / "a.b"


@pytest.mark.parametrize("ending", ["", ".safetensors", ".json"])
def test_round_trip(saved, ending):
    model, path = saved
    again = load_model(f"{path}{ending}")
    assert isinstance(again, Net) and not again.training and again.config == model.config
    assert again.card["note"] == "first" and again.card["num_params"] == num_params(model)
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(again(x), model.eval()(x))
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())


def test_channels_last_compiled_and_double_are_saved(saved, tmp_path):
    model, path = saved
    first = json.loads(path.with_name("a.b.json").read_text())["sha256"]
    card = save_model(torch.compile(model.to(memory_format=torch.channels_last)), tmp_path / "deep/er/c")
    assert card["sha256"] == first
    save_model(model.double(), tmp_path / "d")
    assert load_model(tmp_path / "d").linear.weight.dtype == torch.float64


def test_only_two_files_are_left(saved):
    assert sorted(p.name for p in saved[1].parent.iterdir()) == ["a.b.json", "a.b.safetensors"]


def test_a_failed_save_overwrites_nothing(saved):
    model, path = saved
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    wrong = create_model("resnet8", 5)
    wrong.linear = nn.Linear(64, 100)
    cards = [{"sha256": 1}, {"class": "x"}, {"x": float("nan")}, {"x": torch.zeros(1)}]
    odd = type("Odd", (nn.Linear,), dict(get_extra_state=lambda self: "words"))(2, 2)  # no tensor
    for bad, card in ((wrong, {}), (odd, {}), *((model, card) for card in cards)):
        with pytest.raises((ValueError, TypeError)) as error:
            save_model(bad, path, **card)
        assert "\n" not in str(error.value)
    assert before == {p.name: p.read_bytes() for p in path.parent.iterdir()}


@pytest.mark.parametrize("harm", ["cut", "flip", "swap", "card", "list", "model"])
def test_damaged_files_are_refused(saved, harm):
    model, path = saved
    weights, card = path.with_name("a.b.safetensors"), path.with_name("a.b.json")
    data = bytearray(weights.read_bytes())
    if harm == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm in ("swap", "model"):
        config = model.config | ({"num_classes": 6} if harm == "swap" else {"name": "resnet9"})
        card.write_text(json.dumps(json.loads(card.read_text()) | {"model": config}))
    else:
        card.write_text("[1]" if harm == "list" else card.read_text()[:-9])
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_devices(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_model(tmp_path / "nothing")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA"):
            load_model(saved[1], "cuda")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, w: c.update(name="wrn_6000004_1"), "6n \\+ 4"),
        (lambda c, w: c.update(num_classes=10**9), "num_classes must be"),
        (lambda c, w: c.update(std=[1, 0, 1]), "std must be > 0, got 0"),
        (lambda c, w: c.update(colour="red"), "not of 'resnet8'"),
        (lambda c, w: c.pop("name"), "not of None"),
        (lambda c, w: c.update(name=["resnet8"]), "unknown model"),
        (lambda c, w: w.update({"linear.bias": w["linear.bias"] * float("nan")}), "'linear.bias' holds NaN"),
        (lambda c, w: w.update({"normalize.std": 0 * w["normalize.std"]}), "'normalize.std' holds"),
        (lambda c, w: w.update({"stem.1.running_var": -w["stem.1.running_var"]}), "running_var' holds"),
        (lambda c, w: w.update({"linear.bias": w["linear.bias"].half()}), "one dtype"),
        (lambda c, w: w.update({k: v.to(torch.int8) for k, v in w.items()}), "dtype of weights must be"),
        (lambda c, w: w.update({k: v.to(torch.complex64) for k, v in w.items()}), "dtype of weights must be"),
        (lambda c, w: w.clear(), "one dtype"),
    ],
)
def test_hostile_cards_get_one_line(saved, change, words):
    "The checksum fits, since whoever made the weights made the card."
    path = saved[1]
    weights, card = path.with_name("a.b.safetensors"), json.loads(path.with_name("a.b.json").read_text())
    state = safetensors.torch.load(weights.read_bytes())
    change(card["model"], state)
    weights.write_bytes(data := safetensors.torch.save(state))
    path.with_name("a.b.json").write_text(json.dumps(card | {"sha256": sha256(data).hexdigest()}))
    with pytest.raises(ValueError, match=words) as error:
        load_model(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["[" * 10**5, '"' + "a" * 2 * 10**6 + '"', "{}", "\xff"], ids=len)
def test_hostile_text_gets_one_line(saved, text):
    saved[1].with_name("a.b.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="no card of a kdnb model") as error:
        load_model(saved[1])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_no_network_can_compute_with_is_not_saved(saved):
    for harm in (lambda m: m.linear.half(), lambda m: m.linear.bias.data.fill_(torch.nan)):
        model = create_model("resnet8", 5)
        harm(model)
        with pytest.raises(ValueError, match="one dtype|NaN"):
            save_model(model, saved[1])


def test_a_full_disk_leaves_the_old_pair(saved, monkeypatch):
    model, path = saved
    before, write = {p.name: p.read_bytes() for p in path.parent.iterdir()}, Path.write_bytes

    def full(self, data):
        write(self, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    for ending in ("safetensors", "json"):
        def some(self, data, ending=ending):
            return full(self, data) if ending in self.name else write(self, data)

        monkeypatch.setattr(Path, "write_bytes", some)
        with pytest.raises(OSError, match="could not be written.*No space left"):
            save_model(create_model("resnet8", 5, seed=7), path)
        assert before == {p.name: p.read_bytes() for p in path.parent.iterdir()}


# ---------------------------------------------------------------- networks from elsewhere

DOORS = ["timm:resnet18", "torchvision:resnet18", "timm:vit_tiny_patch16_224", "torchvision:regnet_y_400mf"]


@pytest.mark.parametrize("name", DOORS)
def test_foreign_networks_are_the_librarys_own(name, tmp_path):
    "Same logits with the same weights; they draw as the zoo does, and come back from their file."
    source, short = name.split(":")
    torch.manual_seed(3)
    before, mean, std = torch.get_rng_state(), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    model = create_model(name, 7, image_size=32, mean=mean, std=std, seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    if source == "timm":
        own = timm.create_model(short, num_classes=7, **dict(img_size=32) if "vit" in short else {})
    else:
        own = torchvision.models.get_model(short, weights=None, num_classes=7)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("normalize")}
    own.load_state_dict(state)
    x, z = torch.rand(2, 3, 32, 32), [torch.tensor(v).view(3, 1, 1) for v in (mean, std)]
    expected = own.eval()((x - z[0]) / z[1])
    assert torch.equal(model.eval()(x), expected) and Normalize.of(model)[0] is model.normalize.mean
    torch.testing.assert_close(fold_batchnorm(model)(x), expected, rtol=1e-3, atol=1e-4)
    assert num_params(model) == num_params(own)
    save_model(model, tmp_path / "a")
    before = torch.get_rng_state()
    again = load_model(tmp_path / "a")
    assert torch.equal(again(x), expected) and again.config == model.config
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:googlenet", "torchvision:vit_b_16"])
def test_foreign_networks_learn_from_grey_images(name):
    make = lambda seed: create_model(name, 5, 1, 64, seed=seed)  # noqa: E731
    a, b = make(1), make(2)
    first, other = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (a, b))
    assert first.in_channels == 1 and not torch.equal(first.weight, other.weight)
    logits = a(torch.rand(2, 1, 64, 64))  # no auxiliary heads
    assert logits.shape == (2, 5)
    logits.logsumexp(1).sum().backward()
    assert first.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "name, words",
    [
        ("timm:resnet81", "unknown model 'timm:resnet81'; nearest: timm:resnet"),
        ("torchvision:resnet19", "nearest: torchvision:resnet"),
        ("torchvision:maskrcnn_resnet50_fpn", "unknown model"),
        ("timm:hf-hub:someone/something", "unknown model"),
        ("timm:resnet18.no_such_tag", "unknown model"),
        ("timm:", "unknown model"),
        ("hub:resnet18", "unknown model"),
        ("torchvision:alexnet", "cannot read images \\(3, 32, 32\\)"),
        ("torchvision:vit_h_14", "cannot have these sizes"),
        ("torchvision:maxvit_t", "cannot have these sizes"),
        ("timm:eva02_enormous_patch14_clip_224", "at most 1e9|cannot"),
    ],
)
def test_what_other_libraries_cannot_build(name, words):
    with pytest.raises(ValueError, match=words) as error:
        create_model(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("package, extra", [("timm", "timm"), ("onnx", "onnx"), ("onnxruntime", "onnx")])
def test_a_missing_package_gets_one_line(package, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    model = create_model("mlp_4", in_channels=1, image_size=4)
    with pytest.raises(ImportError, match=rf"{package} is not installed: pip install 'kdnb\[{extra}\]'"):
        check_model("timm:resnet18") if extra == "timm" else export_onnx(model, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "name, layers",
    [
        ("timm:resnet18", "act1 layer1 layer2 layer3 layer4"),
        ("timm:mobilenetv3_small_100", "bn1 blocks.0 blocks.1 blocks.3 blocks"),
        ("torchvision:resnet50", "relu layer1 layer2 layer3 layer4"),
        ("torchvision:mobilenet_v2", "features.1 features.3 features.6 features.13 features"),
        ("torchvision:convnext_tiny", "features.1 features.3 features.5 features"),
    ],
)
def test_natural_stages_of_foreign_networks(name, layers):
    model = create_model(name, image_size=64, seed=0).eval()
    with torch.no_grad():
        maps = features(model, torch.rand(1, 3, 64, 64))[1]
    assert " ".join(maps) == layers
    assert [m.shape[-1] for m in maps.values()] == [32, 16, 8, 4, 2][-len(maps) :]


def test_a_transformer_has_tokens():
    names = {"timm:vit_tiny_patch16_224": "blocks.5", "torchvision:vit_b_16": "encoder.layers"}
    for name, layer in names.items():
        model, x = create_model(name, image_size=32, seed=0).eval(), torch.rand(2, 3, 32, 32)
        with pytest.raises(ValueError, match="no layer gives 4-D maps.*tokens"):
            features(model, x)
        assert features(model, x, layer)[1][layer].shape[:2] == (2, 5)
        with pytest.raises(ValueError, match="images must be floats"):
            model(torch.rand(2, 3, 64, 64))


def test_foreign_networks_compile():
    model, x = create_model("torchvision:resnet18", seed=0).eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# ---------------------------------------------------------------- weights from elsewhere


def wrapped(state):
    "The same weights as people save them."
    prefixed = [{f"{p}{k}": v for k, v in state.items()} for p in ("module.", "_orig_mod.", "model.module.")]
    yield from (state, *prefixed)
    yield from ({key: state, "epoch": 3, "lr": [0.1]} for key in ("state_dict", "model", "net", "ema"))
    yield {"model": {"state_dict": prefixed[0]}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    yield {"norm": {"mean": torch.zeros(3)}, "model_state_dict": prefixed[1]}
    averaged = torch.optim.swa_utils.AveragedModel(nn.Identity()).state_dict()
    yield averaged | prefixed[0]


@pytest.mark.parametrize("name", ["resnet8", "torchvision:squeezenet1_1"])
def test_weights_come_in_many_wrappings(name, tmp_path):
    give = create_model(name, 5, mean=(0, 0, 0), std=(1, 1, 1), seed=1)
    full = give.state_dict()
    bare = {k: v for k, v in full.items() if not k.startswith("normalize")}
    for i, content in enumerate([full, *wrapped(bare)]):
        model = create_model(name, 5, mean=(0.1, 0.2, 0.3), std=(2, 2, 2), seed=2)
        torch.save(content, tmp_path / f"{i}.pt")
        assert load_weights(model, tmp_path / f"{i}.pt") is model and model.training
        assert all(torch.equal(v, bare[k]) for k, v in model.state_dict().items() if k in bare)
        assert model.normalize.std.flatten()[0] == (2 if i else 1)  # the file's if it has one, else its own
    safetensors.torch.save_file({f"module.{k}": v for k, v in bare.items()}, tmp_path / "a.safetensors")
    model = torch.compile(create_model(name, 5, seed=2).half(), backend="eager")
    load_weights(model, tmp_path / "a.safetensors")
    assert all(torch.equal(p, bare[k].half()) for k, p in model._orig_mod.named_parameters())


def test_two_that_fit_need_a_key(tmp_path):
    a, b, model = (nn.Linear(3, 2) for _ in range(3))
    torch.save({"model": a.state_dict(), "ema": {"best": b.state_dict()}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="say key='model' or 'ema.best'"):
        load_weights(model, tmp_path / "a.pt")
    assert torch.equal(load_weights(model, tmp_path / "a.pt", "ema.best").weight, b.weight)
    with pytest.raises(ValueError, match="no dict of tensors"):
        load_weights(model, tmp_path / "a.pt", "net")


class Opens:  # what a pickle could do
    def __reduce__(self):
        return print, ("run!",)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("stem.1.bias"), "does not fit this Net: 'stem.1.bias' is missing"),
        (lambda s: s.update(more=torch.ones(2)), "'more' is unexpected"),
        (lambda s: s.update({"linear.bias": torch.ones(7)}), "bias' has shape .7,., the model shape .10,."),
        (lambda s: s.update({"linear.bias": torch.ones(10, dtype=int)}), "'linear.bias' has torch.int64"),
        (lambda s: s.update({"linear.bias": torch.ones(10) * torch.nan}), "holds NaN"),
        (lambda s: s.update({"linear.bias": torch.ones(10).half()}), "one dtype"),
        (lambda s: s.update({"stem.1.running_var": -torch.ones(16)}), "variance"),
        (lambda s: (s.clear(), s.update(torchvision.models.resnet18().state_dict())), "is missing"),
        (lambda s: s.clear(), "no dict of tensors"),
        (lambda s: s.update(more=Opens()), "holds no weights"),
    ],
)
def test_a_wrong_file_changes_nothing(change, words, tmp_path, capsys):
    model = create_model("resnet8", seed=0)
    before, content = copy.deepcopy(model.state_dict()), create_model("resnet8", seed=1).state_dict()
    change(content)
    torch.save({"state_dict": dict(content)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words) as error:
        load_weights(model, tmp_path / "a.pt")
    assert "\n" not in str(error.value) and not capsys.readouterr().out
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_no_file_of_weights(tmp_path):
    model = nn.Linear(2, 2)
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ValueError, match="holds no weights") as error:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(error.value)
        with pytest.raises(FileNotFoundError):
            load_weights(model, tmp_path / f"no_{name}")
    torch.save(torch.zeros(3), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no dict of tensors"):
        load_weights(model, tmp_path / "b.pt")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.conv = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv2d(3, 6, 3)
        self.last.weight = self.first.weight
        self.register_buffer("grid", torch.arange(20).view(4, 5).T)

    def forward(self, x):
        return self.last(self.first(self.conv(x).mean((2, 3))))


def test_any_module_is_saved_and_filled(tmp_path):
    model, x = Tied().to(memory_format=torch.channels_last), torch.rand(2, 3, 8, 8)
    card = save_model(model, tmp_path / "a", note="tied")
    assert card["model"] is None and card["class"] == "Tied" and card["note"] == "tied"
    with pytest.raises(ValueError, match="'Tied', which create_model does not know.*into=model"):
        load_model(tmp_path / "a")
    twin = load_model(tmp_path / "a", into=Tied())
    assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    torch.testing.assert_close(twin(x), model(x))  # other kernels run for channels-last
    assert twin.last.weight is twin.first.weight and not twin.training
    assert twin.card == card
    other = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="does not fit this Linear: 'weight' is missing") as error:
        load_model(tmp_path / "a", into=other)
    assert "\n" not in str(error.value)
    model.config = "of another library"
    assert save_model(model, tmp_path / "a")["model"] is None


def test_a_model_of_the_zoo_fills_another(saved):
    model, path = saved
    into = create_model("resnet8", 5, seed=9)
    assert torch.equal(load_model(path, into=into).linear.weight, model.linear.weight)
    assert torch.equal(into.normalize.std, model.normalize.std)


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name, size", [("resnet8", 16), ("timm:vit_tiny_patch16_224", 32)])
def test_onnx_gives_the_same_logits(name, size, tmp_path, capfd):
    import onnxruntime

    model = shake(create_model(name, 4, image_size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), seed=0))
    expected, x = model(y := torch.rand(3, 3, size, size)), y.numpy()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gap = export_onnx(model.train(), tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "") and model.training and torch.equal(torch.get_rng_state(), before)
    assert gap <= 1e-5 and [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for count in (1, 3):
        got = torch.from_numpy(session.run(["logits"], {"images": x[:count]})[0])
        torch.testing.assert_close(got, expected[:count], rtol=1e-4, atol=1e-5)


def test_onnx_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    class Odd(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else x.flatten(1)[:, :2]

    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    for model, example, words in (
        (flat, None, "example must be images"),
        (flat, torch.rand(3, 12), "example must be images"),
        (nn.Conv2d(3, 2, 1), torch.rand(1, 3, 2, 2), "must return logits"),
        (Odd(), torch.rand(1, 3, 2, 2), "cannot be exported"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            export_onnx(model, tmp_path / "a.onnx", example)
        assert "\n" not in str(error.value)
    export = torch.onnx.export

    def wrong(net, *args, **kw):  # an exporter that errs
        net = copy.deepcopy(net)
        net[1].bias.data += 0.01
        return export(net, *args, **kw)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(ValueError, match="of the largest from PyTorch's, at most 1e-5"):
        export_onnx(flat, tmp_path / "a.onnx", torch.rand(1, 3, 2, 2))
    assert not [*tmp_path.iterdir()]
