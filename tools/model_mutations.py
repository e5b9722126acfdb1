"""Can the proof catch a wrong model? Each rule of the profile inverted, one at a time, against random programs.

    python tools/model_mutations.py [--on SOCKET] [--seed 5000] [RULE ...]

Prints for each rule after how many operations the first program disagreed; a rule that does not show on this kernel
(neither value disagrees with it on the rule's own program) is listed as such. Exit 1 if one was not caught within
20,000 operations, or if the right profile disagrees with the kernel. tests/proof/test_campaign.py does the same as a
test. --on: the kernel of a virtual machine (docs/scenarios.md).
"""

from __future__ import annotations

import argparse
import sys

from pagelens.cli.model import machine_of
from pagelens.model.profile import Profile
from pagelens.proof.campaign import Bench, fuzz
from pagelens.proof.machine import Machine
from pagelens.proof.mix import GENERATOR, Mix
from pagelens.proof.probes import PROBES, compare_many, left_out, probe_profile, probe_program

WITHIN = 20_000


def outcome(rule: str, profile: Profile, machine: Machine, mix: Mix, seed: int) -> tuple[bool, str]:
    """(whether all is well, what to print)."""
    if "disk" in mix.without and "= disk" in PROBES[rule]:
        return True, "needs files on disk, and there are none"
    inverted = profile.with_rules(**{rule: not getattr(profile, rule)})
    right, wrong = compare_many(probe_program(rule), [profile, inverted], machine)
    if right:
        return False, f"the right profile disagrees: {right[0]}"
    if not wrong:
        return True, "does not show on this kernel"
    if rule == "pku" and "exec_only" in mix.without:
        return True, "its own program catches it; left out of random ones"
    result = fuzz(Bench(inverted, machine), seed, WITHIN, mix, small=False)
    done = result.agreement.operations
    return (True, f"{done:,}") if result.failed_seeds else (False, f"not caught in {done:,}")


def main() -> int:
    """All rules, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rules", nargs="*", metavar="RULE", help="only these")
    parser.add_argument("--on", metavar="SOCKET")
    parser.add_argument("--seed", type=int, default=5000)
    args = parser.parse_args()
    good = True
    with machine_of(args.on) as machine:
        probed = probe_profile(machine=machine)
        mix = Mix(without=left_out(machine))
        print(
            f"{machine.facts()['release']}: {probed.text}, generator {GENERATOR}, seed {args.seed}",
            flush=True,
        )
        for rule in args.rules or sorted(PROBES):
            well, text = outcome(rule, probed.profile, machine, mix, args.seed)
            good = good and well
            print(f"{rule:28} {text}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
