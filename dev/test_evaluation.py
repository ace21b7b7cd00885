"""Proves what validation says of the context: the loss by position is PyTorch's, under both attentions, and its mean is the
loss; copying at a distance is perfect for a model that copies, of two layers written by hand, and chance for one that only
knows how frequent each token is.

    python -m pytest dev/test_evaluation.py        (make builds the programs first)
"""
import math
import re
import sys

import numpy as np
import pytest
import torch

import oracle
from test_trainer import ROOT, Lab, data, events, lab, programs, write_shard  # noqa: F401: fixtures

sys.path.insert(0, str(ROOT / "scripts"))
import model_file  # noqa: E402

torch.set_num_threads(1)
FROM_FILE = dict(depth=None, channels=None, heads=None)  # options that a model file has in itself


def write_model(path, weights, V, T, heads, positions="learned", theta=10000.0):
    layers, C = weights["ln1w"].shape
    config = model_file.ModelConfig(positions, T, V, len(weights["wte"]), layers, heads, C,
                                    rope_theta=theta if positions == "rope" else 0.0)
    model_file.write_model(path, config, ((name, np.asarray(weights[name], "<f4")) for name, _ in model_file.tensor_shapes(config)))
    return path


# ---- by position

@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("attention,T,window", [("WDW", 100, 40), ("DLW", 96, 64), ("DCW", 96, 64), ("W", 64, 16)])
def test_positions(lab, attention, T, window, positions):
    """T is no power of 2, nor a multiple of the window; three sequences are no whole number of batches."""
    c = oracle.Config(3, 32, 2, 150, T, positions, levels=2, pool=2, topk=16, tile=8, attention=attention, window=window)
    generator = torch.Generator().manual_seed(3)
    weights = oracle.random_weights(c, generator)
    tokens = torch.randint(0, c.vocab, (3 * T + 1,), generator=generator)
    model = write_model(lab.folder / "m.bin", {k: x.numpy() for k, x in weights.items()}, c.vocab, T, c.heads, positions)
    val = write_shard(lab.folder / "val.bin", tokens.numpy())
    options = dict(FROM_FILE, model=model, train_data=val, val_data=val, val_batches=2, batch_size=2, seq_len=T, steps=1, topk=16, tile=8,
                   levels=2, pool=2, switch_step="1.0", attention=attention, window=window, learning_rate=0)
    evaluation = events(lab.train("run", **options), "eval")[0]
    inputs, targets, margins = tokens[:-1].reshape(3, T), tokens[1:].reshape(3, T), []
    for kind, first in (("dense", False), ("first", True)):
        logits = oracle.forward_logits({k: x.double() for k, x in weights.items()}, inputs, c, first, margins)
        losses = -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1).mean(0).numpy()
        expected = [losses[0 if i == 0 else 2 ** i:2 ** (i + 1)].mean() for i in range(math.ceil(math.log2(T)))]
        assert len({round(x, 2) for x in expected}) > 3, "the losses must differ to prove anything"
        assert len(evaluation[f"positions_{kind}"]) == len(expected)
        assert np.allclose(evaluation[f"positions_{kind}"], expected, rtol=1e-5), kind
        assert math.isclose(evaluation[f"loss_{kind}"], losses.mean(), rel_tol=1e-6)
    assert min(margins, default=1) > 1e-5, "no selection is a close call"


# ---- copying at a distance

T, N = 2048, 256  # which repeats 256 tokens, from 1,024 and from 1,792 tokens before them


def evaluate(lab, model, tokens):
    """The copies by distance and the evaluation of a model file, without training; and the sequences that they are made of."""
    val = write_shard(lab.folder / "val.bin", tokens)
    folder, options = lab.folder / "run", dict(FROM_FILE, model=model, train_data=None, val_data=val, val_batches=8)
    result = lab.run("run", **options, seq_len=T, steps=0)
    assert result.code == 0, result.err
    copying, = events(folder, "copying")
    assert copying["tokens"] == N - 16
    sequences = [tokens[i % 3 * T:][:T] for i in range(copying["sequences"])]
    evaluation, = events(folder, "eval")
    lines = [dict(w.split(":") for w in line.split(" ")) for line in (folder / "main.log").read_text().splitlines()]
    assert [word for word in lines[0] if word[0] == "p"] == ["p256", "p1024"]
    shown = re.search(r"from position 256: ([\d.]+), 1K: ([\d.]+)\n", result.out).groups()
    for position, on_screen in zip((256, 1024), shown):
        bucket = evaluation["positions_dense"][int(math.log2(position))]
        assert math.isclose(float(lines[0][f"p{position}"]), bucket, abs_tol=1e-6)
        assert math.isclose(float(on_screen), bucket, abs_tol=6e-5)
    assert [c["distance"] for c in copying["copies"]] == [1024, 1792]
    for c in copying["copies"]:
        assert math.isclose(float(lines[1][f"copy{c['distance']}"]), c["text_loss"], abs_tol=1e-4)
        assert math.isclose(float(lines[1][f"rcopy{c['distance']}"]), c["random_loss"], abs_tol=1e-4)
    for kind, name in (("text", "the text"), ("random", "random ids")):
        figures = r"([\d.]+) \((\d+)% right\)"
        shown = re.search(rf"copies of {name}: 1K back {figures}, 1792 back {figures}", result.out).groups()
        logged = [x for c in copying["copies"] for x in (c[f"{kind}_loss"], 100 * c[f"{kind}_right"])]
        assert all(abs(float(a) - b) < e for a, b, e in zip(shown, logged, (6e-4, 0.51) * 2)), (kind, shown, logged)
    return copying["copies"], sequences


