"""MNIST and its relatives as a TFDS dataset."""
