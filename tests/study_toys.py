"""A small classification task for the tests of the study, which have put it on the path."""

import numpy as np
from koopman_hpo_adapters.numpy import mlp
from study import tasks
from study.methods import Cost

from koopman_hpo import Space, log, logit

COST = Cost(tangent=2.0, hypergradient=3.0)


def task(steps=40, penalty="l2", **settings):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 5))
    y = np.argmax(X[:, :3], axis=1)
    part = lambda a, b: (X[a:b], y[a:b])
    return tasks.Task(
        mlp((5, 4, 3), seed=0),
        Space(lr=log(0.1), momentum=logit(0.5), **{penalty: log(0.01)}),
        {"lr": (1e-3, 1.0), "momentum": (0.1, 0.9), penalty: (1e-6, 0.1)},
        steps,
        tasks.Feed(part(0, 100), 20, 0),
        part(100, 200),
        part(200, 300),
        **settings,
    )
