"""The programs that `tools.benchmark` times: ours, Keras, Flax and PyTorch, each in a process.

`python -m tools.peers NAME` answers requests from standard input, one line of JSON each;
`python -m tools.peers NAME --job=FILE.npz` does the notebook's whole job and ends.
"""

import functools
import json
import os
import sys
import time

import numpy as np


class Ours:
    """This project, with its dataset in device memory or streamed from the host."""

    def __init__(self, case, file, is_streamed=False):
        from seqmnist import process
        from seqmnist.config import Config
        from seqmnist.training import batches, devices, loop, steps

        self.batches, self.config = batches, Config()
        for name, value in case.items():
            setattr(self.config.train if name == "batch_size" else self.config.model, name, value)
        process.set_up_jax(self.config)

        import jax

        train, test = (_load(file, split) for split in _SPLITS)
        self.num_train, self.num_test = len(train[1]), len(test[1])
        if is_streamed:
            feed = loop.Streamed(batches.Records(train, test))
        else:
            feed = loop.Resident(*map(batches.join, zip(train, test, strict=True)))
        plan = devices.mesh_shape(self.config.mesh, 1, case["batch_size"], jax.devices())
        system = steps.make_system(self.config, 1)
        self.loop = loop.Loop(system, feed, devices.make_mesh(*plan))
        self.state = steps.init_state(self.config, system, 0)

    def train(self, num_steps):
        order = self.batches.epoch_order(0, 0, self.num_train)
        self.rows = self.batches.batch_rows(order, self.config.train.batch_size)
        self.steps(num_steps)

    def steps(self, num_steps):
        """Trains without drawing an epoch's order, which takes as long as several steps.

        Returns the number of steps: at most those of an epoch.
        """
        rows = self.rows[:num_steps]
        *_, progress = self.loop.train(self.loop.start(self.state), rows)
        self.state = progress.state
        progress.sums.means()
        return len(rows)

    def evaluate(self):
        rows = np.arange(self.num_train, self.num_train + self.num_test)
        rows = self.batches.batch_rows(rows, self.config.train.batch_size)
        self.loop.evaluate(self.state.params, rows).means()

    def cost(self):
        from seqmnist.study import profiling

        return profiling.step_cost(self.config) | profiling.rates(self.config.model.dtype)


class Keras:
    """Keras 3 on JAX, compiled, as the notebook uses it."""

    def __init__(self, case, file):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        layer = {"simple_rnn": "SimpleRNN", "gru": "GRU", "lstm": "LSTM"}[case["cell"]]
        (self.x, self.y), self.test = (_sequences(file, split, case) for split in _SPLITS)
        self.batch_size = case["batch_size"]
        cell = getattr(keras.layers, layer)(case["hidden_size"])
        readout = keras.layers.Dense(10, activation="softmax")
        self.model = keras.Sequential([keras.Input(self.x.shape[1:]), cell, readout])
        self.model.compile("rmsprop", "sparse_categorical_crossentropy", metrics=["accuracy"])

    def train(self, num_steps):
        size = num_steps * self.batch_size
        self.model.fit(self.x[:size], self.y[:size], self.batch_size, verbose=0)

    def evaluate(self):
        return [float(x) for x in self.model.evaluate(*self.test, self.batch_size, verbose=0)]

    def job(self):
        self.model.fit(self.x, self.y, self.batch_size, 5, validation_split=0.2, verbose=0)
        return self.evaluate()


class _Epochs:
    """The notebook's job for what trains and evaluates an epoch at a time."""

    def job(self):
        boundary = int(0.8 * len(self.x))
        for _ in range(5):
            self.train(None, boundary)
            self.evaluate((self.x[boundary:], self.y[boundary:]))
        return self.evaluate()


