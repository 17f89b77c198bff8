//! Where the serial port leads on the host.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::config::ConsoleConfig;
use crate::exit::Exit;

/// A console that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file for the output.
    #[error("cannot write the console file {0:?}")]
    Create(PathBuf, #[source] io::Error),
    /// Standard input or output.
    #[error("cannot use standard input and output as the console")]
    Stdio(#[source] io::Error),
}

/// The two ends of a console.
#[derive(Debug)]
pub struct Console {
    /// Takes the guest's output.
    pub output: Output,
    /// Gives the guest input.
    pub input: Option<Input>,
    /// The file that the output goes to, if it is a log.
    pub log: Option<Log>,
}

/// A log that is not ours before the guest exists: a start that fails leaves
/// what an earlier guest wrote there, and no empty file.
#[derive(Debug)]
pub struct Log {
    file: File,
    /// What to remove unless the guest begins to write.
    made: Option<PathBuf>,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        match File::create_new(path) {
            Ok(file) => Ok(Self {
                file,
                made: Some(path.to_owned()),
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Self {
                file: File::options()
                    .create(true)
                    .write(true)
                    .truncate(false)
                    .open(path)?,
                made: None,
            }),
            Err(error) => Err(error),
        }
    }

    /// The guest begins to write: what was there before goes.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn begin(mut self) -> io::Result<()> {
        // A pipe or a terminal has no length.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
        }
        self.made = None;
        Ok(())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(path) = &self.made
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("cannot remove the console file {path:?}: {error}");
        }
    }
}

/// Where input comes from.
#[derive(Debug)]
pub struct Input {
    /// The file.
    pub file: File,
    /// Whether a person types there.
    pub is_terminal: bool,
}

impl Console {
    /// Opens what the configuration asks for. `exit` tells the output when to
    /// give up.
    ///
    /// # Errors
    ///
    /// The file cannot be created.
    pub fn open(config: &ConsoleConfig, exit: Exit) -> Result<Self, Error> {
        let stdout = || -> Result<File, Error> {
            let fd = io::stdout().as_fd().try_clone_to_owned();
            Ok(File::from(fd.map_err(Error::Stdio)?))
        };
        let mut log = None;
        let (file, input) = match config {
            ConsoleConfig::Stdio => {
                let stdin = io::stdin();
                let fd = stdin.as_fd().try_clone_to_owned().map_err(Error::Stdio)?;
                let input = Input {
                    file: File::from(fd),
                    is_terminal: stdin.is_terminal(),
                };
                (Some(stdout()?), Some(input))
            }
            ConsoleConfig::Output => (Some(stdout()?), None),
            ConsoleConfig::File(path) => {
                let fail = |e| Error::Create(path.clone(), e);
                let opened = Log::open(path).map_err(fail)?;
                let file = opened.file.try_clone().map_err(fail)?;
                log = Some(opened);
                (Some(file), None)
            }
            ConsoleConfig::Off => (None, None),
        };
        Ok(Self {
            output: Output { file, exit },
            input,
            log,
        })
    }
}

/// The guest's output. A reader that is gone or stuck never keeps the run
/// from ending: once the end has been reported, output that would wait is
/// dropped.
#[derive(Debug)]
pub struct Output {
    file: Option<File>,
    exit: Exit,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(file) = &mut self.file else {
            return Ok(data.len());
        };
        loop {
            match file.write(data) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    if self.exit.reported().is_some() {
                        return Ok(data.len());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.exit.reported().is_some() {
                        return Ok(data.len());
                    }
                    // Somebody shares our standard output and made it
                    // non-blocking; a short sleep is as good as a poll.
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(config: &ConsoleConfig) -> Result<Console, Error> {
        Console::open(config, Exit::new().unwrap())
    }

    #[test]
    fn file_console_takes_output_and_gives_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut console = open(&ConsoleConfig::File(path.clone())).unwrap();
        console.log.take().unwrap().begin().unwrap();
        console.output.write_all(b"hello").unwrap();
        assert!(console.input.is_none());
        assert_eq!(std::fs::read(path).unwrap(), b"hello");
    }

    #[test]
    fn log_is_emptied_when_the_guest_begins_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let config = ConsoleConfig::File(path.clone());
        drop(open(&config).unwrap());
        assert!(!path.exists(), "made by a start that failed");
        std::fs::write(&path, "of an earlier guest").unwrap();
        let console = open(&config).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"of an earlier guest");
        console.log.unwrap().begin().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn log_may_be_no_file() {
        let console = open(&ConsoleConfig::File("/dev/null".into())).unwrap();
        console.log.unwrap().begin().unwrap();
        assert!(Path::new("/dev/null").exists());
    }

    #[test]
    fn file_that_cannot_be_created_is_named() {
        let error = open(&ConsoleConfig::File("/nonexistent/log".into())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/log"));
    }

    #[test]
    fn console_that_is_off_swallows_output() {
        let mut console = open(&ConsoleConfig::Off).unwrap();
        assert_eq!(console.output.write(b"hello").unwrap(), 5);
    }

    #[test]
    fn full_non_blocking_output_is_dropped_once_the_run_ends() {
        let (_reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let exit = Exit::new().unwrap();
        exit.report(crate::exit::GuestExit::PoweredOff);
        let mut output = Output {
            file: Some(File::from(writer)),
            exit,
        };
        for _ in 0..100 {
            output.write_all(&[0; 4096]).unwrap();
        }
    }
}
