"""What each guest can do and how it is set: what all other tests rely on, checked before they mislead."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import pytest

from pagelens.linux import probe
from support import raw
from support.facts import Fact
from support.puppet import Puppet
from support.subjects import Subjects
from support.system import THP

# Capability as `doctor` names it -> the option that makes it. What the probe found by trying must agree.
CONFIG = {
    "soft-dirty": "MEM_SOFT_DIRTY",
    "kcore": "PROC_KCORE",
    "thp": "TRANSPARENT_HUGEPAGE",
    "btf": "DEBUG_INFO_BTF",
    "numa-balancing": "NUMA_BALANCING",
    "idle-pages": "IDLE_PAGE_TRACKING",
    "anon-names": "ANON_VMA_NAME",
    "damon": "DAMON_VADDR",
    "hugetlb": "HUGETLBFS",
    "userfaultfd": "USERFAULTFD",
    "bpf": "BPF_SYSCALL",
}


def _config() -> set[str]:
    given, own = Path(os.environ["VMTEST_CONFIG"]), Path("/proc/config.gz")
    if not given.exists() and not own.exists():
        pytest.skip(
            "missing capability: the kernel's configuration (config beside its image, or IKCONFIG_PROC)"
        )
    text = given.read_text() if given.exists() else gzip.decompress(own.read_bytes()).decode()
    return {
        line.partition("=")[0].removeprefix("CONFIG_") for line in text.splitlines() if line.endswith("=y")
    }


@pytest.mark.parametrize("name", probe.names())
def test_capability(name: str, guest: None, fact: Fact) -> None:
    """Each capability that `doctor` tries, on this kernel."""
    fact(f"doctor.{name}", probe.status(name).works)


@pytest.mark.parametrize("name", CONFIG)
def test_probe_agrees_with_config(name: str, guest: None) -> None:
    """Two ways to the same answer: by trying, and by the configuration that Debian built the kernel with."""
    assert probe.status(name).works == (CONFIG[name] in _config()), probe.status(name).detail


def test_two_cpus_on_two_nodes(guest: None) -> None:
    assert os.cpu_count() == 2
    assert Path("/sys/devices/system/node/online").read_text().strip() == "0-1"
    assert Path("/sys/devices/system/node/node0/cpulist").read_text().strip() == "0"
    assert Path("/sys/devices/system/node/node1/cpulist").read_text().strip() == "1"


def test_defaults(guest: None, fact: Fact) -> None:
    """The settings that decide what a test sees, as this kernel comes up."""
    fact("settings.thp", raw.setting(f"{THP}/enabled"))
    fact("settings.shmem_thp", raw.setting(f"{THP}/shmem_enabled"))
    fact("settings.numa_balancing", raw.setting("/proc/sys/kernel/numa_balancing"))
    fact("settings.ksm_run", raw.setting("/sys/kernel/mm/ksm/run"))
    fact("settings.overcommit_memory", raw.setting("/proc/sys/vm/overcommit_memory"))
    fact("settings.max_map_count", raw.setting("/proc/sys/vm/max_map_count"))
    fact("settings.khugepaged_pages_to_scan", raw.setting(f"{THP}/khugepaged/pages_to_scan"))
    fact("settings.khugepaged_scan_sleep_ms", raw.setting(f"{THP}/khugepaged/scan_sleep_millisecs"))
    assert Path("/proc/swaps").read_text().count("\n") == 1  # none before a test asks for it


def test_swap_out_and_in(puppet: Puppet, swap: Path, fact: Fact) -> None:
    """MADV_PAGEOUT of 64 written pages: in swap, then back with a fault each at most, the content kept."""
    base = puppet.island(64)
    puppet.write(base, 64, 9)
    puppet.page_out(base, 64)
    fact("swap.pages_of_64_after_pageout", raw.bits(puppet.pid, base, 64, raw.SWAPPED))
    before = sum(raw.faults(puppet.pid))
    assert puppet.read(base, 64) == 64 * 9
    assert raw.bits(puppet.pid, base, 64, raw.PRESENT) == 64
    assert 1 <= sum(raw.faults(puppet.pid)) - before <= 64


def test_ksm_merges_equal_pages(puppet: Puppet, ksm: None, fact: Fact) -> None:
    """Thirty-two equal pages come to share one frame; a write takes one out again."""
    base = puppet.island(32)
    puppet.write(base, 32, 5)
    never = raw.frame("flags", raw.pagemap(puppet.pid, base, 1)[0] & raw.PFN) >> 21 & 1
    fact("ksm.flag_of_a_page_that_was_never_merged", bool(never))
    puppet.sys("madvise", base, 32 * raw.PAGE, 12)  # MADV_MERGEABLE
    frames: set[int] = set()
    for _ in range(300):
        frames = {e & raw.PFN for e in raw.pagemap(puppet.pid, base, 32)}
        if len(frames) == 1:
            break
        time.sleep(0.1)
    assert len(frames) == 1
    assert raw.frame("flags", frames.pop()) >> 21 & 1  # KPF_KSM
    puppet.write(base)
    assert len({e & raw.PFN for e in raw.pagemap(puppet.pid, base, 32)}) == 2
    fact("smaps.has_ksm_field", "KSM" in raw.smaps(puppet.pid, base))


def test_numa_hint_faults(subjects: Subjects, numa_balancing: None, fact: Fact) -> None:
    """Locked memory, written again and again by one of two threads: the scanner takes the mapping away."""
    with Puppet(subjects("puppet")) as puppet:
        puppet.sys("prctl", 41, 1, 0, 0, 0)
        base = puppet.island(64)
        puppet.write(base, 64)
        puppet.sys("mlock", base, 64 * raw.PAGE)
        puppet.tell("thread")
        before = raw.faults(puppet.pid)[0]
        deadline = time.monotonic() + 60
        taken = 0
        # CPU time of the task is what moves the scanner (task_tick_numa): many rounds a command.
        while not taken and time.monotonic() < deadline:
            puppet.tell("write", base, 64 * raw.PAGE, 1, 1)
            taken = raw.faults(puppet.pid)[0] - before
        fact("numa.locked_page_faults_with_two_threads", taken > 0)
