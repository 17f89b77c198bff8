//! Requests as the driver writes them, checked and turned into calls.

use mshare_protocol::broker::Policy;
use mshare_protocol::device::{
    VIRTIO_MSHARE_NAME_MAX, VIRTIO_MSHARE_REQ_EXCL, VIRTIO_MSHARE_T_ATTACH, VIRTIO_MSHARE_T_CREATE,
    VIRTIO_MSHARE_T_DETACH, VIRTIO_MSHARE_T_DISCARD, VIRTIO_MSHARE_T_LIST, VIRTIO_MSHARE_T_LOOKUP,
    VIRTIO_MSHARE_T_PROTECT, VIRTIO_MSHARE_T_SIZE, VIRTIO_MSHARE_T_STAT, VIRTIO_MSHARE_T_UNLINK,
    virtio_mshare_req,
};
use mshare_protocol::entry::Prot;

/// A request that makes sense by itself; whether it makes sense for the pool
/// is the broker's to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Lookup {
        name: Vec<u8>,
    },
    Create {
        name: Vec<u8>,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    Size {
        id: u64,
        start: u64,
        len: u64,
    },
    Attach {
        id: u64,
    },
    Detach {
        id: u64,
    },
    Protect {
        id: u64,
        offset: u64,
        len: u64,
        prot: Prot,
    },
    Discard {
        id: u64,
        offset: u64,
        len: u64,
    },
    Unlink {
        name: Vec<u8>,
        id: u64,
    },
    Stat {
        id: u64,
    },
    List {
        from: u64,
    },
}

/// A Linux errno, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(pub i32);

impl Errno {
    /// As the status field carries it.
    pub(super) fn status(self) -> u32 {
        // An errno is a small positive number; anything else is a broker's
        // mistake, which the driver sees as EIO.
        match u32::try_from(self.0) {
            Ok(errno @ 1..=4095) => errno,
            _ => libc::EIO.unsigned_abs(),
        }
    }
}

/// Reads a request of a guest that `policy` applies to.
///
/// # Errors
///
/// EOPNOTSUPP for an unknown type, EROFS for a change under a read-only
/// policy, EINVAL or ENAMETOOLONG for a field that cannot be right.
pub(super) fn parse(req: &virtio_mshare_req, policy: Policy) -> Result<Call, Errno> {
    let kind = req.r#type.get();
    let changes = matches!(
        kind,
        VIRTIO_MSHARE_T_CREATE
            | VIRTIO_MSHARE_T_SIZE
            | VIRTIO_MSHARE_T_PROTECT
            | VIRTIO_MSHARE_T_DISCARD
            | VIRTIO_MSHARE_T_UNLINK
    );
    if changes && !policy.writes() {
        return Err(Errno(libc::EROFS));
    }
    let allowed_flags = match kind {
        VIRTIO_MSHARE_T_CREATE => VIRTIO_MSHARE_REQ_EXCL,
        _ => 0,
    };
    if req.reserved.get() != 0 || req.flags.get() & !allowed_flags != 0 {
        return Err(Errno(libc::EINVAL));
    }
    let (id, addr, len) = (req.id.get(), req.addr.get(), req.len.get());
    Ok(match kind {
        VIRTIO_MSHARE_T_LOOKUP => Call::Lookup { name: name(req)? },
        VIRTIO_MSHARE_T_CREATE => Call::Create {
            name: name(req)?,
            mode: req.mode.get(),
            uid: req.uid.get(),
            gid: req.gid.get(),
        },
        VIRTIO_MSHARE_T_SIZE => Call::Size {
            id,
            start: addr,
            len,
        },
        VIRTIO_MSHARE_T_ATTACH => Call::Attach { id },
        VIRTIO_MSHARE_T_DETACH => Call::Detach { id },
        VIRTIO_MSHARE_T_PROTECT => Call::Protect {
            id,
            offset: addr,
            len,
            prot: Prot::from_bits(req.prot.get()).ok_or(Errno(libc::EINVAL))?,
        },
        VIRTIO_MSHARE_T_DISCARD => Call::Discard {
            id,
            offset: addr,
            len,
        },
        VIRTIO_MSHARE_T_UNLINK => Call::Unlink {
            name: name(req)?,
            id,
        },
        VIRTIO_MSHARE_T_STAT => Call::Stat { id },
        VIRTIO_MSHARE_T_LIST => Call::List { from: id },
        _ => return Err(Errno(libc::EOPNOTSUPP)),
    })
}

