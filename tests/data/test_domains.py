"""A domain opens from anything that `datasets` reads; its classes are mapped once and what is wrong is named."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.label_maps import check_label_maps, label_maps
from modeling_udon.domain_spec import DomainSpec, check_domain_name

SPLITS = ("train", "validation", "test")


def draw_png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_split(labels: list[Any], feature: Any, seed: int = 0) -> Dataset:
    images = [{"bytes": draw_png(seed + row), "path": None} for row in range(len(labels))]
    return Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": feature})
    )


def save(folder: Path, **splits: Dataset) -> DomainSpec:
    DatasetDict(splits).save_to_disk(str(folder))
    return DomainSpec(path=str(folder), **{f"{name}_split": None for name in SPLITS[1:] if name not in splits})


def save_train(folder: Path, labels: list[Any], feature: Any) -> DomainSpec:
    return save(folder, train=make_split(labels, feature))


def refuse(spec: DomainSpec) -> str:
    with pytest.raises(ValueError) as caught:
        open_domain("cars", spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "feature", "classes", "numbers"),
    [
        ([7, 3, 7, 40], Value("int64"), (3, 7, 40), [1, 0, 1, 2]),
        ([2, 0, 2], Value("uint8"), (0, 2), [1, 0, 1]),
        (["dog", "cat", "dog"], Value("string"), ("cat", "dog"), [1, 0, 1]),
        ([1, 0, 1, 3], ClassLabel(names=["zebra", "ant", "unused", "bee"]), ("ant", "bee", "zebra"), [0, 2, 0, 1]),
    ],
)
def test_labels_become_positions_in_the_sorted_classes(
    tmp_path: Path, labels: list[Any], feature: Any, classes: tuple[Any, ...], numbers: list[int]
) -> None:
    domain = open_domain("cars", save_train(tmp_path / "data", labels, feature))
    assert domain.classes == classes
    assert domain.labels.tolist() == numbers
    assert domain.labels.dtype == np.int64
    assert len(domain.images) == len(labels)


def write_parquet(folder: Path, splits: dict[str, Dataset]) -> DomainSpec:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    return DomainSpec(path=str(folder))


def write_files_by_builder(folder: Path, splits: dict[str, Dataset]) -> DomainSpec:
    write_parquet(folder, splits)
    return DomainSpec(path="parquet", data_files={name: str(folder / f"{name}.parquet") for name in splits})


def write_disk(folder: Path, splits: dict[str, Dataset]) -> DomainSpec:
    return save(folder, **splits)


def write_image_folder(folder: Path, splits: dict[str, Dataset]) -> DomainSpec:
    for name, split in splits.items():
        for row, (image, label) in enumerate(
            zip(split.cast_column("image", Image(decode=False))["image"], split["label"], strict=True)
        ):
            path = folder / name / label / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image["bytes"])
    return DomainSpec(path="imagefolder", data_dir=str(folder))


@pytest.mark.parametrize("write", [write_parquet, write_files_by_builder, write_disk, write_image_folder])
def test_a_domain_is_the_same_from_every_kind_of_source(
    tmp_path: Path, write: Callable[[Path, dict[str, Dataset]], DomainSpec]
) -> None:
    splits = {name: make_split(["a", "a", "b"], Value("string"), 10 * n) for n, name in enumerate(SPLITS)}
    domain = open_domain("cars", write(tmp_path / "data", splits))
    assert domain.classes == ("a", "b")
    assert domain.labels.tolist() == [0, 0, 1]
    assert list(domain.evaluation["test"].query.labels) == ["a", "a", "b"]
    assert domain.evaluation["test"].index is None
    for row, image in enumerate(domain.images):
        data = image["image"]["bytes"] or Path(image["image"]["path"]).read_bytes()
        assert data == draw_png(row)


def test_columns_and_splits_may_have_other_names(tmp_path: Path) -> None:
    split = make_split([5, 6], Value("int64")).rename_columns({"image": "photo", "label": "species"})
    DatasetDict({"learn": split, "ask": split, "look": split}).save_to_disk(str(tmp_path / "data"))
    spec = DomainSpec(
        path=str(tmp_path / "data"),
        image_column="photo",
        label_column="species",
        train_split="learn",
        validation_split=None,
        test_split="ask",
        test_index_split="look",
    )
    domain = open_domain("cars", spec)
    assert domain.images.column_names == ["image"]
    assert set(domain.evaluation) == {"test"}
    index = domain.evaluation["test"].index
    assert index is not None
    assert list(index.labels) == [5, 6]


@pytest.mark.parametrize(
    ("scalar", "values"),
    [(Value("int64"), [0, 1]), (Value("string"), ["ant", "bee"]), (ClassLabel(names=["ant", "bee"]), [0, 1])],
)
def test_queries_with_several_labels_name_them_as_their_index_does(
    tmp_path: Path, scalar: Any, values: list[Any]
) -> None:
    spec = save(
        tmp_path / "data",
        train=make_split(values, scalar),
        test=make_split([values, values[1:]], List(scalar)),
        gallery=make_split(values, scalar),
    ).model_copy(update={"test_index_split": "gallery"})
    test = open_domain("cars", spec).evaluation["test"]
    assert test.index is not None
    assert list(test.query.labels) == [list(test.index.labels), list(test.index.labels)[1:]]


def test_lists_of_labels_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    one, many = make_split([0, 1], Value("int64")), make_split([[0, 1], [1]], List(Value("int64")))
    spec = save(tmp_path / "train", train=many)
    assert "must hold one class for each training image. Got lists in 'label'" in refuse(spec)
    spec = save(tmp_path / "own", train=one, test=many)
    message = refuse(spec)
    assert "must hold one class for each image that is searched. Got lists in split 'test'" in message
    assert "need `test_index_split`" in message
    spec = save(tmp_path / "index", train=one, test=one, gallery=many)
    assert "Got lists in split 'gallery'" in refuse(spec.model_copy(update={"test_index_split": "gallery"}))


def test_what_is_wrong_with_the_data_is_named(tmp_path: Path) -> None:
    split = make_split([0, 1], Value("int64"))
    spec = save(tmp_path / "data", train=split)
    assert refuse(spec.model_copy(update={"train_split": "trian"})) == (
        f"`domains.cars.train_split` must be a split of {spec.path}: train. Got 'trian'; name one, or let "
        "`udon prepare` share the classes out over splits."
    )
    for field in ("image_column", "label_column"):
        assert refuse(spec.model_copy(update={field: "x"})) == (
            f"`domains.cars.{field}` must be a column of split 'train': image, label. Got 'x'."
        )
    assert refuse(spec.model_copy(update={"image_column": "label"})) == (
        "`domains.cars.image_column` must hold images. Got int64 in 'label'."
    )
    assert refuse(save_train(tmp_path / "float", [0.5], Value("float32"))) == (
        "`domains.cars.label_column` must hold integers, ClassLabel or strings. Got float in 'label'; "
        "name another column, or write the classes as text."
    )
    assert refuse(save_train(tmp_path / "null", [1, None], Value("int64"))) == (
        "`domains.cars.label_column` must hold a label for every image. Got 1 empty ones in 'label', rows 1."
    )
    nothing = make_split([], Value("int64"))
    for spec in (
        write_parquet(tmp_path / "empty parquet", {"train": nothing}),
        DomainSpec(path=str(tmp_path / "nowhere")),
    ):
        assert refuse(spec).startswith(f"`domains.cars.path` must be a data set that opens. Got '{spec.path}': ")


@pytest.mark.parametrize("name", ["cars", "food2k", "1st", "a_b-C"])
def test_a_plain_name_is_a_domain_name(name: str) -> None:
    assert check_domain_name(name) == name


@pytest.mark.parametrize("name", ["a.b", "", "_a", "a b", "ä"])
def test_a_name_with_other_characters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be named with letters, digits, '_' and '-'"):
        check_domain_name(name)


@pytest.mark.parametrize("name", ["keys", "type", "forward", "pop"])
def test_a_name_that_a_module_needs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"must not be named like a method of a module. Got '{name}'"):
        check_domain_name(name)


def write_maps(path: Path, domains: dict[str, Domain]) -> Path:
    path.write_text(json.dumps(label_maps(domains)))
    return path


def test_the_label_maps_of_the_same_data_agree(tmp_path: Path) -> None:
    spec = save_train(tmp_path / "data", ["b", "a"], Value("string"))
    maps = write_maps(tmp_path / "domains.json", {"cars": open_domain("cars", spec)})
    assert json.loads(maps.read_text())["cars"]["classes"] == ["a", "b"]
    check_label_maps({"cars": open_domain("cars", spec)}, maps)


@pytest.mark.parametrize(
    ("labels", "seed", "what"),
    [
        (["a", "b", "c"], 0, "num_classes changed: 2 then, 3 now"),
        (["a", "b"], 0, "num_images changed: 3 then, 2 now"),
        (["a", "c", "c"], 0, "classes changed: 'b' then, 'c' now; bring the old data back or start a new run."),
        (["a", "a", "b"], 0, "fingerprint changed: "),
        (["a", "b", "b"], 50, "fingerprint changed: "),
    ],
)
def test_changed_data_does_not_agree(tmp_path: Path, labels: list[str], seed: int, what: str) -> None:
    old = save_train(tmp_path / "old", ["a", "b", "b"], Value("string"))
    maps = write_maps(tmp_path / "domains.json", {"cars": open_domain("cars", old)})
    new = save(tmp_path / "new", train=make_split(labels, Value("string"), seed))
    with pytest.raises(ValueError, match=f"`domains.cars` must hold the data the run was started with. Its {what}"):
        check_label_maps({"cars": open_domain("cars", new)}, maps)
    with pytest.raises(ValueError, match="must be those the run was started with, cars. Got sop"):
        check_label_maps({"sop": open_domain("sop", new)}, maps)


def test_a_domain_of_one_class_is_refused(tmp_path: Path) -> None:
    message = refuse(save_train(tmp_path / "d", ["cat", "cat"], Value("string")))
    assert "`domains.cars.label_column` must hold at least two training classes. Got ['cat']" in message
