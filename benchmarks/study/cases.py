"""Which runs the study makes: groups of cases, small and full tier."""

from __future__ import annotations

from typing import NamedTuple

from .problems import Case


class Group(NamedTuple):
    """Cases that share all but learning rate and seed."""

    label: str
    problems: tuple[str, ...]
    rates: tuple[float, ...]
    size: int | None = None
    noise: float = 0.0
    optimizer: str = "sgd"
    seeds: tuple[int, int] = (2, 3)  # small tier, full tier


SGD, ADAM = (0.003, 0.02, 0.1), (3e-4, 1e-3, 3e-3)
GROUPS = {
    "full": Group("digits, full batch", ("softmax", "mlp"), SGD, seeds=(2, 3)),
    "mini": Group("digits, batches of 32", ("softmax", "mlp"), SGD, 32, seeds=(3, 5)),
    "noisy": Group("digits, 20 % random labels, batches of 32", ("mlp",), SGD, 32, 0.2, seeds=(3, 5)),
    "adam-full": Group("digits, Adam, full batch", ("mlp",), ADAM, optimizer="adam"),
    "adam-mini": Group("digits, Adam, batches of 32", ("mlp",), ADAM, 32, optimizer="adam", seeds=(3, 5)),
    "ridge": Group("ridge regression, full batch", ("ridge",), (0.01, 0.1, 1.0), seeds=(3, 5)),
    "tabular": Group("diabetes, batches of 32", ("tabular",), SGD, 32, seeds=(3, 5)),
    "characters": Group("characters, batches of 32", ("characters",), (0.02, 0.2), 32, seeds=(2, 3)),
    "kmnist": Group("KMNIST, batches of 64", ("kmnist",), SGD, 64, seeds=(2, 3)),
    "cnn": Group("MNIST, LeNet, batches of 32", ("cnn",), SGD[:2], 32, seeds=(2, 3)),
}
FIRST_SEED = 10  # those below are for choosing constants: nothing that is reported has been seen by a choice


def cases(name: str, full: bool = False, first: int = FIRST_SEED) -> list[Case]:
    """The runs of a group, from seed `first` on."""
    g = GROUPS[name]
    seeds = range(first, first + g.seeds[full])
    return [Case(p, lr, s, g.size, g.noise, g.optimizer) for p in g.problems for lr in g.rates for s in seeds]
