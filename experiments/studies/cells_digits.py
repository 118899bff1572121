"""Twelve cells at one budget of parameters on small digits, 8 × 8, row by row.

Command:
  python -m tools.study experiments/studies/cells_digits.py --workdir=runs/cells_digits

Duration: a minute on two CPU cores. Test accuracy (mean ± sd over 10 seeds): gru 0.984 ± 0.004,
simple_rnn 0.983 ± 0.005, lstm 0.982 ± 0.007, lru 0.970 ± 0.007, min_gru 0.954 ± 0.009, irnn
0.925 ± 0.029, at most 3,000 parameters each; the first three do not differ significantly.
"""

from seqmnist import config as config_lib
from seqmnist.study.plan import Study

CELLS = (
    "simple_rnn", "irnn", "gru", "lstm", "lem", "slstm",
    "min_gru", "min_lstm", "rg_lru", "lru", "s5", "s6",
)  # fmt: skip


def get_study():
    """Returns the study."""
    entries = {}
    for cell in CELLS:
        config = config_lib.get_config()
        config.data.name = "digits"
        config.model.cell = cell
        config.train.batch_size = 32
        config.train.num_epochs = 20
        config.optimizer.name = "adam"
        config.optimizer.schedule = "cosine"
        config.optimizer.clip_norm = 1.0
        entries[cell] = config
    select = {"optimizer.learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1]}
    return Study(entries, range(100, 110), select, range(3), budget=3000)
