//! Renders chat templates for comparison with other implementations: one JSON object a line on standard input (see
//! [`Request`]), one a line on standard output: `{"text": …}` or `{"error": …}`.

use std::error::Error;
use std::io::{BufRead, Write};

use dormouse_models::ChatTemplate;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Request {
    template: String,
    messages: Vec<Map<String, Value>>,
    #[serde(default)]
    tools: Vec<Value>,
    add_generation_prompt: bool,
    #[serde(default)]
    bos: String,
    #[serde(default)]
    eos: String,
    /// Further variables of the template.
    #[serde(default)]
    extra: Map<String, Value>,
    /// What `strftime_now` takes for the present, e.g. `2026-02-03T04:05:06[UTC]`.
    now: Option<String>,
}

/// The last template that was compiled, and what it was compiled from.
type Compiled = Option<((String, String, String, Option<String>), ChatTemplate)>;

fn main() -> Result<(), Box<dyn Error>> {
    let mut output = std::io::stdout().lock();
    let mut compiled = None;
    for line in std::io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?)?;
        let answer = match render(request, &mut compiled) {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        writeln!(output, "{answer}")?;
    }
    Ok(())
}

fn render(request: Request, compiled: &mut Compiled) -> Result<String, Box<dyn Error>> {
    let Request { template, messages, tools, add_generation_prompt, bos, eos, extra, now } = request;
    let source = (template, bos, eos, now);
    let template = match compiled {
        Some((known, template)) if *known == source => template,
        _ => {
            let mut template = ChatTemplate::new(&source.0, &source.1, &source.2)?;
            if let Some(now) = &source.3 {
                template = template.at(now.parse()?);
            }
            &mut compiled.insert((source, template)).1
        }
    };
    Ok(template.render_with(&messages, &tools, add_generation_prompt, &extra)?)
}
