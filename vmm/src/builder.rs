//! Assembles a guest from its configuration.
//!
//! The order matters: everything that can fail because of what the user gave
//! (files first, then memory) happens before there are threads, and memory is
//! given to KVM before there are vCPUs, when that is cheap.

mod pool;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::SubscriberOps;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{acpi, cpuid, layout, regs};
use crate::boot::initrd::{self, Initrd};
use crate::boot::kernel::{self, Kernel};
use crate::boot::params::{self, Params};
use crate::config::{self, Config};
use crate::devices::bus::{self, MmioBus, PioBus};
use crate::devices::console::{self, Console, Log};
use crate::devices::ioapic::IoApic;
use crate::devices::power::Power;
use crate::devices::pvpanic::PvPanic;
use crate::devices::serial::{SerialDevice, SerialPort};
use crate::devices::serial_input::SerialInput;
use crate::devices::virtio::block::{self, Block, Disk};
use crate::devices::virtio::mshare;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{self, BadCid, HostSocket, Vsock};
use crate::devices::virtio::{MmioTransport, TransportError, VirtioDevice};
use crate::devices::{EventLoop, EventLoopHandle};
use crate::exit::Exit;
use crate::host;
use crate::machine::{DevicesThread, Machine};
use crate::vstate::memory::{self, Access, GuestRam};
use crate::vstate::vcpu::{self, Buses, Vcpu};
use crate::vstate::vm::{self, Vm};

