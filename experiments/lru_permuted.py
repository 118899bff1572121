"""Permuted pixels with one linear layer of 192 complex states, and a perceptron on the last one.

Command:
  python -m seqmnist.main --workdir=runs/lru_permuted --config=experiments/lru_permuted.py

Duration: 5 to 6 minutes on one slow CPU core. Test accuracy, seeds 0 to 2 (--config.seed): 0.9844 ±
0.0004 (mean ± sd), with 466,378 parameters; validation 0.9825. No augmentation. Chosen by
validation among 6 networks of one seed. Only the last state is read by a nonlinear layer. Four
residual blocks of 64 units, which are nonlinear at every step, take three minutes per epoch on two
cores, and were at 0.936 on validation after 6 of 20.
Reference: parallel LMU, of the same form, 98.49 % with 165k parameters (N. Chilkuri, C. Eliasmith,
arXiv 2102.11417), on a permutation of its own.
"""

import math
import pathlib

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.plugins = str(pathlib.Path(__file__).parent / "plugins" / "perceptron.py")
    config.data.name = "mnist"
    config.train.num_epochs = 16
    config.model.view = "permuted_pixels"
    config.model.cell = "lru"
    # All states remember the whole sequence, each as one frequency of it.
    config.model.cell_options = {
        "state_size": 192,
        "r_min": 0.999,
        "r_max": 0.9999,
        "max_phase": math.pi,
    }
    config.model.hidden_size = 512
    config.model.readout = "perceptron"
    config.model.dropout = 0.5
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1.0
    config.optimizer.recurrent_factor = 0.25
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    return config
