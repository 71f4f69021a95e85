"""The multi-label task: its logits and losses against plain twins, training and scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Task, takes_label_sets
from fedprompt.methods.parts.label_sets import label_set_loss
from fedprompt.methods.registry import all_methods
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, score_each, score_models
from fedprompt.statistics import f1_scores, mean_average_precision
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES

ASL = MultiLabelConfig()
TASK = Task(CLASS_NAMES, ("an aerial photo of a {}.",), multi_label=ASL)
ADAPTED = sorted(name for name, cls in all_methods().items() if takes_label_sets(cls))


def plain_loss(z, y, gamma_neg, gamma_pos, clip):
    """Written label by label, from the formula; its weights are constants for the gradient."""
    total = 0.0
    for logit, there in zip(z, y, strict=True):
        p = 1 / (1 + torch.exp(-logit))
        if there:
            total = total - ((1 - p) ** gamma_pos).detach() * torch.log(p)
        else:
            q = (p - clip).clamp(min=0)
            total = total - (q**gamma_neg).detach() * torch.log(1 - q)
    return total


@pytest.mark.parametrize(
    "options",
    [
        ASL,
        MultiLabelConfig(gamma_neg=4, gamma_pos=0, clip=0.0),
        MultiLabelConfig(gamma_neg=0, gamma_pos=0, clip=0.2),
        MultiLabelConfig(loss="bce"),
    ],
)
def test_loss_equals_a_plain_one_on_values_and_gradients(options):
    draw = generator(0, "logits")
    z = torch.tensor(3 * draw.standard_normal((2, 5, 7)), dtype=torch.float64, requires_grad=True)
    y = torch.tensor(draw.random((2, 5, 7)) < 0.4).double()
    keys = (options.gamma_neg, options.gamma_pos, options.clip)
    keys = (0, 0, 0) if options.loss == "bce" else keys
    expected = torch.stack([plain_loss(z[k, b], y[k, b], *keys) for k in (0, 1) for b in range(5)])
    ours = label_set_loss(z, y, options)
    twins.close(ours, expected.view(2, 5), "loss")
    theirs_grad = torch.autograd.grad(expected.sum(), z)[0]
    twins.close(torch.autograd.grad(ours.sum(), z)[0], theirs_grad, "gradient")


def test_a_badly_missed_label_still_has_a_gradient():
    z = torch.tensor([[[-40.0, 40.0]]], requires_grad=True)
    loss = label_set_loss(z, torch.tensor([[[1.0, 0.0]]]), ASL)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(loss).all()
    assert gradient[0, 0, 0] == pytest.approx(-1.0, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_those_of_scikit_learn(seed):
    draw = generator(seed, "scores")
    targets = draw.random((40, 6)) < 0.3
    targets[:, 4] = False  # nobody has it: left out
    targets[:, 5] = True
    scores = np.round(draw.standard_normal((40, 6)), 1)  # with ties
    there = [0, 1, 2, 3, 5]
    expected = average_precision_score(targets[:, there], scores[:, there], average="macro")
    assert mean_average_precision(scores, targets) == pytest.approx(expected, abs=1e-12)
    micro, macro = f1_scores(scores > 0, targets)
    assert micro == pytest.approx(f1_score(targets, scores > 0, average="micro"), abs=1e-12)
    each = f1_score(targets, scores > 0, average=None, zero_division=0)
    assert macro == pytest.approx(each[there].mean(), abs=1e-12)


def test_nothing_found_and_nothing_there():
    nothing = np.zeros((3, 2), dtype=bool)
    assert mean_average_precision(np.zeros((3, 2)), nothing) is None
    assert f1_scores(nothing, nothing) == (0.0, 0.0)


def test_logits_of_labels_are_a_pair_with_a_frozen_negative(clip):
    """DualCoOp's softmax over a positive and C - 1 times a negative prompt, written out."""
    method = all_methods()["zero_shot"](all_methods()["zero_shot"].Config(), clip, TASK)
    v_ND = torch.nn.functional.normalize(torch.randn(4, clip.embed_dim), dim=-1)
    texts_CD = clip.zero_shot_classifier(TASK.class_names, TASK.templates)
    positive_NC = clip.logit_scale * v_ND @ texts_CD.T
    negative_NC = (clip.logit_scale * v_ND @ texts_CD.mean(0))[:, None].expand_as(positive_NC)
    others = negative_NC.exp() * (len(CLASS_NAMES) - 1)
    pair = positive_NC.exp() / (positive_NC.exp() + others)
    z_1NC = method.label_logits(method.encode({}, None), Inputs(v_ND[None]))
    twins.close(z_1NC.sigmoid()[0], pair, "probability")


