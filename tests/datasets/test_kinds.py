"""Datasets in the forms that people have them, and what is wrong with them."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import struct
import tarfile
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from small_archives import idx, make_splits, write_archives
from test_predict import call

from seqmnist import run
from seqmnist.config import Config, DataConfig, ModelConfig, TrainConfig, override
from seqmnist.datasets import archives, sources
from seqmnist.datasets.arrays import read as read_npz
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import trained
from seqmnist.study.images import is_of_digits
from tools import predict

NAMES = sum(archives.NAMES.values(), ())


def prepare(tmp_path, name, manual_dir=None, say=lambda _: None, **fields):
    manual_dir = manual_dir and str(manual_dir)
    config = DataConfig(name, str(tmp_path / "data"), manual_dir, **fields)
    return sources.prepare(config, say)


def assert_holds(prepared, splits):
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        for arrays in (prepared.arrays(split), prepared.mapped(split)):
            np.testing.assert_array_equal(arrays[0], images)
            np.testing.assert_array_equal(arrays[1], labels)


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


SPLITS = make_splits()


@pytest.fixture
def plain(tmp_path):
    """The small archives, unpacked."""
    folder = write_archives(tmp_path / "plain", SPLITS)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


def spell(folder, spelling):
    for path in list(folder.iterdir()):
        name = spelling(path.name)
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        content = path.read_bytes()
        path.unlink()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


SPELLINGS = {
    "unpacked": lambda name: name,
    "compressed": lambda name: f"{name}.gz",
    "with a dot": lambda name: name.replace("-idx", ".idx"),
    "with a dot, compressed": lambda name: f"{name.replace('-idx', '.idx')}.gz",
    "in folders of their names": lambda name: f"{name.replace('-idx', '.idx')}.d/{name}",
    "as torchvision has them": lambda name: f"MNIST/raw/{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_archives_are_found_as_they_are_spelled(spelling, plain, tmp_path):
    spell(plain, SPELLINGS[spelling])
    prepared = prepare(tmp_path, "mnist", plain, verify_checksums=False)
    assert_holds(prepared, SPLITS)
    assert prepared.spec == MNIST
    (tmp_path / "data" / "mnist_family" / prepared.name).rename(tmp_path / "aside")
    other = write_archives(tmp_path / "other", SPLITS)
    again = prepare(tmp_path, "mnist", other, verify_checksums=False)
    assert (again.name, again.fingerprint) == (prepared.name, prepared.fingerprint)


def test_archives_of_one_dataset_are_from_one_folder(plain, tmp_path):
    folder, (images, labels, *_) = tmp_path / "several", NAMES
    other = write_archives(tmp_path / "other", make_splits(seed=1))
    (folder / "a").mkdir(parents=True)
    (other / images).rename(folder / "a" / images)  # comes first, but is not all
    whole = plain.rename(folder / "b")
    assert_holds(prepare(tmp_path, "mnist", folder, verify_checksums=False), SPLITS)
    (folder / "c").mkdir()
    labels = labels.removesuffix(".gz")
    (whole / labels).rename(folder / "c" / labels)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mnist", folder, verify_checksums=False)
    assert_one_line(caught, folder / "a" / images, folder / "b" / "train-im", "config.data.manual")
    shutil.copy(whole / images.removesuffix(".gz"), folder / "a")
    (folder / "a" / images).unlink()  # copies do no harm
    assert_holds(prepare(tmp_path, "mnist", folder, verify_checksums=False), SPLITS)


def test_archives_in_a_zip_file(plain, tmp_path):
    folder = tmp_path / "zipped"
    folder.mkdir()
    with zipfile.ZipFile(folder / "archive.zip", "w") as file:
        for path in plain.iterdir():
            file.mkdir(f"raw/{path.name}")  # as Kaggle has them
            file.write(path, f"raw/{path.name}/{path.name}")
            file.write(path, f"raw/{path.name.replace('-idx', '.idx')}")
    # An end that names a directory where there is none.
    (folder / "another.zip").write_bytes(bytes(99) + b"PK\5\6" + struct.pack("<8xII2x", 46, 9))
    assert_holds(prepare(tmp_path, "mnist", folder, verify_checksums=False), SPLITS)
    (folder / "archive.zip").unlink()
    with pytest.raises(UserError, match=r"found another\.zip, which is damaged"):
        prepare(tmp_path, "mnist", folder, verify_checksums=False)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_file_is_one_line(method, plain, tmp_path):
    folder = tmp_path / "zipped"
    folder.mkdir()
    with zipfile.ZipFile(folder / "archive.zip", "w", method) as file:
        for path in plain.iterdir():
            file.write(path, path.name)
    content = bytearray((folder / "archive.zip").read_bytes())
    content[2000:2100] = bytes(100)
    (folder / "archive.zip").write_bytes(content)
    with pytest.raises(UserError) as caught:
        archives.read_folder(folder, "mnist")
    assert_one_line(caught, folder, "cannot be read", "config.data.manual_dir")


def test_an_archive_that_is_compressed_anew_is_the_registered_one(plain, tmp_path, monkeypatch):
    files = archives.read_folder(plain, "mnist")
    known = {archives.content_hash(file.content): name for name, file in files.items()}
    monkeypatch.setattr(archives, "_CONTENTS", known)
    spell(plain, lambda name: f"{name}.gz")
    prepared = prepare(tmp_path, "mnist", plain)
    assert (prepared.name, prepared.notice) == ("mnist", None)
    for fields in ({}, {"verify_checksums": False}):
        with pytest.raises(UserError) as caught:
            prepare(tmp_path, "fashion_mnist", plain, **fields)
        assert_one_line(caught, "those of mnist, not of fashion_mnist", "--config.data.name=mnist")


def test_a_file_that_is_refused_is_named_as_it_lies_there(plain, tmp_path):
    path = plain / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mnist", plain, verify_checksums=False)
    assert_one_line(caught, f"{path} ")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mnist", plain)
    assert_one_line(caught, f"{plain / 't'}", "idx3-ubyte is not the registered archive of mnist")


def test_a_dataset_without_files_refuses_a_folder(tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "digits", tmp_path)
    assert_one_line(caught, "digits needs no files", "config.data.manual_dir")
    with pytest.raises(UserError, match="tfds:mnist needs no files"):
        prepare(tmp_path, "tfds:mnist", tmp_path)


def test_a_missing_file_names_what_lies_beside(plain, tmp_path):
    (plain / "train-images-idx3-ubyte").rename(plain / "training-images.idx3")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mnist", plain)
    assert_one_line(caught, "train-images-idx3-ubyte.gz", "found ", "training-images.idx3")


def test_archives_beside_the_prepared_ones_are_told(plain, tmp_path, monkeypatch):
    def refuse(_):
        raise archives.DownloadError("no network")

    monkeypatch.setattr(archives, "download", refuse)
    with pytest.raises(UserError) as caught:
        sources.prepare(DataConfig("mnist", str(plain)))
    assert_one_line(caught, "found ", "idx3-ubyte", f"--config.data.manual_dir={plain}")


def write_emnist(folder, part, labels, first=0):
    """Writes images whose bright pixel is in row 2, column 5, as EMNIST's files have them."""
    folder.mkdir()
    images = np.zeros((len(labels), 28, 28), np.uint8)
    images[:, 5, 2] = 255  # transposed
    for split in ("train", "test"):
        for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            name = f"emnist-{part}-{split}-{kind}-ubyte.gz"
            (folder / name).write_bytes(idx(magic, array.astype(np.uint8)))
    return folder


