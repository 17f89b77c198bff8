//! What one command line starts: one guest, or several that share a pool.
//!
//! A [`Launch`] holds the configuration of a guest as a pattern. For several
//! guests the text `{n}` in a path stands for the guest's number, counted from
//! 0, and vsock context ids are counted up.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use mshare_protocol::broker::Policy;
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, ConsoleConfig, MemorySize};

/// Most guests of one command.
pub const MAX_GUESTS: u32 = 64;

/// A combination of options that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No or too many guests.
    #[error("{0} guests are asked for; give 1 to {MAX_GUESTS}")]
    Guests(u32),
    /// A pool option that is not understood.
    #[error(
        "{0:?} is not understood: give SOCKET[,policy=P] to join a pool, or \
         size=N[,pages=2M][,socket=PATH][,window=ADDRESS][,policy=P[:P...]] to make one"
    )]
    Pool(String),
    /// A size of pages that regions cannot have.
    #[error("{0:?} is no size of a region's pages: give 4K or 2M")]
    PageSize(String),
    /// A policy that does not exist.
    #[error("{0:?} is not a policy: give rw, ro, private, private-ro or none")]
    Policy(String),
    /// As many policies as guests are needed, or one.
    #[error("{policies} policies are given for {guests} guests; give one, or one for each")]
    Policies {
        /// Policies given.
        policies: usize,
        /// Guests asked for.
        guests: u32,
    },
    /// Several guests cannot have the same file.
    #[error("{guests} guests cannot share the {what} {path:?}; put {{n}} into its name")]
    SharedPath {
        /// Guests asked for.
        guests: u32,
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A terminal serves one guest.
    #[error("{0} guests cannot type at one terminal; give --console output, file=PATH or off")]
    SharedConsole(u32),
    /// One of the guests cannot be.
    #[error(transparent)]
    Guest(config::Error),
}

/// What a guest may do with the pool; `None`: it has no door to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestPolicy(pub Option<Policy>);

impl FromStr for GuestPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Ok(Self(match text {
            "rw" => Some(Policy::Rw),
            "ro" => Some(Policy::Ro),
            "private" => Some(Policy::Private),
            "private-ro" => Some(Policy::PrivateRo),
            "none" => None,
            _ => return Err(Error::Policy(text.into())),
        }))
    }
}

/// A pool that a guest joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinPool {
    /// The broker's socket.
    pub socket: PathBuf,
    /// What the guest may do.
    #[serde(default)]
    pub policy: Policy,
}

/// The pool that `--pool` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOption {
    /// Which pool.
    pub source: PoolSource,
    /// Policies: one for all guests, or one for each.
    pub policies: Vec<GuestPolicy>,
}

/// Where a pool comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolSource {
    /// A broker that runs already listens at this socket.
    Join(PathBuf),
    /// This command runs the broker.
    Create {
        /// Bytes of data.
        size: MemorySize,
        /// Where the broker listens; a place of its own if `None`.
        socket: Option<PathBuf>,
        /// Guest-physical address of the window, if not the default one.
        window: Option<u64>,
        /// Size of its pages.
        pages: PageSize,
    },
}

/// Size of the pages by which a pool's regions are mapped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB each.
    #[default]
    Small,
    /// 2 MiB where protections are the same for all of it, else 4 KiB.
    Huge,
}

impl FromStr for PageSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "4K" => Ok(Self::Small),
            "2M" => Ok(Self::Huge),
            _ => Err(Error::PageSize(text.into())),
        }
    }
}

impl FromStr for PoolOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Pool(text.into());
        let mut policies = vec![GuestPolicy(Some(Policy::Rw))];
        let (mut size, mut socket, mut window, mut pages) = (None, None, None, None);
        for (i, part) in text.split(',').enumerate() {
            match part.split_once('=') {
                Some(("policy", list)) => {
                    policies = list.split(':').map(str::parse).collect::<Result<_, _>>()?;
                }
                Some(("size", value)) => size = Some(value.parse().map_err(|_| bad())?),
                Some(("socket", path)) if !path.is_empty() => socket = Some(path.into()),
                Some(("pages", value)) => pages = Some(value.parse()?),
                Some(("window", value)) => window = Some(address(value).ok_or_else(bad)?),
                None if i == 0 && !part.is_empty() => socket = Some(part.into()),
                _ => return Err(bad()),
            }
        }
        let source = match (size, socket, window, pages) {
            (Some(size), socket, window, pages) => PoolSource::Create {
                size,
                socket,
                window,
                pages: pages.unwrap_or_default(),
            },
            (None, Some(path), None, None) => PoolSource::Join(path),
            _ => return Err(bad()),
        };
        Ok(Self { source, policies })
    }
}

