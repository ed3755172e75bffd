"""`udon push-space`: a folder that runs by itself, says nothing of this machine, and goes up in one commit or not."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from tiny_models import TINY_VIT
from transformers import ViTConfig, ViTModel

from modeling_udon.cli import main
from modeling_udon.encoder import Encoder
from modeling_udon.hub import space_upload
from modeling_udon.hub.space import OWN_FOLDERS, SpaceSide, make_space
from modeling_udon.hub.space_upload import list_files
from modeling_udon.hub.student_folder import write_student
from modeling_udon.search.embed import embed
from modeling_udon.search.index import build_index

pytest.importorskip("gradio", reason='a Space runs gradio: pip install "modeling-udon[demo]"')
import httpx
from gradio_client import Client, handle_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


push_space = partial(space_upload.push_space, sdk="gradio", own_folders=OWN_FOLDERS)


class FakeHub:
    """Takes the calls of the client; a Space that is there is private or not."""

    endpoint = "https://hub.example"

    def __init__(self, private=False, refusal=None):
        self.private, self.refusal, self.calls, self.files = private, refusal, [], {}

    def create_repo(self, repo_id, **values):
        self.calls.append(("create_repo", repo_id, values))
        return f"{self.endpoint}/spaces/{repo_id}"

    def repo_info(self, repo_id, repo_type):
        assert repo_type == "space"
        return self

    def upload_folder(self, repo_id, folder_path, **values):
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("upload_folder", repo_id, values))
        self.files = contents(Path(folder_path))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(status):
    response = httpx.Response(status, request=httpx.Request("POST", "https://hub.example/secret-token"))
    return HfHubHTTPError("secret-token", response=response)


@pytest.fixture(scope="module")
def made(searchable, tmp_path_factory):
    """A Space of the searchable pictures with two examples."""
    folder = tmp_path_factory.mktemp("spaces") / "nearest-space"
    examples = [searchable.pictures / "plants" / "0.png", searchable.pictures / "tools" / "1.png"]
    make_space([SpaceSide(str(searchable.model), str(searchable.index))], folder, "nearest", examples)
    return folder


def test_a_space_runs_by_itself_and_finds_the_right_neighbours(made, searchable, tmp_path):
    moved = shutil.copytree(made, tmp_path / "elsewhere")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "PYTHONNOUSERSITE": "1"}
    # `-v` tells where each module comes from.
    command = [sys.executable, "-v", "app.py"]
    with (
        (tmp_path / "imports").open("w") as told,
        subprocess.Popen(
            command, cwd=moved, env=environment, stdout=subprocess.PIPE, stderr=told, text=True
        ) as process,
    ):
        try:
            client = Client(process.stdout.readline().strip(), verbose=False)
            picture = handle_file(str(searchable.pictures / "tools" / "2.png"))
            html = client.predict(picture, "", 4, api_name="/search")
        finally:
            process.terminate()
    assert "<div>tools/2.png</div>" in html and html.count('src="data:image/jpeg') == 4
    imported = re.findall(
        r"^# code object from '?(\S+?/modeling_udon/\S+\.py)'?", (tmp_path / "imports").read_text(), re.M
    )
    assert imported and all(Path(path).is_relative_to(moved) for path in imported)


def test_a_space_holds_what_the_page_imports_and_requires_what_that_imports(made):
    files = [path for path in made.rglob("*.py")]
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name)
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in node.names
    }
    ours = {name for name in imported if name.split(".")[0] == "modeling_udon"}
    assert ours and all(
        (made / f"{name.replace('.', '/')}.py").is_file() or (made / name.replace(".", "/")).is_dir() for name in ours
    )
    libraries = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"modeling_udon", "gradio"}
    lines = (made / "requirements.txt").read_text().splitlines()
    required = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("--")}
    distributions = packages_distributions()
    assert all(required & set(map(canonicalize_name, distributions[library])) for library in libraries)
    assert "gradio" not in required and not {"accelerate", "jinja2"} & required


def test_the_readme_configures_a_gradio_space(made):
    metadata = metadata_load(made / "README.md")
    assert (metadata["sdk"], metadata["sdk_version"], metadata["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert metadata["title"] == "nearest" and len(metadata["short_description"]) <= 60 and "models" not in metadata
    assert metadata["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_space_says_nothing_of_this_machine(made, searchable):
    home = str(searchable.model.parent).encode()
    assert [name for name, content in contents(made).items() if home in content] == []


def test_pictures_named_by_absolute_paths_keep_their_name_alone(searchable, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{searchable.pictures}/plants/0.png\n{searchable.pictures}/tools/1.png\n")
    model = ("--model", searchable.model)
    for command in (
        ("embed", listing, *model, "--out", tmp_path / "e", "--num-workers", 0, "--allow-outside"),
        ("index", tmp_path / "e", "--out", tmp_path / "i"),
    ):
        assert main([str(word) for word in command]) == 0
    make_space([SpaceSide(str(searchable.model), str(tmp_path / "i"))], tmp_path / "space", "nearest")
    rows = pa.ipc.open_file(tmp_path / "space" / "indexes" / "1" / "metadata.arrow").read_all().to_pylist()
    assert [row["path"] for row in rows] == ["0.png", "1.png"] and all(row["thumbnail"] for row in rows)


def test_images_without_a_picture_are_counted(searchable, make_searchable, tmp_path):
    gone = make_searchable(domains=("plants", "birds"))
    shutil.rmtree(gone.pictures / "birds")
    told = []
    make_space([SpaceSide(str(gone.model), str(gone.index))], tmp_path / "space", "nearest", say=told.append)
    assert len(told) == 1 and told[0].startswith("4 of 9 images of ")


def test_two_models_make_a_space_that_compares_them(searchable, make_searchable, tmp_path):
    other = make_searchable(seed=1, domains=("plants",))
    sides = [SpaceSide(str(made.model), str(made.index)) for made in (searchable, other)]
    make_space(sides, tmp_path / "space", "nearest")
    assert (tmp_path / "space" / "models" / "2" / "model.safetensors").is_file()
    assert (tmp_path / "space" / "app.py").read_text().count("open_side(") == 2


def test_a_model_of_the_hub_is_named_with_its_commit_and_not_copied(searchable, tmp_path):
    cached = Path(constants.HF_HUB_CACHE) / "models--me--tiny"
    shutil.copytree(searchable.model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    make_space([SpaceSide("me/tiny", str(searchable.index))], tmp_path / "space", "nearest")
    assert not (tmp_path / "space" / "models").exists()
    assert (
        f"Encoder.open('me/tiny', revision='{COMMIT}', trust_remote_code=False)"
        in (tmp_path / "space" / "app.py").read_text()
    )
    assert metadata_load(tmp_path / "space" / "README.md")["models"] == ["me/tiny"]


def test_a_student_goes_along_as_it_is_published_and_nothing_beside_it_does(searchable, tmp_path):
    model = shutil.copytree(searchable.model, tmp_path / "best")
    (model / ".env").write_text("HF_TOKEN=hf_secret")
    (model / "optimizer.bin").write_bytes(b"large")
    (model / "calibration.json").write_text('{"threshold": 0.5, "false_accept_rate": 0.01}')
    make_space([SpaceSide(str(model), str(searchable.index))], tmp_path / "space", "nearest")
    written = tmp_path / "written"
    student = Encoder.open(model)
    write_student(written, student.network, student.processor, ModelCard("---\n---\n"))
    names = {path.name for path in (tmp_path / "space" / "models" / "1").iterdir()}
    assert names == {path.name for path in written.iterdir()} | {"calibration.json"}
    assert Encoder.open(tmp_path / "space" / "models" / "1").fingerprint == student.fingerprint


def test_of_a_run_the_best_student_goes_along(searchable, tmp_path):
    shutil.copytree(searchable.model, tmp_path / "shoes" / "best")
    make_space([SpaceSide(str(tmp_path / "shoes"), str(searchable.index))], tmp_path / "space", "nearest")
    assert Encoder.open(tmp_path / "space" / "models" / "1").fingerprint == Encoder.open(searchable.model).fingerprint
    assert "'shoes'" in (tmp_path / "space" / "app.py").read_text()


@pytest.fixture
def plain_vit(searchable, tmp_path):
    """A vision encoder that is no student, with an index that it made."""
    model, out = tmp_path / "vit", (tmp_path / "e", tmp_path / "i")
    values = {name: value for name, value in TINY_VIT.items() if name != "model_type"}
    ViTModel(ViTConfig(**values)).save_pretrained(model)
    shutil.copy(searchable.model / "preprocessor_config.json", model)
    embed(searchable.pictures, Encoder.open(model), out[0], num_workers=0)
    build_index([out[0]], out[1])
    return SpaceSide(str(model), str(out[1]))


def test_of_another_model_only_what_loading_needs_is_taken(plain_vit, tmp_path):
    (Path(plain_vit.model) / "optimizer.bin").write_bytes(b"large")
    make_space([plain_vit], tmp_path / "space", "nearest")
    names = {path.name for path in (tmp_path / "space" / "models" / "1").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_another_model_without_safetensors_is_refused(plain_vit, tmp_path):
    weights = Path(plain_vit.model) / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="^`model` must have its weights as safetensors. Got '.*vit' without"):
        make_space([plain_vit], tmp_path / "space", "nearest")


def test_a_space_is_made_again_in_its_folder_but_other_files_are_left_alone(searchable, tmp_path):
    side = SpaceSide(str(searchable.model), str(searchable.index))
    make_space([side], tmp_path / "space", "first", [searchable.pictures / "plants" / "0.png"])
    with pytest.raises(ValueError, match="a Space; give --force to replace it"):
        make_space([side], tmp_path / "space", "second")
    assert "# first" in (tmp_path / "space" / "README.md").read_text()
    make_space([side], tmp_path / "space", "second", force=True)
    assert (
        "# second" in (tmp_path / "space" / "README.md").read_text() and not (tmp_path / "space" / "examples").exists()
    )
    (tmp_path / "space" / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError, match="^`out` must be a new folder, or one that udon push-space wrote.*'thesis.tex'"
    ):
        make_space([side], tmp_path / "space", "third", force=True)
    assert "# second" in (tmp_path / "space" / "README.md").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no app.py in it"):
        make_space([side], tmp_path / "empty", "nearest")


def test_what_fails_leaves_nothing_behind(searchable, make_searchable, tmp_path):
    other = make_searchable(seed=3, domains=("plants",))
    with pytest.raises(ValueError, match="^`model` must be the one that the index was made with"):
        make_space([SpaceSide(str(searchable.model), str(other.index))], tmp_path / "space", "nearest")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_up_in_one_commit(made):
    hub = FakeHub()
    assert push_space(made, "me/nearest", api=hub) == "https://hub.example/spaces/me/nearest"
    (first, _, created), (second, repo, uploaded) = hub.calls
    assert (first, second, repo) == ("create_repo", "upload_folder", "me/nearest")
    assert created == {"repo_type": "space", "space_sdk": "gradio", "private": None, "exist_ok": True}
    assert uploaded["repo_type"] == "space" and "models/*" in uploaded["delete_patterns"]
    assert hub.files == contents(made)


def test_a_private_space_must_be_private(made):
    hub = FakeHub(private=True)
    push_space(made, "me/nearest", private=True, api=hub)
    assert hub.calls[0][2]["private"] is True and hub.files
    hub = FakeHub(private=False)
    with pytest.raises(ValueError, match="^`--private` must go with a private Space. Got me/nearest, which is public"):
        push_space(made, "me/nearest", private=True, api=hub)
    assert not hub.files


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (refused(401), "the Hub does not know you (401)"),
        (refused(403), "your token may not write to me/nearest (403)"),
        (refused(429), "the Hub has had too many requests (429)"),
        (refused(503), "the Hub failed (503)"),
        (HTTPError("name\nnot known"), "the Hub at https://huggingface.co cannot be reached (HTTPError)"),
        (ConnectionError(), "the Hub at https://huggingface.co cannot be reached (ConnectionError)"),
    ],
)
def test_a_refusal_is_one_line_and_the_folder_stays(made, refusal, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = contents(made)
    with pytest.raises(OSError) as caught:
        push_space(made, "me/nearest", api=FakeHub(refusal=refusal))
    assert str(caught.value).startswith(f"nothing was uploaded to the Space me/nearest: {reason}")
    assert str(caught.value).endswith(f"its folder {made} is ready: run the same command again")
    assert "secret" not in str(caught.value) and contents(made) == before


@pytest.fixture
def push(searchable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        words = ["push-space", "--model", searchable.model, "--index", searchable.index, *arguments]
        return main([str(word) for word in words]), capsys.readouterr()

    return run


def test_a_dry_run_makes_the_folder_and_lists_it(push, tmp_path):
    code, told = push("--repo", "me/nearest", "--dry-run")
    assert code == 0 and told.out == list_files("nearest-space") + "\n"
    weights = (tmp_path / "nearest-space" / "models" / "1" / "model.safetensors").stat().st_size
    assert re.search(rf"^  models/1/model.safetensors +{weights:,}$", told.out, re.M)
    assert told.out.startswith(f"{len(contents(tmp_path / 'nearest-space'))} files, ")


def test_the_command_makes_the_folder_and_uploads_it(push, monkeypatch, tmp_path):
    hub = FakeHub(private=True)
    monkeypatch.setattr(space_upload, "HfApi", lambda: hub)
    code, told = push("--repo", "me/nearest", "--private", "--out", "made")
    assert code == 0 and told.out.splitlines()[-1] == "the Space is at https://hub.example/spaces/me/nearest"
    assert hub.files == contents(tmp_path / "made")


def test_offline_the_command_says_so_and_keeps_the_folder(push, tmp_path):
    code, told = push("--repo", "me/nearest")
    last = told.err.splitlines()[-1]
    assert code == 1 and last.startswith(
        "udon push-space: error: nothing was uploaded to the Space me/nearest: HF_HUB_OFFLINE is set; unset it; "
    )
    assert (tmp_path / "nearest-space" / "app.py").is_file()


@pytest.mark.parametrize("repo", ["nearest", "me/near est", "a/b/c"])
def test_a_wrong_name_is_refused_before_anything_is_made(push, tmp_path, repo):
    code, told = push("--repo", repo)
    assert code == 2 and told.err.startswith("udon push-space: error: `--repo` must be `owner/name`")
    assert list(tmp_path.iterdir()) == []
