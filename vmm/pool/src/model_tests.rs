//! Any sequence of requests, killed at any change of the shared files, then
//! recovered: the pool is what a simple model says, and nothing has leaked.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use mshare_protocol::broker::{Policy, Region, Reply, Request, Resume, Role};
use mshare_protocol::entry::{ENTRIES, PAGE_SIZE, PMD_SIZE, PUD_SIZE, Prot};
use proptest::prelude::*;

use crate::broker::{Broker, SessionId};
use crate::editor::Tables;
use crate::layout::{PoolConfig, Span, pmd_pages, pte_pages, region_table_len};
use crate::memory::{self, PoolFiles, SharedFile, crash};

const UNITS: u64 = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
struct ModelRegion {
    name: Option<u8>,
    start: u64,
    /// Protection of each page; empty while unsized.
    pages: Vec<Prot>,
    attached: bool,
}

/// By id.
type Model = BTreeMap<u64, ModelRegion>;

#[derive(Clone, Debug)]
enum Op {
    Create(u8),
    Size(u8, u64, u64),
    Attach(u8),
    /// Detaches the n-th attached region.
    Detach(usize),
    Protect(u8, u64, u64, Prot),
    Discard(u8, u64),
    Write(u8, u64),
    Unlink(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0u8..4;
    let prot = prop_oneof![Just(Prot::None), Just(Prot::Read), Just(Prot::ReadWrite)];
    prop_oneof![
        3 => name.clone().prop_map(Op::Create),
        4 => (name.clone(), 1u64..4, 1u64..4).prop_map(|(n, s, l)| Op::Size(n, s, l)),
        2 => name.clone().prop_map(Op::Attach),
        1 => (0usize..4).prop_map(Op::Detach),
        8 => (name.clone(), 0..ENTRIES, 1..2 * ENTRIES, prot)
            .prop_map(|(n, at, len, p)| Op::Protect(n, at, len, p)),
        1 => (name.clone(), 0..3 * ENTRIES).prop_map(|(n, at)| Op::Discard(n, at)),
        2 => (name.clone(), 0..3 * ENTRIES).prop_map(|(n, at)| Op::Write(n, at)),
        2 => name.prop_map(Op::Unlink),
    ]
}

fn to_index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

fn id_of(model: &Model, name: u8) -> Option<u64> {
    model
        .iter()
        .find(|(_, r)| r.name == Some(name))
        .map(|(&id, _)| id)
}

/// The request that an operation stands for, and what it does to the model if
/// it succeeds.
fn apply(model: &Model, op: &Op, new_id: u64) -> Option<(Request, Model)> {
    let mut after = model.clone();
    let request = match *op {
        Op::Create(n) => {
            let region = ModelRegion {
                name: Some(n),
                start: 0,
                pages: vec![],
                attached: false,
            };
            after.insert(new_id, region);
            Request::Create {
                name: vec![b'a' + n],
                mode: 0o600,
                uid: 1,
                gid: 1,
            }
        }
        Op::Size(n, start, units) => {
            let id = id_of(model, n)?;
            let region = after.get_mut(&id)?;
            if region.pages.is_empty() {
                region.start = start * PUD_SIZE;
                region.pages = vec![Prot::ReadWrite; to_index(units * ENTRIES)];
            }
            Request::Size {
                id,
                start: start * PUD_SIZE,
                len: units * PMD_SIZE,
            }
        }
        Op::Attach(n) => {
            let id = id_of(model, n)?;
            after.get_mut(&id)?.attached = true;
            Request::Attach { id }
        }
        Op::Detach(nth) => {
            let (&id, _) = model.iter().filter(|(_, r)| r.attached).nth(nth)?;
            let region = after.get_mut(&id)?;
            region.attached = false;
            if region.name.is_none() {
                after.remove(&id);
            }
            Request::Detach { id }
        }
        Op::Protect(n, at, len, prot) => {
            let id = id_of(model, n)?;
            let pages = after
                .get_mut(&id)?
                .pages
                .get_mut(to_index(at)..to_index(at + len));
            if let Some(pages) = pages {
                pages.fill(prot);
            }
            Request::Protect {
                id,
                offset: at * PAGE_SIZE,
                len: len * PAGE_SIZE,
                prot,
            }
        }
        Op::Discard(n, at) => {
            let id = id_of(model, n)?;
            Request::Discard {
                id,
                offset: at * PAGE_SIZE,
                len: PAGE_SIZE,
            }
        }
        Op::Write(..) => return None,
        Op::Unlink(n) => {
            let id = id_of(model, n)?;
            let region = after.get_mut(&id)?;
            region.name = None;
            if !region.attached {
                after.remove(&id);
            }
            Request::Unlink {
                name: vec![b'a' + n],
                id: None,
            }
        }
    };
    Some((request, after))
}

fn stat(broker: &mut Broker, session: SessionId, id: u64) -> Option<Region> {
    match broker.handle(session, Request::Stat { id }).result {
        Ok(Reply::Region(region)) => Some(region),
        _ => None,
    }
}

/// The regions as the broker and the tables have them; and that every page of
/// the files is accounted for.
fn observe(broker: &mut Broker, session: SessionId, attached: &[u64]) -> Model {
    let files = broker.files();
    let file = SharedFile::open(files.tables()).unwrap();
    let geometry = *broker.geometry();
    let mut seen = Model::new();
    let (mut table_bytes, mut data_len) = (0, 0);
    for id in 1..200 {
        let Some(region) = stat(broker, session, id) else {
            continue;
        };
        let mut pages = Vec::new();
        if region.len > 0 {
            let span = Span {
                len: region.len,
                table_off: region.table_off,
                table_len: region.table_len,
                table_gpa: geometry.window_gpa,
                data_off: region.data_off,
                data_gpa: geometry.window_gpa + geometry.data_off,
                huge: geometry.huge_pages,
            };
            assert_eq!(region.table_len, region_table_len(region.len));
            let resident = file.resident(span.table_off, span.table_len).unwrap();
            assert_eq!(resident, region.table_bytes);
            let (least, most) = (
                pmd_pages(span.len),
                pmd_pages(span.len) + pte_pages(span.len),
            );
            let least = if span.huge { least } else { most };
            let right = (least * PAGE_SIZE..=most * PAGE_SIZE).contains(&resident);
            assert!(right, "{resident} bytes of tables of region {id}");
            let (tables, found) = Tables::recover(&file, span).unwrap();
            assert_eq!(found.damaged, 0);
            pages = (0..).map_while(|page| tables.prot(&file, page)).collect();
        }
        table_bytes += region.table_bytes;
        data_len += region.len;
        let name = region.name.first().map(|b| b - b'a');
        let attached = attached.contains(&id);
        seen.insert(
            id,
            ModelRegion {
                name,
                start: region.start,
                pages,
                attached,
            },
        );
    }
    assert_eq!(
        memory::occupied(files.tables()),
        table_bytes,
        "leaked table pages"
    );
    match broker.handle(session, Request::PoolStat).result {
        Ok(Reply::Pool(pool)) => {
            assert_eq!(
                pool.data_free,
                pool.geometry.data_len - data_len,
                "leaked ranges"
            );
            assert_eq!(pool.regions, seen.len() as u64);
        }
        other => panic!("{other:?}"),
    }
    seen
}

fn guest() -> Role {
    Role::Guest {
        name: "g".to_owned(),
        policy: Policy::Rw,
    }
}

/// Where in a request the broker is killed.
#[derive(Clone, Copy, Debug)]
enum Place {
    AfterStart(u64),
    BeforeEnd(u64),
    PerMille(u64),
}

impl Place {
    /// Changes that a request which makes `of` of them still makes.
    fn fuel(self, of: u64) -> u64 {
        match self {
            Self::AfterStart(n) => n.min(of - 1),
            Self::BeforeEnd(n) => of.saturating_sub(n),
            Self::PerMille(n) => n * of / 1000,
        }
    }
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        (0u64..16).prop_map(Place::AfterStart),
        (1u64..16).prop_map(Place::BeforeEnd),
        (0u64..1000).prop_map(Place::PerMille),
    ]
}

