"""Bad configs and data sets: one clear line each, exit code 2, before any work and with nothing written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_udon
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.strict_yaml import MAX_DEPTH, load_strict
from modeling_udon.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
BACKBONE = "model__backbone_config"
DOMAIN = "domains__blobs"

Edit = Callable[[pa.Table], pa.Table | None]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a bad config is made."""

    folder: Path
    domains: Path
    tiny_config: Callable[..., Path]


Make = Callable[[Place], Path]


def values(**changes: Any) -> Make:
    return lambda place: place.tiny_config(**changes)


def text(content: str | bytes) -> Make:
    def write(place: Place) -> Path:
        path = place.folder / "bad.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def data(edit: Edit, *splits: str, **changes: Any) -> Make:
    """A domain in which some splits, or all, are edited, or left out where the edit gives nothing."""

    def write(place: Place) -> Path:
        folder = place.folder / "bad"
        folder.mkdir()
        for split in ("train", "validation", "test"):
            table = pq.read_table(place.domains / "blobs" / f"{split}.parquet")
            table = edit(table) if split in splits or not splits else table
            if table is not None:
                pq.write_table(table, folder / f"{split}.parquet")
        return place.tiny_config(**{f"{DOMAIN}__path": str(folder)}, **changes)

    return write


def files(**contents: bytes) -> Make:
    """A folder of files in place of a domain; `_` stands for the dot of a name."""

    def write(place: Place) -> Path:
        folder = place.folder / "bad"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return place.tiny_config(**{f"{DOMAIN}__path": str(folder)})

    return write


def labels(change: Callable[[int], Any], type_: pa.DataType | None = None) -> Edit:
    def edit(table: pa.Table) -> pa.Table:
        changed = pa.array([change(label) for label in table["label"].to_pylist()], type_)
        return table.drop_columns(["label"]).append_column("label", changed).replace_schema_metadata(None)

    return edit


def class_label(change: Callable[[int], int]) -> Edit:
    """Labels that say of themselves to be one of three classes."""

    def edit(table: pa.Table) -> pa.Table:
        features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
        about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        return labels(change, pa.int64())(table).replace_schema_metadata(about)

    return edit


def base_loop(place: Place) -> Path:
    (place.folder / "other.yaml").write_text("base: bad.yaml")
    return text("base: other.yaml")(place)


NO_TEACHERS = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}