/// A guest-physical address, decimal or `0x` hexadecimal.
pub(crate) fn address(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Guests to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The pattern of each guest.
    pub guest: Config,
    /// How many.
    pub guests: u32,
    /// The pool they share.
    pub pool: Option<PoolOption>,
}

impl Launch {
    /// The configuration of each guest, with the pool's broker at `socket`.
    ///
    /// # Errors
    ///
    /// The first combination that cannot work.
    pub fn configs(&self, socket: Option<&Path>) -> Result<Vec<Config>, Error> {
        if !(1..=MAX_GUESTS).contains(&self.guests) {
            return Err(Error::Guests(self.guests));
        }
        let policies = self.policies()?;
        if self.guests > 1 && self.guest.console == ConsoleConfig::Stdio {
            return Err(Error::SharedConsole(self.guests));
        }
        (0..self.guests)
            .zip(policies)
            .map(|(n, policy)| self.config(n, policy, socket))
            .collect()
    }

    /// Checks what can be checked before anything is started.
    ///
    /// # Errors
    ///
    /// The first guest, or combination of them, that cannot work.
    pub fn validate(&self) -> Result<(), Error> {
        // Any path: what counts is that there is a pool.
        for config in self.configs(Some(Path::new("pool")))? {
            config.validate().map_err(Error::Guest)?;
        }
        Ok(())
    }

    fn policies(&self) -> Result<Vec<GuestPolicy>, Error> {
        let guests = self.guests as usize;
        let Some(pool) = &self.pool else {
            return Ok(vec![GuestPolicy(None); guests]);
        };
        match pool.policies.as_slice() {
            [one] => Ok(vec![*one; guests]),
            list if list.len() == guests => Ok(list.to_vec()),
            list => Err(Error::Policies {
                policies: list.len(),
                guests: self.guests,
            }),
        }
    }

    fn config(&self, n: u32, policy: GuestPolicy, socket: Option<&Path>) -> Result<Config, Error> {
        let own = |what: &'static str, path: &Path| -> Result<PathBuf, Error> {
            let Some(text) = path.to_str().filter(|text| text.contains("{n}")) else {
                return if self.guests == 1 {
                    Ok(path.to_owned())
                } else {
                    Err(Error::SharedPath {
                        guests: self.guests,
                        what,
                        path: path.to_owned(),
                    })
                };
            };
            Ok(text.replace("{n}", &n.to_string()).into())
        };
        let mut config = self.guest.clone();
        let name = self.guest.name.as_deref().unwrap_or("guest");
        config.name = Some(match self.guests {
            1 => name.to_owned(),
            _ => format!("{name}{n}"),
        });
        for disk in &mut config.disks {
            // A disk that nobody writes may serve all guests.
            match own("disk", &disk.path) {
                Ok(path) => disk.path = path,
                Err(_) if disk.read_only => {}
                Err(error) => return Err(error),
            }
        }
        if let Some(vsock) = &mut config.vsock {
            vsock.path = own("vsock socket", &vsock.path)?;
            // The last one is no context id of a guest: validation says so.
            vsock.cid = vsock.cid.saturating_add(n);
        }
        if let ConsoleConfig::File(path) = &mut config.console {
            *path = own("console file", path)?;
        }
        if let (Some(policy), Some(socket)) = (policy.0, socket) {
            config.pool = Some(JoinPool {
                socket: socket.to_owned(),
                policy,
            });
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, VsockConfig};

    fn launch(guests: u32) -> Launch {
        let mut guest = Config::new("k");
        guest.console = ConsoleConfig::Output;
        Launch {
            guest,
            guests,
            pool: None,
        }
    }

