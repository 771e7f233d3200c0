"""The network's counts, shapes, gradients and refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch

from scripts.keys import CLASS_LOGITS, FEATURES, HPV_LOGIT, LOG_HAZARD, SEG_LOGITS
from scripts.model.branches import tumour_burden
from scripts.model.losses import MultitaskLoss, SegmentationLoss
from scripts.model.networks import MultitaskNet, class_probabilities
from scripts.model.unet import set_checkpointing

SHAPES = {"seg": (SEG_LOGITS, (2, 1, 32, 32, 32)), "hpv": (HPV_LOGIT, (2,)), "surv": (LOG_HAZARD, (2,))}
SUBSETS = [
    pytest.param(tasks, id="+".join(tasks))
    for tasks in (
        ("seg",), ("hpv",), ("surv",), ("seg", "hpv"), ("seg", "surv"), ("hpv", "surv"), ("seg", "hpv", "surv")
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def image():
    return torch.rand(2, 2, 32, 32, 32)


@pytest.fixture
def net():
    """An evaluated network; outside training its dropout and batch norms are fixed."""
    return MultitaskNet().eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- architecture ------------------------------------------------------------------------------------------


def test_parameter_count():
    net = MultitaskNet()
    parts = {name: count(child) for name, child in net.named_children()}
    assert parts == {"encoder": 1919256, "decoder": 742881, "hpv": 1016649, "summaries": 11160, "survival": 16110}
    assert count(net) == 3706056
    statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert count(net) + statistics == pytest.approx(3.73e6, rel=0.005), "the paper's count, statistics included"


def test_residual_convolutions_a_level():
    net = MultitaskNet()
    assert [(len(level), level[-1].conv.out_channels) for level in net.encoder.levels] == [
        (2, 8), (2, 16), (3, 32), (3, 64), (4, 128)
    ]  # fmt: skip
    assert [(len(level), level[-1].conv.out_channels) for level in net.decoder.levels] == [
        (3, 64), (3, 32), (2, 16), (2, 8)
    ]  # fmt: skip
    for level in (*net.encoder.levels, *net.decoder.levels):
        kinds = [type(block.shortcut).__name__ for block in level]
        assert kinds == ["SafeConv3d"] + ["Identity"] * (len(level) - 1)


def test_dense_stages():
    stages = MultitaskNet().hpv.stages
    assert [len(stage.block) for stage in stages] == [4, 8, 16]
    assert [stage.norm.num_features for stage in stages] == [16, 32, 64]
    layers = [layer for stage in stages for layer in stage.block]
    assert {(layer.bottleneck[2].out_channels, layer.growth[2].out_channels) for layer in layers} == {(64, 16)}
    assert {layer.dropout.p for layer in layers} == {0.05}


def test_deep_features(net, image):
    features = net.encode(image)
    assert [tuple(f.shape[1:]) for f in features] == [(8 * 2**k, *[32 // 2**k] * 3) for k in range(5)]
    assert net.summaries(features).shape == (2, 124)
    logit, z2 = net.classify(image, net.decode(features), torch.zeros(2, 7))
    assert (logit.shape, z2.shape) == ((2,), (2, 112))


def test_hpv_branch_reads_pet_then_ct_then_the_probability_map(net, image):
    seen = []
    net.hpv.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    outputs = net(image)
    expected = torch.cat([image[:, 1:], image[:, :1], outputs[SEG_LOGITS].sigmoid()], dim=1)
    torch.testing.assert_close(seen[0], expected)


def test_survival_weights_are_the_fully_connected_layers():
    assert [tuple(w.shape) for w in MultitaskNet().survival_weights()] == [(64, 124), (64, 112), (1, 135)]
    assert [tuple(w.shape) for w in MultitaskNet(9, ("surv",)).survival_weights()] == [(64, 124), (1, 73)]
    assert MultitaskNet(tasks=("seg", "hpv")).survival_weights() == []


@pytest.mark.parametrize("tasks", SUBSETS)
def test_tasks_give_their_outputs_and_train_every_parameter(tasks, image):
    net = MultitaskNet(tasks=tasks).train()
    outputs = net(image, torch.rand(2, 7))
    features = outputs.pop(FEATURES, None)
    expected = None if "surv" not in tasks else (2, 236) if "hpv" in tasks else (2, 124)
    assert (None if features is None else tuple(features.shape)) == expected
    assert features is None or not features.requires_grad
    assert {name: tuple(value.shape) for name, value in outputs.items()} == dict(SHAPES[task] for task in tasks)
    sum((value * torch.randn_like(value)).sum() for value in outputs.values()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert (net.decoder is None) == ("seg" not in tasks)
    assert (net.encoder is None) == (tasks == ("hpv",))


def test_the_order_of_tasks_does_not_matter():
    assert MultitaskNet(tasks=["surv", "seg"]).tasks == ("seg", "surv")


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 16, 48), (64, 64, 64)])
def test_any_box_of_multiples_of_16(net, shape):
    with torch.no_grad():
        outputs = net(torch.rand(1, 2, *shape))
    assert outputs[SEG_LOGITS].shape == (1, 1, *shape)
    assert all(value.isfinite().all() for value in outputs.values())


def test_initialisation_is_glorot_with_zero_biases():
    net = MultitaskNet()
    weight = net.encoder.levels[4][1].conv.weight.detach()
    limit = (6 / (128 * 27 + 128 * 27)) ** 0.5
    assert weight.abs().max() <= limit and weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_batch_norm_settings_reach_every_batch_norm():
    norms = [
        module
        for module in MultitaskNet(bn_momentum=0.01, bn_eps=1e-3).modules()
        if isinstance(module, torch.nn.BatchNorm3d | torch.nn.BatchNorm1d)
    ]
    assert len(norms) == 24 + 5 + 28 * 2 + 3 + 3 + 3
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}


# --- gradient through the probability map ------------------------------------------------------------------


def decoder_gradient(net, image, output):
    net.zero_grad()
    net(image)[output].sum().backward()
    return sum(p.grad.abs().sum().item() for p in net.decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("output", [HPV_LOGIT, LOG_HAZARD])
def test_mask_gradient_stops_or_flows(output, image):
    net = MultitaskNet()
    assert net.mask_gradient == "stop"
    assert decoder_gradient(net, image, output) == 0
    net.mask_gradient = "flow"
    assert decoder_gradient(net, image, output) > 0


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_tumour_prior_is_the_probability_before_training(classes, image):
    net = MultitaskNet(seg_classes=classes, tumour_prior=0.05)
    outputs = net(image)
    torch.testing.assert_close(outputs[SEG_LOGITS].sigmoid(), torch.full_like(outputs[SEG_LOGITS], 0.05))
    if classes > 1:
        shares = class_probabilities(outputs[SEG_LOGITS], outputs[CLASS_LOGITS])
        torch.testing.assert_close(shares, torch.full_like(shares, 0.05 / classes))


def test_without_a_prior_the_layer_starts_as_published_and_nothing_else_differs():
    torch.manual_seed(0)
    published = MultitaskNet().state_dict()
    torch.manual_seed(0)
    started = MultitaskNet(tumour_prior=0.05).state_dict()
    differing = {name for name, value in published.items() if not torch.equal(value, started[name])}
    assert differing == {"decoder.logits.weight", "decoder.logits.bias"}
    assert published["decoder.logits.weight"].any() and not published["decoder.logits.bias"].any()


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, float("nan")])
def test_tumour_prior_is_a_probability(prior):
    with pytest.raises(ValueError, match=r"tumour_prior is .*between 0 and 1"):
        MultitaskNet(tumour_prior=prior)


def test_mask_gradient_of_the_hpv_loss_on_the_encoder(image):
    """The encoder hears of HPV through the probability map alone."""
    for mask_gradient, reaches in (("stop", False), ("flow", True)):
        net = MultitaskNet(mask_gradient=mask_gradient)
        net(image)[HPV_LOGIT].sum().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in net.encoder.parameters()) == reaches


def test_mask_gradient_changes_no_output(net, image):
    stopped = net(image)
    net.mask_gradient = "flow"
    torch.testing.assert_close(net(image), stopped, atol=0, rtol=0)


def test_survival_trains_the_encoder_in_either_case(image):
    net = MultitaskNet()
    net(image)[LOG_HAZARD].pow(2).sum().backward()
    assert all(level[0].conv.weight.grad.any() for level in net.encoder.levels)


# --- burden ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "burden"),
    [
        pytest.param({}, 4, id="hpv"),
        pytest.param({"tasks": ("seg", "surv")}, 3, id="no_hpv"),
        pytest.param({"hpv_inputs": ["image", "clinical"]}, 4, id="hpv_from_clinical_values"),
    ],
)
def test_burden_trains_every_parameter(options, burden, image):
    net = MultitaskNet(survival_inputs=["burden"], **options)
    loss = sum(value.pow(2).sum() for value in net(image, torch.rand(2, 7)).values() if value.requires_grad)
    loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert net.burden.burden.in_features == burden
    assert net.summaries is None and net.survival is None


def test_burden_starts_with_the_same_hazard_for_all(image):
    net = MultitaskNet(survival_inputs=["burden"]).eval()
    assert net(image, torch.rand(2, 7))[LOG_HAZARD].tolist() == [0, 0]


def test_burden_is_that_of_the_image_and_its_segmentation(image):
    net = MultitaskNet(survival_inputs=["burden"]).eval()
    features = net(image)[FEATURES][:, -4:]
    torch.testing.assert_close(features[:, :3], tumour_burden(net.tumour_probability(image)[:, 0], image[:, 1]))
    torch.testing.assert_close(features[:, 3], torch.sigmoid(net(image)[HPV_LOGIT]))


@pytest.mark.parametrize("mask_gradient", ["stop", "flow"])
def test_mask_gradient_of_the_survival_loss_by_burden(mask_gradient, image):
    """With "stop" neither segmentation nor HPV status is bent to the survival loss; with "flow" both are."""
    net = MultitaskNet(survival_inputs=["burden"], mask_gradient=mask_gradient)
    torch.nn.init.ones_(net.burden.burden.weight)
    net(image)[LOG_HAZARD].pow(2).sum().backward()
    for branch in (net.decoder, net.hpv):
        assert any(p.grad is not None and bool(p.grad.any()) for p in branch.parameters()) == (mask_gradient == "flow")


# --- HPV status from clinical values -----------------------------------------------------------------------


def test_hpv_from_clinical_values_starts_as_that_of_the_image(image):
    net = MultitaskNet(hpv_inputs=["image", "clinical"]).eval()
    alone = MultitaskNet().eval()
    alone.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("hpv_clinical")})
    clinical = torch.tensor([[1.0, 2, 0, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(net(image, clinical)[HPV_LOGIT], alone(image)[HPV_LOGIT])
    torch.nn.init.ones_(net.hpv_clinical.weight)
    one, none = (net(image, clinical)[HPV_LOGIT] - alone(image)[HPV_LOGIT]).tolist()
    assert (one, none) == (pytest.approx(6 + 2, abs=1e-5), 0)


@pytest.mark.parametrize(
    "without", [{"clinical_features": 0}, {"tasks": ["seg", "surv"]}], ids=["clinical_values", "hpv_task"]
)
def test_no_clinical_term_without(without):
    assert MultitaskNet(hpv_inputs=["image", "clinical"], **without).hpv_clinical is None


# --- behaviour ---------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic_and_training_is_not(net, image):
    torch.testing.assert_close(net(image), net(image), atol=0, rtol=0)
    net.train()
    assert not torch.equal(net(image)[LOG_HAZARD], net(image)[LOG_HAZARD])


def test_evaluated_cases_do_not_touch_each_other(net, image):
    together, alone = net(image), net(image[:1])
    for name, value in alone.items():
        torch.testing.assert_close(together[name][:1], value, atol=1e-4, rtol=1e-4)


def test_clinical_values_matter_and_none_is_zeros(net, image):
    none, zeros, some = net(image), net(image, torch.zeros(2, 7)), net(image, torch.ones(2, 7))
    assert torch.equal(none[LOG_HAZARD], zeros[LOG_HAZARD])
    assert not torch.equal(none[LOG_HAZARD], some[LOG_HAZARD])
    assert torch.equal(none[SEG_LOGITS], some[SEG_LOGITS])


def test_clinical_values_may_be_double_precision(net, image):
    clinical = torch.rand(2, 7, dtype=torch.float64)
    assert torch.equal(net(image, clinical)[LOG_HAZARD], net(image, clinical.float())[LOG_HAZARD])


@pytest.mark.parametrize("survival_inputs", ["deep", "burden"])
def test_no_clinical_features(survival_inputs, image):
    net = MultitaskNet(clinical_features=0, survival_inputs=[survival_inputs]).eval()
    assert net(image)[LOG_HAZARD].shape == (2,)


def test_tumour_probability_is_the_segmentation_path(net, image):
    torch.testing.assert_close(net.tumour_probability(image), net(image)[SEG_LOGITS].sigmoid())


def test_channels_last_gives_the_same(net, image):
    plain = net(image)
    fast = net.to(memory_format=torch.channels_last_3d)(image.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_autocast_keeps_the_scores_in_float32_and_near(net, image):
    for _ in range(20):  # running statistics that fit, so that outputs have an ordinary size
        net.train()(torch.rand(2, 2, 32, 32, 32))
    plain = net.eval()(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = net(image)
    assert (fast[HPV_LOGIT].dtype, fast[LOG_HAZARD].dtype) == (torch.float32, torch.float32)
    for name, value in fast.items():
        torch.testing.assert_close(value.float(), plain[name], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_training_has_a_finite_gradient(autocast, image):
    net = MultitaskNet(mask_gradient="flow")
    loss = MultitaskLoss(survival_weights=net.survival_weights())
    targets = {"seg": (torch.rand(2, 1, 32, 32, 32) < 0.1).float(), "hpv": torch.tensor([0.0, 1.0])}
    targets |= {"time": torch.tensor([2.0, 5.0]), "event": torch.tensor([True, False])}
    targets |= {f"{task}_known": torch.ones(2, dtype=torch.bool) for task in ("seg", "hpv", "surv")}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(net(image, torch.rand(2, 7)), targets)
    value.backward()
    assert value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_autocast_gives_every_parameter_about_the_same_gradient():
    """At 32 voxels the deepest maps have a depth of 2, where a bfloat16 kernel of oneDNN has no gradient."""
    image, gradients = torch.rand(4, 2, 32, 32, 32), []
    net = MultitaskNet(mask_gradient="flow", dropout=0.0, dense_dropout=0.0)
    names = (SEG_LOGITS, HPV_LOGIT, LOG_HAZARD)
    weights = [torch.randn(shape) for shape in ((4, 1, 32, 32, 32), (4,), (4,))]
    for autocast in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = net(image)
        sum((w * outputs[name]).mean() for w, name in zip(weights, names, strict=True)).backward()
        gradients.append({name: p.grad.norm().item() for name, p in net.named_parameters()})
    plain, fast = gradients
    assert [name for name in plain if not 0.2 * plain[name] - 1e-4 < fast[name] < 5 * plain[name] + 1e-4] == []


def test_it_learns_to_segment():
    """A bright cube in noise: thirty steps bring the loss down by half."""
    image, mask = torch.rand(2, 2, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16)
    mask[..., 4:10, 4:10, 4:10] = 1
    image[:, 1:] += mask
    net = MultitaskNet(tasks=("seg",))
    loss = MultitaskLoss(("seg",))
    targets = {"seg": mask, "seg_known": torch.ones(2, dtype=torch.bool)}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(net(image), targets)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2


def test_classes_are_learned_from_masks_that_tell_them_and_serve_cases_that_do_not():
    """Two bright cubes, of which the node's is dense too; the second case's mask calls both tumour."""
    image, mask = torch.rand(2, 2, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16)
    primary, node = (..., slice(2, 7), slice(2, 8), slice(2, 8)), (..., slice(9, 14), slice(8, 14), slice(8, 14))
    mask[primary], mask[node] = 1, 2
    image[:, 1:] += 2 * (mask > 0)
    image[:, :1] += 2 * (mask == 2)
    classes = mask.clone()
    mask[1] = (mask[1] > 0).float()
    net, loss = MultitaskNet(tasks=("seg",), seg_classes=2), MultitaskLoss(("seg",))
    targets = {"seg": mask, "seg_known": torch.tensor([True, True]), "seg_classes_known": torch.tensor([True, False])}
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        outputs = net(image)
        value = loss(outputs, targets)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2
    called = 1 + outputs[CLASS_LOGITS].argmax(dim=1, keepdim=True)
    for k in (0, 1):
        tumour = classes[k] > 0
        assert (called[k][tumour] == classes[k][tumour]).float().mean() > 0.9, f"case {k}"


# --- copies and state --------------------------------------------------------------------------------------


def test_state_dict_keys_are_stable():
    names = list(MultitaskNet().state_dict())
    assert len(names) == 587
    for name in (
        "encoder.levels.0.0.conv.weight",
        "encoder.levels.0.0.shortcut.bias",
        "encoder.levels.4.3.norm.running_var",
        "decoder.levels.3.1.conv.weight",
        "decoder.logits.bias",
        "hpv.stem.weight",
        "hpv.stages.2.block.15.growth.2.weight",
        "hpv.stages.1.transition.2.weight",
        "hpv.stages.0.norm.weight",
        "hpv.logit.weight",
        "summaries.levels.4.0.weight",
        "survival.hidden.1.2.weight",
        "survival.norm.weight",
        "survival.log_hazard.bias",
    ):
        assert name in names


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_copies_answer_alike_and_share_nothing(duplicate, image):
    net = MultitaskNet(mask_gradient="flow").eval()
    other = duplicate(net)
    torch.testing.assert_close(other(image), net(image), atol=0, rtol=0)
    assert other.mask_gradient == "flow"
    with torch.no_grad():
        other.decoder.logits.bias.add_(1)
    assert not torch.equal(other.decoder.logits.bias, net.decoder.logits.bias)


def test_state_dict_round_trip(net, image):
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = MultitaskNet().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(image), net(image), atol=0, rtol=0)


@pytest.mark.parametrize("seg_classes", [1, 2])
def test_all_heads_can_be_exported(seg_classes):
    """What exports need: a tuple of tensors from two inputs."""
    net = MultitaskNet(seg_classes=seg_classes).eval()
    image = torch.rand(2, 2, 16, 16, 16)

    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image, clinical):
            return self.net.heads(image, clinical)

    clinical = torch.rand(2, 7)
    program = torch.export.export(Heads().eval(), (image, clinical)).module()
    for ours, exported in zip(net.heads(image, clinical), program(image, clinical), strict=True):
        torch.testing.assert_close(exported, ours)


# --- classes of tumour ---------------------------------------------------------------------------------------


def test_two_classes_that_share_a_tumour_are_one_to_every_other_branch(image):
    """Each class has half the odds of the tumour of a network of one class: nothing else changes."""
    arguments = {"survival_inputs": ["burden"], "hpv_inputs": ["image", "clinical"]}
    one, two = MultitaskNet(**arguments).eval(), MultitaskNet(seg_classes=2, **arguments).eval()
    weights = {**one.state_dict()}
    weights["decoder.logits.weight"] = weights["decoder.logits.weight"].repeat(2, 1, 1, 1, 1)
    weights["decoder.logits.bias"] = weights["decoder.logits.bias"].repeat(2) - math.log(2)
    two.load_state_dict(weights)
    with torch.no_grad():
        expected, found = one(image), two(image)
        probability = two.tumour_probability(image)
    assert set(found) == {*expected, CLASS_LOGITS}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(probability, torch.sigmoid(expected[SEG_LOGITS]))
    each = class_probabilities(found[SEG_LOGITS], found[CLASS_LOGITS])
    assert each.shape == (2, 2, 32, 32, 32)
    torch.testing.assert_close(each.sum(dim=1, keepdim=True), probability)


def test_one_class_is_the_logit_itself(image):
    net = MultitaskNet().eval()
    with torch.no_grad():
        outputs = net(image)
        assert torch.equal(outputs[SEG_LOGITS], net.decode(net.encode(image)))
    assert CLASS_LOGITS not in outputs


@pytest.mark.parametrize("amp", [False, True])
def test_two_classes_train_every_parameter(amp, image):
    net = MultitaskNet(tasks=["seg", "hpv"], seg_classes=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        outputs = net(image)
    assert outputs[SEG_LOGITS].dtype == torch.float32
    truth = torch.arange(2 * 32**3).reshape(2, 1, 32, 32, 32) % 3
    SegmentationLoss()(outputs[SEG_LOGITS], truth, None, outputs[CLASS_LOGITS]).backward()
    slopes = {name: p.grad for name, p in net.named_parameters() if name.startswith(("encoder", "decoder"))}
    assert all(slope is not None and slope.isfinite().all() and slope.any() for slope in slopes.values())


# --- refusals ----------------------------------------------------------------------------------------------

BAD_INPUTS = [
    pytest.param((2, 2, 40, 40, 40), None, "multiples of 16", id="roi"),
    pytest.param((2, 2, 32, 32, 8), None, "multiples of 16", id="one_edge"),
    pytest.param((2, 2, 32, 32, 0), None, "multiples of 16", id="no_edge"),
    pytest.param((2, 3, 32, 32, 32), None, r"\(batch, 2, x, y, z\)", id="channels"),
    pytest.param((2, 32, 32, 32), None, r"\(batch, 2, x, y, z\)", id="no_batch"),
    pytest.param((2, 2, 32, 32, 32), (2, 6), r"\(2, 7\) is expected", id="clinical_features"),
    pytest.param((2, 2, 32, 32, 32), (1, 7), r"\(2, 7\) is expected", id="clinical_rows"),
    pytest.param((2, 2, 32, 32, 32), (7,), r"\(2, 7\) is expected", id="clinical_vector"),
]


@pytest.mark.parametrize(("shape", "clinical", "message"), BAD_INPUTS)
def test_inputs_refused(net, shape, clinical, message):
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape), None if clinical is None else torch.zeros(clinical))


def test_one_case_in_training_is_refused_only_where_it_cannot_be_normalised(image):
    with pytest.raises(ValueError, match="a batch of one case in training mode"):
        MultitaskNet()(image[:1])
    assert MultitaskNet(tasks=("seg", "hpv"))(image[:1])[HPV_LOGIT].shape == (1,)
    assert MultitaskNet().eval()(image[:1])[LOG_HAZARD].shape == (1,)


BAD_ARGUMENTS = [
    pytest.param({"tasks": ()}, "tasks are some of .* at least one", id="no_task"),
    pytest.param({"tasks": ("seg", "os")}, "tasks are some of", id="unknown_task"),
    pytest.param({"tasks": ("seg", "seg")}, "tasks are some of", id="repeated_task"),
    pytest.param({"mask_gradient": "detach"}, "mask_gradient is 'detach'", id="mask_gradient"),
    pytest.param({"survival_inputs": ["deep", "burden"]}, "not both", id="both_survival_inputs"),
    pytest.param({"hpv_inputs": ["clinical"]}, "hpv_inputs is", id="hpv_without_image"),
    pytest.param({"hpv_inputs": ["image", "age"]}, "hpv_inputs are some of", id="unknown_hpv_input"),
    pytest.param({"clinical_scales": [(1, 1, 1)]}, "for each of 7 values", id="scales_of_another_number"),
    pytest.param({"clinical_scales": [(0, 1, 1)] * 7}, "positive", id="scale_of_zero"),
    pytest.param({"survival_inputs": []}, "survival_inputs are some of", id="no_survival_input"),
    pytest.param({"survival_inputs": ["z1"]}, "survival_inputs are some of", id="unknown_survival_input"),
    pytest.param({"survival_inputs": ["deep", "deep"]}, "survival_inputs are some of", id="repeated_survival_input"),
    pytest.param({"survival_inputs": ["burden"], "tasks": ["surv"]}, "no tumour whose volume", id="burden_of_nothing"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_arguments_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultitaskNet(**arguments)


def test_no_probability_without_segmentation(image):
    with pytest.raises(RuntimeError, match="built without the 'seg' task"):
        MultitaskNet(tasks=("surv",)).tumour_probability(image)


@pytest.mark.parametrize("amp", [False, True])
def test_checkpointing_trains_the_same_network(amp: bool) -> None:
    torch.manual_seed(0)
    plain = MultitaskNet(dropout=0.0, dense_dropout=0.0).train()
    frugal = MultitaskNet(dropout=0.0, dense_dropout=0.0).train()
    set_checkpointing(frugal, True)
    frugal.load_state_dict(plain.state_dict())
    image = torch.rand(2, 2, 32, 32, 32)
    losses = []
    for net in (plain, frugal):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outputs = net(image)
        losses.append(sum(value.float().square().mean() for name, value in outputs.items() if name != "features"))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(dict(frugal.named_buffers()), dict(plain.named_buffers()))
    for (name, one), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_checkpointing_keeps_fewer_maps() -> None:
    kept = {}
    for checkpointing in (False, True):
        net, sizes = MultitaskNet().train(), []
        set_checkpointing(net, checkpointing)
        pack = partial(_note_size, sizes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(torch.rand(2, 2, 32, 32, 32))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def _note_size(sizes: list[int], x: torch.Tensor) -> torch.Tensor:
    sizes.append(x.numel())
    return x
