//! The commands that a person types, in a guest and on the host.

use std::process::{Command, Stdio};

use mshare_tests::guests::Guest;

use crate::common::*;

/// `guest-agent` in the guest: its status and what it prints.
fn inside(guest: &mut Guest, args: &str) -> (i32, String) {
    let argv: Vec<_> = ["guest-agent"].into_iter().chain(args.split(' ')).collect();
    let result = guest.agent.exec(&argv).unwrap();
    let said = [result.stdout, result.stderr].concat();
    (result.status, String::from_utf8_lossy(&said).into_owned())
}

/// `vmm agent` on the host: its status and what it prints.
fn outside(pool: &Pool, guest: &Guest, args: &str) -> (i32, String) {
    let output = Command::new(&pool.images.vmm)
        .args(["agent", "--socket"])
        .arg(&guest.vsock)
        .args(args.split(' '))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let status = output.status.code().unwrap();
    (status, String::from_utf8_lossy(&said).into_owned())
}

fn expect((status, said): (i32, String), wanted: i32, words: &str) {
    assert_eq!(status, wanted, "{said}");
    assert!(said.contains(words), "{words:?} is not in: {said}");
}

#[test]
fn guest_agent_by_hand_creates_uses_and_unlinks_a_region() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    for name in ["pool/hand", "hand"] {
        let region = format!("{name} --address 0x100000000000 --len 2M");
        let mut run = |args: &str| inside(&mut a, &args.replace("NAME", name));
        expect(run(&format!("mshare create {region}")), 0, "0x100000000000");
        expect(run(&format!("mshare create {region}")), 1, "File exists");
        let listed = format!("0x100000000000 0x200000 {name}\n");
        expect(run("mshare list"), 0, &listed);
        expect(run("mshare attach NAME"), 0, "at 0x100000000000");
        expect(run("mshare info NAME"), 0, "0x200000 bytes");
        expect(
            run("work NAME -n 2 zero fill verify read write"),
            0,
            "all right",
        );
        expect(run("work NAME --ro -n 1 write"), 1, "signal 11");
        let spin = "work NAME -n 2 --hold 1 spin-write hold status stop figures";
        expect(run(spin), 0, "stopped after");
        expect(run("mshare protect NAME --len 4K --prot r"), 0, "done");
        expect(
            run("work NAME -n 1 --hold 1 spin-write hold stop"),
            1,
            "by signal 11",
        );
        expect(run("mshare discard NAME --len 2M"), 0, "done");
        expect(run("work NAME -n 1 zero"), 0, "all right");
        expect(run("mshare unlink NAME"), 0, "done");
        expect(run("mshare unlink NAME"), 1, "No such file");
        expect(run("mshare info NAME"), 1, "No such file");
    }
    expect(inside(&mut a, "figures"), 0, "PageTables");
    assert_quiet(&mut a);
}

#[test]
fn vmm_agent_by_hand_spins_in_one_guest_and_protects_from_another() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let b = pool.guest("b", "rw");
    let ask_a = |args: &str| outside(&pool, &a, args);
    let ask_b = |args: &str| outside(&pool, &b, args);
    expect(ask_a("ping"), 0, "pool      yes");
    let create = "mshare create pool/hand --address 0x100000000000 --len 4M";
    expect(ask_a(create), 0, "0x100000000000");
    expect(ask_a(create), 1, "File exists");
    expect(ask_b("group start g --region pool/hand -n 2"), 0, "at 0x");
    expect(
        ask_b("group spin write g --process 0 --offset 2M"),
        0,
        "done",
    );
    expect(
        ask_b("group spin read g --process 1 --offset 2M"),
        0,
        "done",
    );
    eventually("B writes", || pool.word("hand", 2 * MIB) > 1000);
    expect(ask_b("group spin-status g"), 0, "spinning after");
    let protect = "mshare protect pool/hand --offset 2M --len 4K --prot r";
    expect(ask_a(protect), 0, "done");
    expect(ask_b("group spin-stop g --process 0"), 1, "by signal 11");
    expect(ask_b("group spin-stop g --process 1"), 0, "stopped after");
    expect(ask_a("mshare info pool/hand"), 0, "shared tables");
    expect(ask_a("mshare discard pool/hand --len 2M"), 0, "done");
    expect(ask_b("group kill g"), 0, "signal 9");
    expect(ask_a("mshare unlink pool/hand"), 0, "done");
    expect(ask_b("mshare info pool/hand"), 1, "No such file");
    expect(ask_b("dmesg --complaints"), 0, "");
    assert_quiet(&mut a);
    expect(outside(&pool, &b, "poweroff"), 0, "");
}
