"""Pixel by pixel with a GRU of 128 units.

Command:
  python -m seqmnist.main --workdir=runs/gru_pixels --config=experiments/gru_pixels.py

Duration: not run in full. With 10 epochs, 15 minutes on two CPU cores, validation reaches 0.596.
Reference: 99.1 % (T. A. Keller et al., Traveling waves, table 2; 201k parameters).
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.train.num_epochs = 12
    config.model.view = "pixels"
    config.model.cell = "gru"
    config.model.cell_options = {"t_max": 784.0}
    config.model.hidden_size = 128
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.clip_norm = 1.0
    return config
