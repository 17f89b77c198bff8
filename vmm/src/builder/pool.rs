//! The guest's door to a shared pool.

use std::sync::{Arc, Mutex};

use super::{Builder, Error};
use crate::arch::{cpuid, layout};
use crate::devices::virtio::mshare::{Guest, Mshare};
use crate::doctor::{self, tables::Tables};
use crate::patience::{self, Wait};

impl Builder {
    /// Joins the pool of the configuration, if there is one.
    pub(super) fn add_pool(&mut self) -> Result<(), Error> {
        let Some(pool) = self.config.pool.clone() else {
            return Ok(());
        };
        let name = self.config.name.as_deref().unwrap_or("guest");
        let probed = pool.policy.tables();
        let probed = probed.then(|| doctor::probe_shared_tables(&self.kvm));
        let tables = probed.as_ref().is_some_and(Tables::shareable);
        let phys_bits = cpuid::physical_address_bits(&self.features);
        let ram_end = layout::ram_ranges(self.config.memory.0)
            .last()
            .map_or(0, |(base, len)| base + len);
        let guest = Guest {
            vm: Arc::clone(&self.vm),
            exit: self.exit.clone(),
            name,
            ram_end,
            phys_bits,
        };
        let _wait = Wait::broker(&pool.socket);
        let device = Mshare::join(guest, &pool.socket, pool.policy, tables)?;
        if device.policy() != pool.policy
            && let Some(why) = probed.as_ref().and_then(Tables::refusal)
        {
            patience::say(&format!(
                "{why} (see `vmm doctor`): {name} attaches with tables of its own"
            ));
        }
        self.add_virtio(Arc::new(Mutex::new(device)))?;
        Ok(())
    }
}
