"""How our tensors are named and arranged in Hugging Face's GPT2LMHeadModel and GPTNeoXForCausalLM.

Both directions stand here beside each other: export_hf writes what to_hf gives, import_hf reads with from_hf.
"""
from model_file import np

CLASSES = {"learned": "GPT2LMHeadModel", "rope": "GPTNeoXForCausalLM"}
# Our name -> Hugging Face's, {} is the layer.
NAMES = {
    "learned": {
        "wte": "transformer.wte.weight", "wpe": "transformer.wpe.weight",
        "ln1w": "transformer.h.{}.ln_1.weight", "ln1b": "transformer.h.{}.ln_1.bias",
        "qkvw": "transformer.h.{}.attn.c_attn.weight", "qkvb": "transformer.h.{}.attn.c_attn.bias",
        "attprojw": "transformer.h.{}.attn.c_proj.weight", "attprojb": "transformer.h.{}.attn.c_proj.bias",
        "ln2w": "transformer.h.{}.ln_2.weight", "ln2b": "transformer.h.{}.ln_2.bias",
        "fcw": "transformer.h.{}.mlp.c_fc.weight", "fcb": "transformer.h.{}.mlp.c_fc.bias",
        "fcprojw": "transformer.h.{}.mlp.c_proj.weight", "fcprojb": "transformer.h.{}.mlp.c_proj.bias",
        "lnfw": "transformer.ln_f.weight", "lnfb": "transformer.ln_f.bias",
    },
    "rope": {
        "wte": "gpt_neox.embed_in.weight",
        "ln1w": "gpt_neox.layers.{}.input_layernorm.weight", "ln1b": "gpt_neox.layers.{}.input_layernorm.bias",
        "qkvw": "gpt_neox.layers.{}.attention.query_key_value.weight",
        "qkvb": "gpt_neox.layers.{}.attention.query_key_value.bias",
        "attprojw": "gpt_neox.layers.{}.attention.dense.weight",
        "attprojb": "gpt_neox.layers.{}.attention.dense.bias",
        "ln2w": "gpt_neox.layers.{}.post_attention_layernorm.weight",
        "ln2b": "gpt_neox.layers.{}.post_attention_layernorm.bias",
        "fcw": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "fcb": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
        "fcprojw": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
        "fcprojb": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
        "lnfw": "gpt_neox.final_layer_norm.weight", "lnfb": "gpt_neox.final_layer_norm.bias",
    },
}


def per_layer(name):
    return name not in ("wte", "wpe", "lnfw", "lnfb")


def is_conv1d(config, name):
    """GPT-2's Conv1D keeps its weights as (in, out), everything else as (out, in)."""
    return config.positions == "learned" and name in ("qkvw", "attprojw", "fcw", "fcprojw")


def is_per_head(config, name):
    """GPT-NeoX has the rows q, k, v of head 0, then of head 1, ...; we have all of q, all of k, all of v."""
    return config.positions == "rope" and name in ("qkvw", "qkvb")


def hf_shape(config, name, shape):
    """The shape in the folder of one layer's tensor of ours."""
    if name == "wte":
        return (config.vocab_size, config.channels)
    return shape[::-1] if is_conv1d(config, name) else shape


def to_hf(config, name, x):
    """A view of one layer's tensor whose elements, in C order, are Hugging Face's tensor."""
    if name == "wte":
        return x[:config.vocab_size]
    if is_conv1d(config, name):
        return x.T
    if is_per_head(config, name):
        return x.reshape(3, config.num_heads, config.head_size, *x.shape[1:]).swapaxes(0, 1)
    return x


def from_hf(config, name, x):
    """The inverse of to_hf; the rows that pad the vocabulary are zero."""
    if name == "wte":
        rows = np.zeros((config.padded_vocab_size, config.channels), x.dtype)
        rows[:config.vocab_size] = x
        return rows
    if is_conv1d(config, name):
        return x.T
    if is_per_head(config, name):
        return x.reshape(config.num_heads, 3, config.head_size, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    return x
