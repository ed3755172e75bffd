import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from transformers import AutoImageProcessor, image_utils

from modeling_udon.data import preprocessing
from modeling_udon.data.images import MAX_IMAGE_PIXELS, decode_image, encode_array, use_one_thread
from modeling_udon.data.preprocessing import OPENAI_CLIP, image_processor
from modeling_udon.data.transforms import EvalTransform, TeacherCrop, TrainTransform, normalize

CLIP = (OPENAI_CLIP.mean, OPENAI_CLIP.std)


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Waves with some noise: no symmetry, and a JPEG of it keeps something in every coefficient."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (5 + 3 * c) + y / (11 - 2 * c) + c) for c in range(channels)]
    noise = np.random.default_rng(0).normal(0, 10, (height, width, channels))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


PICTURE = Image.fromarray(picture(37, 53))


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decode_all_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 9) + b"IDAT"


def jpeg_of_claimed_size(width: int, height: int) -> bytes:
    data = encode(PICTURE, "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (33, 130)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"keep_rgb": True}])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_a_plain_jpeg_gives_the_same_pixels_as_in_pillow(size, options, subsampling):
    image = Image.fromarray(picture(*size))
    if subsampling == "grey":
        data = encode(image.convert("L"), "JPEG", **options)
    else:
        data = encode(image, "JPEG", **options, **({} if "keep_rgb" in options else {"subsampling": subsampling}))
    np.testing.assert_array_equal(decode_image(data), decode_all_by_pillow(data))


def test_a_plain_jpeg_is_decoded_without_pillow(monkeypatch):
    data = encode(PICTURE, "JPEG")
    expected = decode_all_by_pillow(data)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("WEBP", "RGB"),
        ("TIFF", "RGB"),
    ],
)
def test_the_image_is_upright_whatever_its_exif_orientation(file_format, mode, orientation):
    data = encode(PICTURE.convert(mode), file_format, exif=with_orientation(orientation))
    upright = decode_image(data)
    assert upright.shape == ((37, 53, 3) if orientation <= 4 else (53, 37, 3))
    assert upright.flags.c_contiguous and upright.flags.writeable
    np.testing.assert_array_equal(upright, decode_all_by_pillow(data))


XMP = '<x><rdf:Description tiff:Orientation="6"/></x>'


def test_the_orientation_in_xmp_counts_where_exif_has_none():
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP)
    np.testing.assert_array_equal(decode_image(encode(PICTURE, "PNG", pnginfo=notes)), np.rot90(PICTURE, -1))


def test_the_xmp_of_a_jpeg_is_read_as_in_pillow():
    data, xmp = encode(PICTURE, "JPEG"), b"http://ns.adobe.com/xap/1.0/\0" + XMP.encode()
    marked = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    np.testing.assert_array_equal(decode_image(marked), decode_all_by_pillow(marked))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0MM\0*\xff\0\0\x08"])
def test_damaged_exif_leaves_the_pixels_as_they_are(exif):
    expected = decode_image(encode(PICTURE, "JPEG"))
    np.testing.assert_array_equal(decode_image(encode(PICTURE, "JPEG", exif=exif)), expected)


def test_a_cmyk_jpeg_gives_the_same_pixels_as_in_pillow():
    data = encode(PICTURE.convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode_image(data), decode_all_by_pillow(data))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 255), (250, 240, 20)])
def test_cmyk_jpegs_have_the_colours_of_their_inks(colour):
    cmyk = Image.new("CMYK", (16, 16), (*(255 - c for c in colour), 0))
    decoded = decode_image(encode(cmyk, "JPEG", quality=100))
    assert np.abs(decoded.astype(int) - colour).max() <= 2