    #[test]
    fn pool_options_join_or_create() {
        let join: PoolOption = "/run/p,policy=ro".parse().unwrap();
        assert_eq!(join.source, PoolSource::Join("/run/p".into()));
        assert_eq!(join.policies, [GuestPolicy(Some(Policy::Ro))]);
        let create: PoolOption = "size=1G,window=0x8000000000,pages=2M,policy=rw:none"
            .parse()
            .unwrap();
        assert_eq!(
            create.source,
            PoolSource::Create {
                size: MemorySize(1 << 30),
                socket: None,
                window: Some(0x80_0000_0000),
                pages: PageSize::Huge,
            }
        );
        assert_eq!(create.policies[1], GuestPolicy(None));
    }

    #[test]
    fn bad_pool_options_are_explained() {
        for text in [
            "",
            "size=x",
            "size=1G,what=1",
            "/p,window=1",
            "/p,pages=2M",
            "policy=rw",
            "/p,/q",
        ] {
            let error = text.parse::<PoolOption>().unwrap_err();
            assert_eq!(error, Error::Pool(text.into()));
        }
        let error = "/p,policy=all".parse::<PoolOption>().unwrap_err();
        assert!(error.to_string().contains("private-ro"), "{error}");
        let error = "size=1G,pages=1G".parse::<PoolOption>().unwrap_err();
        assert!(error.to_string().contains("4K or 2M"), "{error}");
    }

    #[test]
    fn guests_get_their_own_names_paths_and_context_ids() {
        let mut launch = launch(2);
        launch.pool = Some("size=1G,policy=rw:none".parse().unwrap());
        launch.guest.vsock = Some(VsockConfig {
            cid: 3,
            path: "/run/g{n}".into(),
        });
        let configs = launch.configs(Some(Path::new("/run/pool"))).unwrap();
        let vsock = |n: usize| configs[n].vsock.clone().unwrap();
        assert_eq!((vsock(1).cid, vsock(1).path), (4, "/run/g1".into()));
        assert_eq!(configs[0].name.as_deref(), Some("guest0"));
        let pool = configs[0].pool.as_ref().unwrap();
        assert_eq!(
            (pool.policy, pool.socket.as_path()),
            (Policy::Rw, Path::new("/run/pool"))
        );
        assert_eq!(configs[1].pool, None);
    }

    #[test]
    fn context_ids_are_checked_to_the_last_guest() {
        let mut launch = launch(3);
        let vsock = |cid| {
            Some(VsockConfig {
                cid,
                path: "/run/g{n}".into(),
            })
        };
        launch.guest.vsock = vsock(u32::MAX - 3);
        assert_eq!(launch.validate(), Ok(()));
        for first in [u32::MAX - 2, u32::MAX - 1] {
            launch.guest.vsock = vsock(first);
            let refused = Error::Guest(config::Error::Cid(u32::MAX));
            assert_eq!(launch.validate(), Err(refused));
        }
    }

    #[test]
    fn guests_do_not_share_what_cannot_be_shared() {
        let mut disks = launch(2);
        let disk = |read_only| DiskConfig {
            path: "/d".into(),
            read_only,
        };
        disks.guest.disks = vec![disk(true)];
        assert!(disks.configs(None).is_ok());
        disks.guest.disks = vec![disk(false)];
        let error = disks.configs(None).unwrap_err();
        assert!(error.to_string().contains("{n}"), "{error}");
        let mut terminal = launch(2);
        terminal.guest.console = ConsoleConfig::Stdio;
        assert_eq!(terminal.configs(None), Err(Error::SharedConsole(2)));
    }

    #[test]
    fn wrong_counts_are_refused() {
        for guests in [0, MAX_GUESTS + 1] {
            assert_eq!(launch(guests).configs(None), Err(Error::Guests(guests)));
        }
        let mut policies = launch(3);
        policies.pool = Some("size=1G,policy=rw:ro".parse().unwrap());
        let error = policies.configs(None).unwrap_err();
        assert_eq!(
            error,
            Error::Policies {
                policies: 2,
                guests: 3
            }
        );
    }
}
