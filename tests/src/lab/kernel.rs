//! The lab's own kernel: Debian's cloud kernel, fetched as a package and
//! unpacked into the cache. Nothing is installed.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache;

/// Debian's packages that depend on the newest 6.12 cloud kernel: of Debian 12
/// and 13.
const META_PACKAGES: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
const PREFIX: &str = "linux-image-";
/// What the name of a fitting kernel package begins with.
const WANTED: &str = "linux-image-6.12.";
/// Modules the lab loads, in this order.
pub const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];

/// A kernel for the lab, unpacked.
#[derive(Debug, Clone)]
pub struct LabKernel {
    /// Folder in the cache.
    dir: PathBuf,
    /// Release, as `uname -r` will say it.
    pub release: String,
}

/// Why there is no lab kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Nowhere to keep it.
    #[error("no cache folder: set MSHARE_CACHE or HOME")]
    NoCache,
    /// A folder or file of the cache cannot be used.
    #[error("cannot use {path}")]
    Cache {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program is missing or cannot be started.
    #[error(
        "cannot run {program} (the lab's kernel is a Debian package; this needs a Debian host)"
    )]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("{command} failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// The last lines it printed.
        output: String,
    },
    /// The package lists do not know the kernel.
    #[error(
        "apt knows no {}: run apt-get update, or add bookworm-security to its sources",
        META_PACKAGES[0]
    )]
    Unknown,
    /// The package does not hold what it should.
    #[error("package {package} holds no {missing}")]
    Incomplete {
        /// The package.
        package: String,
        /// The file that is not there.
        missing: String,
    },
}

impl LabKernel {
    /// The newest kernel in the cache, else the newest that apt offers, fetched
    /// now. `say` gets a line when something takes time.
    pub fn find(mut say: impl FnMut(&str)) -> Result<Self, KernelError> {
        let root = cache::dir().ok_or(KernelError::NoCache)?.join("lab");
        if let Some(found) = newest(&root) {
            return Ok(found);
        }
        let used = |path: &Path| {
            let path = path.to_owned();
            move |source| KernelError::Cache { path, source }
        };
        fs::create_dir_all(&root).map_err(used(&root))?;
        // One fetch at a time; the file is only there to be locked.
        let lock = root.join("lock");
        let held = File::create(&lock).map_err(used(&lock))?;
        held.lock().map_err(used(&lock))?;
        if let Some(found) = newest(&root) {
            return Ok(found);
        }
        let package = candidate()?;
        say(&format!("fetching the lab's kernel, package {package}"));
        fetch(&root, &package)
    }

    /// The boot image.
    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// An unpacked module.
    pub fn module(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.ko"))
    }

    fn complete(&self) -> bool {
        self.image().is_file() && MODULES.iter().all(|name| self.module(name).is_file())
    }
}

/// The newest complete kernel below `root`.
fn newest(root: &Path) -> Option<LabKernel> {
    fs::read_dir(root)
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let kernel = LabKernel {
                dir: entry.path(),
                release: entry.file_name().into_string().ok()?,
            };
            kernel.complete().then_some(kernel)
        })
        .max_by(|a, b| by_version(&a.release, &b.release))
}

/// Orders releases by their numbers: 6.12.9 before 6.12.10.
fn by_version(a: &str, b: &str) -> Ordering {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    numbers(a).cmp(&numbers(b)).then_with(|| a.cmp(b))
}

/// The kernel package that a meta package depends on. An empty package list is
/// filled once, where this user may.
fn candidate() -> Result<String, KernelError> {
    if let Some(package) = known_candidate()? {
        return Ok(package);
    }
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    known_candidate()?.ok_or(KernelError::Unknown)
}

fn known_candidate() -> Result<Option<String>, KernelError> {
    for meta in META_PACKAGES {
        let shown = match run(Command::new("apt-cache").args(["depends", "--important", meta])) {
            Ok(shown) => shown,
            // It does not know the package.
            Err(KernelError::Failed { .. }) => continue,
            Err(other) => return Err(other),
        };
        let package = shown
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(WANTED));
        if let Some(package) = package {
            return Ok(Some(package.to_owned()));
        }
    }
    Ok(None)
}

fn fetch(root: &Path, package: &str) -> Result<LabKernel, KernelError> {
    let used = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Cache { path, source }
    };
    let work = tempfile::tempdir_in(root).map_err(used(root))?;
    run(Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(&work))?;
    let deb = fs::read_dir(&work)
        .map_err(used(work.path()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .ok_or_else(|| KernelError::Incomplete {
            package: package.to_owned(),
            missing: "file".into(),
        })?;
    let tree = work.path().join("tree");
    run(Command::new("dpkg").arg("-x").arg(&deb).arg(&tree))?;

    let release = package.strip_prefix(PREFIX).unwrap_or(package).to_owned();
    let incomplete = |missing: &str| KernelError::Incomplete {
        package: package.to_owned(),
        missing: missing.to_owned(),
    };
    let ready = work.path().join("ready");
    fs::create_dir(&ready).map_err(used(&ready))?;
    fs::rename(
        tree.join(format!("boot/vmlinuz-{release}")),
        ready.join("vmlinuz"),
    )
    .map_err(|_| incomplete("boot image"))?;
    let modules = tree.join("lib/modules").join(&release);
    for name in MODULES {
        let packed = find_module(&modules, name).ok_or_else(|| incomplete(name))?;
        let plain = ready.join(format!("{name}.ko"));
        if packed.extension().is_some_and(|ext| ext == "xz") {
            run(Command::new("xz").arg("-d").arg(&packed))?;
            let unpacked = packed.with_extension("");
            fs::rename(&unpacked, &plain).map_err(used(&plain))?;
        } else {
            fs::rename(&packed, &plain).map_err(used(&plain))?;
        }
    }
    let dir = root.join(&release);
    fs::rename(&ready, &dir).map_err(used(&dir))?;
    Ok(LabKernel { dir, release })
}

/// Finds `name.ko` or `name.ko.xz` below `dir`.
fn find_module(dir: &Path, name: &str) -> Option<PathBuf> {
    let wanted = [format!("{name}.ko"), format!("{name}.ko.xz")];
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).ok()?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            } else if wanted.iter().any(|name| entry.file_name() == name.as_str()) {
                return Some(entry.path());
            }
        }
    }
    None
}

/// Runs a command to its end and returns what it printed.
fn run(command: &mut Command) -> Result<String, KernelError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| KernelError::Spawn { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(KernelError::Failed {
        command: format!("{command:?}"),
        output: errors.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_number() {
        let older = "6.12.9+deb12-cloud-amd64";
        let newer = "6.12.117+deb12-cloud-amd64";
        assert_eq!(by_version(older, newer), Ordering::Less);
    }

    #[test]
    fn only_a_complete_kernel_is_found() {
        let root = tempfile::tempdir().unwrap();
        for release in ["6.12.2", "6.12.10", "6.12.30"] {
            let dir = root.path().join(release);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("vmlinuz"), "").unwrap();
            for name in MODULES {
                fs::write(dir.join(format!("{name}.ko")), "").unwrap();
            }
        }
        fs::remove_file(root.path().join("6.12.30/kvm.ko")).unwrap();
        assert_eq!(newest(root.path()).unwrap().release, "6.12.10");
    }
}
