use mshare_protocol::broker::Resume;
use mshare_protocol::entry::{PMD_SIZE, PUD_SIZE};

use crate::marks;

use std::os::fd::AsFd;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = PUD_SIZE;

fn broker(size: u64) -> Broker {
    Broker::new(&PoolConfig::new(size)).unwrap()
}

fn guest(broker: &mut Broker, name: &str, policy: Policy) -> SessionId {
    let name = name.to_owned();
    broker.connect(Role::Guest { name, policy }).unwrap()
}

fn errno(answer: Answer) -> (Errno, String) {
    let failure = answer.result.unwrap_err();
    (Errno::from_raw_os_error(failure.errno), failure.message)
}

fn create(name: &[u8]) -> Request {
    Request::Create {
        name: name.to_vec(),
        mode: 0o640,
        uid: 1,
        gid: 2,
    }
}

fn region(answer: Answer) -> Region {
    match answer.result.unwrap() {
        Reply::Region(region) => region,
        other => panic!("{other:?}"),
    }
}

/// Creates and sizes; the id.
fn make(b: &mut Broker, s: SessionId, name: &[u8], start: u64, len: u64) -> u64 {
    let id = region(b.handle(s, create(name))).id;
    let sized = region(b.handle(s, Request::Size { id, start, len }));
    assert_eq!((sized.start, sized.len), (start, len));
    id
}

fn gone(b: &mut Broker, s: SessionId, id: u64) -> bool {
    b.handle(s, Request::Stat { id }).result.is_err()
}

/// Everything that a pool holds has been given back.
fn assert_empty(b: &Broker) {
    let stat = b.pool_stat();
    assert_eq!(stat.regions, 0);
    assert_eq!(
        (stat.data_free, stat.resident, stat.table_bytes),
        (stat.geometry.data_len, 0, 0)
    );
}

#[test]
fn bad_names_are_refused() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    for (name, want, text) in [
        (&b""[..], Errno::INVAL, "empty"),
        (b".", Errno::INVAL, "'.'"),
        (b"..", Errno::INVAL, "'..'"),
        (b"a/b", Errno::INVAL, "contains a '/'"),
        (b"/a", Errno::INVAL, "contains a '/'"),
        (b"a\0b", Errno::INVAL, "NUL"),
        (&[b'x'; 300], Errno::NAMETOOLONG, "300"),
        (&[b'x'; 256], Errno::NAMETOOLONG, "256"),
    ] {
        for request in [
            create(name),
            Request::Lookup {
                name: name.to_vec(),
            },
            Request::Unlink {
                name: name.to_vec(),
                id: None,
            },
        ] {
            let (got, message) = errno(b.handle(s, request));
            assert_eq!(got, want);
            assert!(message.contains(text), "{message}");
        }
    }
    region(b.handle(s, create(&[b'x'; 255])));
    region(b.handle(s, create(b"\xff\x01 odd but legal")));
}

#[test]
fn two_regions_of_one_name_and_bad_modes_are_refused() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    region(b.handle(s, create(b"a")));
    let (got, message) = errno(b.handle(s, create(b"a")));
    assert_eq!((got, message.contains("'a'")), (Errno::EXIST, true));
    let mut request = create(b"b");
    if let Request::Create { mode, .. } = &mut request {
        *mode = 0o1777;
    }
    assert_eq!(errno(b.handle(s, request)).0, Errno::INVAL);
}

