"""A run's student becomes one commit on the Hub or nothing does, whatever the Hub answers."""

import errno
import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi
from loopback import CUT, READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load as load_tensors

from modeling_udon.cli.train import train_and_publish
from modeling_udon.config_file import load_config
from modeling_udon.encoder import Encoder
from modeling_udon.hub.commit import MAX_TRIES, MAX_WAIT, PushError
from modeling_udon.hub.push import push as push_student

# Nothing says under which licence the pictures of these tests are.
push = partial(push_student, license="apache-2.0")
REPO = "org/udon-tiny"
TARGET = {"repo": REPO, "license": "apache-2.0"}
PUSH = ("push", "--repo", REPO, "--license", "apache-2.0")
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "configuration_udon.py",
    "handler.py",
    "model.safetensors",
    "modeling_udon.py",
    "modules.json",
    "preprocessor_config.json",
    "results.json",
    "sentence_bert_config.json",
}
Values = Callable[..., dict[str, Any]]


class Told(list[str]):
    """What the user was told."""

    def __call__(self, text: str) -> None:
        self.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self)


@pytest.fixture
def say() -> Told:
    return Told()


def count_commits(hub: LoopbackHub) -> int:
    return sum(method == "POST" and "/commit/" in path for method, path in hub.requests)


def read_splits(results: bytes) -> Any:
    return json.loads(results)["splits"]


