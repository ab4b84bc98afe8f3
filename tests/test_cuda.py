"""The CUDA twin on a machine without a card: its face here, its kernels under the simulator in a process of their own."""

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from numba import cuda

from koopman_hpo.kernels import for_device

HERE = Path(__file__).parent
SIMULATED = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}


def simulated(*command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=SIMULATED, cwd=HERE.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("files", "least"), [(("cuda_twins.py", "cuda_runs.py"), 100), (("cuda_torch.py",), 20)], ids=["kernels", "torch"]
)
def test_every_kernel_and_run_under_the_simulator(files, least):
    out = simulated("-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in files))
    passed = re.search(r"^(\d+) passed in", out.splitlines()[-1])  # nothing skipped, nothing failed
    assert passed, out
    assert int(passed[1]) > least, out


def test_the_benchmark_proves_its_kernels_under_the_simulator():
    out = simulated("benchmarks/gpu.py", "--smoke")
    assert "all kernels agree with float64 NumPy" in out, out
    assert "runs under HyperOptimizer agree with those on the CPU" in out, out
    for name in (
        "sgd, p = 1e+03, q = 3",
        "adam, compiled",
        "ms_step_foreach",
        "ms_adapter_record",
        "step_to_floor",
        "adapter_to_floor",
        "MLP (8, 16, 4)",
    ):
        assert name in out.split("bars")[0], name
    assert "ResNet-18, tiny, adapter_to_floor" in out.split("bars")[1]
    assert out.endswith("are not kept.\n"), out


def test_the_benchmark_trusts_a_profile_only_where_it_shows_what_must_be_there(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    pytest.importorskip("torch")
    adapter = import_module("gpu_adapter")
    copy = lambda n: {"name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": n}}
    others = [{"name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 7}}, {"name": "kernel"}, {"ph": "M"}]
    assert adapter.copied([copy(8), *others, copy(adapter.KNOWN), copy(4)]) == 12
    with pytest.raises(RuntimeError, match="does not see"):
        adapter.copied([copy(8), *others])


def test_the_benchmark_says_what_it_needs():
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent, check=False)
    if "a copy makes" in done.stdout:
        pytest.skip("there is a card")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"(?s)^gpu.py: .*NVIDIA card.*pip install .*extras cuda, torch and test.*--smoke", done.stderr)


def kernels(module):
    """{name: parameters} of what a module of kernels offers."""
    own = {
        n: f for n, f in vars(module).items() if not n.startswith("_") and getattr(f, "__module__", "") == module.__name__
    }
    return {n: list(inspect.signature(getattr(f, "py_func", f)).parameters.values()) for n, f in own.items() if callable(f)}


@pytest.mark.parametrize("name", ["optimizers", "tangents", "trajectory"])
def test_twins_have_equal_names_and_signatures(name):
    cpu, twin = (kernels(import_module(f"koopman_hpo.kernels.{device}.{name}")) for device in ("cpu", "cuda"))
    assert cpu
    assert set(cpu) == set(twin)
    for kernel, parameters in cpu.items():
        *same, stream = twin[kernel]
        assert [p.name for p in same] == [p.name for p in parameters], kernel
        assert (stream.name, stream.kind, stream.default) == ("stream", stream.KEYWORD_ONLY, 0), kernel


def test_twins_offer_the_same():
    modules = import_module("koopman_hpo.kernels.cpu"), import_module("koopman_hpo.kernels.cuda")
    assert {*modules[0].__all__, "device_array", "device_arrays", "device_stream"} == set(modules[1].__all__)


@pytest.mark.parametrize("broken", [lambda: False, lambda: 1 / 0])
def test_without_a_card_the_way_out_is_named(broken, monkeypatch):
    monkeypatch.setattr(cuda, "is_available", broken)
    with pytest.raises(RuntimeError, match=r'(?s)NVIDIA card.*pip install "koopman-hpo\[cuda\]".*device="cpu"'):
        for_device("cuda")
    assert for_device("cpu").sgd


def test_a_numpy_that_numba_cuda_does_not_know_is_named(monkeypatch):
    def load(name):
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr("koopman_hpo.kernels.import_module", load)
    with pytest.raises(RuntimeError, match=r"(?s)older NumPy than 2.*row_stack.*pip install .numpy<2\.5"):
        for_device("cuda")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"one of \('cpu', 'cuda'\), got 'tpu'"):
        for_device("tpu")


def test_importing_the_library_leaves_cuda_alone():
    code = "import sys, koopman_hpo, koopman_hpo_adapters.numpy; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "koopman_hpo.kernels.cpu" in loaded
    assert not [m for m in loaded if m.startswith(("koopman_hpo.kernels.cuda", "numba.cuda", "numba_cuda"))]
