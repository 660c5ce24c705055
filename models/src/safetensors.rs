//! A folder as Hugging Face ships it: `config.json` and one or several mapped safetensors files.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_kernels::GgmlType;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::ModelError;
use crate::weights::{Tensor, WeightSource};

/// Largest settings file: the index of a thousand files is a tenth of it. Parsed JSON takes many times its size.
const JSON_LIMIT: u64 = 64 << 20;

/// An open model folder.
pub struct SafetensorsFolder {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl SafetensorsFolder {
    /// Maps `model.safetensors`, or the files that `model.safetensors.index.json` names, and checks their headers.
    pub fn open(path: impl AsRef<Path>) -> Result<SafetensorsFolder, ModelError> {
        let path = path.as_ref();
        let index_path = path.join("model.safetensors.index.json");
        let mut tensors = HashMap::new();
        if index_path.exists() {
            let index: Index = read_json(&index_path)?;
            let mut files: Vec<&String> = index.weight_map.values().collect();
            files.sort();
            files.dedup();
            for file in files {
                // The index is a downloaded file: its names must not lead out of the folder.
                if Path::new(file).components().count() != 1 || file.starts_with('.') {
                    return Err(ModelError::malformed(
                        &index_path,
                        format!("'{file}' is not a plain file name"),
                    ));
                }
                map_tensors(&path.join(file), &mut tensors)?;
            }
            if let Some((tensor, _)) = index.weight_map.iter().find(|(name, _)| !tensors.contains_key(*name))
            {
                return Err(ModelError::MissingTensor { path: index_path, tensor: tensor.clone() });
            }
        } else {
            map_tensors(&path.join("model.safetensors"), &mut tensors)?;
        }
        Ok(SafetensorsFolder { path: path.to_owned(), tensors })
    }

    /// A JSON file of the folder, e.g. `config.json`; None when there is none.
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ModelError> {
        let path = self.path.join(name);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }
}

impl WeightSource for SafetensorsFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let bytes = path.metadata().map_err(|source| ModelError::io(path, source))?.len();
    if bytes > JSON_LIMIT {
        let what = format!("{bytes} bytes are more than a file of settings can have ({JSON_LIMIT})");
        return Err(ModelError::malformed(path, what));
    }
    let text = std::fs::read(path).map_err(|source| ModelError::io(path, source))?;
    serde_json::from_slice(&text)
        .map_err(|error| ModelError::malformed(path, format!("not valid JSON: {error}")))
}

/// Adds every tensor of one file.
fn map_tensors(path: &Path, tensors: &mut HashMap<String, Tensor>) -> Result<(), ModelError> {
    let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
    // SAFETY: the mapping is only read; Dormouse never changes weights in place (see `GgufFile::open`).
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(|source| ModelError::io(path, source))?);
    let parsed = SafeTensors::deserialize(&map).map_err(|error| {
        let size = map.len();
        ModelError::malformed(path, format!("{error} (the file has {size} bytes); fetch it again"))
    })?;
    for (name, view) in parsed.tensors() {
        let ty = match view.dtype() {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            other => return Err(ModelError::unsupported_type(path, &name, format!("{other:?}"))),
        };
        let (cols, rows) = match view.shape().split_last() {
            Some((cols, outer)) => (*cols, outer.iter().product()),
            None => (1, 1),
        };
        let offset = view.data().as_ptr() as usize - map.as_ptr() as usize;
        if tensors.insert(name.clone(), Tensor::new(ty, rows, cols, map.clone(), offset)).is_some() {
            return Err(ModelError::malformed(path, format!("the tensor '{name}' is in two files")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    fn write(folder: &Path, file: &str, name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) {
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        safetensors::serialize_to_file([(name, view)], None, &folder.join(file)).unwrap();
    }

    #[test]
    fn tensors_of_several_files_are_found_through_the_index() {
        let folder = tempfile::tempdir().unwrap();
        let values: Vec<u8> = [1.0f32, -2.0, 3.5, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        write(folder.path(), "one.safetensors", "a", Dtype::F32, &[2, 2], &values);
        write(folder.path(), "two.safetensors", "b", Dtype::BF16, &[2], &[0x80, 0x3f, 0x00, 0xc0]);
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        let index_path = folder.path().join("model.safetensors.index.json");
        std::fs::write(&index_path, index).unwrap();
        let open = SafetensorsFolder::open(folder.path()).unwrap();
        assert_eq!(open.tensor("a").unwrap().to_f32(), [1.0, -2.0, 3.5, 4.0]);
        assert_eq!(open.tensor("b").unwrap().to_f32(), [1.0, -2.0]);

        std::fs::write(&index_path, r#"{"weight_map": {"c": "one.safetensors"}}"#).unwrap();
        let missing = SafetensorsFolder::open(folder.path()).err().unwrap();
        assert!(matches!(missing, ModelError::MissingTensor { tensor, .. } if tensor == "c"));
        std::fs::write(&index_path, r#"{"weight_map": {"a": "../one.safetensors"}}"#).unwrap();
        let outside = SafetensorsFolder::open(folder.path()).err().unwrap();
        assert!(outside.to_string().contains("not a plain file name"));
    }

    #[test]
    fn settings_of_absurd_size_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let index = File::create(folder.path().join("model.safetensors.index.json")).unwrap();
        index.set_len(1 << 40).unwrap();
        let error = SafetensorsFolder::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("1099511627776 bytes"), "{error}");
    }

    #[test]
    fn a_tensor_of_an_unknown_type_and_a_cut_file_are_errors_with_names() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "model.safetensors", "ids", Dtype::I64, &[1], &[0; 8]);
        let error = SafetensorsFolder::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("'ids' has type I64"), "{error}");
        let path = folder.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let error = SafetensorsFolder::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("fetch it again"), "{error}");
    }
}
