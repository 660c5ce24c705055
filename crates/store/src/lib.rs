//! The metadata database: what must be remembered exactly, small and durable first.
//!
//! Sessions, token logs, items, turns, events and the page catalog live in one SQLite database (WAL). Its SQL is
//! kept portable. One thread owns the connection; callers send it closures and never share a lock with HTTP.
//! A second file, the mirror, gets every change right after; either mends the other.

#![forbid(unsafe_code)]

mod catalog;
mod checksum;
mod error;
pub mod lock;
mod owner;
pub mod pages;
mod schema;
mod sessions;
mod store;
mod tokens;

pub use error::StoreError;
pub use pages::{PageRow, RemovedPage, StepCommit};
pub use sessions::{SessionRow, StatusFilter};
pub use store::{Durability, Store};
