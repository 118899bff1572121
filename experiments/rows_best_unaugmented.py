"""The network of `rows_best`, trained without distorted images.

Command:
  python -m seqmnist.main --workdir=runs/rows_best_unaugmented \
    --config=experiments/rows_best_unaugmented.py

Duration: 8 minutes on one CPU core; the second run took 27, beside other work. Test accuracy, seeds
0 to 2: 0.9915 ± 0.0008 (mean ± sd), with 270,218 parameters; validation 0.9926.
Reference: `rows_best`, with affine augmentation.
"""

import pathlib

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.load_experiment(pathlib.Path(__file__).with_name("rows_best.py"))
    config.train.augment = "none"
    return config
