//! Writer of cpio archives in the "newc" format, as the kernel's initramfs
//! reads it (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same entries give the same bytes: entries are sorted by path, times are
//! zero, owners are root, inode numbers count up.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Why an archive could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// A source file cannot be read.
    #[error("cannot read {path} for the archive")]
    Read {
        /// The file on this machine.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The format holds sizes in 32 bits.
    #[error("{path} has {len} bytes, an initramfs file holds less than 4 GiB")]
    TooBig {
        /// The file on this machine.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// Archive paths are absolute, without `.` and `..`.
    #[error("'{0}' is no path for an archive entry: it must be absolute, without '.' and '..'")]
    BadPath(String),
    /// A source is neither file nor directory nor symbolic link.
    #[error("{0} is neither a file nor a directory nor a symbolic link")]
    BadKind(PathBuf),
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

/// One entry of an archive. Modes hold the permission bits only.
#[derive(Debug, Clone)]
enum Node {
    Dir,
    Bytes { mode: u32, data: Vec<u8> },
    Copy { mode: u32, from: PathBuf },
    Symlink(String),
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// An archive in the making: entries by path.
#[derive(Debug, Clone, Default)]
pub struct Archive {
    entries: BTreeMap<String, Node>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents.
    pub fn dir(&mut self, path: &str) -> Result<&mut Self, CpioError> {
        let key = self.prepare(path)?;
        if !key.is_empty() {
            self.entries.insert(key, Node::Dir);
        }
        Ok(self)
    }

    /// Adds a file with the given content.
    pub fn bytes(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<&mut Self, CpioError> {
        let data = data.to_vec();
        self.insert(path, Node::Bytes { mode, data })
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, CpioError> {
        self.insert(path, Node::Symlink(target.to_owned()))
    }

    /// Adds a character device.
    pub fn char_device(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
    ) -> Result<&mut Self, CpioError> {
        self.insert(path, Node::CharDevice { mode, major, minor })
    }

    /// Adds a file of this machine, or a directory with all it holds. A file is
    /// read when the archive is written; symbolic links inside a directory stay
    /// links, `from` itself is followed.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<&mut Self, CpioError> {
        let read = |source| CpioError::Read {
            path: from.to_owned(),
            source,
        };
        let meta = fs::metadata(from).map_err(read)?;
        if meta.is_file() {
            let mode = meta.permissions().mode() & 0o7777;
            let from = from.to_owned();
            return self.insert(path, Node::Copy { mode, from });
        }
        if !meta.is_dir() {
            return Err(CpioError::BadKind(from.to_owned()));
        }
        self.dir(path)?;
        for entry in fs::read_dir(from).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name();
            let name = name
                .to_str()
                .ok_or_else(|| CpioError::BadPath(name.to_string_lossy().into_owned()))?;
            let inner = format!("{}/{name}", path.trim_end_matches('/'));
            if entry.file_type().map_err(read)?.is_symlink() {
                let target = fs::read_link(entry.path()).map_err(read)?;
                self.symlink(&inner, &target.to_string_lossy())?;
            } else {
                self.copy(&inner, &entry.path())?;
            }
        }
        Ok(self)
    }

    /// Writes the archive, entries in the order of their paths.
    pub fn write(&self, out: impl Write) -> Result<(), CpioError> {
        let mut out = Writer { out, at: 0, ino: 0 };
        for (path, node) in &self.entries {
            match node {
                Node::Dir => out.header(path, 0o040_755, 0, (0, 0))?,
                Node::Bytes { mode, data } => {
                    out.header(path, 0o100_000 | mode, data.len() as u64, (0, 0))?;
                    out.raw(data)?;
                }
                Node::Copy { mode, from } => out.copy(path, *mode, from)?,
                Node::Symlink(target) => {
                    out.header(path, 0o120_777, target.len() as u64, (0, 0))?;
                    out.raw(target.as_bytes())?;
                }
                Node::CharDevice { mode, major, minor } => {
                    out.header(path, 0o020_000 | mode, 0, (*major, *minor))?;
                }
            }
            out.pad(4)?;
        }
        out.trailer()
    }

    fn insert(&mut self, path: &str, node: Node) -> Result<&mut Self, CpioError> {
        let key = self.prepare(path)?;
        if key.is_empty() {
            return Err(CpioError::BadPath(path.to_owned()));
        }
        self.entries.insert(key, node);
        Ok(self)
    }

    /// Checks a path, adds its parents and returns the name as the archive
    /// holds it: without the leading slash.
    fn prepare(&mut self, path: &str) -> Result<String, CpioError> {
        let bad = || CpioError::BadPath(path.to_owned());
        let inner = path
            .strip_prefix('/')
            .ok_or_else(bad)?
            .trim_end_matches('/');
        let mut at = 0;
        while !inner.is_empty() {
            let end = inner[at..].find('/').map_or(inner.len(), |len| at + len);
            if matches!(&inner[at..end], "" | "." | "..") {
                return Err(bad());
            }
            if end == inner.len() {
                break;
            }
            self.entries
                .entry(inner[..end].to_owned())
                .or_insert(Node::Dir);
            at = end + 1;
        }
        Ok(inner.to_owned())
    }
}

struct Writer<W> {
    out: W,
    at: u64,
    ino: u32,
}

impl<W: Write> Writer<W> {
    fn raw(&mut self, data: &[u8]) -> Result<(), CpioError> {
        self.at += data.len() as u64;
        self.out.write_all(data).map_err(CpioError::Write)
    }

    fn pad(&mut self, to: u64) -> Result<(), CpioError> {
        while !self.at.is_multiple_of(to) {
            self.raw(&[0])?;
        }
        Ok(())
    }

    fn header(
        &mut self,
        path: &str,
        mode: u32,
        len: u64,
        (major, minor): (u32, u32),
    ) -> Result<(), CpioError> {
        let size = u32::try_from(len).map_err(|_| CpioError::TooBig {
            path: path.into(),
            len,
        })?;
        self.ino += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let name_size = path.len() + 1;
        // magic ino mode uid gid nlink mtime filesize devmajor devminor
        // rdevmajor rdevminor namesize check
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{name_size:08x}{:08x}",
            self.ino, 0, 0, 0, 0, 0, 0
        );
        self.raw(header.as_bytes())?;
        self.raw(path.as_bytes())?;
        self.raw(&[0])?;
        self.pad(4)
    }

    fn copy(&mut self, path: &str, mode: u32, from: &Path) -> Result<(), CpioError> {
        let read = |source| CpioError::Read {
            path: from.to_owned(),
            source,
        };
        let mut file = File::open(from).map_err(read)?;
        let len = file.metadata().map_err(read)?.len();
        self.header(path, 0o100_000 | mode, len, (0, 0))?;
        let copied = io::copy(&mut file, &mut self.out).map_err(CpioError::Write)?;
        if copied != len {
            return Err(read(io::Error::other("it changed while it was read")));
        }
        self.at += len;
        Ok(())
    }

    fn trailer(&mut self) -> Result<(), CpioError> {
        self.ino = 0;
        self.header("TRAILER!!!", 0, 0, (0, 0))?;
        self.pad(512)?;
        self.out.flush().map_err(CpioError::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        archive.write(&mut out).unwrap();
        out
    }

    #[test]
    fn order_of_adding_does_not_change_the_bytes() {
        let mut one = Archive::new();
        one.bytes("/b/c", 0o644, b"see").unwrap();
        one.dir("/a").unwrap().symlink("/l", "b/c").unwrap();
        let mut two = Archive::new();
        two.symlink("/l", "b/c").unwrap().dir("/a/").unwrap();
        two.bytes("/b/c", 0o644, b"see").unwrap();
        assert_eq!(written(&one), written(&two));
        assert_eq!(written(&one).len() % 512, 0);
    }

    #[test]
    fn parents_come_before_their_children() {
        let mut archive = Archive::new();
        archive.bytes("/x/y/z", 0o600, b"1").unwrap();
        let text = String::from_utf8(written(&archive)).unwrap();
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("x\0") < at("x/y\0") && at("x/y\0") < at("x/y/z\0"));
    }

    #[test]
    fn paths_that_lead_outside_are_refused() {
        for path in ["x", "/../x", "/x/./y", "/x//y", "/"] {
            assert!(
                Archive::new().bytes(path, 0o600, b"").is_err(),
                "{path} was taken"
            );
        }
    }

    #[test]
    fn a_directory_is_copied_with_links_and_modes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "text").unwrap();
        fs::set_permissions(dir.path().join("f"), fs::Permissions::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("f", dir.path().join("l")).unwrap();
        let mut archive = Archive::new();
        archive.copy("/d", dir.path()).unwrap();
        let text = String::from_utf8(written(&archive)).unwrap();
        assert!(text.contains("000081e9"), "regular file of mode 751");
        assert!(text.contains("0000a1ff"), "symbolic link");
    }
}
