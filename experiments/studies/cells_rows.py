"""Every cell on full MNIST, row by row, with the notebook's 6,602 parameters and with 50,000.

Command:
  python -m tools.study experiments/studies/cells_rows.py --workdir=runs/cells_rows

Duration: not run in full.
"""

from seqmnist import config as config_lib
from seqmnist.study.plan import Study

CELLS = ("simple_rnn", "irnn", "gru", "lstm", "min_gru", "lru")
BUDGETS = (6602, 50_000)


def get_study():
    """Returns the study."""
    entries, budgets = {}, {}
    for cell in CELLS:
        for budget in BUDGETS:
            config = config_lib.get_config()
            config.data.name = "mnist"
            config.model.cell = cell
            config.optimizer.name = "adam"
            config.optimizer.schedule = "cosine"
            config.optimizer.clip_norm = 1.0
            name = f"{cell} {budget}"
            entries[name], budgets[name] = config, budget
    select = {"optimizer.learning_rate": [0.001, 0.003, 0.01, 0.03]}
    return Study(entries, range(100, 110), select, range(2), budgets)
