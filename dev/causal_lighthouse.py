#!/usr/bin/env python3
"""Tries Causal Lighthouse, a Lighthouse that cannot see the future, on small models: PyTorch, one GPU, one file.

A GPT-2 with rotary positions, as the trainer has it, whose layers are named by a pattern of letters that repeats:
    D  dense causal attention
    W  window: causal attention within blocks of --window tokens
    S  the same, the blocks shifted by half a window
    L  Lighthouse as published (--levels, --pool, --quota, --tile; its k is quota * T / tile)
    C  Causal Lighthouse: a token sees its own tile exactly, and of every earlier tile the slots that this tile's own
       tokens selected; one softmax over both
The first --share of the steps runs the pattern, the rest is dense in every layer. Variants of C:
    --parents        an expanded slot stays beside its children (as published); without it only the leaves are
                     kept, which cover every earlier token exactly once
    --log-c          log(c) is added to the logit of a slot that stands for c tokens
    --pool-rotated   a slot's key is the mean of the rotated keys that it covers, so that its logit is the mean of
                     theirs; without it their mean, rotated at the last of them (as published)
    --score qk|k|spread|random   what is expanded: half by |q|, half by |k| (as published); all by |k|; all by the
                     distance of a key from the mean of its parent; at random
    --quota 0        no selection: every earlier tile is seen as its coarsest entries alone

usage:
    causal_lighthouse.py --smoke                         checks and timings of every kind, under a minute on a GPU
    causal_lighthouse.py --data DIR --pattern WWWC ...   one run; DIR holds train.raw and val.raw (bytes, 0xff between
                     files)
    causal_lighthouse.py --data DIR --list FILE --limit SECONDS --results FILE [options for all]
                     one run per line of FILE (its options); runs that the results hold already are skipped, and none is
                     begun that would not end in time, so call it again for the rest
    causal_lighthouse.py --table RESULTS...              what the results say, as a table
    --data random:4  uniform random ids out of 4 instead of text: no causal model can go below ln 4

Every run appends one line of JSON to the results:
    key         the options that make the run; two runs of the same key are the same run
    name        --name, or the pattern and its settings
    slots       slots that a tile contributes, by level; slot_share: their number over the tile's tokens
    train       [step, mean training loss of the steps since the last entry, seconds of training so far]
    evals       [step, validation loss under the pattern, the same weights dense], on few sequences
    loss        {"dense": ..., "pattern": ...} at the end, on --eval-sequences sequences
    position    {"dense": {"0": loss of positions 0..255, "256": of 256..511, "512": ...}, "pattern": ...}
    copy        {"dense": {distance: [loss, share of tokens right]}, "pattern": ...}: the last 256 tokens are random
                letters that stood `distance` tokens earlier too; without the first 16
    copy_switch the same before the first dense step
    seconds     of training alone; pattern_ms, dense_ms: of one step; tokens_per_s over the run; peak_gib; device
"""
import argparse
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

VOCAB, PADDED_VOCAB = 257, 384  # bytes and end of text; padded as the trainer pads
COPY_TOKENS, COPY_SKIPPED = 256, 16


def note(*words):
    print(*words, file=sys.stderr, flush=True)


# ---- compiled functions -----------------------------------------------------------------------------------------

class Compiled:
    """A function that torch.compile speeds up where it can; where it fails, the function itself."""
    enabled = False

    def __init__(self, function, dynamic=False):
        self.function, self.dynamic, self.fast = function, dynamic, None

    def __call__(self, *args):
        if not Compiled.enabled:
            return self.function(*args)
        if self.fast is None:
            self.fast = torch.compile(self.function, dynamic=self.dynamic)
        try:
            return self.fast(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may throw
            note(f"{self.function.__name__} does not compile, and runs as it is: {str(error)[:300]}")
            self.fast = self.function
            return self.function(*args)


def compiled(function):
    return Compiled(function)


# ---- attention by a library call, with its statistics -----------------------------------------------------------
# A backend is a pair of functions on tensors (N,Tq,H,D) and (N,Tk,H,D). forward(q, k, v, causal) -> out, lse (N,Tq,H).
# backward(dout, q, k, v, out, lse, causal) -> dq, dk, dv; out and lse may be those of a softmax over more keys than
# these, of which it then computes this part's share.

aten = torch.ops.aten


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def plain_forward(q, k, v, causal):
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, -1)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2), lse.transpose(1, 2)


def plain_backward(dout, q, k, v, out, lse, causal):
    scale = 1 / math.sqrt(q.shape[-1])
    dout, q, k, v, out = heads_first(dout, q, k, v, out)
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    p = torch.exp(scores - lse.transpose(1, 2)[..., None]).to(q.dtype)
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale
    return heads_first(ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout)


def flash_forward(q, k, v, causal):
    out, lse = aten._scaled_dot_product_flash_attention(*heads_first(q, k, v), 0.0, causal)[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


def flash_backward(dout, q, k, v, out, lse, causal):
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the state of a random generator: there is no dropout
    return heads_first(*aten._scaled_dot_product_flash_attention_backward(
        *heads_first(dout, q, k, v, out), lse.transpose(1, 2).contiguous(), None, None, q.shape[1], k.shape[1], 0.0,
        causal, unused, unused))


def cudnn_forward(q, k, v, causal):
    out, lse = aten._scaled_dot_product_cudnn_attention(*heads_first(q, k, v), None, True, 0.0, causal)[:2]
    return out.transpose(1, 2), lse.reshape(out.shape[:3]).transpose(1, 2)


def cudnn_backward(dout, q, k, v, out, lse, causal):
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    dout, q, k, v, out = heads_first(dout.contiguous(), q, k, v, out.contiguous())
    return heads_first(*aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.transpose(1, 2).contiguous()[..., None], unused, unused, None, None, None, q.shape[2],
        k.shape[2], 0.0, causal))


def efficient_forward(q, k, v, causal):
    out, lse = aten._scaled_dot_product_efficient_attention(*heads_first(q, k, v), None, True, 0.0, causal)[:2]
    return out.transpose(1, 2), lse[:, :, :q.shape[1]].transpose(1, 2)


