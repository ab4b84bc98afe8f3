"""The torch examples run with a small budget, and say what they measured."""

import gzip
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mnist():
    return runpy.run_path(str(EXAMPLES / "torch_mnist.py"))


@pytest.fixture(scope="module")
def reweighting():
    return runpy.run_path(str(EXAMPLES / "torch_reweighting.py"))


@pytest.fixture(scope="module")
def text():
    return runpy.run_path(str(EXAMPLES / "torch_text.py"))


def numbers(pattern, said):
    """Every group of a pattern that must occur, as floats."""
    found = re.search(pattern, said)
    assert found, said
    return [float(x) for x in found.groups()]


def idx_file(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


# -- MNIST -------------------------------------------------------------------------------------------------------------


def test_mnist_from_a_small_rate_ends_far_above_the_untuned_run(mnist, tmp_path, capsys):
    mnist["main"](["--out", str(tmp_path / "run.png")])
    said = capsys.readouterr().out
    assert "digits (no MNIST files were given)" in said
    untuned, local, glocal = numbers(r"untuned ([\d.]+) % .*, local ([\d.]+) % .*, glocal ([\d.]+) % ", said)
    over = numbers(r"gained by glocal: ([+-][\d.]+) points over untuned, ([+-][\d.]+) over local", said)
    np.testing.assert_allclose(over, [glocal - untuned, glocal - local], atol=0.11)  # one digit is printed
    assert min(local, glocal) > untuned + 10
    assert (tmp_path / "run.png").stat().st_size > 20_000


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_reads_idx_files(mnist, tmp_path, ending):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (2500, 28, 28)), np.arange(2500) % 10
    idx_file(tmp_path / f"t10k-images-idx3-ubyte{ending}", images)
    idx_file(tmp_path / f"t10k-labels-idx1-ubyte{ending}", labels)
    sets, what = mnist["data"](tmp_path, 0)
    assert what == "MNIST: 500, 1000, 1000 images to train, validate and test"
    order = np.random.default_rng(0).permutation(2500)
    X = torch.cat([X for X, _ in sets])[:, 0].double().numpy()
    scaled = images[order] / 255
    np.testing.assert_allclose(X, (scaled - scaled[:500].mean()) / scaled[:500].std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(torch.cat([y for _, y in sets]), labels[order])


def test_mnist_says_which_file_is_missing(mnist, tmp_path):
    with pytest.raises(SystemExit, match=r"must hold one idx file of images, found \[\]"):
        mnist["data"](tmp_path, 0)


def test_mnist_fetches_with_a_checksum_each(mnist, tmp_path, monkeypatch):
    asked = []

    def retrieve(url, known_hash, fname):
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    assert mnist["fetched"]() == tmp_path
    assert [url.rsplit("/", 1)[1] for url, _ in asked] == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert all(re.fullmatch(r"md5:[0-9a-f]{32}", known) for _, known in asked)


def test_mnist_without_pooch_says_how_to_get_it(mnist, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(SystemExit, match="pip install pooch"):
        mnist["fetched"]()


def test_mnist_moves_each_image_by_its_own_pixels_and_continues_edges(mnist):
    X = torch.arange(3 * 25.0).reshape(3, 1, 5, 5)
    moved = mnist["shifted"](X, np.array([[[1], [0], [2]], [[1], [2], [2]]]))  # by (0, 0), (-1, 1) and (1, 1)
    assert torch.equal(moved[0], X[0])
    at = lambda rows, columns: X[:, 0][:, rows][:, :, columns]
    assert torch.equal(moved[1, 0], at([0, 0, 1, 2, 3], [1, 2, 3, 4, 4])[1])
    assert torch.equal(moved[2, 0], at([1, 2, 3, 4, 4], [1, 2, 3, 4, 4])[2])


def test_mnist_random_search_keeps_the_lowest_validation_loss(mnist, monkeypatch):
    losses, drawn = iter([np.nan, 0.5, 0.2, 0.3]), []

    def fake(optimizer, hyper, *_):
        drawn.append(hyper)
        return mnist["Run"](90.0, 0.3, next(losses), ())

    monkeypatch.setitem(mnist["random_search"].__globals__, "untuned", fake)
    best, hyper = mnist["random_search"](4, "sgd", None, None, 0, True)
    assert best.val_loss == 0.2
    assert hyper == drawn[2]


def test_mnist_repeats_settings_with_other_weights_and_orders(mnist, monkeypatch):
    seen = []

    def fake(optimizer, hyper, sets, budget, seed, falling):
        seen.append((hyper, seed, falling))
        return mnist["Run"](90.0 + len(seen), 0.3, 0.2, ())

    monkeypatch.setitem(mnist["repeated"].__globals__, "untuned", fake)
    np.testing.assert_array_equal(mnist["repeated"](3, "sgd", (0.1, 0.5, 0.0), None, None, 2, False), [91.0, 92.0, 93.0])
    assert {(hyper, falling) for hyper, _, falling in seen} == {((0.1, 0.5, 0.0), False)}
    assert len({seed for _, seed, _ in seen} - {2}) == 3


@pytest.mark.parametrize(("optimizer", "start"), [("sgd", (0.25, 0.5, 1e-5)), ("adam", (0.05, 0.9, 1e-5))])
def test_mnist_begins_at_the_effective_rate_that_the_search_found(mnist, monkeypatch, optimizer, start):
    seen = []

    class Stop(Exception):
        pass

    def fake(model, optimizer, hyper, *_, **settings):
        seen.append(hyper)
        raise Stop

    monkeypatch.setitem(mnist["tuned"].__globals__, "search", lambda *_: ((0.05, 0.9, 1e-5), None))
    monkeypatch.setitem(mnist["tuned"].__globals__, "hypergradients", fake)
    sets = [(torch.zeros(40, 1, 28, 28), torch.zeros(40))]
    with pytest.raises(Stop):
        mnist["tuned"](None, optimizer, 1.0, sets, mnist["Budget"](8, 2, 5, 10), 0, "")
    assert seen[0] == pytest.approx(start)


def test_mnist_trains_with_an_lr_that_falls_to_zero(mnist, monkeypatch):
    """The untuned run's steps are those of torch's own linear scheduler."""
    torch.manual_seed(1)
    sets = [(torch.randn(n, 1, 28, 28), torch.arange(n) % 10) for n in (40, 10, 10)]
    budget, seen = mnist["Budget"](8, 2, 5, 10), []
    monkeypatch.setitem(mnist["untuned"].__globals__, "judged", lambda model, *_: seen.append(model))
    mnist["untuned"]("sgd", (0.1, 0.5, 1e-3), sets, budget, 3)
    torch.manual_seed(3)
    model = mnist["lenet"]()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / 10)
    for x, y in mnist["batches"](*sets[0], budget, 3):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        scheduler.step()
    for got, want in zip(seen[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want)


# -- reweighting -------------------------------------------------------------------------------------------------------


def test_reweighting_finds_the_wrong_labels(reweighting, tmp_path, capsys):
    reweighting["main"](["--out", str(tmp_path / "run.png")])
    said = capsys.readouterr().out
    for task in ("long tail", "wrong labels"):
        row = rf"{task} \(.*unweighted ([\d.]+) %, local ([\d.]+) %, glocal ([\d.]+) %"
        plain, local, glocal = numbers(row, said)
        assert min(local, glocal) > plain, said
    (first,) = numbers(r"in (\d+) % of the pairs", said)
    assert first > 70  # 50 by chance
    assert (tmp_path / "run.png").stat().st_size > 20_000


def test_reweighting_holds_out_a_balanced_clean_set(reweighting):
    X = torch.arange(1000.0)[:, None]
    y = torch.arange(1000) % 10
    tail = reweighting["long_tail"](X, y, 50, 10, seed=1)
    noisy, wrong = reweighting["wrong_labels"](X, y, 200, 10, seed=1)
    assert torch.bincount(tail.train[1]).tolist() == [50, 32, 20, 13, 8, 5, 3, 2, 1, 1]
    assert torch.bincount(noisy.train[1]).sum() == 200
    for task in (tail, noisy):
        assert torch.bincount(task.val[1]).tolist() == [5] * 10
        places = torch.cat([part[0].ravel() for part in task[:3]])
        assert sorted(places.tolist()) == list(range(1000))  # no example in two sets
        for X_part, y_part in task[1:3]:
            assert torch.equal(y_part, X_part.ravel().long() % 10)
    truth = noisy.train[0].ravel().long() % 10
    np.testing.assert_array_equal((noisy.train[1] != truth).numpy(), wrong)
    assert 0.25 < wrong.mean() < 0.45  # a tenth of the random labels is right by chance


def test_reweighting_reads_kmnist_or_says_what_is_missing(reweighting, tmp_path):
    with pytest.raises(SystemExit, match=r"lacks kmnist-test-imgs\.npz, kmnist-test-labels\.npz"):
        reweighting["data"](tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "kmnist-test-imgs.npz", images)
    np.savez(tmp_path / "kmnist-test-labels.npz", np.arange(20, dtype=np.uint8) % 10)
    X, y, what = reweighting["data"](tmp_path)
    assert (what, X.shape, y.tolist()) == ("KMNIST", (20, 49), list(range(10)) * 2)
    pooled = images[3, 4:8, 8:12].mean()  # second row, third column of the 7 x 7
    means = images.reshape(20, 7, 4, 7, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(X[3, 9], (pooled - means.mean()) / means.std(), rtol=1e-5)


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_learns_faster_than_untuned(text, tmp_path, capsys):
    text["main"](["--out", str(tmp_path / "run.png")])
    said = capsys.readouterr().out
    bits = [numbers(rf"{name} +test loss ([\d.]+) bits", said)[0] for name in ("untuned", "local", "glocal")]
    over = numbers(r"gained by glocal: ([+-][\d.]+) bits over the untuned run, ([+-][\d.]+) over local", said)
    np.testing.assert_allclose(over, [bits[0] - bits[2], bits[1] - bits[2]], atol=0.0011)  # three digits are printed
    assert max(bits[1:]) < bits[0] - 0.1
    assert (tmp_path / "run.png").stat().st_size > 50_000


def test_text_keeps_topics_apart(text):
    texts, characters = text["data"]()
    assert sum(map(len, texts)) > 100_000
    assert max(int(part.max()) for part in texts) == characters - 1
    pieces = text["sequences"](texts[0], 7, seed=3)
    assert torch.equal(pieces, text["sequences"](texts[0], 7, seed=3))
    whole = texts[0].tolist()
    first = pieces[0].tolist()
    assert any(whole[i : i + len(first)] == first for i in range(len(whole)))
