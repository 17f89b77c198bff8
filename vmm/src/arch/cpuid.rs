//! The CPU a guest sees: what KVM supports on this host, with the guest's own
//! topology (one package, one thread per core).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Level types of leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the subleaf matters.
const SIGNIFICANT_INDEX: u32 = 1;

/// CPUID could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM did not say what it supports.
    #[error("cannot read the CPUID that KVM supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// The list is longer than KVM takes.
    #[error("the CPUID list has too many entries")]
    TooMany,
}

/// Reads what this host's KVM supports.
///
/// # Errors
///
/// The ioctl fails.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    let list = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::Supported)?;
    let mut entries = list.as_slice().to_vec();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // KVM emulates it with the in-kernel APIC, and older kernels leave it
        // to user space to say so.
        for entry in entries.iter_mut().filter(|e| e.function == 1) {
            entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
        }
    }
    Ok(entries)
}

/// What depends on XSAVE, by leaf: bits of EBX, ECX and EDX.
const XSAVE_FEATURES: [(u32, u32, u32, u32); 2] = [
    // FMA, XSAVE, OSXSAVE, AVX, F16C.
    (1, 0, 0x3c00_1000, 0),
    // AVX2 and all of AVX-512; AVX-512, PKU, VAES, VPCLMULQDQ; AVX-512, AMX.
    (7, 0xdc23_0020, 0x0000_5e4a, 0x03c0_010c),
];
/// Extended state enumeration.
const XSAVE_LEAF: u32 = 0xd;
/// AMD: XOP, LWP, FMA4.
const AMD_XSAVE_ECX: u32 = (1 << 11) | (1 << 15) | (1 << 16);

/// Takes XSAVE and everything that needs it away, for hosts on which a guest
/// cannot use it.
pub fn hide_xsave(entries: &mut Vec<kvm_cpuid_entry2>) {
    entries.retain(|e| e.function != XSAVE_LEAF);
    for e in entries.iter_mut() {
        for (function, ebx, ecx, edx) in XSAVE_FEATURES {
            if e.function == function && e.index == 0 {
                e.ebx &= !ebx;
                e.ecx &= !ecx;
                e.edx &= !edx;
            }
        }
        // AVX-VNNI, AVX-IFMA and their kin.
        if e.function == 7 && e.index == 1 {
            (e.eax, e.edx) = (0, 0);
        }
        if e.function == 0x8000_0001 {
            e.ecx &= !AMD_XSAVE_ECX;
        }
    }
}

/// Bits of a guest-physical address (CPUID 0x8000_0008, EAX 7:0).
pub fn physical_address_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    supported
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        // The least that a CPU without the leaf has (Intel SDM 3, 5.1.4).
        .map_or(36, |entry| entry.eax.to_le_bytes()[0])
}

/// Bits needed for the APIC ids of `cpus` CPUs.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// Replaces a field of `value` by `field`.
fn with_field(value: u32, shift: u32, bits: u32, field: u32) -> u32 {
    let mask = ((1 << bits) - 1) << shift;
    (value & !mask) | ((field << shift) & mask)
}

