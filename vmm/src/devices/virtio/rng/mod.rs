//! Entropy (virtio 1.2, section 5.4): the host's random numbers for the
//! guest's pool. The smallest device, and the pattern for the others.

mod device;
mod handler;
#[cfg(test)]
mod tests;

pub use device::Rng;
