"""Tune a small GRU that predicts the next character of Python's own help texts, one learning rate a param group.

Data: `pydoc_data.topics`, which every Python carries; one topic in twelve validates and another one tests.  AdamW with
three param groups (embedding, recurrent, output), each with its learning rate, and beta1 and weight decay beside them.
Trains three times from the learning rate given: untuned, with local hypergradients, and glocally.

    python examples/torch_text.py [--full] [--lr 2e-3] [--out torch_text.png]
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import numpy as np
import torch
from koopman_hpo_adapters.plot import figure
from koopman_hpo_adapters.progress import Progress
from koopman_hpo_adapters.torch import HyperOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from koopman_hpo import Glocal, Local, Space, log, logit, outer

LENGTH, BATCH = 16, 16  # characters a sequence, sequences a batch


class Model(nn.Module):
    """Logits (n, length, characters) of the next character."""

    def __init__(self, characters, width):
        super().__init__()
        self.embedding = nn.Embedding(characters, 24)
        self.gru = nn.GRU(24, width, batch_first=True)
        self.output = nn.Linear(width, characters)

    def forward(self, x):
        return self.output(self.gru(self.embedding(x))[0])


def data():
    """Training, validation and test texts as int64 tensors, and the number of characters."""
    texts = [[], [], []]
    for i, name in enumerate(sorted(topics)):
        texts[{0: 1, 6: 2}.get(i % 12, 0)].append(topics[name])
    texts = ["\n".join(part) for part in texts]
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    return [torch.tensor([alphabet[c] for c in text]) for text in texts], len(alphabet)


def sequences(text, n, seed):
    """n random pieces (n, LENGTH + 1) of a text."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, n)
    return text[torch.from_numpy(starts)[:, None] + torch.arange(LENGTH + 1)]


def nats(model, pieces):
    """Cross entropy a character."""
    return cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def train(strategy, lr, budget, seed, label=""):
    """(bits a character of the test text, tuner) of one run; strategy None holds every hyperparameter where it starts.

    budget: steps, GRU units, and steps between two moves of the hyperparameters.
    """
    steps, width, window = budget
    torch.manual_seed(seed)
    (train_text, val_text, test_text), characters = data()
    model = Model(characters, width)
    groups = [{"params": part.parameters()} for part in (model.embedding, model.gru, model.output)]
    opt = torch.optim.AdamW(groups, lr, weight_decay=1e-2)
    if strategy is not None:
        val = sequences(val_text, 64, (seed, 1))
        opt = HyperOptimizer(
            opt,
            tune=Space(lr=log([lr] * 3, bounds=(1e-6, 1)), beta1=logit(0.9), weight_decay=log(1e-2)),
            val_loss=lambda: nats(model, val),
            strategy=strategy,
            steps=steps,
            window=window,
            outer=outer.adam(0.2),
            callbacks=[Progress(label)],
        )
    for t in range(steps):
        loss = nats(model, sequences(train_text, BATCH, (seed, 0, t)))
        if strategy is None:
            opt.zero_grad()
            loss.backward()
            opt.step()
        else:
            opt.step(loss)
    with torch.no_grad():
        bits = float(nats(model, sequences(test_text, 2000, (seed, 2)))) / math.log(2)
    return bits, opt.tuner if strategy else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="2,000 steps of 64 units in place of 80 of 16")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate to start from, in every group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="torch_text.png", help="figure to write")
    args = parser.parse_args(argv)
    budget = steps, width, _ = (2000, 64, 25) if args.full else (80, 16, 10)
    print(f"GRU of {width} units, {steps} steps of AdamW from lr {args.lr:g}")
    bits = {}
    for name, strategy in (("untuned", None), ("local", Local()), ("glocal", Glocal(snapshots=13))):
        bits[name], tuner = train(strategy, args.lr, budget, args.seed, name)
        print(f"{name:8s} test loss {bits[name]:.3f} bits a character", flush=True)
    figure(tuner.history).savefig(args.out, dpi=200)
    over = {name: bits[name] - bits["glocal"] for name in ("untuned", "local")}
    print(f"gained by glocal: {over['untuned']:+.3f} bits over the untuned run, {over['local']:+.3f} over local")
    print(f"it ended at {', '.join(f'{name} {np.round(x, 5)}' for name, x in tuner.hyper.items())}; figure: {args.out}")


if __name__ == "__main__":
    main()
