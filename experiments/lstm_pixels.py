"""Pixel by pixel with an LSTM of 128 units, whose time scales start at up to 784 steps.

Command:
  python -m seqmnist.main --workdir=runs/lstm_pixels --config=experiments/lstm_pixels.py

Duration: 71 minutes on CPU cores that did other work too. Test accuracy of seed 0: 0.9260, with
67,850 parameters; validation 0.9272. Settings not chosen among others; both losses still fall.
Reference: 98.8 % (T. A. Keller et al., Traveling waves, table 2; 267k parameters).
"""

import pathlib

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.load_experiment(pathlib.Path(__file__).with_name("gru_pixels.py"))
    config.model.cell = "lstm"
    config.model.cell_options = {"t_max": 784.0, "forget_bias": 0.0}
    return config
