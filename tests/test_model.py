"""The model that is published: embeddings, backbones of several kinds, saving and loading, refusals."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPModel, ViTModel

from modeling_udon import UdonConfig, UdonModel

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
BACKBONES = {
    "vit": {"model_type": "vit", "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"} | SIZES,
    "clip": {"model_type": "clip_vision_model"} | SIZES,
    "dinov2": {"model_type": "dinov2"} | SIZES,
}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2, "image_size": 16}
DOMAINS = {"cars": 5, "sop": 7}

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def make_model(backbone="vit", **values):
    torch.manual_seed(0)
    values = {"embedding_dim": 8, "teacher_dim": 12, "domains": DOMAINS} | values
    model = UdonModel(UdonConfig(backbone_config=BACKBONES[backbone], **values))
    with torch.no_grad():
        for parameter in model.parameters():  # the start is so small that every image embeds alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def class_token_after_the_final_norm(model, images):
    """Reads the class token from hooks on the norm modules, not from the backbone's output."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in model.backbone.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    (final,) = [seen[name] for name in seen if name.split(".")[-1] in ("layernorm", "post_layernorm")]
    return final if final.dim() == 2 else final[:, 0]


@every_backbone
@pytest.mark.parametrize("widths", [[], [10]])
def test_embeddings_are_unit_projections_of_the_unit_class_token(images, backbone, widths):
    model = make_model(backbone, head_hidden_dims=widths)
    output = model(images, domain="sop")
    token = torch.nn.functional.normalize(class_token_after_the_final_norm(model, images), dim=1)
    torch.testing.assert_close(output.backbone_embeds, token)
    for head, embeds in (
        (model.student_head, output.image_embeds),
        (model.teacher_heads["sop"], output.teacher_embeds),
    ):
        projected = head.projection(head.hidden(token))
        torch.testing.assert_close(embeds, projected / projected.norm(dim=1, keepdim=True))
    assert output.pooler_output is output.image_embeds
    assert output.image_embeds.shape == (4, 8) and output.teacher_embeds.shape == (4, 12)


@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_have_unit_norm_in_float32_whatever_the_weights_are(images, backbone, dtype):
    output = make_model(backbone).to(dtype)(images.to(dtype), domain="cars")
    for embeds in (output.image_embeds, output.teacher_embeds, output.backbone_embeds):
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


def test_without_a_domain_there_is_no_teacher_embedding(images):
    assert make_model()(images).teacher_embeds is None


def test_a_tuple_is_given_on_request(images):
    model = make_model()
    tokens, pooled, *_ = model(images, return_dict=False)
    assert torch.equal(tokens, model(images).last_hidden_state) and torch.equal(pooled, model(images).image_embeds)


