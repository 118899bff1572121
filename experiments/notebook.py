"""The notebook: SimpleRNN(64) over the 28 rows of full MNIST.

Command:
  python -m seqmnist.main --workdir=runs/notebook --config=experiments/notebook.py

Duration: 7 s on two CPU cores. Test accuracy, seeds 0 to 9: 0.9385 ± 0.0060 (mean ± sd),
median 0.9390, range 0.9250 to 0.9462.
Reference: the notebook's one run in Keras, 0.9307.
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    return config
