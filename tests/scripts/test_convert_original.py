"""`scripts/convert_original.py`: the original's tensors, written out in its formats, embed as they did there."""

import io
import lzma
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from modeling_udon import UdonModel
from scripts.convert_original import main
from scripts.read_weights import read_arrays

REDUCED = Path(__file__).parents[1] / "reference"
DOMAINS = ("d0", "d1", "d2")
# The parts of a block as AugReg's files number them.
AUGREG_NAMES = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
STUDENT_HEAD = "universal_student_projection_domain_0"


class Done(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the script's command in this process."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        try:
            code = main(list(map(str, words)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Tensors, images and outputs of the original."""
    full = Path(os.environ.get("UDON_PARITY_DIR", REDUCED)) / "vit_tiny.npz"
    if full.is_file():
        return dict(np.load(full))
    reduced = REDUCED / "vit_tiny.npz.xz"
    if not reduced.is_file():
        pytest.skip("no vit_tiny.npz in tests/reference; set UDON_PARITY_DIR to the reference vectors")
    return dict(np.load(io.BytesIO(lzma.decompress(reduced.read_bytes()))))


@pytest.fixture
def params(vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("param/"): value for name, value in vectors.items() if name.startswith("param/")}


def images_of(vectors: Mapping[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(vectors["images"]).permute(0, 3, 1, 2)


def write_augreg(path: Path, params: Mapping[str, np.ndarray], **more: np.ndarray) -> Path:
    """As AugReg publishes a ViT: its own numbers of the parts, a classifier, no heads of UDON's."""
    backbone = {name: value for name, value in params.items() if "projection" not in name}
    names = {name: "/".join(AUGREG_NAMES.get(part, part) for part in name.split("/")) for name in backbone}
    head = {"head/kernel": np.zeros((32, 10), np.float32), "head/bias": np.zeros(10, np.float32)}
    np.savez(path, **{names[name]: value for name, value in backbone.items()}, **head, **more)
    return path


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def pack_array(value: Any) -> Any:
    """As flax.serialization packs an array: extension 1 of shape, type and bytes."""
    msgpack = pytest.importorskip("msgpack")
    if isinstance(value, torch.Tensor):
        assert value.dtype is torch.bfloat16
        parts = (list(value.shape), "bfloat16", value.view(torch.int16).numpy().tobytes())
    else:
        parts = (list(value.shape), value.dtype.name, value.tobytes())
    return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))


def write_flax(path: Path, flat: Mapping[str, Any], whole_state: bool = True) -> Path:
    msgpack = pytest.importorskip("msgpack")
    tree: dict[str, Any] = nest(flat)
    if whole_state:
        moments = {"0": {"mu": nest(flat), "count": np.int32(8)}}
        tree = {"global_step": 8, "opt_state": moments, "params": tree, "rng": np.zeros(2, np.uint32)}
    path.write_bytes(msgpack.packb(tree, default=pack_array, strict_types=True))
    return path


class OpenAiBlock(nn.Module):
    """A block of CLIP's transformer as its authors' code computes and names it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.Identity(), c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class OpenAiTower(nn.Module):
    """CLIP's image tower as its authors' code computes and names it, before the projection."""

    def __init__(self, width: int = 128, patch: int = 8, side: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        resblocks = nn.Sequential(*(OpenAiBlock(width, width // 64) for _ in range(blocks)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=resblocks))
        self.proj = nn.Parameter(torch.randn(width, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0])


@pytest.fixture
def tower() -> OpenAiTower:
    torch.manual_seed(0)
    tower = OpenAiTower().eval()
    with torch.no_grad():
        for value in tower.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return tower


def openai_weights(tower: OpenAiTower) -> "OrderedDict[str, np.ndarray]":
    """The whole of CLIP's state: the tower, some of the text side, and the numbers that stand with it."""
    visual = {f"visual.{name}": value.detach().numpy() for name, value in tower.state_dict().items()}
    text = {
        "positional_embedding": np.zeros((7, 8), np.float32),
        "text_projection": np.zeros((8, 16), np.float32),
        "logit_scale": np.float32(4.6),
        "token_embedding.weight": np.zeros((9, 8), np.float32),
        "transformer.resblocks.0.ln_1.weight": np.zeros(8, np.float32),
        "ln_final.bias": np.zeros(8, np.float32),
        "input_resolution": np.array(32),
    }
    return OrderedDict(visual | text)


def scenic_weights(tower: OpenAiTower) -> dict[str, np.ndarray]:
    """The tower as scenic names and lays it out in flax."""
    state = {name: value.detach().numpy() for name, value in tower.state_dict().items()}
    flat: dict[str, np.ndarray] = {}
    for name, value in state.items():
        *path, kind = re.sub(r"resblocks\.(\d+)", r"resblocks_\1", name).split(".")
        path = [part.replace("resblocks_", "resblocks.") for part in path]
        where = "/".join(["visual", *path])
        heads = value.shape[-1] // 64
        if kind.startswith("in_proj"):
            for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                if kind.endswith("bias"):
                    flat[f"{where}/{part}/bias"] = third.reshape(-1, 64)
                else:
                    flat[f"{where}/{part}/kernel"] = np.ascontiguousarray(third.T).reshape(third.shape[1], -1, 64)
        elif path and path[-1] == "out_proj":
            where = where.removesuffix("_proj")
            flat[f"{where}/{kind}" if kind == "bias" else f"{where}/kernel"] = (
                value if kind == "bias" else np.ascontiguousarray(value.T).reshape(heads, 64, -1)
            )
        elif kind == "weight" and value.ndim == 4:
            flat[f"{where}/kernel"] = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
        elif kind == "weight":
            flat[f"{where}/{'kernel' if value.ndim == 2 else 'scale'}"] = np.ascontiguousarray(value.T)
        else:
            flat[f"{where}/{kind}" + ("/kernel" if kind == "proj" else "")] = value
    return flat


@torch.no_grad()
def features_of(out: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Unit-norm class tokens of a converted backbone, as our trainer would take them."""
    return UdonModel.from_backbone(AutoModel.from_pretrained(out)).eval()(pixels).backbone_embeds


def printed_difference(text: str) -> float:
    return float(re.search(r"largest difference of .*: (\S+) \(", text)[1])


def test_an_augreg_file_becomes_a_backbone_that_computes_as_the_original(
    convert: Callable[..., Any], vectors: dict[str, np.ndarray], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = write_augreg(tmp_path / "vit.npz", params)
    np.save(tmp_path / "in.npy", vectors["images"])
    np.save(tmp_path / "out.npy", vectors["d0/out/backbone_out"])
    done = convert(
        *(file, "--format", "augreg", "--out", tmp_path / "vit"),
        *("--inputs", tmp_path / "in.npy", "--outputs", tmp_path / "out.npy"),
    )
    assert done.code == 0, done.err
    assert "largest difference of backbone features" in done.out
    assert printed_difference(done.out) <= 2e-6
    assert "left out: head/kernel, head/bias" in done.out
    expected = torch.from_numpy(vectors["d0/out/backbone_out"])
    torch.testing.assert_close(features_of(tmp_path / "vit", images_of(vectors)), expected, atol=2e-6, rtol=0)
    assert AutoImageProcessor.from_pretrained(tmp_path / "vit").size["shortest_edge"] == 32


def test_a_flax_checkpoint_becomes_a_student_that_embeds_as_the_original(
    convert: Callable[..., Any], vectors: dict[str, np.ndarray], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file, out = write_flax(tmp_path / "checkpoint_8", params), tmp_path / "student"
    np.save(tmp_path / "in.npy", vectors["images"])
    np.save(tmp_path / "out.npy", vectors["d0/out/universal_student_embedd"])
    done = convert(
        *(file, "--format", "flax", "--out", out),
        *("--inputs", tmp_path / "in.npy", "--outputs", tmp_path / "out.npy"),
    )
    assert done.code == 0, done.err
    assert "largest difference of embeddings" in done.out
    assert printed_difference(done.out) <= 2e-6
    model = UdonModel.from_pretrained(out).eval()
    with torch.no_grad():
        embeds = model(images_of(vectors)).image_embeds
    expected = torch.from_numpy(vectors["d0/out/universal_student_embedd"])
    torch.testing.assert_close(embeds, expected, atol=2e-6, rtol=0)
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert {name.partition(".")[0] for name in weights.keys()} == {"backbone", "student_head"}  # noqa: SIM118
    assert {"modeling_udon.py", "modules.json", "preprocessor_config.json", "README.md"} <= set(os.listdir(out))


def test_the_teachers_of_a_checkpoint_come_along_under_their_domains_names(
    convert: Callable[..., Any], vectors: dict[str, np.ndarray], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file, out = write_flax(tmp_path / "checkpoint", params, whole_state=False), tmp_path / "student"
    words = (file, "--format", "flax", "--out", out, "--keep-teachers")
    refused = convert(*words, "--domains", "d0", "d1")
    assert refused.code == 2
    assert "--domains must name the checkpoint's 3 domains. Got 2." in refused.err
    assert convert(*words, "--domains", *DOMAINS).code == 0
    model = UdonModel.from_pretrained(out).eval()
    assert model.config.domains == {"d0": 7, "d1": 11, "d2": 5}
    for name in DOMAINS:
        with torch.no_grad():
            output = model(images_of(vectors), domain=name)
        expected = torch.from_numpy(vectors[f"{name}/out/teacher_embedd"])
        torch.testing.assert_close(output.teacher_embeds, expected, atol=2e-6, rtol=0)


def test_a_checkpoint_without_teachers_gives_the_same_student(
    convert: Callable[..., Any], vectors: dict[str, np.ndarray], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    alone = {name: value for name, value in params.items() if not name.startswith("teacher")}
    file, out = write_flax(tmp_path / "checkpoint", alone), tmp_path / "student"
    refused = convert(file, "--format", "flax", "--out", out, "--keep-teachers")
    assert refused.code == 2
    assert "--keep-teachers must go with a checkpoint that has teachers" in refused.err
    assert convert(file, "--format", "flax", "--out", out).code == 0
    with torch.no_grad():
        embeds = UdonModel.from_pretrained(out).eval()(images_of(vectors)).image_embeds
    expected = torch.from_numpy(vectors["d1/out/universal_student_embedd"])
    torch.testing.assert_close(embeds, expected, atol=2e-6, rtol=0)


def test_a_head_of_another_name_is_taken_by_its_name(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    renamed = {name.replace(STUDENT_HEAD, "universal_projection"): value for name, value in params.items()}
    file, out = write_flax(tmp_path / "checkpoint", renamed), tmp_path / "student"
    words = (file, "--format", "flax", "--out", out)
    refused = convert(*words)
    assert refused.code == 2
    assert f"missing {STUDENT_HEAD}/Dense_0/kernel" in refused.err
    assert convert(*words, "--head", "universal_projection").code == 0
    weight = UdonModel.from_pretrained(out).student_head.projection.weight.detach().numpy()
    assert np.array_equal(weight, params[f"{STUDENT_HEAD}/Dense_0/kernel"].T)


def test_hidden_layers_of_a_head_and_a_missing_bias_are_converted(
    convert: Callable[..., Any], vectors: dict[str, np.ndarray], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    head = {"Dense_0/kernel": draw(32, 20), "Dense_0/bias": draw(20), "LayerNorm_0/scale": draw(20)}
    head |= {"LayerNorm_0/bias": draw(20), "Dense_1/kernel": draw(20, 8)}
    backbone = {name: value for name, value in params.items() if "projection" not in name}
    file = write_flax(tmp_path / "checkpoint", backbone | {f"{STUDENT_HEAD}/{name}": head[name] for name in head})
    done = convert(file, "--format", "flax", "--out", tmp_path / "student")
    assert done.code == 0, done.err
    model = UdonModel.from_pretrained(tmp_path / "student").eval()
    assert model.config.head_hidden_dims == [20]
    assert not model.config.head_bias
    features = vectors["d0/out/backbone_out"].astype(np.float64)
    hidden = features @ head["Dense_0/kernel"] + head["Dense_0/bias"]
    centred = hidden - hidden.mean(1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
    hidden = hidden * head["LayerNorm_0/scale"] + head["LayerNorm_0/bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = hidden @ head["Dense_1/kernel"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    with torch.no_grad():
        embeds = model(images_of(vectors)).image_embeds.numpy()
    np.testing.assert_allclose(embeds, expected, atol=2e-6)


def test_arrays_in_pieces_and_in_bfloat16_are_read_as_flax_wrote_them(
    params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    kernel = params["embedding/kernel"]
    pieces = {
        "__msgpack_chunked_array__": True,
        "shape": {str(position): length for position, length in enumerate(kernel.shape)},
        "chunks": {str(position): part for position, part in enumerate(np.array_split(kernel.ravel(), 3))},
    }
    half = torch.from_numpy(params["cls"]).bfloat16()
    file = write_flax(tmp_path / "checkpoint", params | {"embedding/kernel": pieces, "cls": half})
    arrays = read_arrays(file, "flax")
    assert set(arrays) == set(params)
    assert np.array_equal(arrays["embedding/kernel"], kernel)
    assert np.array_equal(arrays["cls"], half.float().numpy())


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_clip_file_becomes_a_backbone_that_computes_as_the_authors_code(
    convert: Callable[..., Any], tower: OpenAiTower, tmp_path: Path, protocol: int, dtype: type
) -> None:
    if dtype is np.float16:
        tower.half().float()
    weights = openai_weights(tower)
    stored = OrderedDict(
        (name, value.astype(dtype) if value.dtype == np.float32 else value) for name, value in weights.items()
    )
    with (tmp_path / "clip.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(stored, dtype=object), file, protocol=protocol)
    assert np.load(tmp_path / "clip.npy", allow_pickle=True).item().keys() == stored.keys()
    images = np.random.default_rng(0).standard_normal((5, 32, 32, 3)).astype(np.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = F.normalize(tower(pixels), dim=-1)
    np.save(tmp_path / "in.npy", images)
    np.save(tmp_path / "out.npy", 3 * expected.numpy())
    done = convert(
        *(tmp_path / "clip.npy", "--format", "clip-npy", "--out", tmp_path / "clip"),
        *("--inputs", tmp_path / "in.npy", "--outputs", tmp_path / "out.npy"),
    )
    assert done.code == 0, done.err
    assert printed_difference(done.out) <= 2e-6
    torch.testing.assert_close(features_of(tmp_path / "clip", pixels), expected, atol=2e-6, rtol=0)
    with safe_open(tmp_path / "clip" / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())  # noqa: SIM118
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_a_file_that_numpy_saved_is_read(tower: OpenAiTower, tmp_path: Path) -> None:
    weights = openai_weights(tower)
    np.save(tmp_path / "clip.npy", weights, allow_pickle=True)
    arrays = read_arrays(tmp_path / "clip.npy", "clip-npy")
    assert list(arrays) == list(weights)
    for name, value in weights.items():
        assert arrays[name].dtype == value.dtype
        assert np.array_equal(arrays[name], value)


def test_a_flax_checkpoint_of_clip_becomes_a_student(
    convert: Callable[..., Any], tower: OpenAiTower, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((128, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    head = {f"{STUDENT_HEAD}/Dense_0/kernel": kernel, f"{STUDENT_HEAD}/Dense_0/bias": bias}
    text = {"logit_scale": np.zeros((), np.float32), "text/positional_embedding": np.zeros((7, 8), np.float32)}
    file = write_flax(tmp_path / "checkpoint", scenic_weights(tower) | head | text)
    done = convert(file, "--format", "flax", "--out", tmp_path / "student")
    assert done.code == 0, done.err
    model = UdonModel.from_pretrained(tmp_path / "student").eval()
    pixels = torch.from_numpy(rng.standard_normal((5, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        features = F.normalize(tower(pixels), dim=-1)
        embeds = model(pixels).image_embeds
    expected = F.normalize(features @ torch.from_numpy(kernel) + torch.from_numpy(bias), dim=-1)
    torch.testing.assert_close(embeds, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", [3, 6])
def test_position_embeddings_of_another_resolution_are_interpolated_as_scipy_does_it(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tmp_path: Path, side: int
) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    file = write_augreg(tmp_path / "vit.npz", params)
    words = (file, "--format", "augreg", "--out", tmp_path / "vit")
    refused = convert(*words, "--image-size", 50)
    assert refused.code == 2
    assert "--image-size must be a multiple of the patch size, 8. Got 50." in refused.err
    done = convert(*words, "--image-size", 8 * side)
    assert done.code == 0, done.err
    model = AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    positions = params["Transformer/posembed_input/pos_embedding"][0]
    grid = ndimage.zoom(positions[1:].reshape(4, 4, 32), (side / 4, side / 4, 1), order=1)
    expected = np.concatenate([positions[:1], grid.reshape(side**2, 32)])
    actual = model.embeddings.position_embeddings.detach().numpy()[0]
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert model(torch.zeros(1, 3, 8 * side, 8 * side)).last_hidden_state.shape == (1, side**2 + 1, 32)


@pytest.mark.parametrize("file_format", ["augreg", "flax", "clip-npy"])
def test_missing_spare_and_misshapen_tensors_are_refused_by_name(
    convert: Callable[..., Any],
    params: dict[str, np.ndarray],
    tower: OpenAiTower,
    tmp_path: Path,
    file_format: str,
) -> None:
    name = {
        "augreg": "Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias",
        "flax": "Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias",
        "clip-npy": "visual.transformer.resblocks.1.mlp.c_fc.bias",
    }[file_format]
    file = tmp_path / "file.npz"

    def convert_changed(change: Callable[[dict[str, Any]], object]) -> Any:
        if file_format == "augreg":
            arrays = dict(np.load(write_augreg(file, params)))
        else:
            arrays = dict(params if file_format == "flax" else openai_weights(tower))
        change(arrays)
        if file_format == "augreg":
            np.savez(file, **arrays)
        elif file_format == "flax":
            write_flax(file, arrays)
        else:
            with file.open("wb") as target:
                np.save(target, arrays, allow_pickle=True)
        return convert(file, "--format", file_format, "--out", tmp_path / "out")

    def add_spare(arrays: dict[str, Any]) -> None:
        arrays["adapter_7"] = np.zeros(3, np.float32)

    for change, complaint in (
        (lambda arrays: arrays.pop(name), f"missing {name}"),
        (add_spare, "spare adapter_7"),
        (lambda arrays: arrays.update({name: np.zeros(3, np.float32)}), f"must have {name} of shape"),
    ):
        done = convert_changed(change)
        assert done.code == 2
        assert complaint in done.err
        assert len(done.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    assert convert_changed(lambda arrays: None).code == 0


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def write_pickle(path: Path, content: Any) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(content, file, protocol=4)
    return path


@pytest.mark.parametrize("place", ["alone", "in a dict", "in an array", "as a key"])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, np.fromfile, getattr])
def test_a_pickle_that_calls_anything_is_refused_unrun(
    convert: Callable[..., Any], tower: OpenAiTower, tmp_path: Path, place: str, function: Callable[..., Any]
) -> None:
    ran = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(ran)!r})" if function is eval else str(ran)
    attack = Attack(function, argument)
    content: Any = {
        "alone": attack,
        "in a dict": openai_weights(tower) | {"visual.proj": attack},
        "in an array": np.array(openai_weights(tower) | {"x": np.array([attack], dtype=object)}, dtype=object),
        "as a key": {attack: np.zeros(3)},
    }[place]
    file = write_pickle(tmp_path / "clip.npy", content)
    done = convert(file, "--format", "clip-npy", "--out", tmp_path / "out")
    assert done.code == 2
    assert "only numpy arrays in containers are read" in done.err
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_the_attack_works_where_pickles_are_trusted(tmp_path: Path) -> None:
    file = write_pickle(tmp_path / "clip.npy", Attack(os.mkdir, str(tmp_path / "ran")))
    np.load(file, allow_pickle=True)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": [1, 2]}, "'a' is a list in place of an array"),
        ({"a": np.array([{}], dtype=object)}, "an array has the type 'O8'"),
        ({"a": np.zeros(2, dtype=[("x", "f4")])}, "an array has a type of several fields"),
        ({"a": np.array(["text"])}, "an array has the type"),
        ([np.zeros(3)], "it holds a list in place of a dict of arrays"),
        ({"a": np.zeros(3, bool)}, "FILE must hold arrays of numbers. Got a of type bool"),
    ],
)
def test_a_pickle_of_anything_else_than_arrays_of_numbers_is_refused(
    convert: Callable[..., Any], tmp_path: Path, content: Any, reason: str
) -> None:
    file = write_pickle(tmp_path / "clip.npy", content)
    done = convert(file, "--format", "clip-npy", "--out", tmp_path / "out")
    assert done.code == 2
    assert reason in done.err


@pytest.mark.parametrize("file_format", ["augreg", "clip-npy", "flax"])
def test_a_damaged_file_and_one_of_another_kind_are_refused_in_one_line(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tower: OpenAiTower, tmp_path: Path, file_format: str
) -> None:
    file = tmp_path / "weights.npz"
    if file_format == "augreg":
        write_augreg(file, params)
    elif file_format == "flax":
        write_flax(file, params)
    else:
        write_pickle(file, openai_weights(tower))
    content = file.read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"hello " * 100, content[:60]):
        file.write_bytes(wrong)
        done = convert(file, "--format", file_format, "--out", tmp_path / "out")
        assert done.code == 2
        assert f"FILE must be whole and of --format {file_format}" in done.err
        assert len(done.err.splitlines()) == 1
    (tmp_path / "folder").mkdir()
    done = convert(tmp_path / "folder", "--format", file_format, "--out", tmp_path / "out")
    assert done.code == 2
    assert "a folder; of flax's checkpoints only msgpack is read" in done.err
    assert convert(tmp_path / "none", "--format", file_format, "--out", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (np.zeros((2, 3, 32, 32)), np.ones((2, 32)), "--inputs must be images of shape (num_images, 32, 32, 3)"),
        (np.zeros((2, 32, 32, 3)), np.ones((3, 32)), "--outputs must be 2 vectors of 32 dimensions"),
        (np.zeros((2, 32, 32, 3)), np.ones((2, 7)), "--outputs must be 2 vectors of 32 dimensions"),
        (np.zeros((32, 32, 3)), np.ones((2, 7)), "--inputs must be a .npy file of 4 dimensions"),
        (np.zeros((2, 32, 32, 3)), np.array([{}]), "--outputs must be a .npy file of numbers"),
    ],
)
def test_inputs_and_outputs_that_do_not_fit_are_refused(
    convert: Callable[..., Any],
    params: dict[str, np.ndarray],
    tmp_path: Path,
    inputs: np.ndarray,
    outputs: np.ndarray,
    reason: str,
) -> None:
    file = write_augreg(tmp_path / "vit.npz", params)
    np.save(tmp_path / "in.npy", inputs)
    np.save(tmp_path / "out.npy", outputs)
    words = (file, "--format", "augreg", "--out", tmp_path / "vit", "--inputs", tmp_path / "in.npy")
    alone = convert(*words)
    assert alone.code == 2
    assert "--inputs and --outputs must be given together" in alone.err
    done = convert(*words, "--outputs", tmp_path / "out.npy")
    assert done.code == 2
    assert reason in done.err
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--keep-teachers"], "--keep-teachers must go with --format flax. Got augreg"),
        (["--domains", "cars"], "--domains must go with --format flax. Got augreg"),
        (["--head", "other"], "--head must go with --format flax. Got augreg"),
    ],
)
def test_options_of_flax_alone_are_refused_elsewhere(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tmp_path: Path, words: list[str], reason: str
) -> None:
    file = write_augreg(tmp_path / "vit.npz", params)
    done = convert(file, "--format", "augreg", "--out", tmp_path / "vit", *words)
    assert done.code == 2
    assert reason in done.err


def test_names_of_domains_without_teachers_are_refused(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = write_flax(tmp_path / "checkpoint", params)
    done = convert(file, "--format", "flax", "--out", tmp_path / "out", "--domains", *DOMAINS)
    assert done.code == 2
    assert "--domains must go with --keep-teachers" in done.err


def test_a_model_is_replaced_only_with_force(
    convert: Callable[..., Any], params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = write_augreg(tmp_path / "vit.npz", params)
    words = (file, "--format", "augreg", "--out", tmp_path / "vit")
    assert convert(*words).code == 0
    refused = convert(*words)
    assert refused.code == 2
    assert "give --force to replace it" in refused.err
    assert convert(*words, "--force").code == 0


def test_msgpack_is_named_where_it_is_missing(
    convert: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\x80")
    monkeypatch.setitem(sys.modules, "msgpack", None)
    done = convert(tmp_path / "checkpoint", "--format", "flax", "--out", tmp_path / "out")
    assert done.code == 1
    assert 'pip install "modeling-udon[convert]"' in done.err
