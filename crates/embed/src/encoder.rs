//! [`Encoder`]: a BERT encoder and its vocabulary, from texts to vectors.

use std::path::Path;

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::BertModel;
use tokenizers::Tokenizer;

use crate::error::{EmbedError, LoadError};
use crate::folder::Description;
use crate::pooling::normalise;
use crate::{Embeddings, Input};

/// Tokens of one forward pass, padding included: enough to keep the matrix products busy, and so few that the pass is
/// over soon (a cancelled request ends between two) and its activations stay within tens of megabytes.
const BATCH_TOKENS: usize = 1024;
/// Padding that a forward pass may have in any case; beyond it, a quarter of its tokens.
const FREE_PADDING: usize = 64;
/// Most tokens of one request, as at OpenAI: minutes of work on a laptop.
pub const MOST_TOKENS: usize = 300_000;

/// A loaded model. Computes on the threads of the caller's rayon pool.
pub struct Encoder {
    model: BertModel,
    tokenizer: Tokenizer,
    description: Description,
}

impl Encoder {
    /// Loads the folder's `model.safetensors`, `tokenizer.json` and descriptions; weights are held as f32.
    pub fn load(folder: &Path) -> Result<Encoder, LoadError> {
        let description = Description::read(folder)?;
        let tokenizer = read_tokenizer(&description.transformer.join("tokenizer.json"))?;
        let vocabulary = tokenizer.get_vocab_size(true);
        if vocabulary > description.config.vocab_size {
            let what = format!("{vocabulary} tokens, but the weights have {}", description.config.vocab_size);
            return Err(LoadError::malformed(&description.transformer.join("tokenizer.json"), what));
        }
        let path = description.transformer.join("model.safetensors");
        let bytes = std::fs::read(&path).map_err(|error| {
            if description.transformer.join("pytorch_model.bin").exists() {
                let what = "there are only PyTorch weights (pytorch_model.bin), which can run code when they are \
                            read; save the model again with safe_serialization=True";
                return LoadError::malformed(&description.transformer, what);
            }
            LoadError::io(&path, error)
        })?;
        let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
        let model = weights.and_then(|weights| BertModel::load(weights, &description.config));
        let model = model.map_err(|source| LoadError::Weights { path, source })?;
        Ok(Encoder { model, tokenizer, description })
    }

    /// Numbers in a vector, where nothing else is asked for.
    pub fn dimensions(&self) -> usize {
        self.description.dimensions()
    }

    /// Most tokens of one input, special tokens included.
    pub fn max_tokens(&self) -> usize {
        self.description.max_tokens
    }

