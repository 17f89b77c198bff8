//! How a kernel's log tells that the kernel misbehaved, for whoever reads one:
//! the agent in its guest, and the runner of the selftests on a console.

/// What no line may hold, except as the end of a longer word.
const SIGNS: [&str; 42] = [
    // Also "BUG kmalloc-64 (Not tainted): Poison overwritten", of SLUB.
    "BUG",
    "Oops",
    "Kernel panic",
    "general protection fault",
    "unable to handle",
    "stack-protector",
    "Corrupted page table",
    // Page tables and what they map.
    "Bad page",
    "Bad rss",
    "Bad swap",
    "bad pte",
    "bad pmd",
    "bad pud",
    "bad p4d",
    "bad pgd",
    "non-zero pgtables_bytes",
    // Locks.
    "possible circular",
    "possible recursive",
    "possible irq",
    "inconsistent lock",
    "inconsistent {",
    "suspicious RCU",
    "suspicious rcu",
    "trying to register non-static key",
    "lock held when returning",
    "held lock freed",
    "scheduling while atomic",
    // Objects and memory.
    "KASAN",
    "KCSAN",
    "UBSAN",
    "ODEBUG",
    "refcount_t",
    "corruption",
    "unreferenced object",
    // Progress.
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls",
    "rcu: INFO:",
    "workqueue lockup",
    // Of the log itself: what is lost may have been any of these.
    "messages were lost",
];

/// In the middle of a line it is how some drivers give advice.
const WARNING: &str = "WARNING:";

/// Whether a line, without its time, says so.
#[must_use]
pub fn complains(text: &str) -> bool {
    text.starts_with(WARNING) || SIGNS.iter().any(|sign| holds(text, sign))
}

/// Not within a word: what DEBUG says is no BUG.
fn holds(text: &str, sign: &str) -> bool {
    text.match_indices(sign)
        .any(|(at, _)| !text[..at].ends_with(|c: char| c.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.12 prints them; the files are its own.
    const BAD: [&str; 17] = [
        // mm/slub.c, slab_bug()
        "BUG kmalloc-64 (Not tainted): Poison overwritten",
        // arch/x86/mm/fault.c
        "BUG: unable to handle page fault for address: ffff888000000000",
        "Oops: Oops: 0002 [#1] PREEMPT SMP PTI",
        // kernel/panic.c, __warn()
        "WARNING: CPU: 0 PID: 1 at mm/mshare.c:1 mshare_fault+0x10/0x20",
        // include/linux/pgtable.h, pmd_ERROR() of arch/x86
        "mm/pgtable-generic.c:54: bad pmd 00000000f3a2(0000000000000067)",
        "mm/memory.c:221: bad pud 00000000f3a2(0000000000000067)",
        // kernel/fork.c, check_mm()
        "BUG: Bad rss-counter state mm:00000000f3a2 type:MM_SHMEMPAGES val:1",
        "BUG: non-zero pgtables_bytes on freeing mm: 4096",
        // mm/memory.c, print_bad_pte()
        "BUG: Bad page map in process x  pte:00000000 pmd:00000000",
        // kernel/locking/lockdep.c
        "WARNING: possible circular locking dependency detected",
        "INFO: trying to register non-static key.",
        // kernel/hung_task.c
        "INFO: task mshare_stress:42 blocked for more than 60 seconds.",
        // kernel/rcu/tree_stall.h
        "rcu: INFO: rcu_preempt self-detected stall on CPU",
        // lib/refcount.c
        "refcount_t: underflow; use-after-free.",
        // lib/list_debug.c
        "list_add corruption. next->prev should be prev",
        // kernel/kcsan/report.c
        "BUG: KCSAN: data-race in mshare_fault / mshare_link",
        // mm/page_table_check.c
        "kernel BUG at mm/page_table_check.c:118!",
    ];

    #[test]
    fn each_kind_of_bad_news_is_known() {
        for line in BAD {
            assert!(complains(line), "{line}");
        }
    }

    #[test]
    fn chatter_is_no_bad_news() {
        for line in [
            "mshare: window at 0x4000000000",
            // Of the trace that the OOM killer prints.
            " ? page_table_check_set.part.0+0x17b/0x2a0",
            "Speculative Return Stack Overflow: WARNING: See",
            "**   This means that this is a DEBUG kernel and it is     **",
            "rcu: Preemptible hierarchical RCU implementation.",
            "",
        ] {
            assert!(!complains(line), "{line}");
        }
    }
}
