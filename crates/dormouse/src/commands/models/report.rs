//! What `models inspect` found, and how it is told.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::output::{outln, print_json};
use crate::sizes::Bytes;

/// What was found, for people and for programs.
#[derive(Default)]
pub struct Report {
    lines: Vec<(&'static str, String)>,
    pub facts: Map<String, Value>,
    /// Why the model will not run here.
    pub obstacle: Option<String>,
    /// What its user should know though it runs.
    notes: Vec<String>,
}

impl Report {
    /// A fact that reads the same for both.
    pub fn fact(&mut self, name: &'static str, value: impl Into<Value>) {
        let value = value.into();
        let words = value.as_str().map_or_else(|| value.to_string(), String::from);
        self.told(name, value, words);
    }

    /// A fact that people are told in other words.
    pub fn told(&mut self, name: &'static str, value: impl Into<Value>, words: String) {
        self.lines.push((name, words));
        self.facts.insert(name.to_owned(), value.into());
    }

    pub fn bytes(&mut self, name: &'static str, bytes: u64) {
        self.told(name, bytes, Bytes(bytes).to_string());
    }

    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub fn print(mut self, as_json: bool) -> Result<ExitCode> {
        let code = if self.obstacle.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        if as_json {
            self.facts.insert("will_run".into(), self.obstacle.is_none().into());
            self.facts.insert("reason".into(), self.obstacle.into());
            self.facts.insert("notes".into(), self.notes.into());
            print_json(&self.facts)?;
            return Ok(code);
        }
        for (name, words) in &self.lines {
            outln!("{name:<22}{words}");
        }
        for note in &self.notes {
            outln!("{:<22}{note}", "note");
        }
        match &self.obstacle {
            None => outln!("will run here: yes"),
            Some(reason) => outln!("will run here: no: {reason}"),
        }
        Ok(code)
    }
}
