"""Queries of every kind, filters and groups through `udon search`, and changes through `udon index`, by command."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_udon.encoder import Encoder
from modeling_udon.search.letterbox import letterboxed
from modeling_udon.search.query import search_images

pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def shop(tmp_path_factory, student):
    """20 pictures of 10 products in a Parquet file with prices, as files too, embedded and indexed."""
    from modeling_udon.search.embed import SourceSpec, embed
    from modeling_udon.search.index import build_index

    folder, generator = tmp_path_factory.mktemp("shop"), np.random.default_rng(3)
    (folder / "files").mkdir()
    rows = []
    for number in range(20):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
        (folder / "files" / f"{number:02d}.png").write_bytes(file.getvalue())
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "sku": f"s{number}"})
        rows[-1] |= {"price": float(number), "product": f"p{number // 2}", "brand": "xy"[number % 2]}
    pq.write_table(pa.Table.from_pylist(rows), folder / "shop.parquet")
    spec = SourceSpec(
        str(folder / "shop.parquet"), image_column="image", columns=["price", "product", "brand"], id_column="sku"
    )
    embed(spec, Encoder.open(str(student)), folder / "e", num_workers=0)
    build_index([folder / "e"], folder / "i")
    return folder


@pytest.fixture
def ask(udon, shop, student):
    def run(*arguments, model=True):
        more = ("--model", student) if model else ()
        done = udon("search", *arguments, "--index", shop / "i", *more, "--json")
        assert done.code == 0, done.err
        return [[found["id"] for found in query["neighbours"]] for query in json.loads(done.out)["queries"]]

    return run


@pytest.fixture
def vectors(shop):
    table = pq.read_table(shop / "e")
    return np.array(table["embedding"].to_pylist(), np.float32)


def best(scores, k, keep=lambda row: True):
    return [f"s{row}" for row in np.argsort(-scores, kind="stable") if keep(row)][:k]


def test_a_condition_leaves_as_many_as_asked_for_or_all_there_are(ask, shop, vectors):
    query = shop / "files" / "03.png"
    assert ask(query, "-k", 4, "--where", "price < 12 and brand = 'x'") == [
        best(vectors @ vectors[3], 4, lambda row: row < 12 and row % 2 == 0)
    ]
    assert ask(query, "-k", 9, "--where", "price >= 18") == [best(vectors @ vectors[3], 9, lambda row: row >= 18)]
    assert ask(query, "--where", "price > 100") == [[]]


def test_each_product_is_found_once_and_the_query_itself_not_at_all(ask, shop, vectors):
    scores = vectors @ vectors[3]
    expected, seen = [], set()
    for name in best(scores, 20, lambda row: row != 3):
        product = int(name[1:]) // 2
        if product not in seen:
            seen.add(product)
            expected.append(name)
    assert ask(shop / "files" / "03.png", "-k", 10, "--group-by", "product", "--exclude-self") == [expected]


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_several_pictures_are_one_query(ask, shop, vectors, combine):
    mean = vectors[[2, 7, 9]].mean(axis=0)
    scores = vectors @ (mean / np.linalg.norm(mean)) if combine == "mean" else (vectors[[2, 7, 9]] @ vectors.T).max(0)
    files = [shop / "files" / f"{number:02d}.png" for number in (2, 7, 9)]
    found, expected = ask(*files, "--combine", combine, "-k", 6)[0], best(scores, 6)
    assert set(found[:3]) == set(expected[:3]) and found[3:] == expected[3:]  # with max, three are equal to a picture
    others = best(scores, 6, lambda row: row not in (2, 7, 9))
    assert ask(*files, "--combine", combine, "-k", 6, "--exclude-self") == [others]
    grouped = ask(*files, "--combine", combine, "-k", 10, "--group-by", "product")[0]
    assert len({int(name[1:]) // 2 for name in grouped}) == len(grouped) == 10
    assert grouped[0] in expected[:3]


def test_more_like_a_row_needs_no_model_and_leaves_the_row_out(ask, vectors):
    expected = [best(vectors @ vectors[row], 3, lambda other, row=row: other != row) for row in (5, 8)]
    assert ask("--like", "s5", "row:8", "-k", 3, model=False) == expected


def test_lists_the_standard_input_and_embeddings_are_queries(ask, shop, vectors, tmp_path, monkeypatch):
    expected = [best(vectors @ vectors[row], 3) for row in (4, 6)]
    names = "".join(f"{shop}/files/{row:02d}.png\n" for row in (4, 6))
    (tmp_path / "list.txt").write_text(names)
    assert ask(tmp_path / "list.txt", "-k", 3) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(names))
    assert ask("-", "-k", 3, "--batch-size", 1) == expected
    pq.write_table(pa.table({"embedding": vectors[[4, 6]].tolist(), "id": ["a", "b"]}), tmp_path / "q.parquet")
    assert ask(tmp_path / "q.parquet", "-k", 3, model=False) == expected
    assert ask(shop / "e", "-k", 3, model=False)[4:7:2] == expected


def test_a_line_of_json_is_printed_for_each_query(udon, shop, student):
    arguments = ("--index", shop / "i", "--model", student, "-k", 2)
    done = udon("search", shop / "files", *arguments, "--jsonl")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert lines == json.loads(udon("search", shop / "files", *arguments, "--json").out)["queries"]
    assert len(lines) == 20 and lines[7]["neighbours"][0]["id"] == "s7"


def test_a_box_of_the_query_is_cut_out_first(shop, student, tmp_path):
    encoder = Encoder.open(str(student))
    pixels = np.array(Image.open(shop / "files" / "03.png"))
    Image.fromarray(pixels[5:15, 2:20]).save(tmp_path / "cut.png")
    first = search_images([shop / "files" / "03.png"], shop / "i", encoder, box=(2, 5, 18, 10))
    second = search_images([tmp_path / "cut.png"], shop / "i", encoder)
    assert first.queries[0].neighbours == second.queries[0].neighbours


def test_an_index_of_padded_images_pads_its_queries(udon, shop, student, tmp_path):
    more = ("--model", student, "--num-workers", 0)
    assert udon("embed", shop / "files", "--out", tmp_path / "e", "--letterbox", *more).code == 0
    assert udon("index", tmp_path / "e", "--out", tmp_path / "i").code == 0
    found = search_images([shop / "files" / "03.png"], tmp_path / "i", Encoder.open(str(student)), k=1).queries[0]
    assert found.neighbours[0].path == "03.png" and found.neighbours[0].score == pytest.approx(1, abs=1e-5)
    padded = letterboxed(Encoder.open(str(student)))
    image = np.array(Image.open(shop / "files" / "03.png"))
    square = np.full((24, 24, 3), padded.transform.colour, np.uint8)
    square[2:22] = image
    np.testing.assert_allclose(
        padded.encode([image]).embeddings, Encoder.open(str(student)).encode([square]).embeddings, atol=1e-6
    )


def test_an_index_is_changed_by_command(udon, shop, student, tmp_path):
    shutil.copytree(shop / "e", tmp_path / "e")
    out = ("--out", tmp_path / "i")
    assert udon("index", tmp_path / "e", *out).code == 0
    assert "0 images added, 2 removed" in udon("index", *out, "--remove", "s1", "s2").out
    (tmp_path / "ids.txt").write_text("s3\r\ns4\n")
    assert "0 images added, 2 removed" in udon("index", *out, "--remove-list", tmp_path / "ids.txt").out
    done = udon("index", *out, "--remove-where", "price >= 15")
    assert "0 images added, 5 removed" in done.out and "udon index --compact" in done.out
    more = ("--model", student, "--num-workers", 0)
    assert udon("embed", shop / "files", "--out", tmp_path / "more", *more).code == 0
    assert "20 images added, 0 removed" in udon("index", tmp_path / "more", *out, "--add").out
    (tmp_path / "files").mkdir()
    assert "0 images added, 0 removed" in udon("index", *out, "--update").out
    assert "31 images" in udon("index", *out, "--compact").out
    found = udon("search", "--like", "s0", "--index", tmp_path / "i", "-k", 31, "--json")
    assert len(json.loads(found.out)["queries"][0]["neighbours"]) == 30


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("search",), "`query` must be an image, or --like must name one"),
        (("search", "{file}"), "`model` must be given where queries are pictures"),
        (("search", "--like", "nope"), "`like` must be an id of the index, or row:N. Got 'nope'"),
        (("search", "--like", "row:99"), "`rows` must be of the index. Got 99"),
        (("search", "--like", "s1", "--where", "nope = 1"), "`where` must be a condition on columns of the index"),
        (("search", "--like", "s1", "--group-by", "nope"), "`group_by` must be a column of the index"),
        (("search", "--like", "s1", "--jsonl", "--json"), "`--jsonl` must be given without --json"),
        (("search", "{file}", "--box", "1,2,3"), "must be four numbers, left,top,width,height in pixels"),
        (("search", "{file}", "--box", "90,90,3,3", "--model", "{student}"), "must hold an image that can be read"),
        (("search", "{other}"), "`queries` must be embeddings by the model of the index"),
        (("index", "--add"), "`embeddings` must be folders that udon embed wrote. Got none"),
        (("index", "--compact", "--update"), "must be given alone. Got --update and --compact"),
        (("index", "{e}", "--compact"), "`embeddings` must be left out where `--compact` is given"),
        (("index", "--update", "--force"), "must be given without --force"),
        (("index", "--remove", "nope"), "`ids` must be of the index"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(udon, shop, student, tmp_path, arguments, complaint):
    about = json.dumps({"fingerprint": "another"})
    table = pa.table({"embedding": [[1.0] * 8]}).replace_schema_metadata({"udon": about})
    pq.write_table(table, tmp_path / "other.parquet")
    names = {
        "file": shop / "files" / "03.png",
        "student": student,
        "other": tmp_path / "other.parquet",
        "e": shop / "e",
    }
    where = ("--index" if arguments[0] == "search" else "--out", shop / "i")
    done = udon(*(part.format(**names) for part in arguments), *where)
    assert done.code == 2 and complaint in done.err.splitlines()[-1] and done.out == ""