@pytest.fixture(scope="module")
def images(clip):
    """Pixels of all columns for 26 images whose features point to their labels."""
    draw = generator(0, "label sets")
    targets = torch.tensor(draw.random((26, len(CLASS_NAMES))) < 0.3)
    targets[torch.arange(26), torch.arange(26) % len(CLASS_NAMES)] = True
    centres = torch.tensor(draw.standard_normal((len(CLASS_NAMES), clip.embed_dim))).float()
    features = torch.nn.functional.normalize(targets.float() @ centres, dim=-1)
    patches = torch.nn.functional.normalize(
        features[:, None] + 0.1 * torch.tensor(draw.standard_normal((26, 16, 32))).float(), dim=-1
    )
    pixels = torch.tensor(draw.standard_normal((26, 3, 32, 32))).float()
    return Inputs(features, patches=patches, pixels=pixels), targets.float()


def data_of(images, method):
    inputs, targets = images
    kept = {n: t for n, t in inputs.columns().items() if n in method.needs}
    data, first = [], 0
    for client, size in enumerate((5, 12, 9)):
        rows = slice(first, first + size)
        part = Inputs(**{n: t[rows] for n, t in kept.items()})
        data.append(ClientData(client, part, targets[rows]))
        first += size
    return data


def trained(method, data):
    private = [method.init_private(1, d.client) for d in data]
    start = method.init_shared(1)
    config = TrainingConfig(batch_size=4, lr=0.01)
    return train_clients(
        method, [start] * len(data), private, data, config, seed=1, server_round=1, rounds=2
    )


@pytest.mark.parametrize("name", [n for n in ADAPTED if all_methods()[n].trainable])
def test_methods_learn_label_sets_and_clients_do_not_mix(name, clip, images):
    cls = all_methods()[name]
    method = cls(cls.Config(), clip, TASK)
    data = data_of(images, method)
    together = trained(method, data)
    for own, result in zip(data, together, strict=True):
        assert next(iter(result.losses)) == "asymmetric"
        assert "ce" not in result.losses
        assert np.isfinite(list(result.losses.values())).all()
        (alone,) = trained(method, [own])
        for kind in ("shared", "private"):
            for n, t in getattr(alone, kind).items():
                twins.close(getattr(result, kind)[n], t, n)
    start = method.init_shared(1) or method.init_private(1, 0)
    end = together[0].shared or together[0].private
    assert any(not torch.equal(end[n], t) for n, t in start.items())


def test_scores_of_models_are_map_and_clients_without_images_have_none(clip, images):
    cls = all_methods()["promptfl"]
    method = cls(cls.Config(), clip, TASK)
    inputs, targets = images
    inputs = Inputs(inputs.features)
    encoded = encode_global(method, method.init_shared(1))
    (score,) = score_models(method, encoded, 1, inputs, targets)
    z = method.label_logits(encoded, inputs.of_one())[0].detach().numpy()
    expected = average_precision_score(targets.numpy(), z, average="macro")
    assert score.accuracy == pytest.approx(expected, abs=1e-6)
    assert score.credit == pytest.approx(26 * score.accuracy)
    assert score.loss_sum == pytest.approx(
        label_set_loss(torch.tensor(z), targets, ASL).sum().item(), rel=1e-5
    )
    own = score_each(method, encoded, [(inputs[:9], targets[:9]), (inputs[:0], targets[:0])])
    first = score_models(method, encoded, 1, inputs[:9], targets[:9])[0]
    assert own[0] == first
    assert own[1].tested == 0
    assert own[1].accuracy is None


def test_a_model_that_has_diverged_answers_nothing(clip, images):
    cls = all_methods()["promptfl"]
    method = cls(cls.Config(), clip, TASK)
    inputs, targets = images
    encoded = {"classes": torch.full((1, len(CLASS_NAMES), clip.embed_dim), float("nan"))}
    (score,) = score_models(method, encoded, 1, Inputs(inputs.features), targets)
    assert score.unanswered == 26
    assert score.loss_sum == float("inf")
    # All images in one step: the precision is the share of images with the label.
    assert score.accuracy == pytest.approx(targets.mean(0).mean().item())
