"""Pixels in the order of bit reversal, with one S5 layer and a perceptron on its last state.

Command:
  python -m seqmnist.main --workdir=runs/s5_permuted --config=experiments/s5_permuted.py

Duration: 4 to 6 minutes on one slow CPU core. Test accuracy, seeds 0 to 2 (--config.seed): 0.9805 ±
0.0007 (mean ± sd), with 466,378 parameters; validation 0.9789. No augmentation. Settings of
`lru_permuted`, not chosen anew.
Reference: S4 98.70 % (A. Gu et al., arXiv 2111.00396), S5 98.67 % (J. T. H. Smith et al., arXiv
2208.04933), both of several layers that read and write at every step, in the same order.
"""

import pathlib

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.load_experiment(pathlib.Path(__file__).with_name("lru_permuted.py"))
    config.model.view = "bit_reversed_pixels"
    config.model.cell = "s5"
    # With these steps, every state remembers the whole sequence.
    config.model.cell_options = {"state_size": 192, "dt_min": 0.0005, "dt_max": 0.005}
    return config
