"""Tune LeNet on MNIST in a PyTorch loop of one's own, from learning rates far too small, sensible and far too large.

Data: MNIST's 10,000 test digits as the whole data set, 8,000 to train, 1,000 to validate, 1,000 to test; either a folder
with its two idx files, plain or gzipped (--data), or fetched once by pooch and checked by its MD5 sum (--fetch).  Without
them scikit-learn's digits, enlarged to 28 x 28, and the output says so.  Each optimizer and learning rate is trained
untuned, with local hypergradients, and glocally; with --full beside the best of ten random full runs, chosen by validation
loss, and what its settings give again, with other initial weights and orders of the batches: chance is as large as what is
compared.  In all of them images are moved by up to a pixel, and lr falls linearly to zero; the random runs are made with a
constant lr, too.  A tuned run is two: an epoch at constant lr with large outer steps finds where to start (SGD: at which
effective rate); then the model begins anew, is trained, and with small steps tuned: the height of lr's decay, momentum (or
beta1) and weight decay.

    python examples/torch_mnist.py [--data DIR | --fetch] [--full] [--lr 1e-4 1] [--optimizer sgd adam] [--out mnist.png]
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from koopman_hpo_adapters.plot import COLOURS, STYLE
from koopman_hpo_adapters.progress import Progress
from koopman_hpo_adapters.torch import HyperOptimizer
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn
from torch.nn.functional import cross_entropy, pad

from koopman_hpo import Glocal, Guard, History, Local, Space, log, logit, outer

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {  # MD5 sums, as torchvision has them
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
OPTIMIZERS = {
    "sgd": lambda model, lr, momentum, decay: torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, weight_decay=decay
    ),
    "adam": lambda model, lr, momentum, decay: torch.optim.Adam(
        model.parameters(), lr, betas=(momentum, 0.999), weight_decay=decay
    ),
}
AGAIN = 6  # times that the best random settings are run again
STRATEGIES = {"local": Local(), "glocal": Glocal(snapshots=13)}
SHIFT = 1  # pixels: runs end higher, and less by chance
MOMENTUM = 0.5  # or beta1, at the start
SECOND = {"sgd": "momentum", "adam": "beta1"}  # tuned beside lr and weight decay


class Budget(NamedTuple):
    """What a run costs."""

    batch: int
    epochs: int
    window: int  # steps between two moves of the hyperparameters
    val: int  # validation examples that a hypergradient sees


class Run(NamedTuple):
    """What a run left."""

    accuracy: float  # of the test set, in %
    test_loss: float
    val_loss: float
    histories: tuple[History, ...]  # of the search for a start and of training


# -- data --------------------------------------------------------------------------------------------------------------


def idx(folder, kind, header, shape):
    """The uint8 array (n, *shape) of MNIST's one idx file of that kind in the folder."""
    found = [p for p in sorted(Path(folder).glob(f"*{kind}-idx*-ubyte*")) if p.suffix in ("", ".gz")]
    if len(found) != 1:
        raise SystemExit(f"torch_mnist: {folder} must hold one idx file of {kind}, found {[p.name for p in found]}.")
    raw = found[0].read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    return np.frombuffer(raw, np.uint8, offset=header).reshape(-1, *shape)


def fetched():
    """The folder into which pooch has put MNIST's test digits."""
    try:
        import pooch
    except ImportError:
        raise SystemExit("torch_mnist: --fetch needs pooch: pip install pooch. Or give the files with --data.") from None
    paths = [pooch.retrieve(URL + name, f"md5:{known}", fname=name) for name, known in FILES.items()]
    return Path(paths[0]).parent


