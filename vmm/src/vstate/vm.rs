//! A KVM virtual machine and its memory slots.
//!
//! Slots may come and go while vCPUs run. The machine keeps what backs a slot
//! alive until the slot is removed, so that guest-physical memory can never
//! point at memory of this process that is used for something else.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_READONLY,
    KVM_X86_QUIRK_SLOT_ZAP_ALL, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::memory::{Access, Backing};
use crate::arch::layout;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No virtual machine.
    #[error("KVM cannot create a virtual machine")]
    Create(#[source] kvm_ioctls::Error),
    /// A capability this VMM cannot do without.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// A platform setting.
    #[error("KVM refuses {0}")]
    Setup(&'static str, #[source] kvm_ioctls::Error),
    /// All slots of the host are taken.
    #[error("all {0} memory slots are in use")]
    NoSlot(usize),
    /// A slot was not added.
    #[error("KVM refuses {len:#x} bytes of memory at guest address {gpa:#x}")]
    AddSlot {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A slot was not removed.
    #[error("KVM does not remove memory slot {0}")]
    RemoveSlot(u32, #[source] kvm_ioctls::Error),
    /// There is no such slot.
    #[error("there is no memory slot {0}")]
    UnknownSlot(u32),
    /// An interrupt was not connected.
    #[error("KVM does not connect interrupt {0}")]
    Irqfd(u32, #[source] kvm_ioctls::Error),
    /// A notification was not connected.
    #[error("KVM does not connect a notification at guest address {0:#x}")]
    Ioeventfd(u64, #[source] kvm_ioctls::Error),
    /// A vCPU was not created.
    #[error("KVM cannot create vCPU {0}")]
    CreateVcpu(u8, #[source] kvm_ioctls::Error),
    /// The interrupt routes were not taken.
    #[error("KVM refuses the interrupt routes")]
    Routes(#[source] kvm_ioctls::Error),
}

/// Names one memory slot of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u32);

/// An interrupt message, as a device would write it to the local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address, low half (the high half is zero).
    pub address: u32,
    /// Data.
    pub data: u32,
}

/// Which message an interrupt input stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiRoute {
    /// The interrupt input.
    pub gsi: u32,
    /// What it sends.
    pub message: MsiMessage,
}

#[derive(Debug)]
struct Slot {
    gpa: u64,
    backing: Arc<dyn Backing>,
}

/// A virtual machine: split irqchip (local APICs in KVM, the I/O APIC ours),
/// no PIT.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    max_slots: usize,
    slots: Mutex<BTreeMap<SlotId, Slot>>,
}

impl Vm {
    /// Creates a machine without memory and CPUs.
    ///
    /// # Errors
    ///
    /// The host's KVM refuses or lacks something we need.
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        for (cap, name) in [
            (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
            (
                Cap::SplitIrqchip,
                "the split irqchip (KVM_CAP_SPLIT_IRQCHIP)",
            ),
            (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
            (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
            (
                Cap::ImmediateExit,
                "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
            ),
            (Cap::ReadonlyMem, "read-only memory (KVM_CAP_READONLY_MEM)"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Missing(name));
            }
        }
        let fd = kvm.create_vm().map_err(Error::Create)?;
        if !disable_zap_all(&fd) {
            log::debug!("this host's KVM zaps all memory when a memslot goes");
        }
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(|e| Error::Setup("the identity map", e))?;
        let tss = usize::try_from(layout::TSS).unwrap_or(usize::MAX);
        fd.set_tss_address(tss)
            .map_err(|e| Error::Setup("the TSS address", e))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(layout::IOAPIC_PINS);
        fd.enable_cap(&split)
            .map_err(|e| Error::Setup("the split irqchip", e))?;
        Ok(Self {
            fd,
            max_slots: kvm.get_nr_memslots(),
            slots: Mutex::default(),
        })
    }

    /// Shows `backing` to the guest at guest-physical address `gpa`, from now
    /// until [`Vm::remove_memslot`]. May be called while vCPUs run.
    ///
    /// A store to a read-only slot leaves the guest as an MMIO write, which no
    /// device answers.
    ///
    /// # Errors
    ///
    /// The range overlaps another slot or is not aligned to pages, or the host
    /// has no slot left. Nothing changes then.
    pub fn add_memslot(
        &self,
        gpa: u64,
        backing: Arc<dyn Backing>,
        access: Access,
    ) -> Result<SlotId, Error> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let id = first_free(&slots, self.max_slots).ok_or(Error::NoSlot(self.max_slots))?;
        let len = backing.len();
        let region = kvm_userspace_memory_region {
            slot: id.0,
            flags: match access {
                Access::ReadOnly => KVM_MEM_READONLY,
                Access::ReadWrite => 0,
            },
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: backing.host_addr(),
        };
        // SAFETY: the backing stays mapped while it lives, and it is kept in
        // `slots` until KVM has let go of the slot.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|source| Error::AddSlot {
            gpa,
            len,
            source,
        })?;
        slots.insert(id, Slot { gpa, backing });
        Ok(id)
    }

    /// Takes a slot away from the guest. When this returns no vCPU can reach
    /// the memory any more, and its backing has been released.
    ///
    /// # Errors
    ///
    /// There is no such slot.
    pub fn remove_memslot(&self, id: SlotId) -> Result<(), Error> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get(&id).ok_or(Error::UnknownSlot(id.0))?;
        let region = kvm_userspace_memory_region {
            slot: id.0,
            flags: 0,
            guest_phys_addr: slot.gpa,
            // A size of zero removes the slot.
            memory_size: 0,
            userspace_addr: slot.backing.host_addr(),
        };
        // SAFETY: removing a slot takes memory away from the guest only.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(|e| Error::RemoveSlot(id.0, e))?;
        slots.remove(&id);
        Ok(())
    }

    /// Number of memory slots in use.
    pub fn memslots(&self) -> usize {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.len()
    }

    /// The slots in use, for a test that takes one away behind their owner.
    #[cfg(test)]
    pub(crate) fn slot_ids(&self) -> Vec<SlotId> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.keys().copied().collect()
    }

    /// Creates the vCPU `id`.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(id.into())
            .map_err(|e| Error::CreateVcpu(id, e))
    }

    /// Raises interrupt `gsi` (edge) each time `event` is written.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|e| Error::Irqfd(gsi, e))
    }

    /// Signals `event` when the guest writes the 32-bit `value` to `address`,
    /// without leaving the vCPU.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(|e| Error::Ioeventfd(address, e))
    }

    /// Replaces the routes of all interrupt inputs.
    ///
    /// # Errors
    ///
    /// KVM refuses; the old routes stay.
    pub fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), Error> {
        let entries: Vec<_> = routes.iter().map(routing_entry).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Routes(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_gsi_routing(&table).map_err(Error::Routes)
    }
}

