use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use tempfile::{NamedTempFile, tempdir};

use super::{Block, Disk, Error};
use crate::devices::virtio::test_utils::*;

const DATA: u64 = BUF + 0x1000;
const STATUS: u64 = BUF + 0x8_0000;
const SECTORS: u64 = 64;
const FLUSH: u64 = 1 << 9;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A file whose every sector holds its own number.
fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[u8::try_from(sector).unwrap(); 512])
            .unwrap();
    }
    file
}

struct Vm {
    guest: Guest,
    image: NamedTempFile,
}

fn vm(read_only: bool) -> Vm {
    let image = image();
    let disk = Disk::open(image.path(), read_only, "disk0").unwrap();
    let mut guest = Guest::new(|events| Block::new(disk, events));
    guest.boot(FLUSH);
    Vm { guest, image }
}

impl Vm {
    /// Makes a request with its data in `parts`; returns the status and the
    /// used length.
    fn request(&mut self, kind: u32, sector: u64, parts: &[(u64, u32, u16)]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.put(BUF, &header);
        self.guest.put(STATUS, &[0xee]);
        let mut chain = vec![(BUF, 16, 0)];
        chain.extend_from_slice(parts);
        chain.push((STATUS, 1, WRITE));
        let head = self.guest.queues[0].push(&chain);
        self.guest.notify(0);
        let (id, len) = self.guest.queues[0].pop_used().unwrap();
        assert_eq!(id, u32::from(head));
        (self.guest.get(STATUS, 1)[0], len)
    }

    fn sector(&self, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        self.image
            .as_file()
            .read_exact_at(&mut bytes, sector * 512)
            .unwrap();
        bytes
    }

    fn range(&mut self, kind: u32, range: (u64, u32, u32)) -> u8 {
        self.guest.put(DATA, &range.0.to_le_bytes());
        self.guest.put(DATA + 8, &range.1.to_le_bytes());
        self.guest.put(DATA + 12, &range.2.to_le_bytes());
        self.request(kind, 0, &[(DATA, 16, 0)]).0
    }
}

#[test]
fn open_refuses_what_is_no_disk_and_says_why() {
    let dir = tempdir().unwrap();
    let message = |path: &Path, read_only| Disk::open(path, read_only, "").unwrap_err().to_string();
    assert!(message(&dir.path().join("absent"), true).contains("absent"));
    assert!(message(dir.path(), true).contains("regular file"));
    for len in [0, 1, 511, 513] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let text = message(file.path(), false);
        assert!(text.contains(&format!("{len} bytes")), "{text}");
        assert!(text.contains("multiple of 512"), "{text}");
    }
}

#[test]
fn open_of_a_disk_in_use_is_refused_unless_all_read() {
    let image = image();
    let first = Disk::open(image.path(), false, "").unwrap();
    for read_only in [true, false] {
        let again = Disk::open(image.path(), read_only, "");
        assert!(matches!(again, Err(Error::InUse(_))));
    }
    drop(first);
    let _one = Disk::open(image.path(), true, "").unwrap();
    let _two = Disk::open(image.path(), true, "").unwrap();
    assert!(Disk::open(image.path(), false, "").is_err());
}

#[test]
fn config_space_holds_the_capacity() {
    let mut vm = vm(false);
    assert_eq!(vm.guest.read(0x100), 64);
    assert_eq!(vm.guest.read(0x104), 0);
    assert_eq!(vm.guest.read(0x114), 512);
}

#[test]
fn features_follow_read_only() {
    for (read_only, features) in [(true, 0x0000_0264), (false, 0x0000_6244)] {
        let mut vm = vm(read_only);
        vm.guest.write(0x14, 0);
        assert_eq!(vm.guest.read(0x10) & 0xfff_ffff, features);
    }
}

#[test]
fn read_gives_the_sectors() {
    let mut vm = vm(true);
    let parts = [(DATA, 512, WRITE), (DATA + 512, 512, WRITE)];
    assert_eq!(vm.request(0, 5, &parts), (OK, 1025));
    assert_eq!(vm.guest.get(DATA, 512), [5; 512]);
    assert_eq!(vm.guest.get(DATA + 512, 512), [6; 512]);
}

