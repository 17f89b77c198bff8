//! What has to be there before a guest can start.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use super::command::{build, command, pass, stream};
use super::{RunnerError, project};
use crate::artifacts::Artifacts;
use crate::initramfs;
use crate::lab::LabKernel;
use crate::selftests::Flavour;

/// The slow things, under way while cargo compiles.
#[derive(Debug)]
pub struct Background {
    kernels: JoinHandle<Result<Kernels, RunnerError>>,
    lab: JoinHandle<Result<LabKernel, RunnerError>>,
}

/// Guest kernels.
#[derive(Debug)]
pub struct Kernels {
    /// The series.
    pub default: PathBuf,
    /// Other flavours of it.
    others: Vec<(Flavour, PathBuf)>,
}

impl Kernels {
    /// A flavour, if it was asked for.
    pub fn of(&self, flavour: Flavour) -> Option<PathBuf> {
        if flavour == Flavour::Default {
            return Some(self.default.clone());
        }
        let found = self.others.iter().find(|(known, _)| *known == flavour);
        found.map(|(_, image)| image.clone())
    }
}

impl Background {
    /// Starts building the guest kernel, and `others`, and fetching the lab's.
    pub fn start(others: &'static [Flavour]) -> Self {
        let build = |flavour: &Flavour| Ok((*flavour, guest_kernel(flavour.name())?));
        let kernels = move || {
            Ok(Kernels {
                default: guest_kernel(Flavour::Default.name())?,
                others: others.iter().map(build).collect::<Result<_, _>>()?,
            })
        };
        Self {
            kernels: thread::spawn(kernels),
            lab: thread::spawn(|| {
                LabKernel::find(|line| println!("lab: {line}")).map_err(RunnerError::LabKernel)
            }),
        }
    }

    /// Waits for the guest kernels and for the lab's.
    pub fn finish(self) -> (Result<Kernels, RunnerError>, Result<LabKernel, RunnerError>) {
        let died = || RunnerError::Failed("a thread of the runner".into());
        (
            self.kernels.join().unwrap_or_else(|_| Err(died())),
            self.lab.join().unwrap_or_else(|_| Err(died())),
        )
    }
}

/// Builds a flavour of the guest kernel, or finds that it is up to date.
pub fn guest_kernel(flavour: &str) -> Result<PathBuf, RunnerError> {
    kernel_of(flavour, &[])
}

/// The same with variables for the script.
pub fn kernel_of(flavour: &str, env: &[(&str, &OsStr)]) -> Result<PathBuf, RunnerError> {
    let script = project().join("images/kernel/build.sh");
    let script = script.to_string_lossy();
    let mut build = command("nice", &["-n", "5", "bash", &script, flavour]);
    build.envs(env.iter().copied());
    let mut image = None;
    let built = stream(&mut build, |line| {
        let text = String::from_utf8_lossy(line);
        match text.trim_end().strip_prefix("bzImage=") {
            Some(path) => image = Some(PathBuf::from(path)),
            None => pass(line),
        }
    })?;
    match image {
        Some(image) if built.success() => Ok(image),
        _ => Err(RunnerError::Failed(format!(
            "images/kernel/build.sh {flavour}"
        ))),
    }
}

/// Compiles the workspace and returns its programs, by name.
pub fn programs() -> Result<Vec<(String, PathBuf)>, RunnerError> {
    // By itself: in one build with the tests it would be compiled with what they
    // ask of its crates, the ablations of the pool.
    let mut programs = build(&["build", "-p", "vmm", "--bins"])?;
    programs.extend(programs_but_the_vmm()?);
    Ok(programs)
}

/// Compiles what a guest without a VMM needs and returns the agent.
pub fn agent() -> Result<PathBuf, RunnerError> {
    program(&programs_but_the_vmm()?, "guest-agent")
}

fn programs_but_the_vmm() -> Result<Vec<(String, PathBuf)>, RunnerError> {
    let packages = ["-p", "guest-agent", "-p", "mshare-tests"];
    build(&[&["build", "--bins"], &packages[..]].concat())
}

/// One of the programs.
pub fn program(programs: &[(String, PathBuf)], name: &str) -> Result<PathBuf, RunnerError> {
    programs
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, path)| path.clone())
        .ok_or_else(|| RunnerError::NoProgram(name.to_owned()))
}

/// Puts the initramfs together and names all that a guest needs.
pub fn artifacts(
    programs: &[(String, PathBuf)],
    kernels: Kernels,
) -> Result<Artifacts, RunnerError> {
    let agent = program(programs, "guest-agent")?;
    let packed = initramfs::build(&agent, &[]).map_err(RunnerError::Initramfs)?;
    let state = if packed.up_to_date {
        "up to date"
    } else {
        "packed"
    };
    println!("initramfs: {state}");
    Ok(Artifacts {
        vmm: program(programs, "vmm")?,
        ablation: kernels.of(Flavour::Ablation),
        // The build puts it beside the bzImage.
        vmlinux: kernels.default.with_file_name("vmlinux"),
        kernel: kernels.default,
        initramfs: packed.path,
    })
}
