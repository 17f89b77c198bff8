//! The device ABI and that of programs as Rust and as C sees them: the same
//! constants, sizes and offsets. The kernel series carries exactly the generated
//! header of the device; that of programs is the series' own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod header;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use mshare_protocol::device::*;
use mshare_protocol::msharefs::*;

/// Every name the C program prints, with the value Rust has for it.
type Facts = BTreeMap<String, u64>;

/// Lists the fields of structures: their facts, and the C lines that print
/// the same. The sizes of the listed fields must fill the structure, so that
/// a field left out here or padding in C fails the test.
macro_rules! layout {
    ($facts:ident, $c:ident, $($ty:ident { $($field:ident as $cname:literal: $fty:ty),* $(,)? })*) => {$(
        let mut filled = 0;
        $(
            filled += size_of::<$fty>();
            fact(&mut $facts, &mut $c,
                concat!("offsetof(struct ", stringify!($ty), ", ", $cname, ")"),
                offset_of!($ty, $field) as u64);
            fact(&mut $facts, &mut $c,
                concat!("sizeof(((struct ", stringify!($ty), " *)0)->", $cname, ")"),
                size_of::<$fty>() as u64);
        )*
        assert_eq!(filled, size_of::<$ty>(), "{}: a field is not listed", stringify!($ty));
        fact(&mut $facts, &mut $c, concat!("sizeof(struct ", stringify!($ty), ")"),
            size_of::<$ty>() as u64);
    )*};
}

macro_rules! constants {
    ($facts:ident, $c:ident, $($name:ident),* $(,)?) => {$(
        #[allow(clippy::cast_lossless)] // some constants are usize
        fact(&mut $facts, &mut $c, stringify!($name), $name as u64);
    )*};
}

fn fact(facts: &mut Facts, c: &mut String, expression: &str, value: u64) {
    facts.insert(expression.to_owned(), value);
    writeln!(
        c,
        "\tprintf(\"%s=%llu\\n\", \"{expression}\", (unsigned long long){expression});"
    )
    .unwrap();
}

#[test]
fn c_and_rust_agree_on_every_constant_size_and_offset() {
    use zerocopy::little_endian::{U32, U64};

    let mut facts = Facts::new();
    let mut c = String::new();
    layout! { facts, c,
        virtio_mshare_config {
            window_gpa as "window_gpa": U64, window_len as "window_len": U64,
            table_len as "table_len": U64, data_off as "data_off": U64,
            data_len as "data_len": U64, pool_uuid as "pool_uuid": [u8; 16],
        }
        virtio_mshare_req {
            r#type as "type": U32, flags as "flags": U32, id as "id": U64,
            addr as "addr": U64, len as "len": U64, mode as "mode": U32,
            uid as "uid": U32, gid as "gid": U32, prot as "prot": U32,
            name_len as "name_len": U32, reserved as "reserved": U32,
            name as "name": [u8; VIRTIO_MSHARE_NAME_LEN],
        }
        virtio_mshare_region {
            id as "id": U64, start as "start": U64, len as "len": U64,
            link_gpa as "link_gpa": U64, data_gpa as "data_gpa": U64,
            resident as "resident": U64, table_bytes as "table_bytes": U64,
            flags as "flags": U32, mode as "mode": U32, uid as "uid": U32,
            gid as "gid": U32, attached as "attached": U32, reserved as "reserved": U32,
        }
        virtio_mshare_resp {
            status as "status": U32, reserved as "reserved": U32,
            region as "region": virtio_mshare_region,
        }
        virtio_mshare_dirent {
            id as "id": U64, name_len as "name_len": U32, reserved as "reserved": U32,
            name as "name": [u8; VIRTIO_MSHARE_NAME_LEN],
        }
        virtio_mshare_list {
            status as "status": U32, count as "count": U32,
            entry as "entry": [virtio_mshare_dirent; VIRTIO_MSHARE_LIST_MAX],
        }
        virtio_mshare_event {
            r#type as "type": U32, reserved as "reserved": U32, id as "id": U64,
            offset as "offset": U64, len as "len": U64, seq as "seq": U64,
        }
        virtio_mshare_ack { seq as "seq": U64 }
    }
    constants! { facts, c,
        VIRTIO_ID_MSHARE, VIRTIO_MSHARE_F_TABLES, VIRTIO_MSHARE_F_FORCED, VIRTIO_MSHARE_F_WRITE, VIRTIO_MSHARE_F_HUGE,
        VIRTIO_MSHARE_SHM_ID, VIRTIO_MSHARE_VQ_CTRL, VIRTIO_MSHARE_VQ_EVENT, VIRTIO_MSHARE_VQ_ACK,
        VIRTIO_MSHARE_VQ_MAX, VIRTIO_MSHARE_NAME_MAX, VIRTIO_MSHARE_NAME_LEN,
        VIRTIO_MSHARE_T_LOOKUP, VIRTIO_MSHARE_T_CREATE, VIRTIO_MSHARE_T_SIZE,
        VIRTIO_MSHARE_T_ATTACH, VIRTIO_MSHARE_T_DETACH, VIRTIO_MSHARE_T_PROTECT,
        VIRTIO_MSHARE_T_DISCARD, VIRTIO_MSHARE_T_UNLINK, VIRTIO_MSHARE_T_STAT,
        VIRTIO_MSHARE_T_LIST, VIRTIO_MSHARE_REQ_EXCL, VIRTIO_MSHARE_R_SIZED,
        VIRTIO_MSHARE_R_TABLES, VIRTIO_MSHARE_R_RDONLY, VIRTIO_MSHARE_R_UNLINKED,
        VIRTIO_MSHARE_PROT_READ, VIRTIO_MSHARE_PROT_WRITE, VIRTIO_MSHARE_E_INVALIDATE,
        VIRTIO_MSHARE_E_REVOKED, VIRTIO_MSHARE_LIST_MAX,
    }
    let text = header::generate();
    for define in text
        .lines()
        .filter_map(|l| l.strip_prefix("#define VIRTIO_"))
    {
        let name = format!("VIRTIO_{}", define.split(' ').next().unwrap());
        assert!(facts.contains_key(&name), "{name} is not compared");
    }

    let from_c = run_c(&text, &c);

    assert_eq!(from_c, facts);
}

