"""The notebook's network with each optimizer, at its best learning rate and at others.

Command:
  python -m tools.study experiments/studies/learning_rates.py --workdir=runs/learning_rates

Duration: 12 minutes on two CPU cores that did other work too. Learning rate that validation chose,
and test accuracy, mean ± sd over 10 seeds:

  rmsprop  0.001   0.9414 ± 0.0075
  adam     0.003   0.9427 ± 0.0071
  adamw    0.001   0.9445 ± 0.0050
  sgd      0.003   0.9399 ± 0.0050

None of the differences is significant: each with its own learning rate, none of the four is better.
"""

from seqmnist import config as config_lib
from seqmnist.study.plan import Study

OPTIMIZERS = ("rmsprop", "adam", "adamw", "sgd")


def get_study():
    """Returns the study."""
    entries = {}
    for name in OPTIMIZERS:
        config = config_lib.get_config()
        config.data.name = "mnist"
        config.optimizer.name = name
        entries[name] = config
    rates = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    return Study(entries, range(100, 110), {"optimizer.learning_rate": rates}, range(3))