def test_ycck_jpegs_have_the_colours_of_their_inks():
    red, green, blue = 200, 60, 120
    # Adobe's YCCK holds Y, Cb, Cr of the three inks and the inverted black; Pillow inverts what it writes.
    inks = Image.new("RGB", (1, 1), (255 - red, 255 - green, 255 - blue)).convert("YCbCr").getpixel((0, 0))
    stored = Image.new("CMYK", (16, 16), (*(255 - value for value in inks), 0))
    data = bytearray(encode(stored, "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # the colour transform of Adobe's marker: YCCK instead of CMYK
    assert np.abs(decode_image(bytes(data)).astype(int) - (red, green, blue)).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP", "GIF", "PPM"])
def test_grey_and_black_and_white_images_have_three_equal_channels(mode, file_format):
    image = PICTURE.convert(mode)
    values = np.asarray(image).astype(np.uint8) * (255 if mode == "1" else 1)
    np.testing.assert_array_equal(decode_image(encode(image, file_format)), np.stack([values] * 3, axis=-1))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})]
    + [("WEBP", {"lossless": True}), ("JPEG2000", {})],
)
def test_a_lossless_file_gives_the_pixels_that_were_saved(file_format, options):
    decoded = decode_image(encode(PICTURE, file_format, **options))
    np.testing.assert_array_equal(decoded, np.asarray(PICTURE))
    assert decoded.flags.c_contiguous and decoded.flags.writeable


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_the_colour_of_an_invisible_pixel_does_not_matter(mode, file_format):
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    decoded = []
    for hidden in (0, 200):
        pixels = np.full((8, 8, len(mode)), hidden, np.uint8)
        pixels[:, :, -1] = 0
        pixels[2:4] = 255  # a visible, white stripe
        pixels[4:6] = (*[100] * (len(mode) - 1), 255)
        image = Image.fromarray(pixels)
        decoded.append(
            decode_image(encode(image if file_format != "WEBP" else image.convert("RGBA"), file_format, **options))
        )
    np.testing.assert_array_equal(*decoded)
    assert np.unique(decoded[0][4:6]) == 100 and np.unique(np.delete(decoded[0], [4, 5], axis=0)) == 255


