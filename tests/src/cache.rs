//! Where fetched and built things are kept between runs.

use std::env;
use std::path::PathBuf;

/// The cache folder: `$MSHARE_CACHE`, else `$XDG_CACHE_HOME/mshare`, else
/// `$HOME/.cache/mshare`. `None` when none of the three is set.
pub fn dir() -> Option<PathBuf> {
    let from = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    from("MSHARE_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("mshare")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/mshare")))
}
