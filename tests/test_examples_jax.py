"""The JAX examples run as they stand, gain over the untuned run, and save their figure."""

import gzip
import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("jax", "optax", "flax", "equinox", "sklearn", "matplotlib"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("command", ["jax_mnist.py", "jax_models.py equinox", "jax_models.py nnx"])
def test_runs_gains_and_draws(command, tmp_path):
    script, *arguments = command.split()
    figure = tmp_path / "figure.png"
    line = [sys.executable, "-W", "error", EXAMPLES / script, *arguments, "--out", figure]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | threads)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = {name: float(x) for name, x in re.findall(r"^(\w+) +test accuracy ([\d.]+) %", done.stdout, re.MULTILINE)}
    assert set(accuracy) == {"untuned", "local", "glocal"}
    assert accuracy["glocal"] > accuracy["untuned"] + 3, done.stdout
    assert accuracy["local"] > accuracy["untuned"] + 3, done.stdout
    gains = re.findall(r"([+-][\d.]+)(?: points)? over (?:the )?(untuned|local)", done.stdout)
    assert len(gains) == 2
    for gain, said in gains:
        assert abs(float(gain) - (accuracy["glocal"] - accuracy[said])) < 0.02  # of three numbers rounded to .01
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_reads_idx_files_plain_and_gzipped(tmp_path):
    spec = importlib.util.spec_from_file_location("jax_mnist", EXAMPLES / "jax_mnist.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images, labels = np.arange(2100 * 4, dtype=np.uint8).reshape(2100, 2, 2), np.arange(2100, dtype=np.uint8) % 10
    plain, zipped = tmp_path / "images", tmp_path / "labels.gz"
    plain.write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.tobytes())
    zipped.write_bytes(gzip.compress(struct.pack(">2i", 0x801, len(labels)) + labels.tobytes()))
    (train, val, test), what = example.data((plain, zipped), size=50)
    assert what.startswith("MNIST: 50 training, 1000 validation, 1000 test")
    np.testing.assert_allclose(train[0], images[:50].reshape(50, 4) / 255, rtol=1e-6)
    assert np.array_equal(np.concatenate([val[1], test[1]]), labels[100:])
    (tmp_path / "text").write_text("no images")
    with pytest.raises(SystemExit, match="not an idx file"):
        example.idx(tmp_path / "text")
