"""Bad and odd images in training, `udon embed` and the page: each kind does what `docs/explanation/inputs.md` says."""

import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from modeling_udon.data.dataset import EvaluationDataset, MultiDomainDataset
from modeling_udon.data.domains import Domain
from modeling_udon.data.files import MAX_FILE_BYTES
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.transforms import EvalTransform, TrainTransform
from modeling_udon.encoder import Encoder
from modeling_udon.search.embed import embed

ROOT = Path(__file__).parents[2]
Tell = Callable[[str, int, int], None]

NOBODY = 65534
READ, REFUSED, UNLISTED = "read", "refused", "not listed"

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8))
OTHERS = [Image.new("RGB", PICTURE.size, colour) for colour in ("red", "blue")]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: What the table calls it.
        file: Its name.
        write: Makes it.
        says: What the refusal says; empty where the image is read.
        unlisted: Whether `udon embed` does not take it for an image of the folder at all.
    """

    name: str
    file: str
    write: Callable[[Path], object]
    says: str = ""
    unlisted: bool = False

    @property
    def outcomes(self) -> list[str]:
        """What training, `udon embed` and the page do."""
        done = REFUSED if self.says else READ
        return [done, UNLISTED if self.unlisted else done, done]


def holds(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def many(file_format: str, **options: object) -> bytes:
    return encode(PICTURE, file_format, save_all=True, append_images=OTHERS, **options)


def two_pictures() -> bytes:
    # With flat pictures after the first, the oldest supported Pillow writes files that nothing reads.
    return encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, "JPEG", exif=exif)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a.txt", "a")
    return file.getvalue()


def ycck() -> bytes:
    data = bytearray(encode(PICTURE.convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra: bytes) -> bytes:
    """A PNG with a further chunk after its header."""
    data = encode(PICTURE, "PNG")
    return data[:33] + extra + data[33:]


def flat_png(width: int, height: int) -> bytes:
    """A whole PNG of one colour, a bit a pixel, written a row at a time."""
    packer = zlib.compressobj(9)
    row = b"\0" + bytes(-(-width // 8))
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def claiming(data: bytes, place: int, form: str, width: int, height: int) -> bytes:
    """An image whose header says another size."""
    size = struct.pack(form, width, height)
    return data[:place] + size + data[place + len(size) :]


def jpeg_claiming(width: int, height: int) -> bytes:
    data = encode(PICTURE, "JPEG")
    return claiming(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def tiff_claiming(width: int, height: int) -> bytes:
    """A TIFF whose first two entries, width and height, say another size."""
    data = bytearray(encode(PICTURE, "TIFF"))
    first = struct.unpack_from("<I", data, 4)[0] + 2
    for place, value in ((first, width), (first + 12, height)):
        struct.pack_into("<HII", data, place + 2, 4, 1, value)
    return bytes(data)


def with_wrong_checksum() -> bytes:
    data = bytearray(encode(PICTURE, "PNG"))
    data[-20] ^= 255  # in the last bytes of the pixels
    return bytes(data)


def sixteen_bits(channels: int) -> bytes:
    values = np.linspace(0, 65535, 37 * 53 * channels).astype(np.uint16).reshape(37, 53, channels)
    return cv2.imencode(".png", values)[1].tobytes()


def transparent_palette() -> bytes:
    return encode(PICTURE.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def locked(path: Path) -> None:
    path.write_bytes(encode(PICTURE, "PNG"))
    path.chmod(0)


def larger_than_allowed(path: Path) -> None:
    path.write_bytes(encode(PICTURE, "PNG"))
    os.truncate(path, 50 * MAX_FILE_BYTES)  # a hole, which takes no room


JPEG, PNG, GIF, BMP = (encode(PICTURE, file_format) for file_format in ("JPEG", "PNG", "GIF", "BMP"))
NO_IMAGE, DAMAGED = "data must be an image (JPEG", "data must be a whole image. Got a damaged or truncated"
TOO_LARGE = "data must be an image of at most 89,478,485 pixels. Got "
PAGE = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>"
ICC = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200 * 2**20), 9))
TEXT = chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(200 * 2**20), 9))

KINDS = [
    # Not what the name says.
    Kind("empty file", "empty.jpg", holds(b""), "it is empty"),
    Kind("random bytes", "garbage.jpg", holds(np.random.default_rng(1).bytes(5000)), NO_IMAGE),
    Kind("zero bytes", "zeros.png", holds(bytes(5000)), NO_IMAGE),
    Kind("HTML page", "page.jpg", holds(PAGE), NO_IMAGE),
    Kind("PDF", "sheet.png", holds(encode(PICTURE, "PDF")), NO_IMAGE),
    Kind("PostScript, which Pillow would run", "print.jpg", holds(encode(PICTURE, "EPS")), NO_IMAGE),
    Kind("SVG", "drawing.png", holds(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), NO_IMAGE),
    Kind("ZIP archive", "packed.jpg", holds(archive()), NO_IMAGE),
    Kind("PNG with the name of a JPEG", "png.jpg", holds(PNG)),
    Kind("JPEG with the name of a PNG", "jpeg.png", holds(JPEG)),
    Kind("JPEG without an ending", "jpeg", holds(JPEG), unlisted=True),
    # Damaged.
    Kind("truncated JPEG", "cut.jpg", holds(JPEG[:-300]), DAMAGED),
    Kind("truncated PNG", "cut.png", holds(PNG[:-300]), DAMAGED),
    Kind("truncated GIF", "cut.gif", holds(GIF[:-300]), DAMAGED),
    Kind("truncated WebP", "cut.webp", holds(encode(PICTURE, "WEBP")[:-300]), "data must be "),
    Kind("truncated TIFF", "cut.tif", holds(encode(PICTURE, "TIFF")[:-300]), "data must be "),
    Kind("half a header", "half.png", holds(PNG[:20]), NO_IMAGE),
    Kind("PNG with a wrong checksum", "sum.png", holds(with_wrong_checksum()), DAMAGED),
    Kind("PNG of width zero", "zero.png", holds(claiming(PNG, 16, ">II", 0, 5)), NO_IMAGE),
    Kind("JPEG with more behind its end", "behind.jpg", holds(JPEG + PAGE)),
    Kind("JPEG with damaged EXIF", "exif.jpg", holds(encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"))),
    # Of other colours.
    Kind("CMYK JPEG", "cmyk.jpg", holds(encode(PICTURE.convert("CMYK"), "JPEG"))),
    Kind("YCCK JPEG", "ycck.jpg", holds(ycck())),
    Kind("grey JPEG", "grey.jpg", holds(encode(PICTURE.convert("L"), "JPEG"))),
    Kind("black and white PNG", "bits.png", holds(encode(PICTURE.convert("1"), "PNG"))),
    Kind("grey with transparency", "la.png", holds(encode(PICTURE.convert("LA"), "PNG"))),
    Kind("RGB with transparency", "rgba.png", holds(encode(PICTURE.convert("RGBA"), "PNG"))),
    Kind("palette with transparency", "palette.png", holds(transparent_palette())),
    Kind("16-bit grey PNG", "grey16.png", holds(sixteen_bits(1))),
    Kind("16-bit RGB PNG", "rgb16.png", holds(sixteen_bits(3))),
    Kind("TIFF of 32-bit integers", "int32.tif", holds(encode(Image.new("I", (9, 9), 40000), "TIFF"))),
    Kind("TIFF of floats", "float.tif", holds(encode(Image.new("F", (9, 9), 0.5), "TIFF"))),
    # Turned.
    *(Kind(f"EXIF orientation {n}", f"turned{n}.jpg", holds(turned(n))) for n in range(1, 9)),
    # Of odd shapes.
    Kind("1 x 1 pixel", "1x1.png", holds(encode(Image.new("RGB", (1, 1)), "PNG"))),
    Kind("1 x 5000 pixels", "1x5000.png", holds(encode(Image.new("RGB", (1, 5000)), "PNG"))),
    Kind("5000 x 1 pixels", "5000x1.png", holds(encode(Image.new("RGB", (5000, 1)), "PNG"))),
    Kind("65,000 x 1 pixels", "65000x1.jpg", holds(encode(Image.new("RGB", (65_000, 1)), "JPEG"))),
    # Several in one.
    Kind("animated GIF", "moving.gif", holds(many("GIF"))),
    Kind("animated PNG", "moving.png", holds(many("PNG"))),
    Kind("animated WebP", "moving.webp", holds(many("WEBP"))),
    Kind("TIFF of several pages", "pages.tif", holds(many("TIFF"))),
    Kind("a phone's multi-picture JPEG", "phone.jpg", holds(two_pictures())),
    # Bombs.
    Kind("PNG of 20,000 x 10,000 pixels, one colour", "bomb.png", holds(flat_png(20_000, 10_000)), TOO_LARGE),
    Kind("JPEG that claims 65,000 x 65,000", "bomb.jpg", holds(jpeg_claiming(65_000, 65_000)), TOO_LARGE),
    Kind("GIF that claims 65,000 x 65,000", "bomb.gif", holds(claiming(GIF, 6, "<HH", 65_000, 65_000)), TOO_LARGE),
    Kind("BMP that claims 30,000 x 30,000", "bomb.bmp", holds(claiming(BMP, 18, "<ii", 30_000, 30_000)), TOO_LARGE),
    Kind("TIFF that claims 100,000 x 100,000", "bomb.tif", holds(tiff_claiming(100_000, 100_000)), TOO_LARGE),
    Kind("PNG with 200 MB of text in 200 kB", "text.png", holds(png_with(TEXT)), "data must be "),
    Kind("PNG with a colour profile of 200 MB in 200 kB", "profile.png", holds(png_with(ICC)), "data must be "),
    Kind("file of 50 GB", "huge.png", larger_than_allowed, "data must be a file of at most 1,073,741,824 bytes"),
    # No files, or none that can be read.
    Kind("folder named x.jpg", "folder.jpg", Path.mkdir, "data must be a file. Got a folder", unlisted=True),
    Kind("pipe", "pipe.jpg", os.mkfifo, "data must be a file. Got a pipe"),
    Kind("link to an endless device", "device.jpg", link_to("/dev/zero"), "data must be a file. Got a device"),
    Kind("broken link", "broken.jpg", link_to("nowhere.jpg"), "No such file"),
    Kind("link to itself", "loop.jpg", link_to("loop.jpg"), "Too many levels of symbolic links"),
    Kind("file without permission to read", "locked.png", locked, "Permission denied"),
    # Of odd names.
    Kind("name with spaces", "a  picture .png", holds(PNG)),
    Kind("name with newline and tab", "new\nline\tand tab.png", holds(PNG)),
    Kind("name that steers a terminal", "\x1b[31mred\x1b[0m\x07.png", holds(PNG)),
    Kind("name in other scripts", "图片 صورة 🖼.png", holds(PNG)),
    Kind("name with HTML", "<script>alert(1)<", holds(PNG), unlisted=True),
    Kind("name that begins like an option or a formula", "-=1+1.png", holds(PNG)),
    Kind("name of 255 bytes", "n" * 251 + ".png", holds(PNG)),
    Kind("hidden file", ".hidden.png", holds(PNG), unlisted=True),
]  # fmt: skip


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read anything: what is told to be locked is tried as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """All kinds in one folder that everybody may use."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        images = Path(made) / "images"
        images.mkdir()
        for kind in KINDS:
            kind.write(images / kind.file)
        yield images


