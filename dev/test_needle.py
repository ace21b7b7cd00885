"""Proves scripts/needle: a model that copies, written by hand, finds every needle, one of frequencies none, by bytes and by
GPT-2's tokens; its forward pass is the oracle's; and the prompts are what they should be.

    python -m pytest dev/test_needle.py
"""
import json
import random
import sys

import numpy as np
import pytest
import torch

import oracle
from test_evaluation import induction_weights, write_model
from test_trainer import ROOT, write_shard

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "data"))
import model_file  # noqa: E402
import prepare  # noqa: E402
import scaling_model  # noqa: E402

needle = scaling_model.script("needle")
torch.set_num_threads(1)
BYTES = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]


def tokenizer_file(path, pieces):
    head = np.zeros(256, "<i4")
    head[:4] = [model_file.TOKENIZER_MAGIC, 2, len(pieces), len(pieces) - 1]
    path.write_bytes(head.tobytes() + b"".join(bytes([len(p)]) + p for p in pieces))
    return path


def lab_of(folder, pieces, weights, T):
    hay = np.random.RandomState(1).randint(128, 250, 3000)  # ids that are in no needle
    return ["--hay", str(write_shard(folder / "val_0.bin", hay)), "--tokenizer", str(tokenizer_file(folder / "t.bin", pieces)),
            str(write_model(folder / "m.bin", weights, len(pieces), T, 2))]


def found(folder, *args):
    needle.main([*map(str, args), "--json", str(folder / "out.json")])
    return json.loads((folder / "out.json").read_text())


def refused(*args):
    with pytest.raises(SystemExit) as e:
        needle.main([str(a) for a in args])
    return str(e.value.code)


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_a_model_that_copies_finds_all(tmp_path, capsys, kind):
    if kind == "bytes":
        pieces, T = BYTES, 512
    else:
        gpt2 = prepare.Gpt2Tokenizer(prepare.gpt2_ranks(str(ROOT / "data" / ".cache")))
        pieces, T = gpt2.token_bytes(), 300
    weights = induction_weights(len(pieces), T)
    options = [*lab_of(tmp_path, pieces, weights, T), "--lengths", 150, T, "--trials", 2]
    out = found(tmp_path, *options)
    assert out["mean"] == 1 and [x["found"] for x in out["lengths"]] == [[1.0] * 5] * 2
    assert [x["digits"] for x in out["lengths"]] == [[1.0] * 5] * 2
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["tokens", "0%", "25%", "50%", "75%", "100%", "mean", "single", "digits"]
    assert shown[2].split() == [str(T), *["1.00"] * 7] and shown[3] == "found in all: 1.000"
    if kind == "bytes":  # and without its attention none
        lost = dict(weights, attprojw=weights["attprojw"] * 0)
        lab_of(tmp_path, pieces, lost, T)
        out = found(tmp_path, *options)
        assert out["mean"] == 0 and max(max(x["digits"]) for x in out["lengths"]) < 0.5


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_model_is_the_oracles(tmp_path, positions):
    c = oracle.Config(3, 32, 2, 150, 64, positions)
    generator = torch.Generator().manual_seed(1)
    weights, ids = oracle.random_weights(c, generator), torch.randint(0, c.vocab, (50,), generator=generator)
    path = write_model(tmp_path / "m.bin", {k: x.numpy() for k, x in weights.items()}, c.vocab, c.seq_len, c.heads, positions)
    logits = oracle.forward_logits({k: x.double() for k, x in weights.items()}, ids[None], c, False)[0]
    assert needle.Model(path, "cpu").likeliest(ids.tolist(), 20) == logits.argmax(-1)[-20:].tolist()


@pytest.mark.parametrize("depth,at", [(0, 0), (50, 70), (100, 141)])
def test_prompts(depth, at):
    """As long as asked, the needle at its depth, the question at the end; the digits differ, and their places are right."""
    hay = [np.arange(128, 250).repeat(3), np.zeros(10)]
    ids, places = needle.prompt(lambda text: list(text.encode()), hay, 203, depth, 5, random.Random(1))
    text = bytes(ids).decode("latin1")
    digits = [text[p] for p in places]
    assert len(ids) == 203 and len(set(digits)) == 5 and "".join(digits).isdigit()
    answer = needle.MARKER + "".join(" " + d for d in digits)
    assert text.endswith(answer) and text.index(answer + ".\n") == at
    with pytest.raises(model_file.FileError, match="the needle and the question alone are 62"):
        needle.prompt(lambda text: list(text.encode()), hay, 62, depth, 5, random.Random(1))
    with pytest.raises(model_file.FileError, match="no shard of the hay has 938 tokens"):
        needle.prompt(lambda text: list(text.encode()), hay, 1000, depth, 5, random.Random(1))


def test_refusals(tmp_path, capsys):
    options = lab_of(tmp_path, BYTES, induction_weights(257, 256), 256)
    assert "was trained at 256 tokens: give --lengths up to that" in refused(*options)
    assert "was trained at 256 tokens" in refused(*options, "--lengths", 257)
    assert "--hay none*: no such file" in refused(*options, "--lengths", 256, "--hay", "none*")
    assert "a token shard begins with" in refused(*options, "--lengths", 256, "--hay", tmp_path / "m.bin")
    assert "name it with --tokenizer" in refused(options[-1], "--hay", tmp_path / "val_0.bin", "--lengths", 256)
    for more, words in ((["--digits", 11], "--digits is 11"), (["--depths", 101], "0 to 100"), (["--trials", 0], "at least 1")):
        assert refused(*options, *more) == "2" and words in capsys.readouterr().err
