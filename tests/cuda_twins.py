"""Every CUDA kernel against the oracle and against its CPU twin.

`test_cuda.py` runs this file under Numba's simulator.  On a machine with a card, `python -m pytest tests/cuda_twins.py`
runs it on the card itself.
"""

import warnings

import numpy as np
import pytest
from cuda_cases import CPU, CUDA, NEAR, RULES, TOLERANCE, ULP, Case, close, opened, packed
from numba import config, cuda

from koopman_hpo.errors import ShapeError
from koopman_hpo.kernels.arrays import Coefficients, Grads, TangentState
from koopman_hpo.kernels.cpu import trajectory as cpu_trajectory
from koopman_hpo.kernels.cuda import launch, trajectory


@pytest.fixture
def small(monkeypatch):
    """Few threads and blocks: the simulator is slow, and every loop has to stride."""
    monkeypatch.setattr(launch, "THREADS", 4)
    monkeypatch.setattr(launch, "BLOCKS", 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("q", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_the_oracles_and_the_cpus(name, dtype, q):
    case = Case(name, (3, 14, 2), q, dtype)
    got = case.on_cuda()
    assert all(a.dtype == dtype for a in got)
    close(got, case.expected(), TOLERANCE[dtype])
    close(got, case.on_cpu(), TOLERANCE[dtype])


def test_no_sign_of_lions_hangs_on_rounding():
    case = Case("lion", (3000, 5000), 1, np.float32)
    _, b1, a1, *_ = np.repeat(case.coefficients.c, case.segments, axis=1)
    s = b1 * case.state.slots[0] + a1 * case.grads.g
    assert np.abs(s).min() >= NEAR - 1e-6
    assert (s > 0).any()
    assert (s < 0).any()


@pytest.mark.parametrize("p", [0, 1, 255, 256, 257])
def test_every_size_at_the_real_number_of_threads(p):
    case = Case("sgd", (p,), 2, np.float64, run=1024)
    close(case.on_cuda(), case.expected(), TOLERANCE[np.float64])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("grads_too", [False, True])
@pytest.mark.parametrize("stored", ULP)
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adagrad", "lion"])
def test_tangents_in_half_the_memory_are_rounded_once(name, stored, grads_too):
    case = Case(name, (3, 14, 2), 2, np.float32).rounded(stored)
    got, wanted = case.on_cuda(stored, grads_too), case.expected()
    for tangents in ("Z", "dslots"):
        x, y = getattr(got, tangents), getattr(wanted, tangents)
        # half a unit in the last place where it is stored, and float32's own rounding before that
        assert (np.abs(x - y) <= 0.51 * ULP[stored] * np.abs(y) + 2e-5).all()
    close(got._replace(Z=wanted.Z, dslots=wanted.dslots), wanted, TOLERANCE[np.float32])


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0x80000000]
    x = np.array(bits, np.uint32).view(np.float32)
    state = TangentState(*map(cuda.to_device, (np.zeros(9, np.float32), np.zeros((1, 9), np.float32))), None, None)
    Z, dslots = cuda.to_device(np.zeros((1, 9), np.uint16)), cuda.to_device(np.zeros((1, 1, 9), np.uint16))
    grads = Grads(*map(cuda.to_device, (np.zeros(9, np.float32), x[None])))
    c = np.array([[1], [0], [1], [0]], np.float32)  # plain SGD at lr = 1: Z <- -dG
    coefficients = Coefficients(*map(cuda.to_device, (c, np.zeros((4, 1, 1), np.float32))))
    blocks = cuda.to_device(np.array([[0, 0, 9]]))
    CUDA.sgd(grads, coefficients, blocks, False, None, state._replace(Z=Z, dslots=dslots))
    kept = dslots.copy_to_host()[0, 0]
    assert [hex(b) for b in kept[:6]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0x7f80", "0xff80"]
    assert np.isnan(opened(kept[6:8])).all()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("q", [0, 1, 3, 6])
def test_projection_sums_every_tangent_in_one_order(q, dtype):
    rng = np.random.default_rng(1)
    Z, dE = rng.normal(size=(q, 101)), rng.normal(size=101)
    arithmetic = np.float64 if dtype == np.float64 else np.float32
    Z, dE = Z.astype(arithmetic) if dtype is not np.uint16 else packed(Z, dtype), dE.astype(arithmetic)
    Z = Z if dtype == np.uint16 else Z.astype(dtype)
    out, work = cuda.to_device(np.full(q, np.nan)), cuda.to_device(np.full((2, q), np.nan))
    again = cuda.to_device(np.full(q, np.nan))
    for into in (out, again):
        CUDA.project(cuda.to_device(Z), cuda.to_device(dE), work, into)
    wide = (opened(Z) if Z.dtype.itemsize == 2 else Z).astype(np.float64)
    np.testing.assert_allclose(out.copy_to_host(), wide @ dE.astype(np.float64), rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(out.copy_to_host(), again.copy_to_host())
    if dtype in (np.float64, np.float32):
        host = np.empty(q, dtype)
        CPU.project(Z, dE, None, host)
        np.testing.assert_allclose(out.copy_to_host(), host, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("p", [0, 1, 255, 256, 257])
@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_at_every_size(name, p):
    case = Case(name, (p,), 1, np.float32, run=64)
    got = case.on_cuda()
    close(got, case.expected(), TOLERANCE[np.float32])
    close(got, case.on_cpu(), TOLERANCE[np.float32])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("q", [0, 1, 255, 256, 257])
def test_every_other_kernel_at_every_size(q):
    H = np.random.default_rng(6).normal(size=(3, q))
    D, out, work = H - H[0], cuda.to_device(np.full(3, np.nan)), cuda.to_device(np.full((2, 3), np.nan))
    trajectory.gram_row(cuda.to_device(H), 3, 16, work, out)
    np.testing.assert_allclose(out.copy_to_host(), D @ D[-1], rtol=1e-13, atol=1e-13)
    out, sums = cuda.to_device(np.full((3, 3), np.nan)), cuda.to_device(np.full(q, np.nan))
    trajectory.gram(cuda.to_device(H), out)
    np.testing.assert_allclose(out.copy_to_host(), D @ D.T, rtol=1e-13, atol=1e-13)
    trajectory.combine(cuda.to_device(np.arange(3.0)), cuda.to_device(H), sums)
    np.testing.assert_allclose(sums.copy_to_host(), np.arange(3.0) @ H, rtol=1e-13, atol=1e-13)
    x = cuda.to_device(H)
    CUDA.scale(x, 0.7)
    np.testing.assert_array_equal(x.copy_to_host(), 0.7 * H)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257])
def test_hankel_gram_at_every_size(n):
    G = np.random.default_rng(7).normal(size=(n, n))
    out = cuda.to_device(np.full((n, n), np.nan))
    trajectory.hankel_gram(cuda.to_device(G), 1, out)  # of one delay: itself
    np.testing.assert_array_equal(out.copy_to_host(), G)


def projected(p, shares):
    Z, dE = np.random.default_rng(2).normal(size=(2, p)), np.arange(p) / 7
    out = cuda.to_device(np.full(2, np.nan))
    CUDA.project(cuda.to_device(Z), cuda.to_device(dE), cuda.to_device(np.full((shares, 2), np.nan)), out)
    np.testing.assert_allclose(out.copy_to_host(), Z @ dE, rtol=1e-13, atol=1e-12)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("p", "shares"), [(0, 2), (1, 2), (255, 2), (256, 2), (257, 2), (9, 1), (9, 3)])
def test_projection_at_every_size(p, shares):
    projected(p, shares)


def test_projection_at_the_real_number_of_threads():
    projected(257, 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_scaling_clears_what_is_not_finite_only_at_zero(dtype):
    x = np.random.default_rng(3).normal(size=(2, 3, 7)).astype(dtype)
    x[0, 0, 0] = np.nan
    d, host = cuda.to_device(x), x.copy()
    CUDA.scale(d, 0.7)
    CPU.scale(host, 0.7)
    np.testing.assert_allclose(d.copy_to_host(), host, rtol=2 * np.finfo(dtype).eps)
    CUDA.scale(d, 0.0)
    CPU.scale(host, 0.0)
    assert not d.copy_to_host().any()
    assert not host.any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("m", "q"), [(1, 1), (2, 17), (5, 3), (6, 40), (8, 9)])
def test_trajectory_kernels_are_numpys_and_the_cpus(m, q, dtype):
    rng = np.random.default_rng(4)
    H, c = (3 + rng.normal(size=(m, q))).astype(dtype), rng.normal(size=m)
    D = H - H[0]
    G = D.astype(np.float64) @ D.T.astype(np.float64)
    d = max(1, m // 2)
    K = sum(G[k : m - d + 1 + k, k : m - d + 1 + k] for k in range(d))
    on_device, host = cuda.to_device(H), lambda *shape: np.full(shape, np.nan)
    work = cuda.to_device(host(2, m))
    calls = {
        "gram": (G, lambda module, H, out: module.gram(H, out)),
        "gram_row": (G[-1], lambda module, H, out: module.gram_row(H, m, 16, work if module is trajectory else None, out)),
        "combine": (c @ H.astype(np.float64), None),
    }
    for name, (wanted, call) in calls.items():
        out, theirs = cuda.to_device(host(*wanted.shape)), host(*wanted.shape)
        if name == "combine":
            trajectory.combine(cuda.to_device(c), on_device, out)
            cpu_trajectory.combine(c, H, theirs)
        else:
            call(trajectory, on_device, out)
            call(cpu_trajectory, H, theirs)
        np.testing.assert_allclose(out.copy_to_host(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=name)
        np.testing.assert_allclose(out.copy_to_host(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], err_msg=name)
    out, theirs = cuda.to_device(host(*K.shape)), host(*K.shape)
    trajectory.hankel_gram(cuda.to_device(G), d, out)
    cpu_trajectory.hankel_gram(G, d, theirs)
    np.testing.assert_allclose(out.copy_to_host(), K, rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(out.copy_to_host(), theirs)  # the same order of additions


def test_refuses_what_has_gaps_and_leaves_everything_as_it_was():
    case = Case("sgd", (6,), 1, np.float64)
    theta, slots, Z, dslots = case.state
    wide = cuda.to_device(np.zeros((1, 12)))
    state = TangentState(*map(cuda.to_device, (theta, slots)), wide[:, ::2], cuda.to_device(dslots))
    rest = Coefficients(*map(cuda.to_device, case.coefficients)), cuda.to_device(case.blocks), False, None
    with pytest.raises(ShapeError, match=r"C-contiguous.*\(1, 6\).*contiguous copy"):
        CUDA.sgd(Grads(*map(cuda.to_device, case.grads)), *rest, state)
    np.testing.assert_array_equal(state.theta.copy_to_host(), theta)
    with pytest.raises(TypeError, match=r"device memory, got numpy\.ndarray.*to_device"):
        CUDA.project(Z, theta, None, None)


def test_refuses_tangents_of_a_type_without_a_kernel():
    case = Case("sgd", (6,), 1, np.float64)
    case.state = case.state._replace(Z=case.state.Z.astype(np.float32))
    with pytest.raises(ShapeError, match="parameters of float64 and tangents of float32"):
        case.on_cuda()


class Foreign:
    """Another library's array in device memory."""

    def __init__(self, array, typestr=None):
        self.array = array
        face = array.__array_interface__
        self.__cuda_array_interface__ = {**face, "typestr": typestr or face["typestr"], "version": 2}


@pytest.fixture
def adopted(monkeypatch):
    """The simulator cannot adopt foreign memory: what Numba would do, done here."""

    if not config.ENABLE_CUDASIM:
        pytest.skip("needs arrays of another library")
    from numba.cuda.cudadrv.devicearray import FakeCUDAArray

    def adopt(face, owner, sync):
        assert not sync, "the caller orders the work by its stream"
        return FakeCUDAArray(owner.array.view(face["typestr"]))

    monkeypatch.setattr(cuda, "from_cuda_array_interface", adopt, raising=False)


@pytest.mark.usefixtures("adopted", "small")
def test_works_in_place_on_the_memory_of_another_library():
    case = Case("adam", (9, 4), 2, np.float32)
    arrays = [a.copy() for a in case.state]
    args = Grads(*map(Foreign, case.grads)), Coefficients(*map(Foreign, case.coefficients)), Foreign(case.blocks)
    CUDA.adam(*args, False, None, TangentState(*map(Foreign, arrays)))
    close(TangentState(*arrays), case.on_cpu(), TOLERANCE[np.float32])


@pytest.mark.usefixtures("adopted")
def test_bfloat16_of_torch_is_seen_as_its_bits():
    assert launch.device_array(Foreign(np.zeros(3, np.uint16), "<V2")).dtype == np.uint16


@pytest.mark.usefixtures("adopted")
@pytest.mark.parametrize(
    ("array", "fine"),
    [
        (np.zeros((3, 4)), True),
        (np.zeros((3, 4))[:, :2], False),
        (np.zeros((3, 4)).T, False),
        (np.zeros((1, 8))[:, ::2], False),
        (np.zeros((4, 3))[1:3], True),
        (np.zeros((3, 8))[:1, :4], True),
        (np.zeros((0, 4)), True),
        (np.zeros((6, 4))[:, :0], True),
    ],
)
def test_foreign_arrays_are_taken_exactly_where_they_have_no_gaps(array, fine):
    foreign = Foreign(array)
    foreign.__cuda_array_interface__["strides"] = array.strides  # always given by some libraries
    if fine:
        assert launch.device_array(foreign).shape == array.shape
    else:
        with pytest.raises(ShapeError, match="C-contiguous"):
            launch.device_array(foreign)


def test_kernels_run_on_the_stream_that_they_are_given(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "external_stream", lambda handle: seen.append(handle) or 0, raising=False)
    x = cuda.to_device(np.ones(3))
    torch_stream = type("Stream", (), {"cuda_stream": 77})()
    for stream in (0, 42, torch_stream):
        CUDA.scale(x, 0.5, stream=stream)
    assert seen == [42, 77]
    np.testing.assert_array_equal(x.copy_to_host(), np.full(3, 0.125))


@pytest.mark.parametrize("category", [UserWarning, type("NumbaPerformanceWarning", (Warning,), {})])
def test_a_small_model_is_no_reason_for_a_warning(category):
    class Kernel:
        """What Numba does when a launch is configured."""

        def __getitem__(self, settings):
            for text in ("Grid size 1 will likely result in GPU under-utilization due to low occupancy.", "something else"):
                warnings.warn(text, category, 2)
                warnings.warn(f"\x1b[1m{text}\x1b[0m", category, 2)  # as Numba writes where it may
            return lambda: None

    with pytest.warns(category) as seen:
        launch.launch(Kernel(), (1, 1), 0)
    assert [str(w.message) for w in seen] == ["something else", "\x1b[1msomething else\x1b[0m"]
