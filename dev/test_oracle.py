"""Shows that the PyTorch oracle is right: against the golden vectors of the official Lighthouse release, against
Hugging Face's dense models, finite differences and direct sums, and by the properties that the algorithm promises."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle

DEV = Path(__file__).resolve().parent
VECTORS = DEV / "vectors"
torch.set_num_threads(1)  # the tensors are small: on a busy machine, more threads only wait for each other
TOLERANCE = 1e-5  # relative l2; the vectors were computed in fp32, whose rounding leaves a few 1e-7


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def random_qkv(B, T, H, D, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, D, generator=generator, dtype=torch.float64) for _ in range(3)]


# ---- against others -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a_n1024_l2_p4_k128", "b_n2048_l3_p2_k256"])
def test_golden_vectors(name):
    with open(VECTORS / (name + ".bin"), "rb") as f:
        magic, version, B, T, H, D, L, p, k_budget, S = np.frombuffer(f.read(256), dtype="<i4")[:10].tolist()
        assert (magic, version) == (20260506, 1)

        def tensor(shape, dtype="<f4"):
            return torch.from_numpy(np.frombuffer(f.read(4 * math.prod(shape)), dtype=dtype).reshape(shape).copy())

        q, k, v, dout = [tensor((B, T, H, D)).double() for _ in range(4)]
        index = tensor((B, H, S), "<i4").long()
        out = tensor((B, H, T, D)).double().transpose(1, 2)
        dq, dk, dv = [tensor((B, T, H, D)).double() for _ in range(3)]
        assert not f.read(1)
    for x in (q, k, v):
        x.requires_grad_(True)
    our_out, our_index = oracle.lighthouse_attention(q, k, v, L, p, k_budget, 128)
    assert torch.equal(our_index, index)
    assert relative_error(our_out, out) < TOLERANCE
    our_out.backward(dout)
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        assert relative_error(x.grad, dx) < TOLERANCE


def dense_example(positions):
    c = oracle.Config(layers=2, channels=48, heads=3, vocab=300, seq_len=64, positions=positions)
    generator = torch.Generator().manual_seed(7)
    weights = oracle.random_weights(c, generator)
    tokens = torch.randint(0, c.vocab, (2, c.seq_len), generator=generator)
    logits = oracle.forward_logits({name: x.double() for name, x in weights.items()}, tokens, c, first=False)
    return c, weights, tokens, logits


def load_and_run(model, state, tokens):
    missing, unexpected = model.load_state_dict(state, strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    assert not unexpected and not [name for name in missing if name not in buffers]
    with torch.no_grad():
        return model.eval().double()(tokens).logits


def test_dense_model_with_learned_positions_is_gpt2():
    transformers = pytest.importorskip("transformers")
    c, w, tokens, logits = dense_example("learned")
    config = transformers.GPT2Config(vocab_size=c.vocab, n_positions=c.seq_len, n_embd=c.channels, n_layer=c.layers,
                                     n_head=c.heads, attn_implementation="eager")
    wte = w["wte"][:c.vocab]
    state = {"transformer.wte.weight": wte, "lm_head.weight": wte, "transformer.wpe.weight": w["wpe"],
             "transformer.ln_f.weight": w["lnfw"], "transformer.ln_f.bias": w["lnfb"]}
    names = {"ln_1": "ln1", "attn.c_attn": "qkv", "attn.c_proj": "attproj", "ln_2": "ln2", "mlp.c_fc": "fc",
             "mlp.c_proj": "fcproj"}
    for layer in range(c.layers):
        for theirs, ours in names.items():
            weight = w[ours + "w"][layer]
            state[f"transformer.h.{layer}.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight  # Conv1D
            state[f"transformer.h.{layer}.{theirs}.bias"] = w[ours + "b"][layer]
    theirs = load_and_run(transformers.GPT2LMHeadModel(config), state, tokens)
    assert relative_error(logits, theirs) < TOLERANCE


def test_dense_model_with_rope_is_starcoder2():
    transformers = pytest.importorskip("transformers")
    c, w, tokens, logits = dense_example("rope")
    theta = (dict(rope_theta=c.rope_theta) if int(transformers.__version__.split(".")[0]) < 5 else
             dict(rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    config = transformers.Starcoder2Config(
        vocab_size=c.vocab, max_position_embeddings=c.seq_len, hidden_size=c.channels, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.heads, intermediate_size=4 * c.channels,
        tie_word_embeddings=True, attn_implementation="eager", **theta)
    wte = w["wte"][:c.vocab]
    state = {"model.embed_tokens.weight": wte, "lm_head.weight": wte, "model.norm.weight": w["lnfw"],
             "model.norm.bias": w["lnfb"]}
    names = {"input_layernorm": "ln1", "self_attn.o_proj": "attproj", "post_attention_layernorm": "ln2",
             "mlp.c_fc": "fc", "mlp.c_proj": "fcproj"}
    for layer in range(c.layers):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                state[f"model.layers.{layer}.{theirs}.{kind}"] = w[ours + kind[0]][layer]
            for letter, x in zip("qkv", w["qkv" + kind[0]][layer].chunk(3)):
                state[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = x
    theirs = load_and_run(transformers.Starcoder2ForCausalLM(config), state, tokens)
    assert relative_error(logits, theirs) < TOLERANCE


# ---- properties of Lighthouse attention -----------------------------------------------------------------------

# B, T, H, D, L, p, k, m
SHAPES = [(1, 128, 2, 16, 2, 2, 16, 8), (2, 256, 1, 16, 3, 4, 8, 8), (1, 512, 2, 64, 5, 2, 8, 4),
          (2, 512, 1, 128, 2, 8, 32, 16), (1, 256, 1, 32, 4, 2, 16, 8)]


@pytest.mark.parametrize("rope", [None, 10000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_and_causality(shape, rope):
    B, T, H, D, L, p, k_budget, m = shape
    q, k, v = random_qkv(B, T, H, D, seed=1)
    out, index = oracle.lighthouse_attention(q, k, v, L, p, k_budget, m, rope)
    assert index.shape == (B, H, T // p ** (L - 1) + (L - 1) * p * k_budget)
    ends, level_of = [], []
    for l in range(L):
        ends += [(i + 1) * p ** l for i in range(T // p ** l)]
        level_of += [l] * (T // p ** l)
    ends, level_of = torch.tensor(ends), torch.tensor(level_of)
    for row in index.reshape(B * H, -1):
        assert len(set(row.tolist())) == len(row)
        order = ends[row] * L + level_of[row]  # by window end, then child before parent
        assert (order[1:] > order[:-1]).all()
        assert (level_of[row] == L - 1).sum() == T // p ** (L - 1)
        for l in range(L - 1):
            assert (level_of[row] == l).sum() == p * k_budget
    # No output depends on later tokens once the slots are chosen. The choice itself is made with a whole tile in view,
    # so with a new selection only the outputs of earlier tiles are sure to stay.
    tile_tokens = T // (k_budget // m)
    for t in (1, T // 2, T - 1):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = 3.0 * x[:, t].flip(-1)
        frozen, _ = oracle.lighthouse_attention(*changed, L, p, k_budget, m, rope, index=index)
        assert torch.equal(frozen[:, :t], out[:, :t]) and not torch.equal(frozen[:, t:], out[:, t:])
        after, _ = oracle.lighthouse_attention(*changed, L, p, k_budget, m, rope)
        start = t // tile_tokens * tile_tokens
        assert torch.equal(after[:, :start], out[:, :start])


def test_ties_go_to_the_lower_index():
    T, L, p, k_budget, m = 256, 2, 4, 16, 8
    q = torch.ones(1, T, 1, 16)
    _, index = oracle.lighthouse_attention(q, q, q, L, p, k_budget, m)
    tokens = [e for e in index[0, 0].tolist() if e < T]
    # Of each of the two tiles the first m entries are expanded: m/2 by query, the next m/2 by key.
    assert tokens == list(range(0, m * p)) + list(range(T // 2, T // 2 + m * p))


@pytest.mark.parametrize("rope", [None, 500.0])
def test_all_expanded_against_direct_sums(rope):
    T, D, p, m = 64, 8, 4, 8
    q, k, v = (x[0, :, 0].tolist() for x in random_qkv(1, T, 1, D, seed=2))
    attention, index = oracle.lighthouse_attention(*(torch.tensor(x, dtype=torch.float64)[None, :, None]
                                                     for x in (q, k, v)), 2, p, T // p, m, rope)
    assert sorted(index[0, 0].tolist()) == list(range(T + T // p))

    def mean(x, first, last):
        return [sum(x[t][d] for t in range(first, last + 1)) / (last + 1 - first) for d in range(D)]

    def turned(x, position):  # the pairs (d, d + D/2) as complex numbers
        angles = [0.0 if rope is None else position * rope ** (-2 * d / D) for d in range(D // 2)]
        return [complex(x[d], x[d + D // 2]) * complex(math.cos(a), math.sin(a)) for d, a in enumerate(angles)]

    # Every window (first, last token), those of single tokens before the pools that end with them.
    windows = []
    for t in range(T):
        windows.append((t, t))
        if (t + 1) % p == 0:
            windows.append((t + 1 - p, t))
    expected = [[0.0] * D for _ in range(T)]
    for s, (first, last) in enumerate(windows):
        query = turned(mean(q, first, last), last)
        weights = []
        for past_first, past_last in windows[:s + 1]:
            key = turned(mean(k, past_first, past_last), past_last)
            weights.append(math.exp(sum((x * y.conjugate()).real for x, y in zip(query, key)) / math.sqrt(D)))
        values = [mean(v, past_first, past_last) for past_first, past_last in windows[:s + 1]]
        result = [sum(w * x[d] for w, x in zip(weights, values)) / sum(weights) for d in range(D)]
        for t in range(last, min(last + (last - first) + 1, T)):  # as many tokens as it covers, from its last one on
            expected[t] = [x + y for x, y in zip(expected[t], result)]
    assert relative_error(attention[0, :, 0], torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_first_tokens_may_receive_nothing():
    T, L, p = 512, 3, 4
    q, k, v = random_qkv(1, T, 1, 16, seed=3)
    for x in (q, k):
        x[:, :T // 2] *= 1e-3  # never expanded
    out, _ = oracle.lighthouse_attention(q, k, v, L, p, 8, 8)
    first = p ** (L - 1) - 1  # where the first coarsest entry arrives
    assert (out[:, :first] == 0).all() and (out[:, first:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("rope", [None, 100.0])
def test_attention_gradients_against_finite_differences(rope):
    L, p, k_budget, m = 3, 2, 8, 4
    q, k, v = random_qkv(1, 32, 1, 4, seed=4)
    _, index = oracle.lighthouse_attention(q, k, v, L, p, k_budget, m)
    for x in (q, k, v):
        x.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: oracle.lighthouse_attention(q, k, v, L, p, k_budget, m, rope, index=index)[0], (q, k, v))


def test_invalid_shapes_are_refused():
    for T, L, p, k_budget, m in [(128, 1, 2, 8, 4), (128, 2, 3, 8, 4), (128, 2, 4, 8, 4), (128, 2, 2, 6, 4),
                                 (132, 2, 2, 32, 4), (64, 4, 2, 16, 8)]:
        with pytest.raises(ValueError):
            oracle.check_lighthouse_shape(T, L, p, k_budget, m)


# ---- the reference file ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions,attention", [("rope", "DL"), ("learned", "DL"), ("rope", "DW"), ("rope", "DC")])
def test_reference_file(positions, attention, tmp_path):
    path = tmp_path / "reference.bin"
    command = (f"make {path} --positions {positions} --layers 2 --channels 32 --heads 2 --vocab 150 --seq-len 128 "
               f"--batch 2 --levels 2 --pool 2 --topk 16 --tile 8 --attention {attention} --window 48 --seed 5")
    subprocess.run([sys.executable, str(DEV / "oracle.py"), *command.split()], check=True)
    file = oracle.read(path)
    c = file["config"]
    assert c == oracle.Config(2, 32, 2, 150, 128, positions, 10000.0, 2, 2, 16, 8, attention, 48)
    assert file["loss_first"] != file["loss_dense"]
    weights = {name: x.double() for name, x in file["weights"].items()}
    generator = torch.Generator().manual_seed(6)
    for kind, first in (("first", True), ("dense", False)):
        logits, targets = file["logits_" + kind].double(), file["targets"]
        log_probability = torch.log_softmax(logits, -1).gather(-1, targets[..., None])
        assert math.isclose(-log_probability.mean().item(), file["loss_" + kind], rel_tol=1e-6)
        # Each tensor's gradient against the loss a small step to both sides; the margin keeps the selection in place.
        for name, grad in file["grads_" + kind].items():
            direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64) + grad / grad.norm()
            losses = []
            for step in (1e-5, -1e-5):
                moved = dict(weights, **{name: weights[name] + step * direction / direction.norm()})
                with torch.no_grad():
                    losses.append(oracle.mean_loss(
                        oracle.forward_logits(moved, file["tokens"], c, first), targets).item())
            slope = (grad.double() * direction / direction.norm()).sum().item()
            assert abs((losses[0] - losses[1]) / 2e-5 - slope) < 1e-5 * grad.norm().item()
        assert (file["grads_" + kind]["wte"][c.vocab:] == 0).all()
