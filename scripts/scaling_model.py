"""The arithmetic of many GPUs, for scripts/bench_scaling and scripts/predict_scaling: what a rank sends in a step and
what it keeps. A shape is what the trainer's log.jsonl says of a run: layers, channels, heads, padded_vocab, positions,
B (sequences of a micro-step on one rank), T, tokens (of a step, all ranks), recompute (the level of every layer),
attention (a letter a layer: D dense, W window, L Lighthouse), windows ([tokens, from this step on], ...), and
lighthouse: slots, levels, pool, topk and tile, or None. world = dp x cp ranks."""
import importlib.machinery
import importlib.util
import math
import os

GIB = 1 << 30
LAYERS_AT_ONCE = 10  # gradients summed and weights gathered, as the trainer's constant says


def script(name):
    """A program of this folder as a module; their names have no .py."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def ceil(n, multiple):
    return (n + multiple - 1) // multiple * multiple


# ---- parameters ---------------------------------------------------------------------------------------------------

def units(shape, world):
    """Elements of the trainer's units: the embeddings with the last LayerNorm, and each layer. Every tensor is filled up
    to 128 elements, a unit to 128 for every rank."""
    C, Vp = shape["channels"], shape["padded_vocab"]
    embeddings = [Vp * C, C, C] + ([] if shape["positions"] == "rope" else [shape["T"] * C])
    layer = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    sizes = [ceil(sum(ceil(n, 128) for n in tensors), 128 * world) for tensors in (embeddings, layer)]
    return [sizes[0]] + [sizes[1]] * shape["layers"]


# ---- collectives --------------------------------------------------------------------------------------------------

def collectives(shape, phase, world, cp, element=2):
    """The collectives of one step: call, what it carries, bytes of the buffer on one rank, calls a step, ranks that
    share it. A rank sends (ranks - 1) / ranks of the buffer; of a shift to the next rank all but the last send all.
    element: bytes of a parameter or activation."""
    found = []

    def add(call, what, size, calls, ranks):
        if calls:
            found.append({"call": call, "what": what, "bytes": size, "calls": calls, "ranks": ranks})

    if world > 1:
        first, *layers = units(shape, world)
        add("reduce_scatter", "fp32 gradients of the embeddings", 4 * first, 1, world)
        add("all_gather", "weights of the embeddings", element * first, 1, world)
        tens, rest = divmod(len(layers), LAYERS_AT_ONCE)
        for count, calls in ((LAYERS_AT_ONCE, tens), (rest, min(rest, 1))):
            what = f"{count} layer{'s' * (count > 1)}"
            add("reduce_scatter", f"fp32 gradients of {what}", 4 * count * layers[0], calls, world)
            add("all_gather", f"weights of {what}", element * count * layers[0], calls, world)
    if cp > 1:
        micro_steps = shape["tokens"] // (shape["B"] * shape["T"] * (world // cp))
        row, B = element * shape["channels"], shape["B"]
        sparse = layer_levels(shape, phase, "L") if exchanges_slots(shape, cp) else []
        whole = layer_levels(shape, phase, exchanging(shape, cp))

        def add_cp(call, what, size, calls):
            add(call, what, size, micro_steps * calls, cp)

        # Forward and backward; and again what is recomputed in the backward pass. Sequences are exchanged one by one.
        tokens = row * shape["T"] // cp
        add_cp("all_to_all", "qkv and its gradient", 3 * tokens, B * passes(whole, 2, 3))
        add_cp("all_to_all", "attention's output and its gradient", tokens, B * passes(whole, 2, 2))
        if sparse:
            lh = shape["lighthouse"]
            slots = row * lh["slots"] // cp
            add_cp("all_to_all", "qkv of the slots and its gradient", 3 * slots, B * passes(sparse, 2, 2))
            add_cp("all_to_all", "output of the slots and its gradient", slots, B * passes(sparse, 2, 2))
            add_cp("shift", "output of the last slots", B * row * (lh["levels"] - 1), passes(sparse, 1, 2))
            add_cp("shift", "gradient of the first tokens", row * halo_rows(lh), B * len(sparse))
    return found


def sent(call):
    """Bytes that a rank sends in one call; in a shift, which the last rank has nobody for, on average."""
    return call["bytes"] * (call["ranks"] - 1) // call["ranks"]


def layer_levels(shape, phase, letters):
    """The recompute levels of the layers that have one of these kinds of attention in that phase."""
    attention = shape["attention"] if phase == "first" else "D" * shape["layers"]
    return [level for level, letter in zip(shape["recompute"], attention) if letter in letters]


def passes(levels, once, again):
    """How often layers of these levels do what each does so often, and once more from the level `again` on."""
    return once * len(levels) + sum(level >= again for level in levels)


def exchanges_slots(shape, cp):
    """Whether Lighthouse layers exchange slots between cp ranks, not tokens: the trainer's can_exchange_slots()."""
    lh = shape["lighthouse"]
    return bool(cp > 1 and lh) and lh["topk"] // lh["tile"] % cp == 0 and lh["slots"] < shape["T"]


