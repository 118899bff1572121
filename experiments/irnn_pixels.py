"""Pixel by pixel with the IRNN of its paper: 100 units, clipped gradients.

Command:
  python -m seqmnist.main --workdir=runs/irnn_pixels --config=experiments/irnn_pixels.py

Duration: 36 to 63 minutes on one CPU core that did other work too. Test accuracy, seeds 0 to 2
(--config.seed): 0.9246 ± 0.0006 (mean ± sd), with 11,210 parameters; validation 0.9290. The paper
trains for far longer, with gradient descent at a learning rate of 1e-8; this uses Adam at 1e-4. At
3e-4, with batches of 128, the loss does not fall in the first epoch.
Reference: 97 % (Q. V. Le et al., arXiv 1504.00941).
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.train.num_epochs = 40
    config.train.batch_size = 32
    config.model.view = "pixels"
    config.model.cell = "irnn"
    config.model.hidden_size = 100
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.clip_norm = 1.0
    return config