def digest_folder(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_push_is_one_commit_of_what_the_hub_takes(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    url = push(run, REPO, say=say, api=api).url
    files = hub.files(REPO)
    assert files.keys() == FILES
    assert count_commits(hub) == 1
    assert len(hub.model(REPO).commits) == 2  # the empty repository's, and ours
    assert url == f"{hub.endpoint}/{REPO}/commit/{hub.model(REPO).branches['main']}"
    assert json.loads(files["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_udon.UdonConfig",
        "AutoModel": "modeling_udon.UdonModel",
    }
    assert "model.safetensors" in hub.model(REPO).large
    assert not hub.model(REPO).private


@pytest.mark.parametrize("kind", ["student", "teachers"])
def test_the_published_weights_are_the_student_s_alone(
    trained: dict[str, Path], hub: LoopbackHub, api: HfApi, say: Told, kind: str
) -> None:
    push(trained[kind], REPO, say=say, api=api)
    published = load_tensors(hub.files(REPO)["model.safetensors"])
    assert {name.partition(".")[0] for name in published} == {"backbone", "student_head"}
    assert json.loads(hub.files(REPO)["config.json"])["domains"] == {}
    with safe_open(trained[kind] / "best" / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("teacher")}  # noqa: SIM118
    assert published.keys() == kept.keys()
    assert all(published[name].equal(kept[name]) for name in kept)
    # Nowhere else is a tensor: all other files are text.
    assert [name for name, content in hub.files(REPO).items() if b"\0" in content] == ["model.safetensors"]


@pytest.mark.parametrize("part", ["", "best"])
def test_a_run_and_its_best_folder_give_the_same_files(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, part: str
) -> None:
    (run / "best" / "calibration.json").write_text('{"threshold": 0.5, "false_accept_rate": 0.01}')
    push(run / part, REPO, say=say, api=api)
    assert hub.files(REPO).keys() == FILES | {"calibration.json"}
    assert (
        json.loads(hub.files(REPO)["results.json"])["splits"]
        == json.loads((run / "results.json").read_text())["splits"]
    )


def test_a_student_without_its_run_is_published_with_what_is_known_of_it(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, tmp_path: Path
) -> None:
    alone = (run / "best").rename(tmp_path / "alone")
    push(alone, REPO, say=say, api=api)
    assert hub.files(REPO).keys() == FILES - {"results.json"}
    card = hub.files(REPO)["README.md"].decode()
    assert "8-d image embedding" in card
    assert "## Results" not in card and "## Training" not in card


def test_a_dry_run_lists_the_files_with_their_sizes_and_asks_the_hub_nothing(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told
) -> None:
    assert push(run, REPO, dry_run=True, say=say, api=api).url is None
    assert hub.requests == []
    listed = {name: int(size.replace(",", "")) for name, size in re.findall(r"^  (\S+) +([\d,]+)$", say.text, re.M)}
    push(run, REPO, say=say, api=api)
    assert listed == {name: len(content) for name, content in hub.files(REPO).items() if name != ".gitattributes"}


def test_graphs_for_javascript_go_along_and_leave_with_the_next_push(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    push(run, REPO, onnx=True, say=say, api=api)
    files = hub.files(REPO)
    assert {name for name in files if name.startswith("onnx/")} == {"onnx/model.onnx", "onnx/model_pixels.onnx"}
    assert 'model_file_name: "model_pixels"' in files["README.md"].decode()
    session = onnxruntime.InferenceSession(files["onnx/model_pixels.onnx"], providers=["CPUExecutionProvider"])
    picture = Image.linear_gradient("L").convert("RGB").resize((70, 41))
    (expected,) = Encoder.open(run / "best").encode([picture]).embeddings
    assert session.run(None, {"pixel_values": np.asarray(picture)[None]})[0][0] @ expected > 0.9999
    push(run, REPO, say=say, api=api)
    files = hub.files(REPO)
    assert not [name for name in files if name.startswith("onnx/")]
    assert "JavaScript" not in files["README.md"].decode()


def test_the_tag_names_the_commit_and_the_card_pins_it(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    push(run, REPO, tag="v1", say=say, api=api)
    assert hub.model(REPO).tags == {"v1": hub.model(REPO).branches["main"]}
    assert 'revision="v1"' in hub.files(REPO)["README.md"].decode()


def test_without_a_tag_one_is_made_of_the_contents(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    push(run, REPO, say=say, api=api)
    push(run, "org/other", say=say, api=api)
    ((tag, commit),) = hub.model(REPO).tags.items()
    assert commit == hub.model(REPO).branches["main"]
    assert hub.model("org/other").tags.keys() == {tag}
    (run / "best" / "calibration.json").write_text('{"threshold": 0.5, "false_accept_rate": 0.01}')
    push(run, REPO, say=say, api=api)
    assert len(hub.model(REPO).tags) == 2


def test_a_private_repository_on_a_new_branch(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    push(run, REPO, private=True, revision="next", say=say, api=api)
    assert hub.model(REPO).private
    assert hub.files(REPO, "main").keys() == {".gitattributes"}
    assert hub.files(REPO, "next").keys() == FILES


def test_a_pull_request_leaves_the_main_branch_alone(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    url = push(run, REPO, create_pr=True, say=say, api=api).url
    assert url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO, "refs/pr/1").keys() == FILES
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert hub.model(REPO).tags == {}


@pytest.mark.parametrize("options", [{}, {"tag": "v1"}])
def test_a_second_push_of_the_same_makes_no_second_commit(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, options: dict[str, Any]
) -> None:
    first = push(run, REPO, **options, say=say, api=api)
    assert push(run, REPO, **options, say=say, api=api) == first
    assert count_commits(hub) == 1


def test_what_an_earlier_push_left_goes_with_the_next_commit(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told
) -> None:
    calibration = run / "best" / "calibration.json"
    calibration.write_text('{"threshold": 0.5, "false_accept_rate": 0.01}')
    push(run, REPO, gallery=True, say=say, api=api)
    assert {"calibration.json", "gallery/blobs.jpg", "gallery/examples/blobs.jpg"} < hub.files(REPO).keys()
    hub.files(REPO)["notes.md"] = b"somebody else's"
    calibration.unlink()
    push(run, REPO, say=say, api=api)
    assert hub.files(REPO).keys() == FILES | {"notes.md"}
    assert count_commits(hub) == 2


def test_the_author_s_folders_are_not_published(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    results = json.loads((run / "results.json").read_text())
    home = results["config"]["output_dir"]
    assert Path(home).is_absolute()
    push(run, REPO, say=say, api=api)
    for name, content in hub.files(REPO).items():
        assert home.encode() not in content, name
    published = json.loads(hub.files(REPO)["results.json"])
    assert published["config"]["domains"]["blobs"]["path"] == "blobs"


REFUSALS = [
    pytest.param([Fault("POST", "repos/create", 401)], "log in with `hf auth login`", id="401"),
    pytest.param([Fault("POST", "repos/create", 403)], "may not write to org/udon-tiny (403)", id="403"),
    pytest.param([Fault("POST", "preupload", 403)], "may not write to org/udon-tiny (403)", id="403 on upload"),
    pytest.param([Fault("POST", "/commit/", 409)], "was changed at the same time (409)", id="409"),
    pytest.param([Fault("POST", "/commit/", 412)], "was changed at the same time (412)", id="412"),
    pytest.param([Fault("POST", "/commit/", 429)], "too many requests, also after", id="429"),
    pytest.param([Fault("POST", "/commit/", 500)], "the Hub failed (500)", id="500"),
    pytest.param([Fault("PUT", "/lfs/", 503)], "the Hub failed (503)", id="503 on upload"),
    pytest.param([Fault("POST", "repos/create", CUT)], "cannot be reached", id="cut"),
    pytest.param([Fault("PUT", "/lfs/", CUT)], "cannot be reached", id="cut on upload"),
]


@pytest.mark.parametrize(("faults", "complaint"), REFUSALS)
def test_a_refused_push_leaves_nothing_half_written_and_can_be_made_again(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, sleeps: list[float], faults: list[Fault], complaint: str
) -> None:
    before = digest_folder(run)
    hub.faults = [Fault(**vars(fault)) for fault in faults]
    with pytest.raises(PushError, match=re.escape(complaint)) as refused:
        push(run, REPO, private=True, say=say, api=api)
    message = str(refused.value)
    assert "\n" not in message
    assert f"nothing was published to {REPO}" in message
    assert message.endswith(f"udon push {run} --repo {REPO} --private --license apache-2.0")
    assert WRITE_TOKEN not in message + say.text
    if ("models", REPO) in hub.repositories:
        assert hub.files(REPO).keys() == {".gitattributes"}
        assert hub.model(REPO).tags == {}
    assert digest_folder(run) == before
    hub.faults = []
    push(run, REPO, private=True, say=say, api=api)
    assert hub.files(REPO).keys() == FILES


@pytest.mark.parametrize(("token", "complaint"), [(READ_TOKEN, "(403)"), ("hf_wrong_token", "(401)")])
def test_a_wrong_token_is_named_by_what_it_lacks_and_never_printed(
    run: Path, hub: LoopbackHub, say: Told, token: str, complaint: str
) -> None:
    with pytest.raises(PushError, match=re.escape(complaint)) as refused:
        push(run, REPO, say=say, api=HfApi(endpoint=hub.endpoint, token=token))
    assert token not in str(refused.value) + say.text
    assert hub.repositories == {}


def test_a_full_disk_is_not_taken_for_a_network_that_fails(
    run: Path, hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr("modeling_udon.hub.push.stage", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        push(run, REPO, api=api)
    assert not isinstance(caught.value, PushError) and count_commits(hub) == 0


def test_a_busy_hub_is_asked_again(run: Path, hub: LoopbackHub, api: HfApi, say: Told, sleeps: list[float]) -> None:
    hub.faults = [
        Fault("POST", "repos/create", 429, times=2, headers={"Retry-After": "7"}),
        Fault("POST", "/commit/", 503, times=2),
    ]
    push(run, REPO, say=say, api=api)
    assert hub.files(REPO).keys() == FILES
    assert sleeps[:2] == [7, 7]
    assert len(hub.model(REPO).commits) == 2
    assert "the Hub is busy (429), trying again in 7 s" in say.text


def test_a_hub_that_stays_busy_is_asked_a_bounded_number_of_times(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, sleeps: list[float]
) -> None:
    hub.faults = [Fault("POST", "repos/create", 503, headers={"Retry-After": "86400"})]
    with pytest.raises(PushError, match="the Hub failed"):
        push(run, REPO, say=say, api=api)
    assert hub.requests.count(("POST", "/api/repos/create")) == MAX_TRIES
    assert sleeps == [MAX_WAIT] * (MAX_TRIES - 1)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, sleeps: list[float]
) -> None:
    hub.faults = [Fault("POST", "/commit/", CUT, times=1, after=True)]
    with pytest.raises(PushError, match="may have the commit or not: .* to finish: udon push"):
        push(run, REPO, tag="v1", say=say, api=api)
    push(run, REPO, tag="v1", say=say, api=api)
    assert count_commits(hub) == 1
    assert hub.model(REPO).tags == {"v1": hub.model(REPO).branches["main"]}


def test_a_commit_without_its_tag_says_so_and_gets_it_by_the_next_push(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, sleeps: list[float]
) -> None:
    hub.faults = [Fault("POST", "/tag/", 500)]
    with pytest.raises(PushError, match="has the commit [0-9a-f]{40}, but not its tag 'v1'.* to finish: udon push"):
        push(run, REPO, tag="v1", say=say, api=api)
    hub.faults = []
    push(run, REPO, tag="v1", say=say, api=api)
    assert hub.model(REPO).tags == {"v1": hub.model(REPO).branches["main"]}
    assert count_commits(hub) == 1


def test_a_tag_that_names_something_else_is_refused_before_anything_is_sent(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told
) -> None:
    repository = hub.add("models", REPO, {"README.md": b"another model"})
    repository.tags["v1"] = repository.branches["main"]
    with pytest.raises(ValueError, match="`--tag` must be new. Got 'v1'"):
        push(run, REPO, tag="v1", say=say, api=api)
    assert count_commits(hub) == 0


def test_a_public_repository_is_not_taken_for_a_private_one(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    hub.add("models", REPO, {})
    with pytest.raises(ValueError, match="`--private` must go with a private repository. Got org/udon-tiny"):
        push(run, REPO, private=True, say=say, api=api)
    assert count_commits(hub) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"repo": "name"}, "`--repo` must be `owner/name`"),
        ({"repo": "org/na me"}, "`--repo` must be `owner/name`"),
        ({"repo": "a/b/c"}, "`--repo` must be `owner/name`"),
        ({"tag": "v 1"}, "`--tag` must be a name as git takes it"),
        ({"tag": "-v1"}, "`--tag` must be a name as git takes it"),
        ({"revision": "../x"}, "`--revision` must be a name as git takes it"),
        ({"revision": "a..b"}, "`--revision` must be a name as git takes it"),
        ({"create_pr": True, "tag": "v1"}, "`--create-pr` must go without `--tag`"),
        ({"create_pr": True, "revision": "dev"}, "`--create-pr` must go without `--tag`"),
    ],
)
def test_options_that_do_not_go_are_refused_by_name(
    run: Path, hub: LoopbackHub, api: HfApi, say: Told, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        push(run, **{"repo": REPO} | options, say=say, api=api)
    assert hub.requests == []


def test_a_folder_without_a_student_is_refused(tmp_path: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    with pytest.raises(ValueError, match="`RUN` must be the folder of a run"):
        push(tmp_path / "nothing", REPO, say=say, api=api)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="preprocessor_config.json is missing"):
        push(tmp_path, REPO, say=say, api=api)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="`RUN` must hold a UDON model. Got one of type 'vit'"):
        push(tmp_path, REPO, say=say, api=api)


def test_a_gallery_that_was_not_made_is_refused(run: Path, hub: LoopbackHub, api: HfApi, say: Told) -> None:
    (run / "gallery").rename(run / "elsewhere")
    with pytest.raises(ValueError, match="`--gallery` must go with a run whose test was shown.*udon report"):
        push(run, REPO, gallery=True, say=say, api=api)


def test_the_command_line_pushes_and_says_in_one_line_what_is_wrong(
    run: Path, shared_hub: LoopbackHub, run_udon: Callable[..., Any], tmp_path: Path
) -> None:
    hub = shared_hub
    done = run_udon(
        "push", run, "--license", "apache-2.0", "--repo", REPO, "--tag", "v1", **hub.environment(tmp_path / "home")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("tag v1")
    assert done.stderr == ""
    refused = run_udon(
        "push", run, "--license", "apache-2.0", "--repo", REPO, **hub.environment(tmp_path / "home", "hf_wrong_token")
    )
    assert refused.returncode == 1
    assert "(401)" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert "hf_wrong_token" not in refused.stdout + refused.stderr
    offline = run_udon(
        "push",
        run,
        "--license",
        "apache-2.0",
        "--repo",
        REPO,
        **hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"},
    )
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set; unset it" in offline.stderr and len(offline.stderr.splitlines()) == 1
    assert run_udon("push", run, "--repo", "no owner").returncode == 2
    # The token is nowhere that the process could have written.
    for path in [*run.rglob("*"), *(tmp_path / "home").rglob("*")]:
        assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes()


def test_a_run_is_pushed_when_it_ends(
    make_values: Values, run_train: Callable[..., Path], hub: LoopbackHub, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, push=TARGET | {"private": True, "tag": "v1", "gallery": True}))
    assert hub.files(REPO).keys() > FILES
    assert hub.model(REPO).private
    assert hub.model(REPO).tags == {"v1": hub.model(REPO).branches["main"]}
    assert (
        json.loads(hub.files(REPO)["results.json"])["splits"]
        == json.loads((run / "results.json").read_text())["splits"]
    )


def test_a_failed_push_at_the_end_takes_nothing_from_the_run(
    make_values: Values, hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [Fault("POST", "repos/create", 403)]
    values = make_values(tmp_path, push=TARGET)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    results = train_and_publish(load_config(path))
    run = tmp_path / "run"
    assert results is not None and json.loads((run / "results.json").read_text())["splits"] == results.results["splits"]
    told = capsys.readouterr()
    assert "its student is not on the Hub: nothing was published to org/udon-tiny" in told.out + told.err
    assert f"udon push {run} --repo {REPO}" in told.out + told.err
    hub.faults = []
    push(run, REPO, say=lambda text: None)
    assert hub.files(REPO).keys() == FILES
