"""The best at the notebook's own budget: 5 epochs, batch 128, at most 6,602 parameters.

Command:
  python -m seqmnist.main --workdir=runs/budget_rows --config=experiments/budget_rows.py

Duration: 19 s on two CPU cores. Test accuracy, seeds 1 to 5: 0.9878 ± 0.0017 (mean ± sd), with
6,450 parameters; validation 0.9865. Chosen by validation among 30 networks, 15 of which were
tried with three seeds, 0 to 2; another one of these, which validates at 0.9855, scores 0.9854.
Reference: the notebook, 0.9307.
"""

from seqmnist import config as config_lib


def get_config():
    """Returns the configuration."""
    config = config_lib.get_config()
    config.data.name = "mnist"
    config.model.cell = "gru"
    config.model.hidden_size = 10
    config.model.num_layers = 3
    config.model.bidirectional = True
    config.model.readout = "max"
    config.optimizer.name = "adamw"
    config.optimizer.options = {"b2": 0.99}
    config.optimizer.weight_decay = 0.05
    config.optimizer.learning_rate = 0.02
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    return config
