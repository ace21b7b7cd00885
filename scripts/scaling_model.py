"""The arithmetic of many GPUs, for scripts/bench_scaling and scripts/predict_scaling: what a rank sends in a step and
what it keeps. A shape is what the trainer's log.jsonl says of a run: layers, channels, heads, padded_vocab, positions,
B (sequences of a micro-step on one rank), T, tokens (of a step, all ranks), recompute, and lighthouse: slots, levels,
pool and dense_layers, or None. world = dp x cp ranks."""
import importlib.machinery
import importlib.util
import math
import os

GIB = 1 << 30


def script(name):
    """A program of this folder as a module; their names have no .py."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def ceil(n, unit):
    return (n + unit - 1) // unit * unit


# ---- parameters ---------------------------------------------------------------------------------------------------

def groups(shape, world):
    """Elements of the trainer's parameter groups: the embeddings with the last LayerNorm, and each layer. Every tensor
    is filled up to 128 elements, a group to 128 for every rank."""
    C, Vp = shape["channels"], shape["padded_vocab"]
    embeddings = [Vp * C, C, C] + ([] if shape["positions"] == "rope" else [shape["T"] * C])
    layer = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    sizes = [ceil(sum(ceil(n, 128) for n in tensors), 128 * world) for tensors in (embeddings, layer)]
    return [sizes[0]] + [sizes[1]] * shape["layers"]


# ---- collectives --------------------------------------------------------------------------------------------------

def collectives(shape, phase, world, cp, element=2):
    """The collectives of one step: call, what it carries, bytes of the buffer on one rank, calls a step, ranks that
    share it. A rank sends (ranks - 1) / ranks of the buffer. element: bytes of a parameter or activation."""
    found = []
    if world > 1:
        first, *layers = groups(shape, world)
        for what, elements, calls in (("the embeddings", first, 1), ("a layer", layers[0], len(layers))):
            found.append({"call": "reduce_scatter", "what": f"fp32 gradients of {what}", "bytes": 4 * elements,
                          "calls": calls, "ranks": world})
            found.append({"call": "all_gather", "what": f"weights of {what}", "bytes": element * elements,
                          "calls": calls, "ranks": world})
    if cp > 1:
        micro_steps = shape["tokens"] // (shape["B"] * shape["T"] * (world // cp))
        rows = element * shape["T"] // cp * shape["channels"]  # one (T/cp, C): sequences are exchanged one by one
        layers, level = shape["layers"], shape["recompute"]
        # Forward and backward; and again what is recomputed in the backward pass.
        qkv = 2 * layers + (level >= 3) * layers
        att = 2 * layers + (level >= 2) * layers
        for what, n, calls in (("qkv and its gradient", 3, qkv), ("attention's output and its gradient", 1, att)):
            found.append({"call": "all_to_all", "what": what, "bytes": n * rows,
                          "calls": micro_steps * shape["B"] * calls, "ranks": cp})
    return found


def sent(call):
    """Bytes that a rank sends in one call."""
    return call["bytes"] * (call["ranks"] - 1) // call["ranks"]


def sparse_layers(shape, phase):
    """Layers whose attention runs over the slots."""
    lh = shape["lighthouse"]
    return shape["layers"] - len(lh["dense_layers"]) if phase == "lighthouse" and lh else 0


# ---- memory -------------------------------------------------------------------------------------------------------

def memory(shape, world, cp, element=2):
    """{part: bytes} that a rank takes, by the names of the trainer's plan. Both phases take the larger of their two."""
    n = sum(groups(shape, world))
    B, T, C, D = shape["B"], shape["T"], shape["channels"], shape["channels"] // shape["heads"]
    parts = {"parameters": element * n, "fp32 masters": 4 * n // world if element < 4 else 0, "gradients": 4 * n,
             "AdamW moments": 8 * n // world}
    if shape["positions"] == "rope":
        parts["rotary table"] = (1024 + math.ceil(T / 1024)) * D * 4
    parts["activations"] = max(activations(shape, phase, cp, element) for phase in ("lighthouse", "dense"))
    if element < 4:  # cuDNN's backward sums dq in fp32, and keeps a number for every row of every head
        parts["attention workspace"] = 4 * B * T // cp * (C + shape["heads"])
    return {name: size for name, size in parts.items() if size}


def activations(shape, phase, cp, element):
    """Bytes of the activations of a training pass, the largest kind of pass."""
    level, L, C, NH = shape["recompute"], shape["layers"], shape["channels"], shape["heads"]
    N = shape["B"] * shape["T"] // cp              # rows on this rank; or all rows of its NH/cp heads
    u, statistic = element * N * C, 4 * N
    sparse = sparse_layers(shape, phase)
    dense = L - sparse
    total = L * (u + 4 * statistic)                # inputs of the blocks; mean and 1/deviation of two LayerNorms
    total += (L if level < 1 else 1) * 4 * u       # gelu
    total += (L if level < 2 else 1) * 2 * u       # ln1, ln2
    total += (L if level < 3 else 1) * 8 * u       # qkv, x2, fch
    total += (dense if level < 4 else dense > 0) * statistic * NH                         # dense attention's sums
    kept = (sparse if level < 2 else 0) + (dense if level < (2 if cp > 1 else 4) else 0)
    total += (kept + (level >= 4 or level >= 2 and (sparse > 0 or cp > 1))) * u           # attention's output
    if cp > 1:                                     # and in the form of all rows of some heads
        total += (dense if level < 4 else dense > 0) * u
    if sparse:
        lh = shape["lighthouse"]
        slots = shape["B"] * lh["slots"] // cp     # rows of C elements
        entries = shape["B"] * NH * sum(shape["T"] // lh["pool"] ** l for l in range(lh["levels"])) // cp
        s = element * slots * C
        total += (sparse if level < 2 else 1) * 3 * s                                     # gathered qkv
        total += sparse * (s + 8 * slots * NH)     # output, sums and index of the slots
        total += 12 * entries + 4 * s              # scores, slot of each entry; gradients of the slots
    total += 2 * u + 3 * statistic                 # the last block's output, its LayerNorm, the losses
    chunk = (512 << 20) // (shape["padded_vocab"] * element) // 128 * 128
    total += element * min(N, max(chunk, 128)) * shape["padded_vocab"]                    # logits of some rows
    return total + 6 * u                           # gradients: of the stream, of C and of 4C channels
