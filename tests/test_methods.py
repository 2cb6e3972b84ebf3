"""What every method owes: leftover gradients, frozen layers, shared networks, other outputs, NaN, precisions.

And every loss of logits: half precision, float64, masked classes, sequences, one graph."""

import copy
import inspect
import json
import math
import pkgutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import batch, stream
from torch import nn
from torch.utils._pytree import tree_map

import kdnb
from kdnb.abm import ABM, Generator, abm_student_loss, generator_loss
from kdnb.afd import AFD, DML, compare_maps, discriminator_loss, feature_loss, mutual_loss
from kdnb.ard import ARD, ard_loss
from kdnb.attacks import pgd
from kdnb.bss import BSS, bss_loss
from kdnb.features import AT, FSP, FeatureKD, FitNet, attention_loss, fsp_loss, hint_loss
from kdnb.kd import KD, kd_loss
from kdnb.learning import kl_divergence, learning
from kdnb.models import create_model
from kdnb.robust import PGDAT, TRADES, trades_loss
from kdnb.tfkd import (
    AdversarialTfKD,
    TfKD,
    label_smoothing_loss,
    tf_kd_reg_loss,
    tf_kd_self_loss,
    virtual_teacher,
)
from kdnb.training import Supervised

SHAPE = dict(num_classes=4, in_channels=1, image_size=8)
TWO = partial(pgd, eps=0.1, steps=2)
HARD = ("accuracy", "landed", "classes", "spread")  # counted, not computed


def net(seed=0):
    return create_model("resnet8", **SHAPE, seed=seed)


batch = partial(batch, classes=4)


def alone(method, student, teacher, **more):
    return method(student, **more)


def feature_kd(student, teacher, **more):
    return FeatureKD(student, teacher, partial(attention_loss, form="norm"), **dict(beta=1.0) | more)


def fitnet(student, teacher, **more):
    return FitNet(student, teacher, batch(2)[0].to(next(student.parameters()).dtype), seed=0, **more)


def abm(student, teacher, **more):
    generator = Generator(6, 1, batch(2)[0].shape[2:], seed=2).to(next(student.parameters()).dtype)
    sizes = dict(steps=4, batch_size=8, student_steps=2)
    return ABM(student, teacher, generator, **sizes | more)


def dml(student, peer, **more):
    return DML([student, peer], **more)


def afd(student, peer, **more):
    return AFD([student, peer], batch(2)[0], seed=0, **dict(feature_lr=1e-3) | more)


SOLO = {
    "Supervised": (Supervised, partial(alone, Supervised)),
    "PGDAT": (PGDAT, partial(alone, PGDAT, attack=TWO)),
    "TRADES": (TRADES, partial(alone, TRADES, attack=partial(TWO, objective="kl", start="gaussian"))),
    "TfKD": (TfKD, partial(alone, TfKD)),
    "AdversarialTfKD": (AdversarialTfKD, partial(alone, AdversarialTfKD, attack=TWO)),
}
PAIRS = {
    "KD": (KD, KD),
    "FeatureKD": (FeatureKD, feature_kd),
    "FitNet": (FitNet, fitnet),
    "AT": (AT, AT),
    "FSP": (FSP, FSP),
    "BSS": (BSS, partial(BSS, epochs=4)),
    "BSS official": (BSS, partial(BSS, epochs=4, variant="official")),
    "ABM": (ABM, abm),
    "ABM official": (ABM, partial(abm, variant="official")),
    "ARD": (ARD, partial(ARD, attack=TWO)),
    "ARD official": (ARD, partial(ARD, attack=TWO, variant="official", alpha=0.5)),
    "TfKD self": (TfKD, partial(TfKD, mode="self")),
    "AdversarialTfKD self": (AdversarialTfKD, partial(AdversarialTfKD, mode="self", attack=TWO)),
    "DML": (DML, dml),
    "DML offline": (DML, partial(dml, scheme="offline")),
    "AFD": (AFD, afd),
    "AFD fresh": (AFD, partial(afd, order="fresh", discriminator="one")),
    "AFD joint": (AFD, partial(afd, order="joint", discriminator="none")),
    "AFD joint each": (AFD, partial(afd, order="joint")),
    "AFD offline": (AFD, partial(afd, scheme="offline")),
}
METHODS = SOLO | PAIRS
each_method = pytest.mark.parametrize("name", METHODS)
each_pair = pytest.mark.parametrize("name", PAIRS)


