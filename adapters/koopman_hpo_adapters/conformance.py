"""A suite that any adapter subclasses: the same toy models, the same numbers in every framework.

    class TestMine(Conformance):                      # collected by pytest; unittest.TestCase may be mixed in
        def problem(self, model, dtype):
            train, val = model.losses(my_numpy)       # a namespace with exp, log, tanh, sum, mean, logaddexp
            return my_adapter.problem(train, val, model.params(dtype))

Every optimizer with every hyperparameter is compared with the core's run of a hand-written NumPy model.  An adapter that is
a whole `Inner` overrides `inner` instead.  Letters: p parameters, q hyperparameters, T steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import krylov, log
from koopman_hpo.checkpoint import load, save
from koopman_hpo.engine import CoreInner
from koopman_hpo.errors import AdapterError, HyperparameterError, ShapeError
from koopman_hpo.exact import check_hypergradient, hypergradient
from koopman_hpo.inner import Inner
from koopman_hpo.problem import Array, Problem
from koopman_hpo.space import Space
from koopman_hpo.strategies import Glocal
from koopman_hpo.tuner import Tuner

from ._conformance_models import DOUBLE, MODELS, ON_DIGITS, OPTIMIZERS, SINGLE, STEPS, Model, Optimizer, digits

__all__ = ["MODELS", "OPTIMIZERS", "Conformance", "Model", "Optimizer", "digits"]


class Run(NamedTuple):
    """What a run left."""

    losses: Array  # (T,)
    params: Array  # (p,)
    h: Array  # (q,)


def _train(run: Inner, model: Model, dtype: Any, space: Space) -> Run:
    losses = [float(run.step(space.phi0, batch)) for batch in model.batches(dtype)]
    return Run(np.array(losses), run.params, run.hypergradient(model.val_batch(dtype)).grad)


@cache
def _reference(model: str, optimizer: str) -> Run:
    toy, case = MODELS[model], OPTIMIZERS[optimizer]
    space = toy.space(case)
    return _train(case.run(toy.reference, space), toy, DOUBLE, space)


def _agree(got: Run, want: Run, rtol: float) -> None:
    """Each coordinate to rtol; what is (nearly) zero, to rtol of the largest."""
    for name, a, b in zip(Run._fields, got, want, strict=True):
        tiny = rtol * (1e-2 if rtol < 1e-6 else 1.0) * float(np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=tiny, err_msg=name)


def _same(one: dict[str, Array], two: dict[str, Array]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def _raises(kind: type[Exception], function: Callable[[], Any]) -> None:
    try:
        function()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


class Conformance:
    """Subclass it, give it `problem` or `inner`, and let pytest or unittest collect the subclass.

    Attributes:
      models: names of the toy models that every optimizer is run on.
      single: whether the adapter does float32.
      on_digits: whether to run the digits network too (p = 9,610, 200 steps; needs scikit-learn).
      linearises: whether a run can be linearised.
    """

    models: tuple[str, ...] = tuple(MODELS)
    single = True
    on_digits = True
    linearises = True

    def problem(self, model: Model, dtype: np.dtype) -> Problem:
        """The model in your framework."""
        raise NotImplementedError(f"{type(self).__name__} must define problem(model, dtype) or inner(...)")

    def inner(self, model: Model, optimizer: Optimizer, space: Space, dtype: np.dtype) -> Inner | None:
        """A fresh run of the model under the optimizer, tuning the space; None: your framework has no such optimizer.

        Here: the core's optimizer on `problem`, which is made once a model and dtype.
        """
        return optimizer.run(self._problem(model, dtype), space)

    def _problem(self, model: Model, dtype: np.dtype) -> Problem:
        made = type(self).__dict__.get("_made")
        if made is None:
            made = {}
            type(self)._made = made  # type: ignore[attr-defined]
        key = (model.name, dtype)
        if key not in made:
            made[key] = self.problem(model, dtype)
        return made[key]

    @property
    def _gives_problems(self) -> bool:
        """Whether the core's optimizers run the adapter's models, with all that they offer."""
        return type(self).inner is Conformance.inner

    def _run(self, model: str = "logistic", optimizer: str = "sgd") -> tuple[Inner, Model, Space]:
        """A run for the tests that need just one."""
        run, case = self._some(model, optimizer)
        return run, MODELS[model], MODELS[model].space(case)

    def _some(self, model: str, optimizer: str) -> tuple[Inner, Optimizer]:
        """A run of the model, by the optimizer wished for if there is one."""
        toy = MODELS[model]
        for name in (optimizer, *OPTIMIZERS):
            run = self.inner(toy, OPTIMIZERS[name], toy.space(OPTIMIZERS[name]), DOUBLE)
            if run is not None:
                return run, OPTIMIZERS[name]
        raise AssertionError("inner(...) gave no run for any optimizer")

    def _compare(self, cases: list[tuple[str, str]], dtype: np.dtype, rtol: float) -> None:
        """Every (model, optimizer) against the core; all failures are told together."""
        failures, seen = [], 0
        for model, optimizer in cases:
            toy, case = MODELS[model], OPTIMIZERS[optimizer]
            run = self.inner(toy, case, toy.space(case), dtype)
            if run is None:
                continue
            seen += 1
            try:
                assert run.params.dtype == dtype, f"params are {run.params.dtype}, not {dtype}"
                _agree(_train(run, toy, dtype, toy.space(case)), _reference(model, optimizer), rtol)
            except AssertionError as error:
                failures.append(f"{model}, {optimizer}: {error}")
        assert seen, "inner(...) gave no run for any optimizer"
        assert not failures, "\n\n".join(failures)

    # -- numbers -------------------------------------------------------------------------------------------------------

    def test_fills_the_contract(self) -> None:
        assert isinstance(self._run()[0], Inner)

    def test_agrees_with_the_core_for_every_optimizer_and_hyperparameter(self) -> None:
        self._compare([(m, o) for m in self.models for o in OPTIMIZERS], DOUBLE, 1e-10)

    def test_single_precision_agrees_with_the_core(self) -> None:
        if self.single:
            self._compare([("logistic", o) for o in OPTIMIZERS], SINGLE, 1e-4)

    def test_agrees_with_the_core_on_digits(self) -> None:
        for case in ON_DIGITS if self.on_digits else ():
            toy = digits()
            space = toy.space(case)
            for dtype, rtol in ((DOUBLE, 1e-10), (SINGLE, 1e-4))[: 1 + self.single]:
                run = self.inner(toy, case, space, dtype)
                if run is not None:
                    want = _on_digits(case.name)
                    found = hypergradient(run, toy.batches(dtype), toy.val_batch(dtype)).grad
                    tiny = 0.1 * rtol * np.abs(want).max()
                    np.testing.assert_allclose(found, want, rtol=rtol, atol=tiny, err_msg=f"{case.name}, {dtype}")

    def test_agrees_with_central_differences(self) -> None:
        run, toy, _ = self._run("mlp", "adam")
        report = check_hypergradient(run, toy.batches(), toy.val_batch())
        assert report.ok, str(report)

    def test_the_model_based_estimate_agrees_with_the_core(self) -> None:
        """Of a run whose optimizer is known; of any other it is refused."""
        for model in self.models:
            for name in ("sgd", "adam", "rmsprop"):
                toy, case = MODELS[model], OPTIMIZERS[name]
                space = toy.space(case)
                run = self.inner(toy, case, space, DOUBLE)
                if run is None:
                    continue
                runs, found = (run, case.run(toy.reference, space)), []
                for some in runs:
                    _train(some, toy, DOUBLE, space)
                    batches = toy.batches()
                    if not isinstance(some, CoreInner):
                        foreign: Any = some
                        _raises(AdapterError, lambda: krylov.estimate(foreign, batches[0], toy.val_batch(), 20))  # noqa: B023
                        return
                    noise: dict[str, Any] = {"noise": "epoch", "batches": batches[:4]} if name == "sgd" else {}
                    found.append(krylov.estimate(some, batches[0], toy.val_batch(), 20, columns=99, **noise).estimate)
                size = np.abs(found[1]).max()
                np.testing.assert_allclose(found[0], found[1], rtol=1e-8, atol=1e-8 * size, err_msg=f"{model}, {name}")

    def test_schedules_agree_with_the_core(self) -> None:
        toy = MODELS["logistic"]
        for case in OPTIMIZERS.values():
            tuned = case.tuned | {"lr": log([0.05, 0.02, 0.1], knots=(0, 4, 9))}
            space = Space(**tuned, l2=log([0.1, 0.2], knots=(0, 6), schedule="constant"))
            run = self.inner(toy, case, space, DOUBLE)
            if run is not None:
                _agree(_train(run, toy, DOUBLE, space), _train(case.run(toy.reference, space), toy, DOUBLE, space), 1e-10)
                return

    def test_a_value_for_each_group_agrees_with_the_core(self) -> None:
        if not self._gives_problems:
            return  # who owns the whole step spreads values over it himself
        toy, case = MODELS["mlp"], OPTIMIZERS["sgd"]
        space = Space(**case.tuned | {"lr": log([0.05, 0.1]), "weight_decay": log([0.02, 0.01])}, **toy.tuned)
        for dtype, rtol in ((DOUBLE, 1e-10), (SINGLE, 1e-4))[: 1 + self.single]:
            got, want = (case.run(p, space, groups=(35, 18)) for p in (self._problem(toy, dtype), toy.reference))
            _agree(_train(got, toy, dtype, space), _train(want, toy, DOUBLE, space), rtol)

    def test_random_directions_and_chunks_agree_with_all_directions_at_once(self) -> None:
        if not self._gives_problems:
            return
        toy, case = MODELS["mlp"], OPTIMIZERS["sgd"]
        space, model = toy.space(case), self._problem(toy, DOUBLE)
        want = _train(case.run(model, space), toy, DOUBLE, space)
        for options in ({"directions": space.q, "seed": 1}, {"chunk": 2}, {"directions": space.q, "chunk": 3}):
            _agree(_train(case.run(model, space, **options), toy, DOUBLE, space), want, 1e-10)  # q of q span everything
        few = case.run(model, space, directions=2, seed=1)
        assert len(few.tangents) == 2
        few_h = _train(few, toy, DOUBLE, space).h
        exact = _train(case.run(toy.reference, space, directions=2, seed=1), toy, DOUBLE, space).h
        np.testing.assert_allclose(few_h, exact, rtol=1e-10, atol=1e-12 * np.abs(exact).max())

    def test_its_linearisation_agrees_with_the_core(self) -> None:
        if not self.linearises:
            return
        for name in self.models:
            (run, case), toy = self._some(name, "sgd"), MODELS[name]
            space = toy.space(case)
            reference = case.run(toy.reference, space)
            for r in (run, reference):
                for batch in toy.batches()[:3]:
                    r.step(space.phi0, batch)
            before, batch, V = run.snapshot(), toy.batches()[3], np.random.default_rng(0).normal(size=(3, run.params.size))
            got, want = (r.linearise(batch, toy.val_batch()) for r in (run, reference))
            # where the reference has no exact outer Hessian, it takes central differences
            pairs = (
                (got.gradient, want.gradient, 1e-10),
                (got.hvp(V), want.hvp(V), 1e-10),
                (got.outer_gradient, want.outer_gradient, 1e-10),
                (got.outer_hvp(V), want.outer_hvp(V), 1e-6),
            )
            for a, b, rtol in pairs:
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=name)
            _raises(ShapeError, partial(got.hvp, V[0]))
            assert _same(before, run.snapshot())
            same = run.linearise(batch)
            np.testing.assert_array_equal(same.outer_gradient, run.linearise(batch, batch).outer_gradient)

    def test_a_window_is_its_steps(self) -> None:
        run, toy, space = self._run("mlp", "adam")
        before = run.snapshot()
        losses, H = run.run(space.phi0, toy.batches(), toy.val_batch(), every=5)
        after = run.params
        assert run.t == STEPS
        run.restore(before)
        want, rows = [], []
        for n, batch in enumerate(toy.batches(), 1):
            want.append(float(run.step(space.phi0, batch)))
            if n % 5 == 0:
                rows.append(run.hypergradient(toy.val_batch()).grad)
        assert losses.shape == (STEPS,)
        assert H.shape == (STEPS // 5, space.q)
        for a, b in ((losses, np.array(want)), (H, np.array(rows)), (after, run.params)):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * np.abs(b).max())

    def test_plain_steps_leave_the_tangents(self) -> None:
        run, toy, space = self._run()
        run.step(space.phi0, toy.batches()[0])
        norm, before = run.tangent_norm(), run.snapshot()
        loss = run.step(space.phi0, toy.batches()[1], tangents=False)
        moved = run.params
        assert run.tangent_norm() == norm > 0
        run.restore(before)
        np.testing.assert_allclose(run.step(space.phi0, toy.batches()[1]), loss, rtol=1e-12)
        np.testing.assert_allclose(run.params, moved, rtol=1e-12)

    def test_forgetting_scales_the_tangents(self) -> None:
        run, toy, space = self._run()
        run.step(space.phi0, toy.batches()[0])
        norm = run.tangent_norm()
        run.forget(0.25)
        np.testing.assert_allclose(run.tangent_norm(), 0.25 * norm, rtol=1e-12)
        run.forget(0)
        assert run.tangent_norm() == 0
        _raises(HyperparameterError, lambda: run.forget(-0.1))
        _raises(HyperparameterError, lambda: run.forget(1.5))

    # -- state ---------------------------------------------------------------------------------------------------------

    def test_a_restored_run_repeats_itself_bit_for_bit(self) -> None:
        run, toy, space = self._run("mlp", "adam")
        for batch in toy.batches()[:4]:
            run.step(space.phi0, batch)
        saved = run.snapshot()
        kept = {name: a.copy() for name, a in saved.items()}
        rest = lambda: ([run.step(space.phi0, b) for b in toy.batches()[4:]], run.hypergradient(toy.val_batch()).grad)
        (one, h), end = rest(), run.snapshot()
        assert _same(saved, kept), "a snapshot moved while training went on"
        run.restore(saved)
        (two, again), same_end = rest(), run.snapshot()
        assert one == two
        assert np.array_equal(h, again)
        assert _same(end, same_end)

    def test_refuses_a_foreign_snapshot_and_stays_as_it_was(self) -> None:
        run, toy, space = self._run()
        run.step(space.phi0, toy.batches()[0])
        before = run.snapshot()
        assert all(type(a) is np.ndarray and a.dtype.kind in "fiubU" for a in before.values()), "arrays, no pickle"
        name = next(n for n, a in before.items() if a.ndim > 0 and n != "phi")
        _raises(ShapeError, lambda: run.restore({k: v for k, v in before.items() if k != name}))
        _raises(ShapeError, lambda: run.restore(before | {name: before[name][:-1]}))
        assert _same(before, run.snapshot())

    def test_a_saved_tuner_resumes_bit_for_bit(self) -> None:
        def tuner() -> tuple[Tuner, Model]:
            run, toy, _ = self._run()
            return Tuner(run, Glocal(), steps=40, window=10), toy

        whole, toy = tuner()
        batches, val = toy.batches(), toy.val_batch()
        want = whole.fit(batches, [val])
        first, _ = tuner()
        for t in range(17):  # in the middle of a window
            first.step(batches[t % len(batches)], val)
        second, _ = tuner()
        with tempfile.TemporaryDirectory() as folder:
            load(save(Path(folder) / "run.npz", first), second)
        got = second.fit(batches, [val])
        assert np.array_equal(got.params, want.params)
        assert np.array_equal(got.phi, want.phi)
        assert got.value == want.value
        assert np.array_equal(got.history.trajectory, want.history.trajectory)

    def test_tunes_as_the_core_does(self) -> None:
        for mode in ("online", "restart"):
            run, toy, space = self._run()
            reference = OPTIMIZERS["sgd"].run(toy.reference, space)
            if space.names != toy.space(OPTIMIZERS["sgd"]).names:
                return  # this adapter has no such optimizer
            settings: dict[str, Any] = {"steps": 30, "window": 10, "runs": 2, "mode": mode}
            got, want = (Tuner(r, Glocal(), **settings).fit(toy.batches(), [toy.val_batch()]) for r in (run, reference))
            np.testing.assert_allclose(got.phi, want.phi, rtol=1e-8)
            np.testing.assert_allclose(got.params, want.params, rtol=1e-8)
            np.testing.assert_allclose(got.value, want.value, rtol=1e-8)

    # -- bad input -----------------------------------------------------------------------------------------------------

    def test_refuses_a_wrong_phi_and_stays_as_it_was(self) -> None:
        run, toy, space = self._run()
        before, batch = run.snapshot(), toy.batches()[0]
        _raises(ShapeError, lambda: run.step(space.phi0[:-1], batch))
        _raises(HyperparameterError, lambda: run.step(np.full(space.q, np.nan), batch))
        assert _same(before, run.snapshot())

    def test_refuses_a_first_loss_that_is_not_finite(self) -> None:
        run, toy, space = self._run()
        before, (X, y) = run.snapshot(), toy.batches()[0]
        _raises(AdapterError, lambda: run.step(space.phi0, (X * np.nan, y)))
        assert _same(before, run.snapshot())

    def test_a_later_loss_that_is_not_finite_is_no_error(self) -> None:
        run, toy, space = self._run()
        X, y = toy.batches()[0]
        run.step(space.phi0, (X, y))
        assert not np.isfinite(run.step(space.phi0, (X * np.nan, y)))


@cache
def _on_digits(name: str) -> Array:
    case, toy = next(c for c in ON_DIGITS if c.name == name), digits()
    return hypergradient(case.run(toy.reference, toy.space(case)), toy.batches(), toy.val_batch()).grad
