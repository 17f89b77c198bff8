//! Where the serial port leads on the host.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

use crate::config::ConsoleConfig;
use crate::exit::Exit;

/// A console that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file for the output.
    #[error("cannot create the console file {0:?}")]
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
                let file = File::create(path).map_err(|e| Error::Create(path.clone(), e))?;
                (Some(file), None)
            }
            ConsoleConfig::Off => (None, None),
        };
        Ok(Self {
            output: Output { file, exit },
            input,
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
        console.output.write_all(b"hello").unwrap();
        assert!(console.input.is_none());
        assert_eq!(std::fs::read(path).unwrap(), b"hello");
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