@pytest.mark.parametrize(
    ("part", "first", "count", "names"),
    [("balanced", 0, 47, "0Zt"), ("letters", 1, 26, "ABZ"), ("digits", 0, 10, "09")],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_emnist_is_transposed_and_counts_from_zero(part, first, count, names, zipped, tmp_path):
    folder = write_emnist(tmp_path / "emnist", part, np.arange(first, first + count))
    if zipped:
        with zipfile.ZipFile(tmp_path / "gzip.zip", "w") as file:
            for path in folder.iterdir():
                file.write(path, f"gzip/{path.name}")
        folder = tmp_path / "zipped"
        folder.mkdir()
        (tmp_path / "gzip.zip").rename(folder / "gzip.zip")
    prepared = prepare(tmp_path, f"emnist_{part}", folder, verify_checksums=False)
    images, labels = prepared.arrays("train")
    assert (images[:, 2, 5] == 255).all()
    np.testing.assert_array_equal(labels, np.arange(count))
    assert prepared.spec.num_classes == count
    assert set(names) <= set(prepared.spec.class_names)
    wrong = write_emnist(tmp_path / "wrong", part, np.array([first, first + count]))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, f"emnist_{part}", wrong, verify_checksums=False)
    assert_one_line(caught, f"the label {first + count}", f"{first} to {first + count - 1}")


