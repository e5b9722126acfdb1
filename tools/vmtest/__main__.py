"""`./dev test-kernels`, `./dev in-kernel` and `./dev fetch`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vmtest import fetch, matrix, newer, qemu
from vmtest.errors import VmtestError
from vmtest.rootfs import root_image

ROOT = Path(__file__).resolve().parents[2]


def _in_kernel(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise VmtestError("no command: ./dev in-kernel 6.1 -- CMD…")
    machine = qemu.Machine(
        fetch.kernel(args.kernel),
        command,
        ROOT,
        memory=args.memory,
        limit=args.timeout,
        silence=args.silence,
        append=args.append,
        five_levels=args.five_levels,
        port=args.port,
    )

    def to(stream: int) -> Callable[[bytes], object]:
        def write(data: bytes) -> None:
            target = (sys.stdout if stream == 1 else sys.stderr).buffer
            target.write(data)
            target.flush()

        return write

    verdict = qemu.run(machine, to(1), to(2), args.results)
    if not verdict.good:
        print(f"vmtest: {machine.kernel.release}: {verdict.report()}", file=sys.stderr)
        return 1 if verdict.code in (None, 0) else verdict.code
    if args.verbose:
        print(
            f"vmtest: {machine.kernel.release}: ready after {verdict.boot_s:.1f} s, {verdict.report()}",
            file=sys.stderr,
        )
    return verdict.code if verdict.code is not None else 1


def _test_kernels(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.record and args.tests and "tests/kernels" not in args.tests:
        raise VmtestError(
            "--record needs all of tests/kernels: without --tests, or with --tests tests/kernels"
        )
    for name in args.kernels or fetch.DEFAULT:
        fetch.kernel(name, update=args.update)
    plan = matrix.Plan(
        ROOT,
        list(args.kernels or fetch.DEFAULT),
        args.tests or list(matrix.TESTS),
        marks=args.marks,
        jobs=args.jobs,
        budget=args.budget,
        memory=args.memory,
        results=args.results,
        measure=args.measure,
        all_tests=args.all,
        environment=dict(item.split("=", 1) for item in args.set),
    )
    outcomes = matrix.run(plan)
    if args.record:
        matrix.record(outcomes, plan)
    return matrix.summary(outcomes, began)


def _fetch(args: argparse.Namespace) -> int:
    for name in args.kernels or fetch.DEFAULT:
        found = fetch.kernel(name, update=args.update)
        print(f"{name}\t{found.release}\t{found.image}")
    version, tree = newer.tree("qemu-system-x86")
    print(f"qemu\t{version}\t{tree}")
    print(f"root\t{root_image()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmtest", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("in-kernel", help="run one command in a guest")
    one.add_argument("--memory", type=int, default=3072, help="MiB (default 3072)")
    one.add_argument("--timeout", type=float, default=1200, help="seconds (default 1200)")
    one.add_argument(
        "--silence", type=float, default=60, help="seconds without a sign of life that count as a hang"
    )
    one.add_argument("--five-levels", action="store_true", help="of page tables, as newer processors have")
    one.add_argument("--append", default="", help="more for the kernel's command line")
    one.add_argument("--results", type=Path, help="where to put what the command left in $VMTEST_RESULTS")
    one.add_argument(
        "--port",
        type=Path,
        metavar="SOCKET",
        help="a Unix socket to make here; /run/vmtest/extra in the guest",
    )
    one.add_argument("-v", "--verbose", action="store_true", help="say how long it took")
    one.add_argument("kernel", help="6.1, 6.12, 7.2, or the path of a bzImage")
    one.add_argument("command", nargs=argparse.REMAINDER)
    one.set_defaults(run=_in_kernel)
    all_of = commands.add_parser(
        "test-kernels", help="run tests/kernels and tests/live in a guest of each kernel"
    )
    all_of.add_argument("--tests", action="append", help="another test path than these two (may be repeated)")
    all_of.add_argument(
        "-m", "--marks", default="not slow", help="pytest's mark expression (default: not slow)"
    )
    all_of.add_argument("--jobs", type=int, default=3, help="guests at a time (default 3)")
    all_of.add_argument(
        "--budget", type=float, default=1200, help="seconds of tests in a guest (default 1200)"
    )
    all_of.add_argument("--memory", type=int, default=3072, help="MiB for each guest (default 3072)")
    all_of.add_argument("--results", type=Path, help="where results go (default build/vmtest)")
    all_of.add_argument("--measure", action="store_true", help="write measured values down, compare none")
    all_of.add_argument(
        "--all", action="store_true", help="also the tests that tests/kernels/left_out.toml leaves out"
    )
    all_of.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="into the guest's environment"
    )
    all_of.add_argument(
        "--record", action="store_true", help="write docs/kernels/*.json and docs/kernels.md anew"
    )
    all_of.add_argument("--update", action="store_true", help="look for newer kernels first")
    all_of.add_argument(
        "kernels", nargs="*", help="6.1, 6.12, 7.2, or the path of a bzImage (default: these three)"
    )
    all_of.set_defaults(run=_test_kernels)
    get = commands.add_parser("fetch", help="fill the cache")
    get.add_argument("--update", action="store_true", help="look for newer kernels")
    get.add_argument("kernels", nargs="*")
    get.set_defaults(run=_fetch)
    return parser


def main() -> int:
    """Runs a subcommand; one sentence on failure."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = args.run(args)
    except VmtestError as error:
        print(f"vmtest: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