#[test]
fn wild_sizes_and_addresses_are_refused() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    let id = region(b.handle(s, create(b"a"))).id;
    for (start, len, want) in [
        (GIB, 0, Errno::INVAL),
        (GIB, 4096, Errno::INVAL),
        (GIB, u64::MAX, Errno::INVAL),
        (GIB, !0 << 21, Errno::INVAL),
        (0, PMD_SIZE, Errno::INVAL),
        (GIB + 4096, PMD_SIZE, Errno::INVAL),
        (1 << 47, PMD_SIZE, Errno::INVAL),
        (!0 << 30, PMD_SIZE, Errno::INVAL),
        ((1 << 47) - GIB, GIB + PMD_SIZE, Errno::INVAL),
        (GIB, 66 * MIB, Errno::NOSPC),
    ] {
        let (got, message) = errno(b.handle(s, Request::Size { id, start, len }));
        assert_eq!(got, want, "{start:#x} {len:#x}: {message}");
    }
    let (_, message) = errno(b.handle(
        s,
        Request::Size {
            id,
            start: GIB,
            len: 66 * MIB,
        },
    ));
    assert!(message.contains("67108864 are free"), "{message}");
    let request = Request::Size {
        id: 99,
        start: GIB,
        len: PMD_SIZE,
    };
    assert_eq!(errno(b.handle(s, request)).0, Errno::NOENT);
    region(b.handle(
        s,
        Request::Size {
            id,
            start: (1 << 47) - GIB,
            len: 64 * MIB,
        },
    ));
}

#[test]
fn the_first_size_wins() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    let id = make(&mut b, s, b"a", GIB, 4 * MIB);
    let same = region(b.handle(
        s,
        Request::Size {
            id,
            start: GIB,
            len: 4 * MIB,
        },
    ));
    assert_eq!(same.id, id);
    let (got, message) = errno(b.handle(
        s,
        Request::Size {
            id,
            start: GIB,
            len: 2 * MIB,
        },
    ));
    assert_eq!(got, Errno::INVAL);
    assert!(
        message.contains("'a' is 0x400000 bytes at 0x40000000"),
        "{message}"
    );
}

#[test]
fn overlapping_addresses_are_refused_unless_the_name_is_gone() {
    let mut b = broker(4 * GIB);
    let s = guest(&mut b, "g", Policy::Rw);
    let a = make(&mut b, s, b"a", 2 * GIB, GIB + PMD_SIZE);
    let id = region(b.handle(s, create(b"b"))).id;
    for start in [2 * GIB, 3 * GIB, GIB] {
        let len = GIB + PMD_SIZE;
        let (got, message) = errno(b.handle(s, Request::Size { id, start, len }));
        assert_eq!(got, Errno::ADDRINUSE);
        assert!(message.contains("overlaps 'a'"), "{message}");
    }
    region(b.handle(s, Request::Attach { id: a }));
    b.handle(
        s,
        Request::Unlink {
            name: b"a".to_vec(),
            id: Some(a),
        },
    )
    .result
    .unwrap();
    region(b.handle(
        s,
        Request::Size {
            id,
            start: 2 * GIB,
            len: GIB,
        },
    ));
}

#[test]
fn wild_ranges_are_refused() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    let id = make(&mut b, s, b"a", GIB, 4 * MIB);
    region(b.handle(s, Request::Attach { id }));
    for (offset, len) in [
        (0, 0),
        (1, 4096),
        (0, 1),
        (4 * MIB, 4096),
        (0, 4 * MIB + 4096),
        (!4095, 4096),
        (4096, !4095),
    ] {
        for request in [
            Request::Protect {
                id,
                offset,
                len,
                prot: Prot::Read,
            },
            Request::Discard { id, offset, len },
        ] {
            let (got, message) = errno(b.handle(s, request));
            assert_eq!(got, Errno::INVAL);
            assert!(message.contains("'a'"), "{message}");
        }
    }
    let unsized_id = region(b.handle(s, create(b"u"))).id;
    let request = Request::Discard {
        id: unsized_id,
        offset: 0,
        len: 4096,
    };
    assert_eq!(errno(b.handle(s, request)).0, Errno::AGAIN);
    assert_eq!(
        errno(b.handle(s, Request::Attach { id: unsized_id })).0,
        Errno::AGAIN
    );
    assert_eq!(
        errno(b.handle(s, Request::Attach { id: 77 })).0,
        Errno::NOENT
    );
}

