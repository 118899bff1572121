"""Pixel by pixel with the IRNN of its paper: 100 units, clipped gradients.

Command:
  python -m seqmnist.main --workdir=runs/irnn_pixels --config=experiments/irnn_pixels.py

Duration: not run in full. After 30 epochs, 7 minutes on two CPU cores, validation is at 0.791. The
paper trains for far longer, at a learning rate of 1e-8; this uses Adam at 1e-4, which is faster.
Reference: 97 % (Q. V. Le et al., arXiv 1504.00941).
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.train.num_epochs = 200
    config.model.view = "pixels"
    config.model.cell = "irnn"
    config.model.hidden_size = 100
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip_norm = 1.0
    return config