def networks(method):
    "Every network that a method holds: student, teacher, peers, regressor, discriminators, generator."
    found = []
    for value in vars(method).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        found += [part for part in several if isinstance(part, nn.Module)]
    return found


def states(method):
    return [v.clone() for part in networks(method) for v in part.state_dict().values()]


def leave_gradients(modules, size=1.0):
    for parameter in (p for module in modules for p in module.parameters()):
        parameter.grad = torch.full_like(parameter, size)


def first_step(name, leftover=False, dtype=torch.float32, student=None, teacher=None):
    "A method after one step, and what the step returned."
    student, teacher = student or net().to(dtype), teacher or net(1).to(dtype)
    x, y = batch()
    if leftover: leave_gradients([student, teacher])
    method = METHODS[name][1](student, teacher)
    if leftover: leave_gradients(networks(method))
    torch.manual_seed(0)
    return method, method.step(x.to(dtype), y)


def change(name):
    "By how much leftover gradients change the first step, in any network of the method: the largest number."
    both = [states(first_step(name, leftover)[0]) for leftover in (False, True)]
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(*both, strict=True))


# ---------------------------------------------------------------- networks as they come


@each_method
def test_a_leftover_gradient_changes_nothing(name):
    assert change(name) == 0


@each_method
def test_a_frozen_batch_norm_keeps_mode_and_statistics(name):
    student = net()
    norm = next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval().requires_grad_(False)
    before = copy.deepcopy(norm.state_dict())
    first_step(name, student=student)
    assert not norm.training and student.training
    assert all(value.equal(before[key]) for key, value in norm.state_dict().items())


@each_pair
def test_networks_that_are_one_or_share_a_module_are_refused(name):
    one, student, teacher = net(), net(), net(1)
    teacher.stem = student.stem
    for pair in ((one, one), (student, teacher)):
        with pytest.raises(ValueError, match="share|two networks|all different") as error:
            METHODS[name][1](*pair)
        assert "\n" not in str(error.value)
        assert all(p.requires_grad for net in pair for p in net.parameters())


@each_pair
def test_a_frozen_teacher_is_asked_folded(name):
    "Whoever freezes the network it is given asks a copy without BatchNorm; what learns keeps its own."
    teacher = net(1)
    method = METHODS[name][1](net(), teacher)
    fixed = [m for m in networks(method) if {p.requires_grad for p in m.parameters()} == {False}]
    assert len(fixed) == (not any(p.requires_grad for p in teacher.parameters()))
    assert not any(isinstance(layer, nn.BatchNorm2d) for m in fixed for layer in m.modules())


def test_every_method_of_the_collection_is_here():
    there = set()
    for file in pkgutil.iter_modules(kdnb.__path__):
        room = import_module(f"kdnb.{file.name}")
        there |= {kind for kind in map(vars(room).get, getattr(room, "__all__", [])) if hasattr(kind, "step")}
    assert there == {kind for kind, _ in METHODS.values()}


def shake(model):
    "Batch norm that does something."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var): t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean): t.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("layers", [None, ["stem.0", "stage2"]])
@each_pair
def test_a_folded_teacher_makes_the_same_step(name, layers):
    "With the natural stages, and with a convolution that is named; in float64."
    (kind, make), found, named = PAIRS[name], [], {}
    pairs = issubclass(kind, FeatureKD | ABM)
    if layers and pairs: named = dict(student_layers=layers, teacher_layers=layers)
    if layers and issubclass(kind, AFD): named = dict(layers=layers[0])
    for fold in (True, False):
        torch.manual_seed(0)
        teacher, (x, y) = shake(net(1)).double(), batch()
        method = make(net().double(), teacher, **named)
        if any(p.requires_grad for p in teacher.parameters()): return   # a peer
        if not fold and hasattr(method, "teacher"): method.teacher = teacher
        elif not fold: method.networks[-1] = teacher
        found.append((method.step(x.double(), y), method.student.state_dict()))
    for a, b in zip(*found, strict=True):
        for key in a: torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8, msg=f"{name}: {key}")


