#!/usr/bin/env python3
"""The oracle of the trainer: GPT-2 with dense, window, Lighthouse or Causal Lighthouse attention in plain PyTorch, for clarity and not for speed.

It is written from the algorithm's description alone and shares no code with the trainer, so that an agreement of the
two means something. Gradients come from autograd, with the selection frozen. As a program it writes a reference file of
random weights, random tokens and what must come out of them:

    python dev/oracle.py make OUT.bin --positions rope --layers 4 --channels 64 --heads 4 --vocab 257 --seq-len 512 \
        --batch 2 --levels 3 --pool 4 --topk 16 --tile 8 --attention DLWD --window 96 --seed 1

The file, little-endian and without gaps:
    int32[64] header
        [0] 20260520   [1] 2 (version)   [2] B   [3] T   [4] V   [5] Vp = V padded to 128
        [6] layers   [7] heads   [8] C
        [9] positions (0 rope, 1 learned)   [10] levels L   [11] pool p   [12] topk k   [13] tile m
        [14] tokens of a window   [15..46] the layers' letters: D dense, W window, L Lighthouse, C Causal Lighthouse;
        the rest 0
    float64 rope theta, float64 loss in the first phase, float64 loss under dense attention
    float32 weights, in the order and with the shapes of the model file (wpe has T rows; with rope there is none)
    int32 tokens (B,T), int32 targets (B,T)
    float32 logits under dense attention (B,T,V), float32 logits in the first phase (B,T,V)
    float32 gradients in the first phase, in the order of the weights
    float32 gradients under dense attention, in the order of the weights
"In the first phase" means: each layer with the attention of its letter. The loss is the mean over all B*T tokens. All is computed in float64 from the float32 weights in the file. Seeds are tried, from --seed on, until no
selection is a close call: picked and rejected scores differ by more than 1e-4 of the score. The rows of wte past V hold
random values, so that a softmax which looks at the padding is found out; their gradients are 0.
"""
import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

MAGIC, VERSION, MAX_LAYERS = 20260520, 2, 32
# A selection must not depend on rounding: the last picked and the first rejected score differ by more than this share.
MIN_MARGIN, MAX_DRAWS = 1e-4, 200


@dataclass
class Config:
    layers: int
    channels: int
    heads: int
    vocab: int
    seq_len: int              # rows of wpe
    positions: str = "rope"   # or "learned"
    rope_theta: float = 10000.0
    levels: int = 3           # L
    pool: int = 4             # p
    topk: int = 1536          # k
    tile: int = 128           # m
    attention: str = "L"      # of the layers in the first phase, a letter each, repeated to their number
    window: int = 1024        # tokens of a window

    def letter(self, layer):
        return self.attention[layer % len(self.attention)]

    @property
    def padded_vocab(self):
        return (self.vocab + 127) // 128 * 128


# ---- Lighthouse attention -------------------------------------------------------------------------------------

def check_lighthouse_shape(T, L, p, k_budget, m):
    tiles = k_budget // m
    if L < 2 or p < 2 or p & (p - 1):
        raise ValueError(f"levels must be at least 2 and pool a power of 2, not {L} and {p}")
    if m % 2 or p > m // 2:
        raise ValueError(f"tile {m} must be even and at least twice pool {p}")
    if k_budget < m or k_budget % m:
        raise ValueError(f"topk {k_budget} must be a positive multiple of tile {m}")
    if T % (p ** (L - 1) * tiles):
        raise ValueError(f"T = {T} must be divisible by pool^(levels-1) * topk/tile = {p ** (L - 1) * tiles}")
    if T // p ** (L - 1) // tiles < m:
        raise ValueError(f"a tile has {T // p ** (L - 1) // tiles} coarsest entries, fewer than tile {m}")


def slot_count(T, L, p, k_budget):
    return T // p ** (L - 1) + (L - 1) * p * k_budget


def best(candidates, score, count):
    """The `count` candidates of largest score (at a tie the lower index) and the relative distance to the next."""
    ranked = sorted(candidates, key=lambda i: (-score[i], i))
    if count == len(ranked):
        return ranked, math.inf
    last, first_rejected = score[ranked[count - 1]], score[ranked[count]]
    return ranked[:count], (last - first_rejected) / max(last, 1e-300)


