"""Losses over chunks of classes beside those on all cosines, and what they hold at a time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_udon.training.chunked import chunked_classification_loss, chunked_logit_distillation_loss
from modeling_udon.training.losses import classification_loss, cosine_logits, logit_distillation_loss

BATCH, CLASSES = 6, 11
MARGINS = [("normface", 0.0), ("cosface", 0.3), ("arcface", 0.4)]


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def draw(batch=BATCH, classes=CLASSES, dtype=torch.float64):
    """Embeddings and prototypes of student and teacher, and labels."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=dtype)

    parts = []
    for dim in (3, 4):
        embeds = torch.nn.functional.normalize(normal(batch, dim), dim=1).requires_grad_()
        parts += [embeds, normal(classes, dim).requires_grad_()]
    return parts, torch.randint(0, classes, (batch,), generator=random)


def plain_distillation(student, student_prototypes, teacher, teacher_prototypes, *temperatures):
    logits = cosine_logits(student, student_prototypes), cosine_logits(teacher, teacher_prototypes)
    return logit_distillation_loss(*logits, *temperatures)


def assert_equal_with_gradients(chunked, plain, parameters):
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(3 * loss, parameters) for loss in (chunked, plain))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
@pytest.mark.parametrize(("kind", "margin"), MARGINS)
def test_chunked_classification_has_the_value_and_gradients_of_the_plain_one(chunk_size, kind, margin):
    (embeds, prototypes, *_), labels = draw()
    chunked = chunked_classification_loss(embeds, prototypes, labels, 16, margin, kind, chunk_size)
    plain = classification_loss(cosine_logits(embeds, prototypes), labels, 16, margin, kind)
    assert_equal_with_gradients(chunked, plain, [embeds, prototypes])


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_chunked_distillation_has_the_value_and_gradients_of_the_plain_one(chunk_size):
    parts, _ = draw()
    chunked = chunked_logit_distillation_loss(*parts, 0.1, 0.2, chunk_size)
    assert_equal_with_gradients(chunked, plain_distillation(*parts, 0.1, 0.2), parts[:2])


@pytest.mark.parametrize(("kind", "margin"), MARGINS)
def test_float32_losses_agree_to_the_sixth_digit(kind, margin):
    parts, labels = draw(batch=32, classes=2000, dtype=torch.float32)
    pairs = [
        (
            chunked_classification_loss(*parts[:2], labels, 16, margin, kind, 300),
            classification_loss(cosine_logits(*parts[:2]), labels, 16, margin, kind),
        ),
        (chunked_logit_distillation_loss(*parts, 0.1, 0.1, 300), plain_distillation(*parts, 0.1, 0.1)),
    ]
    for chunked, plain in pairs:
        torch.testing.assert_close(chunked, plain, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "margin"), MARGINS)
def test_the_gradient_of_chunked_classification_is_that_of_its_values(kind, margin):
    (embeds, prototypes, *_), labels = draw(batch=3, classes=5)
    assert torch.autograd.gradcheck(
        lambda *inputs: chunked_classification_loss(*inputs, labels, 4, margin, kind, 2), (embeds, prototypes)
    )


def test_the_gradient_of_chunked_distillation_is_that_of_its_values():
    (student, student_prototypes, *teacher), _ = draw(batch=3, classes=5)
    teacher = [part.detach() for part in teacher]
    assert torch.autograd.gradcheck(
        lambda *inputs: chunked_logit_distillation_loss(*inputs, *teacher, 0.5, 0.4, 2), (student, student_prototypes)
    )


def test_chunked_distillation_gives_the_teacher_no_gradient():
    parts, _ = draw()
    chunked_logit_distillation_loss(*parts, chunk_size=4).backward()
    assert parts[2].grad is None and parts[3].grad is None and parts[0].grad.norm() > 0


def test_large_logits_stay_finite():
    (embeds, prototypes, *_), labels = draw()
    loss = chunked_classification_loss(embeds.float(), prototypes.float(), labels, scale=500, chunk_size=3)
    assert loss.isfinite() and loss > 100


def test_no_tensor_as_large_as_all_cosines_is_ever_made():
    parts, labels = draw(batch=64, classes=4000, dtype=torch.float32)
    weights = max(part.numel() for part in parts)
    with LargestTensor() as chunked:
        loss = chunked_classification_loss(*parts[:2], labels, 16, 0.2, "arcface", 100)
        (loss + chunked_logit_distillation_loss(*parts, chunk_size=100)).backward()
    with LargestTensor() as plain:
        classification_loss(cosine_logits(*parts[:2]), labels).backward()
    assert plain.num_elements == 64 * 4000
    assert chunked.num_elements == weights < plain.num_elements / 10


def test_an_unknown_kind_is_refused_over_chunks_too():
    (embeds, prototypes, *_), labels = draw()
    with pytest.raises(ValueError, match=r"`kind` must be one of normface, cosface, arcface. Got 'sphereface'."):
        chunked_classification_loss(embeds, prototypes, labels, kind="sphereface")