def data(folder, seed):
    """Training, validation and test sets (images (n, 1, 28, 28) float32, labels (n,)), and what they are."""
    if folder is None:
        from sklearn.datasets import load_digits

        small, y = load_digits(return_X_y=True)
        X = np.pad(np.kron(small.reshape(-1, 8, 8) / 16, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
        what, held = "scikit-learn's digits (no MNIST files were given)", 300
    else:
        X, y = idx(folder, "images", 16, (28, 28)) / 255, idx(folder, "labels", 8, ())
        what, held = "MNIST", 1000
    order = np.random.default_rng(seed).permutation(len(y))[:10_000]
    X = (X - X[order[: -2 * held]].mean()) / X[order[: -2 * held]].std()
    X, y = torch.tensor(X, dtype=torch.float32)[:, None], torch.tensor(y.astype(np.int64))
    sets = [(X[i], y[i]) for i in np.split(order, [-2 * held, -held])]
    return sets, f"{what}: {', '.join(str(len(y)) for _, y in sets)} images to train, validate and test"


# -- training ----------------------------------------------------------------------------------------------------------


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def batches(X, y, budget, seed):
    """Batches of some epochs, each image moved by up to SHIFT pixels."""
    for epoch in range(budget.epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(y))
        for part in np.split(order[: len(y) // budget.batch * budget.batch], len(y) // budget.batch):
            yield shifted(X[part], rng.integers(0, 2 * SHIFT + 1, (2, len(part), 1))), y[part]


def shifted(X, by):
    """Images X (n, 1, size, size) moved by rows and columns, by (2, n, 1) less SHIFT; edges are continued."""
    n, _, size, _ = X.shape
    rows, columns = torch.from_numpy(by + np.arange(size))
    wide = pad(X, (SHIFT,) * 4, mode="replicate")
    return wide[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def hypergradients(model, optimizer, hyper, sets, budget, strategy, steps, falling, label, **settings):
    """The optimizer for a loop, tuned from (lr, momentum or beta1, weight decay); lr constant, or falling to zero."""
    lr, second, decay = hyper
    X, y = (part[: budget.val] for part in sets[1])
    form = {"knots": (0, steps), "factors": (1, 0)} if falling else {}
    tune = {
        "lr": log(lr, bounds=(1e-6, 10), **form),
        SECOND[optimizer]: logit(second, bounds=(0.1, 0.9)),  # a long memory undoes what lr does about noise
        "weight_decay": log(decay, bounds=(1e-7, 1e-1)),
    }
    return HyperOptimizer(
        OPTIMIZERS[optimizer](model, *hyper),
        tune=Space(**tune),
        val_loss=lambda: cross_entropy(model(X), y),
        strategy=strategy,
        steps=steps,
        window=budget.window,
        callbacks=[Progress(label)],
        **settings,
    )


def search(strategy, optimizer, lr, sets, budget, seed, label):
    """Hyperparameters to start from, and how they were found: an epoch with large outer steps, begun again where one
    overshoots.  Late flips of the hypergradient's sign are noise here and no chaos."""
    torch.manual_seed(seed)
    model, budget = lenet(), budget._replace(epochs=1)
    guard = Guard(again=1.0, excess=0.5, chaos_growth=np.inf)
    start, steps = (lr, MOMENTUM, 1e-4), length(sets, budget)
    settings = {"outer": outer.adam(0.5), "guard": guard}
    opt = hypergradients(model, optimizer, start, sets, budget, strategy, steps, False, f"{label} start", **settings)
    for x, target in batches(*sets[0], budget, seed + 100):
        opt.step(cross_entropy(model(x), target))
    return tuple(opt.tuner.hyper.values()), opt.tuner.history


def tuned(strategy, optimizer, lr, sets, budget, seed, label):
    """A run whose start is searched for, from that lr."""
    found, before = search(strategy, optimizer, lr, sets, budget, seed, label)
    found = shorter(*found) if optimizer == "sgd" else found
    torch.manual_seed(seed)
    model = lenet()
    guard = Guard(again=0.3, excess=0.5, chaos_growth=np.inf)
    opt = hypergradients(model, optimizer, found, sets, budget, strategy, length(sets, budget), True, label, guard=guard)
    for x, target in batches(*sets[0], budget, seed):
        opt.step(cross_entropy(model(x), target))
    return judged(model, sets, (before, opt.tuner.history))


def shorter(lr, momentum, decay):
    """SGD with the same effective rate, lr / (1 - momentum), and the memory that the search began with: it lengthens it
    because that is the quickest way to a larger rate."""
    return lr / (1 - momentum) * (1 - MOMENTUM), MOMENTUM, decay


def untuned(optimizer, hyper, sets, budget, seed, falling=True):
    """A run in plain torch."""
    torch.manual_seed(seed)
    model, steps = lenet(), length(sets, budget)
    opt = OPTIMIZERS[optimizer](model, *hyper)
    for t, (x, target) in enumerate(batches(*sets[0], budget, seed)):
        opt.param_groups[0]["lr"] = hyper[0] * (1 - t / steps if falling else 1)
        opt.zero_grad()
        cross_entropy(model(x), target).backward()
        opt.step()
    return judged(model, sets, ())


def length(sets, budget):
    """Inner steps of a run."""
    return budget.epochs * (len(sets[0][1]) // budget.batch)


@torch.no_grad()
def judged(model, sets, histories):
    (val_loss, _), (test_loss, accuracy) = (scores(model, *part) for part in sets[1:])
    return Run(accuracy, test_loss, val_loss, histories)


def scores(model, X, y):
    logits = model(X)
    return float(cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).double().mean())


def random_search(n, optimizer, sets, budget, seed, falling):
    """The run with the lowest validation loss among n with random lr, momentum (or beta1) and weight decay; those three."""
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(n):
        hyper = 10 ** rng.uniform(-4, 0), rng.uniform(0, 0.99), 10 ** rng.uniform(-6, -2)
        runs.append((untuned(optimizer, hyper, sets, budget, seed, falling), hyper))
    return min(runs, key=lambda run: run[0].val_loss if np.isfinite(run[0].val_loss) else np.inf)


def repeated(n, optimizer, hyper, sets, budget, seed, falling):
    """Test accuracies (n,) of the same settings, each run with weights and batches of its own."""
    return np.array([untuned(optimizer, hyper, sets, budget, seed + 1000 + i, falling).accuracy for i in range(n)])


# -- what is shown -----------------------------------------------------------------------------------------------------


def picture(runs):
    """Validation loss and learning rate of every glocal run.  runs: {optimizer: {lr: {strategy: Run}}}."""
    with rc_context(STYLE):
        fig = Figure(figsize=(9.2, 3.2 * len(runs)), layout="constrained")
        axes = fig.subplots(len(runs), 2, squeeze=False)
        for (left, right), (optimizer, starts) in zip(axes, runs.items(), strict=True):
            for colour, (lr, found) in zip(COLOURS, starts.items(), strict=False):
                before, after = found["glocal"].histories
                begin, end = before.step[-1], after.step[-1]
                falling = after.natural[:, 0] * (1 - after.step / end)  # zero at the end, which a log scale leaves out
                left.plot([*before.step, *(begin + after.step)], [*before.value, *after.value], color=colour)
                steps, rates = [0, *before.step, *(begin + after.step[:-1])], [lr, *before.natural[:, 0], *falling[:-1]]
                right.plot(steps, rates, color=colour, label=f"from {lr:g}")
            left.set(title=f"LeNet, {optimizer}: validation loss, glocal", yscale="log", xlabel="inner steps")
            right.set(title="Learning rate, glocal", yscale="log", xlabel="inner steps; training begins anew at the line")
            left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
            for ax in (left, right):
                ax.axvline(begin, color="0.7", lw=0.8)
                ax.yaxis.set_major_formatter("{x:g}")
            right.legend()
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="folder with MNIST's images and labels, idx files")
    source.add_argument("--fetch", action="store_true", help="fetch MNIST's test digits with pooch")
    parser.add_argument("--full", action="store_true", help="three epochs, both optimizers, three starts, random search")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates to start from")
    parser.add_argument("--optimizer", nargs="+", choices=sorted(OPTIMIZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="torch_mnist.png", help="figure to write")
    args = parser.parse_args(argv)
    budget = Budget(32, 3, 25, 1000) if args.full else Budget(16, 2, 5, 100)
    sets, what = data(fetched() if args.fetch else args.data, args.seed)
    if not args.full:
        sets[0] = tuple(part[:1000] for part in sets[0])
    print(f"{what}; {budget.epochs} epochs of batches of {budget.batch}")
    runs = {}
    for optimizer in args.optimizer or (("sgd", "adam") if args.full else ("sgd",)):
        if args.full:
            for how, falling in (("constant", False), ("falling", True)):
                best, hyper = random_search(10, optimizer, sets, budget, args.seed, falling)
                line = f"best of 10 random full runs, lr {how}: {best.accuracy:.1f} % (loss {best.test_loss:.3f})"
                again = repeated(AGAIN, optimizer, hyper, sets, budget, args.seed, falling)
                behind = f"{np.sum(again < best.accuracy - 0.3 - 1e-9)} of {AGAIN} more than .3 behind it"
                spread = f"{again.mean():.1f} % on average, {again.min():.1f} to {again.max():.1f}, {behind}"
                print(f"{optimizer:4s} {line}; its settings again: {spread}", flush=True)
        for lr in args.lr or ((1e-4, 1e-2, 1.0) if args.full else (1e-3,)):
            found = {"untuned": untuned(optimizer, (lr, MOMENTUM, 1e-4), sets, budget, args.seed)}
            for name, strategy in STRATEGIES.items():
                found[name] = tuned(strategy, optimizer, lr, sets, budget, args.seed, f"{optimizer} {lr:g} {name}")
            runs.setdefault(optimizer, {})[lr] = found
            line = ", ".join(f"{name} {run.accuracy:.1f} % ({run.test_loss:.3f})" for name, run in found.items())
            over = {name: found["glocal"].accuracy - found[name].accuracy for name in ("untuned", "local")}
            gained = f"gained by glocal: {over['untuned']:+.1f} points over untuned, {over['local']:+.1f} over local"
            print(f"{optimizer:4s} from lr {lr:g}: test accuracy (loss) {line}; {gained}", flush=True)
    picture(runs).savefig(args.out, dpi=200)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
