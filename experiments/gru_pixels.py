"""Pixel by pixel with a GRU of 128 units, whose time scales start at up to 784 steps.

Command:
  python -m seqmnist.main --workdir=runs/gru_pixels --config=experiments/gru_pixels.py

Duration: 55 minutes on two CPU cores, 108 on one, which did other work too. Test accuracy, seeds 0
and 1 (--config.seed): 0.9660 ± 0.0008 (mean ± sd), with 51,594 parameters; validation 0.9670.
Chosen after 600 steps of 3 networks of 64 units. With all time scales at 2 steps and a learning
rate of 1e-3, validation is at 0.596 after 10 epochs.
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
