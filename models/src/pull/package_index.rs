//! The Simple API of a Python package index, as JSON (PEP 691) or as HTML (PEP 503), whichever the index answers.

use regex::Regex;
use reqwest::Url;
use reqwest::header::ACCEPT;
use serde::Deserialize;

use super::Reason;
use super::download::words;

const ACCEPTED: &str = "application/vnd.pypi.simple.v1+json, text/html;q=0.5";
/// Largest index page of one package; the largest real ones are under 10 MB.
const PAGE_LIMIT: usize = 32 << 20;

/// A wheel to download.
#[derive(Debug, PartialEq)]
pub struct Wheel {
    pub url: Url,
    pub sha256: String,
}

#[derive(Deserialize)]
struct Page {
    files: Vec<ListedFile>,
}

#[derive(Deserialize)]
struct ListedFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::HashMap<String, String>,
}

/// Finds the wheel of this version.
pub async fn wheel(
    client: &reqwest::Client,
    index: &str,
    package: &str,
    version: &str,
) -> Result<Wheel, Reason> {
    let address = format!("{index}/{package}/");
    let answer = client.get(&address).header(ACCEPT, ACCEPTED).send().await.map_err(words)?;
    let mut answer = answer.error_for_status().map_err(words)?;
    let base = answer.url().clone();
    let mut page = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(words)? {
        page.extend_from_slice(&chunk);
        if page.len() > PAGE_LIMIT {
            return Err(format!("the index page of {package} is larger than {PAGE_LIMIT} bytes"));
        }
    }
    find(&String::from_utf8_lossy(&page), &base, package, version)
}

fn find(page: &str, base: &Url, package: &str, version: &str) -> Result<Wheel, Reason> {
    let files = match serde_json::from_str::<Page>(page) {
        Ok(page) => page.files,
        Err(_) => listed_in_html(page)?,
    };
    let beginning = format!("{}-{version}-", package.replace(['-', '.'], "_")).to_lowercase();
    let file = files
        .into_iter()
        .find(|file| file.filename.to_lowercase().starts_with(&beginning) && file.filename.ends_with(".whl"))
        .ok_or_else(|| format!("the index has no wheel of {package} {version}"))?;
    let sha256 =
        file.hashes.get("sha256").ok_or_else(|| format!("the index has no sha256 of {}", file.filename))?;
    let url =
        base.join(&file.url).map_err(|error| format!("the index has a bad address of {package}: {error}"))?;
    Ok(Wheel { url, sha256: sha256.to_lowercase() })
}

fn listed_in_html(page: &str) -> Result<Vec<ListedFile>, Reason> {
    let link = r##"<a\s[^>]*href="([^"#]+)#sha256=([0-9a-fA-F]{64})"[^>]*>([^<]+)</a>"##;
    let link = Regex::new(link).map_err(|error| error.to_string())?;
    let file = |found: regex::Captures<'_>| ListedFile {
        url: found[1].replace("&amp;", "&"),
        hashes: [("sha256".to_owned(), found[2].to_owned())].into(),
        filename: found[3].trim().to_owned(),
    };
    Ok(link.captures_iter(page).map(file).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_html_pages_name_the_same_wheel() {
        let base = Url::parse("https://index.example/simple/a-b/").unwrap();
        let sum = "ab".repeat(32);
        let json = serde_json::json!({"files": [
            {"filename": "a_b-1.0.tar.gz", "url": "x.tar.gz", "hashes": {"sha256": "00"}},
            {"filename": "a_b-1.0-py3-none-any.whl", "url": "../../f/a_b.whl", "hashes": {"sha256": sum}}]});
        let html = format!(
            "<a href=\"x.tar.gz#sha256={sum}\">a_b-1.0.tar.gz</a><br/>\n\
             <a href=\"../../f/a_b.whl#sha256={sum}\" data-x=\"&gt;=3\">a_b-1.0-py3-none-any.whl</a>"
        );
        let wheel = find(&json.to_string(), &base, "a-b", "1.0").unwrap();
        assert_eq!(wheel.url.as_str(), "https://index.example/f/a_b.whl");
        assert_eq!(find(&html, &base, "a-b", "1.0").unwrap(), wheel);
        assert!(find(&html, &base, "a-b", "1.1").unwrap_err().contains("no wheel of a-b 1.1"));
    }
}
