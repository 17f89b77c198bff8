//! Every errno of the system calls and of msharefs, as
//! docs/system-calls.md lists them.

use mshare_protocol::agent::{BadCall, Map, MemOp, Op, PathOp, Probe, RegionOp, Value};
use mshare_tests::guests::Guest;

use crate::common::*;

pub const RW: i32 = libc::O_RDWR;
const CREATE: i32 = libc::O_RDWR | libc::O_CREAT;
const LEN: u64 = 4 * MIB;

pub fn mshare(name: &str, addr: u64, len: u64, oflag: i32) -> Op {
    Op::Map {
        slot: 0,
        map: Map::Mshare {
            name: name.to_owned(),
            addr,
            len,
            oflag,
            mode: 0o600,
        },
    }
}

/// What the system calls say to each wrong call.
fn check(guest: &mut Guest, cases: &[(&str, Op, i32)]) {
    for (what, op, expected) in cases {
        let errno = match guest.agent.once(op.clone()) {
            Ok(_) => 0,
            Err(error) => error.errno().unwrap_or_else(|| {
                let log = guest.agent.complaints();
                panic!("{what}: not a system call's error: {error}; {log:?}")
            }),
        };
        assert_eq!(errno, *expected, "{what}");
    }
}

#[test]
fn mshare_refuses_wrong_arguments() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let long = format!("pool/{}", "x".repeat(256));
    let longer = "x".repeat(300);
    check(
        &mut a,
        &[
            ("no such region", mshare("pool/r", 0, 0, RW), libc::ENOENT),
            (
                "write-only",
                mshare("pool/r", START, LEN, libc::O_WRONLY | libc::O_CREAT),
                libc::EINVAL,
            ),
            (
                "unknown flag",
                mshare("pool/r", START, LEN, CREATE | libc::O_TRUNC),
                libc::EINVAL,
            ),
            (
                "odd address",
                mshare("pool/r", START + PAGE, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "address not 1 GiB aligned",
                mshare("pool/r", START + 2 * MIB, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "odd length",
                mshare("pool/r", START, LEN + PAGE, CREATE),
                libc::EINVAL,
            ),
            (
                "new region without address",
                mshare("pool/r", 0, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "new region without length",
                mshare("pool/r", START, 0, CREATE),
                libc::EINVAL,
            ),
            (
                "wild length",
                mshare("pool/r", START, !0 << 21, CREATE),
                libc::EINVAL,
            ),
            (
                "beyond user space",
                mshare("pool/r", 1 << 47, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "longer than the pool",
                mshare("pool/r", START, 2 * GIB, CREATE),
                libc::ENOSPC,
            ),
            (
                "a name with a slash",
                mshare("pool/a/b", START, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "an absolute name",
                mshare("/pool/r", START, LEN, CREATE),
                libc::EINVAL,
            ),
            (
                "the directory itself",
                mshare("pool/", START, LEN, CREATE),
                libc::EINVAL,
            ),
            ("dot", mshare("pool/.", START, LEN, CREATE), libc::EINVAL),
            (
                "dot dot",
                mshare("pool/..", START, LEN, CREATE),
                libc::EINVAL,
            ),
            ("no name", mshare("", START, LEN, CREATE), libc::ENOENT),
            (
                "256 bytes",
                mshare(&long, START, LEN, CREATE),
                libc::ENAMETOOLONG,
            ),
            (
                "300 bytes",
                mshare(&longer, START, LEN, CREATE),
                libc::ENAMETOOLONG,
            ),
            (
                "a bad name pointer",
                Op::BadCall(BadCall::MshareName),
                libc::EFAULT,
            ),
            (
                "a local region without a length",
                mshare("local", START, 0, CREATE),
                libc::EINVAL,
            ),
            (
                "no such local region",
                mshare("local", 0, 0, RW),
                libc::ENOENT,
            ),
        ],
    );
    assert!(
        mshare_pool::admin::list(&pool.admin).unwrap().is_empty(),
        "nothing is left behind"
    );
    assert_eq!(pool.admin.pool_stat().unwrap().regions, 0);
    assert_quiet(&mut a);
}

#[test]
fn longest_name_works() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let name = format!("pool/{}", "x".repeat(255));
    a.agent.create(&name, START, LEN).unwrap();
    let names = a.agent.list_dir("/sys/fs/mshare/pool").unwrap();
    assert_eq!(names, ["x".repeat(255)]);
}

#[test]
fn mshare_refuses_what_does_not_fit_an_existing_region() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    let excl = CREATE | libc::O_EXCL;
    for guest in [&mut a, &mut b] {
        check(
            guest,
            &[
                (
                    "exclusive creation",
                    mshare("pool/r", START, LEN, excl),
                    libc::EEXIST,
                ),
                (
                    "another address",
                    mshare("pool/r", START + GIB, LEN, RW),
                    libc::EINVAL,
                ),
                (
                    "another length",
                    mshare("pool/r", START, 2 * LEN, RW),
                    libc::EINVAL,
                ),
                (
                    "creation with another length",
                    mshare("pool/r", START, 2 * LEN, CREATE),
                    libc::EINVAL,
                ),
                (
                    "overlapping addresses",
                    mshare("pool/s", START, LEN, CREATE),
                    libc::EADDRINUSE,
                ),
            ],
        );
        // An equal creation attaches, as shm_open does.
        assert_eq!(errno_of(guest, mshare("pool/r", START, LEN, CREATE)), 0);
    }
    // A second attach of one process meets its own mapping.
    let second = Op::Map {
        slot: 1,
        map: Map::attach("pool/r"),
    };
    let error = a.agent.run_one("w", 0, second).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
    // So does one whose range is taken by something else; that stays.
    a.agent.start_group("anon", 1, None).unwrap();
    let map = Map::Anonymous {
        addr: START + 512 * MIB,
        len: PAGE,
    };
    a.agent
        .run_one("anon", 0, Op::Map { slot: 0, map })
        .unwrap();
    store(&mut a, "anon", 0, 99);
    let attach = Op::Map {
        slot: 1,
        map: Map::attach("pool/r"),
    };
    let error = a.agent.run_one("anon", 0, attach).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
    assert_eq!(load(&mut a, "anon", 0), 99);
    assert_eq!(mshare_pool::admin::list(&pool.admin).unwrap().len(), 1);
    assert_quiet(&mut a);
}

#[test]
fn unlink_refuses_what_is_not_there() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let unlink = |name: &str| {
        Op::Region(RegionOp::Unlink {
            name: name.to_owned(),
        })
    };
    let long = format!("pool/{}", "x".repeat(256));
    check(
        &mut a,
        &[
            ("no such region", unlink("pool/r"), libc::ENOENT),
            ("no such local region", unlink("local"), libc::ENOENT),
            ("a name with a slash", unlink("pool/a/b"), libc::EINVAL),
            ("dot dot", unlink("pool/.."), libc::EINVAL),
            ("256 bytes", unlink(&long), libc::ENAMETOOLONG),
            (
                "a bad pointer",
                Op::BadCall(BadCall::UnlinkName),
                libc::EFAULT,
            ),
        ],
    );
}

#[test]
fn permissions_are_those_of_the_mode_bits() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    let create = Op::Map {
        slot: 0,
        map: Map::Mshare {
            name: "pool/r".to_owned(),
            addr: START,
            len: LEN,
            oflag: CREATE,
            mode: 0o644,
        },
    };
    a.agent.once(create).unwrap();
    b.agent.start_group("user", 1, None).unwrap();
    let user = Op::SetUser {
        uid: 1000,
        gid: 1000,
    };
    b.agent.run_one("user", 0, user).unwrap();
    let mut as_user = |op: Op| match b.agent.run_one("user", 0, op) {
        Ok(_) => 0,
        Err(error) => error.errno().unwrap(),
    };
    assert_eq!(as_user(mshare("pool/r", 0, 0, RW)), libc::EACCES);
    let unlink = Op::Region(RegionOp::Unlink {
        name: "pool/r".to_owned(),
    });
    assert_eq!(as_user(unlink), libc::EPERM, "sticky directory");
    assert_eq!(as_user(mshare("pool/r", 0, 0, libc::O_RDONLY)), 0);
    let stat = Op::Path {
        path: "/sys/fs/mshare/pool/r".to_owned(),
        op: PathOp::Stat,
    };
    let Value::Stat(stat) = b.agent.once(stat).unwrap() else {
        panic!("no stat")
    };
    assert_eq!((stat.mode & 0o777, stat.uid, stat.size), (0o644, 0, LEN));
}

