//! One file per command; `bench` has a folder of its own.

pub mod chat;
pub mod doctor;
pub mod keys;
pub mod models;
pub mod run;
pub mod serve;
pub mod sessions;

mod answer;
