"""Compile every CUDA kernel for a card that need not be there, and say what each takes of it.

    python benchmarks/gpu_compile.py [--cc 9.0]      # needs the extra cuda, no card

Every kernel, for every type of parameters and tangents, to PTX, and from there to machine code where `ptxas` is installed
(it comes with CUDA 12's nvidia-cuda-nvcc).  Fails where a float32 update computes in double precision, or where a kernel
keeps values in local memory or calls a function that was not inlined.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numba.cuda.dispatcher
import numpy as np
from numba import types
from numba.cuda import compile_ptx

from koopman_hpo.kernels.cuda import optimizers, sums, tangents, trajectory
from koopman_hpo.kernels.cuda.storage import storage

KINDS = (
    ("float32", "float32", "float32"),
    ("float64", "float64", "float64"),
    ("float32", "float16", "float32"),
    ("float32", "float16", "float16"),
    ("float32", "uint16", "float32"),
    ("float32", "uint16", "uint16"),
)  # of parameters, tangents, and the gradient's tangents; uint16 are bfloat16's bits


def array(dtype, ndim):
    return types.Array(getattr(types, dtype), ndim, "C")


def kernels():
    """(name, kernel, signature) of all."""
    for own, kept, pushed in KINDS:
        load, store = storage(np.dtype(kept), np.dtype(own))
        load_dg = storage(np.dtype(pushed), np.dtype(own)).load
        state = array(own, 1), array(own, 2), array(kept, 2), array(kept, 3)
        rest = array(own, 1), array(pushed, 2), array(own, 2), array(own, 3), array("int64", 2), types.boolean
        for name in ("sgd", "adam", "rmsprop", "adagrad", "lion"):
            yield f"{name}, {own}, {kept}, {pushed}", getattr(optimizers, f"_{name}")(load, store, load_dg), (*state, *rest)
        args = array(kept, 2), array(own, 1), array("float64", 2)
        yield f"project, {own}, {kept}: float64", tangents._shares(load, storage(np.dtype(own), np.dtype(own)).load), args
        yield f"scale, {own}, {kept}", tangents._scale(load, store), (array(kept, 1), getattr(types, own))
    for own in ("float32", "float64"):
        H, wide, out = array(own, 2), array("float64", 2), array("float64", 1)
        yield f"project, total, {own}: float64", sums.total, (wide, types.int64, array(own, 1))
        yield f"gram_row, {own}: float64", trajectory._row_shares, (H, types.int64, wide)
        yield f"gram, {own}: float64", trajectory._gram, (H, wide)
        yield f"hankel_gram, {own}: float64", trajectory._hankel_gram, (wide, types.int64, wide)
        yield f"combine, {own}: float64", trajectory._combine, (out, H, array(own, 1))


def assembler():
    """Path of ptxas, or None."""
    package = find_spec("nvidia")
    found = [p for place in package.submodule_search_locations for p in Path(place).glob("*/bin/ptxas")] if package else []
    return found[0] if found else None


def registers(ptxas, ptx, cc):
    """What the assembler says of registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", "-o", source.with_suffix(".cubin"), source]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    used = re.search(r"Used (\d+) registers", said)[1]
    return f"{used} registers, {spilled} bytes spilled"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cc", default="9.0", help="compute capability, 9.0 by default")
    cc = tuple(int(n) for n in parser.parse_args().cc.split("."))
    # device functions ask the card in use for its capability: there is none
    numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    ptxas, bad = assembler(), []
    for name, kernel, signature in kernels():
        ptx, _ = compile_ptx(kernel.py_func, signature, cc=cc)
        taken = registers(ptxas, ptx, cc) if ptxas else "no ptxas: PTX only"
        print(f"{name:42s} {taken}")
        doubles = "float64" not in name and re.search(r"\.f64", ptx)
        if doubles or re.search(r"\.local|\bcall\b|\btrap\b", ptx):
            bad.append(name)
    if bad:
        sys.exit(f"gpu_compile.py: double precision, local memory or calls in {bad}")


if __name__ == "__main__":
    main()
