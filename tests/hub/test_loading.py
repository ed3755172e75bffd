"""What was pushed loads in a process with an empty cache that does not have this package, in each of the ways."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from loopback import LoopbackHub, known_to_clients
from tiny_models import TINY_VIT

from modeling_udon import UdonModel
from modeling_udon.data.domains import open_domain
from modeling_udon.data.preprocessing import IMAGENET_STANDARD
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.hub.push import push as push_student

# Nothing says under which licence the pictures of these tests are.
push = partial(push_student, license="apache-2.0")
REPO = "org/udon-tiny"
HALF = (0.5, 0.5, 0.5)
TOLERANCE = 2e-6
Values = Callable[..., dict[str, Any]]

# Run in a process of its own, in another folder, where `import modeling_udon` fails: arguments are the repository, its
# revision or nothing, the way of loading, a Parquet file of images, and the file for the embeddings.
STRANGER = """
import io, sys
sys.modules["modeling_udon"] = None
import numpy as np, pyarrow.parquet as pq, torch
from PIL import Image

repo, revision, way, parquet, out = (value or None for value in sys.argv[1:])
images = [Image.open(io.BytesIO(row["bytes"])) for row in pq.read_table(parquet)["image"].to_pylist()]
if way == "auto":
    from transformers import AutoImageProcessor, AutoModel
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(repo, revision=revision)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    assert torch.equal(outputs.pooler_output, outputs.image_embeds)
    assert not list(model.teacher_heads)
    embeds = outputs.image_embeds.numpy()
elif way == "pipeline":
    from transformers import pipeline
    pipe = pipeline("image-feature-extraction", repo, revision=revision, trust_remote_code=True)
    embeds = np.asarray(pipe(images, pool=True))[:, 0]
else:
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(repo, revision=revision, trust_remote_code=True, device="cpu")
    embeds = model.encode(images, normalize_embeddings=True)
