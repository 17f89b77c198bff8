use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mshare_protocol::broker::Geometry;
use mshare_protocol::entry::{decode_huge_leaf, decode_leaf, decode_table};
use proptest::prelude::*;

use super::*;
use crate::layout::region_table_len;
use crate::memory::{PoolFiles, crash};

const WINDOW: u64 = 1 << 38;

/// A region of `units` x 2 MiB with `spare` spare slots (`None`: as usual),
/// not at the start of the files.
fn region(units: u64, spare: Option<u64>) -> (SharedFile, Span) {
    region_of(units, spare, false)
}

/// The same, with leaves of 2 MiB if `huge`.
fn region_of(units: u64, spare: Option<u64>, huge: bool) -> (SharedFile, Span) {
    let len = units * PMD_SIZE;
    let table_len = spare.map_or(region_table_len(len), |spare| {
        (2 * pmd_pages(len) + units + spare) * PAGE_SIZE
    });
    let span = Span {
        len,
        table_off: 2 << 20,
        table_len,
        table_gpa: WINDOW,
        data_off: 6 << 20,
        data_gpa: WINDOW + (1 << 30),
        huge,
    };
    let files = PoolFiles::create(&Geometry {
        uuid: [0; 16],
        window_gpa: WINDOW,
        table_len: span.table_off + table_len + (2 << 20),
        data_off: 1 << 30,
        data_len: span.data_off + len,
        huge_pages: huge,
    })
    .unwrap();
    (SharedFile::open(files.tables()).unwrap(), span)
}

/// Walks the tables as a CPU does: from the link, through what the entries
/// say. `None` where it would fault at the PMD level. A leaf of 2 MiB gives
/// the entry that a PTE would have.
fn walk(file: &SharedFile, span: &Span, page: u64) -> Option<u64> {
    let pmd = file.load(span.table_off / WORD + page / ENTRIES);
    if let Ok(Some((gpa, prot))) = decode_huge_leaf(pmd) {
        assert!(span.huge, "a leaf where none may be");
        return Some(leaf(gpa + page % ENTRIES * PAGE_SIZE, prot));
    }
    let gpa = decode_table(pmd).unwrap()?;
    assert!(
        span.slot_at(gpa).is_some(),
        "PMD entry {pmd:#x} leaves the region"
    );
    Some(file.load((gpa - span.table_gpa) / WORD + page % ENTRIES))
}

/// The whole state decodes to what the model says, and nothing has leaked.
fn check(file: &SharedFile, tables: &Tables, model: &[Prot]) {
    let span = tables.span();
    let mut slots = HashSet::new();
    for unit in 0..pte_pages(span.len) {
        let pmd = file.load(span.table_off / WORD + unit);
        if decode_huge_leaf(pmd).is_ok_and(|leaf| leaf.is_some()) {
            continue;
        }
        let gpa = decode_table(pmd).unwrap().expect("every unit has a table");
        assert!(
            slots.insert(span.slot_at(gpa).unwrap()),
            "a slot is used twice"
        );
    }
    for (page, &prot) in (0..).zip(model) {
        let entry = walk(file, span, page).unwrap();
        assert_eq!(entry, leaf(span.page_gpa(page), prot), "page {page}");
        let decoded = decode_leaf(entry).unwrap();
        assert_eq!(decoded.map_or(Prot::None, |(_, p)| p), prot);
        assert_eq!(tables.prot(file, page), Some(prot));
    }
    if !span.huge {
        assert_eq!(slots.len() as u64, pte_pages(span.len), "leaves");
    }
    let want = (pmd_pages(span.len) + slots.len() as u64) * PAGE_SIZE;
    assert_eq!(tables.bytes(), want);
    let resident = file.resident(span.table_off, span.table_len).unwrap();
    assert_eq!(resident, want, "table bytes");
}

fn prots() -> impl Strategy<Value = Prot> {
    prop_oneof![Just(Prot::None), Just(Prot::Read), Just(Prot::ReadWrite)]
}

#[derive(Clone, Debug)]
enum Op {
    Protect(u64, u64, Prot),
    Recover,
    Rebuild(Prot),
}

