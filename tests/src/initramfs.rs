//! The initramfs of the guests: the agent as `/init`, and what is added to it.
//!
//! It is not compressed. The agent alone is small, and unpacking would cost
//! every boot of every guest more than reading does.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::cpio::{Archive, CpioError};

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// Nowhere to keep it.
    #[error("no cache folder: set MSHARE_CACHE or HOME")]
    NoCache,
    /// A file cannot be used.
    #[error("cannot use {path}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Debug information could not be taken off.
    #[error("cannot strip {path} (Debian package binutils): {message}")]
    Strip {
        /// The binary.
        path: PathBuf,
        /// What the program said.
        message: String,
    },
    /// The archive cannot be put together.
    #[error("cannot pack the initramfs")]
    Pack(#[from] CpioError),
}

/// An initramfs in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initramfs {
    /// The file.
    pub path: PathBuf,
    /// Whether it was there already.
    pub up_to_date: bool,
}

/// Packs `agent` as `/init` together with `files` (path here, absolute path in
/// the guest) and keeps the result in the cache under a name made of its
/// content. The same inputs give the same bytes.
pub fn build(agent: &Path, files: &[(PathBuf, String)]) -> Result<Initramfs, InitramfsError> {
    let dir = cache::dir()
        .ok_or(InitramfsError::NoCache)?
        .join("initramfs");
    let used = |path: &Path| {
        let path = path.to_owned();
        move |source| InitramfsError::File { path, source }
    };
    fs::create_dir_all(&dir).map_err(used(&dir))?;
    let work = tempfile::tempdir_in(&dir).map_err(used(&dir))?;
    let bytes = bytes(agent, files, work.path())?;

    let path = dir.join(format!("{:016x}.cpio", fingerprint(&bytes)));
    if fs::read(&path).is_ok_and(|kept| kept == bytes) {
        return Ok(Initramfs {
            path,
            up_to_date: true,
        });
    }
    let fresh = work.path().join("initramfs");
    fs::write(&fresh, &bytes).map_err(used(&fresh))?;
    fs::rename(&fresh, &path).map_err(used(&path))?;
    Ok(Initramfs {
        path,
        up_to_date: false,
    })
}

/// Packs the same into a file that is not kept in the cache.
pub fn pack(agent: &Path, files: &[(PathBuf, String)], to: &Path) -> Result<(), InitramfsError> {
    let bytes = bytes(agent, files, to.parent().unwrap_or(Path::new(".")))?;
    fs::write(to, &bytes).map_err(|source| InitramfsError::File {
        path: to.to_owned(),
        source,
    })
}

/// The archive; `work` is a folder for what is made on the way.
fn bytes(
    agent: &Path,
    files: &[(PathBuf, String)],
    work: &Path,
) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::new();
    for point in ["/bin", "/dev", "/proc", "/run", "/sys", "/tmp"] {
        archive.dir(point)?;
    }
    archive.char_device("/dev/console", 0o600, (5, 1))?;
    let init = work.join("init");
    strip(agent, &init)?;
    archive.copy("/init", &init)?;
    archive.symlink("/bin/guest-agent", "/init")?;
    for (from, to) in files {
        archive.copy(to, from)?;
    }
    let mut bytes = Vec::new();
    archive.write(&mut bytes)?;
    Ok(bytes)
}

/// Without what depends on the folder it was built in: paths among the debug
/// information, and the build id, which the linker computes from those too.
fn strip(from: &Path, to: &Path) -> Result<(), InitramfsError> {
    let fail = |message: String| InitramfsError::Strip {
        path: from.to_owned(),
        message,
    };
    let output = Command::new("strip")
        .args(["--strip-all", "--remove-section=.note.gnu.build-id", "-o"])
        .args([to, from])
        .output()
        .map_err(|error| fail(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(fail(String::from_utf8_lossy(&output.stderr).trim().into()))
}

/// FNV-1a: a name, no protection. The content is compared before it is used.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_fnv_1a() {
        // Test vectors of the FNV authors.
        assert_eq!(fingerprint(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fingerprint(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn archive_does_not_depend_on_where_the_agent_was_built() {
        let built = ["a", "longer-than-a"].map(|name| {
            let dir = tempfile::Builder::new().prefix(name).tempdir().unwrap();
            let (source, program) = (dir.path().join("main.c"), dir.path().join("agent"));
            fs::write(&source, "int main(void) { return 0; }\n").unwrap();
            let status = Command::new("cc")
                .args(["-g", "-static", "-Wl,--build-id", "-o"])
                .args([&program, &source])
                .status()
                .unwrap();
            assert!(status.success());
            let archive = dir.path().join("archive");
            pack(&program, &[], &archive).unwrap();
            (fs::read(program).unwrap(), fs::read(archive).unwrap())
        });
        assert_ne!(built[0].0, built[1].0);
        assert!(built[0].1 == built[1].1);
    }
}
