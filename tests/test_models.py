"""What the lesson on models leaves out: independent oracles, foreign networks, files that lie."""

import errno
import json
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
from torch import nn

from kdnb.models import (
    Net,
    Normalize,
    check_model,
    create_model,
    features,
    fold_batchnorm,
    list_models,
    load_model,
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


def test_unused_block_of_trades_changes_nothing_but_the_count():
    with torch.device("meta"):
        plain, trades = create_model("wrn_34_10"), create_model("wrn_34_10_trades")
    extra = trades.state_dict().keys() - plain.state_dict().keys()
    assert extra and all(k.startswith("sub_block1.") for k in extra)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "mobilenet_v2"])
def test_channels_last_and_compile_agree(name):
    model, x = create_model(name, seed=0).eval(), torch.rand(4, 3, 32, 32)
    expected, maps = features(model, x)
    model.to(memory_format=torch.channels_last)
    got, got_maps = features(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in got_maps.values())
    traced = torch.compile(model, backend="eager", fullgraph=True)  # one graph, features included
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(traced, x)[1], maps, rtol=1e-3, atol=1e-4)


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
    cards = [{"sha256": 1}, {"x": float("nan")}, {"x": torch.zeros(1)}]
    for bad, card in ((wrong, {}), (nn.Linear(2, 2), {}), *((model, card) for card in cards)):
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
