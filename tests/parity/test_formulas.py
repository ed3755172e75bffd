"""What the original's numbers do not cover, derived again from the formulas: CLIP backbones and MLP heads.

The derivation is in float64, one head and one pair at a time; ours runs in float32.
"""

import math

import pytest
import torch

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import TERMS, UdonForDistillation

DOMAINS = {"d0": 7, "d1": 11, "d2": 5}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
BACKBONES = {
    "vit": {"model_type": "vit", "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"} | SIZES,
    "clip": {"model_type": "clip_vision_model"} | SIZES,
}
# The backbone's parameters by the part they play, under the names of transformers 5 and 4.
PARTS = {
    "q": ("self_attn.q_proj", "attention.q_proj", "attention.attention.query"),
    "k": ("self_attn.k_proj", "attention.k_proj", "attention.attention.key"),
    "v": ("self_attn.v_proj", "attention.v_proj", "attention.attention.value"),
    "out": ("self_attn.out_proj", "attention.o_proj", "attention.output.dense"),
    "norm1": ("layer_norm1", "layernorm_before"),
    "norm2": ("layer_norm2", "layernorm_after"),
    "up": ("mlp.fc1", "intermediate.dense"),
    "down": ("mlp.fc2", "output.dense"),
}
# The true gradient of a key's bias is 0: only rounding is left of it.
KEY_BIASES = tuple(f"{name}.bias" for name in PARTS["k"])