#[test]
fn a_region_lives_until_unlinked_and_detached_by_all() {
    let mut b = broker(64 * MIB);
    let (s1, s2) = (
        guest(&mut b, "1", Policy::Rw),
        guest(&mut b, "2", Policy::Ro),
    );
    let id = make(&mut b, s1, b"a", GIB, 4 * MIB);
    region(b.handle(s1, Request::Attach { id }));
    let seen = region(b.handle(s2, Request::Attach { id }));
    assert_eq!(seen.attached, ["1", "2"]);
    assert_eq!(
        errno(b.handle(s2, Request::Attach { id })).0,
        Errno::ALREADY
    );
    b.disconnect(s1);
    assert!(!gone(&mut b, s2, id), "the creator's end changes nothing");
    let s3 = guest(&mut b, "3", Policy::Rw);
    let wrong = Request::Unlink {
        name: b"a".to_vec(),
        id: Some(id + 1),
    };
    assert_eq!(errno(b.handle(s3, wrong)).0, Errno::STALE);
    b.handle(
        s3,
        Request::Unlink {
            name: b"a".to_vec(),
            id: None,
        },
    )
    .result
    .unwrap();
    assert!(!gone(&mut b, s2, id));
    assert_eq!(
        errno(b.handle(
            s3,
            Request::Lookup {
                name: b"a".to_vec()
            }
        ))
        .0,
        Errno::NOENT
    );
    b.handle(s2, Request::Detach { id }).result.unwrap();
    assert!(gone(&mut b, s2, id));
    assert_eq!(
        errno(b.handle(s2, Request::Detach { id })).0,
        Errno::NOTCONN
    );
    assert_empty(&b);
    let next = region(b.handle(s3, create(b"a"))).id;
    assert!(next > id, "ids are not used again");
}

#[test]
fn an_unsized_region_dies_with_its_creator() {
    let mut b = broker(64 * MIB);
    let (s1, s2) = (
        guest(&mut b, "1", Policy::Rw),
        guest(&mut b, "2", Policy::Rw),
    );
    let id = region(b.handle(s1, create(b"a"))).id;
    b.disconnect(s2);
    assert!(!gone(&mut b, s1, id));
    b.disconnect(s1);
    let s3 = b.connect(Role::Admin).unwrap();
    assert!(gone(&mut b, s3, id));
    assert_empty(&b);
}

#[test]
fn readers_cannot_change_and_admins_are_no_guests() {
    let mut b = broker(64 * MIB);
    let admin = b.connect(Role::Admin).unwrap();
    let id = make(&mut b, admin, b"a", GIB, 4 * MIB);
    let seen = region(b.handle(admin, Request::Attach { id }));
    assert!(seen.attached.is_empty());
    for policy in [Policy::Ro, Policy::PrivateRo] {
        let s = guest(&mut b, "reader", policy);
        for request in [
            create(b"b"),
            Request::Size {
                id,
                start: GIB,
                len: 4 * MIB,
            },
            Request::Protect {
                id,
                offset: 0,
                len: 4096,
                prot: Prot::Read,
            },
            Request::Discard {
                id,
                offset: 0,
                len: 4096,
            },
            Request::Unlink {
                name: b"a".to_vec(),
                id: None,
            },
        ] {
            let (got, message) = errno(b.handle(s, request));
            assert_eq!(got, Errno::ROFS);
            assert!(message.contains("reader"), "{message}");
        }
        region(b.handle(s, Request::Attach { id }));
    }
    assert!(
        b.connect(Role::Guest {
            name: String::new(),
            policy: Policy::Rw
        })
        .is_err()
    );
    assert!(
        b.connect(Role::Guest {
            name: "n".repeat(65),
            policy: Policy::Rw
        })
        .is_err()
    );
}

#[test]
fn a_guest_changes_only_what_it_has_attached() {
    let mut b = broker(64 * MIB);
    let owner = guest(&mut b, "owner", Policy::Rw);
    let other = guest(&mut b, "other", Policy::Private);
    let id = make(&mut b, owner, b"a", GIB, 4 * MIB);
    let (offset, len, prot) = (0, 4096, Prot::None);
    let protect = Request::Protect {
        id,
        offset,
        len,
        prot,
    };
    let discard = Request::Discard { id, offset, len };
    for request in [&protect, &discard] {
        for s in [owner, other] {
            let (got, message) = errno(b.handle(s, request.clone()));
            assert_eq!(got, Errno::NOTCONN);
            assert!(message.contains("'a'"), "{message}");
        }
    }
    region(b.handle(other, Request::Attach { id }));
    for request in [&protect, &discard] {
        b.handle(other, request.clone()).result.unwrap();
    }
    b.handle(other, Request::Detach { id }).result.unwrap();
    assert_eq!(errno(b.handle(other, protect)).0, Errno::NOTCONN);
}