/// The entries of leaf `function` (0xb or 0x1f) for the CPU `id` of `cpus`.
fn topology_leaf(function: u32, id: u8, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: SIGNIFICANT_INDEX,
        eax,
        ebx,
        ecx: index | (kind << 8),
        edx: id.into(),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, id_bits(cpus), cpus.into(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// The list for CPU `id` of `cpus`, made from the host's [`supported`] list.
///
/// # Errors
///
/// The list is longer than KVM takes.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], id: u8, cpus: u8) -> Result<CpuId, Error> {
    let mut list = Vec::with_capacity(supported.len() + 6);
    let mut topology = Vec::new();
    for entry in supported {
        let mut e = *entry;
        match e.function {
            1 => {
                e.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
                e.ebx = with_field(e.ebx, 24, 8, id.into());
                e.ebx = with_field(e.ebx, 16, 8, cpus.into());
                e.edx = if cpus > 1 {
                    e.edx | LEAF1_EDX_HTT
                } else {
                    e.edx & !LEAF1_EDX_HTT
                };
            }
            // Intel caches: levels 1 and 2 belong to one core, level 3 to all.
            4 if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 7;
                let sharing = if level >= 3 {
                    (1 << id_bits(cpus)) - 1
                } else {
                    0
                };
                e.eax = with_field(e.eax, 14, 12, sharing);
                e.eax = with_field(e.eax, 26, 6, (1 << id_bits(cpus)) - 1);
            }
            0xb | 0x1f => {
                if !topology.contains(&e.function) {
                    topology.push(e.function);
                }
                continue;
            }
            // AMD: number of cores and width of the APIC id.
            0x8000_0008 => {
                e.ecx = with_field(e.ecx, 0, 8, u32::from(cpus) - 1);
                e.ecx = with_field(e.ecx, 12, 4, id_bits(cpus));
            }
            // AMD caches, as leaf 4.
            0x8000_001d if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 7;
                let sharing = if level >= 3 { u32::from(cpus) - 1 } else { 0 };
                e.eax = with_field(e.eax, 14, 12, sharing);
            }
            // AMD: APIC id, core id (one thread each), one node.
            0x8000_001e => {
                e.eax = id.into();
                e.ebx = id.into();
                e.ecx = 0;
            }
            _ => {}
        }
        list.push(e);
    }
    // Linux reads the topology from leaf 0xb on every CPU that has it.
    if supported.iter().any(|e| e.function == 0 && e.eax >= 0xb) && !topology.contains(&0xb) {
        topology.push(0xb);
    }
    for function in topology {
        list.extend(topology_leaf(function, id, cpus));
    }
    CpuId::from_entries(&list).map_err(|_| Error::TooMany)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ..Default::default()
        }
    }

    fn find(list: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *list
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn for_vcpu_gives_each_cpu_its_apic_id() {
        let mut max = entry(0);
        max.eax = 0xd;
        for id in [0, 1, 31] {
            let list = for_vcpu(&[max, entry(1), entry(0xb)], id, 32).unwrap();
            assert_eq!(find(&list, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(find(&list, 0xb, 0).edx, u32::from(id));
            assert_eq!(find(&list, 0xb, 1).edx, u32::from(id));
        }
    }

    #[test]
    fn for_vcpu_describes_one_package_of_single_thread_cores() {
        let list = for_vcpu(&[entry(1), entry(0xb)], 0, 3).unwrap();
        let (smt, core, end) = (
            find(&list, 0xb, 0),
            find(&list, 0xb, 1),
            find(&list, 0xb, 2),
        );
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, LEVEL_SMT << 8));
        assert_eq!(
            (core.eax, core.ebx, core.ecx),
            (2, 3, 1 | (LEVEL_CORE << 8))
        );
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert_ne!(find(&list, 1, 0).edx & LEAF1_EDX_HTT, 0);
    }

    #[test]
    fn for_vcpu_with_one_cpu_needs_no_id_bits() {
        let list = for_vcpu(&[entry(1), entry(0xb), entry(0x8000_0008)], 0, 1).unwrap();
        assert_eq!(find(&list, 0xb, 1).eax, 0);
        assert_eq!(find(&list, 1, 0).edx & LEAF1_EDX_HTT, 0);
        assert_eq!(find(&list, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn for_vcpu_says_hypervisor_and_x2apic() {
        let leaf = find(&for_vcpu(&[entry(1)], 0, 1).unwrap(), 1, 0);
        assert_ne!(leaf.ecx & LEAF1_ECX_HYPERVISOR, 0);
        assert_ne!(leaf.ecx & LEAF1_ECX_X2APIC, 0);
    }

    #[test]
    fn for_vcpu_adds_the_topology_leaf_only_below_the_maximum() {
        let mut max = entry(0);
        max.eax = 0xa;
        let list = for_vcpu(&[max], 0, 2).unwrap();
        assert!(list.as_slice().iter().all(|e| e.function != 0xb));
        max.eax = 0xb;
        let list = for_vcpu(&[max], 0, 2).unwrap();
        assert_eq!(find(&list, 0xb, 1).ebx, 2);
    }

    #[test]
    fn hide_xsave_takes_xsave_and_avx_away() {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut list = vec![all(1, 0), all(7, 0), all(7, 1), all(0xd, 0), all(0xd, 1)];
        hide_xsave(&mut list);
        assert_eq!(list.len(), 3);
        // XSAVE, AVX; but not SSE4.2 or POPCNT.
        assert_eq!(list[0].ecx & ((1 << 26) | (1 << 28)), 0);
        assert_eq!(list[0].ecx & ((1 << 20) | (1 << 23)), (1 << 20) | (1 << 23));
        // AVX2, AVX-512F; but not SMEP, BMI1 or BMI2.
        assert_eq!(list[1].ebx & ((1 << 5) | (1 << 16)), 0);
        assert_eq!(list[1].ebx & 0x188, 0x188);
        assert_eq!((list[1].eax, list[2].eax), (u32::MAX, 0));
    }

    #[test]
    fn for_vcpu_leaves_other_leaves_alone() {
        let mut seven = entry(7);
        seven.ebx = 0x1234_5678;
        let list = for_vcpu(&[seven], 3, 4).unwrap();
        assert_eq!(find(&list, 7, 0), seven);
    }
}