#[test]
fn programs_and_the_series_agree_on_ioctls() {
    let mut facts = Facts::new();
    let mut c = String::new();
    layout! { facts, c,
        mshare_protect { offset as "offset": u64, len as "len": u64, prot as "prot": u32,
            flags as "flags": u32 }
        mshare_discard { offset as "offset": u64, len as "len": u64 }
        mshare_info {
            start as "start": u64, len as "len": u64, id as "id": u64,
            resident as "resident": u64, table_bytes as "table_bytes": u64,
            flags as "flags": u32, mappings as "mappings": u32,
            machines as "machines": u32, reserved as "reserved": u32,
            swapped as "swapped": u64, huge as "huge": u64, faults as "faults": u64,
        }
    }
    constants! { facts, c,
        MSHARE_IOC_PROTECT, MSHARE_IOC_DISCARD, MSHARE_IOC_INFO, MSHARE_INFO_SIZED,
        MSHARE_INFO_TABLES, MSHARE_INFO_RDONLY, MSHARE_INFO_UNLINKED, MSHARE_INFO_POOL,
    }
    let text = file_of_series("include/uapi/linux/mshare.h");
    for define in text
        .lines()
        .filter_map(|l| l.strip_prefix("#define MSHARE_"))
    {
        let name = define.split_whitespace().next().unwrap();
        assert!(
            facts.contains_key(&format!("MSHARE_{name}")),
            "MSHARE_{name} is not compared"
        );
    }
    let table = lines_added_to("arch/x86/entry/syscalls/syscall_64.tbl");
    for (number, name) in [(SYS_MSHARE, "mshare"), (SYS_MSHARE_UNLINK, "mshare_unlink")] {
        let line = format!("{number} 64 {name} sys_{name}");
        assert!(table.contains(&line), "no '{line}' among {table:?}");
    }

    let from_c = run_c(&text, &c);

    assert_eq!(from_c, facts);
}

/// The patches of the series, in order.
fn series() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/kernel/patches");
    let entries = std::fs::read_dir(&dir).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let text = |path| std::fs::read_to_string(path).unwrap();
    paths.into_iter().map(text).collect()
}

/// What a patch does to a file: from its "---" line on.
fn part_of<'a>(patch: &'a str, name: &str) -> Option<&'a str> {
    let at = patch.find(&format!("\n+++ b/{name}\n"))?;
    let start = patch[..at].rfind("\n--- ")? + 1;
    let end = patch[at..].find("\ndiff --git ");
    Some(end.map_or(&patch[start..], |end| &patch[start..=at + end]))
}

/// A file that the series adds, as its last patch leaves it.
fn file_of_series(name: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    for patch in series() {
        let Some(part) = part_of(&patch, name) else {
            continue;
        };
        std::fs::write(dir.path().join("part"), part).unwrap();
        let output = Command::new("patch")
            .args(["-p1", "--fuzz=0", "-i", "part"])
            .current_dir(&dir)
            .output()
            .expect("patch is installed");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
    }
    std::fs::read_to_string(dir.path().join(name)).unwrap()
}

/// The lines that the series adds to a file, words separated by one space.
fn lines_added_to(name: &str) -> Vec<String> {
    let mut added = Vec::new();
    for patch in series() {
        let part = part_of(&patch, name).unwrap_or_default();
        let lines = part.lines().filter_map(|line| line.strip_prefix('+'));
        added.extend(lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    added
}

/// Compiles and runs `body` as the main function of a program that includes
/// the header, and reads the `name=value` lines it prints.
fn run_c(header: &str, body: &str) -> Facts {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("header.h"), header).unwrap();
    std::fs::write(
        dir.path().join("abi.c"),
        format!(
            "#include <stddef.h>\n#include <stdio.h>\n#include \"header.h\"\n\
             int main(void)\n{{\n{body}\treturn 0;\n}}\n"
        ),
    )
    .unwrap();
    let program = dir.path().join("abi");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-Wpadded", "-o"])
        .arg(&program)
        .arg(dir.path().join("abi.c"))
        .output()
        .expect("cc is installed");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let output = Command::new(&program).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            let (name, value) = line.rsplit_once('=').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn kernel_series_carries_the_generated_header() {
    let patches = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/kernel/patches");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&patches).unwrap() {
        let path = entry.unwrap().path();
        let patch = std::fs::read_to_string(&path).unwrap();
        if let Some(text) = added_file(&patch, "include/uapi/linux/virtio_mshare.h") {
            found.push((path, text));
        }
    }
    let [(path, text)] = found.as_slice() else {
        panic!("one patch adds the header, not {}", found.len());
    };

    assert!(
        *text == header::generate(),
        "{}: the header differs from the output of \
         'cargo run -p mshare-protocol --example gen-header'",
        path.display()
    );
}

/// The text of a file that `patch` adds.
fn added_file(patch: &str, name: &str) -> Option<String> {
    let start = patch.find(&format!("\n--- /dev/null\n+++ b/{name}\n"))? + 1;
    let mut text = String::new();
    for line in patch[start..].lines().skip(3) {
        match line.strip_prefix('+') {
            Some(added) => {
                text.push_str(added);
                text.push('\n');
            }
            None => break,
        }
    }
    Some(text)
}
