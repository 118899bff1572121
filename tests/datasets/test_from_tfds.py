import dataclasses
import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY
from PIL import Image

from seqmnist.config import DataConfig
from seqmnist.datasets import from_tfds, sources
from seqmnist.errors import UserError

NAMES = ["cat", "dog", "hen"]
LABEL = tfds.features.ClassLabel(names=NAMES)


def make_arrays(shape, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, len(NAMES), n)


def write(
    data_dir,
    image,
    arrays,
    label=LABEL,
    name="toy",
    version="1.0.0",
    config=None,
    keys=("image", "label"),
    encode=None,
    more=None,
):
    """Has TFDS prepare a dataset of these arrays per split, as it is without TensorFlow."""
    more = more or {}
    encode = encode or encode_png

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        pkg_dir_path = data_dir

        def _info(self):
            features = {
                "image": image,
                "label": label,
                **{key: kind for key, (kind, _) in more.items()},
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=keys,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(*pair) for split, pair in arrays.items()}

        def _generate_examples(self, images, labels):
            for i, (one, its_label) in enumerate(zip(images, labels, strict=True)):
                values = {key: value for key, (_, value) in more.items()}
                yield i, {"image": encode(one), "label": its_label, **values}

    Toy.name = name
    Toy(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir / name / (config or "") / version


def encode_png(pixels):
    Image.fromarray(pixels).save(content := io.BytesIO(), format="PNG")
    content.seek(0)
    return content


def write_small(data_dir, **settings):
    """Prepares a dataset of small gray images; returns its arrays and its folder."""
    arrays = {"train": make_arrays((4, 3), 7), "test": make_arrays((4, 3), 5, seed=1)}
    return arrays, write(data_dir, tfds.features.Image(shape=(4, 3, 1)), arrays, **settings)


def check(splits, arrays):
    for split, (images, labels) in arrays.items():
        read_images, read_labels = getattr(splits, split)
        np.testing.assert_array_equal(read_images, images)
        np.testing.assert_array_equal(read_labels, labels)
        assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int32)


def refusal(data_dir, name="toy"):
    """Returns the one line that refuses a dataset."""
    with pytest.raises(UserError) as error:
        from_tfds.read(name, data_dir)
    line = str(error.value)
    assert line.isprintable()
    assert str(data_dir) in line
    assert "; " in line
    return line


@pytest.mark.parametrize("shape", [(28, 28), (8, 8, 3)])
def test_reads_images_of_tfds(tmp_path, shape):
    arrays = {"train": make_arrays(shape, 12), "test": make_arrays(shape, 5, seed=1)}
    write(tmp_path, tfds.features.Image(shape=(*shape, 1)[:3]), arrays)
    splits = from_tfds.read("toy", tmp_path)
    check(splits, arrays)
    assert splits.class_names == tuple(NAMES)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
def test_reads_tensors_in_several_chunks(tmp_path, shape, monkeypatch):
    monkeypatch.setattr(from_tfds, "_CHUNK", 4)
    arrays = {"train": make_arrays(shape, 9), "test": make_arrays(shape, 4)}
    write(
        tmp_path,
        tfds.features.Tensor(shape=shape, dtype=np.uint8),
        arrays,
        label=tfds.features.ClassLabel(num_classes=3),
        encode=lambda image: image,
    )
    splits = from_tfds.read("toy", tmp_path)
    if shape[2:] == (1,):
        arrays = {split: (images[..., 0], labels) for split, (images, labels) in arrays.items()}
    check(splits, arrays)
    assert splits.class_names == ("0", "1", "2")


def test_other_features_are_not_decoded(tmp_path):
    other = tfds.features.Image(shape=(2, 2, 3))
    arrays, _ = write_small(tmp_path, more={"other": (other, io.BytesIO(b"no picture"))})
    check(from_tfds.read("toy", tmp_path), arrays)


def test_finds_versions_and_configs(tmp_path):
    assert from_tfds.found(tmp_path / "nothing", "toy") is None
    _, old = write_small(tmp_path, version="1.9.0")
    arrays, new = write_small(tmp_path, version="1.10.0")
    (tmp_path / "toy" / "2.0.0").mkdir()  # without contents
    (tmp_path / "toy" / "incomplete.3_3.0.0").mkdir()
    (tmp_path / "toy" / "incomplete.3_3.0.0" / "dataset_info.json").touch()
    assert from_tfds.found(tmp_path, "toy") == new
    assert from_tfds.found(tmp_path, "toy:1.*.*") == new
    assert from_tfds.found(tmp_path, "toy:1.9.*") == old
    for name in ("toy:2.0.0", "toy:1.9", "toy/1.9.0", "to", "..", "../toy", "", "toy "):
        assert from_tfds.found(tmp_path, name) is None
    _, configured = write_small(tmp_path, name="other", config="small-1")
    assert from_tfds.found(tmp_path, "other/small-1") == configured
    assert from_tfds.found(tmp_path, "other/small-1:1.0.0") == configured
    assert from_tfds.found(tmp_path, "other") is None
    check(from_tfds.read("other/small-1", tmp_path), arrays)
    line = refusal(tmp_path, "other")
    assert "it contains other/small-1:1.0.0, " in line
    assert "write a name such as mnist" in refusal(tmp_path, "toy:1.9")


