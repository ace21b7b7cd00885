"""How our tensors are named and arranged in the Hugging Face classes that compute what the trainer does.

Both directions stand here beside each other: export_hf writes what to_hf gives, import_hf reads with from_hf.
"""
from model_file import np

# What a model is written as, by its positions. GPT-NeoX is only read: llama.cpp does not run it with tied embeddings
# and a theta of its own, and Starcoder2 does all that it did.
EXPORTED = {"learned": "GPT2LMHeadModel", "rope": "Starcoder2ForCausalLM"}
POSITIONS = {"GPT2LMHeadModel": "learned", "Starcoder2ForCausalLM": "rope", "GPTNeoXForCausalLM": "rope"}
# Our name -> Hugging Face's, {} is the layer. Starcoder2 keeps the rows of q, k and v in tensors of their own.
NAMES = {
    "GPT2LMHeadModel": {
        "wte": "transformer.wte.weight", "wpe": "transformer.wpe.weight",
        "ln1w": "transformer.h.{}.ln_1.weight", "ln1b": "transformer.h.{}.ln_1.bias",
        "qkvw": "transformer.h.{}.attn.c_attn.weight", "qkvb": "transformer.h.{}.attn.c_attn.bias",
        "attprojw": "transformer.h.{}.attn.c_proj.weight", "attprojb": "transformer.h.{}.attn.c_proj.bias",
        "ln2w": "transformer.h.{}.ln_2.weight", "ln2b": "transformer.h.{}.ln_2.bias",
        "fcw": "transformer.h.{}.mlp.c_fc.weight", "fcb": "transformer.h.{}.mlp.c_fc.bias",
        "fcprojw": "transformer.h.{}.mlp.c_proj.weight", "fcprojb": "transformer.h.{}.mlp.c_proj.bias",
        "lnfw": "transformer.ln_f.weight", "lnfb": "transformer.ln_f.bias",
    },
    "Starcoder2ForCausalLM": {
        "wte": "model.embed_tokens.weight",
        "ln1w": "model.layers.{}.input_layernorm.weight", "ln1b": "model.layers.{}.input_layernorm.bias",
        "qkvw": ["model.layers.{}.self_attn.%s_proj.weight" % x for x in "qkv"],
        "qkvb": ["model.layers.{}.self_attn.%s_proj.bias" % x for x in "qkv"],
        "attprojw": "model.layers.{}.self_attn.o_proj.weight", "attprojb": "model.layers.{}.self_attn.o_proj.bias",
        "ln2w": "model.layers.{}.post_attention_layernorm.weight",
        "ln2b": "model.layers.{}.post_attention_layernorm.bias",
        "fcw": "model.layers.{}.mlp.c_fc.weight", "fcb": "model.layers.{}.mlp.c_fc.bias",
        "fcprojw": "model.layers.{}.mlp.c_proj.weight", "fcprojb": "model.layers.{}.mlp.c_proj.bias",
        "lnfw": "model.norm.weight", "lnfb": "model.norm.bias",
    },
    "GPTNeoXForCausalLM": {
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
# The output layer, which shares the embedding's weight and so may or may not be there.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight")


def per_layer(name):
    return name not in ("wte", "wpe", "lnfw", "lnfb")


def names(architecture, name):
    """The tensors that one layer's tensor of ours is cut into, row by row: mostly one."""
    found = NAMES[architecture][name]
    return found if isinstance(found, list) else [found]


def is_conv1d(architecture, name):
    """GPT-2's Conv1D keeps its weights as (in, out), everything else as (out, in)."""
    return architecture == "GPT2LMHeadModel" and name in ("qkvw", "attprojw", "fcw", "fcprojw")


def hf_shape(config, architecture, name, shape):
    """The shape in the folder of each of names(), for one layer's tensor of ours."""
    if name == "wte":
        return (config.vocab_size, config.channels)
    if is_conv1d(architecture, name):
        return shape[::-1]
    return (shape[0] // len(names(architecture, name)), *shape[1:])


def to_hf(config, architecture, name, x):
    """Views of one layer's tensor whose elements, in C order, are Hugging Face's tensors names()."""
    if name == "wte":
        return [x[:config.vocab_size]]
    if is_conv1d(architecture, name):
        return [x.T]
    return np.split(x, len(names(architecture, name)))


def from_hf(config, architecture, name, parts):
    """The inverse of to_hf; the rows that pad the vocabulary are zero."""
    if name == "wte":
        rows = np.zeros((config.padded_vocab_size, config.channels), parts[0].dtype)
        rows[:config.vocab_size] = parts[0]
        return rows
    x = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if is_conv1d(architecture, name):
        return x.T
    if architecture == "GPTNeoXForCausalLM" and name in ("qkvw", "qkvb"):
        # Its rows are q, k, v of head 0, then of head 1, ...; ours all of q, all of k, all of v.
        return x.reshape(config.num_heads, 3, config.head_size, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    return x