#[test]
fn only_private_guests_are_told_and_only_of_losses() {
    let mut b = broker(64 * MIB);
    let shared = guest(&mut b, "s", Policy::Rw);
    let private = guest(&mut b, "p", Policy::PrivateRo);
    let other = b.connect(Role::Admin).unwrap();
    let id = make(&mut b, shared, b"a", GIB, 4 * MIB);
    region(b.handle(shared, Request::Attach { id }));
    region(b.handle(private, Request::Attach { id }));
    let protect = |prot| Request::Protect {
        id,
        offset: 4096,
        len: 8192,
        prot,
    };
    let told = b.handle(other, protect(Prot::Read)).invalidate.unwrap();
    assert_eq!(
        (told.offset, told.len, told.sessions),
        (4096, 8192, vec![private])
    );
    assert!(
        b.handle(other, protect(Prot::ReadWrite))
            .invalidate
            .is_none()
    );
    b.silence(private);
    let told = b.handle(other, protect(Prot::None)).invalidate.unwrap();
    assert_eq!(told.sessions, [private], "its guest still has it mapped");
    let why = b.check_revoked(id, &told.sessions).unwrap_err();
    assert_eq!(why.errno, Errno::TIMEDOUT.raw_os_error());
    assert!(why.message.contains(": p;"), "{why}");
    let stat = region(b.handle(other, Request::Stat { id }));
    assert_eq!(stat.attached, ["s"], "a silent client does not count");
    let (got, _) = errno(b.handle(private, Request::Stat { id }));
    assert_eq!(got, Errno::SHUTDOWN);
    // But what it has mapped is not given to anybody else.
    b.handle(
        shared,
        Request::Unlink {
            name: b"a".to_vec(),
            id: None,
        },
    )
    .result
    .unwrap();
    b.handle(shared, Request::Detach { id }).result.unwrap();
    assert!(!gone(&mut b, shared, id));
    b.disconnect(private);
    assert!(gone(&mut b, shared, id));
    assert_empty(&b);
}

#[test]
fn discard_frees_and_stat_counts() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    make(&mut b, s, b"other", GIB, 2 * MIB);
    let id = make(&mut b, s, b"a", 2 * GIB, 4 * MIB);
    region(b.handle(s, Request::Attach { id }));
    let at = region(b.handle(s, Request::Stat { id })).data_off;
    assert_eq!(at, 2 * MIB);
    let files = b.files();
    rustix::io::pwrite(files.data(), &[7; 3 * 4096], at + 4096).unwrap();
    assert_eq!(b.pool_stat().resident, 3 * 4096);
    b.handle(
        s,
        Request::Discard {
            id,
            offset: 8192,
            len: 4096,
        },
    )
    .result
    .unwrap();
    assert_eq!(b.pool_stat().resident, 2 * 4096);
    let answer = b.handle(s, Request::Stat { id });
    assert!(answer.count_resident);
    assert_eq!(region(answer).table_bytes, 3 * 4096);
}

#[test]
fn the_number_of_regions_is_bounded() {
    let config = PoolConfig {
        max_regions: 3,
        ..PoolConfig::new(64 * MIB)
    };
    let mut b = Broker::new(&config).unwrap();
    let s = guest(&mut b, "g", Policy::Rw);
    for name in [b"a", b"b", b"c"] {
        region(b.handle(s, create(name)));
    }
    let (got, message) = errno(b.handle(s, create(b"d")));
    assert_eq!(got, Errno::NOSPC);
    assert!(message.contains("3 regions"), "{message}");
    b.handle(
        s,
        Request::Unlink {
            name: b"a".to_vec(),
            id: None,
        },
    )
    .result
    .unwrap();
    region(b.handle(s, create(b"d")));
}

