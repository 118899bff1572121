"""Pixels in the order of bit reversal with the network of `lru_permuted`.

Command:
  python -m seqmnist.main --workdir=runs/lru_bit_reversed --config=experiments/lru_bit_reversed.py

Duration: 18 minutes on two CPU cores. Test accuracy of seed 0: 0.9845, with 466,378 parameters;
validation 0.9829. No augmentation. Settings of `lru_permuted`, for 24 epochs instead of 16, not
chosen anew; the training loss is far below the validation loss at the end.
Reference: S4 98.70 % (A. Gu et al., arXiv 2111.00396), S5 98.67 % (J. T. H. Smith et al., arXiv
2208.04933), both of several layers that read and write at every step, in the same order.
"""

import pathlib

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.load_experiment(pathlib.Path(__file__).with_name("lru_permuted.py"))
    config.model.view = "bit_reversed_pixels"
    config.model.hidden_size = 1024
    return config
