//! Tests of the kernel loader, with images made on the spot.

use super::*;
use std::io::Write;
use tempfile::NamedTempFile;
use vm_memory::Bytes;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<Kernel, Error> {
    Kernel::open(file(bytes).path())
}

fn memory(bytes: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

/// A bzImage whose kernel proper is `payload`, a multiple of 16 bytes.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let header = setup_header {
        setup_sects: 1,
        syssize: u32::try_from(payload.len() / 16).unwrap(),
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        xloadflags: XLF_KERNEL_64,
        pref_address: 0x100_0000,
        init_size: 0x20_0000,
        ..Default::default()
    };
    let size = size_of::<setup_header>();
    image[SETUP_HEADER..SETUP_HEADER + size].copy_from_slice(header.as_slice());
    image.extend(payload);
    image
}

fn patched(mut image: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

/// A vmlinux with one segment at 16 MiB.
fn vmlinux(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 120];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(ELF_TYPE, &ELF_TYPE_EXEC.to_le_bytes());
    put(ELF_MACHINE, &ELF_MACHINE_X86_64.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(24, &0x100_0010_u64.to_le_bytes());
    put(ELF_PHOFF, &64_u64.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(ELF_PHENTSIZE, &56_u16.to_le_bytes());
    put(ELF_PHNUM, &1_u16.to_le_bytes());
    let len = payload.len() as u64;
    put(64, &PT_LOAD.to_le_bytes());
    put(72, &120_u64.to_le_bytes());
    put(88, &0x100_0000_u64.to_le_bytes());
    put(96, &len.to_le_bytes());
    put(104, &(len + 0x1000).to_le_bytes());
    image.extend(payload);
    image
}

#[test]
fn bzimage_is_loaded_where_it_prefers_to_be() {
    let memory = memory(0x200_0000);
    let payload = [7; 0x400];
    let loaded = open(&bzimage(&payload)).unwrap().load(&memory).unwrap();
    assert_eq!((loaded.entry, loaded.end), (0x100_0200, 0x120_0000));
    let header = loaded.header.unwrap();
    assert_eq!({ header.header }, u32::from_le_bytes(*b"HdrS"));
    let mut seen = [0; 0x400];
    memory
        .read_slice(&mut seen, GuestAddress(0x100_0000))
        .unwrap();
    assert_eq!(seen, payload);
}

#[test]
fn vmlinux_is_loaded_at_its_segments() {
    let memory = memory(0x200_0000);
    let loaded = open(&vmlinux(&[9; 0x100])).unwrap().load(&memory).unwrap();
    assert_eq!((loaded.entry, loaded.end), (0x100_0010, 0x100_1100));
    assert!(loaded.header.is_none());
    let byte: u8 = memory.read_obj(GuestAddress(0x100_00ff)).unwrap();
    assert_eq!(byte, 9);
}

#[test]
fn missing_kernel_is_named() {
    let error = Kernel::open(Path::new("/nonexistent/bzImage")).unwrap_err();
    assert!(matches!(error, Error::Open(..)));
    assert!(error.to_string().contains("/nonexistent/bzImage"));
}

#[test]
fn directory_and_pipe_are_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Kernel::open(dir.path()), Err(Error::Open(..))));
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(matches!(Kernel::open(&fifo), Err(Error::Open(..))));
}

#[test]
fn empty_kernel_is_refused() {
    assert!(matches!(open(b""), Err(Error::Empty(_))));
}

#[test]
fn every_truncation_is_an_error() {
    for image in [bzimage(&[7; 0x400]), vmlinux(&[9; 0x100])] {
        // One byte less may still pass for a bzImage (its size counts
        // paragraphs), a paragraph less may not.
        for len in 0..image.len() - 16 {
            let result = open(&image[..len]);
            assert!(result.is_err(), "{len} of {} bytes", image.len());
        }
    }
}

#[test]
fn truncated_kernels_say_what_is_missing() {
    let image = bzimage(&[7; 0x400]);
    let error = open(&image[..1500]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Truncated {
                len: 1500,
                need: 2048,
                ..
            }
        ),
        "{error}"
    );
    let image = vmlinux(&[9; 0x100]);
    let error = open(&image[..200]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Truncated {
                len: 200,
                need: 376,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn other_files_are_recognised() {
    for (bytes, expected) in [
        (&b"070701000000"[..], "cpio"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"#!/bin/sh\n", "script"),
        (b"hello\n", "text"),
        (b"MZ\0\0\0\0", "EFI"),
        (&[0; 5000], "neither"),
    ] {
        let error = open(bytes).unwrap_err();
        assert!(matches!(error, Error::NotAKernel { .. }));
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn kernels_of_other_machines_are_refused_by_name() {
    let arm = patched(vmlinux(&[0; 16]), ELF_MACHINE, &183_u16.to_le_bytes());
    let error = open(&arm).unwrap_err();
    assert!(error.to_string().contains("arm64"), "{error}");
    let arm_image = patched(vec![0; 128], 0x38, b"ARM\x64");
    assert!(matches!(
        open(&arm_image),
        Err(Error::WrongArchitecture { .. })
    ));
    let mut image = bzimage(&[0; 16]);
    let xloadflags = SETUP_HEADER + std::mem::offset_of!(setup_header, xloadflags);
    image[xloadflags] = 0;
    let error = open(&image).unwrap_err();
    assert!(error.to_string().contains("32-bit"), "{error}");
}

#[test]
fn program_for_linux_is_not_a_kernel() {
    // A user program: segments at low virtual addresses.
    let program = patched(vmlinux(&[0; 16]), 88, &0x40_0000_u64.to_le_bytes());
    assert!(matches!(open(&program), Err(Error::NotAKernel { .. })));
    let object = patched(vmlinux(&[0; 16]), ELF_TYPE, &1_u16.to_le_bytes());
    assert!(matches!(open(&object), Err(Error::NotAKernel { .. })));
}

#[test]
fn old_boot_protocol_is_refused() {
    let image = patched(bzimage(&[0; 16]), 0x206, &0x0204_u16.to_le_bytes());
    let error = open(&image).unwrap_err();
    assert!(matches!(
        error,
        Error::OldProtocol {
            major: 2,
            minor: 4,
            ..
        }
    ));
}

#[test]
fn guest_that_is_too_small_is_told_what_the_kernel_needs() {
    for image in [bzimage(&[7; 0x400]), vmlinux(&[9; 0x100])] {
        let error = open(&image).unwrap().load(&memory(0x100_0000)).unwrap_err();
        assert!(
            matches!(
                error,
                Error::DoesNotFit {
                    start: 0x100_0000,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn absurd_addresses_are_refused() {
    let image = patched(vmlinux(&[0; 16]), 88, &u64::MAX.to_le_bytes());
    assert!(matches!(open(&image), Err(Error::Damaged { .. })));
    let mut image = bzimage(&[0; 16]);
    let pref = SETUP_HEADER + std::mem::offset_of!(setup_header, pref_address);
    image[pref..pref + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    let result = open(&image).unwrap().load(&memory(0x200_0000));
    assert!(matches!(result, Err(Error::DoesNotFit { .. })));
}
