"""The network of `rows_best`, trained without distorted images.

Command:
  python -m seqmnist.main --workdir=runs/rows_best_unaugmented \
    --config=experiments/rows_best_unaugmented.py

Duration: 8 minutes on one CPU core; the second run took 27, beside other work. Test accuracy, seeds
0 to 2: 0.9915 ± 0.0008 (mean ± sd), with 270,218 parameters; validation 0.9926.
Reference: `rows_best`, with affine augmentation.
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.train.num_epochs = 10
    config.model.cell = "min_gru"
    config.model.hidden_size = 64
    config.model.num_layers = 4
    config.model.bidirectional = True
    config.model.block = "residual"
    config.model.readout = "max"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.005
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    return config