def induction_weights(V, T=T):
    """Layer 0 fetches the two tokens before, layer 1 what followed when the same two stood here. The blocks of the residual
    stream: token, position, token before, token before that."""
    n, C = 64, 256
    generator = np.random.RandomState(1)
    token, place, before, before2 = (slice(i * n, (i + 1) * n) for i in range(4))
    w = dict(wte=np.zeros((math.ceil(V / 128) * 128, C)), wpe=np.zeros((T, C)), ln1w=np.ones((2, C)), ln1b=np.zeros((2, C)),
             qkvw=np.zeros((2, 3, 2, 2 * n, C)), qkvb=np.zeros((2, 3 * C)), attprojw=np.zeros((2, C, 2, 2 * n)),
             attprojb=np.zeros((2, C)), ln2w=np.ones((2, C)), ln2b=np.zeros((2, C)), fcw=np.zeros((2, 4 * C, C)),
             fcb=np.zeros((2, 4 * C)), fcprojw=np.zeros((2, C, 4 * C)), fcprojb=np.zeros((2, C)), lnfw=np.ones(C), lnfb=np.zeros(C))
    w["wte"][:V, token] = generator.choice([-1, 1], (V, n))
    frequency = generator.uniform(0, math.pi, n // 2)
    angle = np.arange(T)[:, None] * frequency
    w["wpe"][:, place] = math.sqrt(2) * np.concatenate([np.cos(angle), np.sin(angle)], 1)
    one = np.eye(n)
    for head, block in ((0, before), (1, before2)):
        cosine, sine = np.diag(np.cos((head + 1) * frequency)), np.diag(np.sin((head + 1) * frequency))
        w["qkvw"][0, 0, head, :n, place] = 30 * np.block([[cosine, sine], [-sine, cosine]])  # turned back by head + 1 positions
        w["qkvw"][0, 1, head, :n, place] = one
        w["qkvw"][0, 2, head, :n, token] = one
        w["attprojw"][0, block, head, :n] = one / math.sqrt(2)  # LayerNorm made it so much larger
    for half, query, key in ((slice(0, n), token, before), (slice(n, 2 * n), before, before2)):
        w["qkvw"][1, 0, 0, half, query] = 10 * one
        w["qkvw"][1, 1, 0, half, key] = one
    w["qkvw"][1, 2, 0, :n, token] = one
    w["attprojw"][1, token, 0, :n] = 50 * one
    return dict(w, qkvw=w["qkvw"].reshape(2, 3 * C, C), attprojw=w["attprojw"].reshape(2, C, C))


def test_a_model_that_copies_scores_perfectly(lab):
    V = 2100
    generator = np.random.RandomState(2)
    tokens = np.concatenate([*(generator.permutation(V)[:T] for _ in range(3)), [0]])  # no two tokens stand together twice
    copies, _ = evaluate(lab, write_model(lab.folder / "m.bin", induction_weights(V), V, T, 2), tokens)
    for c in copies:
        assert c["text_loss"] < 1e-3 and c["text_right"] == 1, c
        assert c["random_loss"] < 0.1 and c["random_right"] > 0.99, c  # of random ids two may


def test_a_model_of_frequencies_scores_chance(lab):
    V = 50
    generator = np.random.RandomState(3)
    logits = np.sort(generator.randn(V))  # so that ids drawn from a part of all would be seen
    tokens = generator.choice(V, 3 * T + 1, p=np.exp(logits) / np.exp(logits).sum())
    w = {name: np.zeros_like(x) for name, x in induction_weights(V).items()}
    w["wte"][:V, 0], w["lnfb"][0] = logits, 1
    copies, sequences = evaluate(lab, write_model(lab.folder / "m.bin", w, V, T, 2), tokens)
    loss = np.log(np.exp(logits).sum()) - logits
    for c in copies:
        copied = np.concatenate([s[T - c["distance"] - N + 16:T - c["distance"]] for s in sequences])
        assert math.isclose(c["text_loss"], loss[copied].mean(), rel_tol=1e-5)
        assert math.isclose(c["text_right"], (copied == logits.argmax()).mean(), abs_tol=1e-4)
        ids = np.unique(np.concatenate(sequences))
        error = 4 / math.sqrt(len(copied))
        assert abs(c["random_loss"] - loss[ids].mean()) < error * loss[ids].std()
        assert abs(c["random_right"] - 1 / len(ids)) < error * math.sqrt(1 / len(ids))


@pytest.mark.parametrize("T,tokens,distances", [(64, 12, [48]), (512, 112, [384]), (4096, 240, [1024, 3840])])
def test_what_is_copied(lab, T, tokens, distances):
    """Short sequences have short copies, and no sequence counts twice."""
    val = write_shard(lab.folder / "val.bin", np.random.RandomState(4).randint(0, 50, 2 * T + 1))
    folder = lab.train("run", depth=1, channels=8, seq_len=T, train_data=val, val_data=val, val_batches=20, steps=1, attention="D")
    copying, = events(folder, "copying")
    assert (copying["tokens"], copying["sequences"]) == (tokens, 2)
    assert [c["distance"] for c in copying["copies"]] == distances
    assert all(0 < c[f"{kind}_loss"] < 9 for c in copying["copies"] for kind in ("text", "random"))


def test_copy_every(lab):
    """With --copy-every at every so many-th validation; always at the switch and at the end."""
    for every, steps in ((2, [0, 4, 5, 8, 10]), (0, [5, 10])):
        folder = lab.train(f"run{every}", steps=10, val_data=lab.data.val, val_every=2, copy_every=every, switch_step=5, depth=1)
        assert [c["step"] for c in events(folder, "copying")] == steps


# ---- samples

def plain_weights(V, C):
    """One layer that adds nothing to the tokens' embeddings, which are zeros here."""
    w = {name: np.zeros(shape) for name, shape in dict(wte=(math.ceil(V / 128) * 128, C), wpe=(64, C), ln1b=(1, C), qkvw=(1, 3 * C, C),
         qkvb=(1, 3 * C), attprojw=(1, C, C), attprojb=(1, C), ln2b=(1, C), fcw=(1, 4 * C, C), fcb=(1, 4 * C), fcprojw=(1, C, 4 * C),
         fcprojb=(1, C), lnfb=(C,)).items()}
    return dict(w, ln1w=np.ones((1, C)), ln2w=np.ones((1, C)), lnfw=np.ones(C))


def samples(lab, name, weights, seq_len=64, **options):
    model = write_model(lab.folder / "m.bin", weights, 257, len(weights["wpe"]), 2)
    options = dict(FROM_FILE, model=model, seq_len=seq_len, tokenizer=lab.data.tokenizer, sample_every=1, switch_step=0, **options)
    return [e["text"] for e in events(lab.train(name, **options), "sample")]


def test_a_model_that_echoes(lab):
    """The likeliest token is the one before: of a prompt its last letter, so many as are asked for; of none the end of text, which
    ends the sample."""
    w = plain_weights(257, 64)
    w["wte"][:257] = np.stack([np.random.RandomState(i).permutation([-1, 1] * 32) for i in range(257)])
    for number, (prompt, expected) in enumerate([("ab", "ab" + 11 * "b"), ("ba", "ba" + 11 * "a"), ("", "")]):
        assert samples(lab, f"run{number}", w, prompt=prompt, sample_tokens=11, sample_top_k=1, steps=0, val_data="") == [expected]


def test_draws_are_independent(lab):
    """Of a model of frequencies each token is drawn by them, apart from those before it, from the step and from other seeds."""
    V, letters = 257, np.arange(97, 103)
    w = plain_weights(V, 8)
    w["wpe"], w["lnfw"] = np.zeros((1024, 8)), np.zeros(8)  # of the state nothing but lnfb is left
    w["wte"][:V, 0], w["wte"][letters, 0], w["lnfb"][0] = -30, np.log([0.3, 0.25, 0.2, 0.12, 0.08, 0.05]), 1
    options = dict(seq_len=448, steps=0, val_data="", sample_tokens=400)
    for number, (k, temperature) in enumerate([(0, 1), (3, 1), (0, 2)]):
        text, = samples(lab, f"run{number}", w, sample_top_k=k, temperature=temperature, **options)
        p = np.exp(w["wte"][letters, 0] / temperature)
        p[k if k else len(p):] = 0
        p /= p.sum()
        count = np.array([text.count(chr(x)) for x in letters])
        assert len(text) == count.sum() == 400
        assert (np.abs(count - 400 * p) <= 4 * np.sqrt(400 * p * (1 - p))).all(), count
        same = sum(a == b for a, b in zip(text, text[1:]))
        q = (p ** 2).sum()
        assert abs(same - 399 * q) < 5 * math.sqrt(399 * q * (1 - q)), "neighbours are drawn apart"
    texts = [samples(lab, f"seed{seed}", w, seed=seed, **dict(options, seq_len=64, sample_tokens=40)) for seed in (5, 6)]
    texts.append(samples(lab, "steps", w, seq_len=64, sample_tokens=40, seed=5, steps=3, learning_rate=0, val_data=""))
    assert len({x for text in texts for x in text}) == 5, texts
