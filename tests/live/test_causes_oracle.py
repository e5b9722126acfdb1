"""The causes against a program that knows the true cause of each of its accesses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pagelens.why import classify, classify_facts
from pagelens.why.causes import RULES, Finding, Rule, first_write, fork_cow
from pagelens.why.load import load
from support.causes import join
from support.recording import record
from support.subjects import Subjects

pytestmark = pytest.mark.requires("bpf", "btf", "libbpf", "perf-system", "native")

CAUSES = {
    "after-dontneed",
    "after-pageout",
    "file-cow",
    "file-page-cached",
    "first-read",
    "first-write",
    "fork-cow-child",
    "fork-cow-parent",
    "huge-page",
    "invalid-end-of-file",
    "invalid-permission",
    "invalid-unmapped",
    "kernel-access",
    "none",
    "shared-page",
    "sharers-gone",
    "stack-growth",
    "userfaultfd",
    "write-notify",
    "zero-page-write",
}


def test_five_thousand_accesses_without_contradiction(tmp_path: Path, subjects: Subjects) -> None:
    log, data = tmp_path / "log", tmp_path / "data"
    data.write_bytes(b"x" * (1024 * 4096))
    run = record(tmp_path, [subjects("causes_oracle"), log, data, "7", "5000", "3", "2"])
    assert run.returncode == 0
    facts = load(run.capture)
    result = classify_facts(facts)
    joined = join(result, log)
    assert joined.accesses > 4700
    assert set(joined.right) == CAUSES
    assert not joined.wrong, joined.wrong
    assert joined.ambiguous < 0.01 * joined.accesses
    assert result.shares()[0] == 0, "unknown"
    # Two threads write one fresh page: one gets it, and the other, if it faulted at all, was late.
    for verdicts in joined.races:
        assert sorted(set(verdicts) - {"spurious"}) in ([], ["first-write"]), verdicts
    assert sum(verdicts.count("first-write") for verdicts in joined.races) > 0
    assert agreement_is_high(result)

    # The oracle must be able to say no: each rule broken on purpose contradicts it.
    for broken in _broken():
        bad = join(classify_facts(facts, broken), log)
        assert bad.wrong or bad.ambiguous > 0.01 * bad.accesses


def agreement_is_high(result) -> bool:  # type: ignore[no-untyped-def]
    from pagelens.why.agreement import agreement

    figures = agreement(result)
    assert figures["vmas"] is not None and figures["vmas"] > 0.99, figures
    assert figures["pages"] is not None and figures["pages"] > 0.95, figures
    return True


def _broken() -> list[tuple[Rule, ...]]:
    def without(rule: Rule) -> tuple[Rule, ...]:
        return tuple(r for r in RULES if r is not rule)

    def swapped(rule: Rule) -> Rule:
        # Takes reads for writes.
        return replace(rule, holds=lambda e: rule.holds(replace(e, write=not e.write)))

    always = replace(fork_cow.RULE, holds=lambda e: Finding("broken") if e.present else None)
    return [
        without(first_write.RULE),
        (*without(first_write.RULE), swapped(first_write.RULE)),
        (*without(fork_cow.RULE), always),
        without(fork_cow.RULE_CHILD),
    ]


def test_the_derived_table_has_every_fault(tmp_path: Path, subjects: Subjects) -> None:
    import pyarrow.parquet as pq

    from pagelens.why import derive

    log, data = tmp_path / "log", tmp_path / "data"
    data.write_bytes(b"x" * (1024 * 4096))
    run = record(tmp_path, [subjects("causes_oracle"), log, data, "8", "300", "1", "2"])
    fields = derive(run.capture)
    assert derive(run.capture) == fields
    table = pq.read_table(run.path / "derived" / "causes")
    summary = run.capture.meta["summary"]["faults"]
    weights = sum(table.column("faults").to_pylist())
    assert weights == summary["recorded"] + summary["failed"] + summary["gup"]
    assert table.column("seq").to_pylist() == sorted(set(table.column("seq").to_pylist()))
    assert sum(row["faults"] for row in classify(run.capture).counts()) == weights


def test_agreement_falls_when_the_replay_misses_calls(tmp_path: Path, subjects: Subjects) -> None:
    # A figure that cannot fall says nothing: without the calls the replay must disagree with the kernel.
    from pagelens.why.agreement import agreement

    run = record(
        tmp_path, [sys.executable, "-c", "import json, decimal, re, mmap; x = mmap.mmap(-1, 1 << 20)"]
    )
    facts = load(run.capture)
    whole = agreement(classify_facts(facts))
    kept = tuple(c for c in facts.calls if c.name not in ("mprotect", "munmap", "brk"))
    less = agreement(classify_facts(replace(facts, calls=kept)))
    for name in ("vmas", "pages"):
        assert whole[name] is not None and less[name] is not None
        assert whole[name] > 0.99, whole
        assert less[name] < whole[name], (less, whole)
    assert less["vmas"] < 0.9


def test_rarer_layouts_without_contradiction(tmp_path: Path, subjects: Subjects) -> None:
    log, data = tmp_path / "log", tmp_path / "data"
    data.write_bytes(b"x" * (1024 * 4096))
    run = record(tmp_path, [subjects("causes_layouts"), log, data, "11", "2500", "2"])
    assert run.returncode == 0, run.stderr
    result = classify_facts(load(run.capture))
    joined = join(result, log)
    assert joined.accesses >= 2500
    assert not joined.wrong, joined.wrong
    assert joined.ambiguous < 0.01 * joined.accesses
    assert result.shares()[0] == 0, "unknown"


# Other threads write while one forks: a write may fall between dup_mmap and the event that tells the fork.
FORKS = r"""
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile int stop;
static void *work(void *a) {
  volatile char *p = a; while (!stop) for (int i = 0; i < 64; i++) p[i * 4096]++; return 0; }
int main(void) {
  pthread_t t[3];
  for (int i = 0; i < 3; i++)
    pthread_create(&t[i], 0, work, mmap(0, 64 * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (int i = 0; i < 150; i++) {
    pid_t p = fork(); if (!p) { usleep(300); _exit(0); } usleep(1000); waitpid(p, 0, 0); }
  stop = 1; for (int i = 0; i < 3; i++) pthread_join(t[i], 0);
  return 0; }
"""


def test_writes_of_threads_while_another_forks(tmp_path: Path) -> None:
    source = tmp_path / "forks.c"
    source.write_text(FORKS)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", tmp_path / "forks", source], check=True)
    run = record(tmp_path, [tmp_path / "forks"])
    result = classify_facts(load(run.capture))
    causes = {str(row["cause"]): int(str(row["faults"])) for row in result.counts()}
    assert causes["fork-cow-parent"] > 1000
    assert "unknown" not in causes, causes
    # Two threads may meet on a page of a library, or one may read in the moment in which the other's copy-on-write has
    # taken the entry away (wp_page_copy); a stale TLB entry would be our misreading.
    verdicts = [result.of(row) for row in range(len(result.run.faults))]
    assert not [v for v in verdicts if v.cause == "spurious" and "stale TLB" in v.why]
