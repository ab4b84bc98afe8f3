"""The progress bar: follows a tuner, closes when it is done, and is silent without tqdm."""

import builtins
import io

import numpy as np
import pytest
from koopman_hpo_adapters.numpy import softmax_regression
from koopman_hpo_adapters.progress import Progress, bar, describe

from koopman_hpo import HyperparameterError, Local, Space, Tuner, inner, log, logit

RNG = np.random.default_rng(0)
BATCH = RNG.normal(size=(12, 3)), RNG.integers(0, 2, 12)


def tuner(callback, lr=0.1, steps=40):
    run = inner.sgd(softmax_regression(3, 2), Space(lr=log(lr), momentum=logit([0.5])), groups=(8,))
    return Tuner(run, Local(), steps=steps, window=10, callbacks=[callback])


def test_follows_to_the_end_and_closes(capsys):
    progress = Progress("digits", disable=False)
    tuner(progress).fit([BATCH], [BATCH])
    said = capsys.readouterr().err
    assert "digits" in said
    assert "40/40" in said
    assert "lr " in said
    assert progress._bar is None


def test_one_object_follows_tuners_in_turn(capsys):
    progress = Progress(disable=False)
    first = tuner(progress)
    for _ in range(10):
        first.step(BATCH, BATCH)
    tuner(progress, steps=30).fit([BATCH], [BATCH])
    said = capsys.readouterr().err
    assert "10/40" in said
    assert "30/30" in said
    progress.close()


def test_is_silent_where_stderr_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    tuner(Progress()).fit([BATCH], [BATCH])
    import sys

    assert sys.stderr.getvalue() == ""


def test_is_silent_without_tqdm(monkeypatch, capsys):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "tqdm":
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    tuner(Progress(disable=False)).fit([BATCH], [BATCH])
    silent = bar(3)
    silent.update()
    silent.close()
    assert capsys.readouterr().err == ""


def test_describes_scalars_by_value_and_vectors_by_range():
    made = tuner(lambda t: None)
    assert describe(made) == "loss nan, lr 0.1, momentum 0.5..0.5"


@pytest.mark.parametrize("label", ["", "a"])
def test_closing_twice_is_harmless(label):
    progress = Progress(label)
    progress.close()
    progress.close()


@pytest.mark.parametrize("total", [-1, 2.5, "a", None, True])
def test_a_total_that_is_no_count_is_refused(total):
    with pytest.raises(HyperparameterError, match=r"progress\.bar: total must be a whole number of at least 0"):
        bar(total)