#[test]
fn small_regions_can_use_a_pool_up() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    for i in 0..32 {
        make(
            &mut b,
            s,
            format!("r{i}").as_bytes(),
            (i + 1) * GIB,
            2 * MIB,
        );
    }
    assert_eq!(b.pool_stat().data_free, 0);
    let id = region(b.handle(s, create(b"one too many"))).id;
    let (got, _) = errno(b.handle(
        s,
        Request::Size {
            id,
            start: 99 * GIB,
            len: 2 * MIB,
        },
    ));
    assert_eq!(got, Errno::NOSPC);
}

#[test]
fn lists_are_cut_and_complete() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    for i in 0..4000 {
        region(b.handle(s, create(format!("{i:0>200}").as_bytes())));
    }
    for max in [1, 8, 9] {
        let Reply::List(page) = b.handle(s, Request::List { from: 3, max }).result.unwrap() else {
            panic!()
        };
        let ids: Vec<u64> = page.iter().map(|r| r.id).collect();
        assert_eq!(ids, (3..3 + u64::from(max)).collect::<Vec<u64>>());
    }
    let (mut from, mut count, mut pages) = (0, 0, 0);
    let max = u32::MAX;
    loop {
        let Reply::List(page) = b.handle(s, Request::List { from, max }).result.unwrap() else {
            panic!()
        };
        let Some(last) = page.last() else { break };
        from = last.id + 1;
        count += page.len();
        pages += 1;
    }
    assert_eq!(count, 4000);
    assert!(pages > 1);
}

#[test]
fn resuming_needs_the_pool_and_the_regions() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "g", Policy::Rw);
    let id = make(&mut b, s, b"a", GIB, 4 * MIB);
    let unsized_id = region(b.handle(s, create(b"u"))).id;
    let uuid = b.geometry().uuid;
    let role = |policy| Role::Guest {
        name: "r".to_owned(),
        policy,
    };
    let mut resume = Resume {
        uuid,
        attached: vec![id],
        created: vec![unsized_id, 999],
    };
    let (r, events) = b.resume(role(Policy::Rw), &resume).unwrap();
    assert!(events.is_empty());
    b.disconnect(s);
    assert!(!gone(&mut b, r, unsized_id), "it has a new owner");
    let (_, events) = b.resume(role(Policy::Private), &resume).unwrap();
    assert_eq!(events.len(), 1, "it must drop all translations");
    resume.attached.push(unsized_id);
    let failure = b.resume(role(Policy::Rw), &resume).unwrap_err();
    assert_eq!(failure.errno, Errno::STALE.raw_os_error());
    resume.uuid[0] ^= 1;
    let failure = b.resume(role(Policy::Rw), &resume).unwrap_err();
    assert_eq!(failure.errno, Errno::NXIO.raw_os_error());
}

/// A pool whose broker was killed while guest `stays` had an unlinked region
/// attached; the region and that guest's mark.
fn orphaned(policy: Policy) -> (PoolFiles, u64, std::os::fd::OwnedFd) {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "stays", policy);
    let mark = marks::for_client(b.files().directory(), b.generation()).unwrap();
    let id = make(&mut b, s, b"a", GIB, 4 * MIB);
    region(b.handle(s, Request::Attach { id }));
    let request = Request::Unlink {
        name: b"a".to_vec(),
        id: None,
    };
    b.handle(s, request).result.unwrap();
    (b.files().try_clone().unwrap(), id, mark)
}

