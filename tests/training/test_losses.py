"""Each term beside plain loops, and where its gradient goes."""

import math

import pytest
import torch

from modeling_udon.training.losses import (
    classification_loss,
    cosine_logits,
    logit_distillation_loss,
    relational_distillation_block,
    relational_distillation_loss,
)

BATCH, CLASSES = 6, 5


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def cosines(random):
    return (torch.rand(BATCH, CLASSES, generator=random, dtype=torch.float64) * 2 - 1).requires_grad_()


@pytest.fixture
def labels():
    return torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.fixture
def embeds(random):
    """Unit-norm embeddings of student and teacher."""
    rows = (torch.randn(BATCH, dim, generator=random, dtype=torch.float64) for dim in (3, 4))
    return [torch.nn.functional.normalize(row, dim=1).requires_grad_() for row in rows]


def cross_entropy(logits, label):
    return -math.log(math.exp(logits[label]) / sum(math.exp(logit) for logit in logits))


def test_a_cosine_logit_does_not_depend_on_the_length_of_the_prototype(random, embeds):
    student, _ = embeds
    prototypes = torch.randn(CLASSES, 3, generator=random, dtype=torch.float64)
    logits = cosine_logits(student, prototypes)
    for i in range(BATCH):
        for c in range(CLASSES):
            product = sum(a * b for a, b in zip(student[i].tolist(), prototypes[c].tolist(), strict=True))
            assert logits[i, c].item() == pytest.approx(product / math.dist(prototypes[c].tolist(), [0, 0, 0]))
    torch.testing.assert_close(cosine_logits(student, 7 * prototypes), logits)


def test_the_gradient_of_a_prototype_is_orthogonal_to_it(random, embeds, labels):
    prototypes = torch.randn(CLASSES, 3, generator=random, dtype=torch.float64, requires_grad=True)
    classification_loss(cosine_logits(embeds[0], prototypes), labels).backward()
    assert (prototypes.grad.norm(dim=1) > 1e-3).all()
    products = (prototypes.grad * prototypes).sum(1).detach()
    torch.testing.assert_close(products, torch.zeros_like(products), atol=1e-12, rtol=0)


def test_a_prototype_of_zeros_gives_finite_logits_and_gradients(embeds, labels):
    prototypes = torch.zeros(CLASSES, 3, dtype=torch.float64, requires_grad=True)
    logits = cosine_logits(embeds[0], prototypes)
    classification_loss(logits, labels).backward()
    assert (logits == 0).all() and prototypes.grad.isfinite().all()


def test_normface_is_the_cross_entropy_of_scaled_cosines(cosines, labels):
    rows = [[16 * value for value in row] for row in cosines.tolist()]
    expected = sum(cross_entropy(row, label) for row, label in zip(rows, labels.tolist(), strict=True)) / BATCH
    assert classification_loss(cosines, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "harder"),
    [("cosface", lambda cosine: cosine - 0.3), ("arcface", lambda cosine: math.cos(math.acos(cosine) + 0.3))],
)
def test_a_margin_changes_the_cosine_of_the_true_class_alone(cosines, labels, kind, harder):
    expected = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        logits = [20 * (harder(value) if c == label else value) for c, value in enumerate(row)]
        expected += cross_entropy(logits, label) / BATCH
    actual = classification_loss(cosines, labels, scale=20, margin=0.3, kind=kind)
    assert actual.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_a_margin_of_zero_is_normface(cosines, labels, kind):
    assert classification_loss(cosines, labels, kind=kind) == classification_loss(cosines, labels)


def test_arcface_falls_with_the_angle_past_the_point_where_the_turned_angle_passes_pi():
    angles = torch.linspace(0.01, math.pi - 0.01, 50, dtype=torch.float64)
    losses = [
        classification_loss(torch.tensor([[angle.cos(), 0.2]]), torch.tensor([0]), margin=0.5, kind="arcface")
        for angle in angles
    ]
    assert all(later > earlier for earlier, later in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_arcface_has_a_finite_gradient_at_the_poles(cosine):
    cosines = torch.tensor([[cosine, 0.0]], requires_grad=True)
    classification_loss(cosines, torch.tensor([0]), margin=0.5, kind="arcface").backward()
    assert cosines.grad.isfinite().all()


def test_an_unknown_kind_is_refused(cosines, labels):
    with pytest.raises(ValueError, match=r"`kind` must be one of normface, cosface, arcface. Got 'sphereface'."):
        classification_loss(cosines, labels, kind="sphereface")


def test_a_margin_for_normface_is_refused(cosines, labels):
    with pytest.raises(ValueError, match=r"`margin` must be 0 for kind 'normface'; use 'cosface' .*Got 0.2."):
        classification_loss(cosines, labels, margin=0.2)


def test_logit_distillation_is_the_divergence_of_the_student_from_the_teacher(random, cosines):
    teacher = torch.rand(BATCH, CLASSES, generator=random, dtype=torch.float64) * 2 - 1
    expected = 0.0
    for own, target in zip(cosines.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(value / 0.2) for value in target]
        q = [math.exp(value / 0.1) for value in own]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / BATCH
    actual = logit_distillation_loss(cosines, teacher, student_temperature=0.1, teacher_temperature=0.2)
    assert actual.item() == pytest.approx(expected)


def test_relational_distillation_is_the_mean_squared_difference_over_all_pairs(embeds):
    student, teacher = (rows.tolist() for rows in embeds)
    pairs = 0.0
    for i in range(BATCH):
        for j in range(BATCH):
            similarities = (sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for rows in (student, teacher))
            pairs += (next(similarities) - next(similarities)) ** 2
    actual = relational_distillation_loss(*embeds, reduction_size=1.5)
    assert actual.item() == pytest.approx(1.5 * pairs / BATCH**2)


def test_distillation_gives_the_teacher_no_gradient(cosines, embeds):
    teacher_logits = cosines.detach().flip(0).requires_grad_()
    student, teacher = embeds
    blocks = relational_distillation_block(
        student[:3], teacher[:3], student.detach(), teacher.detach(), position=0, reduction_size=1.5
    )
    relational = relational_distillation_loss(student, teacher, reduction_size=1.5)
    (logit_distillation_loss(cosines, teacher_logits) + relational + blocks).backward()
    assert teacher_logits.grad is None and teacher.grad is None
    assert cosines.grad.norm() > 0 and student.grad.norm() > 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_the_relational_loss_of_blocks_averages_to_that_of_the_whole_batch(embeds, num_blocks):
    student, teacher = embeds
    whole = relational_distillation_loss(student, teacher, reduction_size=1.5)
    (expected,) = torch.autograd.grad(whole, student)
    size = BATCH // num_blocks
    blocks = [
        relational_distillation_block(
            student[start : start + size],
            teacher[start : start + size],
            student.detach(),
            teacher.detach(),
            position=start,
            reduction_size=1.5,
        )
        for start in range(0, BATCH, size)
    ]
    mean = sum(blocks) / num_blocks
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, student)[0], expected)