def test_what_is_missing_is_prepared_by_a_command(tmp_path):
    line = refusal(tmp_path / "it's here", "mnist:3.0.1")
    assert "it contains none" in line
    program, flag, code = shlex.split(line.partition("installed: ")[2])
    assert (program, flag) == ("python", "-c")
    called = {}

    class Module:
        @staticmethod
        def builder(name, **settings):
            called.update(settings, name=name)
            return Module

        @staticmethod
        def download_and_prepare():
            called["prepared"] = True

    exec(code.replace("import tensorflow_datasets as tfds; ", ""), {"tfds": Module})
    assert called == {
        "name": "mnist:3.0.1",
        "data_dir": str(tmp_path / "it's here"),
        "file_format": "array_record",
        "prepared": True,
    }


def test_tfrecord_must_be_converted(tmp_path):
    arrays, path = write_small(tmp_path)
    info = json.loads((path / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (path / "dataset_info.json").write_text(json.dumps(info))
    line = refusal(tmp_path)
    assert f"{path} is stored as tfrecord" in line
    assert f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_rec" in line
    info["alternativeFileFormats"] = ["array_record"]  # as the command leaves it
    (path / "dataset_info.json").write_text(json.dumps(info))
    check(from_tfds.read("toy", tmp_path), arrays)


def test_other_datasets_are_refused(tmp_path):
    arrays = {"train": make_arrays((4, 4), 3), "test": make_arrays((4, 4), 2)}
    gray = tfds.features.Image(shape=(4, 4, 1))

    def refuse(**settings):
        refuse.count = getattr(refuse, "count", 0) + 1
        folder = tmp_path / str(refuse.count)
        folder.mkdir()
        write(folder, **{"image": gray, "arrays": arrays, **settings})
        line = refusal(folder)
        assert str(folder / "toy" / "1.0.0") in line
        return line

    assert "splits train, but" in refuse(arrays={"train": arrays["train"]})
    assert "image (Image), label (ClassLabel)" in refuse(keys=None)
    text = {"label": tfds.features.Scalar(np.int64)}
    assert "its labels are label (Scalar)" in refuse(**text)
    tensor = tfds.features.Tensor(shape=(4, 4), dtype=np.float32)
    assert "type float32" in refuse(image=tensor, encode=lambda image: image.astype(np.float32))
    tensor = tfds.features.Tensor(shape=(4,), dtype=np.uint8)
    assert "shape (4,)" in refuse(image=tensor, encode=lambda image: image[0])
    rgba = {split: make_arrays((4, 4, 4), 2) for split in arrays}
    assert "shape (4, 4, 4)" in refuse(image=tfds.features.Image(shape=(4, 4, 4)), arrays=rgba)
    unlabeled = arrays["train"][0], np.array([0, 1, -1])
    assert "the label -1" in refuse(arrays={**arrays, "train": unlabeled})
    any_size = tfds.features.Image(shape=(None, None, 1))
    sizes = {**arrays, "train": ([np.zeros((4, 4), np.uint8), np.zeros((4, 6), np.uint8)], [0, 1])}
    assert "(4, 4, 1) and (4, 6, 1)" in refuse(image=any_size, arrays=sizes)


def test_images_of_one_size_need_not_declare_it(tmp_path):
    arrays = {"train": make_arrays((4, 4), 3), "test": make_arrays((4, 4), 2)}
    write(tmp_path, tfds.features.Image(shape=(None, None, 1)), arrays)
    check(from_tfds.read("toy", tmp_path), arrays)


def test_splits_of_different_sizes_can_be_resized(tmp_path):
    arrays = {"train": make_arrays((4, 4), 3), "test": make_arrays((5, 4), 2)}
    write(tmp_path, tfds.features.Image(shape=(None, None, 1)), arrays)
    config = DataConfig("tfds:toy", tmp_path)
    with pytest.raises(UserError, match=r"\[4, 4\] and test of \[5, 4\]; config.data.size=PIXELS"):
        sources.prepare(config)
    prepared = sources.prepare(dataclasses.replace(config, size=4))
    assert prepared.spec.shape == (4, 4)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "toy-test*", "toy-train*"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_datasets_are_refused(tmp_path, file, damage):
    _, folder = write_small(tmp_path)
    [path] = folder.glob(file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    line = refusal(tmp_path)
    assert (f"{folder} cannot be read" in line) or (file, damage) == (
        "dataset_info.json",
        "removed",
    )


def test_records_that_are_not_pictures_are_refused(tmp_path):
    write_small(tmp_path, encode=lambda _: io.BytesIO(b"no picture"))
    assert "cannot be read (" in refusal(tmp_path)


def test_finding_needs_no_tfds():
    code = (
        "import pathlib, sys; from seqmnist.datasets import from_tfds; "
        "from_tfds.found(pathlib.Path('.'), 'mnist'); print('tensorflow_datasets' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "False\n", answer.stderr
