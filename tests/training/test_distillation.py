"""The training model: what a batch gives, and which parameters each term trains."""

import pytest
import torch

from modeling_udon.config import LossConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.distillation import TERMS, UdonForDistillation
from modeling_udon.training.parts import Peers, RelationalBank

BACKBONE = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
CONFIG = {"backbone_config": BACKBONE, "embedding_dim": 4, "teacher_dim": 6, "domains": {"cars": 5, "sop": 7}}


def make_model(dtype=torch.float32, peers=None, distill_through_backbone=True, **objective):
    torch.manual_seed(0)
    parts = {"peers": peers, "distill_through_backbone": distill_through_backbone}
    return UdonForDistillation(UdonConfig(**CONFIG), LossConfig(**objective), **parts).to(dtype)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=random), torch.randint(0, 5, (8,), generator=random)


def trained_by(model, loss):
    """Parts of the model in which the loss has a gradient that is not zero."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    named = zip(parameters, gradients, strict=True)
    return {
        "backbone" if "backbone" in name else name.removeprefix("udon.").removesuffix(".weight").removesuffix(".bias")
        for name, gradient in named
        if gradient is not None and gradient.norm() > 1e-6
    }


HEADS = {
    "student_classification": {"student_head.projection", "student_prototypes.cars"},
    "teacher_classification": {"teacher_heads.cars.projection", "teacher_prototypes.cars"},
    "logit_distillation": {"student_head.projection", "student_prototypes.cars"},
    "relational_distillation": {"student_head.projection"},
}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_trains_the_backbone_and_the_heads_it_is_about(batch, term):
    model = make_model()
    assert trained_by(model, model(*batch, "cars").losses[term]) == HEADS[term] | {"backbone"}


@pytest.mark.parametrize("term", TERMS)
def test_distillation_can_be_kept_out_of_the_backbone(batch, term):
    model = make_model(distill_through_backbone=False)
    expected = HEADS[term] if "distillation" in term else HEADS[term] | {"backbone"}
    assert trained_by(model, model(*batch, "cars").losses[term]) == expected


def test_keeping_distillation_out_of_the_backbone_changes_no_value(batch):
    through, beside = make_model()(*batch, "cars"), make_model(distill_through_backbone=False)(*batch, "cars")
    for name in TERMS:
        torch.testing.assert_close(beside.losses[name], through.losses[name])


def test_the_loss_is_the_weighted_mean_of_its_terms(batch):
    plain = make_model()(*batch, "cars")
    assert plain.loss.item() == pytest.approx(sum(loss.item() for loss in plain.losses.values()) / 4)
    weights = dict(zip(TERMS, (1.0, 0.5, 0.0, 3.0), strict=True))
    weighted = make_model(**weights)(*batch, "cars")
    expected = sum(weight * plain.losses[name].item() for name, weight in weights.items()) / 4.5
    assert weighted.loss.item() == pytest.approx(expected)
    assert weighted.losses["logit_distillation"].item() == pytest.approx(plain.losses["logit_distillation"].item())


def test_the_objectives_values_reach_the_losses(batch):
    plain = make_model()(*batch, "cars")
    for changed, terms in (
        ({"scale": 8.0}, {"student_classification", "teacher_classification"}),
        ({"kind": "cosface", "margin": 0.1}, {"student_classification", "teacher_classification"}),
        ({"student_temperature": 0.2}, {"logit_distillation"}),
        ({"teacher_temperature": 0.2}, {"logit_distillation"}),
    ):
        losses = make_model(**changed)(*batch, "cars").losses
        assert {name for name in TERMS if losses[name] != plain.losses[name]} == terms


def test_a_batch_gives_embeddings_and_cosines_of_its_domain(batch):
    output = make_model()(*batch, "cars")
    assert output.image_embeds.shape == (8, 4) and output.teacher_embeds.shape == (8, 6)
    assert output.student_logits.shape == output.teacher_logits.shape == (8, 5)
    assert output.student_logits.abs().max() <= 1 + 1e-6
    assert make_model()(*batch, "sop").student_logits.shape == (8, 7)


def test_a_given_model_is_trained_itself():
    config = UdonConfig(**CONFIG)
    udon = UdonModel(config)
    assert UdonForDistillation(config, udon=udon).udon is udon


def test_the_parameters_of_a_domain_are_those_no_other_domain_uses(batch):
    model = make_model()
    used = {
        domain: {
            name
            for (name, _), gradient in zip(
                model.named_parameters(),
                torch.autograd.grad(model(*batch, domain).loss, list(model.parameters()), allow_unused=True),
                strict=True,
            )
            if gradient is not None
        }
        for domain in CONFIG["domains"]
    }
    assert set(model.domain_parameters("cars")) == used["cars"] - used["sop"]
    assert set(model.domain_parameters("sop")) == used["sop"] - used["cars"]


def test_a_domain_whose_name_begins_with_anothers_keeps_its_own_parameters():
    model = UdonForDistillation(UdonConfig(**CONFIG | {"domains": {"car": 3, "cars": 5}}))
    assert not set(model.domain_parameters("car")) & set(model.domain_parameters("cars"))
    assert model.domain_parameters("car")["student_prototypes.car"].shape == (3, 4)


def test_prototypes_start_with_a_mean_squared_length_of_one():
    model = UdonForDistillation(UdonConfig(**CONFIG | {"domains": {"many": 20_000}, "teacher_dim": 64}))
    assert model.teacher_prototypes["many"].square().sum(1).mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(("batch_size", "num_blocks"), [(8, 2), (8, 4), (8, 8), (64, 4)])
def test_blocks_of_a_batch_give_loss_and_gradients_of_the_whole(batch_size, num_blocks):
    random = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, 16, 16, generator=random)
    labels = torch.randint(0, 5, (batch_size,), generator=random)
    whole, blocks = make_model(), make_model()
    whole(images, labels, "cars").loss.backward()
    with torch.no_grad():
        embeds = blocks.udon(images, domain="cars")
    size, total = batch_size // num_blocks, 0.0
    for start in range(0, batch_size, size):
        bank = RelationalBank(embeds.image_embeds, embeds.teacher_embeds, start)
        loss = blocks(images[start : start + size], labels[start : start + size], "cars", bank).loss / num_blocks
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole(images, labels, "cars").loss.item(), rel=1e-6)
    for (name, ours), theirs in zip(blocks.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        elif not name.endswith(("k_proj.bias", "key.bias")):  # their true gradient is 0
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_compares_its_pairs_with_those_of_all_processes(batch, rank):
    images, labels = batch
    with torch.no_grad():
        embeds = make_model().udon(images, domain="cars")
    own = slice(4 * rank, 4 * rank + 4)
    peers = Peers(
        lambda local: embeds.image_embeds if local.shape[1] == 4 else embeds.teacher_embeds, rank, torch.clone
    )
    gathered = make_model(peers=peers)(images[own], labels[own], "cars").losses["relational_distillation"]
    expected = 0.0
    for i in range(own.start, own.stop):
        for j in range(8):
            student = embeds.image_embeds[i] @ embeds.image_embeds[j]
            teacher = embeds.teacher_embeds[i] @ embeds.teacher_embeds[j]
            expected += (student - teacher).item() ** 2
    assert gathered.item() == pytest.approx(8 / 4 * expected / (4 * 8), rel=1e-5)


def test_losses_and_cosines_are_float32_under_autocast(batch):
    exact = make_model()(*batch, "cars")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = make_model()(*batch, "cars")
    for output in (half.student_logits, half.teacher_logits, half.image_embeds, half.loss):
        assert output.dtype == torch.float32
    norms = half.image_embeds.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(8), atol=1e-6, rtol=0)
    # The cosines must be those of the embeddings given, not of embeddings rounded to bfloat16.
    prototypes = torch.nn.functional.normalize(make_model().student_prototypes["cars"], dim=1)
    torch.testing.assert_close(half.student_logits, half.image_embeds @ prototypes.T, atol=1e-6, rtol=0)
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)


def test_an_unknown_domain_is_refused(batch):
    with pytest.raises(ValueError, match=r"`domain` must be one of cars, sop. Got 'met'."):
        make_model()(*batch, "met")