@pytest.mark.parametrize("kinds", ["resnet8 wrn_16_1", "mlp_40 mlp_40"])
@each_method
def test_images_need_not_be_square(name, kinds, monkeypatch):
    "Twelve pixels high and twenty wide; only what reads maps refuses a network that has none."
    x, y = torch.rand(6, 1, 12, 20, generator=stream(1)), torch.arange(6) % 4
    monkeypatch.setitem(globals(), "batch", lambda n=6: (x[:n], y[:n]))
    shape = dict(SHAPE, image_size=(12, 20))
    networks = [create_model(kind, **shape, seed=seed) for seed, kind in enumerate(kinds.split())]
    try: found = METHODS[name][1](*networks).step(x, y)
    except ValueError as error:
        assert "mlp" in kinds and str(error).startswith(("maps must be", "FSP needs at least 2 layers"))
    else: assert found["loss"].isfinite()


ROLES = [(name, "student") for name in METHODS] + [(name, "teacher") for name in PAIRS]
OUTPUTS = {"tuple": lambda z: (z, z), "dict": lambda z: {"logits": z}, "sequence": lambda z: z[:, None]}


def returns(output, seed):
    "A network of the zoo that returns something else than logits."
    made = net(seed)
    usual = type(made)
    made.__class__ = type("Other", (usual,), {"forward": lambda self, *a: output(usual.forward(self, *a))})
    return made


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("name", "role"), ROLES)
def test_other_outputs_than_logits_get_one_sentence(name, role, output):
    with pytest.raises(ValueError, match=r"must return (floating-point )?logits|must .*\(B, K\)") as error:
        first_step(name, **{role: returns(OUTPUTS[output], 3)})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- numbers


def numeric(kind, *types):
    "Keyword arguments of a class, of its bases and of `learning` that are numbers of these types."
    makers, names = [b.__init__ for b in kind.__mro__ if "__init__" in vars(b)], set()
    if any("recipe" in inspect.signature(make).parameters for make in makers): makers.append(learning)
    for make in makers:
        for name, p in inspect.signature(make).parameters.items():
            if {p.annotation, *get_args(p.annotation)} & {*types} and name != "seed": names.add(name)
    return sorted(names)


@each_method
def test_only_numbers_pass_for_numbers(name):
    kind, make = METHODS[name]
    assert {"lr"} <= {*numeric(kind, float)}
    passed = []
    for argument in numeric(kind, float, int):
        for value in (math.nan, "1", True):
            try: make(net(), net(1), **{argument: value})
            except ValueError as error:
                assert argument in str(error) and "\n" not in str(error), (argument, value, str(error))
            else: passed.append((argument, value))
    assert not passed


NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


