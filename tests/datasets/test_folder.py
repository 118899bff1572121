import os
import socket
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from seqmnist.datasets import folder
from seqmnist.errors import UserError

RNG = np.random.default_rng(0)
IS_ROOT = os.geteuid() == 0


def write(path, shape=(4, 4), value=None):
    """Writes a picture of one value, or of noise; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(path)
    return pixels


def write_classes(root, names=("a", "b"), num=5, shape=(4, 4)):
    for name in names:
        for k in range(num):
            write(root / name / f"x{k}.png", shape)
    return root


def read(path, grayscale=False, size=None):
    said = []
    splits = folder.read(path, grayscale, size, said.append)
    assert not said
    return splits


def refusal(path, grayscale=False, size=None):
    """Returns the one line that refuses a folder, which it names."""
    with pytest.raises(UserError) as error:
        folder.read(path, grayscale, size, lambda _: None)
    line = str(error.value)
    assert line.isprintable()
    assert str(path) in line
    assert "; " in line  # before the remedy
    return line


def test_reads_splits_in_order_of_numbers(tmp_path):
    rng = np.random.default_rng(1)
    images = {"train": rng.integers(0, 256, (23, 5, 3), np.uint8)}
    images["test"] = rng.integers(0, 256, (12, 5, 3), np.uint8)
    labels = {split: rng.permutation(len(images[split])) % 11 for split in images}
    for split in images:
        for i, (image, label) in enumerate(zip(images[split], labels[split], strict=True)):
            path = tmp_path / split / str(label) / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    splits = read(tmp_path)
    assert splits.class_names == tuple(map(str, range(11)))
    for split in images:
        read_images, read_labels = getattr(splits, split)
        np.testing.assert_array_equal(read_images, images[split])
        np.testing.assert_array_equal(read_labels, labels[split])
        assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int32)


def test_splits_every_fifth_of_each_class(tmp_path):
    for k in range(12):
        write(tmp_path / "b" / f"{k}.png", value=k)
    for k in range(6):
        write(tmp_path / "a" / f"{k}.png", value=100 + k)
    splits = read(tmp_path)
    assert splits.class_names == ("a", "b")
    assert splits.test[0][:, 0, 0].tolist() == [4, 104, 9]  # at 1/4, 1/2 and 3/4
    assert splits.test[1].tolist() == [1, 0, 1]
    train = splits.train[0][:, 0, 0].tolist()
    assert [v for v in train if v < 100] == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert [v for v in train if v >= 100] == [100, 101, 102, 103, 105]


def test_interleaves_classes_in_proportion(tmp_path):
    for name, num in {"rare": 2, "often": 8}.items():
        for k in range(num):
            for split in ("train", "test"):
                write(tmp_path / split / name / f"x{k}.png", value=k)
    images, labels = read(tmp_path).train
    assert labels.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]  # ties, 1/4 and 3/4, do not occur
    assert images[:, 0, 0].tolist() == [0, 1, 0, 2, 3, 4, 5, 1, 6, 7]


def test_equal_numbers_in_two_classes_are_no_order(tmp_path):
    for name in ("a", "b"):
        for k in (1, 2, 10):
            for split in ("train", "test"):
                write(tmp_path / split / name / f"{k}.png", value=k)
    images, labels = read(tmp_path).train
    assert labels.tolist() == [0, 1] * 3  # ties by class
    assert images[:, 0, 0].tolist() == [1, 1, 2, 2, 10, 10]


def test_the_last_part_holds_all_classes(tmp_path):
    write_classes(tmp_path, ("a", "b", "c"), 25)
    labels = read(tmp_path).train[1]
    assert np.bincount(labels[-12:]).tolist() == [4, 4, 4]


def test_classes_are_in_natural_order(tmp_path):
    write_classes(tmp_path, [*map(str, range(12)), "x2", "x10"])
    assert read(tmp_path).class_names == (*map(str, range(12)), "x2", "x10")


def test_a_class_may_be_named_train(tmp_path):
    assert read(write_classes(tmp_path, ("train", "car"))).class_names == ("car", "train")


def test_colors_and_formats(tmp_path):
    pixels = write(tmp_path / "a" / "0.bmp", (4, 4, 3))
    for k in range(1, 5):
        write(tmp_path / "a" / f"{k}.PNG", (4, 4, 3))
        write(tmp_path / "b" / f"{k + 10}.tiff", (4, 4, 3))
    write(tmp_path / "b" / "9.webp", (4, 4, 3))
    splits = read(tmp_path)
    assert splits.train[0].shape == (8, 4, 4, 3)
    np.testing.assert_array_equal(splits.train[0][0], pixels)
    assert read(tmp_path, grayscale=True).train[0].shape == (8, 4, 4)


def test_mixed_colors_need_grayscale(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / "a" / "x0.png", (4, 4, 3), value=9)
    line = refusal(tmp_path)
    assert "a/x0.png colored" in line
    assert "x0.png is gray" in line
    assert "config.data.grayscale=true" in line
    images = read(tmp_path, grayscale=True).train[0]
    assert images.shape == (8, 4, 4)
    assert (images[0] == 9).all()


def test_sizes_must_agree_unless_resized(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / "b" / "x3.png", (5, 7), value=3)
    line = refusal(tmp_path)
    assert "a/x0.png has 4 × 4 pixels and b/x3.png 7 × 5 pixels" in line
    assert "--config.data.size=4" in line
    splits = read(tmp_path, size=6)
    assert splits.train[0].shape == (8, 6, 6)
    assert (splits.train[0][7] == 3).all()


def test_other_files_are_skipped_and_told_in_one_line(tmp_path):
    write_classes(tmp_path)
    expected = read(tmp_path)
    for hidden in ("a/._x0.png", "b/.DS_Store", "b/Thumbs.db", ".git/x.png", "__MACOSX/a/x.png"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"no picture")
    np.testing.assert_array_equal(read(tmp_path).train[0], expected.train[0])  # and says nothing
    write(tmp_path / "a" / "deeper.png" / "x.png")
    (tmp_path / "a" / "notes.txt").touch()
    os.mkfifo(tmp_path / "README")
    said = []
    splits = folder.read(tmp_path, False, None, said.append)
    np.testing.assert_array_equal(splits.train[0], expected.train[0])
    assert len(said) == 1
    assert "README and 2 more" in said[0]


def test_all_bad_pictures_are_named(tmp_path):
    write_classes(tmp_path, num=20, shape=(64, 64))
    whole = (tmp_path / "a" / "x1.png").read_bytes()
    (tmp_path / "a" / "x1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "x2.png").write_bytes(b"")
    (tmp_path / "b" / "x0.png").write_text("text")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "b" / "circle.png").symlink_to("circle.png")
    Image.new("1", (8000, 8000)).save(tmp_path / "b" / "large.png")
    line = refusal(tmp_path)
    assert line.startswith("6 of 43 pictures in ")
    for name in ("a/x1", "a/x2", "b/x0", "b/gone", "b/circle", "b/large"):
        assert f"{name}.png" in line
    assert "a/x2.png" in refusal(tmp_path, size=4)


def test_ten_bad_pictures_are_named(tmp_path):
    write_classes(tmp_path, num=1)
    for k in range(12):
        (tmp_path / "a" / f"y{k}.png").touch()
    write_classes(tmp_path, "b")
    line = refusal(tmp_path)
    assert line.startswith("12 of 18 pictures in ")
    assert line.count("a/y") == 10
    assert "and 2 more (the first is empty)" in line


def test_nothing_blocks(tmp_path, monkeypatch):
    write_classes(tmp_path, num=6)
    os.mkfifo(tmp_path / "a" / "fifo.png")
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("b/socket.png")
    (tmp_path / "b" / "zero.png").symlink_to("/dev/zero")
    lines = []
    thread = threading.Thread(target=lambda: lines.append(refusal(tmp_path)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert lines[0].startswith("3 of 15 pictures in ")
    assert "is not a file" in lines[0]
    os.mkfifo(tmp_path / "fifo")
    assert "is not a folder" in refusal(tmp_path / "fifo")
    assert folder.fingerprint_of_files(tmp_path)


def test_other_layouts_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing")
    (tmp_path / "file").touch()
    assert "is not a folder" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refusal(tmp_path / "empty")
    write(tmp_path / "loose" / "x.png")
    assert "no class folders" in refusal(tmp_path / "loose")
    assert "single class, a" in refusal(write_classes(tmp_path / "one", "a"))
    assert "fewer than 5" in refusal(write_classes(tmp_path / "few", num=4))
    write_classes(tmp_path / "hollow" / "train")
    write_classes(tmp_path / "hollow" / "test")
    for k in range(5):
        (tmp_path / "hollow" / "test" / "a" / f"x{k}.png").unlink()
    line = refusal(tmp_path / "hollow")
    assert "without pictures: test/a" in line


def test_a_validation_folder_in_place_of_test_is_told(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val")
    assert "rename val to test" in refusal(tmp_path)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing")])
def test_other_names_of_splits_are_told(names, tmp_path):
    for name in names:
        for kind in "ab":
            write(tmp_path / name / kind / "1.png")
    assert f"{names[1]} must be named train or test" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_must_agree(tmp_path, split):
    write_classes(tmp_path / split, ("a", "b", "c"))
    other = {"train": "test", "test": "train"}[split]
    line = refusal(tmp_path)
    assert f"a folder {split} of classes but no folder {other}" in line
    write_classes(tmp_path / other, ("a", "b"))
    assert f"{tmp_path}/{other} lacks the class c" in refusal(tmp_path)


def test_unprintable_names_stay_on_one_line(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "a" / "new\nline.png").touch()
    assert r"'a/new\nline.png'" in refusal(tmp_path)
    write_classes(tmp_path, ["two\nlines"])
    assert r"two\nlines" in refusal(tmp_path)


@pytest.mark.skipif(IS_ROOT, reason="root may read everything")
def test_unreadable_files_are_refused(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "a" / "x0.png").chmod(0)
    assert "Permission denied" in refusal(tmp_path)
    (tmp_path / "b").chmod(0)
    try:
        assert "Permission denied" in refusal(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o700)


def test_too_many_pixels_for_memory_are_refused(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    write_classes(tmp_path)
    monkeypatch.setattr(np, "empty", fail)
    assert "--config.data.size" in refusal(tmp_path)


def test_warning_filters_survive_threads(tmp_path):
    write_classes(tmp_path, num=50)
    before = warnings.filters.copy()
    read(tmp_path)
    assert warnings.filters == before


def test_fingerprint_tells_changes(tmp_path):
    write_classes(tmp_path / "data")
    one = tmp_path / "data" / "a" / "x0.png"

    def both():
        return folder.fingerprint_of_files(tmp_path / "data"), folder.fingerprint_of_files(one)

    first = both()
    assert first[0] != first[1]
    assert both() == first
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert folder.fingerprint_of_files(tmp_path / "link") == first[0]
    (tmp_path / "data" / ".DS_Store").touch()
    assert both() == first
    os.utime(one, ns=(1, 1))
    second = both()
    assert second[0] != first[0]
    assert second[1] != first[1]
    (tmp_path / "data" / "a" / "x1.png").rename(tmp_path / "data" / "a" / "y.png")
    third = both()
    assert third[0] != second[0]
    assert third[1] == second[1]
    (tmp_path / "data" / "a" / "x2.png").rename(tmp_path / "elsewhere.png")
    (tmp_path / "data" / "a" / "x2.png").symlink_to(tmp_path / "elsewhere.png")
    assert both() == third
    (tmp_path / "data" / "a" / "up").symlink_to("..")
    (tmp_path / "data" / "b" / "up").symlink_to("..")
    (tmp_path / "data" / "b" / "gone").symlink_to("nothing")
    assert both()[0] != third[0]
    with pytest.raises(UserError, match="cannot be read"):
        folder.fingerprint_of_files(tmp_path / "nothing")
