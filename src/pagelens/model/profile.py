"""Profile: what differs between kernels, as data.

Every difference is one named rule; the code asks for the rule, never for a version, so that a test can
invert a single rule and see whether the proof notices. The comment beside each rule names the kernel
function that it mirrors and the version in which it changed. Rejected: `if version >= (6, 12)` in the code
(cannot be inverted one by one, and distributions backport).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pagelens.vm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Profile:
    """The rules of one kernel. Fields that are bool are rules; `with_rules` makes a variant."""

    name: str
    # -- merging and splitting
    # is_mergeable_vma: 6.1 refuses any merge with a vma that has vm_ops->close; from 6.12 only one that
    # would delete it (can_merge_remove_vma). shm (SysV) has close; memfd and shared anonymous have not.
    merge_close_forbids_any: bool = False
    # is_mergeable_anon_vma: to 6.12 an unfaulted target needs list_is_singular(anon_vma_chain), which an
    # empty chain is not; from 6.16 vma_is_fork_child decides.
    merge_unfaulted_target: bool = True
    # __mmap_region in 6.1 asks the next area first, and merges with that one alone where both would do but
    # their anon_vmas differ; vma_merge_new_range (6.12) then merges with the previous alone.
    mmap_merges_right_first: bool = False
    # vma_merge_existing_range, vma_merge_new_range: VM_SOFTDIRTY of any part survives a merge made by
    # mprotect and others (VMA_STICKY_FLAGS, 7.0); before, the flag of the changed part wins.
    sticky_softdirty: bool = False
    # mprotect_fixup: VM_ACCOUNT goes when an anonymous vma without anon_vma becomes read-only (6.7).
    mprotect_unaccounts: bool = True
    # can_change_pte_writable: in 6.1 mprotect makes only dirty entries writable at once, so that a page that MADV_FREE
    # cleaned faults; later those of private memory need not be dirty (can_change_private_writable, 6.2).
    mprotect_wants_dirty: bool = False
    # calc_vm_flag_bits: MAP_STACK sets VM_NOHUGEPAGE (6.7, "mm: mmap: map MAP_STACK to VM_NOHUGEPAGE").
    stack_nohugepage: bool = True
    # __mmap_region gathers what it replaces, and so splits it, before it tests limits; on failure all is put back
    # (vms_gather_munmap_vmas, 6.12). In 6.1 limits come first, and a charge that fails leaves a hole.
    mmap_gathers_first: bool = True
    # -- placement
    # __get_unmapped_area: anonymous, no hint, length a multiple of 2 MiB: aligned to 2 MiB (6.7, and 6.13
    # for the multiple, backported to 6.12).
    thp_align_anon: bool = True
    # __get_unmapped_area: the same rule asks !file (6.18); in 6.12 a file without get_unmapped_area is aligned as well.
    thp_align_file_test: bool = True
    # do_mmap: MAP_DROPPABLE (6.11).
    droppable: bool = True
    # do_mmap, LEGACY_MAP_MASK: MAP_SHARED_VALIDATE of a file lets MAP_ABOVE4G pass (6.6).
    above4g_is_known: bool = True
    # -- advice
    # madvise_behavior_valid, MADV_GUARD_INSTALL/REMOVE (6.13).
    guard_pages: bool = True
    # pte_to_pagemap_entry: PM_GUARD_REGION, bit 58 (6.15).
    pagemap_guard_bit: bool = True
    # is_valid_guard_vma: file mappings allowed (6.15).
    guard_file: bool = True
    # madvise_guard_install: VM_MAYBE_GUARD marks the vma, is ignored in merges and has page tables copied at
    # fork; before, an anon_vma did that (6.19, in 6.18 by stable).
    guard_vma_flag: bool = True
    # zap_pte_range, try_get_and_clear_pmd: PT_RECLAIM frees empty PTE tables on DONTNEED (6.14).
    pt_reclaim: bool = True
    # madvise_populate goes area by area from the first in 6.1 and skips holes; later the first hole ends it
    # (faultin_page_range, 6.10).
    populate_stops_at_hole: bool = True
    # -- mremap
    # do_mremap checks everything before it unmaps the target (6.17); mremap_to unmapped first.
    mremap_checks_first: bool = True
    # remap_move: MREMAP_FIXED without resize moves several areas at once (6.17).
    mremap_multi_vma: bool = True
    # try_realign_addr: a move whose ends are alike in their table starts at the table's edge, so that the table
    # moves whole, without soft-dirty marks (6.7).
    mremap_realigns: bool = True
    # __check_map_count_against_split (7.1); before, map_count >= max - 3 refused a move (move_vma).
    mremap_counts_exactly: bool = False
    # copy_vma, keep_source: MREMAP_DONTUNMAP of an unfaulted vma must not merge the copy with its source
    # (7.0, and in 6.1 and 6.12 stable; not in 6.18.44).
    dontunmap_self_merge: bool = True
    # dontunmap_complete gives the emptied source the page offset of an unfaulted vma (7.0, and in 6.1 and
    # 6.12 stable; not in 6.18.44), so that it merges like one.
    dontunmap_resets_pgoff: bool = False
    # prep_move_vma, needs_pre_split: MREMAP_DONTUNMAP of part of a locked vma splits it first (7.0, and in
    # 6.1 and 6.12 stable); in 6.18.44 dontunmap_complete unlocks the whole of it.
    dontunmap_pre_split: bool = False
    # move_vma: vrm_stat_account before dontunmap_complete clears VM_LOCKED counts locked_vm twice (6.17);
    # before 6.17 and from 7.0 not.
    dontunmap_locks_twice: bool = True
    # -- faults
    # filemap_map_pages: where no PTE table is there yet, nothing is mapped around if the first page found in the
    # window is the file's last (can_map_large passes the filemap_map_pmd by that would install the table); not shmem
    # (6.18, and in 6.12 stable).
    last_page_needs_table: bool = True
    # -- reporting
    # show_map_vma names [heap] what overlaps it (6.6); before, also what touches it.
    heap_name_overlaps: bool = True
    # show_smap_vma_flags names VM_LOCKONFAULT "lf" (after 6.1, which prints "??").
    smaps_lockonfault: bool = True
    # show_smap prints `KSM:` (6.7).
    smaps_ksm: bool = True
    # sync_mm_rss, SPLIT_RSS_COUNTING: a task keeps up to 64 page events to itself before status sees them
    # (to 6.1; percpu counters summed exactly later). Then the Rss lines cannot be compared, smaps can.
    status_rss_lags: bool = False
    # -- configuration
    # CONFIG_MEM_SOFT_DIRTY: not a version but a choice; probe and set it. Off: VM_SOFTDIRTY is 0.
    soft_dirty: bool = True
    # CPU with protection keys: PROT_EXEC alone becomes execute-only memory (execute_only_pkey,
    # arch_override_mprotect_pkey); reads then end with SEGV_PKUERR, and the kernel itself is refused too.
    pku: bool = False
    # CONFIG_KSM: MADV_MERGEABLE gives EINVAL without it (madvise_behavior_valid).
    ksm: bool = True
    # CONFIG_TRANSPARENT_HUGEPAGE: the same for MADV_HUGEPAGE, and nothing is aligned to 2 MiB.
    thp: bool = True

    def with_rules(self, **changes: bool) -> Profile:
        """A variant with some rules changed, named so. UsageError for a rule that does not exist."""
        for rule in changes:
            if rule not in self.rules():
                raise UsageError(f"profile has no rule {rule!r}; rules: {', '.join(self.rules())}")
        suffix = ",".join(f"{rule}={int(value)}" for rule, value in sorted(changes.items()))
        return replace(self, name=f"{self.name}+{suffix}", **changes)

    @classmethod
    def rules(cls) -> tuple[str, ...]:
        """The names of all rules."""
        return tuple(f.name for f in fields(cls) if f.name != "name")


_6_18 = Profile("linux-6.18")
PROFILES: dict[str, Profile] = {
    "linux-6.1": replace(
        _6_18,
        name="linux-6.1",
        last_page_needs_table=False,
        heap_name_overlaps=False,
        merge_close_forbids_any=True,
        droppable=False,
        populate_stops_at_hole=False,
        mremap_checks_first=False,
        mmap_merges_right_first=True,
        mmap_gathers_first=False,
        above4g_is_known=False,
        mprotect_wants_dirty=True,
        merge_unfaulted_target=False,
        mprotect_unaccounts=False,
        stack_nohugepage=False,
        thp_align_anon=False,
        guard_pages=False,
        guard_vma_flag=False,
        pagemap_guard_bit=False,
        guard_file=False,
        pt_reclaim=False,
        mremap_multi_vma=False,
        mremap_realigns=False,
        dontunmap_self_merge=False,
        dontunmap_locks_twice=False,
        dontunmap_pre_split=True,
        dontunmap_resets_pgoff=True,
        smaps_ksm=False,
        smaps_lockonfault=False,
        status_rss_lags=True,
    ),
    "linux-6.12": replace(
        _6_18,
        name="linux-6.12",
        mremap_checks_first=False,
        merge_unfaulted_target=False,
        thp_align_file_test=False,
        guard_pages=False,
        guard_vma_flag=False,
        pagemap_guard_bit=False,
        guard_file=False,
        pt_reclaim=False,
        mremap_multi_vma=False,
        dontunmap_self_merge=False,
        dontunmap_locks_twice=False,
        dontunmap_pre_split=True,
        dontunmap_resets_pgoff=True,
    ),
    "linux-6.18": _6_18,
    "linux-7.2": replace(
        _6_18,
        name="linux-7.2",
        sticky_softdirty=True,
        mremap_counts_exactly=True,
        dontunmap_self_merge=False,
        dontunmap_locks_twice=False,
        dontunmap_pre_split=True,
        dontunmap_resets_pgoff=True,
    ),
}


def get_profile(profile: str | Profile) -> Profile:
    """A profile by name. UsageError names those that exist."""
    if not isinstance(profile, str):
        return profile
    try:
        return PROFILES[profile]
    except KeyError:
        raise UsageError(f"no kernel profile {profile!r}; profiles: {', '.join(PROFILES)}") from None