fn ops(pages: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..pages, 1..=pages, prots())
            .prop_map(move |(at, n, prot)| Op::Protect(at, n.min(pages - at), prot)),
        2 => Just(Op::Recover),
        1 => prots().prop_map(Op::Rebuild),
    ]
}

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_sequence_of_edits_decodes_to_the_model(
        spare in prop_oneof![Just(Some(1)), Just(Some(2)), Just(None)],
        ops in prop::collection::vec(ops(5 * ENTRIES), 1..24),
        huge in any::<bool>(),
    ) {
        let (file, span) = region_of(5, spare, huge);
        let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
        let mut model = vec![Prot::ReadWrite; index(5 * ENTRIES)];
        check(&file, &tables, &model);
        for op in ops {
            match op {
                Op::Protect(first, pages, prot) => {
                    let range = &mut model[index(first)..index(first + pages)];
                    let loses = range.iter().any(|p| p.bits() & !prot.bits() != 0);
                    let edit = tables.protect(&file, first, pages, prot).unwrap();
                    prop_assert_eq!(edit.revoked, loses);
                    range.fill(prot);
                }
                Op::Recover => {
                    let (recovered, found) = Tables::recover(&file, span).unwrap();
                    prop_assert_eq!(found, Found::default());
                    prop_assert_eq!(&recovered.units, &tables.units);
                    prop_assert_eq!(&recovered.slots.words, &tables.slots.words);
                    tables = recovered;
                }
                Op::Rebuild(prot) => {
                    Tables::destroy(&file, &span).unwrap();
                    prop_assert_eq!(file.resident(0, file.words() * WORD).unwrap(), 0);
                    tables = Tables::build(&file, span, prot).unwrap();
                    model.fill(prot);
                }
            }
            check(&file, &tables, &model);
        }
    }
}

#[test]
fn a_region_over_one_gib_has_contiguous_links() {
    let units = ENTRIES + 3;
    let (file, span) = region(units, None);
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    assert_eq!(pmd_pages(span.len), 2);
    let mut model = vec![Prot::ReadWrite; index(units * ENTRIES)];
    check(&file, &tables, &model);
    let edit = tables
        .protect(&file, 1, units * ENTRIES - 1, Prot::Read)
        .unwrap();
    assert_eq!((edit.replaced, edit.stored), (units, 0));
    model[1..].fill(Prot::Read);
    check(&file, &tables, &model);
    let edit = tables.protect(&file, 0, 2, Prot::ReadWrite).unwrap();
    assert_eq!(
        (edit.replaced, edit.stored),
        (0, 1),
        "adding a right copies nothing"
    );
}

/// Entries as a CPU has them that cached the PMD entries before an edit and
/// was never flushed: how many of `pages` still permit writes through them.
fn stale_writes(protect: impl FnOnce(&SharedFile, &mut Tables)) -> usize {
    let (file, span) = region(4, None);
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    let cached = tables.units.clone();
    protect(&file, &mut tables);
    let stale = |page: u64| match cached[index(page / ENTRIES)] {
        Unit::Table(slot) => file.load(tables.word(slot, page)) & (P | RW) == P | RW,
        Unit::Leaf(_) => panic!("no huge pages here"),
    };
    (0..4 * ENTRIES).filter(|&page| stale(page)).count()
}

#[test]
fn an_old_page_permits_nothing_after_protect_returned() {
    let stale = stale_writes(|file, tables| {
        tables.protect(file, 0, 4 * ENTRIES, Prot::Read).unwrap();
    });
    assert_eq!(stale, 0);
}

