//! Guests of the real VMM on the real KVM: what the system promises, tried
//! from outside. Each test starts the guests it needs. `make test` runs this
//! natively where KVM has two-dimensional paging, else in the lab.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod ablation;
mod agent;
mod broker;
mod common;
mod errnos;
mod hazards;
mod huge;
mod local;
mod policies;
mod removal;
mod sharing;
mod vmm;
