"""Twelve cells at one budget of parameters on small digits, 8 × 8, row by row.

Command:
  python -m tools.study experiments/studies/cells_digits.py --workdir=runs/cells_digits

Duration: three minutes on two CPU cores that did other work too. Test accuracy, mean ± sd over 10
seeds, with at most 3,000 parameters each:

  lem       0.9859 ± 0.0048   simple_rnn  0.9825 ± 0.0049   lstm      0.9823 ± 0.0070
  gru       0.9839 ± 0.0040   slstm       0.9803 ± 0.0053   lru       0.9696 ± 0.0067
  s6        0.9541 ± 0.0076   min_gru     0.9538 ± 0.0092   min_lstm  0.9527 ± 0.0075
  s5        0.9521 ± 0.0061   rg_lru      0.9338 ± 0.0100   irnn      0.9248 ± 0.0289

The first five do not differ significantly. The cell delta_net is left out: its matrix of 110 × 110
numbers per image would take longer than all others together.
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