/// A CPU that walks all the time, without a TLB: through the PMD entry that is
/// current, it must never see an entry that is neither the old nor the new
/// one. Returns what it saw.
fn entries_seen_during_edits(prepare: impl FnOnce(&mut Tables)) -> HashSet<u64> {
    let (file, span) = region(1, Some(2));
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    prepare(&mut tables);
    let stop = AtomicBool::new(false);
    // A slot comes back after two edits; a walk that spans two is not looked at
    // (a vCPU cannot: the punch of the first makes it flush).
    let edits = AtomicU64::new(0);
    let changes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let mut seen = HashSet::new();
            let mut last = 0;
            let page = ENTRIES - 1;
            while !stop.load(Ordering::Relaxed) {
                let before = edits.load(Ordering::SeqCst);
                let pmd = file.load(span.table_off / WORD);
                let entry = walk(&file, &span, page).unwrap();
                // A table that was replaced meanwhile may be punched already.
                let same = file.load(span.table_off / WORD) == pmd;
                if same && edits.load(Ordering::SeqCst) == before {
                    seen.insert(entry);
                    if std::mem::replace(&mut last, entry) != entry {
                        changes.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
            seen
        });
        // Until the walker, which may have to wait for a CPU, has seen many.
        let limit = Instant::now() + Duration::from_secs(20);
        while changes.load(Ordering::SeqCst) < 500 && Instant::now() < limit {
            tables.protect(&file, 0, ENTRIES, Prot::Read).unwrap();
            tables.protect(&file, 0, ENTRIES, Prot::ReadWrite).unwrap();
            edits.fetch_add(1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
        walker.join().unwrap()
    })
}

fn old_and_new(page: u64) -> HashSet<u64> {
    let (_, span) = region(1, Some(2));
    [Prot::Read, Prot::ReadWrite]
        .map(|prot| leaf(span.page_gpa(page), prot))
        .into()
}

#[test]
fn a_concurrent_walker_sees_old_or_new_entries_only() {
    let seen = entries_seen_during_edits(|_| ());
    assert_eq!(seen, old_and_new(ENTRIES - 1), "{seen:x?}");
}

#[test]
fn damage_is_not_carried_on_and_costs_access_only() {
    let (file, span) = region(3, Some(4));
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    // A guest redirects a leaf, then somebody edits the same 2 MiB.
    let Unit::Table(slot) = tables.unit(0) else {
        panic!("no table");
    };
    file.store(tables.word(slot, 5), leaf(0xdead_0000, Prot::ReadWrite));
    tables.protect(&file, 100, 1, Prot::Read).unwrap();
    assert_eq!(
        walk(&file, &span, 5),
        Some(leaf(span.page_gpa(5), Prot::ReadWrite))
    );
    // A guest redirects PMD entries; the broker dies.
    file.store(tables.pmd_word(0), 0xdead_0067);
    file.store(tables.pmd_word(1), file.load(tables.pmd_word(2)));
    let (tables, found) = Tables::recover(&file, span).unwrap();
    assert_eq!(found.damaged, 2, "two units lost their table");
    let prot = |page| tables.prot(&file, page).unwrap();
    assert_eq!(prot(0), Prot::None);
    assert_eq!(
        [prot(ENTRIES), prot(2 * ENTRIES)],
        [Prot::ReadWrite, Prot::None]
    );
    assert_eq!(tables.bytes(), 4 * PAGE_SIZE);
}

/// How many PTE pages a region has.
fn tables_in_use(tables: &Tables) -> u64 {
    tables.bytes() / PAGE_SIZE - pmd_pages(tables.span().len)
}

#[test]
fn leaves_are_split_where_pages_differ_and_come_back() {
    let units = ENTRIES + 2;
    let (file, span) = region_of(units, None, true);
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    let mut model = vec![Prot::ReadWrite; index(units * ENTRIES)];
    check(&file, &tables, &model);
    assert_eq!(tables_in_use(&tables), 0);
    let mut edit = |first: u64, pages: u64, prot, want: (u64, u64, u64, bool), in_use| {
        let edit = tables.protect(&file, first, pages, prot).unwrap();
        model[index(first)..index(first + pages)].fill(prot);
        check(&file, &tables, &model);
        let found = (edit.stored, edit.replaced, edit.rewritten, edit.revoked);
        assert_eq!(found, want, "{first} {pages} {prot:?}");
        assert_eq!(tables_in_use(&tables), in_use);
    };
    let all = units * ENTRIES;
    // One page splits one leaf; the same again does nothing.
    edit(700, 1, Prot::Read, (0, 0, 1, true), 1);
    edit(700, 1, Prot::Read, (0, 0, 0, false), 1);
    // Less for whole units keeps them leaves, in the first GiB and the second.
    edit(0, all, Prot::Read, (0, 1, units - 1, true), 0);
    // More is a store for each leaf.
    edit(0, all, Prot::ReadWrite, (units, 0, 0, false), 0);
    // No access is a PTE page, whose end merges.
    edit(ENTRIES, ENTRIES, Prot::None, (0, 0, 1, true), 1);
    edit(ENTRIES, ENTRIES, Prot::ReadWrite, (0, 1, 0, false), 0);
    // More for one page of a read-only leaf splits it and takes nothing.
    edit(0, ENTRIES, Prot::Read, (0, 0, 1, true), 0);
    edit(9, 1, Prot::ReadWrite, (0, 0, 1, false), 1);
    // Units of both kinds at once.
    edit(8, 2 * ENTRIES, Prot::None, (0, 1, 2, true), 3);
}

#[test]
fn damaged_leaf_is_written_again_with_the_next_edit() {
    let (file, span) = region_of(3, None, true);
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    file.store(tables.pmd_word(1), huge_leaf(0x20_0000, Prot::ReadWrite));
    file.store(tables.pmd_word(2), 0);
    let edit = tables.protect(&file, 0, 1, Prot::Read).unwrap();
    assert_eq!(edit.rewritten, 1);
    let mut model = vec![Prot::ReadWrite; index(3 * ENTRIES)];
    model[0] = Prot::Read;
    check(&file, &tables, &model);
    // A broker that died knows no better than what it finds.
    file.store(tables.pmd_word(1), huge_leaf(0x20_0000, Prot::ReadWrite));
    let (tables, found) = Tables::recover(&file, span).unwrap();
    assert_eq!(found.damaged, 1);
    model[index(ENTRIES)..index(2 * ENTRIES)].fill(Prot::None);
    check(&file, &tables, &model);
}

/// Whichever punch of an edit fails, the edit fails, and the next one takes
/// what was left.
#[test]
fn right_whose_punch_fails_is_taken_by_the_next_edit() {
    for huge in [false, true] {
        for punches in 0.. {
            let units = ENTRIES + 2;
            let (file, span) = region_of(units, Some(8), huge);
            let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
            // Both kinds of units, and slots that are not neighbours.
            for unit in [1, 3, ENTRIES + 1] {
                tables
                    .protect(&file, unit * ENTRIES, 1, Prot::Read)
                    .unwrap();
            }
            crash::fail_punch(Some(punches));
            let (first, pages) = (5, (units - 1) * ENTRIES);
            let edit = tables.protect(&file, first, pages, Prot::Read);
            if crash::fail_punch(None) {
                edit.unwrap();
                break;
            }
            assert!(matches!(edit, Err(EditError::Punch(_))), "{edit:?}");
            tables.protect(&file, first, pages, Prot::Read).unwrap();
            let mut model = vec![Prot::ReadWrite; index(units * ENTRIES)];
            model[index(first)..index(first + pages)].fill(Prot::Read);
            model[index((units - 1) * ENTRIES)] = Prot::Read;
            check(&file, &tables, &model);
        }
    }
}

/// Kills the broker at every change that an edit of leaves makes; how many
/// units recovery found damaged in all.
fn damaged_by_kills(prepare: impl Fn(&mut Tables)) -> u64 {
    let mut damaged = 0;
    for fuel in 0.. {
        let (file, span) = region_of(3, None, true);
        let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
        prepare(&mut tables);
        crash::arm(Some(fuel));
        let done = catch_unwind(AssertUnwindSafe(|| {
            tables.protect(&file, 5, ENTRIES, Prot::Read).unwrap();
        }));
        crash::arm(None);
        let (tables, found) = Tables::recover(&file, span).unwrap();
        damaged += found.damaged;
        if found.damaged == 0 {
            let now = tables.prot(&file, 5).unwrap();
            let mut model = vec![Prot::ReadWrite; index(3 * ENTRIES)];
            model[5..index(5 + ENTRIES)].fill(now);
            check(&file, &tables, &model);
        }
        if done.is_ok() {
            break;
        }
    }
    damaged
}

#[test]
fn kill_while_a_pmd_page_is_rewritten_loses_nothing() {
    assert_eq!(damaged_by_kills(|_| ()), 0);
}

/// A CPU that walks all the time meets a leaf, its PTE page's entry or, while
/// the PMD page is rewritten, nothing; never anything else.
#[test]
fn concurrent_walker_meets_a_leaf_its_table_or_a_gap() {
    let (file, span) = region_of(2, Some(1), true);
    let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
    let stop = AtomicBool::new(false);
    let page = ENTRIES - 1;
    let (seen, gaps) = std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let (mut seen, mut gaps) = (HashSet::new(), 0_u64);
            while !stop.load(Ordering::Relaxed) {
                let pmd = file.load(span.table_off / WORD);
                let entry = walk(&file, &span, page);
                // A table that was replaced meanwhile may be punched already.
                if file.load(span.table_off / WORD) == pmd {
                    gaps += u64::from(entry.is_none());
                    seen.extend(entry.filter(|&entry| entry != 0));
                }
            }
            (seen, gaps)
        });
        let limit = Instant::now() + Duration::from_secs(2);
        while Instant::now() < limit {
            tables.protect(&file, 0, 1, Prot::Read).unwrap();
            tables.protect(&file, 0, ENTRIES, Prot::ReadWrite).unwrap();
            tables.protect(&file, 0, ENTRIES, Prot::Read).unwrap();
            tables.protect(&file, 0, ENTRIES, Prot::ReadWrite).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        walker.join().unwrap()
    });
    let allowed = old_and_new(page);
    assert!(seen.is_subset(&allowed), "{seen:x?} {allowed:x?}");
    println!("{gaps} gaps seen");
}

