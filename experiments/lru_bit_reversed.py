"""Pixels in the order of bit reversal with the network of `lru_permuted`, of twice the width.

Command:
  python -m seqmnist.main --workdir=runs/lru_bit_reversed --config=experiments/lru_bit_reversed.py

Duration: 11 to 14 minutes on one slow CPU core that did other work too. Test accuracy, seeds 0 to 2
(--config.seed): 0.9837 ± 0.0004 (mean ± sd), with 1,456,074 parameters; validation 0.9831.
No augmentation. By validation of one seed, the width of `lru_permuted` for 24 epochs is as good,
and 392 states, a dropout of 0.7 or a weight decay of 3 are no better. The training loss is far
below the validation loss at the end.
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