class Flax(_Epochs):
    """`flax.nnx.RNN` with Optax: one compiled step after the other, as in Flax's documentation."""

    def __init__(self, case, file):
        import optax
        from flax import nnx

        (self.x, self.y), self.test = (_sequences(file, split, case) for split in _SPLITS)
        self.batch_size, size = case["batch_size"], case["hidden_size"]
        cell = {"simple_rnn": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}
        rngs = nnx.Rngs(0)
        rnn = nnx.RNN(cell[case["cell"]](self.x.shape[2], size, rngs=rngs))
        self.model = nnx.List([rnn, nnx.Linear(size, 10, rngs=rngs)])
        rule = optax.rmsprop(1e-3, decay=0.9, eps=1e-7)
        self.optimizer = nnx.Optimizer(self.model, rule, wrt=nnx.Param)

        def sums(model, x, y):
            rnn, dense = model
            logits = dense(rnn(x)[:, -1])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, (logits.argmax(1) == y).sum()

        @nnx.jit
        def step(model, optimizer, x, y):
            (_, hits), gradient = nnx.value_and_grad(sums, has_aux=True)(model, x, y)
            optimizer.update(model, gradient)
            return hits

        self.step, self.sums = step, nnx.jit(sums)

    def train(self, num_steps, size=None):
        order = np.random.default_rng(0).permutation(size or len(self.x))
        starts = range(0, len(order), self.batch_size)[:num_steps]
        rows = [order[start : start + self.batch_size] for start in starts]
        hits = [self.step(self.model, self.optimizer, self.x[row], self.y[row]) for row in rows]
        return sum(map(int, hits))

    def evaluate(self, examples=None):
        x, y = examples or self.test
        parts = [slice(i, i + self.batch_size) for i in range(0, len(x), self.batch_size)]
        hits = [self.sums(self.model, x[part], y[part])[1] for part in parts]
        return sum(map(int, hits)) / len(x)


class Torch(_Epochs):
    """PyTorch with its default number of threads, eager or through `torch.compile`."""

    def __init__(self, case, file, is_compiled=False):
        import torch

        # Before the first thread, which inherits it: gradients that vanish over hundreds of steps
        # become numbers so small that processors compute with them ten times as slowly.
        torch.set_flush_denormal(True)
        self.torch, self.batch_size = torch, case["batch_size"]
        layer = {"simple_rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[case["cell"]]
        (self.x, self.y), self.test = (
            tuple(map(torch.from_numpy, _sequences(file, split, case))) for split in _SPLITS
        )
        hidden_size = case["hidden_size"]
        self.rnn = getattr(torch.nn, layer)(self.x.shape[2], hidden_size, batch_first=True)
        self.dense = torch.nn.Linear(hidden_size, 10)
        parameters = [*self.rnn.parameters(), *self.dense.parameters()]
        self.optimizer = torch.optim.RMSprop(parameters, lr=1e-3, alpha=0.9, eps=1e-7)
        self._sums = torch.compile(self._both) if is_compiled else self._both

    def _both(self, x, y):
        logits = self.dense(self.rnn(x)[0][:, -1])
        return self.torch.nn.functional.cross_entropy(logits, y), (logits.argmax(1) == y).sum()

    def train(self, num_steps, size=None):
        correct = 0
        for row in self.torch.randperm(size or len(self.x)).split(self.batch_size)[:num_steps]:
            self.optimizer.zero_grad()
            loss, hits = self._sums(self.x[row], self.y[row])
            loss.backward()
            self.optimizer.step()
            correct += hits
        return float(correct)

    def evaluate(self, examples=None):
        x, y = examples or self.test
        with self.torch.no_grad():
            batches = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
            return float(sum(self._sums(*batch)[1] for batch in batches)) / len(x)


PEERS = {
    "ours": Ours,
    "streamed": functools.partial(Ours, is_streamed=True),
    "keras": Keras,
    "flax": Flax,
    "torch": Torch,
    "torch.compile": functools.partial(Torch, is_compiled=True),
}
NOTEBOOK = {"view": "rows", "cell": "simple_rnn", "hidden_size": 64, "batch_size": 128}
_SPLITS = ("train", "test")


def _load(file, split):
    with np.load(file) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def _sequences(file, split, case):
    images, labels = _load(file, split)
    shape = {"rows": images.shape, "pixels": (len(images), -1, 1)}[case["view"]]
    return (images / np.float32(255)).reshape(shape), labels.astype(np.int64)


def _serve(name):
    import resource  # imported here: Windows has none

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; answers stay clean
    peer = None
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        began, answer = time.perf_counter(), None
        if request == "make":
            peer = PEERS[name](*arguments)
        else:
            answer = getattr(peer, request)(*arguments)
        measured = {
            "seconds": time.perf_counter() - began,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "answer": answer,
        }
        print(json.dumps(measured), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(PEERS[sys.argv[1]](NOTEBOOK, sys.argv[2].removeprefix("--job=")).job())
    else:
        _serve(sys.argv[1])
