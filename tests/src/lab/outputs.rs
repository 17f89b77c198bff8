//! Puts what the lab sends back where it belongs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use super::LabError;
use super::wire::Entry;

/// Returned paths of one run.
#[derive(Debug)]
pub struct Outputs<'a> {
    wanted: &'a [(String, PathBuf)],
    open: Option<(File, PathBuf)>,
    failed: Option<String>,
}

impl<'a> Outputs<'a> {
    /// `wanted` pairs paths in the lab with paths here.
    pub fn new(wanted: &'a [(String, PathBuf)]) -> Self {
        Self {
            wanted,
            open: None,
            failed: None,
        }
    }

    /// Starts the next file or makes the next directory.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), LabError> {
        self.open = None;
        let below = Path::new(&entry.path);
        let inside = below
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
        let root = match self.wanted.get(entry.index) {
            Some((_, root)) if inside => root,
            _ => return Err(LabError::Broken(format!("it sent '{}'", entry.path))),
        };
        let path = if entry.path.is_empty() {
            root.clone()
        } else {
            root.join(below)
        };
        let fail = |source| LabError::Output {
            path: path.clone(),
            source,
        };
        if entry.is_dir {
            return fs::create_dir_all(&path).map_err(fail);
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        let file = File::create(&path).map_err(fail)?;
        file.set_permissions(fs::Permissions::from_mode(entry.mode & 0o777))
            .map_err(fail)?;
        self.open = Some((file, path));
        Ok(())
    }

    /// Appends to the file that was started last.
    pub fn data(&mut self, data: &[u8]) -> Result<(), LabError> {
        let Some((file, path)) = &mut self.open else {
            let source = io::Error::other("data without a file");
            return Err(LabError::Broken(source.to_string()));
        };
        file.write_all(data).map_err(|source| LabError::Output {
            path: path.clone(),
            source,
        })
    }

    /// Notes that the lab could not send a path.
    pub fn failed(&mut self, message: String) {
        self.failed.get_or_insert(message);
    }

    /// Says whether all paths came.
    pub fn finish(&mut self) -> Result<(), LabError> {
        self.open = None;
        match self.failed.take() {
            Some(message) => Err(LabError::OutputMissing(message)),
            None => Ok(()),
        }
    }
}