@pytest.fixture(scope="module")
def embedded(folder: Path, searchable) -> tuple[list[str], dict[str, str]]:
    """Paths that `udon embed` gave an embedding, and what it says of those it skipped."""
    out = folder.parent / "embedded"
    model = Encoder.open(str(searchable.model))
    with unprivileged():
        embed(folder, model, out, num_workers=0, batch_size=16)
    table = pq.read_table(out)
    assert np.isfinite(np.stack(table["embedding"].to_pylist())).all()
    log = (out / "_skipped.log").read_text().splitlines()
    return table["path"].to_pylist(), dict(line.split("\t") for line in log)


each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def domain(folder: Path) -> Domain:
    """A domain of all kinds, a row and a class each."""
    entries = [{"bytes": None, "path": str(folder / kind.file)} for kind in KINDS]
    images = Dataset.from_dict({"image": entries}, features=Features({"image": ImageFeature(decode=False)}))
    return Domain("cars", images, np.arange(len(KINDS)), range(len(KINDS)), "", {})


@each_kind
def test_training_reads_an_image_or_names_it_and_takes_another(domain: Domain, kind: Kind, tell: Tell) -> None:
    row = KINDS.index(kind)
    dataset = MultiDomainDataset({"cars": domain}, TrainTransform(16), seed=0, replace_broken=True)
    with unprivileged():
        batch = dataset[BatchDraw("cars", np.array([row]), np.array([7]))]
    assert batch.pixels.shape == (1, 16, 16, 3)
    if kind.says:
        (broken,) = batch.broken
        assert (broken.row, broken.path) == (row, domain.images[row]["image"]["path"]) and kind.says in broken.reason
        assert str(broken).isprintable()
        assert not KINDS[int(batch.labels)].says  # the substitute's own class
    else:
        assert batch.broken == () and batch.labels.tolist() == [row]
    tell("kinds of image files in training", 1, 0)