def test_a_half_transparent_pixel_is_mixed_with_white():
    data = encode(Image.new("RGBA", (2, 2), (0, 100, 255, 51)), "PNG")
    expected = [round(255 + (c - 255) * 51 / 255) for c in (0, 100, 255)]
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("file_format", "transparency"), [("PNG", bytes([255, 0, 255, 255])), ("PNG", 1), ("GIF", 1)], ids=str
)
def test_a_transparent_palette_entry_becomes_white(file_format, transparency):
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    decoded = decode_image(encode(image, file_format, transparency=transparency))
    assert decoded.tolist() == [[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [100, 110, 120]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGB", (1, 2, 3)), ("1", 0)])
def test_the_one_transparent_colour_of_a_png_becomes_white(mode, colour):
    assert decode_image(encode(Image.new(mode, (3, 3), colour), "PNG", transparency=colour)).min() == 255


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_values_are_scaled_and_not_clipped(channels):
    values = np.linspace(0, 65535, 64 * channels).astype(np.uint16).reshape(8, 8, channels)
    _, data = cv2.imencode(".png", values[:, :, ::-1])
    np.testing.assert_array_equal(decode_image(data.tobytes()), np.broadcast_to(values // 256, (8, 8, 3)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_values_of_a_tiff_are_scaled_too(dtype):
    values = np.array([[0, 255, 256, 40000, 65535]], dtype)
    assert decode_image(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_integers_beyond_16_bits_are_clipped():
    values = np.array([[-5, 70000]], np.int32)
    assert decode_image(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 255]


def test_a_transparent_16_bit_grey_becomes_white():
    values = np.array([[5000, 5001]], np.uint16)
    assert decode_image(encode(Image.fromarray(values), "PNG", transparency=5000))[0, :, 0].tolist() == [255, 19]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-3.0, 127.6, 300.0], [0, 128, 255]),
        ([np.nan, 0.5, 1.0], [0, 128, 255]),
        ([np.inf, -np.inf], [255, 0]),
    ],
)
def test_float_values_are_fractions_of_white_or_grey_levels(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    assert decode_image(encode(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("file_format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_the_first_frame_of_an_animation_counts(file_format, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


def test_the_first_picture_of_a_phones_multi_picture_jpeg_counts():
    data = encode(PICTURE, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(PICTURE, "JPEG")))


def test_what_follows_the_end_of_a_jpeg_is_no_harm():
    data = encode(PICTURE, "JPEG")
    np.testing.assert_array_equal(decode_image(data + b"\r\n<!-- -->"), decode_image(data))


def test_an_empty_file_is_refused():
    with pytest.raises(ValueError, match="^data must be the bytes of an image file, but it is empty"):
        decode_image(b"")


@pytest.mark.parametrize(
    "data",
    [b"<!DOCTYPE html>\n<html>", bytes(100), b"\xff\xd8\xff\xd9", encode(PICTURE, "PNG")[:20], png_header(0, 5)]
    + [encode(PICTURE, "PDF"), jpeg_of_claimed_size(0, 5)],
    ids=["html", "zeros", "jpeg without image", "half a header", "no width", "pdf", "jpeg without width"],
)
def test_what_is_no_image_is_refused_with_its_first_bytes(data):
    with pytest.raises(
        ValueError, match=r"^data must be an image \(JPEG, PNG, .*\). Got \d+ bytes that begin"
    ) as error:
        decode_image(data)
    assert repr(data[:12]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("make", [lambda w, h: png_header(w, h), jpeg_of_claimed_size], ids=["png", "jpeg"])
def test_a_too_large_image_is_refused_from_its_header(make):
    limit = "^data must be an image of at most 89,478,485 pixels. Got "
    with pytest.raises(ValueError, match=limit + "10000 x 10000 = 100,000,000: shrink it or leave it out$"):
        decode_image(make(10_000, 10_000))
    with pytest.raises(ValueError, match=limit + "more than 178,956,970: shrink it or leave it out$"):
        decode_image(make(20_000, 10_000))


def test_the_limit_is_pillows_own():
    assert MAX_IMAGE_PIXELS == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": with_orientation(3)}), ("PNG", {}), ("GIF", {})]
    + [("BMP", {}), ("WEBP", {}), ("TIFF", {}), ("PPM", {})],
)
def test_a_file_that_was_cut_short_anywhere_is_refused(file_format, options):
    data = encode(PICTURE, file_format, **options)
    tail = 30  # A PNG may lack its last chunk, a GIF its trailer: all pixels are there.
    for length in [2, *range(10, len(data) - tail, 97), len(data) - tail]:
        with pytest.raises(ValueError, match="^data must be (an image|a whole image. Got a damaged or truncated) "):
            decode_image(data[:length])


def test_a_truncated_image_is_named_with_its_size_and_the_reason():
    with pytest.raises(
        ValueError, match=r"truncated JPEG of 53 x 37 pixels \(image file is truncated .*; leave it out"
    ):
        decode_image(encode(PICTURE, "JPEG")[:-100])


SEEDS = [
    *(encode(PICTURE, name) for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")),
    encode(PICTURE, "JPEG", exif=with_orientation(6)),
    encode(PICTURE.convert("CMYK"), "JPEG"),
    encode(PICTURE.quantize(16), "PNG", transparency=bytes(range(16))),
]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 500),
)
def test_a_damaged_file_gives_pixels_or_one_clear_line(seed, changes, cut):
    data = bytearray(seed[: max(1, len(seed) - cut)] if cut % 2 else seed)
    for position, value in changes:
        data[position % len(data)] = value
    try:
        pixels = decode_image(bytes(data))
    except ValueError as error:
        assert str(error).startswith("data must be ") and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    data = encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    filters, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(decode_image, [data] * 300))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == filters


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear without antialias at half-pixel centres, pixel by pixel, in float."""
    result = np.empty((height, width, 3))
    for row in range(height):
        y = min(max((row + 0.5) * image.shape[0] / height - 0.5, 0), image.shape[0] - 1)
        for column in range(width):
            x = min(max((column + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            upper = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            lower = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            result[row, column] = upper * (1 - (y - y0)) + lower * (y - y0)
    return result


@pytest.mark.parametrize("size", [(50, 31), (9, 60), (1, 1), (28, 28)])
def test_training_resizes_to_a_square_crops_and_flips_as_drawn(size):
    image = picture(*size)
    square = bilinear(image, 28, 28)
    transform = TrainTransform(24, resize_size=28)
    for seed in range(6):
        draws = np.random.default_rng(seed)
        top, left, flipped = draws.integers(5), draws.integers(5), draws.random() < 0.5
        expected = square[top : top + 24, left : left + 24]
        result = transform(image, np.random.default_rng(seed))
        assert result.shape == (24, 24, 3) and result.dtype == np.uint8
        assert np.abs(result - (expected[:, ::-1] if flipped else expected)).max() <= 1


@pytest.mark.parametrize("size", [(28, 60), (60, 28), (28, 28), (27, 29)])
def test_what_the_crop_leaves_out_changes_nothing_when_it_is_cut_before_the_resize(size):
    image, transform = picture(*size), TrainTransform(24, resize_size=28, flip=False)
    square = cv2.resize(image, (28, 28), interpolation=cv2.INTER_LINEAR)
    for seed in range(20):
        draws = np.random.default_rng(seed)
        top, left = draws.integers(5), draws.integers(5)
        result = transform(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(result, square[top : top + 24, left : left + 24])


@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.integers(1, 300), st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_the_crop_has_the_pixels_of_the_whole_resize_at_any_size(size, image_size, room, seed):
    image, side = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), image_size + room
    square = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
    draws = np.random.default_rng(seed)
    top, left = draws.integers(room + 1), draws.integers(room + 1)
    result = TrainTransform(image_size, resize_size=side, flip=False)(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(result, square[top : top + image_size, left : left + image_size])


@pytest.mark.parametrize("size", [(50, 31), (56, 56)])
def test_a_teachers_crop_is_the_students_with_more_pixels(size):
    image, student = picture(*size), TrainTransform(24, resize_size=28)
    square = bilinear(image, 56, 56)
    for seed in range(6):
        draws = np.random.default_rng(seed)
        top, left, flipped = 2 * draws.integers(5), 2 * draws.integers(5), draws.random() < 0.5
        expected = square[top : top + 48, left : left + 48]
        result = TeacherCrop(student, 48, 56)(image, np.random.default_rng(seed))
        assert np.abs(result - (expected[:, ::-1] if flipped else expected)).max() <= 1


@pytest.mark.parametrize("resize_size", [16, 17, 18])
def test_a_teachers_crop_of_more_of_the_image_holds_the_students(resize_size):
    student = TrainTransform(8, resize_size=10)
    teacher = TeacherCrop(student, 16, resize_size)
    for seed in range(30):
        small, large = (one(positions(), np.random.default_rng(seed)).astype(int) for one in (student, teacher))
        for axis in (0, 1):
            assert large[..., axis].min() <= small[..., axis].min() <= small[..., axis].max() <= large[..., axis].max()
        assert np.sign(np.diff(small[0, :, 1]).sum()) == np.sign(np.diff(large[0, :, 1]).sum())


def positions() -> np.ndarray:
    """An image of 10 x 10 whose pixels hold their row and column."""
    return np.stack([*np.mgrid[:10, :10], np.zeros((10, 10))], axis=-1).astype(np.uint8)


def test_every_crop_and_both_directions_are_drawn_equally_often():
    transform, rng = TrainTransform(8, resize_size=10), np.random.default_rng(0)
    corners = [transform(positions(), rng)[0, [0, -1]] for _ in range(3600)]
    starts = [(int(first[0]), int(min(first[1], last[1])), bool(first[1] > last[1])) for first, last in corners]
    counts = [starts.count((top, left, flip)) for top in range(3) for left in range(3) for flip in (False, True)]
    assert sum(counts) == 3600
    assert all(abs(count - 200) < 4 * 200**0.5 for count in counts)


def test_without_flip_no_image_is_mirrored_and_no_number_is_drawn_for_it():
    transform, rng, same = (
        TrainTransform(8, resize_size=10, flip=False),
        np.random.default_rng(3),
        np.random.default_rng(3),
    )
    for _ in range(20):
        top, left = same.integers(3), same.integers(3)
        np.testing.assert_array_equal(transform(positions(), rng), positions()[top : top + 8, left : left + 8])
    assert rng.bit_generator.state == same.bit_generator.state


def test_the_same_generator_state_gives_the_same_pixels_whatever_came_before():
    image, rng = picture(40, 60), np.random.default_rng(5)
    transform = TrainTransform(32)
    transform(picture(20, 20), rng)
    state = rng.bit_generator.state
    first = transform(image, rng)
    rng.bit_generator.state = state
    np.testing.assert_array_equal(transform(image, rng), first)


@pytest.mark.parametrize(("image_size", "side"), [(224, 256), (64, 73), (336, 384)])
def test_by_default_the_square_is_as_256_is_to_224(image_size, side):
    rng, image = np.random.default_rng(0), picture(30, 40)
    by_default = TrainTransform(image_size)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(by_default, TrainTransform(image_size, resize_size=side)(image, rng))


@pytest.mark.parametrize("transform", [TrainTransform, EvalTransform, lambda size: image_processor(size, OPENAI_CLIP)])
@pytest.mark.parametrize("image_size", [0, -1])
def test_an_image_size_below_one_is_refused(transform, image_size):
    with pytest.raises(
        ValueError, match=rf"^image_size must be at least 1. Got {image_size}; the backbones here use 224\.$"
    ):
        transform(image_size)


def test_a_square_that_is_smaller_than_its_crop_is_refused():
    with pytest.raises(
        ValueError, match="^resize_size must be at least image_size, 224. Got 200; leave it out for 256$"
    ):
        TrainTransform(224, resize_size=200)


def publish(image: np.ndarray, image_size: int) -> np.ndarray:
    """What the published processor does before it scales: `(image_size, image_size, 3)`, uint8."""
    processor = image_processor(image_size, OPENAI_CLIP)
    pixels = processor(Image.fromarray(image), do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ]
    assert pixels.dtype == np.uint8
    return pixels[0].transpose(1, 2, 0)


# No side of 1 or 3: transformers 4.x takes it for the channels.
SHAPES = [(300, 401), (401, 300), (61, 56), (56, 61), (57, 57), (20, 30), (2, 2), (2, 64), (600, 20), (97, 193)]


@pytest.mark.parametrize("image_size", [56, 57])
@pytest.mark.parametrize("shape", SHAPES)
def test_eval_equals_the_published_image_processor_bit_for_bit(shape, image_size):
    image = picture(*shape)
    np.testing.assert_array_equal(EvalTransform(image_size)(image), publish(image, image_size))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 90), st.integers(4, 90), st.integers(4, 40))
def test_eval_equals_the_published_image_processor_at_any_size(height, width, image_size):
    image = picture(height, width)
    np.testing.assert_array_equal(EvalTransform(image_size)(image), publish(image, image_size))


# 61 / 56 * 56 falls just below 61 in floating point: the original's longer side is a pixel short there.
@pytest.mark.parametrize(("shape", "resized"), [((56, 61), (56, 60)), ((61, 56), (60, 56)), ((30, 45), (56, 84))])
def test_without_antialias_the_centre_is_cut_as_in_the_original(shape, resized):
    image = picture(*shape)
    top, left = (resized[0] - 56) // 2, (resized[1] - 56) // 2
    expected = bilinear(image, *resized)[top : top + 56, left : left + 56]
    assert np.abs(EvalTransform(56, antialias=False)(image) - expected).max() <= 1


@pytest.mark.parametrize("antialias", [True, False])
def test_a_single_pixel_fills_the_whole_image(antialias):
    image = np.array([[[10, 20, 30]]], np.uint8)
    expected = np.broadcast_to(image, (32, 32, 3))
    np.testing.assert_array_equal(EvalTransform(32, antialias)(image), expected)
    np.testing.assert_array_equal(TrainTransform(32)(image, np.random.default_rng(0)), expected)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 4999), (2, 65535)])
def test_of_a_very_long_image_only_the_middle_is_resized(shape, antialias, monkeypatch):
    sizes = []
    by_opencv, by_pillow = cv2.resize, Image.Image.resize
    monkeypatch.setattr(cv2, "resize", lambda image, size, **kw: sizes.append(size) or by_opencv(image, size, **kw))
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *a: sizes.append(size) or by_pillow(image, size, *a))
    ramp = np.linspace(0, 255, max(shape))
    image = np.broadcast_to(ramp[None] if shape[0] < shape[1] else ramp[:, None], shape)
    image = np.repeat(image.round().astype(np.uint8)[:, :, None], 3, axis=2)
    result = EvalTransform(224, antialias)(image)
    assert result.shape == (224, 224, 3)
    assert np.abs(result.astype(int) - 127.5).max() <= 1
    assert max(map(max, sizes)) <= 224 * 33


@pytest.mark.parametrize("shape", [(4, 200), (201, 4), (5, 1000)])
def test_cutting_the_ends_of_a_long_image_first_changes_hardly_anything(shape):
    image = picture(*shape)
    assert np.abs(EvalTransform(16)(image) - publish(image, 16).astype(int)).max() <= 4


@pytest.mark.parametrize(("mean", "std"), [CLIP, ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])])
def test_normalize_is_the_formula_on_every_pixel(mean, std):
    pixels = picture(16, 48).reshape(2, 8, 48, 3)
    normalized = normalize(torch.from_numpy(pixels), mean, std)
    assert normalized.dtype == torch.float32 and normalized.shape == (2, 3, 8, 48) and normalized.is_contiguous()
    for channel in range(3):
        expected = (pixels[..., channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(normalized[:, channel].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalize_gives_the_same_on_a_gpu():
    pixels = torch.from_numpy(picture(8, 8)[None])
    on_gpu = normalize(pixels.cuda(), *CLIP)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), normalize(pixels, *CLIP), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_pixels_of_another_type_or_layout_are_refused(pixels):
    with pytest.raises(
        ValueError, match=r"^pixels must be uint8 of shape \(B, H, W, 3\). Got torch\..* of shape \(1, .*\); pass"
    ):
        normalize(pixels, *CLIP)


def test_the_saved_processor_gives_the_pixel_values_of_the_evaluation(tmp_path):
    image = picture(100, 140)
    image_processor(48, OPENAI_CLIP).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    published = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = normalize(torch.from_numpy(EvalTransform(48)(image))[None], *CLIP)
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-6)


def test_the_saved_processor_takes_grey_images(tmp_path):
    image_processor(48, OPENAI_CLIP).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(PICTURE.convert("L"), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


def test_the_constants_are_those_of_transformers():
    for name in ("IMAGENET_STANDARD", "IMAGENET_DEFAULT", "OPENAI_CLIP"):
        ours = getattr(preprocessing, name)
        assert ours.mean == tuple(getattr(image_utils, f"{name}_MEAN"))
        assert ours.std == tuple(getattr(image_utils, f"{name}_STD"))


def test_a_worker_keeps_opencv_to_one_thread():
    before = cv2.getNumThreads()
    try:
        use_one_thread(worker_id=3)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


def tiff(values, **tags):
    """An uncompressed little-endian TIFF of one strip with the tags that are given by number, as `t262=0`."""
    height, width = values.shape[-2:] if tags.get("t284") == 2 else values.shape[:2]
    channels = values.size // (height * width)
    bits = values.dtype.itemsize * 8
    entries = {256: width, 257: height, 258: [bits] * channels, 259: 1, 262: 2 if channels > 1 else 1, 273: [0]}
    entries |= {277: channels, 278: height, 279: [values.nbytes]} | {int(tag[1:]): value for tag, value in tags.items()}
    planes = channels if entries.get(284) == 2 else 1
    entries[279] = [values.nbytes // planes] * planes
    start = 8 + 2 + 12 * len(entries) + 4
    extra, directory = b"", b""
    first = start + 8 * 3 + 16 * planes
    entries[273] = [first + plane * values.nbytes // planes for plane in range(planes)]
    for tag, value in sorted(entries.items()):
        numbers = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        place = packed
        if len(packed) > 4:
            place, extra = struct.pack("<I", start + len(extra)), extra + packed
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + place
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + extra
    return head.ljust(first, b"\0") + values.tobytes()


def test_grey_of_any_type_has_the_values_that_were_meant():
    grey = np.arange(256).reshape(16, 16)
    for values, tags in [
        (grey.astype(np.uint8), {}),
        ((255 - grey).astype(np.uint8), {"t262": 0}),
        ((grey * 257).astype("<u2"), {}),
        ((65535 - grey * 257).astype("<u2"), {"t262": 0}),
        (grey.astype("<u2"), {}),
        ((grey * 128).astype("<i2"), {"t339": 2}),
        (grey.astype("<i4"), {"t339": 2}),
        ((grey * 257).astype("<i4"), {"t339": 2}),
        ((grey / 255).astype("<f4"), {"t339": 3}),
        (grey.astype("<f4"), {"t339": 3}),
        ((grey * 257).astype("<f4"), {"t339": 3}),
    ]:
        np.testing.assert_array_equal(
            decode_image(tiff(values, **tags))[:, :, 1], grey, err_msg=f"{values.dtype}{tags}"
        )


def test_values_of_no_known_range_are_refused_and_not_guessed():
    grey = np.arange(256).reshape(16, 16)
    for values, tags in [
        ((grey - 128).astype(np.int8), {"t339": 2}),
        ((grey * 16843009).astype("<u4"), {}),
        ((grey * 100.0 - 9000).astype("<f4"), {"t339": 3}),
        ((grey / 64 - 2).astype("<f4"), {"t339": 3}),
        ((grey / 128 - 1).astype("<f4"), {"t339": 3}),
        (np.stack([grey * 257] * 3).astype("<u2"), {"t284": 2}),
    ]:
        with pytest.raises(ValueError, match="^data must be "):
            decode_image(tiff(values, **tags))


def test_planes_of_8_bits_are_read_as_interleaved_ones():
    planes = np.stack([np.full((16, 16), level, np.uint8) for level in (10, 100, 200)])
    assert decode_image(tiff(planes, t284=2))[3, 4].tolist() == [10, 100, 200]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64, bool])
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (1, 6, 8), (6, 8, 3), (3, 6, 8)])
def test_arrays_of_a_column_keep_their_levels(dtype, shape):
    levels = np.linspace(0, 200, 48).astype(int).reshape(6, 8)
    planes = np.stack([levels] * max(shape[0] if len(shape) == 3 and shape[0] < 4 else shape[-1] % 8, 1))
    values = planes if len(shape) == 3 and shape[0] < 4 else planes.transpose(1, 2, 0)
    values = values.reshape(shape) if len(shape) == 2 or 1 in shape else values
    stored = values / 255 if np.issubdtype(dtype, np.floating) else values
    expected = np.where(levels > 0, 255, 0) if dtype is bool else levels
    np.testing.assert_array_equal(decode_image(encode_array(stored.astype(dtype)))[:, :, 2], expected)


@pytest.mark.parametrize("shape", [(8,), (6, 8, 2), (2, 6, 8, 3)])
def test_arrays_that_are_no_pixels_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be numbers of shape \(H, W\), \(H, W, 3\) or \(3, H, W\)"):
        encode_array(np.zeros(shape, np.uint8))


def wide_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits; OpenCV takes blue first."""
    return cv2.imencode(".png", pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]].astype(np.uint16))[1].tobytes()


