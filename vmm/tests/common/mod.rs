//! What the tests of the `vmm` binary share.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmm::arch::layout;

/// `vmm` with `args`, without input.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Whether one of five runs takes less than a second: the others may have met
/// a busy machine.
pub fn within_a_second(mut run: impl FnMut()) -> bool {
    (0..5).any(|_| {
        let start = Instant::now();
        run();
        start.elapsed() < Duration::from_secs(1)
    })
}

/// A kernel that passes every check. It switches the machine off.
pub fn kernel(dir: &Path) -> String {
    let mut image = vec![0_u8; 2048];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &64_u32.to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x20_0000_u32.to_le_bytes());
    // The 64-bit entry: two sectors of setup code, then 0x200 bytes. mov dx,
    // POWER; mov al, S5 | enable; out dx, al; hlt
    let [low, high] = layout::POWER.to_le_bytes();
    put(0x600, &[0x66, 0xba, low, high, 0xb0, 0x34, 0xee, 0xf4]);
    let path = dir.join("bzImage");
    std::fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}
