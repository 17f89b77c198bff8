//! The `vmm` program: see `vmm --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