@pytest.mark.parametrize("factor", [1, 16, 257], ids=["8 bits", "12 bits", "16 bits"])
def test_colours_and_grey_of_8_12_and_16_bits_in_16_are_equally_bright(factor: int) -> None:
    wide = picture(37, 53).astype(int) * factor
    assert np.abs(decode_image(wide_png(wide)).astype(int) - picture(37, 53)).max() <= 1
    grey = Image.fromarray(wide[:, :, 0].astype(np.uint16))
    for file_format in ("PNG", "TIFF"):
        assert (
            np.abs(decode_image(encode(grey, file_format)).astype(int)[:, :, 0] - picture(37, 53)[:, :, 0]).max() <= 1
        )


def test_12_bit_colours_keep_their_transparency() -> None:
    wide = np.dstack([picture(37, 53).astype(int) * 16, np.full((37, 53), 65535)])
    wide[:10, :, 3] = 0
    decoded = decode_image(wide_png(wide)).astype(int)
    assert (decoded[:10] == 255).all() and np.abs(decoded[10:] - picture(37, 53)[10:]).max() <= 1


def bitmap(alpha: int, mask: bool) -> bytes:
    """A BMP of 32 bits a pixel, with a mask for alpha or with a fourth byte of no meaning."""
    pixels = np.dstack([picture(37, 53)[::-1, :, ::-1], np.full((37, 53), alpha, np.uint8)]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 108 if mask else 40, 53, 37, 1, 32, 3 if mask else 0, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52) if mask else b""
    start = 14 + len(header) + len(masks)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + pixels


@pytest.mark.parametrize("mask", [False, True])
def test_a_bitmap_with_alpha_is_laid_on_white_and_one_whose_alpha_is_all_zero_has_none(mask: bool) -> None:
    for alpha in (0, 255):
        assert np.array_equal(decode_image(bitmap(alpha, mask)), picture(37, 53))
    white = (picture(37, 53).astype(int) * 128 + 255 * 127) // 255
    assert np.abs(decode_image(bitmap(128, mask)) - white).max() <= 1
    assert np.array_equal(decode_image(encode(PICTURE.convert("RGBA"), "BMP")), picture(37, 53))