def efficient_backward(dout, q, k, v, out, lse, causal):
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    lse = F.pad(lse.transpose(1, 2), (0, -lse.shape[1] % 32), value=math.inf).contiguous()
    return heads_first(*aten._scaled_dot_product_efficient_attention_backward(
        *heads_first(dout, q, k, v), None, heads_first(out)[0], lse, unused, unused, 0.0, [True, True, True, False],
        causal)[:3])


BACKENDS = {"plain": (plain_forward, plain_backward), "flash": (flash_forward, flash_backward),
            "cudnn": (cudnn_forward, cudnn_backward), "efficient": (efficient_forward, efficient_backward)}


class Attention(torch.autograd.Function):
    """Attention of q, k, v (N,T,H,D): each token to itself and to those before it."""

    @staticmethod
    def forward(ctx, q, k, v, backend):
        out, lse = BACKENDS[backend][0](q, k, v, True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        return *BACKENDS[ctx.backend][1](dout, q, k, v, out, lse, True), None


def merge_part(out, lse, part, part_lse):
    """Takes a part of the softmax, out (N,T,H,D) and lse (N,T,H), into the sum of the parts so far, in place."""
    merged = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - merged)[..., None]).add_(part.to(out.dtype) * torch.exp(part_lse - merged)[..., None])
    lse.copy_(merged)


merge = Compiled(merge_part, dynamic=True)


def ranges(tiles):
    """Half the lengths, in tiles, of the ranges of the recursion: the later half asks the slots of the earlier half."""
    half = 1
    while half < tiles:
        yield half
        half *= 2