#[test]
fn protect_and_discard_refuse_wrong_ranges() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent.create("pool/r", START, LEN).unwrap();
    let protect = |offset, len, prot| {
        Op::Region(RegionOp::Protect {
            name: "pool/r".to_owned(),
            offset,
            len,
            prot,
        })
    };
    let discard = |offset, len| {
        Op::Region(RegionOp::Discard {
            name: "pool/r".to_owned(),
            offset,
            len,
        })
    };
    let arg = BadCall::ProtectArg {
        name: "pool/r".to_owned(),
    };
    check(
        &mut a,
        &[
            ("odd offset", protect(1, PAGE, 1), libc::EINVAL),
            ("odd length", protect(0, 1, 1), libc::EINVAL),
            ("no length", protect(0, 0, 1), libc::EINVAL),
            ("beyond the end", protect(LEN, PAGE, 1), libc::EINVAL),
            (
                "across the end",
                protect(LEN - PAGE, 2 * PAGE, 1),
                libc::EINVAL,
            ),
            ("wild length", protect(PAGE, !0xfff, 1), libc::EINVAL),
            ("write without read", protect(0, PAGE, 2), libc::EINVAL),
            ("execute", protect(0, PAGE, 5), libc::EINVAL),
            ("a bad pointer", Op::BadCall(arg), libc::EFAULT),
            ("discard, odd offset", discard(1, PAGE), libc::EINVAL),
            (
                "discard, across the end",
                discard(LEN - PAGE, 2 * PAGE),
                libc::EINVAL,
            ),
            ("discard, no length", discard(0, 0), libc::EINVAL),
            ("a right one", protect(0, PAGE, 1), 0),
        ],
    );
    let ioctl = |oflag, request| {
        Op::BadCall(BadCall::Ioctl {
            name: "pool/r".to_owned(),
            oflag,
            request,
            words: vec![0, PAGE, 1],
        })
    };
    assert_eq!(errno_of(&mut a, ioctl(RW, 0x4d7f)), libc::ENOTTY);
}

