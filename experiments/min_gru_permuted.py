"""Permuted pixels with two residual blocks of minimal GRUs of time scales up to 784 steps.

Command:
  python -m seqmnist.main --workdir=runs/min_gru_permuted --config=experiments/min_gru_permuted.py

Duration: 28 to 42 minutes on one CPU core that did other work too. Test accuracy, seeds 0 to 2
(--config.seed): 0.8042 ± 0.0165 (mean ± sd), with 34,314 parameters; validation 0.8002. Settings
not chosen among others; both losses still fall.
Reference: none for the minGRU; GRU 94.1 % (T. A. Keller et al., Traveling waves, table 2).
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.train.num_epochs = 5
    config.model.view = "permuted_pixels"
    config.model.cell = "min_gru"
    config.model.cell_options = {"t_max": 784.0}
    config.model.hidden_size = 64
    config.model.num_layers = 2
    config.model.block = "residual"
    config.model.readout = "max"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.005
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    return config
