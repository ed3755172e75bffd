"""Streamed domains: every row once an epoch, decided by its place alone; the images are those of the files."""

import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_udon.data import streaming
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.label_maps import check_label_maps, label_maps
from modeling_udon.data.sampling import DomainBatchSampler
from modeling_udon.data.windows import RowGroups, WindowShuffle
from modeling_udon.domain_spec import DomainSpec


def write(path: Path, labels: list[Any], group_size: int, *, first: int = 0, feature: Any = None) -> None:
    """Writes rows whose images are their number as text; whoever reads them decodes nothing."""
    features = Features({"image": Image(), "label": feature or Value("int64")})
    images = [{"bytes": f"image {first + row}".encode(), "path": f"{first + row}.png"} for row in range(len(labels))]
    table = pa.Table.from_pydict({"image": images, "label": labels}, schema=features.arrow_schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_size)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streaming.datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(3):
        write(tmp_path / "data" / f"train-{number}.parquet", [r % 5 for r in range(50)], 7, first=50 * number)
    write(tmp_path / "data" / "test-0.parquet", [8, 8, 9], 2, first=1000)
    return tmp_path / "data"


def spec(folder: Path, **changes: Any) -> DomainSpec:
    return DomainSpec(**({"path": str(folder), "streaming": True, "validation_split": None} | changes))


def stored(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "udon-row-groups").glob("*/*"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(0, 5),
    st.integers(1, 7),
)
def test_an_epoch_has_every_row_once_and_near_places_lie_in_few_row_groups(
    sizes: list[int], window: int, epoch: int, step: int
) -> None:
    shuffle = WindowShuffle(RowGroups(np.asarray(sizes), window), (3, 1, epoch))
    total = sum(sizes)
    rows = np.concatenate([shuffle.rows(np.arange(start, min(start + step, total))) for start in range(0, total, step)])
    assert sorted(rows.tolist()) == list(range(total))
    backwards = WindowShuffle(RowGroups(np.asarray(sizes), window), (3, 1, epoch))
    assert [int(backwards.rows(np.array([place]))[0]) for place in reversed(range(total))] == rows[::-1].tolist()
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    runs = group_of_row[rows]
    for group in range(len(sizes)):
        places = np.flatnonzero(runs == group)
        assert places[-1] - places[0] < window + max(sizes)