fn name(req: &virtio_mshare_req) -> Result<Vec<u8>, Errno> {
    let len = usize::try_from(req.name_len.get()).unwrap_or(usize::MAX);
    if len > VIRTIO_MSHARE_NAME_MAX {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    match &req.name[..len] {
        b"" | b"." | b".." => Err(Errno(libc::EINVAL)),
        name if name.iter().any(|b| matches!(b, 0 | b'/')) => Err(Errno(libc::EINVAL)),
        name => Ok(name.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    fn req(kind: u32) -> virtio_mshare_req {
        let mut req = virtio_mshare_req::new_zeroed();
        req.r#type = kind.into();
        req
    }

    fn named(kind: u32, name: &[u8]) -> virtio_mshare_req {
        let mut req = req(kind);
        let kept = name.len().min(req.name.len());
        req.name[..kept].copy_from_slice(&name[..kept]);
        req.name_len = u32::try_from(name.len()).unwrap().into();
        req
    }

    #[test]
    fn lookup_of_a_name_is_read() {
        let req = named(VIRTIO_MSHARE_T_LOOKUP, b"cache");
        let name = b"cache".to_vec();
        assert_eq!(parse(&req, Policy::Ro), Ok(Call::Lookup { name }));
    }

    #[test]
    fn bad_names_are_refused() {
        for (name, errno) in [
            (b"".as_slice(), libc::EINVAL),
            (b".", libc::EINVAL),
            (b"..", libc::EINVAL),
            (b"a/b", libc::EINVAL),
            (b"a\0b", libc::EINVAL),
            (&[b'x'; 256], libc::ENAMETOOLONG),
            (&[b'x'; 300], libc::ENAMETOOLONG),
        ] {
            let req = named(VIRTIO_MSHARE_T_LOOKUP, name);
            assert_eq!(parse(&req, Policy::Rw), Err(Errno(errno)), "{name:?}");
        }
        let longest = named(VIRTIO_MSHARE_T_LOOKUP, &[b'x'; 255]);
        assert!(parse(&longest, Policy::Rw).is_ok());
    }

    #[test]
    fn wild_name_length_is_refused() {
        let mut req = named(VIRTIO_MSHARE_T_UNLINK, b"x");
        req.name_len = u32::MAX.into();
        assert_eq!(parse(&req, Policy::Rw), Err(Errno(libc::ENAMETOOLONG)));
    }

    #[test]
    fn unknown_type_is_not_supported() {
        for kind in [0, 11, u32::MAX] {
            assert_eq!(parse(&req(kind), Policy::Rw), Err(Errno(libc::EOPNOTSUPP)));
        }
    }

    #[test]
    fn read_only_policies_change_nothing() {
        for kind in [
            VIRTIO_MSHARE_T_CREATE,
            VIRTIO_MSHARE_T_SIZE,
            VIRTIO_MSHARE_T_PROTECT,
            VIRTIO_MSHARE_T_DISCARD,
            VIRTIO_MSHARE_T_UNLINK,
        ] {
            for policy in [Policy::Ro, Policy::PrivateRo] {
                let req = named(kind, b"x");
                assert_eq!(parse(&req, policy), Err(Errno(libc::EROFS)));
            }
            assert!(parse(&named(kind, b"x"), Policy::Private).is_ok());
        }
    }

    #[test]
    fn unknown_flags_protections_and_reserved_bits_are_invalid() {
        let mut flags = req(VIRTIO_MSHARE_T_STAT);
        flags.flags = VIRTIO_MSHARE_REQ_EXCL.into();
        let mut prot = req(VIRTIO_MSHARE_T_PROTECT);
        prot.prot = 2.into();
        let mut reserved = req(VIRTIO_MSHARE_T_STAT);
        reserved.reserved = 1.into();
        for req in [flags, prot, reserved] {
            assert_eq!(parse(&req, Policy::Rw), Err(Errno(libc::EINVAL)));
        }
    }

    #[test]
    fn status_is_an_errno_whatever_the_broker_says() {
        assert_eq!(Errno(libc::ENOENT).status(), 2);
        for wild in [0, -5, 5000, i32::MIN] {
            assert_eq!(Errno(wild).status(), 5);
        }
    }
}