def test_hidden_states_and_attentions_come_on_request(images):
    model = make_model()
    model.set_attn_implementation("eager")  # the only one that has maps to give
    assert model(images).hidden_states is None and model(images).attentions is None
    output = model(images, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2


def test_heads_start_with_the_variance_of_their_width():
    torch.manual_seed(0)
    config = UdonConfig(BACKBONES["vit"] | {"hidden_size": 256}, embedding_dim=256, domains={"cars": 5})
    model = UdonModel(config)
    for head in (model.student_head, model.teacher_heads["cars"]):
        weight = head.projection.weight
        assert weight.var().item() == pytest.approx(1 / 256, rel=0.03)
        assert weight.abs().max() <= 2 / 16 / 0.8796 + 1e-6
        assert (head.projection.bias == 0).all()


def test_head_bias_can_be_left_out():
    model = make_model(head_bias=False, head_hidden_dims=[10])
    assert model.student_head.projection.bias is None and model.student_head.hidden[0].bias is not None


@every_backbone
def test_sdpa_equals_eager(images, backbone):
    ours, theirs = make_model(backbone), make_model(backbone)
    ours.set_attn_implementation("sdpa")
    theirs.set_attn_implementation("eager")
    implementations = {model.backbone.config._attn_implementation for model in (ours, theirs)}
    assert implementations == {"sdpa", "eager"}
    torch.testing.assert_close(ours(images).image_embeds, theirs(images).image_embeds, atol=2e-6, rtol=0)


@every_backbone
def test_gradient_checkpointing_runs_each_layer_again_and_changes_no_gradient(images, backbone):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model, calls = make_model(backbone).train(), []
        for name, module in model.backbone.named_modules():
            if name.endswith(("layernorm_before", "layer_norm1", "norm1")):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            # Its name in transformers 4 is the second one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(images, domain="cars").image_embeds.sum().backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None})
        runs.append(len(calls))
    assert runs == [2, 4]
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backbone", ["vit", "clip"])
def test_position_embeddings_can_be_interpolated(backbone):
    model, larger = make_model(backbone), torch.randn(2, 3, 24, 32)
    output = model(larger, interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape == (2, 1 + 3 * 4, 16)
    with pytest.raises(ValueError, match="size"):
        model(larger)


def test_a_backbone_that_cannot_interpolate_is_refused(images):
    with pytest.raises(
        ValueError,
        match=r"`interpolate_pos_encoding` must be False for a backbone that takes no such argument. "
        r"Got True with Dinov2Model.",
    ):
        make_model("dinov2")(images, interpolate_pos_encoding=True)


@pytest.mark.parametrize("backbone", ["vit", "clip"])
def test_the_model_compiles_to_one_graph(images, backbone):
    model = make_model(backbone)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of deprecated parts of torch that tracing touches
        for domain in (None, "cars"):
            explanation = torch._dynamo.explain(model)(images, domain=domain)
            assert explanation.graph_count == 1 and explanation.graph_break_count == 0
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, domain=domain)
            expected = model(images, domain=domain)
            torch.testing.assert_close(compiled.image_embeds, expected.image_embeds, atol=2e-6, rtol=0)
            if domain:
                torch.testing.assert_close(compiled.teacher_embeds, expected.teacher_embeds, atol=2e-6, rtol=0)
    torch.compiler.reset()


@every_backbone
def test_a_published_student_has_no_teacher_heads_and_embeds_the_same(images, backbone, tmp_path):
    model = make_model(backbone, head_hidden_dims=[10])
    student = model.student()
    assert student.config.domains == {} and len(student.teacher_heads) == 0
    student.save_pretrained(tmp_path)
    loaded = UdonModel.from_pretrained(tmp_path).eval()
    assert not [name for name in loaded.state_dict() if "teacher" in name]
    torch.testing.assert_close(loaded(images).image_embeds, model(images).image_embeds, atol=2e-6, rtol=0)


def test_a_student_shares_its_weights_with_the_model_it_came_from():
    model = make_model()
    student = model.student()
    assert student.backbone is model.backbone and student.student_head is model.student_head
    assert not any(parameter.is_meta for parameter in student.parameters())
    assert len(model.teacher_heads) == 2 and model.config.domains == DOMAINS


@every_backbone
def test_a_saved_model_keeps_its_teachers(images, backbone, tmp_path):
    model = make_model(backbone)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, UdonModel) and loaded.config.domains == DOMAINS
    ours, theirs = model(images, domain="sop"), loaded(images, domain="sop")
    torch.testing.assert_close(theirs.image_embeds, ours.image_embeds, atol=2e-6, rtol=0)
    torch.testing.assert_close(theirs.teacher_embeds, ours.teacher_embeds, atol=2e-6, rtol=0)


