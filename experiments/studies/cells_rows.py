"""Six cells on full MNIST, row by row, with the notebook's 6,602 parameters and with 50,000.

Command:
  python -m tools.study experiments/studies/cells_rows.py --workdir=runs/cells_rows

Duration: 50 minutes on two CPU cores that did other work too. Test accuracy after five epochs, mean
± sd over 10 seeds, by number of parameters:

                  6,602             50,000
  gru         0.9810 ± 0.0009   0.9897 ± 0.0006
  lstm        0.9778 ± 0.0021   0.9880 ± 0.0007
  irnn        0.9691 ± 0.0032   0.9782 ± 0.0011
  simple_rnn  0.9566 ± 0.0029   0.9770 ± 0.0008
  min_gru     0.9305 ± 0.0016   0.9405 ± 0.0019
  lru         0.9179 ± 0.0020   0.9238 ± 0.0008

Of the 66 differences, all but three are significant (p < 0.05 by Holm's method): those among
simple_rnn with 50,000, irnn with 50,000 and lstm with 6,602. The chosen learning rate is at the
edge of the grid for gru and lstm with 6,602, irnn with 50,000 and both sizes of min_gru, which
might therefore do better with others. Linear cells are built to be stacked; as single layers
without blocks they come last here.
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