/// A sequence of requests carried out, perhaps up to a kill.
struct Run {
    files: PoolFiles,
    uuid: [u8; 16],
    model: Model,
    /// What the model is if the request counts in which the broker was killed.
    open: Option<Model>,
    /// Changes of the shared files that each operation made.
    spent: Vec<u64>,
}

fn run(ops: &[Op], kill: Option<(usize, u64)>, huge_pages: bool) -> Run {
    let config = PoolConfig {
        huge_pages,
        ..PoolConfig::new(UNITS * PMD_SIZE)
    };
    let mut broker = Broker::new(&config).unwrap();
    let session = broker.connect(guest()).unwrap();
    // A guest would have to attach before it changes anything.
    let admin = broker.connect(Role::Admin).unwrap();
    let mut run = Run {
        files: broker.files().try_clone().unwrap(),
        uuid: broker.geometry().uuid,
        model: Model::new(),
        open: None,
        spent: Vec::new(),
    };
    let mut next_id = 1;
    for (index, op) in ops.iter().enumerate() {
        run.spent.push(0);
        if let Op::Write(n, at) = op {
            let region = id_of(&run.model, *n).and_then(|id| stat(&mut broker, session, id));
            if let Some(region) = region.filter(|r| at * PAGE_SIZE < r.len) {
                let at = region.data_off + at * PAGE_SIZE;
                rustix::io::pwrite(run.files.data(), b"x", at).unwrap();
            }
            continue;
        }
        let Some((request, after)) = apply(&run.model, op, next_id) else {
            continue;
        };
        let start = crash::count();
        crash::arm(kill.filter(|k| k.0 == index).map(|k| k.1));
        let by = match op {
            Op::Protect(..) | Op::Discard(..) => admin,
            _ => session,
        };
        let handled = catch_unwind(AssertUnwindSafe(|| broker.handle(by, request)));
        crash::arm(None);
        run.spent[index] = crash::count() - start;
        let Ok(answer) = handled else {
            run.open = Some(after);
            break;
        };
        if let Ok(reply) = answer.result {
            run.model = after;
            if let (Op::Create(_), Reply::Region(region)) = (op, reply) {
                next_id = region.id + 1;
            }
        }
    }
    run
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn recovery_after_a_kill_anywhere_finds_the_model(
        sizes in prop::collection::vec(1u64..4, 0..4),
        ops in prop::collection::vec(op(), 1..20),
        which in any::<prop::sample::Index>(),
        place in place(),
        again in prop::option::of(0u64..40),
        huge in any::<bool>(),
    ) {
        // Some regions to begin with, so that most requests find one.
        let begin = (0..).zip(sizes).flat_map(|(n, units)| {
            [Op::Create(n), Op::Size(n, u64::from(n) + 1, units)]
        });
        let ops: Vec<Op> = begin.chain(ops).collect();
        // Once to see where there is something to interrupt.
        let whole = run(&ops, None, huge);
        let costly: Vec<usize> = (0..ops.len()).filter(|&i| whole.spent[i] > 0).collect();
        prop_assume!(!costly.is_empty());
        let victim = costly[which.index(costly.len())];
        let Run { files, uuid, model, open, .. } =
            run(&ops, Some((victim, place.fuel(whole.spent[victim]))), huge);
        prop_assert!(open.is_some(), "the broker must have been killed");
        let after = open.unwrap_or_default();
        // The recovering broker may be killed as well.
        if again.is_some() {
            crash::arm(again);
            let files = files.try_clone().unwrap();
            let _ = catch_unwind(AssertUnwindSafe(|| Broker::recover(files, 4096).map(drop)));
            crash::arm(None);
        }
        let mut broker = Broker::recover(files, 4096).unwrap();
        // A client that was detaching no longer has it mapped; one that was
        // attaching does not yet.
        let held: Vec<u64> = model
            .iter()
            .filter(|(id, r)| r.attached && after.get(id).is_some_and(|a| a.attached))
            .map(|(&id, _)| id)
            .collect();
        let created = model.iter().filter(|(_, r)| r.pages.is_empty()).map(|(&id, _)| id);
        let resume = Resume { uuid, attached: held.clone(), created: created.collect() };
        let (session, _) = broker.resume(guest(), &resume).unwrap();
        assert!(broker.settle());
        let seen = observe(&mut broker, session, &held);
        let settle = |mut state: Model| {
            for (id, region) in &mut state {
                region.attached = held.contains(id);
            }
            // Nobody had heard of a region whose creation was under way.
            state.retain(|id, r| {
                (r.name.is_some() || r.attached)
                    && (!r.pages.is_empty() || model.contains_key(id))
            });
            state
        };
        let (before, after) = (settle(model.clone()), settle(after));
        prop_assert!(
            seen == before || seen == after,
            "killed in {:?}\n{:?}\n{:?}\n{:?}", ops[victim], brief(&seen), brief(&before), brief(&after)
        );
        // Everything ends, and the pool is as new.
        let names: Vec<u8> = seen.values().filter_map(|r| r.name).collect();
        for n in names {
            let request = Request::Unlink { name: vec![b'a' + n], id: None };
            broker.handle(session, request).result.unwrap();
        }
        broker.disconnect(session);
        let files = broker.files();
        prop_assert_eq!(memory::occupied(files.tables()), 0);
        prop_assert_eq!(memory::occupied(files.data()), 0);
    }
}

/// A model in few words.
fn brief(model: &Model) -> Vec<String> {
    let line = |(id, r): (&u64, &ModelRegion)| {
        let mut runs: Vec<(Prot, usize)> = Vec::new();
        for &prot in &r.pages {
            match runs.last_mut() {
                Some((last, n)) if *last == prot => *n += 1,
                _ => runs.push((prot, 1)),
            }
        }
        format!("{id}: {:?} {:#x} {} {runs:?}", r.name, r.start, r.attached)
    };
    model.iter().map(line).collect()
}