/// Asks KVM to zap only the slot that is removed; says whether it will.
fn disable_zap_all(fd: &VmFd) -> bool {
    let offered = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    let quirk = u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL);
    if u64::try_from(offered).unwrap_or(0) & quirk == 0 {
        return false;
    }
    let mut request = kvm_enable_cap {
        cap: KVM_CAP_DISABLE_QUIRKS2,
        ..Default::default()
    };
    request.args[0] = quirk;
    fd.enable_cap(&request).is_ok()
}

fn first_free(slots: &BTreeMap<SlotId, Slot>, max: usize) -> Option<SlotId> {
    let mut free = 0;
    for id in slots.keys() {
        if id.0 != free {
            break;
        }
        free += 1;
    }
    (usize::try_from(free).ok()? < max).then_some(SlotId(free))
}

fn routing_entry(route: &MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: route.gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = route.message.address;
    entry.u.msi.data = route.message.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vstate::memory::{Mapping, PAGE_SIZE, memory_file};

    fn backing(pages: u64) -> Arc<Mapping> {
        let file = memory_file("test", pages * PAGE_SIZE).unwrap();
        Arc::new(Mapping::new(&file, 0, pages * PAGE_SIZE, Access::ReadWrite).unwrap())
    }

    /// A machine, or none where this host has no KVM.
    fn vm() -> Option<Vm> {
        Kvm::new().ok().map(|kvm| Vm::new(&kvm).unwrap())
    }

    #[test]
    fn slots_are_reused_and_release_their_backing() {
        let Some(vm) = vm() else { return };
        let (first, second) = (backing(2), backing(2));
        let a = vm.add_memslot(0, first.clone(), Access::ReadWrite).unwrap();
        let b = vm
            .add_memslot(0x10_0000, second.clone(), Access::ReadOnly)
            .unwrap();
        assert_ne!(a, b);
        assert_eq!((vm.memslots(), Arc::strong_count(&first)), (2, 2));
        vm.remove_memslot(a).unwrap();
        assert_eq!((vm.memslots(), Arc::strong_count(&first)), (1, 1));
        let c = vm.add_memslot(0x20_0000, first, Access::ReadWrite).unwrap();
        assert_eq!(c, a);
    }

    #[test]
    fn overlapping_slot_is_refused_and_nothing_changes() {
        let Some(vm) = vm() else { return };
        vm.add_memslot(0, backing(2), Access::ReadWrite).unwrap();
        let other = backing(2);
        let error = vm
            .add_memslot(PAGE_SIZE, other.clone(), Access::ReadWrite)
            .unwrap_err();
        assert!(
            matches!(error, Error::AddSlot { gpa: PAGE_SIZE, .. }),
            "{error}"
        );
        assert_eq!((vm.memslots(), Arc::strong_count(&other)), (1, 1));
    }

    #[test]
    fn removing_an_unknown_slot_is_refused() {
        let Some(vm) = vm() else { return };
        assert!(matches!(
            vm.remove_memslot(SlotId(7)),
            Err(Error::UnknownSlot(7))
        ));
    }

    #[test]
    fn first_free_slot_fills_gaps_and_stops_at_the_limit() {
        let mut slots = BTreeMap::new();
        for id in [0, 1, 3] {
            let slot = Slot {
                gpa: 0,
                backing: backing(1),
            };
            slots.insert(SlotId(id), slot);
        }
        assert_eq!(first_free(&slots, 100), Some(SlotId(2)));
        slots.insert(
            SlotId(2),
            Slot {
                gpa: 0,
                backing: backing(1),
            },
        );
        assert_eq!(first_free(&slots, 5), Some(SlotId(4)));
        assert_eq!(first_free(&slots, 4), None);
    }
}