def test_rows_of_one_group_are_spread_over_their_window_and_epochs_differ() -> None:
    groups = RowGroups(np.full(40, 10), 100)
    orders = [WindowShuffle(groups, (0, 0, epoch)).rows(np.arange(400)) for epoch in (0, 1)]
    assert not np.array_equal(*orders)
    # A batch of 32 from a window of ten groups sees most of them.
    assert all(len(np.unique(orders[0][start : start + 32] // 10)) >= 7 for start in range(0, 384, 100))


def read_all(domain: Domain) -> list[bytes]:
    return [image["bytes"] for image in domain.images[np.arange(len(domain.images)).tolist()]["image"]]


def test_a_streamed_domain_is_the_domain_that_is_not(folder: Path) -> None:
    streamed, whole = open_domain("cars", spec(folder)), open_domain("cars", spec(folder, streaming=False))
    assert read_all(streamed) == read_all(whole) == [f"image {row}".encode() for row in range(150)]
    assert streamed.images[3] == whole.images[3]
    assert streamed.images[140:148] == whole.images[140:148]
    assert streamed.labels.tolist() == whole.labels.tolist() and streamed.classes == whole.classes
    queries = [domain.evaluation["test"].query for domain in (streamed, whole)]
    assert [list(query.labels) for query in queries] == [[8, 8, 9]] * 2
    assert queries[0].images[[2, 0]] == queries[1].images[[2, 0]]
    assert streamed.row_groups is not None and streamed.row_groups.sizes.tolist() == ([7] * 7 + [1]) * 3
    assert whole.row_groups is None


@pytest.mark.parametrize(
    ("feature", "labels", "classes"),
    [
        (Value("string"), ["b", "a", "b"], ("a", "b")),
        (ClassLabel(names=["zebra", "ant"]), [0, 1, 0], ("ant", "zebra")),
        (Sequence(Value("int64")), [[4], [2], [4]], (2, 4)),
    ],
)
def test_labels_of_every_kind_are_read(tmp_path: Path, feature: Any, labels: list[Any], classes: tuple[Any]) -> None:
    write(tmp_path / "train.parquet", labels, 2, feature=feature)
    domain = open_domain("cars", spec(tmp_path, test_split=None))
    assert domain.classes == classes and len(domain.labels) == 3
    assert domain.labels[0] == domain.labels[2] != domain.labels[1]


def test_opening_reads_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[Any] = []
    read = pq.ParquetFile.read

    def watched(self: pq.ParquetFile, *args: Any, **options: Any) -> pa.Table:
        columns.append(options["columns"])
        return read(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *args, **options: pytest.fail("read images"))
    open_domain("cars", spec(folder))
    assert columns == [["label"]] * 4 and stored(folder) == []


def test_the_store_keeps_the_row_groups_of_two_windows(folder: Path) -> None:
    images = open_domain("cars", spec(folder, shuffle_window=14)).images
    for row in range(150):
        assert images[row]["image"]["bytes"] == f"image {row}".encode()
        assert len(stored(folder)) <= 2 + 5
    assert len(stored(folder)) == 2 + 5
    assert {path.suffix for path in stored(folder)} == {".arrow"}


def _read_as_worker(domain: Domain, answers: Any) -> None:
    answers.put(read_all(domain))


def test_processes_share_what_one_of_them_has_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = open_domain("cars", spec(folder))
    context = get_context("fork")
    reads, read_row_group = context.Value("i", 0), pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, *args: Any, **options: Any) -> pa.Table:
        with reads.get_lock():
            reads.value += 1
        return read_row_group(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    answers = context.Queue()
    workers = [context.Process(target=_read_as_worker, args=(domain, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    expected = [f"image {row}".encode() for row in range(150)]
    assert [answers.get(timeout=60) for _ in workers] == [expected] * 4
    for worker in workers:
        worker.join(60)
    assert reads.value == 24


def test_what_was_stored_a_moment_ago_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_domain("cars", spec(folder)).images[0]
    (path,) = stored(folder)
    images, look = open_domain("cars", spec(folder)).images, pa.memory_map
    looks = [path]

    def look_too_early(place: str) -> Any:
        if looks:
            raise FileNotFoundError(looks.pop())
        return look(place)

    monkeypatch.setattr(streaming.pa, "memory_map", look_too_early)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    assert images[0] == first and looks == []
    assert stored(folder) == [path]


def test_a_row_group_that_was_cut_short_is_stored_again(folder: Path) -> None:
    images = open_domain("cars", spec(folder)).images
    assert images[0]["image"]["bytes"] == b"image 0"
    (path,) = stored(folder)
    path.rename(path.with_suffix(".part"))
    path.with_suffix(".part").write_bytes(path.with_suffix(".part").read_bytes()[:-20] + b"x" * 5000)
    assert open_domain("cars", spec(folder)).images[0]["image"]["bytes"] == b"image 0"
    assert stored(folder) == [path]


def test_changed_files_are_not_read_from_the_store(folder: Path) -> None:
    assert open_domain("cars", spec(folder)).images[0]["image"]["bytes"] == b"image 0"
    write(folder / "train-0.parquet", [r % 5 for r in range(50)], 7, first=500)
    assert open_domain("cars", spec(folder)).images[0]["image"]["bytes"] == b"image 500"


def test_other_data_under_the_same_name_does_not_agree(folder: Path, tmp_path: Path) -> None:
    maps = tmp_path / "domains.json"
    maps.write_text(json.dumps(label_maps({"cars": open_domain("cars", spec(folder))})))
    check_label_maps({"cars": open_domain("cars", spec(folder))}, maps)
    write(folder / "train-2.parquet", [r % 5 for r in range(50)], 7, first=10_000)
    with pytest.raises(ValueError, match="Its fingerprint changed"):
        check_label_maps({"cars": open_domain("cars", spec(folder))}, maps)


def test_two_ranks_and_a_resumed_sampler_draw_what_one_process_draws(folder: Path) -> None:
    domain = open_domain("cars", spec(folder, shuffle_window=30))

    def make(**options: int) -> DomainBatchSampler:
        assert domain.row_groups is not None
        return DomainBatchSampler(
            {"cars": 150}, 40, 8, seed=1, update_every=9, row_groups={"cars": domain.row_groups}, **options
        )

    def draw(sampler: DomainBatchSampler, num_steps: int) -> list[list[int]]:
        rows: list[list[int]] = []
        while sampler.step < num_steps:
            for batch in sampler:
                rows.append(batch.rows.tolist())
                sampler.advance()
                if sampler.step == num_steps:
                    break
        return rows

    whole = draw(make(), 40)
    assert sorted(sum(whole, [])[:150]) == list(range(150))
    ranks = [draw(make(rank=rank, world_size=2), 40) for rank in (0, 1)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole
    stopped, resumed = make(), make()
    draw(stopped, 23)
    state = json.dumps(stopped.state_dict())
    assert len(state) < 400
    resumed.load_state_dict(json.loads(state))
    assert draw(resumed, 40) == whole[23:]


def refuse(folder: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_domain("cars", spec(folder, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_streamed_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`domains.cars.path` must be a data set that opens. Got 'demo:letters'" in refuse(
        folder, path="demo:letters"
    )
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("image,label\na,1\n")
    assert "must consist of Parquet files, not of csv" in refuse(tmp_path / "csv")
    assert "`domains.cars.label_column` must be a column of split 'train': image, label. Got 'x'." in refuse(
        folder, label_column="x"
    )
    assert "`domains.cars.image_column` must hold images. Got int64 in 'label'." in refuse(folder, image_column="label")
    write(tmp_path / "none" / "train.parquet", [], 7)
    assert "hold no rows" in refuse(tmp_path / "none")
    monkeypatch.setattr(streaming, "MAX_GROUP_BYTES", 50)
    message = refuse(folder)
    assert "`domains.cars.streaming` must have row groups of at most 0 MiB of images. Got 0 MiB in " in message
    assert "train-2.parquet; write the files again with row groups of about 100 images" in message


def test_streamed_images_are_selected_as_those_of_a_data_set(folder: Path) -> None:
    images = open_domain("cars", spec(folder)).images
    chosen = images.select(np.array([50, 2, 149])).select(np.array([2, 0]))
    assert len(chosen) == 2 and len(images) == 150
    assert [row["bytes"] for row in chosen[[0, 1]]["image"]] == [b"image 149", b"image 50"]
    assert chosen[1]["image"]["bytes"] == b"image 50"
