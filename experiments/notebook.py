"""The notebook: SimpleRNN(64) over the 28 rows of full MNIST, or of mnist_5k if unavailable.

Command:
  python -m seqmnist.main --workdir=runs/notebook --config=experiments/notebook.py

Duration: 4 s on two CPU cores, 5 s the first time. Test accuracy, seeds 0 to 9
(--config.members.num=10): 0.9384 ± 0.0048 (mean ± sd), 0.9648 as an ensemble.
Reference: the notebook's one run in Keras, 0.9307.
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    return config_lib.Config()