def test_fashion_has_names(plain, tmp_path):
    prepared = prepare(tmp_path, "fashion_mnist", plain, verify_checksums=False)
    assert prepared.spec.class_names[7] == "sneaker"


def test_k49(tmp_path):
    folder = tmp_path / "k49"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (49, 28, 28), np.uint8)
    for split in ("train", "test"):
        np.savez_compressed(folder / f"k49-{split}-imgs.npz", images)
        np.savez_compressed(folder / f"k49-{split}-labels.npz", np.arange(49, dtype=np.uint8))
    prepared = prepare(tmp_path, "k49", folder, verify_checksums=False)
    assert_holds(prepared, [(images, np.arange(49))] * 2)
    assert len(set(prepared.spec.class_names)) == 49
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "k49")
    assert_one_line(caught, "no checksum of k49 is on record", "codh.rois.ac.jp", "manual_dir")
    (folder / "k49-test-imgs.npz").write_bytes(b"PK\3\4 no")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "k49", folder, verify_checksums=False)
    assert_one_line(caught, "k49-test-imgs.npz cannot be read")


def write_cifar(folder, packed):
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(60, -1)], 1)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, part in zip(names, np.split(records, 6), strict=True):
        (folder / name).write_bytes(part.tobytes())
    if packed:
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as file:
            for name in names:
                file.add(folder / name, f"cifar-10-batches-bin/{name}")
                (folder / name).unlink()
    return archives.Splits((images[:50], labels[:50]), (images[50:], labels[50:]))


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(packed, tmp_path):
    splits = write_cifar(tmp_path / "cifar", packed)
    prepared = prepare(tmp_path, "cifar10", tmp_path / "cifar", verify_checksums=False)
    assert_holds(prepared, splits)
    assert prepared.spec.shape == (32, 32, 3)
    assert prepared.spec.class_names[8] == "ship"
    gray = prepare(
        tmp_path, "cifar10", tmp_path / "cifar", verify_checksums=False, grayscale=True, size=8
    )
    assert gray.spec.shape == (8, 8)
    expected = [Image.fromarray(image).convert("L").resize((8, 8), 2) for image in splits.test[0]]
    got, _ = gray.arrays("test")
    np.testing.assert_array_equal(got, np.stack([np.asarray(each) for each in expected]))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "cifar10", tmp_path / "cifar")
    assert_one_line(caught, "not the registered archive of cifar10", "verify_checksums=false")


def save_npz(path, **changes):
    (images, labels), (test_images, test_labels) = SPLITS
    arrays = {"x_train": images, "y_train": labels, "x_test": test_images, "y_test": test_labels}
    arrays = {name: each for name, each in (arrays | changes).items() if each is not None}
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"y_train": SPLITS.train[1][:, None].astype(np.int64)},
        {"x_train": SPLITS.train[0][..., None]},
        {"x_train": SPLITS.train[0] / 255},
        {"x_train": SPLITS.train[0].astype(np.float32)},
    ],
)
def test_npz_files(change, tmp_path):
    path = save_npz(tmp_path / "mnist.npz", **change)
    prepared = prepare(tmp_path, "npz", path)
    assert_holds(prepared, SPLITS)
    assert prepared.spec == dataclasses.replace(MNIST, has_margins=False)  # of noise
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "mine.npz")
    assert prepare(tmp_path, "npz", tmp_path / "folder").fingerprint == prepared.fingerprint


