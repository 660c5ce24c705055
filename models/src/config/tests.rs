use serde_json::Value;

use super::*;
use crate::gguf::GgufFile;

fn config(changes: Value) -> Result<ModelConfig, ModelError> {
    let mut json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 8192, "num_hidden_layers": 2,
        "intermediate_size": 96, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
    });
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::from_json(Path::new("config.json"), json.as_object().unwrap())
}

#[test]
fn the_real_model_is_described_by_its_own_settings() {
    let config = ModelConfig::from_gguf(&GgufFile::open(crate::test_model()).unwrap()).unwrap();
    assert_eq!((config.vocab, config.context, config.layers), (49152, 8192, 30));
    assert_eq!((config.d_model, config.heads, config.kv_heads, config.head_dim), (576, 9, 3, 64));
    assert_eq!((config.d_ff, config.rope.dims, config.rope.theta), (1536, 64, 100_000.0));
    assert!(config.tied_head && !config.qkv_bias && config.sliding_window.is_none());
    assert_eq!(config.rope.kind, RopeKind::Interleaved);
}

#[test]
fn a_config_json_is_read_with_its_defaults() {
    let config = config(serde_json::json!({})).unwrap();
    assert_eq!((config.head_dim, config.kv_heads, config.rope.kind), (16, 2, RopeKind::Half));
    assert_eq!((config.rope.theta, config.attention_scale), (10_000.0, 0.25));
    assert_eq!(config.window(0), None);
}

#[test]
fn settings_that_would_compute_something_else_are_refused_by_name() {
    let error = |changes| config(changes).unwrap_err().to_string();
    let unknown = error(serde_json::json!({"architectures": ["MambaForCausalLM"]}));
    assert!(unknown.contains("'MambaForCausalLM'") && unknown.contains("LlamaForCausalLM"), "{unknown}");
    assert!(unknown.contains("Gemma3ForCausalLM") && unknown.contains("Qwen3MoeForCausalLM"), "{unknown}");
    let scaling = error(serde_json::json!({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}));
    assert!(scaling.contains("'spiral'") && scaling.contains("yarn"), "{scaling}");
    assert!(error(serde_json::json!({"num_key_value_heads": 3})).contains("cannot share"));
    assert!(error(serde_json::json!({"hidden_size": 0})).contains("model width"));
    assert!(error(serde_json::json!({"num_attention_heads": 0})).contains("head count"));
    assert!(error(serde_json::json!({"num_hidden_layers": 1u64 << 60})).contains("layer count"));
    assert!(error(serde_json::json!({"head_dim": 1024})).contains("head width"));
    assert!(error(serde_json::json!({"mlp_bias": true})).contains("mlp_bias"));
    assert!(error(serde_json::json!({"hidden_act": "relu"})).contains("'relu'"));
    assert!(error(serde_json::json!({"rope_theta": -1.0})).contains("rope base"));
    assert!(
        error(serde_json::json!({"logits_scaling": 0.0, "residual_multiplier": 1.0})).contains("logit scale")
    );
}

#[test]
fn experts_that_cannot_be_chosen_are_refused() {
    let moe = |used: usize| {
        config(serde_json::json!({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8,
            "num_experts_per_tok": used, "moe_intermediate_size": 32, "mlp_only_layers": [0]}))
    };
    let described = moe(2).unwrap();
    assert_eq!(described.layer_kinds.iter().map(|kind| kind.experts).collect::<Vec<_>>(), [false, true]);
    assert!(moe(9).unwrap_err().to_string().contains("9 of 8 experts"));
}

#[test]
fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
    let scaling = serde_json::json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        "head_dim": 128, "rope_theta": 500000.0});
    let scaled = config(scaling).unwrap().rope;
    let plain = Rope { scaling: RopeScaling::None, ..scaled.clone() }.frequencies(8192);
    let scaled = scaled.frequencies(8192);
    assert_eq!(scaled[0], plain[0]);
    assert_eq!(scaled[63], plain[63] / 8.0);
    assert!(scaled[32] < plain[32] && scaled[32] > plain[32] / 8.0);
}

#[test]
fn a_window_is_for_the_layers_that_the_file_or_the_family_names() {
    let windows = |changes: Value| {
        let mut all = serde_json::json!({"num_hidden_layers": 6, "sliding_window": 32});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let config = config(all).unwrap();
        (0..6).map(|layer| config.window(layer).is_some()).collect::<Vec<_>>()
    };
    let gemma3 = windows(
        serde_json::json!({"architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}),
    );
    assert_eq!(gemma3, [true, true, true, true, true, false]);
    let gemma2 = windows(
        serde_json::json!({"architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}),
    );
    assert_eq!(gemma2, [true, false, true, false, true, false]);
    assert_eq!(windows(serde_json::json!({"architectures": ["MistralForCausalLM"]})), [true; 6]);
    let types = serde_json::json!(["full_attention", "sliding_attention"].repeat(3));
    assert_eq!(windows(serde_json::json!({"layer_types": types})), [false, true, false, true, false, true]);
    // Qwen 2.5 names a window and switches it off.
    let qwen = serde_json::json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false});
    assert_eq!(windows(qwen), [false; 6]);
}

#[test]
fn a_scaling_that_stretches_the_context_states_the_longer_one() {
    let scaled = |kind: &str| {
        let scaling = serde_json::json!({"rope_scaling": {"rope_type": kind, "factor": 4.0,
            "original_max_position_embeddings": 8192}});
        config(scaling).unwrap().context
    };
    assert_eq!((scaled("yarn"), scaled("dynamic"), scaled("linear")), (32768, 32768, 8192));
}

#[test]
fn a_served_context_matters_only_to_rotations_that_depend_on_it() {
    let dynamic = serde_json::json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}});
    let (dynamic, plain) = (config(dynamic).unwrap(), config(serde_json::json!({})).unwrap());
    assert_eq!(plain.clone().for_context(100), plain);
    let short = dynamic.clone().for_context(100);
    assert_eq!(short.rope.frequencies(short.context), plain.rope.frequencies(plain.context));
    assert_ne!(dynamic.rope.frequencies(dynamic.context), plain.rope.frequencies(plain.context));
}