/// A guest that could not be assembled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot work anywhere.
    #[error("the configuration is wrong")]
    Config(#[from] config::Error),
    /// The host cannot run this guest.
    #[error("this host cannot run the guest")]
    Host(#[from] host::Error),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The initrd.
    #[error(transparent)]
    Initrd(#[from] initrd::Error),
    /// The console's file.
    #[error("cannot empty the console file")]
    Log(#[source] io::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] block::Error),
    /// The socket of the vsock device.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// The guest's context id.
    #[error(transparent)]
    VsockCid(#[from] BadCid),
    /// Guest memory.
    #[error("cannot set up guest memory")]
    Memory(#[from] memory::Error),
    /// The virtual machine.
    #[error("cannot set up the virtual machine")]
    Vm(#[from] vm::Error),
    /// A vCPU.
    #[error("cannot set up a vCPU")]
    Vcpu(#[from] vcpu::Error),
    /// The CPU's features.
    #[error("cannot set up the features of the CPUs")]
    Cpuid(#[from] cpuid::Error),
    /// The boot processor's tables.
    #[error("cannot write the boot tables")]
    BootTables(#[source] vm_memory::GuestMemoryError),
    /// The ACPI tables.
    #[error("cannot describe the platform to the guest")]
    Acpi(#[from] acpi::Error),
    /// The kernel's parameters.
    #[error("cannot pass parameters to the kernel")]
    Params(#[from] params::Error),
    /// Two devices at one place.
    #[error("cannot place a device")]
    Bus(#[from] bus::Error),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] mshare::Error),
    /// A virtio device.
    #[error("cannot set up a virtio device")]
    Transport(#[from] TransportError),
    /// No more slots for devices.
    #[error("a guest has at most {max} virtio devices", max = layout::MAX_MMIO_DEVICES)]
    NoDeviceSlot,
    /// No event file descriptor.
    #[error("cannot create an event file descriptor")]
    EventFd(#[source] io::Error),
    /// No event loop.
    #[error("cannot create the event loop of the devices")]
    EventLoop(#[source] event_manager::Error),
}

/// Files of the host that are needed to start the guest, opened before
/// anything else.
#[derive(Debug)]
struct BootFiles {
    kernel: Kernel,
    initrd: Option<Initrd>,
}

impl BootFiles {
    fn open(config: &Config) -> Result<Self, Error> {
        Ok(Self {
            kernel: Kernel::open(&config.kernel)?,
            initrd: config.initrd.as_deref().map(Initrd::open).transpose()?,
        })
    }
}

fn open_disks(config: &Config) -> Result<Vec<Disk>, Error> {
    let disks = config.disks.iter().enumerate().map(|(i, disk)| {
        Disk::open(&disk.path, disk.read_only, &format!("disk{i}")).map_err(Error::Disk)
    });
    disks.collect()
}

/// A guest that is being assembled: more devices may be added.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use vmm::builder::Builder;
/// use vmm::config::Config;
///
/// let builder = Builder::new(&Config::new("bzImage"))?;
/// let ended = builder.build()?.run(None)?;
/// println!("{ended}");
/// # Ok(())
/// # }
/// ```
pub struct Builder {
    config: Config,
    cpus: u8,
    files: BootFiles,
    kvm: Kvm,
    /// What the guest's CPUs have.
    features: Vec<kvm_cpuid_entry2>,
    vm: Arc<Vm>,
    ram: GuestRam,
    mmio: MmioBus,
    pio: PioBus,
    event_loop: EventLoop,
    exit: Exit,
    slots: u32,
    begun: Instant,
    log: Option<Log>,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("config", &self.config)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl Builder {
    /// Opens the files, checks the host, and makes a machine with memory and
    /// all devices of `config`.
    ///
    /// # Errors
    ///
    /// The first thing that does not work, by name.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let begun = Instant::now();
        config.validate()?;
        let cpus = config.cpu_count()?;
        let exit = Exit::new().map_err(Error::EventFd)?;
        let files = BootFiles::open(config)?;
        let mut console = Console::open(&config.console, exit.clone())?;
        let disks = open_disks(config)?;
        let socket = config.vsock.as_ref().map(|v| HostSocket::bind(&v.path));
        let socket = socket.transpose()?;
        host::check_memory(config.memory)?;
        let kvm = host::open_kvm()?;
        let code = host::check_guests(&kvm, cpus)?;
        let mut features = cpuid::supported(&kvm)?;
        if code.keeps_xcr0 == Some(false) {
            log::info!("this host's KVM loses XCR0: the guest gets no XSAVE");
            cpuid::hide_xsave(&mut features);
        }

        let ram = GuestRam::new(config.memory.0)?;
        let vm = Arc::new(Vm::new(&kvm)?);
        for region in &ram.regions {
            use vm_memory::GuestMemoryRegion;
            let gpa = region.start_addr().0;
            vm.add_memslot(gpa, region.clone(), Access::ReadWrite)?;
        }
        let ioapic = IoApic::new(Box::new(Arc::clone(&vm)));
        let mut mmio = MmioBus::default();
        mmio.insert(
            layout::IOAPIC,
            layout::IOAPIC_LEN,
            Arc::new(Mutex::new(ioapic)),
        )?;
        let mut builder = Self {
            config: config.clone(),
            cpus,
            files,
            kvm,
            features,
            vm,
            ram,
            mmio,
            pio: PioBus::default(),
            event_loop: EventLoop::new().map_err(Error::EventLoop)?,
            exit,
            slots: 0,
            begun,
            log: console.log.take(),
        };
        builder.add_platform_devices()?;
        builder.add_console(console)?;
        builder.add_configured_devices(disks, socket)?;
        builder.add_pool()?;
        Ok(builder)
    }

    /// The virtual machine: memory slots may be added at any time.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.ram.memory
    }

    /// Work for the `devices` thread.
    pub fn event_loop(&self) -> EventLoopHandle {
        self.event_loop.remote_endpoint()
    }

    /// Where a device may report the end of the run.
    pub fn exit(&self) -> &Exit {
        &self.exit
    }

    /// Adds a virtio device behind the next virtio-mmio transport; returns the
    /// transport's slot (see [`layout::mmio_base`], [`layout::mmio_gsi`]).
    ///
    /// # Errors
    ///
    /// All slots are taken, or KVM refuses the connections.
    pub fn add_virtio(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<u32, Error> {
        if self.slots >= layout::MAX_MMIO_DEVICES {
            return Err(Error::NoDeviceSlot);
        }
        let slot = self.slots;
        let base = layout::mmio_base(slot);
        let irq = Arc::new(event()?);
        self.vm.register_irqfd(&irq, layout::mmio_gsi(slot))?;
        let transport = MmioTransport::new(device, self.ram.memory.clone(), irq)?;
        for (queue, notify) in transport.queue_notify_fds()? {
            let address = base + layout::MMIO_QUEUE_NOTIFY;
            self.vm.register_ioeventfd(&notify, address, queue)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(base, layout::MMIO_DEVICE_LEN, transport)?;
        self.slots += 1;
        Ok(slot)
    }

    fn add_platform_devices(&mut self) -> Result<(), Error> {
        let power = Arc::new(Mutex::new(Power::new(self.exit.clone())));
        self.pio
            .insert(layout::POWER.into(), layout::POWER_LEN.into(), power)?;
        let pvpanic = Arc::new(Mutex::new(PvPanic::new(self.exit.clone())));
        self.pio.insert(layout::PVPANIC.into(), 1, pvpanic)?;
        Ok(())
    }

    fn add_configured_devices(
        &mut self,
        disks: Vec<Disk>,
        socket: Option<HostSocket>,
    ) -> Result<(), Error> {
        for disk in disks {
            let device = Block::new(disk, self.event_loop());
            self.add_virtio(Arc::new(Mutex::new(device)))?;
        }
        if let Some((config, socket)) = self.config.vsock.as_ref().zip(socket) {
            let device = Vsock::new(config.cid.into(), socket, self.event_loop())?;
            self.add_virtio(Arc::new(Mutex::new(device)))?;
        }
        if self.config.rng {
            let device = Rng::new(self.event_loop());
            self.add_virtio(Arc::new(Mutex::new(device)))?;
        }
        Ok(())
    }

    fn add_console(&mut self, console: Console) -> Result<(), Error> {
        let (irq, wake) = (event()?, event()?);
        self.vm.register_irqfd(&irq, layout::COM1_GSI)?;
        let port_wake = wake.try_clone().map_err(Error::EventFd)?;
        let port = Arc::new(Mutex::new(SerialPort::new(irq, port_wake)));
        let device = SerialDevice::new(Arc::clone(&port), Box::new(console.output));
        let device = Arc::new(Mutex::new(device));
        self.pio
            .insert(layout::COM1.into(), layout::COM1_LEN.into(), device)?;
        if let Some(input) = console.input {
            let exit = self.exit.clone();
            let input = SerialInput::new(port, wake, input.file, input.is_terminal, exit);
            self.event_loop.add_subscriber(Arc::new(Mutex::new(input)));
        }
        Ok(())
    }

    /// Loads the kernel, describes the platform to it and makes the vCPUs.
    ///
    /// # Errors
    ///
    /// The guest's memory is too small, or KVM refuses something.
    pub fn build(self) -> Result<Machine, Error> {
        let BootFiles { kernel, initrd } = self.files;
        let ram = self.config.memory.0;
        let memory = &self.ram.memory;
        regs::write_tables(memory).map_err(Error::BootTables)?;
        let platform = acpi::Platform {
            cpus: self.cpus,
            mmio_devices: self.slots,
        };
        let rsdp = acpi::write_tables(memory, platform)?;
        let kernel = kernel.load(memory)?;
        let limit = kernel
            .header
            .map_or(u64::from(u32::MAX), |h| u64::from(h.initrd_addr_max));
        let initrd = initrd
            .map(|initrd| initrd.load(memory, ram, kernel.end, limit))
            .transpose()?;
        let cmdline = self.config.kernel_cmdline();
        let params = Params {
            ram,
            cmdline: &cmdline,
            header: kernel.header,
            initrd,
            rsdp,
        };
        params::write(memory, &params)?;

        let mut vcpus = Vec::with_capacity(self.cpus.into());
        for id in 0..self.cpus {
            let cpuid = cpuid::for_vcpu(&self.features, id, self.cpus)?;
            vcpus.push(Vcpu::new(&self.vm, id, &cpuid)?);
        }
        if let Some(boot) = vcpus.first() {
            boot.set_entry(kernel.entry)?;
        }
        if let Some(log) = self.log {
            log.begin().map_err(Error::Log)?;
        }
        log::debug!("guest assembled in {:?}", self.begun.elapsed());
        Ok(Machine {
            vm: self.vm,
            vcpus,
            buses: Buses {
                mmio: Arc::new(self.mmio),
                pio: Arc::new(self.pio),
            },
            devices: DevicesThread::new(self.event_loop),
            exit: self.exit,
        })
    }
}

fn event() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)
}
