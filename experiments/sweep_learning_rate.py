"""The notebook's network at seven learning rates, from four seeds each, in one program.

Command:
  python -m seqmnist.main --workdir=runs/sweep_learning_rate --config=experiments/sweep_learning_rate.py

Duration: SWEEPRESULT
Reference: the notebook, 0.9307 at 0.001.
"""

import json

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.members.num = 4
    rates = [1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2, 3e-2]
    config.members.sweep = json.dumps({"optimizer.learning_rate": rates})
    return config
