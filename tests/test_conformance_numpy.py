"""The conformance suite itself: the core passes it, and a wrong adapter does not."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from koopman_hpo_adapters.conformance import MODELS, OPTIMIZERS, Conformance


def at(problem, dtype):
    """A reference model in another precision."""
    return replace(problem, params=problem.params.astype(dtype))


class TestReference(Conformance):
    """The hand-written models that everything is compared with, in single precision too."""

    def problem(self, model, dtype):
        return at(model.reference, dtype) if model.name in ("quadratic", "logistic") else ready(model, dtype)


def ready(model, dtype):
    """The network in its own dtype: the ready model computes in the one that it was made for."""
    cast = lambda a: np.asarray(a, dtype)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        double = [a.astype(float) for a in (theta, Z)]
        loss, g, dG = model.reference.grad_jvp(double[0], hyper, double[1], dhyper, batch)
        return loss, cast(g), cast(dG)

    def outer(theta, hyper, batch):
        value, dE, direct = model.reference.outer(theta.astype(float), hyper, batch)
        return value, cast(dE), direct

    return replace(model.reference, params=model.params(dtype), grad_jvp=grad_jvp, outer=outer)


class WithoutMixedDerivative(Conformance):
    """Forgets d2 loss / dtheta dhyper: what an adapter gets wrong first."""

    def problem(self, model, dtype):
        still = lambda dhyper: {name: np.zeros_like(seed) for name, seed in dhyper.items()}
        exact = model.reference.grad_jvp
        return replace(model.reference, grad_jvp=lambda th, h, Z, dh, batch: exact(th, h, Z, still(dh), batch))


class WithoutDirectDerivative(Conformance):
    """Forgets the outer loss's own dependence on a hyperparameter."""

    def problem(self, model, dtype):
        exact = model.reference.outer
        return replace(model.reference, outer=lambda th, h, batch: (*exact(th, h, batch)[:2], {}))


@pytest.mark.parametrize("wrong", [WithoutMixedDerivative, WithoutDirectDerivative])
def test_finds_a_missing_derivative(wrong):
    with pytest.raises(AssertionError, match="logistic, sgd"):
        wrong().test_agrees_with_the_core_for_every_optimizer_and_hyperparameter()


class WrongOuterHessian(Conformance):
    def problem(self, model, dtype):
        return replace(model.reference, outer_hvp=lambda theta, hyper, V, batch: V)


class OnlyAllAtOnce(Conformance):
    """Goes wrong when it is not handed a tangent for every hyperparameter."""

    def problem(self, model, dtype):
        q, exact = model.space(OPTIMIZERS["sgd"]).q, model.reference.grad_jvp

        def grad_jvp(theta, hyper, Z, dhyper, batch):
            loss, g, dG = exact(theta, hyper, Z, dhyper, batch)
            return loss, g, dG * (len(Z) in (0, q))

        return replace(model.reference, grad_jvp=grad_jvp)


WRONG = {
    "test_its_linearisation_agrees_with_the_core": WrongOuterHessian,
    "test_random_directions_and_chunks_agree_with_all_directions_at_once": OnlyAllAtOnce,
    "test_a_value_for_each_group_agrees_with_the_core": WithoutMixedDerivative,
    "test_schedules_agree_with_the_core": WithoutDirectDerivative,
}


@pytest.mark.parametrize("test", WRONG)
def test_each_part_of_the_suite_finds_what_it_looks_for(test):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        getattr(WRONG[test](), test)()


@pytest.mark.parametrize("name", ["jax", "autograd", "torch", "plot"])
def test_a_missing_framework_says_which_extra_to_install(name):
    package = "matplotlib" if name == "plot" else name
    code = f"import sys; sys.modules[{package!r}] = None; import koopman_hpo; import koopman_hpo_adapters.{name}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"koopman_hpo_adapters.{name} needs" in found.stderr
    assert f"pip install 'koopman-hpo[{name}]'" in found.stderr.splitlines()[-1]


def test_an_adapter_without_a_model_is_told_what_to_define():
    with pytest.raises(NotImplementedError, match="must define problem"):
        Conformance().test_fills_the_contract()


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_of_a_model_are_those_of_its_reference(name):
    model = MODELS[name]
    train, val = model.losses(np)
    hyper = model.space(OPTIMIZERS["sgd"]).natural(model.space(OPTIMIZERS["sgd"]).phi0)
    theta, batch = model.params(), model.batches()[0]
    own = {n: hyper[n] for n in model.tuned}
    none = {n: np.zeros((0, *np.shape(hyper[n]))) for n in model.tuned}
    loss, _, _ = model.reference.grad_jvp(theta, own, np.zeros((0, theta.size)), none, batch)
    value = model.reference.outer(theta, own, model.val_batch())[0]
    np.testing.assert_allclose([train(theta, own, batch), val(theta, own, model.val_batch())], [loss, value], rtol=1e-13)


def test_every_hyperparameter_of_every_optimizer_is_in_the_suite():
    from koopman_hpo import optimizers

    for rule in (optimizers.sgd(False), optimizers.adam(False), optimizers.rmsprop(False), optimizers.adagrad(0.0)):
        tuned = set().union(*(case.tuned for case in OPTIMIZERS.values() if case.factory == rule.name))
        assert tuned == set(rule.defaults)