@pytest.mark.parametrize(("least", "is_digit"), [(0, False), (1, True), (4, True)])
def test_images_with_ink_on_the_border_are_no_digits(least, is_digit, tmp_path):
    rows = np.random.default_rng(0).integers(1, 256, (30, 28, 28), np.uint8)
    rows[:, :least] = rows[:, 28 - least :] = rows[..., :least] = rows[..., 28 - least :] = 0
    rows[0] = 255  # some are otherwise
    prepared = prepare(tmp_path, "npz", save_npz(tmp_path / "mine.npz", x_train=rows))
    assert is_of_digits(prepared.spec) == is_digit
    assert ImageSpec.from_dict(prepared.spec.to_dict()) == prepared.spec


def test_a_file_that_changes_is_read_again(tmp_path):
    path = save_npz(tmp_path / "mnist.npz")
    first = prepare(tmp_path, "npz", path)
    assert prepare(tmp_path, "npz", path) == first
    save_npz(path, x_test=255 - SPLITS.test[0])
    os.utime(path, (1, 1))
    second = prepare(tmp_path, "npz", path)
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_test": None}, ["holds no y_test", "x_train, y_train, x_test"]),
        ({"x_train": SPLITS.train[0][:-1]}, ["29 images", "[30]"]),
        ({"x_test": np.zeros((12, 8, 8), np.uint8)}, ["[28, 28]", "[8, 8]", "data.size"]),
        ({"y_train": np.full(30, -1)}, ["the labels -1 to"]),
        ({"y_train": np.full(30, 2**32 + 1)}, ["4294967297"]),
        ({"y_train": np.full(30, 10**6)}, ["1000000", "at most 65535"]),
        ({"y_train": np.eye(30)}, ["float64 [30, 30] as y_train", "argmax"]),
        ({"y_train": np.zeros(30), "y_test": np.zeros(12)}, ["float64"]),
        ({"x_train": np.full((30, 28, 28), np.nan)}, ["not finite"]),
        ({"x_train": np.zeros((30, 28, 0), np.uint8)}, ["[30, 28, 0]"]),
        ({"x_train": np.zeros((30, 28, 28, 2), np.uint8)}, ["[30, 28, 28, 2]"]),
        ({"x_train": np.zeros((30, 784), np.uint8)}, ["[30, 784]"]),
        ({"x_train": np.array(["text"] * 30)}, ["<U4 as x_train"]),
        ({"x_train": np.array([None] * 30)}, ["cannot be read", "pickle"]),
        (
            {name: SPLITS.train[i][:0] for name, i in (("x_train", 0), ("y_train", 1))},
            ["0 images"],
        ),
    ],
)
def test_npz_files_that_cannot_be_used(change, words, tmp_path):
    path = save_npz(tmp_path / "mnist.npz", **change)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "npz", path)
    assert_one_line(caught, *words)
    assert not (tmp_path / "data" / "mnist_family").exists()


@pytest.mark.parametrize("content", ["array", "text", "half"])
def test_a_file_that_is_not_npz_is_refused(content, tmp_path):
    path = save_npz(tmp_path / "mnist.npz")
    whole = path.read_bytes()
    if content == "array":
        np.save(path.open("wb"), SPLITS.train[0])
    else:
        path.write_bytes(b"nothing" if content == "text" else whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "npz", path)
    assert_one_line(caught, path, "not a .npz file", "numpy.savez")


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    for name in ("a", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in {name}").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lost+found")
    found, _ = archives._files(tmp_path)
    assert {name for files in found.values() for name in files} == {"in a"}


def test_a_wrong_address_of_a_proxy_is_a_failed_download(monkeypatch):
    def refuse(url):
        raise ValueError("proxy URL with no authority")

    monkeypatch.setattr(archives, "_open", refuse)
    with pytest.raises(archives.DownloadError, match="no authority"):
        archives.download("mnist")


