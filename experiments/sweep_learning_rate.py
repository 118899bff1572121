"""The notebook's network at seven learning rates, from four seeds each, in one program.

Command:
  python -m seqmnist.main --workdir=runs/sweep --config=experiments/sweep_learning_rate.py

Duration: 2 minutes on two CPU cores. Test accuracy (mean ± sd): 0.847 ± 0.015 at 1e-4,
0.912 ± 0.009 at 3e-4, 0.937 ± 0.007 at 0.001, 0.944 ± 0.004 at 0.002, 0.933 ± 0.020 at 0.003,
0.669 ± 0.047 at 0.01, 0.102 ± 0.010 at 0.03. Validation chooses 0.002,
whose four members together score 0.966.
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