#[test]
fn what_a_client_holds_that_has_not_resumed_is_kept_until_it_is_dead() {
    let (files, id, mark) = orphaned(Policy::Rw);
    let mut b = Broker::recover(files, 100).unwrap();
    let s = guest(&mut b, "other", Policy::Rw);
    assert!(!b.settle());
    b.end_grace();
    assert!(
        !b.settle() && !gone(&mut b, s, id),
        "its guest may be alive"
    );
    // A broker after this one knows it too.
    let mut b = Broker::recover(b.files().try_clone().unwrap(), 100).unwrap();
    let s = guest(&mut b, "other", Policy::Rw);
    b.end_grace();
    assert!(!b.settle() && !gone(&mut b, s, id));
    let next = make(&mut b, s, b"next", 2 * GIB, 4 * MIB);
    let entries: Vec<u64> = b.directory.regions().map(|e| e.data_off).collect();
    assert_eq!(entries, [0, 4 * MIB], "the range is not given to another");
    drop(mark);
    assert!(b.settle() && gone(&mut b, s, id) && !gone(&mut b, s, next));
}

#[test]
fn a_client_that_does_not_know_that_it_has_resumed_may_come_again() {
    let (files, id, mark) = orphaned(Policy::Rw);
    let mut b = Broker::recover(files, 100).unwrap();
    let role = Role::Guest {
        name: "stays".to_owned(),
        policy: Policy::Rw,
    };
    let resume = Resume {
        uuid: b.geometry().uuid,
        attached: vec![id],
        created: vec![],
    };
    let (s, _) = b.resume(role.clone(), &resume).unwrap();
    b.disconnect(s);
    b.end_grace();
    assert!(!b.settle());
    let (s, _) = b.resume(role, &resume).unwrap();
    b.confirm(s);
    marks::set(mark.as_fd(), b.generation()).unwrap();
    assert!(b.settle() && !gone(&mut b, s, id));
    b.disconnect(s);
    assert_empty(&b);
}

#[test]
fn a_right_is_not_gone_while_a_private_guest_has_not_resumed() {
    let (files, id, mark) = orphaned(Policy::Private);
    let mut b = Broker::recover(files, 100).unwrap();
    let s = b.connect(Role::Admin).unwrap();
    let protect = Request::Protect {
        id,
        offset: 0,
        len: 4096,
        prot: Prot::Read,
    };
    assert!(b.awaits_resume(&protect));
    b.end_grace();
    assert!(!b.awaits_resume(&protect));
    let told = b.handle(s, protect.clone()).invalidate.unwrap();
    assert!(told.sessions.is_empty());
    let why = b.check_revoked(id, &[]).unwrap_err();
    assert_eq!(why.errno, Errno::TIMEDOUT.raw_os_error());
    assert!(why.message.contains("1 not seen"), "{why}");
    drop(mark);
    assert!(b.settle());
    assert_eq!(b.check_revoked(id, &[]), Ok(()));
}

#[test]
fn a_name_that_a_missing_creator_may_claim_exists() {
    let mut b = broker(64 * MIB);
    let s = guest(&mut b, "creator", Policy::Rw);
    let mark = marks::for_client(b.files().directory(), b.generation()).unwrap();
    let id = region(b.handle(s, create(b"a"))).id;
    let recover = |b: &Broker| Broker::recover(b.files().try_clone().unwrap(), 100).unwrap();
    let mut b = recover(&b);
    let other = guest(&mut b, "other", Policy::Rw);
    assert!(b.awaits_resume(&create(b"a")) && !b.awaits_resume(&create(b"b")));
    b.end_grace();
    assert!(!b.settle() && !b.awaits_resume(&create(b"a")));
    assert_eq!(errno(b.handle(other, create(b"a"))).0, Errno::EXIST);
    let resume = Resume {
        uuid: b.geometry().uuid,
        attached: vec![],
        created: vec![id],
    };
    let role = Role::Guest {
        name: "creator".to_owned(),
        policy: Policy::Rw,
    };
    let (back, _) = b.resume(role, &resume).unwrap();
    let (start, len) = (GIB, 4 * MIB);
    region(b.handle(back, Request::Size { id, start, len }));
    // Of a creator that is dead, nothing stays.
    let unclaimed = region(b.handle(back, create(b"c"))).id;
    let mut b = recover(&b);
    let other = guest(&mut b, "other", Policy::Rw);
    drop(mark);
    assert!(b.settle() && gone(&mut b, other, unclaimed));
    region(b.handle(other, create(b"c")));
}