def exchanging(shape, cp, window=None):
    """The kinds of layers that exchange tokens between cp ranks: windows only where they do not lie whole on a rank.
    window: this, or the run's first."""
    if cp == 1:
        return ""
    window = window or (shape["windows"] or [[shape["T"], 0]])[0][0]
    return "D" + "W" * (shape["T"] // cp % window != 0) + "L" * (not exchanges_slots(shape, cp))


def halo_rows(lh):
    """Tokens behind a part of a sequence that its last entries reach."""
    return lh["pool"] ** (lh["levels"] - 1) - 1


# ---- memory -------------------------------------------------------------------------------------------------------

def memory(shape, world, cp, element=2):
    """{part: bytes} that a rank takes, by the names of the trainer's plan. All phases and windows share the largest."""
    n = sum(units(shape, world))
    B, T, C, D = shape["B"], shape["T"], shape["channels"], shape["channels"] // shape["heads"]
    parts = {"parameters": element * n, "fp32 masters": 4 * n // world if element < 4 else 0, "gradients": 4 * n,
             "AdamW moments": 8 * n // world}
    if shape["positions"] == "rope":
        parts["rotary table"] = (1024 + math.ceil(T / 1024)) * D * 4
    parts["activations"] = max(activations(shape, phase, cp, element, window) for phase in ("first", "dense")
                               for window in [tokens for tokens, _ in shape["windows"]] or [T])
    if element < 4:  # cuDNN's backward sums dq in fp32, and keeps a number for every row of every head
        parts["attention workspace"] = 4 * B * T // cp * (C + shape["heads"])
    return {name: size for name, size in parts.items() if size}


def activations(shape, phase, cp, element, window):
    """Bytes of the activations of a training pass, the largest kind of pass."""
    if "C" in shape["attention"]:
        raise ValueError(f"attention {shape['attention']}: Causal Lighthouse, C, is not in this arithmetic")
    L, C, NH = shape["layers"], shape["channels"], shape["heads"]
    N = shape["B"] * shape["T"] // cp              # rows on this rank; or all rows of its NH/cp heads
    u, statistic = element * N * C, 4 * N
    both, exchange = shape["recompute"], exchanging(shape, cp, window)
    sparse, tokens = layer_levels(shape, phase, "L"), layer_levels(shape, phase, "DW")
    two_forms = layer_levels(shape, phase, exchange.replace("L", ""))
    one_form = layer_levels(shape, phase, set("DW") - set(exchange))
    highest = max(both)

    def places(levels, again):
        """Of a tensor that is dropped from the level `again` on: one a layer that keeps it, one for all others."""
        return sum(level < again for level in levels) + (highest >= again and len(levels) > 0)

    total = L * (u + 4 * statistic)                # inputs of the blocks; mean and 1/deviation of two LayerNorms
    total += places(both, 1) * 4 * u               # gelu
    total += places(both, 2) * 2 * u               # ln1, ln2
    total += places(both, 3) * 8 * u               # qkv, x2, fch
    total += places(tokens, 4) * statistic * NH    # dense and window attention's sums
    kept = sum(level < 2 for level in sparse + two_forms) + sum(level < 4 for level in one_form)
    total += (kept + (highest >= 4 or highest >= 2 and len(sparse + two_forms) > 0)) * u  # attention's output
    total += places(two_forms, 4) * u              # and in the form of all rows of some heads
    if sparse:
        lh = shape["lighthouse"]
        slots = shape["B"] * lh["slots"] // cp     # rows of C elements
        entries = shape["B"] * NH * sum(shape["T"] // lh["pool"] ** l for l in range(lh["levels"])) // cp
        s = element * slots * C
        total += places(sparse, 2) * 3 * s         # gathered qkv
        total += len(sparse) * (s + 8 * slots * NH)                                       # output, sums, index of them
        total += 12 * entries + 4 * s              # scores, slot of each entry; gradients of the slots
        if exchanges_slots(shape, cp):             # output of the own slots; what the neighbours give
            total += s + element * shape["B"] * C * halo_rows(lh)
    total += 2 * u + 3 * statistic                 # the last block's output, its LayerNorm, the losses
    chunk = (512 << 20) // (shape["padded_vocab"] * element) // 128 * 128
    total += element * min(N, max(chunk, 128)) * shape["padded_vocab"]                    # logits of some rows
    return total + 6 * u                           # gradients: of the stream, of C and of 4C channels
