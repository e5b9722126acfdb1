"""The causes: one rule per small file, each a pure function of one `Evidence`.

`RULES` is a set in spirit: the order is that of the documentation only (see `_rule`).
"""

from __future__ import annotations

from pagelens.why.causes import (
    after_advice,
    file_cow,
    file_page,
    first_read,
    first_write,
    fork_cow,
    huge_page,
    invalid,
    kernel_access,
    mprotect_upgrade,
    numa_hint,
    prefault,
    shared_page,
    sharers_gone,
    special_page,
    spurious,
    stack_growth,
    swap_in,
    userfault,
    write_notify,
    write_protected,
    zero_page_write,
)
from pagelens.why.causes._rule import Finding, Rule

# Rules of the page: what it needed. Who asked (kernel_access) and calls (prefault) stand beside them.
RULES: tuple[Rule, ...] = (
    first_write.RULE,
    first_read.RULE,
    zero_page_write.RULE,
    file_page.RULE,
    file_page.RULE_DISK,
    shared_page.RULE,
    file_cow.RULE,
    fork_cow.RULE,
    fork_cow.RULE_CHILD,
    sharers_gone.RULE,
    write_notify.RULE,
    mprotect_upgrade.RULE,
    write_protected.RULE,
    write_protected.RULE_KSM,
    stack_growth.RULE,
    after_advice.RULE,
    after_advice.RULE_CUT,
    after_advice.RULE_FREE,
    after_advice.RULE_PAGEOUT,
    after_advice.RULE_COLD,
    swap_in.RULE,
    userfault.RULE,
    huge_page.RULE,
    huge_page.RULE_HUGETLB,
    numa_hint.RULE,
    numa_hint.RULE_UNMAPPED,
    special_page.RULE,
    invalid.RULE,
    invalid.RULE_PERMISSION,
    invalid.RULE_EOF,
    invalid.RULE_GAVE_UP,
    spurious.RULE,
)
ACCESS: Rule = kernel_access.RULE
PREFAULT: Rule = prefault.RULE
ALL: tuple[Rule, ...] = (*RULES, ACCESS, PREFAULT)
BY_SLUG: dict[str, Rule] = {rule.slug: rule for rule in ALL}
SLUGS: tuple[str, ...] = (*BY_SLUG, "ambiguous", "unknown")

__all__ = ["ACCESS", "ALL", "BY_SLUG", "PREFAULT", "RULES", "SLUGS", "Finding", "Rule"]