#[test]
fn ranges_are_checked() {
    let len = 4 << 20;
    assert_eq!(page_range(len, 4096, 8192), Some((1, 2)));
    assert_eq!(page_range(len, 0, len), Some((0, 1024)));
    for (offset, bytes) in [
        (0, 0),
        (0, 4095),
        (1, 4096),
        (0, len + 4096),
        (len, 4096),
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4095, 8192),
        (4096, u64::MAX - 4095),
    ] {
        assert_eq!(
            page_range(len, offset, bytes),
            None,
            "{offset:#x} {bytes:#x}"
        );
    }
}

/// The tests above notice when an element of the protocol is missing.
#[cfg(feature = "ablation")]
mod ablations {
    use super::*;

    #[test]
    fn without_the_punch_old_pages_still_permit_writes() {
        let stale = stale_writes(|file, tables| {
            tables.ablate(Some(Ablation::SkipPunch));
            tables.protect(file, 0, 4 * ENTRIES, Prot::Read).unwrap();
        });
        assert_eq!(stale, index(4 * ENTRIES));
    }

    #[test]
    fn publishing_before_the_copy_shows_holes() {
        // It takes luck to look at the wrong moment.
        let found = (0..100).any(|_| {
            entries_seen_during_edits(|t| t.ablate(Some(Ablation::PublishBeforeCopy))).contains(&0)
        });
        assert!(found);
    }

    #[test]
    fn a_dirty_bit_on_a_read_only_entry_is_no_entry() {
        let (file, span) = region(1, None);
        let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
        tables.ablate(Some(Ablation::KeepDirty));
        tables.protect(&file, 0, 1, Prot::Read).unwrap();
        assert!(decode_leaf(walk(&file, &span, 0).unwrap()).is_err());
    }

    #[test]
    fn without_the_shadow_a_kill_loses_a_pmd_page() {
        assert!(damaged_by_kills(|tables| tables.ablate(Some(Ablation::SkipShadow))) > 0);
    }

    #[test]
    fn an_edit_in_place_replaces_no_table() {
        let (file, span) = region(1, None);
        let mut tables = Tables::build(&file, span, Prot::ReadWrite).unwrap();
        tables.ablate(Some(Ablation::EditInPlace));
        let edit = tables.protect(&file, 0, 1, Prot::Read).unwrap();
        assert_eq!((edit.replaced, edit.stored), (0, 1));
        assert!(!edit.revoked, "nobody is told to flush");
    }
}
