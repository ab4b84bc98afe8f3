"""The evidence: measures, draws and writes everything in docs/evidence.md, one section or all.

    python benchmarks/evidence.py [SECTION ...] [--full] [--data DIR] [--jobs 2]     measure, then write the page
    python benchmarks/evidence.py --page                                             write the page from what is stored

A section is a module of `study`; its results go to benchmarks/results/study_SECTION.json.  The small tier takes minutes on
two cores, --full hours.  MNIST (idx files) and KMNIST (npz) are read from --data; without it their problems are left out,
and the page says so.  Section true_size needs a card, and is measured only by name.  Trajectories are kept in --cache, so
that a method can be judged again without training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import tempfile
import time

from koopman import cpu, on_one_thread, versions
from study import ON_A_CARD, SECTIONS, Settings, page

HERE = pathlib.Path(__file__).parent


def stored(name: str) -> pathlib.Path:
    return HERE / "results" / f"study_{name}.json"


def measure(name: str, settings: Settings) -> int:
    """Measure one section and store it; the seconds that it took."""
    clock = time.perf_counter()
    results = SECTIONS[name].measure(settings)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "versions": versions(),
        "tier": "full" if settings.full else "small",
        "data": settings.data is not None,
        "seconds": round(time.perf_counter() - clock),
        "results": results,
    }
    stored(name).write_text(json.dumps(record) + "\n")
    return record["seconds"]


def main() -> None:
    on_one_thread()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all that need no card")
    parser.add_argument("--full", action="store_true", help="more seeds, learning rates and windows")
    parser.add_argument("--data", type=pathlib.Path, help="folder with MNIST (idx) and KMNIST (npz)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "koopman-hpo-study")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if not arguments.page:
        settings = Settings(arguments.full, arguments.data, arguments.cache, arguments.jobs)
        for name in arguments.sections or [name for name in SECTIONS if name not in ON_A_CARD]:
            print(f"{name}: {measure(name, settings)} s", flush=True)
    page.write({name: json.loads(stored(name).read_text()) for name in SECTIONS if stored(name).exists()})


if __name__ == "__main__":
    main()