def test_a_saved_folder_carries_the_code_that_loads_it(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert {"modeling_udon.py", "configuration_udon.py"} <= {path.name for path in tmp_path.iterdir()}
    assert UdonConfig.from_pretrained(tmp_path).auto_map == {
        "AutoConfig": "configuration_udon.UdonConfig",
        "AutoModel": "modeling_udon.UdonModel",
    }


def test_a_config_comes_back_as_it_was_saved(tmp_path):
    config = UdonConfig(
        BACKBONES["clip"], embedding_dim=5, teacher_dim=6, head_hidden_dims=(7,), head_bias=False, domains=DOMAINS
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for name in ("embedding_dim", "teacher_dim", "head_hidden_dims", "head_bias", "domains", "pooling"):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert loaded.projection_dim == 5


def test_the_default_backbone_is_the_augreg_vit():
    backbone = UdonConfig().backbone_config
    assert (backbone.model_type, backbone.hidden_size, backbone.patch_size) == ("vit", 768, 16)
    assert (backbone.layer_norm_eps, backbone.hidden_act) == (1e-6, "gelu_pytorch_tanh")


def test_heads_can_be_put_on_a_trained_backbone(images):
    torch.manual_seed(0)
    vit = ViTModel(AutoConfig.for_model(**BACKBONES["vit"])).eval()
    expected = torch.nn.functional.normalize(vit(images).last_hidden_state[:, 0], dim=1)
    model = UdonModel.from_backbone(vit, embedding_dim=8, domains=DOMAINS).eval()
    torch.testing.assert_close(model(images).backbone_embeds, expected)
    assert model.config.embedding_dim == 8 and set(model.teacher_heads) == set(DOMAINS)


def test_a_pooler_that_is_not_read_is_not_kept():
    vit = ViTModel(AutoConfig.for_model(**BACKBONES["vit"]))
    for model in (UdonModel.from_backbone(vit), make_model()):
        assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_a_whole_clip_model_stands_for_its_vision_tower(images):
    torch.manual_seed(0)
    values = {name: BACKBONES["clip"][name] for name in SIZES}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPModel(AutoConfig.for_model("clip", vision_config=values, text_config=text, projection_dim=6)).eval()
    assert UdonConfig(clip.config).backbone_config.model_type == "clip_vision_model"
    model = UdonModel.from_backbone(clip, embedding_dim=8).eval()
    expected = torch.nn.functional.normalize(clip.vision_model(images).pooler_output, dim=1)
    torch.testing.assert_close(model(images).backbone_embeds, expected)


def test_a_udon_model_stands_for_its_backbone():
    trained = make_model()
    model = UdonModel.from_backbone(trained, embedding_dim=3)
    assert model.backbone is trained.backbone and model.student_head.projection.out_features == 3


def test_a_pooler_can_be_asked_for(images):
    model = make_model(pooling="pooler")
    pooled = model.backbone(images).pooler_output
    torch.testing.assert_close(model(images).backbone_embeds, torch.nn.functional.normalize(pooled, dim=1))


def test_an_unknown_domain_is_refused(images):
    with pytest.raises(ValueError, match=r"`domain` must be one with a teacher head: cars, sop. Got 'met'."):
        make_model()(images, domain="met")


def test_a_student_has_no_teacher_to_ask(images):
    with pytest.raises(ValueError, match=r"with a teacher head: this model has none. Got 'cars'."):
        make_model().student()(images, domain="cars")


def test_a_backbone_without_class_token_needs_its_pooler():
    with pytest.raises(
        ValueError,
        match=r"`pooling` 'cls' must go with a backbone that has a class token. "
        r"Got 'swin'; use pooling 'pooler' or 'mean', or another backbone.",
    ):
        UdonModel(UdonConfig(SWIN, pooling="cls"))
    model = UdonModel(UdonConfig(SWIN, embedding_dim=4, pooling="pooler")).eval()
    assert model(torch.randn(2, 3, 16, 16)).image_embeds.shape == (2, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling": "max"}, r"`pooling` must be one of cls, mean, cls\+mean, pooler or None. Got 'max'."),
        ({"embedding_dim": 0}, r"`embedding_dim` must be a positive integer. Got 0."),
        ({"teacher_dim": 2.5}, r"`teacher_dim` must be a positive integer. Got 2.5."),
        ({"head_hidden_dims": [8, -1]}, r"`head_hidden_dims` must be a positive integer. Got -1."),
        ({"domains": {"cars": True}}, r"`domains\['cars'\]` must be a positive integer. Got True."),
        (
            {"backbone_config": {"hidden_size": 8}},
            r"`backbone_config` must name its `model_type`, such as 'vit' or 'clip_vision_model'. "
            r"Got the keys \['hidden_size'\].",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        UdonConfig(**values)