class Formulas:
    """The model's formulas over its parameters, copied to float64."""

    def __init__(self, model, backbone):
        self.clip = backbone == "clip"
        self.values = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}

    def find(self, *endings):
        (name,) = [name for name in self.values if any(name.endswith("." + ending) for ending in endings)]
        return self.values[name]

    def layer(self, number, part, kind):
        names = [f"{stem}.{number}.{name}.{kind}" for name in PARTS[part] for stem in ("layers", "layer")]
        return self.find(*names)

    def linear(self, x, number, part):
        return x @ self.layer(number, part, "weight").T + self.layer(number, part, "bias")

    def layer_norm(self, x, weight, bias, eps):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    def named_norm(self, x, name):
        eps = 1e-5 if self.clip else 1e-6
        return self.layer_norm(x, self.find(f"{name}.weight"), self.find(f"{name}.bias"), eps)

    def tanh_gelu(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def patches(self, images):
        """(B, 3, 32, 32) -> (B, 16, 3 * 8 * 8), row by row."""
        squares = [images[:, :, i : i + 8, j : j + 8] for i in range(0, 32, 8) for j in range(0, 32, 8)]
        return torch.stack([square.flatten(1) for square in squares], dim=1)

    def attention(self, x, number):
        q, k, v = (self.linear(x, number, part) for part in "qkv")
        heads = []
        for head in range(4):
            own = slice(head * 8, head * 8 + 8)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(8)
            exponents = (scores - scores.amax(-1, keepdim=True)).exp()
            heads.append(exponents / exponents.sum(-1, keepdim=True) @ v[..., own])
        return self.linear(torch.cat(heads, -1), number, "out")

    def backbone(self, images):
        if self.clip:
            tokens = self.patches(images) @ self.find("patch_embedding.weight").flatten(1).T
            first, positions = self.find("class_embedding"), self.find("position_embedding.weight")
        else:
            kernel, bias = (
                self.find("patch_embeddings.projection.weight"),
                self.find("patch_embeddings.projection.bias"),
            )
            tokens = self.patches(images) @ kernel.flatten(1).T + bias
            first, positions = self.find("cls_token")[0, 0], self.find("position_embeddings")[0]
        x = torch.cat([first.expand(len(images), 1, -1), tokens], dim=1) + positions
        if self.clip:
            x = self.named_norm(x, "pre_layrnorm")
        for number in range(2):
            x = x + self.attention(self.layer_norm_of(x, number, "norm1"), number)
            hidden = self.linear(self.layer_norm_of(x, number, "norm2"), number, "up")
            hidden = hidden * (1.702 * hidden).sigmoid() if self.clip else self.tanh_gelu(hidden)
            x = x + self.linear(hidden, number, "down")
        return self.unit(self.named_norm(x[:, 0], "post_layernorm" if self.clip else "backbone.layernorm"))

    def layer_norm_of(self, x, number, part):
        eps = 1e-5 if self.clip else 1e-6
        return self.layer_norm(x, self.layer(number, part, "weight"), self.layer(number, part, "bias"), eps)

    def unit(self, x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def head(self, features, name, num_hidden):
        x = features
        for number in range(num_hidden):
            linear, norm = f"{name}.hidden.{3 * number}", f"{name}.hidden.{3 * number + 1}"
            x = x @ self.find(f"{linear}.weight").T + self.find(f"{linear}.bias")
            x = self.tanh_gelu(self.layer_norm(x, self.find(f"{norm}.weight"), self.find(f"{norm}.bias"), 1e-6))
        return self.unit(x @ self.find(f"{name}.projection.weight").T + self.find(f"{name}.projection.bias"))

    def terms(self, student, teacher, labels, domain):
        z_student = student @ self.unit(self.values[f"student_prototypes.{domain}"]).T
        z_teacher = teacher @ self.unit(self.values[f"teacher_prototypes.{domain}"]).T
        size = len(labels)
        p_student, p_teacher = ((z / 0.1).exp() / (z / 0.1).exp().sum(1, keepdim=True) for z in (z_student, z_teacher))
        p_teacher = p_teacher.detach()
        pairs = [
            (student[i] @ student[j] - (teacher[i] @ teacher[j]).detach()) ** 2
            for i in range(size)
            for j in range(size)
        ]
        return {
            "student_classification": self.cross_entropy(16 * z_student, labels),
            "teacher_classification": self.cross_entropy(16 * z_teacher, labels),
            "logit_distillation": (p_teacher * (p_teacher.log() - p_student.log())).sum() / size,
            "relational_distillation": size / 4 * sum(pairs) / size**2,
        }

    def cross_entropy(self, logits, labels):
        return sum(logits[i].exp().sum().log() - logits[i, label] for i, label in enumerate(labels)) / len(labels)


@pytest.fixture(params=[("clip", []), ("clip", [24]), ("vit", [24]), ("vit", [24, 20])], ids=str)
def derived(request):
    """Outputs, terms and total of our model, and the same from the formulas, for one batch."""
    backbone, widths = request.param
    torch.manual_seed(0)
    config = UdonConfig(BACKBONES[backbone], embedding_dim=8, teacher_dim=16, head_hidden_dims=widths, domains=DOMAINS)
    model = UdonForDistillation(config)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may be at its neutral start, such as a bias of 0
            parameter.add_(0.3 * torch.randn_like(parameter))
    images, labels = 3 * torch.randn(6, 3, 32, 32), torch.randint(0, DOMAINS["d1"], (6,))
    formulas = Formulas(model, backbone)
    features = formulas.backbone(images.double())
    student = formulas.head(features, "student_head", len(widths))
    teacher = formulas.head(features, "teacher_heads.d1", len(widths))
    terms = formulas.terms(student, teacher, labels, "d1")
    return model, model(images, labels, "d1"), formulas, (student, teacher), terms


def test_embeddings_are_those_of_the_formulas(derived):
    _, output, _, (student, teacher), _ = derived
    torch.testing.assert_close(output.image_embeds.double(), student, atol=2e-6, rtol=0)
    torch.testing.assert_close(output.teacher_embeds.double(), teacher, atol=2e-6, rtol=0)


def test_terms_are_those_of_the_formulas(derived):
    _, output, _, _, terms = derived
    for name in TERMS:
        assert output.losses[name].item() == pytest.approx(terms[name].item(), rel=1e-5), name
    assert output.loss.item() == pytest.approx(sum(term.item() for term in terms.values()) / 4, rel=2e-6)


def test_gradients_of_every_term_are_those_of_the_formulas(derived):
    model, output, formulas, _, terms = derived
    parameters = dict(model.named_parameters())
    for term in TERMS:
        ours = torch.autograd.grad(output.losses[term], list(parameters.values()), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(terms[term], list(formulas.values.values()), retain_graph=True, allow_unused=True)
        for name, actual, expected in zip(parameters, ours, theirs, strict=True):
            assert (actual is None) == (expected is None), f"{term}: {name}"
            if actual is None or name.endswith(KEY_BIASES):
                continue
            difference = (actual - expected).norm()
            assert difference <= 1e-5 * expected.norm(), f"{term}: {name}: {difference / expected.norm():.1e}"