#[test]
fn read_with_unusual_framing_gives_the_sectors() {
    let mut vm = vm(true);
    let parts = [(DATA, 1, WRITE), (DATA + 1, 500, WRITE), (HIGH, 11, WRITE)];
    assert_eq!(vm.request(0, 7, &parts), (OK, 513));
    assert_eq!(vm.guest.get(DATA, 501), [7; 501]);
    assert_eq!(vm.guest.get(HIGH, 11), [7; 11]);
}

#[test]
fn write_reaches_the_file() {
    let mut vm = vm(false);
    vm.guest.put(DATA, &[0xaa; 1024]);
    assert_eq!(vm.request(1, 10, &[(DATA, 1024, 0)]), (OK, 1));
    assert_eq!(vm.sector(9), [9; 512]);
    assert_eq!(vm.sector(10), [0xaa; 512]);
    assert_eq!(vm.sector(11), [0xaa; 512]);
    assert_eq!(vm.sector(12), [12; 512]);
    assert_eq!(vm.request(4, 0, &[]), (OK, 1));
}

#[test]
fn whole_disk_in_one_request_is_served() {
    let mut vm = vm(false);
    let len = u32::try_from(SECTORS * 512).unwrap();
    assert_eq!(vm.request(0, 0, &[(DATA, len, WRITE)]), (OK, len + 1));
    vm.guest.put(DATA, &[3; 512]);
    assert_eq!(vm.request(1, 0, &[(DATA, len, 0)]), (OK, 1));
    assert_eq!(vm.sector(0), [3; 512]);
    assert_eq!(vm.sector(63), [63; 512]);
}

#[test]
fn ranges_off_the_disk_fail_without_an_effect() {
    let mut vm = vm(false);
    vm.guest.put(DATA, &[0xaa; 1024]);
    for (sector, len) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 1),
    ] {
        assert_eq!(vm.request(0, sector, &[(DATA, len, WRITE)]), (IOERR, 1));
        assert_eq!(vm.request(1, sector, &[(DATA, len, 0)]), (IOERR, 1));
    }
    assert_eq!(vm.sector(63), [63; 512]);
    assert_eq!(vm.sector(0), [0; 512]);
}

#[test]
fn read_only_disk_refuses_every_change() {
    let mut vm = vm(true);
    assert_eq!(vm.request(1, 1, &[(DATA, 512, 0)]).0, IOERR);
    assert_eq!(vm.range(11, (1, 1, 0)), IOERR);
    assert_eq!(vm.range(13, (1, 1, 0)), IOERR);
    assert_eq!(vm.sector(1), [1; 512]);
}

