"""What a domain is opened from: names and numbers of classes stay what the files say, and nothing is lost silently."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from modeling_udon.data.dataset import read_images
from modeling_udon.data.domains import open_domain
from modeling_udon.data.doubts import find_doubts
from modeling_udon.domain_spec import DomainSpec

NAMES = ["ant", "bee", "cat", "dog"]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 201, (6, 8, 3)).astype(np.uint8)


def write_png(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(picture(seed)).save(path)


def write_named(path: Path, names: list[str], classes: list[str]) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    images = [PILImage.fromarray(picture(seed)) for seed in range(len(classes))]
    rows = {"image": images, "label": [names.index(name) for name in classes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(path)


def spec_of(path: Path | str, **values: object) -> DomainSpec:
    return DomainSpec.model_validate({"path": str(path), "validation_split": None, "test_split": None, **values})


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_number_their_classes_differently_keep_their_own_names(tmp_path: Path, streaming: bool) -> None:
    write_named(tmp_path / "train-0.parquet", NAMES, ["ant", "bee"])
    write_named(tmp_path / "train-1.parquet", NAMES[::-1], ["cat", "dog", "ant"])
    write_named(tmp_path / "test.parquet", ["dog", "bee"], ["bee", "dog"])
    domain = open_domain("a", spec_of(tmp_path, test_split="test", streaming=streaming))
    assert [domain.classes[label] for label in domain.labels] == ["ant", "bee", "cat", "dog", "ant"]
    assert list(domain.evaluation["test"].query.labels) == ["bee", "dog"]


def test_text_of_metadata_csv_is_not_taken_for_numbers(tmp_path: Path) -> None:
    labels = {"train": ["007", "7", "07", "8"], "test": ["1", "2", "1", "2"]}
    for split, of_split in labels.items():
        lines = [f"{row}.png,{label}" for row, label in enumerate(of_split)]
        for row in range(4):
            write_png(tmp_path / split / f"{row}.png", row)
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines, ""]))
    domain = open_domain("a", spec_of(tmp_path, test_split="test"))
    assert domain.classes == ("007", "07", "7", "8")
    assert list(domain.evaluation["test"].query.labels) == labels["test"]


def test_a_class_named_like_a_split_does_not_lose_the_others(tmp_path: Path) -> None:
    for seed, name in enumerate(["train", "bus", "car"]):
        write_png(tmp_path / name / "1.png", seed)
    domain = open_domain("a", spec_of(tmp_path))
    assert domain.classes == ("bus", "car", "train") and len(domain.images) == 3
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,1\nbus/1.png,2\ncar/1.png,3\n")
    with pytest.raises(ValueError, match="only 1 of its 3 pictures lie in what `datasets` takes for splits"):
        open_domain("a", spec_of(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["grey", "fractions", "colours first"])
def test_arrays_are_images_of_the_same_levels(tmp_path: Path, streaming: bool, kind: str) -> None:
    pictures = [picture(seed) for seed in range(4)]
    stored = {
        "grey": [one[:, :, 0].tolist() for one in pictures],
        "fractions": [(one / 255).tolist() for one in pictures],
        "colours first": [one.transpose(2, 0, 1).tolist() for one in pictures],
    }[kind]
    pq.write_table(pa.table({"image": stored, "label": [0, 0, 1, 1]}), tmp_path / "train.parquet")
    domain = open_domain("a", spec_of(tmp_path, streaming=streaming))
    for found, expected in zip(read_images(domain.images, np.arange(4), "a"), pictures, strict=True):
        np.testing.assert_array_equal(found, expected[:, :, :1].repeat(3, 2) if kind == "grey" else expected)
    assert find_doubts(domain) == []


def test_images_of_nearly_one_value_are_told(tmp_path: Path) -> None:
    flat = [np.full((6, 8), 40 + row, np.uint8).tolist() for row in range(4)]
    pq.write_table(pa.table({"image": flat, "label": [0, 0, 1, 1]}), tmp_path / "train.parquet")
    (line,) = find_doubts(open_domain("a", spec_of(tmp_path)))
    assert line.startswith("`domains.a`: 4 of 4 images that were looked at are of nearly one value")


@pytest.mark.parametrize("whole", [False, True])
def test_what_save_to_disk_wrote_opens_with_or_without_splits(tmp_path: Path, whole: bool) -> None:
    rows = {"image": [PILImage.fromarray(picture(seed)) for seed in range(2)], "label": ["a", "b"]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")}))
    (DatasetDict({"train": data}) if whole else data).save_to_disk(str(tmp_path / "d"))
    domain = open_domain("a", spec_of(tmp_path / "d"))
    assert domain.classes == ("a", "b") and domain.opened_from is not None
    assert (domain.opened_from.builder, domain.opened_from.path) == ("save_to_disk", str(tmp_path / "d"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_relative_path_that_looks_like_a_hub_id_is_recorded_as_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    write_named(tmp_path / "data" / "client" / "train.parquet", NAMES, NAMES)
    monkeypatch.chdir(tmp_path)
    for spec in (spec_of("data/client"), spec_of("parquet", data_files="data/client/train.parquet")):
        opened = open_domain("a", spec.model_copy(update={"streaming": streaming})).opened_from
        assert opened is not None and opened.hub_id is None
        assert opened.builder == "parquet" and str(opened.path).startswith(str(tmp_path / "data" / "client"))


def write_csv(folder: Path, split: str, labels: list[str]) -> str:
    lines = ["image,label"]
    for row, label in enumerate(labels):
        write_png(folder / "pictures" / f"{split}{row}.png", row)
        lines.append(f"{folder / 'pictures' / f'{split}{row}.png'},{label}")
    (folder / f"{split}.csv").write_text("\n".join([*lines, ""]))
    return str(folder / f"{split}.csv")


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        (["007", "7", "07", "8"], ["1", "2", "1", "2"], ("007", "07", "7", "8")),
        (["NA", "null", "nan", "True"], ["a", "b", "a", "b"], ("NA", "True", "nan", "null")),
        (["1e3", "1000", "1000.0", "1_000"], ["a", "b", "a", "b"], ("1000", "1000.0", "1_000", "1e3")),
        (["10", "9", "9", "10"], ["1", "2", "1", "2"], (9, 10)),
    ],
)
def test_labels_of_a_csv_are_what_is_written_and_numbers_only_where_all_are_plain(
    tmp_path: Path, train: list[str], test: list[str], classes: tuple[object, ...]
) -> None:
    files = {"train": write_csv(tmp_path, "train", train), "test": write_csv(tmp_path, "test", test)}
    domain = open_domain("a", spec_of("csv", data_files=files, test_split="test"))
    assert domain.classes == classes
    assert [str(domain.classes[label]) for label in domain.labels] == train
    assert list(map(str, domain.evaluation["test"].query.labels)) == test


def test_an_empty_label_is_a_missing_one(tmp_path: Path) -> None:
    files = {"train": write_csv(tmp_path, "train", ["a", "", "b", "b"])}
    with pytest.raises(ValueError, match="must hold a label for every image. Got 1 empty ones in 'label', rows 1"):
        open_domain("a", spec_of("csv", data_files=files))


def test_arrow_files_that_number_their_classes_differently_keep_their_own_names(tmp_path: Path) -> None:
    for number, (names, classes) in enumerate([(NAMES, ["ant", "bee"]), (NAMES[::-1], ["cat", "dog"])]):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        rows = {"image": [PILImage.fromarray(picture(n)) for n in range(2)], "label": [names.index(c) for c in classes]}
        Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / f"part{number}")
    files = sorted(map(str, tmp_path.rglob("*.arrow")))
    domain = open_domain("a", spec_of("arrow", data_files={"train": files}))
    assert [domain.classes[label] for label in domain.labels] == ["ant", "bee", "cat", "dog"]


def test_a_class_is_one_however_its_accent_was_typed(tmp_path: Path) -> None:
    for split, names in {
        "train": ["caf\u00e9", "cafe\u0301", "tea"],
        "test": ["the\u0301", "eau"],
        "index": ["th\u00e9", "eau"],
    }.items():
        features = Features({"image": Image(), "label": Value("string")})
        images = [PILImage.fromarray(picture(number)) for number in range(len(names))]
        Dataset.from_dict({"image": images, "label": names}, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test", "index")}
    domain = open_domain("a", spec_of("parquet", data_files=files, test_split="test", test_index_split="index"))
    assert domain.classes == ("caf\u00e9", "tea") and domain.labels.tolist() == [0, 0, 1]
    assert set(domain.evaluation["test"].query.labels) == set(domain.evaluation["test"].index.labels)


def test_queries_whose_classes_the_index_names_differently_are_warned_of(tmp_path: Path) -> None:
    for split, labels in {"train": ["a", "b"], "test": ["01", "02"], "index": ["1", "2"]}.items():
        features = Features({"image": Image(), "label": Value("string")})
        images = [PILImage.fromarray(picture(number)) for number in range(2)]
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test", "index")}
    domain = open_domain("a", spec_of("parquet", data_files=files, test_split="test", test_index_split="index"))
    (doubt,) = find_doubts(domain)
    assert doubt == (
        "`domains.a`: 2 of 2 queries of test have no image of their class in the index, such as '01' among '1'; "
        "compare how both name their classes"
    )


def test_a_path_may_start_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_named(tmp_path / "data" / "train.parquet", NAMES, ["ant", "bee"])
    assert open_domain("a", spec_of("~/data")).classes == ("ant", "bee")
