"""The TFDS builder of all datasets that are prepared here, without TensorFlow.

It differs from TFDS's own builders in three ways: images are plain tensors (their PNG needs
TensorFlow to decode), the format is `array_record`, and archive order is kept.
"""

import numpy as np
import tensorflow_datasets as tfds

from seqmnist.datasets import archives


class Builder(tfds.core.GeneratorBasedBuilder):
    """Images uint8 [H, W] or [H, W, 3] and labels, in archive order."""

    name = "mnist_family"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: archives.Splits, config: str, **kwargs):
        self._splits = splits
        config = tfds.core.BuilderConfig(name=config, description="Images and their classes.")
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self):
        (images, _), _ = self._splits
        features = {
            "image": tfds.features.Tensor(shape=images.shape[1:], dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=list(self._splits.class_names)),
        }
        info = self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )
        # It asks a server for datasets of TFDS, and leaves an empty folder in /tmp.
        info.initialize_from_bucket = lambda: None
        return info

    def _split_generators(self, dl_manager):
        splits = zip(("train", "test"), self._splits, strict=True)
        return {split: self._generate_examples(*arrays) for split, arrays in splits}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
