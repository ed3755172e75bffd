"""What a path meant is recorded by the run, and the licence follows from it or is asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from loopback import LoopbackHub
from safetensors import safe_open

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.hub.push import push
from modeling_udon.hub.sources import Sources, derive_license, find_sources

REPO = "org/udon-tiny"
OPEN = {"path": "org/open"}


def write_run(folder: Path, *, path: str, spec: dict[str, Any] | None = None, sources: Sources | None = None) -> Path:
    """A run's folder with a CLIP student as `save_pretrained` leaves it, trained on one domain."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes}
    model = UdonModel(UdonConfig(backbone_config=backbone, embedding_dim=8, pooling="pooler"))
    model.save_pretrained(folder / "best")
    image_processor(16, IMAGENET_STANDARD).save_pretrained(folder / "best")
    domains = {"acme": {"path": path, **(spec or {})}}
    config = {"model": {"backbone": None, "backbone_config": backbone, "embedding_dim": 8}, "domains": domains}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"versions": {}}))
    if sources is not None:
        (folder / "sources.json").write_text(json.dumps(sources.to_json()))
    return folder


def test_a_folder_is_not_published_as_a_data_set_of_the_hub_wherever_the_push_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, api: HfApi
) -> None:
    hub.add("datasets", "data/client-acme", {"README.md": b"---\nlicense: mit\n---\n"})
    (tmp_path / "there" / "data" / "client-acme").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    config = {"model": {"backbone": None}, "domains": {"acme": {"path": "data/client-acme"}}}
    run = write_run(tmp_path / "run", path="data/client-acme", sources=find_sources(config))
    monkeypatch.chdir(tmp_path / "elsewhere")
    push(run, REPO, license="mit", api=api)
    assert all(b"datasets/data/client-acme" not in content for content in hub.files(REPO).values())
    assert "own data" in hub.files(REPO)["README.md"].decode()


def test_a_run_that_recorded_nothing_links_to_nobody(tmp_path: Path, hub: LoopbackHub, api: HfApi) -> None:
    push(write_run(tmp_path / "run", path="org/data"), REPO, license="mit", api=api)
    assert "datasets/org/data" not in hub.files(REPO)["README.md"].decode()


def test_a_student_that_was_fetched_from_the_hub_keeps_its_sources_and_licence(
    tmp_path: Path, hub: LoopbackHub, api: HfApi
) -> None:
    hub.add("datasets", "org/open", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    run = write_run(tmp_path / "run", path="org/open", sources=Sources(from_scratch=True, domains={"acme": "org/open"}))
    done = push(run, REPO, api=api)
    assert done.license == "cc-by-nc-4.0"
    for name, content in hub.files(REPO).items():
        path = tmp_path / "fetched" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert push(tmp_path / "fetched", "org/again", api=api).license == "cc-by-nc-4.0"


def test_without_a_licence_that_follows_it_is_asked_for_in_one_line(
    tmp_path: Path, hub: LoopbackHub, api: HfApi
) -> None:
    run = write_run(tmp_path / "run", path="/photos", sources=Sources(from_scratch=True, domains={"acme": None}))
    with pytest.raises(ValueError, match="`--license` must be given .* no licence of domains.acme; pass") as refused:
        push(run, REPO, api=api)
    assert "\n" not in str(refused.value)
    assert ("models", REPO) not in hub.repositories
    stated = write_run(tmp_path / "two", path="/p", spec={"license": "cc0-1.0"}, sources=Sources(from_scratch=True))
    assert push(stated, REPO, api=api).license == "apache-2.0"


@pytest.mark.parametrize(
    ("sources", "licences", "expected"),
    [
        (Sources(from_scratch=True, domains={"a": "org/open"}), {"org/open": "cc-by-4.0"}, "apache-2.0"),
        (Sources("org/vit", domains={"a": "org/open"}), {"org/open": "mit", "org/vit": "mit"}, "mit"),
        (Sources("org/vit", domains={"a": "org/open"}), {"org/open": "mit", "org/vit": "cc-by-nc-4.0"}, "cc-by-nc-4.0"),
        (Sources("org/vit", domains={"a": "org/open"}), {"org/open": "mit"}, None),
        (Sources("org/vit", domains={"a": "org/open"}), {"org/open": "gpl-3.0", "org/vit": "cc-by-nc-4.0"}, None),
        (Sources(from_scratch=True, domains={"a": "org/open"}), {"org/open": "other"}, None),
        (Sources(backbone_license="mit", domains={"a": "org/open"}), {"org/open": "mit"}, "mit"),
    ],
)
def test_a_restriction_of_backbone_or_data_holds_for_the_model(
    sources: Sources, licences: dict[str, str], expected: str | None
) -> None:
    license, missing = derive_license({"a": OPEN}, sources, licences)
    assert license == expected
    assert bool(missing) == (expected is None)


def test_a_pushed_clip_student_has_the_names_that_the_oldest_transformers_reads(
    tmp_path: Path, hub: LoopbackHub, api: HfApi
) -> None:
    push(write_run(tmp_path / "run", path="/p"), REPO, license="mit", api=api)
    (tmp_path / "model.safetensors").write_bytes(hub.files(REPO)["model.safetensors"])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118
    assert names and all(name.startswith("backbone.vision_model.") for name in names)


def test_an_odd_folder_is_quoted_in_the_command_that_tries_again(
    tmp_path: Path, hub: LoopbackHub, sleeps: list[float]
) -> None:
    run = write_run(tmp_path / "a run; $HOME", path="/p")
    with pytest.raises(OSError, match=r"udon push '.*a run; \$HOME' --repo org/udon-tiny --license mit"):
        push(run, REPO, license="mit", api=HfApi(endpoint=hub.endpoint, token="hf_wrong"))
    shutil.rmtree(run)