np.save(out, embeds)
assert not [name for name in sys.modules if name.startswith("modeling_udon.")]
"""

Stranger = Callable[..., np.ndarray]


def run_stranger(
    repo: str, revision: str, way: str, parquet: Path, folder: Path, variables: dict[str, str]
) -> tuple[np.ndarray, str]:
    """Gives the embeddings and what was said."""
    folder.mkdir(exist_ok=True)
    out = folder / f"{way}.npy"
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, repo, revision, way, str(parquet), str(out)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")} | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), done.stderr


def embed_ourselves(best: Path, folder: Path) -> np.ndarray:
    """Embeds the test images of a domain with what the package itself uses."""
    model = UdonModel.from_pretrained(best).eval()
    images = open_domain("blobs", DomainSpec(path=str(folder / "blobs"))).evaluation["test"].query.images
    embedder = ImageEmbedder(batch_size=5, num_workers=0, accelerator=Accelerator(cpu=True))
    encoder = Encoder.of_student(model, IMAGENET_STANDARD, EvalTransform(16), "tiny")
    return embedder(images, encoder, "blobs").embeddings["student"]


@pytest.fixture(scope="module")
def hub_with_students(shared_hub: LoopbackHub, trained: dict[str, Path]) -> LoopbackHub:
    """Holds a student with the tag `v1`, and another one on its main branch."""
    with known_to_clients(shared_hub):
        push(trained["student"], REPO, tag="v1", say=lambda text: None)
    weights = shared_hub.files(REPO)["model.safetensors"]
    # What comes after the pinned commit must not be what loads: another model of the same name.
    repository = shared_hub.model(REPO)
    size = int.from_bytes(weights[:8], "little")
    values = np.frombuffer(weights[8 + size :], np.float32) * np.float32(0.5) + np.float32(0.01)
    newer = dict(shared_hub.files(REPO)) | {"model.safetensors": weights[: 8 + size] + values.tobytes()}
    repository.branches["main"] = repository.commit(newer, repository.branches["main"])
    return shared_hub


@pytest.mark.parametrize("way", ["auto", "pipeline", "sentence-transformers"])
def test_a_pushed_student_embeds_the_same_without_the_package_and_again_offline(
    hub_with_students: LoopbackHub, trained: dict[str, Path], tiny_domains: Path, tmp_path: Path, way: str
) -> None:
    if way == "sentence-transformers" and importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed: it embeds images from 6.2 on, with transformers 5")
    parquet = tiny_domains / "blobs" / "test.parquet"
    variables = hub_with_students.environment(tmp_path / "home", token=None)
    theirs, said = run_stranger(REPO, "v1", way, parquet, tmp_path / "elsewhere", variables)
    ours = embed_ourselves(trained["student"] / "best", tiny_domains)
    assert theirs.shape == ours.shape == (40, 8)
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE)
    assert "pin a revision" not in said
    asked = len(hub_with_students.requests)
    offline, _ = run_stranger(REPO, "v1", way, parquet, tmp_path / "elsewhere", variables | {"HF_HUB_OFFLINE": "1"})
    np.testing.assert_array_equal(offline, theirs)
    assert len(hub_with_students.requests) == asked


def test_a_pinned_revision_is_not_the_newest_whose_code_transformers_warns_of(
    hub_with_students: LoopbackHub, trained: dict[str, Path], tiny_domains: Path, tmp_path: Path
) -> None:
    parquet = tiny_domains / "blobs" / "test.parquet"
    variables = hub_with_students.environment(tmp_path / "home", token=None)
    newest, said = run_stranger(REPO, "", "auto", parquet, tmp_path / "elsewhere", variables)
    assert "you can pin a revision" in said and "modeling_udon.py" in said
    ours = embed_ourselves(trained["student"] / "best", tiny_domains)
    assert np.abs(newest - ours).max() > 0.01
    commit = hub_with_students.model(REPO).tags["v1"]
    pinned, said = run_stranger(REPO, commit, "auto", parquet, tmp_path / "elsewhere", variables)
    np.testing.assert_allclose(pinned, ours, atol=TOLERANCE)
    assert "pin a revision" not in said


def test_the_snippets_of_the_card_run_as_they_stand(
    hub_with_students: LoopbackHub, trained: dict[str, Path], tiny_domains: Path, tmp_path: Path
) -> None:
    card = hub_with_students.files(REPO, "v1")["README.md"].decode()
    snippets = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    assert len(snippets) == 3
    head = (
        'import io, sys\nsys.modules["modeling_udon"] = None\n'
        "import numpy as np, pyarrow.parquet as pq\nfrom PIL import Image\n"
        f'rows = pq.read_table({str(tiny_domains / "blobs" / "test.parquet")!r})["image"].to_pylist()\n'
        'images = [Image.open(io.BytesIO(row["bytes"])) for row in rows]\nfound = []\n'
    )
    tails = [
        "found.append(embeds.detach().numpy())\n",
        "found.append(np.asarray(embeds)[:, 0])\n",
        "found.append(embeds)\n",
    ]
    if importlib.util.find_spec("sentence_transformers") is None:
        snippets, tails = snippets[:2], tails[:2]
    program = head + "".join(one + tail for one, tail in zip(snippets, tails, strict=True)) + "np.save('e.npy', found)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env=os.environ | hub_with_students.environment(tmp_path / "home", token=None),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ours = embed_ourselves(trained["student"] / "best", tiny_domains)
    for theirs in np.load(tmp_path / "e.npy"):
        np.testing.assert_allclose(theirs, ours, atol=TOLERANCE)


def test_a_student_that_has_adapted_is_pushed_and_loaded_like_any_other(
    hub: LoopbackHub, make_values: Values, run_train: Callable[..., Path], tiny_domains: Path, tmp_path: Path
) -> None:
    values = make_values(tmp_path / "runs", system="kd_mtda", model__teacher_backbone_config=TINY_VIT)
    values.pop("sampling")
    for name, spec in values["domains"].items():
        spec["labels"] = "column" if name == "blobs" else "none"
    run = run_train(values)
    push(run, "org/udon-adapted", tag="v1", say=lambda text: None)
    assert not any("teacher" in name or "prototype" in name for name in hub.files("org/udon-adapted"))
    parquet = tiny_domains / "blobs" / "test.parquet"
    variables = hub.environment(tmp_path / "home", token=None)
    theirs, _ = run_stranger("org/udon-adapted", "v1", "auto", parquet, tmp_path / "elsewhere", variables)
    np.testing.assert_allclose(theirs, embed_ourselves(run / "best", tiny_domains), atol=TOLERANCE)


def test_training_goes_on_from_a_student_of_the_hub(
    hub_with_students: LoopbackHub,
    trained: dict[str, Path],
    make_values: Values,
    run_script: Callable[..., Any],
    tmp_path: Path,
) -> None:
    values = make_values(tmp_path, name="tuned", train__num_steps=2, optim__backbone_lr=0.0)
    values["model"] |= {"backbone": REPO, "revision": "v1"}
    del values["model"]["backbone_config"]
    # The backbone stands still, so what is saved is what was downloaded.
    values["optim"] |= {"frozen_fraction": 0.99}
    run_script(values, **hub_with_students.environment(tmp_path / "home", token=None))
    tuned = UdonModel.from_pretrained(tmp_path / "tuned" / "best")
    source = UdonModel.from_pretrained(trained["student"] / "best")
    for name, weight in source.backbone.state_dict().items():
        assert torch.equal(tuned.backbone.state_dict()[name], weight), name
    assert yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())["model"]["revision"] == "v1"
    assert "org/udon-tiny" in json.dumps(json.loads((tmp_path / "tuned" / "results.json").read_text())["config"])