    /// The vectors of `inputs`, each cut to its first `dimensions` numbers where that is given. Every input is checked
    /// before anything is computed; `is_wanted` is asked before each forward pass.
    pub fn embed(
        &self,
        inputs: &[Input],
        dimensions: Option<usize>,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Embeddings, EmbedError> {
        let mut rows = Vec::with_capacity(inputs.len());
        let mut tokens = 0;
        for (index, input) in inputs.iter().enumerate() {
            if !is_wanted() {
                return Err(EmbedError::Cancelled);
            }
            let row = self.tokens(index, input)?;
            tokens += row.len();
            rows.push(row);
        }
        if tokens > MOST_TOKENS {
            return Err(EmbedError::TooManyTokens { tokens, limit: MOST_TOKENS });
        }
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        let mut vectors = vec![Vec::new(); rows.len()];
        for batch in batches(&lengths) {
            if !is_wanted() {
                return Err(EmbedError::Cancelled);
            }
            let hidden = self.forward(&batch, &rows)?;
            for (place, &index) in batch.iter().enumerate() {
                let hidden = hidden.i((place, ..lengths[index]))?.flatten_all()?.to_vec1::<f32>()?;
                vectors[index] = self.finish(&hidden, dimensions)?;
            }
        }
        Ok(Embeddings { vectors, tokens })
    }

    /// The checked tokens of one input.
    fn tokens(&self, index: usize, input: &Input) -> Result<Vec<u32>, EmbedError> {
        let tokens = match input {
            Input::Text(text) => self.tokenise(index, text)?,
            Input::Tokens(tokens) => tokens.clone(),
        };
        let (limit, last) = (self.max_tokens(), self.description.config.vocab_size as u32 - 1);
        if tokens.is_empty() {
            return Err(EmbedError::NoTokens { index });
        }
        if tokens.len() > limit {
            return Err(EmbedError::TooLong { index, tokens: tokens.len(), limit });
        }
        match tokens.iter().position(|token| *token > last) {
            Some(position) => {
                Err(EmbedError::UnknownToken { index, position, token: tokens[position], last })
            }
            None => Ok(tokens),
        }
    }

    fn tokenise(&self, index: usize, text: &str) -> Result<Vec<u32>, EmbedError> {
        let Description { prompt, lowercase, .. } = &self.description;
        let mut whole = format!("{prompt}{text}");
        if *lowercase {
            whole = whole.to_lowercase();
        }
        let encoding = self.tokenizer.encode_fast(whole, true);
        let encoding =
            encoding.map_err(|error| EmbedError::Tokenizer { index, reason: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The last layer's vectors of these rows, `[batch, longest, hidden_size]`; those of padding mean nothing.
    fn forward(&self, batch: &[usize], rows: &[Vec<u32>]) -> Result<Tensor, EmbedError> {
        let longest = batch.iter().map(|&index| rows[index].len()).max().unwrap_or(0);
        let shape = (batch.len(), longest);
        let mut ids = vec![self.description.config.pad_token_id as u32; batch.len() * longest];
        let mut mask = vec![0f32; ids.len()];
        for (place, &index) in batch.iter().enumerate() {
            let row = place * longest..place * longest + rows[index].len();
            ids[row.clone()].copy_from_slice(&rows[index]);
            mask[row].fill(1.0);
        }
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        let mask = Tensor::from_vec(mask, shape, &Device::Cpu)?;
        Ok(self.model.forward(&ids, &ids.zeros_like()?, Some(&mask))?)
    }

    /// One text's vector out of those of its tokens.
    fn finish(&self, hidden: &[f32], dimensions: Option<usize>) -> Result<Vec<f32>, EmbedError> {
        let pooled = self.description.pooling.iter();
        let mut vector: Vec<f32> =
            pooled.flat_map(|pooling| pooling.pool(hidden, self.description.config.hidden_size)).collect();
        vector.truncate(dimensions.unwrap_or(usize::MAX));
        if self.description.normalise {
            normalise(&mut vector);
        }
        if vector.iter().all(|value| value.is_finite()) { Ok(vector) } else { Err(EmbedError::NotFinite) }
    }
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer, LoadError> {
    let json = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
    // The library panics on some files that are JSON but not tokenizers.
    let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(&json))
        .map_err(|_| LoadError::malformed(path, "its contents are not those of a tokenizer"))?
        .map_err(|error| LoadError::malformed(path, error.to_string()))?;
    // Exported tokenizers often cut and pad to a length of their own: here what is too long is refused instead.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| LoadError::malformed(path, error.to_string()))?;
    Ok(tokenizer)
}

/// Inputs of about the same length together, so that little is computed for padding.
fn batches(lengths: &[usize]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| lengths[index]);
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for index in order {
        // The longest so far: the one that the others would be padded to.
        let length = lengths[index];
        if let Some(batch) = batches.last_mut() {
            let together = tokens + length;
            let padded = length * (batch.len() + 1);
            if padded <= BATCH_TOKENS && padded - together <= FREE_PADDING.max(together / 4) {
                batch.push(index);
                tokens = together;
                continue;
            }
        }
        batches.push(vec![index]);
        tokens = length;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_input_once_and_little_padding() {
        let lengths: Vec<usize> = (0..500).map(|index| 2 + index * 7919 % 255).collect();
        let batches = batches(&lengths);
        let mut seen: Vec<usize> = batches.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        for batch in &batches {
            let tokens: usize = batch.iter().map(|&index| lengths[index]).sum();
            let padded = batch.len() * batch.iter().map(|&index| lengths[index]).max().unwrap();
            assert!(padded <= BATCH_TOKENS && padded - tokens <= FREE_PADDING.max(tokens / 4));
        }
        let tokens: usize = lengths.iter().sum();
        assert!(batches.len() <= 1 + tokens * 5 / (BATCH_TOKENS * 4), "{}", batches.len());
    }

    #[test]
    fn an_input_longer_than_a_batch_is_one_of_its_own() {
        assert_eq!(batches(&[BATCH_TOKENS + 1, 3, BATCH_TOKENS + 1]), [vec![1], vec![0], vec![2]]);
        assert!(batches(&[]).is_empty());
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for text in ["{}", "[1]", "no json", r#"{"model": {"type": "WordPiece"}}"#] {
            std::fs::write(&path, text).unwrap();
            assert!(read_tokenizer(&path).err().unwrap().to_string().contains("tokenizer.json"));
        }
    }
}