def half_of(x, tiles, half, later):
    """x (B, tiles * n, H, D): the later or earlier halves of its ranges of 2 * half tiles, as a batch; no copy."""
    B, n = x.shape[0], x.shape[1] // tiles
    return x.view(B * (tiles // (2 * half)), 2, half * n, *x.shape[2:])[:, int(later)]


class TileAndSlots(torch.autograd.Function):
    """One softmax of q (B,T,H,D) over the tokens of its own tile up to itself and over all slots of earlier tiles.

    slots: k, v, k, v ... of groups of slots, each (B, tiles * n, H, D), contiguous; bias: what is added to the logits
    of each group.
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles, bias, backend, *slots):
        forward = BACKENDS[backend][0]
        own = [x.view(x.shape[0] * tiles, x.shape[1] // tiles, *x.shape[2:]) for x in (q, k, v)]
        part, part_lse = forward(*own, True)
        # Sums in at least float32.
        out = part.to(torch.promote_types(q.dtype, torch.float32)).contiguous().view(q.shape)
        lse = part_lse.to(out.dtype).contiguous().view(q.shape[:3])
        for half in ranges(tiles):
            q_later = half_of(q, tiles, half, True)
            for g, b in enumerate(bias):
                part, part_lse = forward(q_later, half_of(slots[2 * g], tiles, half, False),
                                         half_of(slots[2 * g + 1], tiles, half, False), False)
                merge(half_of(out, tiles, half, True), half_of(lse, tiles, half, True), part, part_lse + b)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *slots)
        ctx.tiles, ctx.bias, ctx.backend = tiles, bias, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, *slots = ctx.saved_tensors
        tiles, backward, dout = ctx.tiles, BACKENDS[ctx.backend][1], dout.contiguous()
        own = [x.view(x.shape[0] * tiles, x.shape[1] // tiles, *x.shape[2:]) for x in (dout, q, k, v, out, lse)]
        dq, dk, dv = backward(*own, True)
        dq = dq.to(lse.dtype).contiguous().view(q.shape)
        dslots = [torch.zeros_like(x, dtype=lse.dtype) for x in slots]
        for half in ranges(tiles):
            rows = [half_of(x, tiles, half, True) for x in (dout, q, out, lse)]
            for g, b in enumerate(ctx.bias):
                # With the statistics of the whole softmax, each part's share of it comes out: exp(logit + b - lse).
                part = backward(rows[0], rows[1], half_of(slots[2 * g], tiles, half, False),
                                half_of(slots[2 * g + 1], tiles, half, False), rows[2], rows[3] - b, False)
                half_of(dq, tiles, half, True).add_(part[0])
                half_of(dslots[2 * g], tiles, half, False).add_(part[1])
                half_of(dslots[2 * g + 1], tiles, half, False).add_(part[2])
        return (dq.to(q.dtype), dk.reshape(k.shape), dv.reshape(v.shape), None, None, None,
                *(d.to(x.dtype) for d, x in zip(dslots, slots)))


# ---- the pyramid and its selection ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pyramid:
    tile: int = 1024     # tokens of a tile
    levels: int = 3
    pool: int = 4
    quota: int = 16      # m: entries that a tile expands at each level above 0
    score: str = "qk"
    parents: bool = False
    log_c: bool = False
    pool_rotated: bool = False

    def check(self, T):
        coarsest = self.tile / self.pool ** (self.levels - 1)
        tiles = T / self.tile
        if tiles != int(tiles) or int(tiles) & (int(tiles) - 1):
            raise ValueError(f"--tile {self.tile} cuts {T} tokens into {tiles} tiles, not into a power of 2")
        if coarsest != int(coarsest) or coarsest < 1:
            raise ValueError(f"--tile {self.tile} is not a multiple of pool^(levels-1), "
                             f"{self.pool ** (self.levels - 1)}")
        if self.quota > coarsest:
            raise ValueError(f"--quota {self.quota} is more than the {int(coarsest)} coarsest entries of a tile")
        if self.score == "qk" and self.quota % 2:
            raise ValueError(f"--quota {self.quota} must be even: half is picked by |q|, half by |k|")

    def counts(self, parents=None):
        """Slots that a tile keeps, by level; the same in every tile."""
        parents = self.parents if parents is None else parents
        coarsest, m, kept = self.tile // self.pool ** (self.levels - 1), self.quota, []
        for level in range(self.levels):
            candidates = coarsest if level == self.levels - 1 else self.pool * m
            kept.append(candidates if level == 0 or parents else candidates - m)
        return kept


def select(a, b, c, parents):
    """Entries that each tile keeps, by level: a list of (B,tiles,n,H), counted within the tile; scores a, b (B,T,H).

    At each level half the quota is expanded by largest a, then half of it, among the others, by largest b; with
    a = None all of it by b. Of equal ones the lower index wins.
    """
    B, T, H = b.shape
    p, m = c.pool, c.quota
    tiles = T // c.tile

    def pyramid(x):  # of each level, the largest score that an entry covers: (B,tiles,H,entries)
        x = x.view(B, tiles, c.tile, H).transpose(2, 3)
        return [x.unflatten(-1, (-1, p ** level)).amax(-1) for level in range(c.levels)]

    a, b = pyramid(a) if a is not None else None, pyramid(b)
    kept = [None] * c.levels
    candidates = torch.arange(c.tile // p ** (c.levels - 1), device=b[0].device).expand(B, tiles, H, -1)
    for level in range(c.levels - 1, 0, -1):
        score, first = b[level].gather(-1, candidates), None
        if a is not None:
            first = a[level].gather(-1, candidates).sort(dim=-1, descending=True, stable=True).indices[..., :m // 2]
            score = score.scatter(-1, first, -math.inf)
        picked = score.sort(dim=-1, descending=True, stable=True).indices[..., :m - m // 2 if a is not None else m]
        if a is not None:
            picked = torch.cat([first, picked], -1)
        expanded = torch.zeros_like(candidates, dtype=torch.uint8).scatter(-1, picked, 1)
        order = expanded.sort(dim=-1, stable=True).indices  # first those that are not expanded, then the m that are
        left = candidates.shape[-1] - m
        kept[level] = candidates if parents else candidates.gather(-1, order[..., :left])
        chosen = candidates.gather(-1, order[..., left:])
        candidates = (chosen[..., None] * p + torch.arange(p, device=chosen.device)).flatten(-2)
    kept[0] = candidates
    return [x.transpose(2, 3) for x in kept]


def key_spread(k, parent):
    """Distance of each key (B,T,H,D) from the mean of the `parent` tokens that it would be pooled with."""
    grouped = k.unflatten(1, (-1, parent)).float()
    return (grouped - grouped.mean(2, keepdim=True)).norm(dim=-1).flatten(1, 2)


def scores(q, k, c):
    if c.score == "random":
        return None, torch.rand(k.shape[:3], device=k.device)
    if c.score == "spread":
        return None, key_spread(k, c.pool ** (c.levels - 1))
    norm = lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)
    return (norm(q) if c.score == "qk" else None), norm(k)


class TakeRows(torch.autograd.Function):
    """Rows of x (N,D) at an index that names no row twice, so that the backward pass needs no sums."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dout):
        dx = dout.new_zeros(ctx.rows, dout.shape[1])
        return dx.index_copy_(0, ctx.saved_tensors[0], dout.contiguous()), None


def take_entries(x, entries):
    """x (B,n,H,D), entries (B,tiles,m,H) counted over the whole sequence -> (B, tiles*m, H, D)."""
    B, n, H, D = x.shape
    batch = torch.arange(B, device=x.device).view(B, 1, 1, 1)
    index = (batch * n + entries) * H + torch.arange(H, device=x.device)
    return TakeRows.apply(x.reshape(-1, D), index.reshape(-1)).view(B, -1, H, D)


# ---- rotary positions and pooling -------------------------------------------------------------------------------

def rope_table(T, D, theta, device, dtype):
    frequency = theta ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate_by(x, cos, sin):
    """x (B,n,H,D), dimension d paired with d + D/2; cos, sin (n,D/2)."""
    x1, x2 = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


@compiled
def rotate(x, cos, sin):
    return rotate_by(x, cos, sin).to(x.dtype)


@compiled
def pool_means(x, count):
    """Means of x (B,T,H,D) over `count` tokens, summed in cos's precision."""
    return x.unflatten(1, (-1, count)).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


@compiled
def pool_means_rotated(x, count, cos, sin):
    """The same, rotated at the last token that each covers."""
    mean = x.unflatten(1, (-1, count)).mean(2, dtype=cos.dtype)
    return rotate_by(mean, cos[count - 1::count], sin[count - 1::count]).to(x.dtype)


# ---- the kinds of attention: q, k, v (B,T,H,D) before rotation -> (B,T,H,D) -----------------------------------------

def dense_attention(q, k, v, rope, backend):
    return Attention.apply(rotate(q, *rope), rotate(k, *rope), v, backend)


def window_attention(q, k, v, rope, backend, window, shifted=False):
    B, T, H, D = q.shape
    q, k, v = rotate(q, *rope).contiguous(), rotate(k, *rope).contiguous(), v.contiguous()

    def blocks(begin, end, size):
        part = [x[:, begin:end].reshape(-1, size, H, D) for x in (q, k, v)]
        return Attention.apply(*part, backend).reshape(B, end - begin, H, D)
    if not shifted or window >= T:
        return blocks(0, T, min(window, T))
    half = window // 2
    return torch.cat([blocks(0, half, half), blocks(half, T - half, window), blocks(T - half, T, half)], 1)


def causal_lighthouse(q, k, v, rope, backend, c):
    B, T, H, D = q.shape
    tiles = T // c.tile
    with torch.no_grad():
        kept = select(*scores(q, k, c), c, c.parents) if c.quota else \
            [None] * (c.levels - 1) + [torch.arange(c.tile // c.pool ** (c.levels - 1), device=q.device)
                                       .view(1, 1, -1, 1).expand(B, tiles, -1, H)]
    v = v.contiguous()
    q_rotated, k_rotated = rotate(q, *rope).contiguous(), rotate(k, *rope).contiguous()
    slots, bias = [], []
    for level, entries in enumerate(kept):
        if entries is None or entries.shape[2] == 0:
            continue
        count = c.pool ** level
        keys, values = k_rotated, v
        if level > 0:
            keys = pool_means(k_rotated, count) if c.pool_rotated else pool_means_rotated(k, count, *rope)
            values = pool_means(v, count)
        first = torch.arange(tiles, device=q.device).view(1, tiles, 1, 1) * (c.tile // count)
        slots += [take_entries(x, first + entries) for x in (keys, values)]
        bias.append(math.log(count) if c.log_c else 0.0)
    if not c.log_c:  # nothing tells the levels apart: one call
        together = lambda xs: torch.cat([x.view(B, tiles, -1, H, D) for x in xs], 2).view(B, -1, H, D)
        slots, bias = [together(slots[0::2]), together(slots[1::2])], [0.0]
    return TileAndSlots.apply(q_rotated, k_rotated, v, tiles, tuple(bias), backend, *slots)


def published_lighthouse(q, k, v, rope, backend, c):
    B, T, H, D = q.shape
    p, L, tiles = c.pool, c.levels, T // c.tile
    with torch.no_grad():
        kept = select(*scores(q, k, c), c, True)
        ends, flat, offset = [], [], 0
        for level, entries in enumerate(kept):
            n = T // p ** level
            entries = entries + torch.arange(tiles, device=q.device).view(1, tiles, 1, 1) * (n // tiles)
            entries = entries.flatten(1, 2)  # (B,n,H)
            ends.append((entries + 1) * p ** level * L + level)  # by the end of the window, the child first
            flat.append(entries + offset)
            offset += n
        order = torch.cat(ends, 1).sort(1).indices
        flat = torch.cat(flat, 1).gather(1, order)[:, None]  # (B,1,S,H)
    pyramid = lambda x: torch.cat([rotate(x, *rope)] + [pool_means_rotated(x, p ** l, *rope) for l in range(1, L)], 1)
    values = torch.cat([v] + [pool_means(v, p ** l) for l in range(1, L)], 1)
    out = Attention.apply(*(take_entries(x, flat) for x in (pyramid(q), pyramid(k), values)), backend)
    return ScatterSlots.apply(out, flat, T, p, L)


class ScatterSlots(torch.autograd.Function):
    """The slots' rows (B,S,H,D) -> (B,T,H,D): each to as many tokens as it covers, from the last that it covers on."""

    @staticmethod
    def forward(ctx, x, flat, T, p, L):
        B, S, H, D = x.shape
        entries = sum(T // p ** l for l in range(L))
        batch, head = torch.arange(B, device=x.device).view(B, 1, 1, 1), torch.arange(H, device=x.device)
        index = ((batch * entries + flat) * H + head).reshape(-1)
        ctx.save_for_backward(index)
        ctx.p, ctx.L, ctx.slots = p, L, S
        levels = x.new_zeros(B * entries * H, D).index_copy_(0, index, x.reshape(-1, D)).view(B, entries, H, D)
        out, first = torch.zeros(B, T, H, D, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device), 0
        for l in range(L):
            c, n = p ** l, T // p ** l
            spread = levels[:, first:first + n, None].expand(B, n, c, H, D).reshape(B, T, H, D)
            out[:, c - 1:] += spread[:, :T - c + 1]
            first += n
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        B, T, H, D = dout.shape
        sums = []
        for l in range(ctx.L):
            c = ctx.p ** l
            shifted = F.pad(dout[:, c - 1:], (0, 0, 0, 0, 0, c - 1))
            sums.append(shifted.unflatten(1, (-1, c)).sum(2))
        rows = torch.cat(sums, 1).reshape(-1, D).index_select(0, ctx.saved_tensors[0])
        return rows.view(B, ctx.slots, H, D), None, None, None, None


# ---- the model --------------------------------------------------------------------------------------------------

@compiled
def attention_inputs(x, ln_weight, ln_bias, weight, bias, heads, dtype):
    B, T, C = x.shape
    h = F.layer_norm(x, (C,), ln_weight, ln_bias).to(dtype)
    q, k, v = F.linear(h, weight.to(dtype), bias.to(dtype)).view(B, T, 3, heads, C // heads).unbind(2)
    return q.contiguous(), k.contiguous(), v.contiguous()


@compiled
def rest_of_layer(x, a, proj_weight, proj_bias, ln_weight, ln_bias, fc_weight, fc_bias, out_weight, out_bias):
    dtype = a.dtype
    x = x + F.linear(a, proj_weight.to(dtype), proj_bias.to(dtype))
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias).to(dtype)
    h = F.gelu(F.linear(h, fc_weight.to(dtype), fc_bias.to(dtype)), approximate="tanh")
    return x + F.linear(h, out_weight.to(dtype), out_bias.to(dtype))


@compiled
def token_losses(x, ln_weight, ln_bias, embedding, targets, dtype):
    """Loss of each token (B,T), and whether the likeliest token is the right one."""
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias).to(dtype)
    logits = F.linear(h, embedding.to(dtype))[..., :VOCAB]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    picked = logits.gather(-1, targets[..., None]).squeeze(-1)
    return torch.logsumexp(logits, -1) - picked, logits.detach().argmax(-1) == targets


class GPT(torch.nn.Module):
    def __init__(self, o, device, dtype, master=torch.float32):
        super().__init__()
        C, L = o.channels, o.layers
        self.o, self.dtype, self.device = o, dtype, device
        self.pyramid = Pyramid(o.tile, o.levels, o.pool, o.quota, o.score, o.parents, o.log_c,
                               o.pool_rotated)
        self.rope = rope_table(o.seq_len, C // o.heads, o.rope_theta, device, torch.promote_types(dtype, torch.float32))
        shapes = [("wte", PADDED_VOCAB, C), ("lnfw", C), ("lnfb", C)]
        for l in range(L):
            shapes += [(f"{name}_{l}", *shape) for name, *shape in (
                ("ln1w", C), ("ln1b", C), ("qkvw", 3 * C, C), ("qkvb", 3 * C), ("projw", C, C), ("projb", C),
                ("ln2w", C), ("ln2b", C), ("fcw", 4 * C, C), ("fcb", 4 * C), ("outw", C, 4 * C), ("outb", C))]
        generator = torch.Generator().manual_seed(o.seed)
        for name, *shape in shapes:
            if len(shape) == 2:  # the matrices that end in the residual stream begin smaller, as in GPT-2
                scale = 0.02 / math.sqrt(2 * L) if name.startswith(("projw", "outw")) else 0.02
                x = torch.randn(shape, generator=generator) * scale
            else:
                x = torch.ones(shape) if name.startswith("ln") and "w" in name else torch.zeros(shape)
            self.register_parameter(name, torch.nn.Parameter(x.to(device, master)))

    def attention(self, letter, q, k, v):
        o, backend = self.o, self.o.backend
        if letter == "D":
            return dense_attention(q, k, v, self.rope, backend)
        if letter in "WS":
            return window_attention(q, k, v, self.rope, backend, o.window, letter == "S")
        if letter == "L":
            return published_lighthouse(q, k, v, self.rope, backend, self.pyramid)
        return causal_lighthouse(q, k, v, self.rope, backend, self.pyramid)

    def forward(self, tokens, targets, pattern):
        w = lambda *names, layer: [getattr(self, f"{name}_{layer}") for name in names]
        x = F.embedding(tokens, self.wte)
        for l in range(self.o.layers):
            q, k, v = attention_inputs(x, *w("ln1w", "ln1b", "qkvw", "qkvb", layer=l), self.o.heads, self.dtype)
            a = self.attention(pattern[l % len(pattern)], q, k, v).reshape(x.shape)
            x = rest_of_layer(x, a, *w("projw", "projb", "ln2w", "ln2b", "fcw", "fcb", "outw", "outb", layer=l))
        return token_losses(x, self.lnfw, self.lnfb, self.wte, targets, self.dtype)


# ---- data -------------------------------------------------------------------------------------------------------

class Text:
    """Tokens on the device. Sequences in an order that the seed alone decides."""

    def __init__(self, data, split, device):
        if data.startswith("random:"):
            ids = int(data[7:])
            if not 2 <= ids <= 256:
                raise ValueError(f"--data {data}: the number of ids must lie in 2 .. 256")
            tokens = np.random.default_rng(split == "val").integers(0, ids, 2 ** 25 if split == "train" else 2 ** 22,
                                                                    dtype=np.uint8)
            self.end = None
        else:
            path = os.path.join(data, split + ".raw")
            if not os.path.exists(path):
                raise ValueError(f"--data {data}: there is no {path}")
            tokens, self.end = np.fromfile(path, dtype=np.uint8), 255
        self.tokens = torch.from_numpy(tokens).to(device)

    def sequences(self, starts, T):
        """(n, T + 1) tokens from each start on; 0xff, between files, is end of text."""
        starts = torch.as_tensor(starts, device=self.tokens.device)
        x = self.tokens[starts[:, None] + torch.arange(T + 1, device=starts.device)].long()
        return torch.where(x == self.end, 256, x) if self.end is not None else x

    def count(self, T):
        n = (len(self.tokens) - 1) // T
        if n < 1:
            raise ValueError(f"{len(self.tokens)} tokens of data hold no sequence of {T}")
        return n

    def batches(self, T, batch, seed):
        rng, n = np.random.default_rng(seed), self.count(T)
        if n < 2 * batch:
            raise ValueError(f"{len(self.tokens)} tokens of data are too few for batches of {batch} sequences of {T}")
        while True:  # an epoch: all sequences but one, shifted by a random number of tokens
            starts = rng.integers(T) + T * rng.permutation(n - 1)
            for i in range(0, n - 1 - batch + 1, batch):
                yield self.sequences(starts[i:i + batch], T)

    def spread(self, T, count):
        """`count` sequences, evenly over the whole, or all there are."""
        n = self.count(T)
        return self.sequences(np.linspace(0, n - 1, min(count, n)).astype(np.int64) * T, T)


# ---- evaluation -------------------------------------------------------------------------------------------------

@torch.no_grad()
def losses_of(model, sequences, pattern, batch):
    """Losses and whether right, (n,T), of sequences (n,T+1)."""
    found = [model(x[:, :-1].contiguous(), x[:, 1:].contiguous(), pattern) for x in sequences.split(batch)]
    return torch.cat([x[0].float() for x in found]), torch.cat([x[1] for x in found])


def validate(model, sequences, pattern, batch):
    """Mean loss, and the mean of positions 0..255, 256..511, 512..1023, ..."""
    by_position = losses_of(model, sequences, pattern, batch)[0].mean(0).double().cpu()
    position, begin, T = {}, 0, len(by_position)
    while begin < T:
        end = min(T, 2 * begin if begin else 256)
        position[str(begin)] = round(by_position[begin:end].mean().item(), 5)
        begin = end
    return round(by_position.mean().item(), 5), position


def copy_distances(T):
    return [d for d in (1024, 2048, 4096, 8192, 16384) if d < T - 512] + [T - 512] if T > 1024 else [T // 2]


def copying(model, text, pattern, o):
    """{distance: [loss, share right]} of COPY_TOKENS letters that stood `distance` tokens earlier too."""
    rng, table, T = np.random.default_rng(7), {}, o.seq_len
    n = min(COPY_TOKENS, T // 4)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
    for d in copy_distances(T):
        x = text.spread(T, o.copy_sequences).clone()
        what = torch.from_numpy(letters[rng.integers(0, len(letters), (len(x), n))].astype(np.int64)).to(x.device)
        x[:, T + 1 - n:] = what
        x[:, T + 1 - n - d:T + 1 - d] = what
        loss, right = losses_of(model, x, pattern, o.batch)
        kept = slice(T - n + COPY_SKIPPED, None)
        table[str(d)] = [round(loss[:, kept].mean().item(), 4), round(right[:, kept].float().mean().item(), 4)]
    return table


# ---- training ---------------------------------------------------------------------------------------------------

def learning_rate(o, step, steps):
    warmup = min(o.warmup, steps // 4)
    if step < warmup:
        return o.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return o.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def optimizer_of(model, o):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)],
                             lr=o.lr, betas=(0.9, 0.95), eps=1e-8, fused=model.device.type == "cuda")


def forward_backward(model, batch, pattern):
    loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), pattern)[0].mean()
    loss.backward()
    return loss.detach()


def step_seconds(model, batch, pattern, repeats=5):
    """Seconds of a step without its update; compiles on the way. The weights stay as they are."""
    for _ in range(3):
        forward_backward(model, batch, pattern)
    begin = synchronize(model.device)
    for _ in range(repeats):
        forward_backward(model, batch, pattern)
    seconds = (synchronize(model.device) - begin) / repeats
    model.zero_grad(set_to_none=True)
    return seconds


def variant_of(o):
    """The options that make the run, those that its letters do not read left out."""
    key = {name: getattr(o, name) for name in ("pattern", "seq_len", "batch", "steps", "share", "layers", "channels",
                                               "heads", "lr", "warmup", "seed", "rope_theta")}
    key["data"] = os.path.basename(os.path.normpath(o.data))
    if set(o.pattern) & set("WS"):
        key["window"] = o.window
    if set(o.pattern) & set("LC"):
        key.update({name: getattr(o, name) for name in ("tile", "levels", "pool", "quota", "score")})
    if "C" in o.pattern:
        key.update(parents=o.parents, log_c=o.log_c)
        if o.pool_rotated:
            key["pool_rotated"] = True
    return key


def name_of(o):
    if o.name:
        return o.name
    name = o.pattern
    if set(o.pattern) & set("LC"):
        name += f" tile {o.tile} L{o.levels} p{o.pool} m{o.quota}" + (f" {o.score}" if o.quota else "")
    if "C" in o.pattern:
        name += (" parents" if o.parents else " leaves") + (" log c" if o.log_c else "") + \
            (" pooled rotated" if o.pool_rotated else "")
    return f"{name} share {o.share} seed {o.seed}"


class OutOfTime(Exception):
    pass


def train(o, device, deadline=math.inf):
    """One run; returns what becomes its line of the results."""
    begin = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    text, val = Text(o.data, "train", device), Text(o.data, "val", device)
    model = GPT(o, device, dtype)
    optimizer = optimizer_of(model, o)
    pattern, switch = o.pattern, round(o.share * o.steps)
    batches = text.batches(o.seq_len, o.batch, o.seed)
    few, many = val.spread(o.seq_len, 8), val.spread(o.seq_len, o.eval_sequences)

    probe = text.spread(o.seq_len, o.batch)
    pattern_s = step_seconds(model, probe, pattern) if switch else 0.0
    dense_s = step_seconds(model, probe, "D")
    expected = switch * pattern_s + (o.steps - switch) * dense_s
    # Evaluations are about a third of a step for as many sequences.
    evaluated = 2 * len(few) * o.evals + 2 * len(many) + 3 * len(copy_distances(o.seq_len)) * o.copy_sequences
    expected = 1.1 * (expected + evaluated / o.batch * max(pattern_s, dense_s) / 3) + 5
    note(f"{name_of(o)}: step {1e3 * pattern_s:.1f} ms, dense {1e3 * dense_s:.1f} ms; {o.steps} steps, about "
         f"{expected:.0f} s")
    if time.monotonic() + expected > deadline:
        raise OutOfTime(f"{name_of(o)} takes about {expected:.0f} s, and {deadline - time.monotonic():.0f} s are left")

    losses, evals, seconds, waiting = [], [], 0.0, []
    copy_switch, every = None, max(1, o.steps // o.evals)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = synchronize(device)
    for step in range(o.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, o.steps)
        waiting.append(forward_backward(model, next(batches), pattern if step < switch else "D"))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == o.steps
        if (step + 1) % o.log_every == 0 or last or step + 1 == switch:
            mean = torch.stack(waiting).mean().item()
            losses.append([step + 1, round(mean, 5), round(seconds + synchronize(device) - started, 2)])
            waiting = []
            if not math.isfinite(mean):
                raise ValueError(f"{name_of(o)}: the loss is {mean} at step {step + 1}")
        if (step + 1) % every == 0 or last or step + 1 == switch:
            seconds += synchronize(device) - started
            dense = validate(model, few, "D", o.batch)[0]
            under = validate(model, few, pattern, o.batch)[0] if set(pattern) != {"D"} else dense
            evals.append([step + 1, under, dense])
            note(f"  step {step + 1} under the pattern {under:.4f} dense {dense:.4f} {seconds:.0f} s")
            if step + 1 == switch and set(pattern) != {"D"} and not o.data.startswith("random:"):
                copy_switch = {"dense": copying(model, val, "D", o), "pattern": copying(model, val, pattern, o)}
            started = synchronize(device)

    result = dict(name=name_of(o), key=variant_of(o), loss={}, position={}, copy={}, copy_switch=copy_switch)
    if "C" in pattern or "L" in pattern:
        counts = model.pyramid.counts(parents=True if "L" in pattern else None)
        result.update(slots=counts, slot_share=round(sum(counts) / o.tile, 4))
    for which, letters in (("dense", "D"), ("pattern", pattern)):
        result["loss"][which], result["position"][which] = validate(model, many, letters, o.batch)
        if not o.data.startswith("random:"):
            result["copy"][which] = copying(model, val, letters, o)
    tokens = o.steps * o.batch * o.seq_len
    result.update(train=losses, evals=evals, seconds=round(seconds, 2), tokens=tokens,
                  tokens_per_s=round(tokens / seconds), pattern_ms=round(1e3 * pattern_s, 2),
                  dense_ms=round(1e3 * dense_s, 2), backend=o.backend,
                  compiled=Compiled.enabled, wall=round(time.monotonic() - begin, 1), torch=torch.__version__,
                  date=time.strftime("%Y-%m-%d %H:%M"),
                  device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                  peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if device.type == "cuda" else None)
    return result


# ---- which backend works and which is fastest -------------------------------------------------------------------

def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def backend_error(backend, device, dtype):
    """The largest relative error of TileAndSlots and its gradients against the plain backend in float32."""
    generator = torch.Generator().manual_seed(5)
    B, tiles, w, n, H, D = 2, 4, 256, 40, 2, 128
    make = lambda rows: torch.randn(B, rows, H, D, generator=generator)
    inputs = [make(tiles * w) for _ in range(3)] + [make(tiles * n) for _ in range(4)]
    dout, found = make(tiles * w), []
    for b, t in (("plain", torch.float32), (backend, dtype)):
        leaves = [x.to(dtype).to(device, t).requires_grad_(True) for x in inputs]
        out = TileAndSlots.apply(*leaves[:3], tiles, (0.0, math.log(16)), b, *leaves[3:])
        dense = Attention.apply(*leaves[:3], b)
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype).to(device, t)),
                      dense, *torch.autograd.grad(dense, leaves[:3], dout.to(dtype).to(device, t))])
    return max(relative(x, reference) for reference, x in zip(*found))


def choose_backend(o, device):
    if device.type != "cuda":
        return "plain"
    times = {}
    for backend in ("flash", "cudnn", "efficient") if o.backend == "auto" else (o.backend,):
        try:
            error = backend_error(backend, device, torch.bfloat16)
            if not error < 0.02:
                note(f"{backend}: relative error {error:.1e}, not used")
                continue
            c = Pyramid(log_c=True)
            q = [torch.randn(o.batch, o.seq_len, o.heads, o.channels // o.heads, device=device, dtype=torch.bfloat16,
                             requires_grad=True) for _ in range(3)]
            rope = rope_table(o.seq_len, o.channels // o.heads, o.rope_theta, device, torch.float32)
            spent = {}
            for kind, run in (("dense", lambda: dense_attention(*q, rope, backend)),
                              ("causal lighthouse", lambda: causal_lighthouse(*q, rope, backend, c))):
                if kind != "dense" and o.seq_len < 2 * c.tile:
                    continue
                for i in range(6):
                    if i == 2:
                        begin = synchronize(device)
                    out = run()
                    out.backward(torch.ones_like(out))
                spent[kind] = (synchronize(device) - begin) / 4
            times[backend] = sum(spent.values())
            note(f"{backend}: relative error {error:.1e}; a layer's attention, forward and backward, " +
                 ", ".join(f"{kind} {1e3 * s:.2f} ms" for kind, s in spent.items()))
        except Exception as error:  # a backend that this PyTorch or card does not have
            note(f"{backend}: not usable: {str(error)[:300]}")
            torch.cuda.synchronize()
    if not times:
        sys.exit("causal_lighthouse.py: no attention of PyTorch works here; the notes above say why")
    return min(times, key=times.get)


def choose_compilation(o, device):
    """Turns torch.compile on if a layer, compiled, runs and gives the same loss and gradients."""
    if device.type != "cuda" or o.no_compile:
        return
    from torch._dynamo import config as dynamo  # PyTorch 1 has none
    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, 256)
    one = argparse.Namespace(**{**vars(o), "layers": 1})
    batch = torch.randint(0, 256, (o.batch, o.seq_len + 1), generator=torch.Generator().manual_seed(1)).to(device)
    found, begin = [], time.monotonic()
    try:
        for Compiled.enabled in (False, True):
            model = GPT(one, device, torch.bfloat16)
            loss = forward_backward(model, batch, "D")
            found.append(torch.cat([loss.view(1)] + [p.grad.flatten() for p in model.parameters()]))
        error = relative(found[1], found[0])
        Compiled.enabled = error < 0.05
        note(f"torch.compile: {time.monotonic() - begin:.1f} s, relative difference {error:.1e}" +
             ("" if Compiled.enabled else ", not used"))
    except Exception as error:
        Compiled.enabled = False
        note(f"torch.compile does not work here, all runs without: {type(error).__name__}: {str(error)[:500]}")


def prepare(o):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    o.backend = choose_backend(o, device)
    choose_compilation(o, device)
    note(f"device {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, torch {torch.__version__}, "
         f"attention by {o.backend}, {'compiled' if Compiled.enabled else 'not compiled'}")
    return device


# ---- modes ------------------------------------------------------------------------------------------------------

def smoke(o, device):
    """20 steps of every kind on made-up tokens: do they run, how fast, does the loss fall."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 256, (64, 16), generator=generator)
    kinds = [("D", {}), ("W", {}), ("WS", {}), ("WWWL", dict(quota=8)), ("WWWC", dict(log_c=True)),
             ("WWWC", dict(parents=True)), ("WWWC", dict(parents=True, log_c=True)),
             ("WWWC", dict(quota=0, log_c=True)), ("WWWC", dict(score="spread", log_c=True)), ("C", dict(log_c=True))]
    failed = []
    for pattern, options in kinds:
        this = argparse.Namespace(**{**vars(o), **options, "pattern": pattern})
        label = " ".join([pattern] + [f"{k}={v}" for k, v in options.items()])
        try:
            check(this)
            model = GPT(this, device, dtype)
            optimizer, begin, losses = optimizer_of(model, this), time.monotonic(), []
            batch = lambda: words[torch.randint(0, 64, (this.batch, this.seq_len // 16 + 1), generator=generator)] \
                .flatten(1)[:, :this.seq_len + 1].to(device)
            for step in range(o.smoke_steps):
                if step == o.smoke_steps // 2:
                    middle = synchronize(device)
                losses.append(forward_backward(model, batch(), pattern))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            end = synchronize(device)
            ms = 1e3 * (end - middle) / (o.smoke_steps - o.smoke_steps // 2)
            first, last = losses[0].item(), losses[-1].item()
            good = math.isfinite(last) and last < first
            print(f"{'ok' if good else 'FAILED':6} {label:36} {ms:8.2f} ms a step, "
                  f"{this.batch * this.seq_len / ms:7.0f}K tokens/s, loss {first:.3f} -> {last:.3f}, "
                  f"first steps {middle - begin:.1f} s", flush=True)
            failed += [] if good else [label]
        except Exception as error:
            print(f"FAILED {label}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            failed.append(label)
        model = optimizer = None
    print(f"{len(kinds) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


def results_in(paths):
    found = set()
    for path in paths:
        if os.path.exists(path):
            with open(path) as f:
                found |= {json.dumps(json.loads(line)["key"], sort_keys=True) for line in f if line.strip()}
    return found


def run_and_record(o, device, deadline):
    result = train(o, device, deadline)
    line = json.dumps(result)
    with open(o.results, "a") as f:
        f.write(line + "\n")
    print(line if not o.list else
          f"{result['name']}: dense {result['loss']['dense']:.4f}, pattern {result['loss']['pattern']:.4f}, copy " +
          " ".join(f"{d}:{x[0]:.2f}" for d, x in result["copy"].get("dense", {}).items()) +
          f", {result['seconds']:.0f} s, {result['tokens_per_s'] / 1e3:.0f}K tokens/s", flush=True)


def run_list(o, parser, arguments, begin):
    """The runs of the list, in its order; options of a line win over those of the command."""
    with open(o.list) as f:
        lines = [line.split("#")[0].strip() for line in f]
    runs = []
    for line in lines:
        if line:
            run = parser.parse_args(arguments + shlex.split(line))
            check(run)
            runs.append(run)
    done = results_in([o.results] + o.skip)
    todo = [run for run in runs if json.dumps(variant_of(run), sort_keys=True) not in done]
    note(f"{len(runs)} runs in {o.list}, {len(runs) - len(todo)} done already")
    if not todo:
        return 0
    device = prepare(o)
    failed = 0
    for run in todo:
        run.backend = o.backend
        try:
            run_and_record(run, device, begin + o.limit)
        except OutOfTime as error:
            note(f"{error}: left for another call")  # a later one may be short enough
        except Exception as error:
            note(f"FAILED {name_of(run)}: {type(error).__name__}: {error}")
            failed += 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def print_table(paths):
    """A row a run. Losses and copying dense, if not said otherwise; copying in thousands of tokens and its loss."""
    results = [json.loads(line) for path in paths for line in open(path) if line.strip()]
    columns = ["run", "slots/tokens", "loss", "before the switch", "the same under the pattern", "training s",
               "copying", "before the switch", "the same under the pattern"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")

    def copies(table, which):
        return " ".join(f"{int(d) / 1024:.3g}K {x[0]:.2f}" for d, x in (table or {}).get(which, {}).items())
    for r in results:
        switch = round(r["key"]["share"] * r["key"]["steps"])
        under, dense = [e[1:] for e in r["evals"] if e[0] == switch][0] if r["copy_switch"] else ("", "")
        row = [r["name"], r.get("slot_share", ""), r["loss"]["dense"], dense, under, r["seconds"],
               copies(r["copy"], "dense"), copies(r["copy_switch"], "dense"), copies(r["copy_switch"], "pattern")]
        print("| " + " | ".join(map(str, row)) + " |")


def check(o):
    if not o.pattern or set(o.pattern) - set("DWSLC"):
        raise ValueError(f"--pattern {o.pattern}: the letters are D, W, S, L and C")
    if o.layers % len(o.pattern):
        raise ValueError(f"--pattern {o.pattern} has {len(o.pattern)} letters, which do not divide {o.layers} layers")
    if set(o.pattern) & set("WS") and o.seq_len % o.window:
        raise ValueError(f"--seq-len {o.seq_len} is not divisible by --window {o.window}")
    if o.channels % (2 * o.heads):
        raise ValueError(f"--channels {o.channels} must be divisible by 2 * heads = {2 * o.heads}")
    if set(o.pattern) & set("LC"):
        Pyramid(o.tile, o.levels, o.pool, o.quota, o.score, o.parents, o.log_c, o.pool_rotated).check(o.seq_len)
    if "L" in o.pattern and o.quota == 0:
        raise ValueError("--quota 0 is a variant of C; L selects")
    if not 0 <= o.share <= 1:
        raise ValueError(f"--share {o.share} must lie in 0 .. 1")
    if o.tokens:
        o.steps = max(1, round(o.tokens / (o.batch * o.seq_len)))


def main():
    begin = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smoke", action="store_true", help="try every kind and exit")
    p.add_argument("--table", nargs="+", default=[], help="files of results to print as a table")
    p.add_argument("--smoke-steps", type=int, default=20)
    p.add_argument("--data", default="", help="directory of train.raw and val.raw, or random:IDS")
    p.add_argument("--list", default="", help="file of runs, the options of one a line")
    p.add_argument("--limit", type=float, default=math.inf, help="seconds, from the start of the program")
    p.add_argument("--results", default="causal_lighthouse.jsonl", help="file that results are appended to")
    p.add_argument("--skip", action="append", default=[], help="another file of results whose runs are skipped")
    p.add_argument("--name", default="", help="of the run, for people")
    p.add_argument("--pattern", default="WWWC", help="letters of the layers, repeated")
    p.add_argument("--share", type=float, default=0.75, help="of the steps that run the pattern; the rest is dense")
    p.add_argument("--tokens", type=float, default=60e6, help="to train on; 0: as --steps says")
    p.add_argument("--steps", type=int, default=1000)
    for name, default in (("seq-len", 16384), ("batch", 2), ("layers", 8), ("channels", 512), ("heads", 4),
                          ("window", 1024), ("tile", 1024), ("levels", 3), ("pool", 4), ("quota", 16), ("warmup", 150),
                          ("seed", 1), ("evals", 8), ("eval-sequences", 64), ("copy-sequences", 16), ("log-every", 50)):
        p.add_argument("--" + name, type=int, default=default, help=f"default {default}")
    p.add_argument("--score", choices=["qk", "k", "spread", "random"], default="qk", help="what C and L expand")
    p.add_argument("--parents", action="store_true", help="C keeps expanded slots")
    p.add_argument("--log-c", action="store_true", help="C adds log(c) to the logits of slots")
    p.add_argument("--pool-rotated", action="store_true", help="C's keys are pooled after their rotation")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--rope-theta", type=float, default=500000.0)
    p.add_argument("--backend", choices=["auto", *BACKENDS], default="auto",
                   help="library attention; auto: the fastest that is right")
    p.add_argument("--no-compile", action="store_true")
    o = p.parse_args()
    if o.table:
        return print_table(o.table)
    try:
        check(o)
        if o.smoke:
            sys.exit(smoke(o, prepare(o)))
        if not o.data:
            raise ValueError("--data DIR or --data random:4 is needed")
        if o.list:
            sys.exit(run_list(o, p, sys.argv[1:], begin))
        run_and_record(o, prepare(o), begin + o.limit)
    except (ValueError, OutOfTime) as error:
        sys.exit(f"causal_lighthouse.py: {error}")


if __name__ == "__main__":
    main()
