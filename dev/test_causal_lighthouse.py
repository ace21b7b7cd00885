"""Shows that the prototype of Causal Lighthouse computes what it says: against one masked softmax over tokens and
slots, by perturbation (no output sees a later token, whatever becomes of the selection), and, published Lighthouse,
against the oracle."""
import argparse
import itertools
import math

import pytest
import torch

import causal_lighthouse as cl
import oracle

torch.set_num_threads(1)
ROPE = 10000.0


def inputs(B, T, H, D, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, D, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def entries_of_tiles(q, k, c):
    """The slots of one head as the oracle selects them, tile by tile: lists of (level, entry of the sequence)."""
    found = []
    for first in range(0, len(q), c.tile):
        part = [x[first:first + c.tile].norm(dim=-1) for x in (q, k)]
        slots, _ = oracle.lighthouse_select(*part, c.levels, c.pool, c.quota, c.quota)
        if not c.parents:
            kept = set(slots)
            slots = [(l, i) for l, i in slots if l == 0 or (l - 1, i * c.pool) not in kept]
        found.append([(l, i + first // c.pool ** l) for l, i in slots])
    return found


def stated(q, k, v, c):
    """Causal Lighthouse of one head (T,D), written as one softmax of every token over all tokens and slots, masked."""
    T, D = q.shape
    tokens = torch.arange(T)
    keys, values, bias = [oracle.rotate(k, tokens, ROPE)], [v], [torch.zeros(T, dtype=q.dtype)]
    own = tokens[:, None] // c.tile == tokens[None] // c.tile
    seen = [own & (tokens[None] <= tokens[:, None])]
    for tile, slots in enumerate(entries_of_tiles(q.detach(), k.detach(), c)):
        for level, i in slots:
            count = c.pool ** level
            covered = slice(i * count, (i + 1) * count)
            last = torch.tensor([(i + 1) * count - 1])
            keys.append(keys[0][covered].mean(0, keepdim=True) if c.pool_rotated else
                        oracle.rotate(k[covered].mean(0, keepdim=True), last, ROPE))
            values.append(v[covered].mean(0, keepdim=True))
            bias.append(torch.full((1,), math.log(count) if c.log_c else 0.0, dtype=q.dtype))
            seen.append((tokens // c.tile > tile)[:, None])
    logits = oracle.rotate(q, tokens, ROPE) @ torch.cat(keys).T / math.sqrt(D) + torch.cat(bias)
    return torch.softmax(logits.masked_fill(~torch.cat(seen, 1), -math.inf), -1) @ torch.cat(values)


VARIANTS = [cl.Pyramid(tile=32, levels=levels, pool=pool, quota=quota, parents=parents, log_c=log_c)
            for (levels, pool, quota), parents, log_c in itertools.product(
                [(2, 4, 4), (3, 2, 4), (3, 4, 2), (4, 2, 2)], (False, True), (False, True))]
VARIANTS += [cl.Pyramid(tile=32, levels=3, pool=2, quota=4, log_c=log_c, pool_rotated=True) for log_c in (False, True)]


def run(q, k, v, c, backend="plain"):
    rope = cl.rope_table(q.shape[1], q.shape[3], ROPE, q.device, q.dtype)
    return cl.causal_lighthouse(q, k, v, rope, backend, c)


@pytest.mark.parametrize("c", VARIANTS, ids=str)
def test_one_softmax(c):
    B, T, H, D = 2, 128, 2, 8
    q, k, v, dout = inputs(B, T, H, D)
    out = run(q, k, v, c)
    reference = torch.stack([stated(q[b, :, h], k[b, :, h], v[b, :, h], c) for b in range(B) for h in range(H)])
    reference = reference.view(B, H, T, D).transpose(1, 2)
    assert relative_error(out, reference) < 1e-12
    found = torch.autograd.grad(out, (q, k, v), dout)
    for x, r in zip(found, torch.autograd.grad(reference, (q, k, v), dout)):
        assert relative_error(x, r) < 1e-12


@pytest.mark.parametrize("c", [c for c in VARIANTS if c.pool_rotated and not c.log_c] + [
    cl.Pyramid(tile=64, levels=2, pool=4, quota=8, log_c=False, pool_rotated=True)], ids=str)
def test_the_oracle_states_the_variant_that_was_built(c):
    T, H, D = 128, 2, 8
    q, k, v, dout = inputs(2, T, H, D)
    out = oracle.causal_lighthouse_attention(q, k, v, c.levels, c.pool, c.quota * T // c.tile, c.quota, ROPE)
    reference = torch.stack([stated(q[b, :, h], k[b, :, h], v[b, :, h], c) for b in range(2) for h in range(H)])
    reference = reference.view(2, H, T, D).transpose(1, 2)
    assert relative_error(out, reference) < 1e-12
    for x, r in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(reference, (q, k, v), dout)):
        assert relative_error(x, r) < 1e-12


@pytest.mark.parametrize("c", VARIANTS, ids=str)
def test_slots_of_a_tile_are_constant(c):
    q, k, _, _ = inputs(1, 128, 1, 8)
    for slots in entries_of_tiles(q[0, :, 0].detach(), k[0, :, 0].detach(), c):
        assert [sum(l == level for l, _ in slots) for level in range(c.levels)] == c.counts()
        if not c.parents:  # the leaves cover each token of the tile once
            assert sum(c.pool ** l for l, _ in slots) == c.tile


def test_everything_expanded_is_dense_attention():
    c = cl.Pyramid(tile=32, levels=2, pool=4, quota=8, log_c=True)
    q, k, v, dout = inputs(2, 128, 2, 8)
    out, reference = run(q, k, v, c), oracle.dense_attention(q, k, v, ROPE)
    assert relative_error(out, reference) < 1e-12
    for x, r in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(reference, (q, k, v), dout)):
        assert relative_error(x, r) < 1e-12


def test_no_selection():
    """Quota 0: with equal keys within each coarsest entry, no rotation and log c, nothing is lost by pooling."""
    c = cl.Pyramid(tile=32, levels=3, pool=2, quota=0, log_c=True)
    q, k, v, _ = inputs(1, 128, 2, 8)
    k = k[:, ::4].repeat_interleave(4, 1)
    still = torch.ones(128, 4, dtype=q.dtype), torch.zeros(128, 4, dtype=q.dtype)
    out = cl.causal_lighthouse(q, k, v, still, "plain", c)
    assert relative_error(out, oracle.dense_attention(q, k, v)) < 1e-12
    assert c.counts() == [0, 0, 8]


@pytest.mark.parametrize("levels,pool,quota,tile", [(2, 4, 8, 64), (3, 2, 4, 64), (3, 4, 8, 128)])
def test_published_lighthouse(levels, pool, quota, tile):
    c, T = cl.Pyramid(tile=tile, levels=levels, pool=pool, quota=quota), 256
    q, k, v, dout = inputs(2, T, 2, 8)
    rope = cl.rope_table(T, 8, ROPE, q.device, q.dtype)
    out = cl.published_lighthouse(q, k, v, rope, "plain", c)
    reference, _ = oracle.lighthouse_attention(q, k, v, levels, pool, quota * T // tile, quota, ROPE)
    assert relative_error(out, reference) < 1e-12
    for x, r in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(reference, (q, k, v), dout)):
        assert relative_error(x, r) < 1e-12


@pytest.mark.parametrize("shifted", [False, True])
def test_window(shifted):
    T, window = 128, 32
    q, k, v, dout = inputs(2, T, 2, 8)
    rope = cl.rope_table(T, 8, ROPE, q.device, q.dtype)
    out = cl.window_attention(q, k, v, rope, "plain", window, shifted)
    block = (torch.arange(T) + (window // 2 if shifted else 0)) // window
    seen = (block[:, None] == block[None]).tril()
    qr, kr = (oracle.rotate(x.transpose(1, 2), torch.arange(T), ROPE) for x in (q, k))
    logits = (qr @ kr.transpose(-1, -2) / math.sqrt(8)).masked_fill(~seen, -math.inf)
    reference = (torch.softmax(logits, -1) @ v.transpose(1, 2)).transpose(1, 2)
    assert relative_error(out, reference) < 1e-12


# ---- the future -------------------------------------------------------------------------------------------------

def options(**changed):
    defaults = dict(pattern="C", seq_len=256, batch=1, layers=2, channels=32, heads=2, window=32, tile=32, levels=3,
                    pool=2, quota=4, score="qk", parents=False, log_c=True, pool_rotated=False, seed=1, rope_theta=ROPE, backend="plain")
    return argparse.Namespace(**{**defaults, **changed})


def outputs_changed_before(o, tries=6):
    """Tokens t are replaced one at a time, all recomputed: how many losses of tokens before t have changed."""
    model = cl.GPT(o, torch.device("cpu"), torch.float64, torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)  # attention far from uniform
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 256, (1, o.seq_len), generator=generator)
    targets = torch.randint(0, 256, (1, o.seq_len), generator=generator)
    changed, later = 0, 0
    with torch.no_grad():
        before, _ = model(tokens, targets, o.pattern)
        for t in torch.randint(o.seq_len // 2, o.seq_len - 1, (tries,), generator=generator).tolist():
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1 + torch.randint(0, 255, (1,), generator=generator)) % 256
            difference = (model(other, targets, o.pattern)[0] - before)[0].abs()
            changed += (difference[:t] > 1e-9).sum().item()
            later += (difference[t:] > 1e-9).sum().item()
    assert later > 0  # the perturbation reaches what it may reach
    return changed


@pytest.mark.parametrize("score", ["qk", "k", "spread"])
@pytest.mark.parametrize("quota", [0, 4])
def test_causal_lighthouse_does_not_see_the_future(score, quota):
    for parents, log_c in itertools.product((False, True), (False, True)):
        assert outputs_changed_before(options(score=score, quota=quota, parents=parents, log_c=log_c)) == 0


@pytest.mark.parametrize("pattern", ["D", "W", "S", "WSWC"])
def test_others_do_not_see_the_future(pattern):
    assert outputs_changed_before(options(pattern=pattern, layers=4)) == 0


def test_published_lighthouse_sees_the_future():
    assert outputs_changed_before(options(pattern="L"), tries=12) > 0