#[test]
fn msharefs_does_what_a_shm_directory_does_and_no_more() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent.create("pool/r", START, LEN).unwrap();
    let path = |path: &str, op| Op::Path {
        path: format!("/sys/fs/mshare/{path}"),
        op,
    };
    let open = |flags| PathOp::Open { flags, mode: 0o600 };
    let mut errno = |op| errno_of(&mut a, op);
    assert_eq!(errno(path("pool/r", open(RW))), 0);
    assert_eq!(errno(path("pool/none", open(RW))), libc::ENOENT);
    let to = || "/sys/fs/mshare/pool/s".to_owned();
    for (what, op) in [
        ("mkdir", path("pool/d", PathOp::Mkdir)),
        ("rmdir", path("pool", PathOp::Rmdir)),
        ("rename", path("pool/r", PathOp::Rename { to: to() })),
        ("link", path("pool/r", PathOp::Link { to: to() })),
        ("chmod", path("pool/r", PathOp::Chmod { mode: 0o666 })),
        ("truncate", path("pool/r", PathOp::Truncate { len: 0 })),
    ] {
        assert_eq!(errno(op), libc::EPERM, "{what}");
    }
    assert_eq!(errno(path("pool/r", PathOp::Unlink)), 0);
    assert_eq!(errno(path("pool/r", PathOp::Unlink)), libc::ENOENT);
    assert_quiet(&mut a);
}