def test_only_archives_have_arrays(tmp_path):
    prepared = prepare(tmp_path, "npz", save_npz(tmp_path / "mine.npz"))
    for read in (prepared.arrays, prepared.mapped, prepared.num_examples):
        with pytest.raises(UserError, match="'validation' is no archive"):
            read("validation")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_one_line_or_harmless(save, tmp_path):
    x, y = (array[:2] for array in SPLITS.train)
    save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    whole = (tmp_path / "a.npz").read_bytes()
    for position in np.linspace(0, len(whole) - 1, 150).astype(int):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "a.npz").write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["mnist", "npz", "folder", "cifar10"])
@pytest.mark.parametrize("kind", ["missing", "empty", "fifo", "text"])
def test_an_unusable_source_is_refused_in_one_line(name, kind, tmp_path):
    path = tmp_path / "source"
    if kind == "empty":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("nothing")
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, name, path)
    assert_one_line(caught, path)
    for form in ("npz", "folder"):
        with pytest.raises(UserError, match=r"needs config\.data\.manual_dir, where"):
            prepare(tmp_path, form)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_fifo_in_the_place_of_an_archive_is_not_waited_for(name, tmp_path):
    folder = write_archives(tmp_path / "archives", SPLITS)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "mnist", folder, verify_checksums=False)
    assert_one_line(caught, name, "it is not a file")


def test_an_unknown_name_is_refused_with_the_choices(tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, "cifar100")
    assert_one_line(caught, "cifar10", "folder", "tfds:NAME", "digits")


def test_small_digits_are_stratified_and_do_not_change(tmp_path):
    prepared = prepare(tmp_path, "digits")
    assert prepared.spec == ImageSpec(8, 8, 1, MNIST.class_names)
    (images, labels), (test_images, test_labels) = map(prepared.arrays, ("train", "test"))
    assert (len(labels), len(test_labels)) == (1442, 355)
    assert (images.min(), images.max()) == (0, 255)
    shares = np.bincount(test_labels) / np.bincount(np.concatenate([labels, test_labels]))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)
    held_out = np.bincount(labels[-289:], minlength=10)
    assert held_out.min() >= 15
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in test_images}
    assert prepared.fingerprint.startswith("c9a87626ea07d24d")


def test_a_size_beyond_memory_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught:  # 4e17 bytes
        prepare(tmp_path, "digits", size=16_000_000)
    assert_one_line(caught, "pictures of digits, 16,000,000 ×", "memory", "--config.data.size=64")


def test_notices():
    splits = {"train": range(80), "validation": range(80, 100)}
    spec = ImageSpec(4, 4, 1, ("cat", "dog", "owl"))
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4), np.uint8)
    mixed = np.arange(100) % 3
    assert sources.notices(images, mixed, splits, spec) == []
    (line,) = sources.notices(images, np.repeat([0, 1, 2], [40, 40, 20]), splits, spec)
    assert "1 class (owl)" in line
    assert "owl" in line
    (line,) = sources.notices(images, np.arange(100) % 2 + 1, splits, spec)
    assert "no label of training names 1 class (cat)" in line
    for held_out, expected in ((29, []), (30, ["holds none of 1 class (owl)"])):
        own = {"train": range(100 - held_out), "validation": range(100 - held_out, 100)}
        lines = sources.notices(images, np.where(np.arange(100) < 70, mixed, mixed % 2), own, spec)
        assert [line[line.index("holds") :].partition(";")[0] for line in lines] == expected
    (line,) = sources.notices(np.zeros_like(images), mixed, splits, spec)
    assert "alike" in line


def write_pictures(folder, splits):
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(label) / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def config_of(tmp_path, **fields):
    config = Config(
        data=DataConfig(data_dir=str(tmp_path / "data"), verify_checksums=False),
        model=ModelConfig(hidden_size=8),
        train=TrainConfig(num_epochs=2, batch_size=8),
    )
    return override(config, fields)


