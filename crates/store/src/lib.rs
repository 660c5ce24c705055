//! The metadata database: what must be remembered exactly, small and durable first.
//!
//! Sessions, token logs, items, turns, events and the page catalog live in one SQLite database (WAL). Its SQL is
//! kept portable. One thread owns the connection; callers send it closures and never share a lock with HTTP.
//! A second file, the mirror, gets every change right after; either mends the other.

#![forbid(unsafe_code)]

mod boundaries;
mod catalog;
mod changes;
mod check;
mod checksum;
mod error;
mod files;
mod history;
mod keys;
pub mod lock;
mod owner;
pub mod pages;
mod queries;
mod responses;
mod schema;
mod sessions;
mod store;
mod tokens;
mod weights;
mod written;

pub use boundaries::Boundary;
pub use changes::{BeginTurn, Cut, EditItems, FinishTurn, Leaf, NewSession, UpdateSession};
pub use error::StoreError;
pub use history::{EventRow, History, ItemRow, NewEvent, TurnRow};
pub use keys::KeyRow;
pub use pages::{ClaimRow, PageRow, RemovedPage, StepCommit};
pub use queries::SessionCounts;
pub use responses::ResponseRow;
pub use sessions::{SessionRow, StatusFilter};
pub use store::{Durability, Store};
pub use weights::WeightsFile;