#[test]
fn mmap_of_the_file_is_allowed_at_the_regions_place_only() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent.create("pool/r", START, LEN).unwrap();
    let mmap = |addr, len, prot, flags, offset| {
        Op::BadCall(BadCall::Mmap {
            name: "pool/r".to_owned(),
            addr,
            len,
            prot,
            flags,
            offset,
        })
    };
    let (rw, rwx) = (libc::PROT_READ | libc::PROT_WRITE, 7);
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    assert_eq!(errno_of(&mut a, mmap(START, GIB, rw, fixed, 0)), 0);
    assert_eq!(errno_of(&mut a, mmap(0, GIB, rw, libc::MAP_SHARED, 0)), 0);
    // Without a reserve: the guest has less than a GiB to commit.
    let private = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    let einval = libc::EINVAL;
    check(
        &mut a,
        &[
            (
                "another address",
                mmap(START + GIB, GIB, rw, fixed, 0),
                einval,
            ),
            ("another length", mmap(START, LEN, rw, fixed, 0), einval),
            ("an offset", mmap(START, GIB, rw, fixed, PAGE), einval),
            ("private", mmap(START, GIB, rw, private, 0), einval),
            ("executable", mmap(START, GIB, rwx, fixed, 0), libc::EPERM),
        ],
    );
}

#[test]
fn attached_range_refuses_changes_of_a_part() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    store(&mut a, "w", 0, 1234);
    let probe = |probe| at(0, MemOp::Probe(probe));
    let remap = |old_len, new_len, flags| Probe::Mremap {
        old_len,
        new_len,
        flags,
    };
    for (what, refused) in [
        (
            "mprotect",
            Probe::Mprotect {
                len: PAGE,
                prot: libc::PROT_READ,
            },
        ),
        ("partial munmap", Probe::Munmap { len: PAGE }),
        ("MAP_FIXED over a part", Probe::MmapFixed { len: PAGE }),
        ("mremap to grow", remap(GIB, 2 * GIB, libc::MREMAP_MAYMOVE)),
        ("mremap to shrink", remap(GIB, GIB / 2, 0)),
        (
            "mremap DONTUNMAP",
            remap(GIB, GIB, libc::MREMAP_MAYMOVE | 4),
        ),
        ("userfaultfd", Probe::Userfault { len: PAGE }),
    ] {
        let value = a.agent.run_one("w", 0, probe(refused)).unwrap();
        let Value::Probe(probed) = value else {
            panic!("{what}: {value:?}")
        };
        // As for any mapping that cannot be expanded.
        let errno = if what == "mremap to grow" {
            libc::EFAULT
        } else {
            libc::EINVAL
        };
        assert_eq!((probed.ret, probed.errno), (-1, errno), "{what}");
        assert_eq!(load(&mut a, "w", 0), 1234, "{what}");
    }
    assert_quiet(&mut a);
}