KINDS: dict[str, tuple[Make, str]] = {
    # The file.
    "a folder": (lambda place: place.folder, "`config` must be a file that can be read"),
    "not there": (lambda place: place.folder / "none.yaml", "No such file or directory"),
    "empty": (text(""), "`config` must hold keys with values. Got NoneType"),
    "binary": (text(bytes(range(256))), "`config` must be a UTF-8 text file"),
    "Latin-1": (text("name: café".encode("latin-1")), "`config` must be a UTF-8 text file"),
    "control characters": (text("name: a\x07"), "`config` must be valid YAML"),
    "a list": (text("- name: x"), "`config` must hold keys with values. Got list"),
    "a text": (text("train please"), "`config` must hold keys with values. Got str"),
    "two documents": (text("a: 1\n---\nb: 2"), "line 2: but found another document"),
    "a bracket left open": (text("name: [x"), "`config` must be valid YAML"),
    "a tab for an indent": (text("train:\n\tnum_steps: 3"), "line 2: found character"),
    "a domain twice": (text("domains:\n  a: x\n  a: y"), "line 3: the key `a` is given twice; remove one."),
    "a section twice": (text("optim: {lr: 1}\nname: x\noptim: {}"), "line 3: the key `optim` is given twice"),
    "an alias of itself": (text("a: &a [*a]"), "the alias *a must be written out"),
    "nested without end": (text("a: " + "[" * 3000), "values must be nested at most 32 deep"),
    "the 99th of a month": (text("name: 2001-01-99"), "a value cannot be read: day is out of range"),
    "a call in Python": (text("!!python/object/apply:os.system [id]"), "could not determine a constructor"),
    "a base of itself": (base_loop, "`base` must not lead back to its own file"),
    "a base that is a list": (text("base: [a]"), "No such file or directory"),
    "an undefined variable": (values(output_dir="${UDON_NOWHERE}"), "`${UDON_NOWHERE}` must be set"),
    "a secret": (values(push__repo="me/${HF_TOKEN}"), "`${HF_TOKEN}` must stay out of a config"),
    # Its keys and values.
    "a key that is no text": (text("1: 2"), "`name` is missing"),
    "a typo in a section": (values(trian={}), "`trian` is not a key of"),
    "a null character": (values(output_dir="a\0b"), "`config` must hold text without null characters"),
    "a name of 300 letters": (values(name="x" * 300), "`name`: string should have at most 200 characters"),
    "a name with a newline": (values(name="a\nb"), "`name`: string should match pattern"),
    "a section that is a number": (values(optim=3), "`optim`: input should be a valid dictionary"),
    "a text for a number": (values(train__batch_size="many"), "`train.batch_size`: input should be a valid integer"),
    "a negative learning rate": (values(optim__lr=-1e-3), "`optim.lr`: input should be greater than or equal to 0"),
    "NaN": (values(optim__weight_decay=float("nan")), "`optim.weight_decay`: input should be a finite number"),
    "half of a step": (values(train__num_steps=2.5), "`train.num_steps`: input should be a valid integer"),
    "epochs without end": (values(train={"num_epochs": 1e308}), "`train.num_epochs`: input should be less than"),
    "a seed of 400 digits": (values(seed=10**400), "`seed`: input should be less than"),
    "a standard deviation of 0": (values(data__image_std=[0, 1, 1]), "`data.image_std.0`: input should be greater"),
    "two channels": (values(data__image_mean=[0.5, 0.5]), "`data.image_mean.2` is missing"),
    "a hidden layer of width 0": (values(model__head_hidden_dims=[0]), "`model.head_hidden_dims.0`: input should be"),
    "no weight for a domain": (
        values(sampling={"strategy": "fixed", "weights": {"blobs": 1}}), "`sampling.weights` must give a positive"
    ),
    "a system that is a list": (values(system=["udon"]), "`system`: input should be 'udon', "),
    "a system and its opposite": (values(system="uscrr", loss__teacher_classification=1), "for system 'uscrr'"),
    "teachers that nobody needs": (values(teachers="runs/x"), "`teachers` must name trained runs"),
    "teachers that are not there": (values(system="separate_teachers", teachers="runs/x"), "`teachers` must be runs"),
    "a signal of no teacher": (values(loss=NO_TEACHERS), "`ablation.signal` must be 'student'"),
    "a tracker that is missing": (values(log__trackers=["wandb"]), "`log.trackers` must be installed. Got 'wandb'"),
    # The backbone.
    "an unknown backbone": (values(model={"backbone": "org/none"}), "`model.backbone` must be a vision encoder that"),
    "a backbone of text": (values(**{BACKBONE: {"model_type": "bert"}}), "must be a vision encoder"),
    "patches that do not fill the image": (
        values(data__image_size=20, **{f"{BACKBONE}__image_size": 20}), "must be a multiple of the backbone's patch"
    ),
    "patches of size 0": (values(**{f"{BACKBONE}__patch_size": 0}), "`patch_size` must be at least 1. Got 0."),
    "a width that is a text": (values(**{f"{BACKBONE}__hidden_size": "16"}), "must be a vision encoder"),
    "a backbone for grey images": (values(**{f"{BACKBONE}__num_channels": 1}), "images of 3 channels, RGB. Got"),
    # The domains.
    "domains in a list": (values(domains=["a"]), "`domains`: input should be a valid dictionary"),
    "a domain named like a method": (values(domains={"forward": "x"}), "must not be named like a method of a module"),
    "a domain without a source": (values(**{DOMAIN: None}), "`domains.blobs`: input should be"),
    "a folder that is not there": (values(**{f"{DOMAIN}__path": "/nowhere"}), "`domains.blobs.path` must be a"),
    "a folder without data": (files(), "doesn't contain any data files"),
    "damaged JSON": (files(train__json=b"{"), "must be a data set that opens"),
    "a damaged archive": (files(train__zip=b"PK\3\4x"), "File is not a zip file"),
    "a script": (files(bad__py=b"raise SystemExit('it ran')"), "must be a data set that opens"),
    "no training split": (data(lambda table: None, "train"), "`domains.blobs.train_split` must be a split of"),
    "no rows": (data(lambda table: table.slice(0, 0), "train"), "a Parquet file of it has no rows"),
    "one class": (data(labels(lambda label: 1), "train"), "must hold at least two training classes. Got [1]"),
    "a label out of range": (data(class_label(lambda label: label)), "must hold classes of its ClassLabel, 0 to 2."),
    "a negative label": (data(class_label(lambda label: -1)), "must hold classes of its ClassLabel, 0 to 2. Got -1"),
    "labels that are NaN": (data(labels(lambda label: float("nan"))), "must hold integers, ClassLabel or strings. Got"),
    "labels that are missing": (data(labels(lambda label: label or None)), "must hold a label for every image. Got 10"),
    "training labels in lists": (data(labels(lambda label: [label, 9])), "must hold one class for each training image"),
    "no column of labels": (data(lambda table: table.drop_columns(["label"])), "must be a column of split 'train'"),
    "no column of images": (data(lambda table: table.drop_columns(["image"])), "must be a column of split 'train'"),
    "no validation split": (data(lambda table: None, "validation"), "`domains.blobs.validation_split` must be a split"),
    "a split without labels": (data(lambda table: table.drop_columns(["label"]), "test"), "must hold a label for"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_domains: Path, tiny_config: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_domains, tiny_config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_config_is_one_line_and_exit_code_2_before_any_work(
    kind: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    def no_work(self: Trainer, *values: Any) -> None:
        raise AssertionError("work was started")

    make, words = KINDS[kind]
    monkeypatch.setattr(sys, "argv", ["train_udon.py", "--config", str(make(place))])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for verb in ("catch_up", "train_step"):
        monkeypatch.setattr(Trainer, verb, no_work)
    capsys.readouterr()
    assert train_udon.main() == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and words in line and "hf_secret" not in line
    assert not (place.folder / "runs").exists()
    tell("kinds of bad configs and data sets, each refused before any work", 1, 0)


def test_60_kinds_are_tried() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize("kind", ["a domain twice", "one class"])
def test_the_launch_script_ends_in_the_same_way(kind: str, place: Place) -> None:
    make, words = KINDS[kind]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_udon.py"), "--config", str(make(place))],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and words in done.stderr.splitlines()[-1]


def test_classes_of_the_evaluation_that_are_trained_on_are_counted_in_a_warning(
    place: Place, run_train, capsys
) -> None:
    # Training has the classes 0 to 2, ten images each; of validation's 3 to 5 two become 0 and 1, of the test's none.
    path = data(labels(lambda label: label - 3 if label < 5 else label), "validation")(place)
    run_train(yaml.safe_load(path.read_text()) | {"train": {"num_steps": 1, "batch_size": 16}})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: `domains")]
    assert lines == [
        "WARNING: `domains.blobs`: 2 of 3 classes of validation are trained on as well (20 of 30 queries); "
        "its scores are not those of new classes"
    ]


def test_strict_yaml_reads_what_plain_yaml_reads() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert load_strict(path.read_text()) == yaml.safe_load(path.read_text())
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert load_strict(nested) == yaml.safe_load(nested)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
SECTIONS = {name: field.annotation for name, field in TrainConfig.model_fields.items()}
KEYS = sorted(
    {*SECTIONS, "base", "", "blobs", "path", "model_type"}
    | {key for section in SECTIONS.values() for key in getattr(section, "model_fields", {})}
)
ANYTHING = st.recursive(
    SCALARS | st.sampled_from(["${HOME}", "${NOWHERE}", "no", "1e-3", "udon", "vit", "\x1b[31m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, inner, max_size=4),
    max_leaves=12,
)
OVERRIDES = st.lists(
    st.tuples(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), st.text(max_size=10) | ANYTHING.map(repr)).map(
        lambda pair: f"--{'.'.join(pair[0])}={pair[1]}"
    )
    | st.text(max_size=12),
    max_size=3,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FUZZED = "random configs, command lines and old runs, each read or refused in a line"


def load_or_refuse(path: Path, *more: Any) -> None:
    try:
        load_config(path, *more)
    except ConfigError as error:
        assert str(error).isprintable() and str(error)


@FUZZ
@given(sections=st.dictionaries(st.sampled_from(sorted(SECTIONS)), ANYTHING, max_size=4), overrides=OVERRIDES)
def test_whatever_a_config_holds_only_a_config_error_leaves_the_loader(
    place: Place, tell: Tell, sections: dict[str, Any], overrides: list[str]
) -> None:
    path = place.tiny_config(**sections)
    load_or_refuse(path, overrides)
    tell(FUZZED, 1, 0)


@pytest.fixture
def trained(place: Place) -> Path:
    """As much of a trained run as is looked at before its weights are."""
    run = place.folder / "trained"
    for file in ("best/config.json", "checkpoints/best/model.safetensors"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).touch()
    (run / "config.yaml").write_text(place.tiny_config().read_text() + "versions: {}\n")
    return run


@FUZZ
@given(sections=st.dictionaries(st.sampled_from(sorted(SECTIONS)), ANYTHING, max_size=4), overrides=OVERRIDES)
@example(sections={"init": None}, overrides=[])
@example(sections={"init": 3}, overrides=[])
@example(sections={"domains": 3}, overrides=["--init.old_data=none"])
def test_whatever_goes_with_a_run_to_start_from_only_a_config_error_leaves_the_loader(
    place: Place, trained: Path, tell: Tell, sections: dict[str, Any], overrides: list[str]
) -> None:
    path = place.folder / "more.yaml"
    path.write_text(yaml.safe_dump(sections))
    for added in ([], ["more=somewhere"]):
        load_or_refuse(path, overrides, [], trained, added)
    tell(FUZZED, 1, 0)


@FUZZ
@given(content=st.text(max_size=60) | ANYTHING.map(repr))
@example(content="")
@example(content="domains: {a: {}}")
def test_whatever_the_config_of_a_run_to_start_from_holds_only_a_config_error_leaves_the_loader(
    place: Place, trained: Path, tell: Tell, content: str
) -> None:
    (trained / "config.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    load_or_refuse(None, ["--name", "new"], [], trained, ["more=somewhere"])
    tell(FUZZED, 1, 0)


def test_a_section_of_the_run_to_start_from_may_be_empty(place: Place, trained: Path) -> None:
    path = text("name: new\ninit:")(place)
    assert load_config(path, (), (), trained).init.run == trained


@FUZZ
@given(content=st.text(max_size=60) | ANYTHING.map(repr) | st.text("{}[]:,-&*!|>%@#?'\" \n\tab0.~", max_size=60))
def test_whatever_a_file_holds_only_a_config_error_leaves_the_loader(place: Place, tell: Tell, content: str) -> None:
    load_or_refuse(text(content.encode("utf-8", "surrogatepass"))(place))
    load_or_refuse(place.tiny_config(), [f"--model.backbone={content}"], [content])
    tell(FUZZED, 1, 0)
