//! The demo; `make demo` builds what it needs and runs it where guests run.

use std::process::ExitCode;

use mshare_tests::demo;
use mshare_tests::guests::Images;
use mshare_tests::lab;

fn main() -> ExitCode {
    let images = match Images::from_env() {
        Ok(images) => images,
        Err(error) => {
            eprintln!("demo: {error}; start it with `make demo`");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = lab::set_shmem_enabled("advise") {
        eprintln!("demo: the lab gives no huge pages, so this takes longer: {error}");
    }
    if demo::run(&images) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