/// What a process meets that has run out of something.
#[test]
fn limits_of_the_system_are_told() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let sysctl = |a: &mut Guest, name: &str, value: &str| {
        let path = format!("/proc/sys/{name}");
        let before = a.agent.read_file(&path).unwrap();
        a.agent.write_file(&path, value.as_bytes()).unwrap();
        String::from_utf8(before).unwrap()
    };
    let create = Op::Map {
        slot: 0,
        map: Map::Mshare {
            name: "pool/r".to_owned(),
            addr: START,
            len: LEN,
            oflag: CREATE,
            mode: 0o644,
        },
    };
    a.agent.once(create).unwrap();
    // Root may exceed both limits.
    for group in ["files", "locked"] {
        a.agent.start_group(group, 1, None).unwrap();
    }
    let limit = Op::LockFuture { limit: MIB };
    a.agent.run_one("locked", 0, limit).unwrap();
    for group in ["files", "locked"] {
        let user = Op::SetUser {
            uid: 1000,
            gid: 1000,
        };
        a.agent.run_one(group, 0, user).unwrap();
    }
    let attach = |a: &mut Guest, group: &str| {
        let attach = mshare("pool/r", START, LEN, libc::O_RDONLY);
        let attached = a.agent.run_one(group, 0, attach);
        attached.map_or_else(|error| error.errno().unwrap(), |_| 0)
    };
    assert_eq!(attach(&mut a, "locked"), libc::EAGAIN, "MCL_FUTURE");
    // Not 1: a few files are less than what the kernel counts exactly.
    let before = sysctl(&mut a, "fs/file-max", "0");
    assert_eq!(attach(&mut a, "files"), libc::ENFILE, "file-max");
    sysctl(&mut a, "fs/file-max", before.trim());
    assert_eq!(attach(&mut a, "files"), 0);

    // Each other page of a local region gets rights of its own.
    a.agent.create("local", START + 8 * GIB, LEN).unwrap();
    let before = sysctl(&mut a, "vm/max_map_count", "200");
    let mut errnos = (0..LEN / PAGE / 2).map(|page| {
        let protect = RegionOp::Protect {
            name: "local".to_owned(),
            offset: 2 * page * PAGE,
            len: PAGE,
            prot: 1,
        };
        errno_of(&mut a, Op::Region(protect))
    });
    let first = errnos.find(|&errno| errno != 0);
    assert_eq!(first, Some(libc::ENOMEM), "max_map_count");
    sysctl(&mut a, "vm/max_map_count", before.trim());
    assert_quiet(&mut a);
}

/// Two guests make and unlink one name as fast as they can.
#[test]
fn names_that_come_and_go_get_documented_errnos_only() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    let churn = Op::Churn {
        name: "pool/r".to_owned(),
        addr: START,
        len: 2 * MIB,
        rounds: 100,
    };
    let results = std::thread::scope(|scope| {
        let both = [&mut a, &mut b].map(|guest| {
            let churn = churn.clone();
            scope.spawn(move || {
                guest.agent.start_group("c", 2, None).unwrap();
                guest.agent.run_all("c", churn).unwrap()
            })
        });
        both.map(|thread| thread.join().unwrap()).concat()
    });
    let mut of_mshare = std::collections::BTreeMap::new();
    let mut of_unlink = std::collections::BTreeMap::new();
    for value in results {
        let Value::Churned { mshare, unlink } = value else {
            panic!("{value:?}")
        };
        for (counts, sum) in [(mshare, &mut of_mshare), (unlink, &mut of_unlink)] {
            for (errno, count) in counts {
                *sum.entry(errno).or_insert(0) += count;
            }
        }
    }
    println!("errnos of mshare {of_mshare:?}, of mshare_unlink {of_unlink:?}");
    let allowed = [
        (
            &of_mshare,
            vec![
                0,
                libc::ESTALE,
                libc::EAGAIN,
                libc::EADDRINUSE,
                libc::ENOENT,
            ],
        ),
        (&of_unlink, vec![0, libc::ENOENT, libc::ESTALE]),
    ];
    for (seen, allowed) in allowed {
        assert!(seen.keys().all(|errno| allowed.contains(errno)), "{seen:?}");
        assert!(seen[&0] > 0, "{seen:?}");
    }
    // Nothing is left of it, and the name can be had.
    for guest in [&mut a, &mut b] {
        guest.agent.stop_group("c").unwrap();
    }
    let name = "pool/r".to_owned();
    let _ = a.agent.region(RegionOp::Unlink { name });
    eventually("all is gone", || {
        pool.admin.pool_stat().unwrap().regions == 0
    });
    a.agent.create("pool/r", START, LEN).unwrap();
    assert_quiet(&mut a);
    assert_quiet(&mut b);
}