@each_kind
def test_evaluation_reads_an_image_or_names_it(domain: Domain, kind: Kind, tell: Tell) -> None:
    row = KINDS.index(kind)
    with unprivileged():
        ((image, broken),) = EvaluationDataset(domain.images, EvalTransform(16), "cars", "test").__getitems__([row])
    assert image.shape == (16, 16, 3)
    assert (broken is None) == (not kind.says) and (broken is None or kind.says in broken.reason)
    tell("kinds of image files in evaluation", 1, 0)


@each_kind
def test_embed_gives_an_embedding_or_names_the_file_with_the_reason(embedded, kind: Kind, tell: Tell) -> None:
    paths, skipped = embedded
    if kind.unlisted:
        assert kind.file not in paths and not any(kind.file in line for line in skipped)
    elif kind.says:
        assert kind.file not in paths and kind.says in skipped[kind.file]
        assert skipped[kind.file].isprintable()
    else:
        assert kind.file in paths and kind.file not in skipped
    tell("kinds of image files in udon embed", 1, 0)


@each_kind
def test_the_page_shows_neighbours_or_the_reason(
    folder: Path, searchable, kind: Kind, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "modeling-udon[demo]"')
    from modeling_udon.search.page_answers import answer, open_side

    side = open_side(searchable.index, lambda: Encoder.open(str(searchable.model)))
    monkeypatch.setattr(type(side.index), "is_current", lambda self: True)  # The folders of tests are root's alone.
    with unprivileged():
        html = answer([side], folder / kind.file, "", 3)
    assert str(folder) not in html and "<script" not in html
    if kind.says:
        assert "<b>This picture cannot be searched for.</b>It must be " in html and "<li>" not in html
    else:
        assert html.count("<li>") == 3
    tell("kinds of image files on the page", 1, 0)


# Decodes each file of a list in a process of its own and prints by how many MiB its memory rose at most. Linux counts
# the peak of this program alone there; `getrusage` would go on from that of the tests, which it was forked from.
MEASURE = """
import re, sys
from pathlib import Path
from modeling_udon.data.files import read_file
from modeling_udon.data.images import decode_image
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
for path in sys.argv[1:]:
    try:
        decode_image(read_file(path))
    except ValueError:
        pass
print((peak() - before) / 1024)
"""


def megabytes_to_decode(*paths: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def test_bombs_are_refused_without_the_memory_that_they_ask_for(folder: Path) -> None:
    bombs = [*folder.glob("bomb.*"), *(folder / name for name in ("text.png", "profile.png", "huge.png", "device.jpg"))]
    assert len(bombs) == 9
    assert megabytes_to_decode(*bombs) < 48


def test_the_largest_image_that_is_read_takes_bounded_memory(tmp_path: Path) -> None:
    largest = tmp_path / "largest.png"
    largest.write_bytes(flat_png(9459, 9459))
    # 256 MiB of RGB, less what the imports had taken at their peak, and Pillow's own copies on the way.
    assert 100 < megabytes_to_decode(largest) < 1500


def test_the_table_in_the_docs_is_what_was_tested() -> None:
    text = (ROOT / "docs" / "explanation" / "inputs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (read|refused) \| (read|refused|not listed) \| (read|refused) \|$", text, re.M)
    assert [list(row) for row in rows] == [[kind.name, *kind.outcomes] for kind in KINDS]
