"""Sequential CIFAR-10, 1,024 colored pixels, with six residual blocks of linear recurrent units.

Command:
  python -m seqmnist.main --workdir=runs/lru_cifar10 --config=experiments/lru_cifar10.py

Duration: not run in full.
Reference: LRU 89.0 % (A. Orvieto et al., arXiv 2303.06349), with six layers of 512 units and 384
states.
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "cifar10"
    config.train.num_epochs = 180
    config.train.batch_size = 50
    config.model.view = "pixels"
    config.model.cell = "lru"
    config.model.cell_options = {"state_size": 384, "r_min": 0.9, "r_max": 0.999}
    config.model.hidden_size = 512
    config.model.num_layers = 6
    config.model.block = "residual"
    config.model.readout = "mean"
    config.model.dropout = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.recurrent_factor = 0.25
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    return config
