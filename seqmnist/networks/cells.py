"""The cells that a configuration can name, and the base classes of new ones."""

from seqmnist.errors import Table
from seqmnist.networks.cell import Cell, Constant, RecurrentParam
from seqmnist.networks.gated import GRU, IRNN, LEM, LSTM, SLSTM, GatedCell, SimpleRNN
from seqmnist.networks.linear import LRU, RGLRU, S5, S6, DeltaNet, LinearCell, MinGRU, MinLSTM

__all__ = ["CELLS", "Cell", "Constant", "GatedCell", "LinearCell", "RecurrentParam"]

CELLS = Table(
    {
        "simple_rnn": SimpleRNN,
        "irnn": IRNN,
        "gru": GRU,
        "lstm": LSTM,
        "lem": LEM,
        "slstm": SLSTM,
        "min_gru": MinGRU,
        "min_lstm": MinLSTM,
        "rg_lru": RGLRU,
        "lru": LRU,
        "s5": S5,
        "s6": S6,
        "delta_net": DeltaNet,
    }
)
