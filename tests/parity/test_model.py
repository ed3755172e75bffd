"""The model beside the original: outputs, the terms of the loss, and the gradient of each term."""

import pytest
import torch

from modeling_udon.training.distillation import TERMS

TERMS_THERE = dict(zip(TERMS, ("student_ce", "teacher_ce", "logits_distill", "simils_distill"), strict=True))

every_domain = pytest.mark.parametrize("domain", ["d0", "d1", "d2"])


@pytest.fixture
def vectors(reference):
    return reference("vit_tiny.npz")


@pytest.fixture
def output(model, vectors, load_parameters, domain):
    load_parameters(vectors, "param/")
    images = torch.from_numpy(vectors["images"]).permute(0, 3, 1, 2)
    return model(images, torch.from_numpy(vectors[f"{domain}/labels"]).long(), domain)


def assert_gradients_equal(model, ours, vectors, prefix, loss):
    """Compares the gradients that the file has; a parameter that the term does not reach has a zero there."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    gradients = dict(zip(parameters, gradients, strict=True))
    names = [name for name in vectors if name.startswith(prefix) and not name.endswith("/key/bias")]
    assert names
    for there in names:
        name, expected = ours(there.removeprefix(prefix), vectors[there])
        actual = torch.zeros_like(expected) if gradients[name] is None else gradients[name]
        difference = (actual - expected).norm()
        assert difference <= 1e-5 * expected.norm(), f"{name}: {difference:.2e} of {expected.norm():.2e}"


@every_domain
def test_embeddings_and_logits_equal_the_original(model, vectors, output, domain):
    images = torch.from_numpy(vectors["images"]).permute(0, 3, 1, 2)
    there = {name.rsplit("/", 1)[1]: torch.from_numpy(v) for name, v in vectors.items() if f"{domain}/out/" in name}
    for name, actual in {
        "universal_student_embedd": output.image_embeds,
        "teacher_embedd": output.teacher_embeds,
        "universal_student_logits": output.student_logits,
        "teacher_logits": output.teacher_logits,
        "backbone_out": model.udon(images).backbone_embeds,
    }.items():
        torch.testing.assert_close(
            actual, there[name], atol=2e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_domain
def test_every_term_of_the_loss_equals_the_original(vectors, output, domain):
    terms = {TERMS_THERE[name]: loss for name, loss in output.losses.items()} | {"total": output.loss}
    for name, actual in terms.items():
        assert actual.item() == pytest.approx(float(vectors[f"{domain}/loss/{name}"]), abs=2e-6, rel=1e-6), name


@every_domain
@pytest.mark.parametrize("term", [*TERMS, "total"])
def test_the_gradient_of_every_term_equals_the_original(model, ours, vectors, output, domain, term):
    loss = output.loss if term == "total" else output.losses[term]
    there = TERMS_THERE.get(term, "total")
    assert_gradients_equal(model, ours, vectors, f"{domain}/grad/{there}/", loss)