def lighthouse_select(a, b, L, p, k_budget, m):
    """Selects for one head. a, b: (T) norms of its queries and keys.

    Returns the slots, a list of (level, entry) in sequence order, and the smallest margin of any choice.
    """
    T, tiles = len(a), k_budget // m
    pooled_a = [a.reshape(-1, p ** l).amax(1).tolist() for l in range(L)]  # score of an entry: the largest it covers
    pooled_b = [b.reshape(-1, p ** l).amax(1).tolist() for l in range(L)]
    slots, margin = [], math.inf
    coarsest_per_tile = T // p ** (L - 1) // tiles
    for tile in range(tiles):
        candidates = list(range(tile * coarsest_per_tile, (tile + 1) * coarsest_per_tile))
        for l in range(L - 1, 0, -1):
            slots += [(l, i) for i in candidates]  # every candidate stays in the sequence, expanded or not
            by_query, margin_a = best(candidates, pooled_a[l], m // 2)
            others = [i for i in candidates if i not in set(by_query)]
            by_key, margin_b = best(others, pooled_b[l], m // 2)
            if len(candidates) > m:  # where all are expanded anyway, the order of picking changes nothing
                margin = min(margin, margin_a, margin_b)
            candidates = [i * p + child for i in sorted(by_query + by_key) for child in range(p)]
        slots += [(0, i) for i in candidates]
    # By the end of the window; of two that end together the child, which has the lower level, comes first.
    slots.sort(key=lambda slot: ((slot[1] + 1) * p ** slot[0], slot[0]))
    return slots, margin


def rotate(x, positions, theta):
    """RoPE of x (..., N, D) at positions (N): dimension d is paired with d + D/2, angle pos * theta^(-2d/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def causal_attention(q, k, v, window=None):
    """Attention of q, k, v (..., N, D), each row to itself and to the rows before it, of its own window if there are
    windows: rows 0 to window - 1, and so forth."""
    N, D = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    if window:
        block = torch.arange(N) // window
        hidden |= block[:, None] != block[None, :]
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v


def lighthouse_head(q, k, v, slots, p, rope):
    """Lighthouse attention of one head over given slots. q, k, v: (T,D) -> (T,D)."""
    T, S = q.shape[0], len(slots)
    pool = torch.zeros(S, T, dtype=q.dtype)     # row s: the share of each token in the mean that slot s holds
    scatter = torch.zeros(T, S, dtype=q.dtype)  # column s: 1 at the tokens that slot s writes to
    last = torch.zeros(S, dtype=torch.int64)    # last token that slot s covers
    for s, (l, i) in enumerate(slots):
        c = p ** l
        pool[s, i * c:(i + 1) * c] = 1.0 / c
        scatter[(i + 1) * c - 1:(i + 2) * c - 1, s] = 1.0  # from the last token covered on; the slice ends at T
        last[s] = (i + 1) * c - 1
    q, k, v = pool @ q, pool @ k, pool @ v
    if rope is not None:
        q, k = rotate(q, last, rope), rotate(k, last, rope)
    return scatter @ causal_attention(q, k, v)


def lighthouse_attention(q, k, v, L, p, k_budget, m, rope=None, index=None, margins=None):
    """q, k, v (B,T,H,D) before any rotation; rope: theta, or None for no rotation. Returns out (B,T,H,D) and index.

    index (B,H,S) holds the flat entry of each slot: level 0 from 0 on, level 1 from T on, and so forth. Passed in, it
    replaces the selection. margins: a list to which the smallest margin of each head's selection is appended.
    """
    B, T, H, D = q.shape
    check_lighthouse_shape(T, L, p, k_budget, m)
    offset = [sum(T // p ** j for j in range(l)) for l in range(L)]
    out, found = [], []
    for b in range(B):
        for h in range(H):
            if index is None:
                with torch.no_grad():
                    slots, margin = lighthouse_select(q[b, :, h].norm(dim=-1), k[b, :, h].norm(dim=-1),
                                                      L, p, k_budget, m)
                if margins is not None:
                    margins.append(margin)
            else:
                level = [max(l for l in range(L) if offset[l] <= e) for e in index[b, h].tolist()]
                slots = [(l, e - offset[l]) for l, e in zip(level, index[b, h].tolist())]
            out.append(lighthouse_head(q[b, :, h], k[b, :, h], v[b, :, h], slots, p, rope))
            found.append([offset[l] + i for l, i in slots])
    out = torch.stack(out).reshape(B, H, T, D).transpose(1, 2)
    return out, torch.tensor(found).reshape(B, H, -1)


def dense_attention(q, k, v, rope=None, window=None):
    """Causal attention over the tokens, or over those of each window. q, k, v (B,T,H,D) before any rotation -> (B,T,H,D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rope is not None:
        positions = torch.arange(q.shape[2])
        q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    return causal_attention(q, k, v, window).transpose(1, 2)


def causal_lighthouse_head(q, k, v, slots, p, tile):
    """Causal Lighthouse of one head, q, k, v (T,D) as they are rotated, over the selection `slots` in tiles of so many
    tokens: one masked softmax of every token over all tokens, of which it sees its own tile's up to itself, and over
    the leaves (slots that were not expanded), of which it sees those of earlier tiles. A leaf holds means."""
    T, D = q.shape
    expanded = {(l + 1, i // p) for l, i in slots}  # the parents of what was selected
    leaves = [slot for slot in slots if slot not in expanded]
    pool = torch.zeros(len(leaves), T, dtype=q.dtype)
    for s, (l, i) in enumerate(leaves):
        pool[s, i * p ** l:(i + 1) * p ** l] = 1.0 / p ** l
    of_tile = torch.tensor([i * p ** l // tile for l, i in leaves])
    token = torch.arange(T)
    own = (token[:, None] // tile == token // tile) & (token <= token[:, None])
    seen = torch.cat([own, of_tile < token[:, None] // tile], 1)
    scores = q @ torch.cat([k, pool @ k]).T / math.sqrt(D)
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ torch.cat([v, pool @ v])


def causal_lighthouse_attention(q, k, v, L, p, k_budget, m, rope=None, margins=None):
    """q, k, v (B,T,H,D) before any rotation -> (B,T,H,D). margins: as in lighthouse_attention."""
    B, T, H, D = q.shape
    check_lighthouse_shape(T, L, p, k_budget, m)
    out = []
    for b in range(B):
        for h in range(H):
            with torch.no_grad():  # a rotation changes no norm
                slots, margin = lighthouse_select(q[b, :, h].norm(dim=-1), k[b, :, h].norm(dim=-1), L, p, k_budget, m)
            if margins is not None:
                margins.append(margin)
            turn = (lambda x: x) if rope is None else (lambda x: rotate(x, torch.arange(T), rope))
            out.append(causal_lighthouse_head(turn(q[b, :, h]), turn(k[b, :, h]), v[b, :, h], slots, p,
                                              T // (k_budget // m)))
    return torch.stack(out).reshape(B, H, T, D).transpose(1, 2)


# ---- the model ------------------------------------------------------------------------------------------------

def weight_shapes(c):
    """Names and shapes of the weights in the order of the model file."""
    N, C = c.layers, c.channels
    shapes = {
        "wte": (c.padded_vocab, C), "wpe": (c.seq_len, C), "ln1w": (N, C), "ln1b": (N, C),
        "qkvw": (N, 3 * C, C), "qkvb": (N, 3 * C), "attprojw": (N, C, C), "attprojb": (N, C),
        "ln2w": (N, C), "ln2b": (N, C), "fcw": (N, 4 * C, C), "fcb": (N, 4 * C),
        "fcprojw": (N, C, 4 * C), "fcprojb": (N, C), "lnfw": (C,), "lnfb": (C,),
    }
    if c.positions == "rope":
        del shapes["wpe"]
    return shapes


def random_weights(c, generator):
    """Weights in float32, large enough that attention is far from uniform and that no gradient is negligible."""
    weights = {}
    for name, shape in weight_shapes(c).items():
        x = torch.randn(shape, generator=generator)
        if name in ("wte", "wpe"):
            x = x * 0.3
        elif name in ("ln1w", "ln2w", "lnfw"):
            x = 1.0 + 0.2 * x
        elif name.endswith("b"):
            x = x * 0.2
        else:
            x = x / math.sqrt(shape[-1])  # a matrix that keeps the variance
        weights[name] = x
    # Sharper attention: scores of queries and keys with a standard deviation of about 2.
    weights["qkvw"][:, :2 * c.channels] *= 1.4
    return weights


def layernorm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x ** 3)))


def forward_logits(weights, tokens, c, first, margins=None):
    """Logits (B,T,V) of tokens (B,T), without the padded part of the vocabulary.

    first: whether each layer has the attention of its letter, or all are dense. margins: as in lighthouse_attention.
    """
    w, (B, T), C = weights, tokens.shape, c.channels
    rope = c.rope_theta if c.positions == "rope" else None
    x = w["wte"][tokens]
    if c.positions == "learned":
        x = x + w["wpe"][:T]
    for layer in range(c.layers):
        h = layernorm(x, w["ln1w"][layer], w["ln1b"][layer])
        qkv = h @ w["qkvw"][layer].T + w["qkvb"][layer]
        q, k, v = qkv.reshape(B, T, 3, c.heads, C // c.heads).unbind(2)
        letter = c.letter(layer) if first else "D"
        if letter == "L":
            a, _ = lighthouse_attention(q, k, v, c.levels, c.pool, c.topk, c.tile, rope, margins=margins)
        elif letter == "C":
            a = causal_lighthouse_attention(q, k, v, c.levels, c.pool, c.topk, c.tile, rope, margins)
        else:
            a = dense_attention(q, k, v, rope, c.window if letter == "W" else None)
        x = x + a.reshape(B, T, C) @ w["attprojw"][layer].T + w["attprojb"][layer]
        h = layernorm(x, w["ln2w"][layer], w["ln2b"][layer])
        h = gelu(h @ w["fcw"][layer].T + w["fcb"][layer])
        x = x + h @ w["fcprojw"][layer].T + w["fcprojb"][layer]
    x = layernorm(x, w["lnfw"], w["lnfb"])
    return x @ w["wte"][:c.vocab].T


def mean_loss(logits, targets):
    picked = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (torch.logsumexp(logits, -1) - picked).mean()


def loss_and_grads(weights, tokens, targets, c, first):
    """The mean loss (a float), the logits (B,T,V) and the gradient of every weight, in the weights' precision."""
    leaves = {name: x.detach().clone().requires_grad_(True) for name, x in weights.items()}
    logits = forward_logits(leaves, tokens, c, first)
    loss = mean_loss(logits, targets)
    loss.backward()
    return loss.item(), logits.detach(), {name: x.grad for name, x in leaves.items()}


# ---- the reference file ---------------------------------------------------------------------------------------

def draw(c, batch, seed):
    """Weights (float32), tokens, targets and the smallest margin of the selections that they lead to."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(c, generator)
    tokens = torch.randint(0, c.vocab, (batch, c.seq_len), generator=generator)
    targets = torch.randint(0, c.vocab, (batch, c.seq_len), generator=generator)
    margins = []
    with torch.no_grad():
        forward_logits({name: x.double() for name, x in weights.items()}, tokens, c, True, margins)
    return weights, tokens, targets, min(margins, default=math.inf)


def make(path, c, batch, seed, out=sys.stdout):
    if c.channels % (2 * c.heads):
        raise ValueError(f"channels {c.channels} must be divisible by 2 * heads = {2 * c.heads}")
    if c.layers > MAX_LAYERS:
        raise ValueError(f"the header has room for {MAX_LAYERS} layers, not {c.layers}")
    if not c.attention or set(c.attention) - set("DWLC"):
        raise ValueError(f"attention is {c.attention!r}, not letters D, W, L and C")
    if c.window < 1:
        raise ValueError(f"window is {c.window}, not at least 1")
    if set(c.attention) & set("LC"):
        check_lighthouse_shape(c.seq_len, c.levels, c.pool, c.topk, c.tile)
    for seed in range(seed, seed + MAX_DRAWS):
        weights, tokens, targets, margin = draw(c, batch, seed)
        if margin > MIN_MARGIN:
            break
        print(f"seed {seed}: a selection has a margin of only {margin:.1e}; drawing again", file=out, flush=True)
    else:
        # Without position embeddings, equal tokens have equal norms in layer 0: exact ties, and many of them.
        raise ValueError(f"none of {MAX_DRAWS} seeds gave clear selections; try a larger vocabulary, layer 0 dense "
                         "(with rope its norms tie wherever a token repeats), fewer layers, or a shorter sequence")
    double = {name: x.double() for name, x in weights.items()}
    loss_dense, logits_dense, grads_dense = loss_and_grads(double, tokens, targets, c, False)
    loss_first, logits_first, grads_first = loss_and_grads(double, tokens, targets, c, True)

    header = np.zeros(64, dtype="<i4")
    header[:15] = [MAGIC, VERSION, batch, c.seq_len, c.vocab, c.padded_vocab, c.layers, c.heads, c.channels,
                   int(c.positions == "learned"), c.levels, c.pool, c.topk, c.tile, c.window]
    header[15:15 + c.layers] = [ord(c.letter(layer)) for layer in range(c.layers)]
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(np.array([c.rope_theta, loss_first, loss_dense], dtype="<f8").tobytes())
        write = lambda x, dtype: f.write(x.numpy().astype(dtype).tobytes())
        for x in weights.values():
            write(x, "<f4")
        write(tokens, "<i4")
        write(targets, "<i4")
        write(logits_dense, "<f4")
        write(logits_first, "<f4")
        for grads in (grads_first, grads_dense):
            for x in grads.values():
                write(x, "<f4")
    print(f"{path}: seed {seed}, margin {margin:.1e}, loss {loss_first:.6f} with attention {c.attention}, "
          f"{loss_dense:.6f} dense", file=out)


def read(path):
    """What make() wrote, as a dict of the configuration, the losses, the tensors and the dicts of tensors."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(256), dtype="<i4")
        if header[0] != MAGIC or header[1] != VERSION:
            raise ValueError(f"{path} is no reference file of version {VERSION}")
        theta, loss_first, loss_dense = np.frombuffer(f.read(24), dtype="<f8").tolist()
        B, T, V, _, layers, heads, C, positions, levels, pool, topk, tile, window = header[2:15].tolist()
        c = Config(layers, C, heads, V, T, ("rope", "learned")[positions], theta, levels, pool, topk, tile,
                   "".join(map(chr, header[15:15 + layers])), window)

        def tensor(shape, dtype="<f4"):
            count = int(np.prod(shape))
            return torch.from_numpy(np.frombuffer(f.read(4 * count), dtype=dtype).reshape(shape).copy())

        def model():
            return {name: tensor(shape) for name, shape in weight_shapes(c).items()}

        file = dict(config=c, loss_first=loss_first, loss_dense=loss_dense, weights=model(),
                    tokens=tensor((B, T), "<i4").long(), targets=tensor((B, T), "<i4").long(),
                    logits_dense=tensor((B, T, V)), logits_first=tensor((B, T, V)),
                    grads_first=model(), grads_dense=model())
        if f.read(1):
            raise ValueError(f"{path} is longer than its header says")
    return file


def main():
    parser = argparse.ArgumentParser(description="PyTorch oracle of the trainer")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make", help="write a reference file of weights, tokens, losses, logits and gradients")
    p.add_argument("out", metavar="OUT.bin")
    p.add_argument("--positions", choices=["rope", "learned"], default="rope")
    p.add_argument("--rope-theta", type=float, default=10000.0)
    for name, default in [("layers", 4), ("channels", 64), ("heads", 4), ("vocab", 257), ("seq-len", 512), ("batch", 2),
                          ("levels", 3), ("pool", 4), ("topk", 16), ("tile", 8), ("window", 96), ("seed", 1)]:
        p.add_argument("--" + name, type=int, default=default, help=f"default {default}")
    p.add_argument("--attention", default="L", help="letters D, W, L, C, repeated to the layers; default %(default)s")
    a = parser.parse_args()
    c = Config(a.layers, a.channels, a.heads, a.vocab, a.seq_len, a.positions, a.rope_theta, a.levels, a.pool, a.topk,
               a.tile, a.attention, a.window)
    try:
        make(a.out, c, a.batch, a.seed)
    except ValueError as error:
        sys.exit(f"oracle.py: {error}")


if __name__ == "__main__":
    main()
