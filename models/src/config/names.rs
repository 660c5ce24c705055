//! How files name their tensors.

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    TokenEmbedding,
    /// Before attention.
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    /// Q, K and V as the rows of one matrix, in this order.
    AttnQkv,
    AttnQNorm,
    AttnKNorm,
    AttnOutput,
    /// After attention, before the residual addition.
    AttnPostNorm,
    /// Before the feed-forward block.
    FfnNorm,
    FfnGate,
    FfnUp,
    /// Gate and up as the rows of one matrix, in this order.
    FfnGateUp,
    FfnDown,
    /// After the feed-forward block, before the residual addition.
    FfnPostNorm,
    /// Scores every expert.
    Router,
    /// One expert's matrix; GGUF files hold all experts' as one tensor, one after the other.
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
    OutputNorm,
    Output,
}

/// How a file names its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameScheme {
    Gguf,
    /// Where norms follow the blocks too, `post_attention_layernorm` is the one after attention; elsewhere it is the
    /// one before the feed-forward block.
    HuggingFace {
        post_norms: bool,
    },
}

impl NameScheme {
    /// The weight's name; `layer` matters only for roles inside a layer.
    pub fn name(self, layer: usize, role: Role) -> String {
        format!("{}.weight", self.stem(layer, role))
    }

    /// The name of the bias that goes with a weight.
    pub fn bias(self, layer: usize, role: Role) -> String {
        format!("{}.bias", self.stem(layer, role))
    }

    fn stem(self, layer: usize, role: Role) -> String {
        match self {
            NameScheme::Gguf => gguf(layer, role),
            NameScheme::HuggingFace { post_norms } => hugging_face(layer, role, post_norms),
        }
    }
}

fn gguf(layer: usize, role: Role) -> String {
    let part = match role {
        Role::TokenEmbedding => return "token_embd".to_owned(),
        Role::OutputNorm => return "output_norm".to_owned(),
        Role::Output => return "output".to_owned(),
        Role::AttnNorm => "attn_norm",
        Role::AttnQ => "attn_q",
        Role::AttnK => "attn_k",
        Role::AttnV => "attn_v",
        Role::AttnQkv => "attn_qkv",
        Role::AttnQNorm => "attn_q_norm",
        Role::AttnKNorm => "attn_k_norm",
        Role::AttnOutput => "attn_output",
        Role::AttnPostNorm => "post_attention_norm",
        Role::FfnNorm => "ffn_norm",
        Role::FfnGate => "ffn_gate",
        Role::FfnUp | Role::FfnGateUp => "ffn_up",
        Role::FfnDown => "ffn_down",
        Role::FfnPostNorm => "post_ffw_norm",
        Role::Router => "ffn_gate_inp",
        Role::ExpertGate(_) => "ffn_gate_exps",
        Role::ExpertUp(_) => "ffn_up_exps",
        Role::ExpertDown(_) => "ffn_down_exps",
    };
    format!("blk.{layer}.{part}")
}

fn hugging_face(layer: usize, role: Role, post_norms: bool) -> String {
    let part = match role {
        Role::TokenEmbedding => return "model.embed_tokens".to_owned(),
        Role::OutputNorm => return "model.norm".to_owned(),
        Role::Output => return "lm_head".to_owned(),
        Role::ExpertGate(expert) => &format!("mlp.experts.{expert}.gate_proj"),
        Role::ExpertUp(expert) => &format!("mlp.experts.{expert}.up_proj"),
        Role::ExpertDown(expert) => &format!("mlp.experts.{expert}.down_proj"),
        Role::AttnNorm => "input_layernorm",
        Role::AttnQ => "self_attn.q_proj",
        Role::AttnK => "self_attn.k_proj",
        Role::AttnV => "self_attn.v_proj",
        Role::AttnQkv => "self_attn.qkv_proj",
        Role::AttnQNorm => "self_attn.q_norm",
        Role::AttnKNorm => "self_attn.k_norm",
        Role::AttnOutput => "self_attn.o_proj",
        Role::AttnPostNorm => "post_attention_layernorm",
        Role::FfnNorm if post_norms => "pre_feedforward_layernorm",
        Role::FfnNorm => "post_attention_layernorm",
        Role::FfnGate => "mlp.gate_proj",
        Role::FfnUp => "mlp.up_proj",
        Role::FfnGateUp => "mlp.gate_up_proj",
        Role::FfnDown => "mlp.down_proj",
        Role::FfnPostNorm => "post_feedforward_layernorm",
        Role::Router => "mlp.gate",
    };
    format!("model.layers.{layer}.{part}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_schemes_name_the_same_roles() {
        let plain = NameScheme::HuggingFace { post_norms: false };
        let post = NameScheme::HuggingFace { post_norms: true };
        assert_eq!(plain.name(3, Role::FfnGate), "model.layers.3.mlp.gate_proj.weight");
        assert_eq!(plain.bias(0, Role::AttnQ), "model.layers.0.self_attn.q_proj.bias");
        assert_eq!(plain.name(0, Role::FfnNorm), post.name(0, Role::AttnPostNorm));
        assert_eq!(post.name(0, Role::FfnNorm), "model.layers.0.pre_feedforward_layernorm.weight");
        assert_eq!(plain.name(1, Role::ExpertUp(7)), "model.layers.1.mlp.experts.7.up_proj.weight");
        assert_eq!(NameScheme::Gguf.name(1, Role::ExpertUp(7)), "blk.1.ffn_up_exps.weight");
        assert_eq!(NameScheme::Gguf.name(1, Role::OutputNorm), "output_norm.weight");
    }
}
