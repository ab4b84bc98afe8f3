"""`koopman-hpo demo | report | doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import KoopmanHPOError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 for what the user can put right (named in one line)."""
    args = _parser().parse_args(argv)
    missing = [name for name in args.needs if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"koopman-hpo {args.command}: {', '.join(missing)} not installed. "
            f'Install what it needs with: pip install "koopman-hpo[demo]"',
            file=sys.stderr,
        )
        return 2
    try:
        return args.run(args)
    except (KoopmanHPOError, OSError) as error:
        print(f"koopman-hpo {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nkoopman-hpo {args.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="koopman-hpo", description="Hyperparameters tuned by gradients, while training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo_options(commands.add_parser("demo", help="tune a digits classifier from a bad learning rate; a table, a figure"))
    _report_options(commands.add_parser("report", help="table and figure of a saved history (.npz)"))
    doctor = commands.add_parser("doctor", help="what is installed and usable")
    doctor.set_defaults(run=_doctor, needs=())
    return parser


def _demo_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", type=_path, default=Path("koopman_hpo_demo"), help="folder for figure and history (%(default)s)"
    )
    p.add_argument("--seed", type=_count, default=0, help="of the split, the weights, the batches and the random runs")
    p.add_argument("--steps", type=_positive, default=None, help="inner steps a run (2000; 200 with --quick)")
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate to start from (%(default)s)")
    p.add_argument("--random", type=_count, default=None, help="random full runs to compare with (20; 3 with --quick)")
    p.add_argument("--quick", action="store_true", help="a few seconds, for a test")
    p.set_defaults(run=_demo, needs=("tqdm", "matplotlib", "rich", "sklearn"))


def _report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("history", type=_path, help="file that History.save wrote")
    p.add_argument("--out", type=_path, default=None, help="figure to write (the history's name with .png)")
    p.set_defaults(run=_report, needs=("matplotlib", "rich"))


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        n = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if not least <= n < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return n


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one" if not text else "must be a path")
    return Path(text)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    steps = args.steps or (200 if args.quick else 2000)
    count = args.random if args.random is not None else (3 if args.quick else 20)
    return demo.main(demo.Setting(args.seed, steps, args.lr, count), args.out)


def _report(args: argparse.Namespace) -> int:
    from . import report

    return report.main(args.history, args.out)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