#[test]
fn get_id_gives_the_id() {
    let mut vm = vm(true);
    assert_eq!(vm.request(8, 0, &[(DATA, 20, WRITE)]), (OK, 21));
    assert_eq!(
        vm.guest.get(DATA, 20),
        *b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn unknown_request_is_unsupported() {
    let mut vm = vm(false);
    for kind in [2, 3, 14, 99, u32::MAX] {
        assert_eq!(vm.request(kind, 0, &[(DATA, 512, WRITE)]), (UNSUPP, 1));
    }
}

#[test]
fn discard_and_write_zeroes_clear_their_range_only() {
    let mut vm = vm(false);
    assert_eq!(vm.range(11, (8, 8, 0)), OK);
    assert_eq!(vm.range(13, (24, 8, 0)), OK);
    assert_eq!(vm.range(13, (41, 1, 1)), OK);
    assert_eq!(vm.sector(7), [7; 512]);
    assert_eq!(vm.sector(16), [16; 512]);
    assert_eq!(vm.sector(24), [0; 512]);
    assert_eq!(vm.sector(31), [0; 512]);
    assert_eq!(vm.sector(32), [32; 512]);
    assert_eq!(vm.sector(41), [0; 512]);
    assert_eq!(vm.sector(42), [42; 512]);
}

#[test]
fn bad_ranges_are_refused() {
    let mut vm = vm(false);
    for kind in [11, 13] {
        assert_eq!(vm.range(kind, (64, 1, 0)), IOERR);
        assert_eq!(vm.range(kind, (0, 0, 0)), IOERR);
        assert_eq!(vm.range(kind, (0, u32::MAX, 0)), IOERR);
        assert_eq!(vm.range(kind, (0, 1, 2)), UNSUPP);
        assert_eq!(vm.request(kind, 0, &[(DATA, 15, 0)]).0, IOERR);
        assert_eq!(vm.request(kind, 0, &[]).0, IOERR);
    }
    assert_eq!(vm.range(11, (0, 1, 1)), UNSUPP);
}

#[test]
fn truncated_file_is_an_error_of_the_request() {
    let mut vm = vm(false);
    vm.image.as_file().set_len(512).unwrap();
    assert_eq!(vm.request(0, 5, &[(DATA, 512, WRITE)]), (IOERR, 1));
    assert_eq!(vm.request(0, 0, &[(DATA, 512, WRITE)]), (OK, 513));
}

#[test]
fn chain_without_header_or_status_is_returned() {
    let mut vm = vm(false);
    for chain in [
        &[(BUF, 16, 0)][..],
        &[(MEM - 8, 16, 0), (STATUS, 1, WRITE)],
        &[(BUF, 16, 0), (MEM, 1, WRITE)],
    ] {
        let head = vm.guest.queues[0].push(chain);
        vm.guest.notify(0);
        let used = vm.guest.queues[0].pop_used();
        assert_eq!(used, Some((head.into(), 0)), "{chain:x?}");
    }
    vm.guest.queues[0].push(&[(BUF, 8, 0), (STATUS, 1, WRITE)]);
    vm.guest.notify(0);
    assert_eq!(vm.guest.get(STATUS, 1), [IOERR]);
}

#[test]
fn indirect_chain_is_served_and_a_nested_one_survived() {
    let mut vm = vm(true);
    vm.guest.put(BUF, &[0; 16]);
    let table = BUF + 0x9_0000;
    let queue = &mut vm.guest.queues[0];
    queue.write_desc(table, 0, (BUF, 16, NEXT, 1));
    queue.write_desc(table, 1, (DATA, 512, WRITE | NEXT, 2));
    queue.write_desc(table, 2, (STATUS, 1, WRITE, 0));
    queue.push(&[(table, 48, INDIRECT)]);
    vm.guest.notify(0);
    assert_eq!(vm.guest.queues[0].pop_used(), Some((0, 513)));
    for len in [48, 0, 15, !15] {
        let queue = &mut vm.guest.queues[0];
        queue.write_desc(table, 0, (table, 48, INDIRECT, 0));
        queue.push(&[(table, len, INDIRECT)]);
        vm.guest.notify(0);
        assert_eq!(vm.guest.queues[0].pop_used().unwrap().1, 0);
    }
    assert!(!vm.guest.needs_reset());
}

#[test]
fn chain_that_loops_is_survived() {
    let mut vm = vm(true);
    let queue = &mut vm.guest.queues[0];
    queue.write_desc(queue.desc(), 0, (BUF, 16, NEXT, 1));
    queue.write_desc(queue.desc(), 1, (DATA, 512, WRITE | NEXT, 0));
    queue.offer(0);
    vm.guest.notify(0);
    assert!(vm.guest.queues[0].pop_used().is_some());
    assert!(!vm.guest.needs_reset());
}

proptest! {
    #[test]
    fn any_queue_is_survived(
        queue in any_queue(),
        kinds in prop::collection::vec(prop_oneof![0u32..16, any::<u32>()], 16),
        sectors in prop::collection::vec(prop_oneof![0u64..70, any::<u64>()], 16),
    ) {
        let mut vm = vm(false);
        // Headers all over the place where buffers are likely.
        for i in 0..0x1000u64 {
            let j = usize::try_from(i % 16).unwrap();
            vm.guest.put(BUF + i * 16, &kinds[j].to_le_bytes());
            vm.guest.put(BUF + i * 16 + 8, &sectors[j].to_le_bytes());
        }
        queue.offer_to(&mut vm.guest, 0);
        vm.guest.boot(FLUSH);
        prop_assert_eq!(vm.request(0, 0, &[(DATA, 512, WRITE)]), (OK, 513));
    }
}