def test_a_folder_and_archives_of_the_same_images_are_alike(tmp_path):
    splits = [
        (images, np.arange(len(labels), dtype=np.uint8) % 10)
        for images, labels in make_splits(60, 20)
    ]
    folder = write_archives(tmp_path / "archives", archives.Splits(*splits))
    one = prepare(tmp_path, "mnist", folder, verify_checksums=False)
    other = prepare(tmp_path, "folder", write_pictures(tmp_path / "pictures", splits))
    for prepared in (one, other):
        assert_holds(prepared, splits)
    assert dataclasses.replace(one.spec, has_margins=False) == other.spec  # they are of noise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "input_mode"),
    [
        ("cifar10", "resident"),
        ("cifar10", "stream"),
        ("emnist_balanced", "resident"),
        ("digits", "resident"),
    ],
)
def test_any_images_train_resume_and_evaluate(name, input_mode, tmp_path):
    manual_dir = None
    if name == "cifar10":
        write_cifar(manual_dir := tmp_path / "cifar", packed=True)
    elif name == "emnist_balanced":
        write_emnist(manual_dir := tmp_path / "emnist", "balanced", np.arange(47))
    fields = {"data.name": name, "data.manual_dir": manual_dir and str(manual_dir)}
    config = config_of(tmp_path, **fields, **{"data.input_mode": input_mode})
    results = run.train(config, tmp_path / "run")
    shape = results["dataset"]["images"]
    network = trained.load(tmp_path / "run")
    assert network.spec == ImageSpec.from_dict(shape)
    config.train.num_epochs = 3
    results = run.train(config, tmp_path / "run")
    assert run.evaluate(config, tmp_path / "run") == results["test"]
    images, labels = network.test_set(print)
    assert network.logits(images).shape == (len(labels), network.spec.num_classes)
    assert network.beliefs(images[:2]).shape[2] == network.spec.num_classes


@pytest.mark.slow
def test_other_data_are_refused_before_other_shapes(tmp_path):
    run.train(config_of(tmp_path, **{"data.name": "digits"}), tmp_path / "run")
    write_cifar(tmp_path / "cifar", packed=True)
    fields = {"data.name": "cifar10", "data.manual_dir": str(tmp_path / "cifar")}
    config = config_of(tmp_path, **fields)
    for act in (run.train, run.evaluate):
        with pytest.raises(UserError, match="was trained on other data than cifar10"):
            act(config, tmp_path / "run")


@pytest.mark.slow
def test_class_sorted_images_are_told(tmp_path, capsys):
    (images, labels), test = make_splits(60, 20)
    path = tmp_path / "sorted.npz"
    order = np.argsort(labels, kind="stable")
    np.savez(path, x_train=images[order], y_train=labels[order], x_test=test[0], y_test=test[1])
    fields = {"data.name": "npz", "data.manual_dir": str(path), "train.num_epochs": 1}
    run.train(config_of(tmp_path, **fields), tmp_path / "run")
    assert "training has not seen" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "training has not seen" in results["dataset"]["notice"]


LOADER = """
import numpy as np
from seqmnist.datasets import archives, sources

def stripes():
    labels = np.arange(40) % 2
    images = np.zeros((40, 6, 9, 3), np.uint8)
    images[labels == 0, ::2] = 255
    images[labels == 1, :, ::2] = 255
    return archives.Splits((images, labels), (images, labels), ("across", "down"))

sources.LOADERS["stripes"] = stripes
"""


@pytest.mark.slow
@mock.patch.dict(sources.LOADERS)
def test_a_dataset_of_ones_own_is_one_function_and_one_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    fields = {"plugins": "mine.py", "data.name": "stripes", "optimizer.learning_rate": 0.01}
    run.train(config_of(tmp_path, **fields, **{"train.num_epochs": 5}), "run")
    shown = capsys.readouterr().out
    assert "6 × 9 × 3, in 2 classes" in shown
    assert "test_accuracy: 1.0000" in shown
    Image.fromarray(np.uint8(255 * (np.arange(9) % 2 == 0))[None].repeat(6, 0)).save(
        tmp_path / "down.png"
    )
    assert call(monkeypatch, predict, "--workdir=run", "down.png") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "down"
