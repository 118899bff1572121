import contextlib
import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmnist.datasets import idx

IMAGES = np.arange(3 * 784, dtype=np.uint64).reshape(3, 28, 28).astype(np.uint8)
HEADER = np.array([0x803, 3, 28, 28], ">u4").tobytes()


def write(tmp_path, content):
    path = tmp_path / "archive.gz"
    path.write_bytes(content)
    return path


def test_reads_what_the_format_says(tmp_path):
    path = write(tmp_path, gzip.compress(HEADER + IMAGES.tobytes(), mtime=0))
    images = idx.read_images(path)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES)
    labels = bytes([3, 1, 4])
    path = write(tmp_path, gzip.compress(np.array([0x801, 3], ">u4").tobytes() + labels, mtime=0))
    np.testing.assert_array_equal(idx.read_labels(path), [3, 1, 4])


WHOLE = gzip.compress(HEADER + IMAGES.tobytes(), mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0x0"]),
        (b"not gzip at all", ["gzip"]),
        (WHOLE[: len(WHOLE) // 2], ["cannot be read"]),
        (WHOLE[:-3], ["cannot be read"]),
        (WHOLE[:40] + b"\xff\xff\xff" + WHOLE[43:], ["download it again"]),
        (gzip.compress(HEADER + IMAGES.tobytes()[:-1], mtime=0), ["2,352", "only 2,351"]),
        (gzip.compress(HEADER + IMAGES.tobytes() + b"x", mtime=0), ["holds more"]),
        (gzip.compress(HEADER[:9], mtime=0), ["pixels"]),
        (
            gzip.compress(b"\0\0\x08\x01" + HEADER[4:] + IMAGES.tobytes(), mtime=0),
            ["0x801", "0x803"],
        ),
        (
            gzip.compress(np.array([0x803, 3, 32, 24], ">u4").tobytes(), mtime=0),
            ["32 × 24", "28 × 28"],
        ),
        (
            gzip.compress(np.array([0x803, 2**32 - 1, 28, 28], ">u4").tobytes(), mtime=0),
            ["4,294,967,295"],
        ),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(idx.IdxError) as caught:
        idx.read_images(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_label(tmp_path):
    path = write(tmp_path, gzip.compress(np.array([0x801, 1], ">u4").tobytes() + b"\x0a", mtime=0))
    with pytest.raises(idx.IdxError, match="label 10"):
        idx.read_labels(path)


@pytest.mark.parametrize("name", ["missing.gz", "."])
def test_refuses_what_is_no_file(tmp_path, name):
    with pytest.raises(idx.IdxError, match="cannot be read"):
        idx.read_images(tmp_path / name)


headers = st.builds(
    lambda words, rest: np.array(words, ">u4").tobytes() + rest,
    st.lists(st.sampled_from([0, 1, 2, 28, 0x801, 0x803, 2**31, 2**32 - 1]), max_size=5),
    st.binary(max_size=2000),
)


@given(
    st.one_of(st.binary(), headers.map(gzip.compress), headers),
    st.sampled_from([idx.read_images, idx.read_labels]),
)
def test_no_input_raises_anything_else(tmp_path_factory, content, read):
    path = write(tmp_path_factory.getbasetemp(), content)
    try:
        array = read(path)
    except idx.IdxError:
        return
    assert array.dtype == np.uint8


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_noticed_or_harmless(tmp_path_factory, position, flip):
    damaged = bytearray(WHOLE)
    damaged[position] ^= flip
    path = write(tmp_path_factory.getbasetemp(), bytes(damaged))
    with contextlib.suppress(idx.IdxError):
        np.testing.assert_array_equal(idx.read_images(path), IMAGES)