@pytest.mark.parametrize("name", ["10_kd", "12_robust", "22_ard", "23_afd", "24_tfkd"])
def test_parameters_of_a_notebook_that_are_no_numbers_are_refused_before_it_starts(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [(c["metadata"].get("tags"), "".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    start = [tags for tags, _ in code].index(["parameters"])
    values, setup, passed = {}, code[start + 1][1], []
    exec(code[start][1], values)
    exec(setup, dict(values))
    for parameter, kind in values["__annotations__"].items():
        if kind is not float: continue
        try: exec(setup, values | {parameter: math.nan})
        except ValueError as error: assert parameter in str(error)
        else: passed.append(parameter)
    assert not passed


# ---------------------------------------------------------------- precisions


@each_method
def test_losses_are_float32_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16): method, found = first_step(name)
    for key, value in found.items():
        assert value.dtype == torch.float32 and value.isfinite() and value.ndim == 0, key
    assert all(p.isfinite().all() for part in networks(method) for p in part.parameters())


@each_method
def test_float64_stays_float64(name):
    method, found = first_step(name, dtype=torch.float64)
    for key, value in found.items():
        if not any(word in key for word in HARD): assert value.dtype == torch.float64, key
    assert all(p.dtype == torch.float64 for part in networks(method) for p in part.parameters())


# ---------------------------------------------------------------- losses

LOGIT_LOSSES = {  # of student's and teacher's logits and labels
    "kl_divergence": lambda s, t, y: kl_divergence(s, t),
    "kd_loss": lambda s, t, y: kd_loss(s, t, 30.0),
    "trades_loss": lambda s, t, y: trades_loss(s, t, y),
    "bss_loss": lambda s, t, y: bss_loss(s, t),
    "bss_loss, kl": lambda s, t, y: bss_loss(s, t, form="kl"),
    "generator_loss": lambda s, t, y: generator_loss(s, t),
    "abm_student_loss": lambda s, t, y: abm_student_loss(s, t, beta=0.0),
    "ard_loss": lambda s, t, y: ard_loss(s, t),
    "ard_loss, labels": lambda s, t, y: ard_loss(s, t, s, y, alpha=0.5),
    "mutual_loss": mutual_loss,
    "tf_kd_self_loss": tf_kd_self_loss,
    "tf_kd_reg_loss": lambda s, t, y: tf_kd_reg_loss(s, y),
    "tf_kd_reg_loss, official": lambda s, t, y: tf_kd_reg_loss(s, y, variant="official", softening="logits"),
    "label_smoothing_loss": lambda s, t, y: label_smoothing_loss(s, y),
    "label_smoothing_loss, wrong": lambda s, t, y: label_smoothing_loss(s, y, 0.95, "wrong"),
}
MAP_LOSSES = {  # of two networks' maps
    "hint_loss": lambda a, b: hint_loss(a[0], b[0]),
    "attention_loss": attention_loss,
    "attention_loss, norm": lambda a, b: attention_loss(a, b, "norm"),
    "fsp_loss": fsp_loss,
    "compare_maps": lambda a, b: compare_maps(a[0], b[0])["distance"],
    "discriminator_loss": lambda a, b: discriminator_loss(a[0][:, 0, 0, 0], b[0][:, 0, 0, 0]),
    "feature_loss": lambda a, b: feature_loss(a[0][:, 0, 0, 0]),
}
each_logit_loss = pytest.mark.parametrize("name", LOGIT_LOSSES)


def logits(dtype=torch.float32, n=6, classes=5):
    g = torch.Generator().manual_seed(1)
    s, t = 3 * torch.randn(2, n, classes, generator=g)
    return s.bfloat16().to(dtype), t.bfloat16().to(dtype), torch.randint(classes, (n,), generator=g)


def maps(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [[torch.rand(3, 2, k, k, generator=g).bfloat16().to(dtype) for k in (4, 2)] for _ in range(2)]


def value_and_slope(loss, values):
    values[0].requires_grad_()
    found = loss(*values)
    return found.detach(), torch.autograd.grad(found, values[0])[0]


@each_logit_loss
def test_losses_of_bfloat16_logits_are_those_of_float32(name):
    loss, wanted, slope = LOGIT_LOSSES[name], *value_and_slope(LOGIT_LOSSES[name], logits())
    with torch.autocast("cpu", torch.bfloat16): found, rounded = value_and_slope(loss, logits(torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (rounded.float() - slope).norm() < 0.01 * slope.norm()


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_losses_of_bfloat16_maps_are_those_of_float32(name):
    loss = MAP_LOSSES[name]
    with torch.autocast("cpu", torch.bfloat16): found = loss(*maps(torch.bfloat16))
    torch.testing.assert_close(found, loss(*maps()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *MAP_LOSSES])
def test_losses_of_float64_are_float64(name):
    loss, values = (LOGIT_LOSSES | MAP_LOSSES)[name], logits if name in LOGIT_LOSSES else maps
    exact = loss(*values(torch.float64))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, loss(*values()).double(), rtol=1e-4, atol=1e-6)


@each_logit_loss
def test_a_masked_class_of_the_teacher_counts_as_impossible(name):
    found = []
    for mask in (-math.inf, -1e6):
        s, t, y = logits()
        t[:, 0], y[:] = mask, 1
        found.append(LOGIT_LOSSES[name](s, t, y))
    assert found[0].isfinite()
    torch.testing.assert_close(*found)


@each_logit_loss
def test_sequences_of_logits_are_refused(name):
    s, t, y = logits()
    with pytest.raises(ValueError, match=r"\(B, K\)") as error:
        LOGIT_LOSSES[name](s[None], t[None], y)
    assert "\n" not in str(error.value)


LOSSES = LOGIT_LOSSES | MAP_LOSSES | {"virtual_teacher": lambda s, t, y: virtual_teacher(y, 5)}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"fsp_loss"}))  # its autocast knows no "meta"
def test_losses_never_read_the_device(name):
    "A tensor on this one has no values: to ask for one is an error."
    values = maps() if name in MAP_LOSSES else logits()
    found = LOSSES[name](*tree_map(lambda v: v.to("meta"), values))
    assert found.device.type == "meta" and found.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_one_graph(name):
    values = maps() if name in MAP_LOSSES else logits()
    torch._dynamo.reset()
    traced = torch.compile(LOSSES[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*values), LOSSES[name](*values))
