"""Proves the scripts: files in and out are exact, exported models compute what ours do, compare's figures are right.

    python3 -m pytest dev/test_scripts.py

The Hugging Face tests run the models in transformers (with torch) and are skipped without it.
"""
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = os.path.join(ROOT, "scripts")
sys.path.insert(0, SCRIPTS)
sys.dont_write_bytecode = True

import model_file  # noqa: E402
import test_trainer  # noqa: E402
import tokenizer_files  # noqa: E402


def load(name):
    loader = importlib.machinery.SourceFileLoader(name, os.path.join(SCRIPTS, name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


export_hf, import_hf, export_llmc, export_gguf, compare = map(load, ("export_hf", "import_hf", "export_llmc",
                                                                     "export_gguf", "compare"))


def run(script, *args):
    try:
        script.main([str(a) for a in args])
    except SystemExit as e:
        pytest.fail(f"refused: {e.code}")


def refused(script, *args):
    with pytest.raises(SystemExit) as e:
        script.main([str(a) for a in args])
    assert isinstance(e.value.code, str), e.value.code
    return e.value.code


# ---- models to test with ------------------------------------------------------------------------------------------

def config_of(positions="learned", dtype="float32", **changes):
    values = dict(positions=positions, max_seq_len=24, vocab_size=131, padded_vocab_size=256, num_layers=2, num_heads=4,
                  channels=32, dtype=dtype, rope_theta=5000.0 if positions == "rope" else 0.0, step=7)
    return model_file.ModelConfig(**dict(values, **changes))


def random_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in model_file.tensor_shapes(config):
        x = rng.normal(0, 0.25, shape).astype("<f4")
        if name.startswith("ln") and name.endswith("w"):
            x += 1
        if name == "wte":
            x[config.vocab_size:] = 0
        out[name] = model_file.to_dtype(x, config.dtype)
    return out


def model(path, seed=0, **kind):
    config = config_of(**kind)
    tensors = random_tensors(config, seed)
    model_file.write_model(path, config, tensors.items())
    return config, tensors


def same(a, b):
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def forward(config, tensors, tokens):
    """Logits (T, V) in double, written from the definition of the model, with nothing from the scripts."""
    t = {name: (x if x.dtype != np.uint16 else (x.astype("<u4") << 16).view("<f4")).astype(np.float64)
         for name, x in tensors.items()}
    T, C, H = len(tokens), config.channels, config.num_heads
    D = C // H

    def layernorm(x, w, b):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w + b

    def rotate(x):  # (T, H, D): dimension d with d + D/2
        angle = np.arange(T)[:, None] * config.rope_theta ** (-2.0 * np.arange(D // 2) / D)
        z = (x[..., :D // 2] + 1j * x[..., D // 2:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = t["wte"][tokens] + (t["wpe"][:T] if config.positions == "learned" else 0)
    for i in range(config.num_layers):
        h = layernorm(x, t["ln1w"][i], t["ln1b"][i]) @ t["qkvw"][i].T + t["qkvb"][i]
        q, k, v = h.reshape(T, 3, H, D).swapaxes(0, 1)
        if config.positions == "rope":
            q, k = rotate(q), rotate(k)
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(D)
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(T, C)
        x = x + y @ t["attprojw"][i].T + t["attprojb"][i]
        h = layernorm(x, t["ln2w"][i], t["ln2b"][i]) @ t["fcw"][i].T + t["fcb"][i]
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        x = x + h @ t["fcprojw"][i].T + t["fcprojb"][i]
    return layernorm(x, t["lnfw"], t["lnfb"]) @ t["wte"][:config.vocab_size].T


def fnv(data):
    h = 14695981039346656037
    for word, in struct.iter_unpack("<Q", data):
        h = (h ^ word) * 1099511628211 % 2 ** 64
    return h ^ (h >> 32)


def sum_of_words(data):
    """mix64 of every word and its place, written from the trainer's."""
    total = 0
    for place, (word,) in enumerate(struct.iter_unpack("<I", data)):
        x = (word | place << 32) + 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2 ** 64
        total += x ^ (x >> 31)
    return total % 2 ** 64


def checkpoint(path, config, tensors, offset=8192, **changes):
    """As the trainer's: header, the run's state, checksums, fp32 weights, the optimizer's state."""
    weights = b"".join(x.tobytes() for x in tensors.values())
    body, chunk = weights + b"\xbb" * 1000, model_file.CHUNK_BYTES
    sums = [sum_of_words(body[at:at + chunk]) for at in range(0, len(body), chunk)]
    front = b"\xaa" * 24 + struct.pack(f"<{len(sums)}Q", *sums)
    head = bytearray(4096)
    struct.pack_into("<2i", head, 0, changes.get("magic", 20260511), changes.get("version", model_file.CHECKPOINT_VERSION))
    head[1024:2048] = changes.get("model", model_file.pack_header(config))
    struct.pack_into("<5qQ", head, 2048, changes.get("at", offset), changes.get("count", len(weights) // 4),
                     changes.get("file_bytes", offset + len(body)), 24, len(sums), fnv(front))
    struct.pack_into("<Q", head, 4088, fnv(head[:4088]))
    raw = (bytes(head) + front).ljust(offset, b"\0") + body
    path.write_bytes(raw[:changes.get("size", len(raw))])
    return len(weights)


# ---- bf16 ---------------------------------------------------------------------------------------------------------

def test_bfloat16_rounds_to_nearest_even():
    cases = [(0x3F800000, 0x3F80), (0x3F808000, 0x3F80), (0x3F808001, 0x3F81), (0x3F818000, 0x3F82),
             (0x3F807FFF, 0x3F80), (0xBF818000, 0xBF82), (0x80000000, 0x8000), (0x00008000, 0x0000),
             (0x00018000, 0x0002), (0x7F7FFFFF, 0x7F80), (0x7F800000, 0x7F80), (0xFF800000, 0xFF80),
             (0x7FC00000, 0x7FC0), (0x7F800001, 0x7FC0), (0xFFFFFFFF, 0xFFFF)]
    bits = np.array([c[0] for c in cases], "<u4")
    assert [hex(x) for x in model_file.to_bfloat16(bits.view("<f4"))] == [hex(c[1]) for c in cases]
    every = np.arange(1 << 16, dtype="<u2")  # every bf16 number survives the way out and back, signalling NaNs aside
    back = model_file.to_bfloat16(model_file.to_float32(every).copy())
    number = (every & 0x7FFF) <= 0x7F80
    assert (back == every)[number].all() and ((back & 0x7FFF) > 0x7F80)[~number].all()


def test_bfloat16_error_is_half_a_unit():
    x = np.random.default_rng(1).normal(0, 1, 100_000).astype("<f4") * np.float32(2) ** np.arange(-50, 50).repeat(1000)
    y = model_file.to_float32(model_file.to_bfloat16(x))
    assert (np.abs(y.astype(float) - x) <= 2.0 ** (np.floor(np.log2(np.abs(x.astype(float)))) - 8)).all()


# ---- model files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions,dtype,version", [("learned", "float32", 3), ("learned", "bfloat16", 5),
                                                     ("rope", "float32", 103), ("rope", "bfloat16", 105)])
def test_model_file_round_trip(tmp_path, positions, dtype, version):
    config, tensors = model(tmp_path / "a.bin", positions=positions, dtype=dtype)
    raw = (tmp_path / "a.bin").read_bytes()
    theta = struct.unpack("<i", struct.pack("<f", 5000.0))[0] if positions == "rope" else 0
    assert struct.unpack("<256i", raw[:1024]) == (20240326, version, 24, 131, 2, 4, 32, 256, theta, 7) + (0,) * 246
    assert raw[1024:] == b"".join(x.tobytes() for x in tensors.values())
    assert list(tensors)[:3] == (["wte", "wpe", "ln1w"] if positions == "learned" else ["wte", "ln1w", "ln1b"])
    assert tensors["fcw"].shape == (2, 128, 32) and tensors["fcprojw"].shape == (2, 32, 128)
    back, read = model_file.read_model(tmp_path / "a.bin")
    assert back == config and same(read, tensors)
    assert os.listdir(tmp_path) == ["a.bin"]


def word(index, value):
    def change(raw):
        return raw[:4 * index] + struct.pack("<i", value) + raw[4 * index + 4:]
    return change


@pytest.mark.parametrize("positions,change,message", [
    ("learned", word(0, 1), "the first word is 1, a model file begins with 20240326"),
    ("learned", word(0, 20240520), r"20240520 \(a token shard\)"),
    ("learned", word(1, 4), "the version is 4, wanted 3 or 5"),
    ("learned", word(2, 0), "the sequence length is 0, wanted at least 1"),
    ("learned", word(3, -2), "the vocabulary is -2, wanted at least 1"),
    ("learned", word(4, 0), "number of layers is 0"),
    ("learned", word(5, 0), "number of heads is 0"),
    ("learned", word(6, 0), "number of channels is 0"),
    ("learned", word(5, 5), "32 channels are not divisible by 5 heads"),
    ("learned", word(7, 130), "padded vocabulary is 130, wanted at least the vocabulary, 131"),
    ("rope", word(8, 0), "the RoPE theta is 0.0, wanted a positive number"),
    ("rope", word(5, 32), "the head size is 1, RoPE wants an even one"),
    ("learned", word(4, 3), r"the size is \d+ bytes, wanted \d+ .*cut off"),
    ("learned", word(1, 103), "theta is 0.0"),
    ("learned", word(1, 5), r"the size is \d+ bytes, wanted \d+ .*too long"),
    ("learned", lambda raw: raw[:-1], "cut off"),
    ("rope", lambda raw: raw + b"\0", "too long"),
    ("learned", lambda raw: raw[:1000], "the size is 1000 bytes, wanted at least a header of 1024"),
    ("learned", lambda raw: b"", "the size is 0 bytes"),
])
def test_model_file_refusals(tmp_path, positions, change, message):
    path = tmp_path / "bad.bin"
    model(path, positions=positions)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(model_file.FileError, match=message) as e:
        model_file.read_model(path)
    assert str(path) in str(e.value)


def test_model_file_that_is_none(tmp_path):
    for path, message in ((tmp_path / "none.bin", "No such file"), (tmp_path, "this is a folder")):
        with pytest.raises(model_file.FileError, match=message):
            model_file.read_model(path)


def test_write_model_refuses_wrong_tensors_and_leaves_nothing(tmp_path):
    config = config_of()
    tensors = list(random_tensors(config).items())
    for wrong in (tensors[:-1], tensors[1:], [("wte", tensors[0][1][:5])] + tensors[1:]):
        with pytest.raises(model_file.FileError, match="comes where tensor"):
            model_file.write_model(tmp_path / "a.bin", config, wrong)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_checkpoint_weights(tmp_path, positions):
    config = config_of(positions)
    tensors = random_tensors(config)
    checkpoint(tmp_path / "ckpt_00000007.bin", config, tensors)
    back, read = model_file.read_model(tmp_path / "ckpt_00000007.bin")
    assert back == config and same(read, tensors)


@pytest.mark.parametrize("changes,message", [
    (dict(version=1), "the checkpoint's version is 1, wanted 3"),
    (dict(count=5), "the checkpoint has 5 weights, wanted "),
    (dict(at=100), "the weights begin at byte 100, wanted at least 4096"),
    (dict(size=3000), "the size is 3000 bytes, a checkpoint has a header of 4096"),
    (dict(size=20000), r"c\.bin: 20000 bytes, but one of its header's sizes has \d+: it is cut, or of another program$"),
    (dict(size=20000, file_bytes=20000), "the size is 20000 bytes, wanted at least .*cut off"),
    (dict(model=bytes(1024)), r"\(model header inside the checkpoint\): the first word is 0"),
    (dict(model=model_file.pack_header(config_of(dtype="bfloat16"))), "has version 5, wanted 3 or 103"),
])
def test_checkpoint_refusals(tmp_path, changes, message):
    config = config_of()
    checkpoint(tmp_path / "c.bin", config, random_tensors(config), **changes)
    with pytest.raises(model_file.FileError, match=message) as e:
        model_file.read_model(tmp_path / "c.bin")
    assert "c.bin" in str(e.value)


@pytest.mark.parametrize("where,message", [
    (100, "wrong checksum of the header"), (1060, "wrong checksum of the header"),
    (4100, "wrong checksum of the run's state"), (4125, "wrong checksum of the run's state"),
    (8192, "wrong checksum of bytes 8192 to 58192"), (58192, "wrong checksum of bytes 58192 to 108192"),
    ("last weight", r"wrong checksum of bytes \d+ to \d+"), ("behind them", r"wrong checksum of bytes \d+ to \d+")])
def test_damaged_checkpoint(tmp_path, monkeypatch, where, message):
    """One bit is enough, wherever it is; the optimizer's state is looked at only where it shares a chunk."""
    monkeypatch.setattr(model_file, "CHUNK_BYTES", 50000)
    config, path = config_of(), tmp_path / "c.bin"
    end = 8192 + checkpoint(path, config, random_tensors(config))
    model_file.read_model(path)
    raw = bytearray(path.read_bytes())
    raw[{"last weight": end - 1, "behind them": end}.get(where, where)] ^= 16
    path.write_bytes(raw)
    with pytest.raises(model_file.FileError, match=r"c\.bin is damaged: " + message + "$"):
        model_file.read_model(path)


def test_checksum_of_a_model_file(tmp_path, monkeypatch):
    """The trainer's model.bin has a checksum of its weights' sums in what are zeros elsewhere; one bit is noticed."""
    monkeypatch.setattr(model_file, "CHUNK_BYTES", 50000)
    config, path = config_of(), tmp_path / "model.bin"
    model_file.write_model(path, config, random_tensors(config).items())
    raw = bytearray(path.read_bytes())
    sums = [sum_of_words(raw[at:min(at + 50000, len(raw))]) for at in range(1024, len(raw), 50000)]
    raw[40:48] = struct.pack("<Q", fnv(struct.pack(f"<{len(sums)}Q", *sums)) | 1)
    path.write_bytes(raw)
    model_file.read_model(path)
    raw[-3] ^= 16
    path.write_bytes(raw)
    with pytest.raises(model_file.FileError, match="model.bin is damaged: wrong checksum of the weights"):
        model_file.read_model(path)


def test_sums_of_large_chunks():
    words = np.random.default_rng(4).integers(0, 2 ** 32, 100_001, dtype="<u4")
    assert model_file.chunk_sum(words) == sum_of_words(words.tobytes())


# ---- export to llm.c ----------------------------------------------------------------------------------------------

def test_export_llmc(tmp_path):
    config, tensors = model(tmp_path / "model.bin")
    checkpoint(tmp_path / "ckpt.bin", config, tensors)
    for source in ("model.bin", "ckpt.bin"):
        run(export_llmc, tmp_path / source, tmp_path / "fp32.bin")
        run(export_llmc, tmp_path / source, tmp_path / "bf16.bin", "--dtype", "bf16")
        assert (tmp_path / "fp32.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
        back, read = model_file.read_model(tmp_path / "bf16.bin")
        assert back.version() == 5 and back.vocab_size == 131
        assert same(read, {n: model_file.to_bfloat16(x) for n, x in tensors.items()})
    run(export_llmc, tmp_path / "bf16.bin", tmp_path / "wide.bin")
    back, read = model_file.read_model(tmp_path / "wide.bin")
    assert back.version() == 3 and same(read, {n: model_file.to_float32(model_file.to_bfloat16(x))
                                               for n, x in tensors.items()})


def test_export_llmc_refuses_rope(tmp_path):
    model(tmp_path / "model.bin", positions="rope")
    message = refused(export_llmc, tmp_path / "model.bin", tmp_path / "out.bin")
    assert "RoPE" in message and "scripts/export_hf" in message and not (tmp_path / "out.bin").exists()


# ---- Hugging Face -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hf():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return transformers


def hf_logits(m, tokens):
    import torch
    with torch.no_grad():
        return m.eval()(torch.tensor([list(tokens)])).logits[0].float().numpy()


def tokens_for(config, count=20):
    return np.random.default_rng(3).integers(0, config.vocab_size, count)


def load_exactly(hf, folder, **options):
    m, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return m


KINDS = [dict(positions="learned"), dict(positions="rope"), dict(positions="rope", num_heads=2, vocab_size=256),
         dict(positions="learned", num_heads=8, vocab_size=200, num_layers=3)]


@pytest.mark.parametrize("kind", KINDS)
def test_exported_folder_computes_the_same(tmp_path, hf, kind):
    config, tensors = model(tmp_path / "model.bin", **kind)
    checkpoint(tmp_path / "ckpt.bin", config, tensors)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf")
    m = load_exactly(hf, tmp_path / "hf")
    assert type(m).__name__ == {"learned": "GPT2LMHeadModel", "rope": "Starcoder2ForCausalLM"}[config.positions]
    tokens = tokens_for(config)
    wanted = forward(config, tensors, tokens)
    assert wanted.std() > 0.5  # the comparison says something
    got = hf_logits(m, tokens)
    assert got.shape == (20, config.vocab_size) and np.abs(got - wanted).max() < 1e-4
    run(export_hf, tmp_path / "ckpt.bin", tmp_path / "hf_from_checkpoint")
    for name in os.listdir(tmp_path / "hf"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "hf_from_checkpoint" / name).read_bytes(), name


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_exported_bfloat16(tmp_path, hf, positions):
    import torch
    config, tensors = model(tmp_path / "model.bin", positions=positions)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf", "--dtype", "bfloat16")
    assert load_exactly(hf, tmp_path / "hf", torch_dtype="auto").dtype == torch.bfloat16
    m = load_exactly(hf, tmp_path / "hf", torch_dtype=torch.float32)
    rounded = {n: model_file.to_bfloat16(x) for n, x in tensors.items()}
    tokens = tokens_for(config)
    assert np.abs(hf_logits(m, tokens) - forward(config, rounded, tokens)).max() < 1e-4


def test_exported_safetensors_are_the_librarys(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    config, tensors = model(tmp_path / "model.bin")
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf")
    theirs = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    ours = model_file.read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert set(theirs) == set(ours) and len(ours) == 2 + 12 * 2 + 2
    assert all(np.array_equal(theirs[n], ours[n]) for n in ours)
    assert np.array_equal(theirs["transformer.h.1.mlp.c_fc.weight"], tensors["fcw"][1].T)
    assert theirs["transformer.wte.weight"].shape == (131, 32)


def hf_model(hf, kind, **changes):
    import torch
    torch.manual_seed(5)
    if kind == "learned":
        settings = dict(vocab_size=131, n_positions=24, n_embd=32, n_layer=2, n_head=4)
        m = hf.GPT2LMHeadModel(hf.GPT2Config(**dict(settings, **changes)))
    else:
        settings = dict(vocab_size=131, max_position_embeddings=24, hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=128, hidden_act="gelu_pytorch_tanh",
                        tie_word_embeddings=True, bos_token_id=3, eos_token_id=3)
        name, own, theta = (("Starcoder2", dict(num_key_value_heads=4), "rope_theta") if kind == "rope" else
                            ("GPTNeoX", dict(use_parallel_residual=False, rotary_pct=1.0), "rotary_emb_base"))
        if int(hf.__version__.split(".")[0]) < 5:
            own[theta] = 2000
        else:
            own["rope_parameters"] = {"rope_type": "default", "rope_theta": 2000, "partial_rotary_factor": 1.0}
        m = getattr(hf, name + "ForCausalLM")(getattr(hf, name + "Config")(**{**settings, **own, **changes}))
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return m


def bits(path):
    """{name: bytes} of the folder's tensors; the names of both layouts."""
    return {n: (x.dtype, x.tobytes()) for n, x in import_hf.read_weights(str(path)).items()}


@pytest.mark.parametrize("kind", ["learned", "rope", "neox"])
@pytest.mark.parametrize("shards", [False, True])
def test_imported_model_computes_the_same(tmp_path, hf, kind, shards):
    m = hf_model(hf, kind)
    m.save_pretrained(tmp_path / "hf", **(dict(max_shard_size="30KB") if shards else {}))
    assert os.path.exists(tmp_path / "hf" / "model.safetensors.index.json") == shards
    run(import_hf, tmp_path / "hf", tmp_path / "model.bin")
    config, tensors = model_file.read_model(tmp_path / "model.bin")
    assert config == config_of("learned" if kind == "learned" else "rope", rope_theta=0 if kind == "learned" else 2000,
                               step=0, eot=None if kind == "learned" else 3)  # GPT-2's, 50256, is no id of 131
    assert not tensors["wte"][131:].any()
    tokens = tokens_for(config)
    wanted = hf_logits(m, tokens)
    assert wanted.std() > 0.5 and np.abs(forward(config, tensors, tokens) - wanted).max() < 1e-4
    run(export_hf, tmp_path / "model.bin", tmp_path / "again")
    if kind == "neox":  # it leaves as a Starcoder2
        assert np.abs(hf_logits(load_exactly(hf, tmp_path / "again"), tokens) - wanted).max() < 1e-4
    else:
        assert bits(tmp_path / "hf") == bits(tmp_path / "again")
    run(import_hf, tmp_path / "again", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


@pytest.mark.parametrize("vocab,padded", [(255, 256), (256, 256), (257, 384)])
def test_an_imported_vocabulary_is_padded_to_a_multiple_of_128(tmp_path, vocab, padded):
    model(tmp_path / "model.bin", vocab_size=vocab, padded_vocab_size=512)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf")
    run(import_hf, tmp_path / "hf", tmp_path / "again.bin")
    config, tensors = model_file.read_model(tmp_path / "again.bin")
    assert (config.vocab_size, config.padded_vocab_size) == (vocab, padded) and not tensors["wte"][vocab:].any()


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_half_precision_round_trip(tmp_path, hf, positions):
    import torch
    for dtype, exact in (("bfloat16", True), ("float16", False), ("float64", False)):
        folder = tmp_path / dtype
        hf_model(hf, positions).to(getattr(torch, dtype)).save_pretrained(folder)
        run(import_hf, folder, tmp_path / "model.bin")
        run(export_hf, tmp_path / "model.bin", tmp_path / "again", "--dtype", "bfloat16" if exact else "float32")
        if exact:
            assert bits(folder) == bits(tmp_path / "again")
        else:
            a, b = import_hf.read_weights(str(folder)), import_hf.read_weights(str(tmp_path / "again"))
            assert all(np.array_equal(a[n].astype("<f4"), b[n]) and a[n].dtype == dtype for n in a)


# The folders below are made without transformers: a config and our own safetensors, checked against theirs above.

def as_neox(folder):
    """Turns an exported folder into the GPTNeoXForCausalLM that earlier versions wrote."""
    found = model_file.read_safetensors(folder / "model.safetensors")
    theirs = {}
    for name, hf_names in import_hf.hf_layout.NAMES["GPTNeoXForCausalLM"].items():
        for layer in range(2 if import_hf.hf_layout.per_layer(name) else 1):
            parts = [found[n.format(layer)] for n in import_hf.hf_layout.names("Starcoder2ForCausalLM", name)]
            x = np.concatenate([p.reshape(4, 1, 8, *p.shape[1:]) for p in parts], 1) if len(parts) > 1 else parts[0]
            theirs[hf_names.format(layer)] = x.reshape(-1, *x.shape[3:]) if len(parts) > 1 else x
    model_file.write_safetensors(folder / "model.safetensors", [(n, x.shape, x) for n, x in theirs.items()], "float32")
    c = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "hidden_act", "tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps({
        **{k: c[k] for k in kept}, "architectures": ["GPTNeoXForCausalLM"], "layer_norm_eps": 1e-5, "rotary_pct": 1.0,
        "use_parallel_residual": False, "attention_bias": True, "rotary_emb_base": c["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": c["rope_theta"], "partial_rotary_factor": 1.0}}))


def folder_of(tmp_path, kind="learned", config_changes=(), drop=(), tensors=None, names=lambda n: n):
    config = config_of("learned" if kind == "learned" else "rope")
    model_file.write_model(tmp_path / "source.bin", config, random_tensors(config).items())
    folder = tmp_path / "folder"
    run(export_hf, tmp_path / "source.bin", folder)
    if kind == "neox":
        as_neox(folder)
    found = {names(n): np.array(x) for n, x in model_file.read_safetensors(folder / "model.safetensors").items()}
    found.update(tensors(found) if tensors else {})
    found = {n: x for n, x in found.items() if x is not None}
    model_file.write_safetensors(folder / "model.safetensors", [(n, x.shape, x) for n, x in found.items()], "float32")
    settings = json.loads((folder / "config.json").read_text())
    settings.update(config_changes)
    for key in drop:
        del settings[key]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind,changes,drop,message", [
    ("learned", dict(architectures=["LlamaForCausalLM"]), (), r'\["LlamaForCausalLM"\], wanted one of GPT2LMHeadModel'),
    ("learned", {}, ("architectures",), "architectures is null"),
    ("learned", dict(activation_function="gelu"), (), 'activation_function is "gelu", wanted .*GELU by tanh'),
    ("learned", dict(layer_norm_epsilon=1e-6), (), "layer_norm_epsilon is 1e-06, wanted 1e-05"),
    ("learned", dict(n_inner=100), (), "n_inner is 100, wanted null or 128"),
    ("learned", dict(scale_attn_weights=False), (), "scale_attn_weights is false"),
    ("learned", dict(scale_attn_by_inverse_layer_idx=True), (), "scale_attn_by_inverse_layer_idx is true"),
    ("learned", dict(add_cross_attention=True), (), "add_cross_attention is true"),
    ("learned", dict(tie_word_embeddings=False), (), "tie_word_embeddings is false, wanted true"),
    ("learned", dict(pruned_heads={"0": [1]}), (), "pruned_heads is"),
    ("learned", dict(n_head=5), (), "n_embd 32 is not divisible by n_head 5"),
    ("learned", dict(n_layer="2"), (), 'n_layer is "2", wanted a positive integer'),
    ("learned", {}, ("vocab_size",), "vocab_size is null, wanted a positive integer"),
    ("learned", dict(quantization_config={"bits": 4}), (), "quantized"),
    ("neox", dict(use_parallel_residual=True), (), "use_parallel_residual is true, wanted false"),
    ("neox", {}, ("use_parallel_residual",), "use_parallel_residual is true"),
    ("neox", {}, ("tie_word_embeddings",), "tie_word_embeddings is false"),
    ("neox", {}, ("hidden_act",), 'hidden_act is "gelu"'),
    ("neox", dict(hidden_act="relu"), (), 'hidden_act is "relu"'),
    ("neox", dict(layer_norm_eps=1e-12), (), "layer_norm_eps is 1e-12"),
    ("neox", dict(intermediate_size=64), (), "intermediate_size is 64, wanted 128"),
    ("neox", dict(attention_bias=False), (), "attention_bias is false"),
    ("neox", dict(rotary_pct=0.25), ("rope_parameters",), "rotary_pct is 0.25, wanted 1.0"),
    ("neox", {}, ("rope_parameters", "rotary_pct"), "absent, which means 0.25"),
    ("neox", dict(rotary_pct=0.5), (), "rotary_pct is 1.0, 0.5, wanted 1.0"),
    ("neox", dict(rope_scaling={"type": "linear", "factor": 2.0}), ("rope_parameters",), r'scaled \("linear"\)'),
    ("neox", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), (), r'scaled \("yarn"\)'),
    ("neox", dict(rotary_emb_base=123.0), (), "rope_theta 5000.0, rotary_emb_base says 123.0"),
    ("neox", dict(rotary_emb_base=-1), ("rope_parameters",), "theta is -1, wanted a positive number"),
    ("neox", dict(num_attention_heads=32), (), "the head size is 1, rotary positions want an even one"),
    ("neox", dict(vocab_size=132), (), r"embed_in.weight is \(131, 32\), wanted \(132, 32\)"),
    ("neox", dict(num_hidden_layers=3), (), "no tensor gpt_neox.layers.2.input_layernorm.weight"),
    ("neox", dict(num_hidden_layers=1), (), "no place for tensor gpt_neox.layers.1.* and 11 more"),
    ("learned", dict(n_layer=True), (), 'n_layer is true, wanted a positive integer'),
    ("rope", dict(num_key_value_heads=2), (), "num_key_value_heads is 2, wanted 4: .*every head"),
    ("rope", {}, ("num_key_value_heads",), "num_key_value_heads is 2, wanted 4"),
    ("rope", dict(sliding_window=4096), (), "sliding_window is 4096, wanted null: .*sees all"),
    ("rope", dict(use_bias=False), (), "use_bias is false"),
    ("rope", dict(head_dim=16), (), "head_dim is 16, wanted null or 8"),
    ("rope", dict(norm_epsilon=1e-6), (), "norm_epsilon is 1e-06"),
    ("rope", dict(hidden_act="silu"), (), 'hidden_act is "silu"'),
    ("rope", dict(mlp_type="gated"), (), 'mlp_type is "gated"'),
    ("rope", dict(norm_type="rms_norm"), (), 'norm_type is "rms_norm"'),
    ("rope", {}, ("intermediate_size",), "intermediate_size is 12288, wanted 128"),
    ("rope", dict(tie_word_embeddings=False), (), "tie_word_embeddings is false"),
    ("rope", dict(rope_theta=7.0), (), "rope_theta 5000.0, rope_theta says 7.0"),
    ("rope", dict(rope_theta="x"), ("rope_parameters",), 'rotary theta is "x"'),
    ("rope", dict(partial_rotary_factor=0.5), (), "partial_rotary_factor is 0.5, wanted 1.0"),
    ("rope", dict(rope_scaling={"rope_type": "llama3"}), ("rope_parameters",), r'scaled \("llama3"\)'),
    ("rope", dict(rope_parameters="yarn"), (), 'the rotary positions are "yarn", wanted an object'),
    ("rope", dict(num_hidden_layers=3), (), "no tensor model.layers.2.input_layernorm.weight"),
])
def test_import_refuses_other_models(tmp_path, kind, changes, drop, message):
    folder = folder_of(tmp_path, kind, changes, drop)
    text = refused(import_hf, folder, tmp_path / "out.bin")
    assert re.search(message, text) and str(folder) in text
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("kind,old_key,other", [("rope", "rope_theta", ()),
                                                ("neox", "rotary_emb_base", ("rotary_pct",))])
@pytest.mark.parametrize("theta", [10000, 123456.0])
def test_import_reads_both_spellings_of_theta(tmp_path, kind, old_key, other, theta):
    new = dict(rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0})
    for changes, drop in ((new, (old_key, *other)), ({old_key: theta}, ("rope_parameters",))):
        run(import_hf, folder_of(tmp_path, kind, changes, drop), tmp_path / "out.bin")
        assert model_file.read_model(tmp_path / "out.bin")[0].rope_theta == theta
    run(import_hf, folder_of(tmp_path, kind, {}, ("rope_parameters", old_key)), tmp_path / "out.bin")
    assert model_file.read_model(tmp_path / "out.bin")[0].rope_theta == 10000, "that of the class"


@pytest.mark.parametrize("kind,wte,head", [("learned", "transformer.wte.weight", "lm_head.weight"),
                                           ("rope", "model.embed_tokens.weight", "lm_head.weight"),
                                           ("neox", "gpt_neox.embed_in.weight", "embed_out.weight")])
@pytest.mark.parametrize("wrapped", [lambda n: n, lambda n: "_orig_mod." + n, lambda n: "module." + n,
                                     lambda n: "module._orig_mod." + n, lambda n: n.replace("s.1.", "s.1._orig_mod."),
                                     lambda n: "_orig_mod.module.module." + n])
def test_import_takes_tied_weights_under_either_name_and_wrapped_names(tmp_path, kind, wte, head, wrapped):
    for tied in (lambda f: {}, lambda f: {wrapped(head): f[wrapped(wte)]},
                 lambda f: {wrapped(head): f[wrapped(wte)], wrapped(wte): None}):
        run(import_hf, folder_of(tmp_path, kind, tensors=tied, names=wrapped), tmp_path / "out.bin")
        assert same(model_file.read_model(tmp_path / "out.bin")[1], model_file.read_model(tmp_path / "source.bin")[1])


def test_import_refuses_what_two_names_hold_once_unwrapped(tmp_path):
    folder = folder_of(tmp_path, tensors=lambda f: {"module.transformer.ln_f.bias": f["transformer.ln_f.bias"] + 1})
    text = refused(import_hf, folder, tmp_path / "out.bin")
    assert "two tensors are called transformer.ln_f.bias once what wraps their names is taken off" in text


@pytest.mark.parametrize("kind,name,place", [("learned", "transformer.h.1.mlp.c_fc.weight", (3, 5)),
                                             ("learned", "transformer.wte.weight", (130, 31)),
                                             ("rope", "model.layers.1.self_attn.v_proj.bias", (7,)),
                                             ("rope", "model.norm.weight", (0,))])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_import_names_weights_that_are_no_numbers(tmp_path, kind, name, place, value):
    def spoil(found):
        x = found[name].copy()
        x[place] = value
        return {name: x}

    text = refused(import_hf, folder_of(tmp_path, kind, tensors=spoil), tmp_path / "out.bin")
    assert f"tensor {name} has 1 value that is no finite float32, the first at {place}: {value}" in text
    assert not (tmp_path / "out.bin").exists()


def test_import_refuses_doubles_beyond_float32(tmp_path):
    folder = folder_of(tmp_path)
    found = {n: np.array(x) for n, x in model_file.read_safetensors(folder / "model.safetensors").items()}
    entry, body = {}, b""
    for n, x in found.items():
        raw = x.astype("<f8")
        if n == "transformer.wpe.weight":
            raw[1, 2:4] = 1e300
        entry[n] = {"dtype": "F64", "shape": list(x.shape), "data_offsets": [len(body), len(body) + raw.nbytes]}
        body += raw.tobytes()
    head = json.dumps(entry).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    text = refused(import_hf, folder, tmp_path / "out.bin")
    assert "transformer.wpe.weight has 2 values that are no finite float32, the first at (1, 2): inf" in text


def test_a_tensor_that_begins_before_the_data(tmp_path):
    for begin, end in ((-4, 0), (0, 4), (4, 8)):
        head = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [begin, end]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + struct.pack("<f", 2))
        if begin == 0:
            assert model_file.read_safetensors(tmp_path / "x.safetensors")["x"].tolist() == [2]
            continue
        with pytest.raises(model_file.FileError, match=f"tensor x .1,. of type F32 lies at bytes {begin} to {end} of 4"):
            model_file.read_safetensors(tmp_path / "x.safetensors")


def test_import_accepts_what_older_versions_wrote(tmp_path):
    mask = {"h.0.attn.bias": np.tril(np.ones((1, 1, 24, 24), "<f4")),
            "h.1.attn.masked_bias": np.float32(-1e4).reshape(())}
    folder = folder_of(tmp_path, tensors=lambda found: dict(mask, **{"lm_head.weight": found["wte.weight"]}),
                       names=lambda n: n.replace("transformer.", "", 1))
    run(import_hf, folder, tmp_path / "out.bin")
    assert same(model_file.read_model(tmp_path / "out.bin")[1], model_file.read_model(tmp_path / "source.bin")[1])
    folder = folder_of(tmp_path, "neox", tensors=lambda found: {
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, "<f4")})
    run(import_hf, folder, tmp_path / "out.bin")
    assert same(model_file.read_model(tmp_path / "out.bin")[1], model_file.read_model(tmp_path / "source.bin")[1])


def test_import_refuses_broken_folders(tmp_path):
    def check(folder, message):
        text = refused(import_hf, folder, tmp_path / "out.bin")
        assert message in text and not (tmp_path / "out.bin").exists(), text

    check(tmp_path / "none", "no such folder")
    folder = folder_of(tmp_path, tensors=lambda found: {"lm_head.weight": found["transformer.wte.weight"] + 1})
    check(folder, "lm_head.weight differs from transformer.wte.weight")
    folder = folder_of(tmp_path, tensors=lambda found: {"transformer.h.0.extra": np.zeros(3, "<f4")})
    check(folder, "no place for tensor transformer.h.0.extra")
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-4])
    check(folder, "damaged or cut off")
    weights.write_bytes(raw[:100])
    check(folder, "not a safetensors file, or cut off")
    weights.write_bytes(raw.replace(b'"F32"', b'"I32"'))
    check(folder, "transformer.wte.weight is of type I32, wanted F64, F32, F16, BF16")
    weights.write_bytes(raw.replace(b'{', b'[', 1))
    check(folder, "not JSON")
    weights.unlink()
    check(folder, "neither model.safetensors nor model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"")
    check(folder, "only pytorch_model.bin: load it in transformers and save it")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../x.safetensors"}}))
    check(folder, "lies outside the folder")
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "x.safetensors"}}))
    check(folder, "x.safetensors: No such file")
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    check(folder, "x.safetensors: no tensor transformer.wte.weight")
    (folder / "config.json").write_text("{")
    check(folder, "config.json: this is not JSON")
    (folder / "config.json").unlink()
    check(folder, "config.json: No such file")


# ---- tokenizers ---------------------------------------------------------------------------------------------------

def tokenizer_file(path, tokens, eot, magic=20240328):
    path.write_bytes(struct.pack("<4i", magic, 2, len(tokens), eot).ljust(1024, b"\0") +
                     b"".join(bytes([len(t)]) + t for t in tokens))


BYTES = [bytes([b]) for b in range(256)] + [b"<|endoftext|>"]


def data_folder(folder, kind="bytes", tokens=257, eot=256, **options):
    """A data folder as data/prepare.py leaves it, and a run beside it whose log names it."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": kind, "vocab_size": tokens, "eot": eot,
                                                      "options": options}))
    if kind == "bytes":
        tokenizer_file(folder / "tokenizer.bin", BYTES, 256)


def run_folder(folder, data, vocab=257, padded=384, **kind):
    folder.mkdir()
    events = [{"event": "config", "options": {"train-data": "elsewhere/train_*.bin"}}, {"event": "step", "step": 1},
              {"event": "config", "options": {"train-data": f"{data}/train_*.bin"}}]  # the later one: after a resume
    (folder / "log.jsonl").write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in events))
    model(folder / "model.bin", vocab_size=vocab, padded_vocab_size=padded, **kind)


def exported_ids(folder):
    return [json.loads((folder / name).read_text()).get("eos_token_id") for name in ("config.json",
                                                                                    "generation_config.json")]


@pytest.mark.parametrize("kind", ["absolute", "here", "above the run"])
def test_export_takes_the_tokenizer_of_the_runs_data(tmp_path, monkeypatch, capsys, kind):
    data_folder(tmp_path / "data")
    (tmp_path / "runs").mkdir()
    run_folder(tmp_path / "runs" / "a", tmp_path / "data" if kind == "absolute" else "data")
    monkeypatch.chdir(tmp_path if kind == "here" else "/")
    run(export_hf, tmp_path / "runs" / "a" / "model.bin", tmp_path / "hf")
    assert exported_ids(tmp_path / "hf") == [256, 256]
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    assert "end of text 256, tokenizer " in capsys.readouterr().out


def own_tokenizer(path, tokens, eot):
    vocab = {f"t{i}": i for i in range(tokens) if i != eot}
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {**vocab, "<end>": eot}, "merges": []},
                                "added_tokens": [{"id": eot, "content": "<end>"}]}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_export_knows_the_end_of_text_from_the_manifest_not_from_the_size(tmp_path, capsys):
    """A tokenizer of one's own with GPT-2's number of ids whose end of text is 0."""
    digest = own_tokenizer(tmp_path / "tokenizer.json", 50257, 0)
    data_folder(tmp_path / "data", "tokenizer.json", 50257, 0, tokenizer_sha256=digest)
    run_folder(tmp_path / "run", tmp_path / "data", 50257, 50304, channels=8, num_heads=1)
    run(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")
    assert exported_ids(tmp_path / "hf") == [0, 0] and not (tmp_path / "hf" / "tokenizer.json").exists()
    assert "--tokenizer FILE.json adds" in capsys.readouterr().out
    run(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf", "--tokenizer", tmp_path / "tokenizer.json")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "<end>"
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "data")  # there it is taken by itself
    run(export_hf, tmp_path / "run" / "model.bin", tmp_path / "by_itself")
    for name in os.listdir(tmp_path / "hf"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "by_itself" / name).read_bytes(), name
    for of_an_earlier_use in (dict(truncation={"max_length": 3}, padding=None), dict(truncation=None, padding={"pad_id": 3})):
        left = dict(json.loads((tmp_path / "tokenizer.json").read_text()), **of_an_earlier_use)
        (tmp_path / "data" / "tokenizer.json").write_text(json.dumps(left))
        digest = hashlib.sha256((tmp_path / "data" / "tokenizer.json").read_bytes()).hexdigest()
        data_manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
        data_manifest["options"]["tokenizer_sha256"] = digest
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(data_manifest))
        run(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")
        assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text()) == {**left, "truncation": None, "padding": None}
    own_tokenizer(tmp_path / "other.json", 50257, 1)
    assert "other.json is not the tokenizer that" in refused(export_hf, tmp_path / "run" / "model.bin", tmp_path / "x",
                                                             "--tokenizer", tmp_path / "other.json")
    own_tokenizer(tmp_path / "data" / "tokenizer.json", 50258, 0)
    assert "is not the tokenizer that" in refused(export_hf, tmp_path / "run" / "model.bin", tmp_path / "x")


@pytest.mark.parametrize("tokens", [50257, 257, 131])
def test_export_guesses_no_end_of_text(tmp_path, capsys, tokens):
    model(tmp_path / "model.bin", vocab_size=tokens, padded_vocab_size=-(-tokens // 128) * 128, channels=8, num_heads=1)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf")
    assert exported_ids(tmp_path / "hf") == [None, None] and "end of text unknown" in capsys.readouterr().out


def test_imported_end_of_text_leaves_again(tmp_path):
    for changes, generation, eot in ((dict(eos_token_id=7), None, 7), (dict(eos_token_id=[7]), {"eos_token_id": 9}, 7),
                                     (dict(eos_token_id=0), {}, 0), (dict(eos_token_id=None), {"eos_token_id": 9}, 9),
                                     (dict(eos_token_id=[7, 8]), None, None), (dict(eos_token_id=131), None, None),
                                     (dict(eos_token_id="x"), None, None), (dict(eos_token_id=None), None, None)):
        folder = folder_of(tmp_path, "rope", changes)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        run(import_hf, folder, tmp_path / "model.bin")
        assert model_file.read_model(tmp_path / "model.bin")[0].eot == eot
        run(export_hf, tmp_path / "model.bin", tmp_path / "again")
        assert exported_ids(tmp_path / "again") == [eot, eot]
    raw = bytearray((tmp_path / "model.bin").read_bytes())
    struct.pack_into("<i", raw, 48, 132)
    (tmp_path / "bad.bin").write_bytes(raw)
    assert "the end-of-text id is 131, wanted -1 (unknown) to 130" in refused(export_hf, tmp_path / "bad.bin", "x")


def test_the_trainer_takes_a_model_that_knows_its_end_of_text(tmp_path):
    """And the model that it leaves is read again: nothing in the header is taken for something else."""
    program = os.path.join(ROOT, "train_gpt_dense_cpu")
    if not os.path.exists(program):
        pytest.skip("train_gpt_dense_cpu is not built")
    model(tmp_path / "model.bin", positions="rope", max_seq_len=32, eot=130)
    head = struct.pack("<3i", 20240520, 1, 200).ljust(1024, b"\0")
    (tmp_path / "data.bin").write_bytes(head + np.arange(200).astype("<u2").clip(0, 130).tobytes())
    done = subprocess.run([program, "--model", tmp_path / "model.bin", "--train-data", tmp_path / "data.bin", "--val-data",
                           "", "--seq-len", "32", "--steps", "1", "--out-dir", tmp_path / "run"], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert model_file.read_model(tmp_path / "run" / "model.bin")[0].eot is None


def test_export_does_not_mix_two_models_in_a_folder(tmp_path):
    data_folder(tmp_path / "data")
    run_folder(tmp_path / "run", tmp_path / "data")
    run(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")
    model(tmp_path / "other.bin", eot=5)
    written = {n: (tmp_path / "hf" / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
    for change in (dict(chat_template="x"), dict(eos_token="<end>")):  # the user's, not as the export wrote it
        (tmp_path / "hf" / "tokenizer_config.json").write_text(
            json.dumps({**json.loads(written["tokenizer_config.json"]), **change}))
        message = refused(export_hf, tmp_path / "other.bin", tmp_path / "hf")
        assert "holds tokenizer.json, which this export would not replace" in message
        assert exported_ids(tmp_path / "hf") == [256, 256] and (tmp_path / "hf" / "tokenizer.json").exists()
    (tmp_path / "hf" / "tokenizer_config.json").write_bytes(written["tokenizer_config.json"])
    run(export_hf, tmp_path / "other.bin", tmp_path / "hf")
    assert exported_ids(tmp_path / "hf") == [5, 5]  # the old generation_config.json says 256
    assert not [n for n in written if (tmp_path / "hf" / n).exists()]  # they were an earlier export's
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "vocab.json"):
        (tmp_path / "hf" / name).write_text("")
        assert f"holds {name}, which" in refused(export_hf, tmp_path / "other.bin", tmp_path / "hf")
        (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf" / "README.md").write_text("of the user")
    run(export_hf, tmp_path / "other.bin", tmp_path / "hf")


@pytest.mark.parametrize("change,message", [
    (dict(eot=257), "the end of text is 257 of 257 ids"), (dict(eot="x"), "the end of text is x of 257 ids"),
    (dict(tokens=300), "256 of 300 ids, the model has a vocabulary of 257")])
def test_export_refuses_a_manifest_that_cannot_be_the_models(tmp_path, change, message):
    data_folder(tmp_path / "data", **change)
    run_folder(tmp_path / "run", tmp_path / "data")
    assert message in refused(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    assert "it does not say eot" in refused(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")
    (tmp_path / "data" / "manifest.json").write_text("{")
    assert "this is not JSON" in refused(export_hf, tmp_path / "run" / "model.bin", tmp_path / "hf")


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_byte_tokenizer(tmp_path, hf, positions):
    model(tmp_path / "model.bin", positions=positions, vocab_size=257, padded_vocab_size=384)
    (tmp_path / "data").mkdir()
    tokenizer_file(tmp_path / "data" / "tokenizer.bin", BYTES, 256)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf", "--tokenizer", tmp_path / "data")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello,  world\n\tfür 日本 🙂 don't \x00\x7f 12345"
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>b") == [97, 256, 98]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 256
    m = load_exactly(hf, tmp_path / "hf").eval()
    assert m.generation_config.eos_token_id == m.generation_config.pad_token_id == 256
    assert tokenizer(["a", "bcd"], padding=True)["input_ids"] == [[97, 256, 256], [98, 99, 100]]
    encoded = tokenizer("Hello, world", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}  # token_type_ids GPT-2 would add up
    assert m(**encoded).logits.equal(m(input_ids=encoded["input_ids"]).logits)


def test_gpt2_tokenizer(tmp_path, hf, llama):
    """The written tokenizer.json gives tiktoken's ids, and so does llama.cpp with the GGUF file."""
    pytest.importorskip("tiktoken")
    sys.path.insert(0, os.path.join(ROOT, "data"))
    import prepare
    try:
        gpt2 = prepare.Gpt2Tokenizer(prepare.gpt2_ranks(os.path.join(prepare.DATA_DIR, ".cache")))
    except prepare.Failure as e:
        pytest.fail(f"GPT-2's ranks are needed for this test: {e}")
    tokenizer_file(tmp_path / "tokenizer.bin", gpt2.token_bytes(), gpt2.eot)
    model(tmp_path / "model.bin", vocab_size=50257, padded_vocab_size=50304, channels=8, num_heads=1)
    run(export_hf, tmp_path / "model.bin", tmp_path / "hf", "--tokenizer", tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    with open(os.path.abspath(__file__), encoding="utf-8") as f:
        text = f.read().replace("<|", "")  # without the end of text spelled out
    text += "The quick brown fox's 1234 jumps;\n\n   über naïve 日本語 🙂 x = y[3] + 0x7f\t// don't\n \u00a0 \r\n"
    ids = gpt2.encoding.encode_ordinary(text)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text and len(ids) > 10_000
    assert tokenizer.encode("<|endoftext|>") == [50256] == [tokenizer.eos_token_id]
    run(export_gguf, tmp_path / "model.bin", tmp_path / "model.gguf", "--tokenizer", tmp_path)
    assert llama(tmp_path / "model.gguf")[1](text) == ids


def test_bytes_that_do_not_print_have_characters_that_do():
    """From 256 on, in their order; the soft hyphen is the last of them."""
    table = tokenizer_files.byte_characters()
    assert (table[0], table[ord("!")], table[0xAC], table[0xAD], table[0xAE]) == ("Ā", "!", "¬", chr(256 + 33 + 34), "®")


def test_merges_come_from_the_order_of_the_tokens():
    a, b, c = b"a", b"b", b"c"
    assert tokenizer_files.merges_of([a, b, c, b"ab", b"abc", b"abab", b"cc"]) == [
        (a, b), (b"ab", c), (b"ab", b"ab"), (c, c)]
    assert tokenizer_files.merges_of([a, b, c, b"bc", b"abc", b"ab"]) == [(b, c), (a, b"bc"), (a, b)]
    assert tokenizer_files.merges_of([a, b, c, b"bc", b"ab", b"abc"]) == [(b, c), (a, b), (a, b"bc")]  # not the first two
    assert tokenizer_files.merges_of([a, b, c, b"abc"]) is None       # no two tokens make it
    assert tokenizer_files.merges_of([a, b"ab", b]) is None           # made of a token that comes after it


@pytest.mark.parametrize("tokens,eot,magic,message", [
    (BYTES[:-2] + [b"xy", BYTES[-1]], 256, 20240328, "neither GPT-2's vocabulary nor plain bytes"),
    (BYTES, 0, 20240328, "neither GPT-2's vocabulary nor plain bytes"),
    (BYTES, 257, 20240328, "end-of-text id is 257, wanted 0 to 256"),
    (BYTES + [b"more"], 256, 20240328, "it has 258 tokens, "),
    (BYTES, 256, 20240326, "the first words are 20240326 2"),
])
def test_tokenizer_refusals(tmp_path, tokens, eot, magic, message):
    model(tmp_path / "model.bin", vocab_size=257, padded_vocab_size=384)
    tokenizer_file(tmp_path / "t.bin", tokens, eot, magic)
    assert message in refused(export_hf, tmp_path / "model.bin", tmp_path / "hf", "--tokenizer", tmp_path / "t.bin")
    assert not (tmp_path / "hf").exists()


def test_tokenizer_file_cut_off(tmp_path):
    tokenizer_file(tmp_path / "t.bin", BYTES, 256)
    raw = (tmp_path / "t.bin").read_bytes()
    for change, message in ((raw[:-1], "token 256 of 257 is cut off"), (raw + b"x", "too long"), (raw[:9], "9 bytes")):
        (tmp_path / "t.bin").write_bytes(change)
        with pytest.raises(model_file.FileError, match=message):
            model_file.read_tokenizer(tmp_path / "t.bin")


# ---- GGUF ---------------------------------------------------------------------------------------------------------

def gguf_run(tmp_path, positions, *options):
    data_folder(tmp_path / "data")
    run_folder(tmp_path / "run", tmp_path / "data", positions=positions, channels=64, num_heads=2, max_seq_len=300)
    run(export_gguf, tmp_path / "run" / "model.bin", tmp_path / "model.gguf", *options)
    return model_file.read_model(tmp_path / "run" / "model.bin")


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_holds_the_model(tmp_path, positions, dtype):
    """By PyPI's own reader."""
    gguf = pytest.importorskip("gguf")
    config, tensors = gguf_run(tmp_path, positions, "--dtype", dtype)
    assert sorted(os.listdir(tmp_path)) == ["data", "model.gguf", "run"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {t.name: t for t in reader.tensors}

    def value(name):
        return reader.fields[name].contents()

    arch = {"learned": "gpt2", "rope": "starcoder2"}[positions]
    assert value("general.architecture") == arch and value(f"{arch}.context_length") == 300
    assert [value("tokenizer.ggml." + k) for k in ("eos_token_id", "bos_token_id", "padding_token_id")] == [256] * 3
    assert value("tokenizer.ggml.tokens")[ord("a")] == "a" and len(value("tokenizer.ggml.tokens")) == 257
    assert value("tokenizer.ggml.token_type") == [1] * 256 + [3]
    if positions == "rope":
        assert value("starcoder2.rope.freq_base") == 5000

    def matrix(name):
        assert found[name].tensor_type.name == {"float32": "F32", "bfloat16": "BF16"}[dtype]
        return found[name].data.view("<f4" if dtype == "float32" else "<u2")

    def wanted(x):
        return model_file.to_dtype(x, dtype)

    assert np.array_equal(matrix("token_embd.weight"), wanted(tensors["wte"][:257]))
    assert np.array_equal(matrix("blk.1.ffn_down.weight"), wanted(tensors["fcprojw"][1]))
    assert np.array_equal(found["blk.1.attn_norm.bias"].data, tensors["ln1b"][1])
    for i, letter in enumerate("qkv"):
        rows = slice(64 * i, 64 * (i + 1))
        if positions == "rope":
            assert np.array_equal(matrix(f"blk.0.attn_{letter}.weight"), wanted(tensors["qkvw"][0][rows]))
            assert np.array_equal(found[f"blk.0.attn_{letter}.bias"].data, tensors["qkvb"][0][rows])
        else:
            assert np.array_equal(matrix("blk.0.attn_qkv.weight")[rows], wanted(tensors["qkvw"][0][rows]))


@pytest.fixture
def llama():
    """llama.cpp with a GGUF file, by PyPI's xllamacpp: (logits of ids, ids of a text)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    servers = []

    def start(path):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 300, 1, False
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        servers.append(xllamacpp.Server(params))
        server = servers[-1]

        def log_probabilities(ids):
            """Of the token that follows; None where the likeliest is no character, since llama.cpp then keeps them."""
            answer = server.handle_completions({"prompt": [int(i) for i in ids], "n_predict": 1, "n_probs": 257,
                                                "temperature": 0, "cache_prompt": False})
            found = answer["choices"][0]["logprobs"]
            return found and {e["id"]: e["logprob"] for e in found["content"][0]["top_logprobs"]}

        def tokenize(text):
            request = urllib.request.Request(server.listening_address + "/tokenize", method="POST",
                                             data=json.dumps({"content": text, "parse_special": False}).encode(),
                                             headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as f:
                return json.load(f)["tokens"]
        return log_probabilities, tokenize
    yield start
    servers.clear()


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_llama_cpp_computes_the_same(tmp_path, llama, positions):
    config, tensors = gguf_run(tmp_path, positions)
    log_probabilities, tokenize = llama(tmp_path / "model.gguf")
    compared = 0
    for seed in range(12):
        ids = np.random.default_rng(seed).integers(0, 257, 40 + 20 * seed)
        found = log_probabilities(ids)
        if not found:
            continue
        wanted = forward(config, tensors, ids)[-1]
        wanted -= wanted.max() + np.log(np.exp(wanted - wanted.max()).sum())
        assert len(found) == 257 and wanted.std() > 1
        assert max(abs(found[i] - wanted[i]) for i in range(257)) < 0.02  # its GELU is a table of halves
        if positions == "rope":  # and theta is heard of: with another the distance is a hundred times that
            other = forward(dataclasses.replace(config, rope_theta=10000.0), tensors, ids)[-1]
            other -= other.max() + np.log(np.exp(other - other.max()).sum())
            assert max(abs(found[i] - other[i]) for i in range(257)) > 0.2
        compared += 1
    assert compared >= 3
    text = "Hello,  world\n\tfür 日本 🙂 don't \x7f 12345"
    assert tokenize(text) == list(text.encode())


@pytest.mark.parametrize("change,message", [
    (dict(normalizer={"type": "NFC"}), 'normalizer is {"type": "NFC"}, wanted null'),
    (dict(pre_tokenizer={"type": "Whitespace"}), 'pre_tokenizer is "Whitespace", wanted "ByteLevel"'),
    (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space is true, wanted false"),
    (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}), "use_regex is false"),
])
def test_gguf_refuses_tokenizers_that_llama_cpp_has_no_name_for(tmp_path, change, message):
    gguf = pytest.importorskip("gguf")
    value = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "normalizer": None,
             "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
             "added_tokens": [{"id": 3, "content": "<end>", "special": True}]}
    model(tmp_path / "model.bin", vocab_size=6, padded_vocab_size=128, eot=3)
    (tmp_path / "t.json").write_text(json.dumps({**value, **change}))
    assert message in refused(export_gguf, tmp_path / "model.bin", tmp_path / "x.gguf", "--tokenizer",
                              tmp_path / "t.json")
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "t.json"]
    (tmp_path / "t.json").write_text(json.dumps(value))
    run(export_gguf, tmp_path / "model.bin", tmp_path / "x.gguf", "--tokenizer", tmp_path / "t.json")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ab", "<end>", "[unused4]", "[unused5]"]
    assert fields["tokenizer.ggml.token_type"].contents() == [1, 1, 1, 3, 5, 5]
    assert fields["tokenizer.ggml.merges"].contents() == ["a b"]


# ---- compare ------------------------------------------------------------------------------------------------------

def config_event(program, steps=8, options=(), **changes):
    settings = {"train-data": "d/train_*.bin", "seed": "1", "batch-size": "2", "out-dir": program}
    if program == "lighthouse":
        settings.update({"attention": "L", "switch-step": "4"})
    return dict({"event": "config", "program": program, "version": 2, "options": dict(settings, **dict(options)),
                 "model": {"layers": 2, "channels": 32}, "steps": steps, "tokens_per_step": 100, "device": "x",
                 "backend": "cpu"}, **changes)


def step_event(step, loss, train_s, ms, phase):
    return {"event": "step", "step": step, "loss": loss, "lr": 1e-3, "norm": 1.0, "ms": ms, "mfu": 0.1,
            "tokens_per_second": 1e5 / ms, "phase": phase, "tokens": 100 * step, "train_s": train_s,
            "wall_s": train_s + 0.5, "skipped": False}


def eval_event(step, dense, first, train_s):
    return {"event": "eval", "step": step, "loss_dense": dense, "loss_first": first, "tokens": 100 * step,
            "train_s": train_s, "wall_s": train_s + 1.0}


def first_events(losses=(5.0, 4.6, 4.2, 4.0, 5.5, 4.5, 4.2, 3.9), **changes):
    out, t = [config_event("lighthouse", **changes), eval_event(0, 6.0, 6.1, 0.0)], 0.0
    for i, loss in enumerate(losses, 1):
        t += 0.1 if i <= 4 else 0.4
        ms = 900.0 if i in (1, 5) else 100.0 if i <= 4 else 400.0  # a phase's first step warms up
        out.append(step_event(i, loss, t, ms, "first" if i <= 4 else "dense"))
        if i == 4:
            out.append(eval_event(4, 5.2, 4.3, t))
            out.append({"event": "switch", "step": 4, "train_s": t})
    return out + [eval_event(8, 4.0, None, t), {"event": "total", "steps": 8}]


def dense_events(steps=8, evals=(0, 4, 5, 6, 8), **changes):
    found = {0: (6.0, 0.0), 4: (4.4, 1.6), 5: (4.3, 1.9), 6: (4.2, 2.1), 8: (3.8, 3.2)}  # losses and times
    out = [config_event("dense", **changes)]
    for i in range(steps + 1):
        if i:
            out.append(step_event(i, 5.0 - 0.1 * i, 0.4 * i, 500.0 if i > 1 else 900.0, "dense"))
        if i in evals:
            out.append(eval_event(i, found[i][0], None, found[i][1]))
    return out


def write_log(folder, events):
    folder.mkdir(exist_ok=True)
    text = "".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in events)
    (folder / "log.jsonl").write_text(text)
    return folder


def compared(tmp_path, capsys, *runs, window=2):
    run(compare, *runs, "--json", tmp_path / "out.json", "--window", window)
    return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out


def row_of(text, label):
    line = next(x for x in text.splitlines() if x.startswith(label + "  "))
    return line[len(label):].split()


def test_compare_figures(tmp_path, capsys):
    a, b = write_log(tmp_path / "lh", first_events()), write_log(tmp_path / "dense", dense_events())
    out, text = compared(tmp_path, capsys, a, b)
    lh, dense = out["runs"]
    assert (lh["name"], lh["program"], lh["steps"], lh["tokens"]) == ("lh", "lighthouse", 8, 800)
    assert out["reference"] == "dense" and out["warnings"] == []
    assert lh["phases"]["first"] == pytest.approx(
        {"steps": 4, "tokens": 400, "seconds": 0.4, "tokens_per_second": 1000, "median_ms": 100})
    assert lh["phases"]["dense"] == pytest.approx(
        {"steps": 4, "tokens": 400, "seconds": 1.6, "tokens_per_second": 250, "median_ms": 400})
    assert list(dense["phases"]) == ["dense"] and dense["phases"]["dense"]["steps"] == 8
    assert lh["train_s"] == pytest.approx(2.0) and lh["wall_s"] == pytest.approx(3.0)
    assert dense["train_s"] == pytest.approx(3.2) and dense["switch"] is None
    assert (lh["final_val_loss"], lh["final_val_step"], dense["final_val_loss"]) == (4.0, 8, 3.8)
    assert lh["step_speedup_own"] == pytest.approx(4.0)
    # Before: (4.2 + 4.0) / 2. After: means of two 5.0, 4.35, 4.05, so the fourth step is the first at or under 4.1.
    assert {k: lh["switch"][k] for k in ("step", "loss_before", "spike", "steps_to_recover", "window", "steps_after")
            } == pytest.approx({"step": 4, "loss_before": 4.1, "spike": 0.9, "steps_to_recover": 4, "window": 2,
                                "steps_after": 4})
    assert lh["switch"]["last_eval_before"]["loss_first"] == 4.3
    pair, = out["pairs"]
    assert pair["whole_run"] == pytest.approx({"tokens": 800, "run_s": 2.0, "reference_s": 3.2, "speedup": 1.6})
    assert pair["step_speedup"] == pytest.approx(5.0)  # of the baseline's steps; its own dense ones are faster
    equal = pair["val_at_equal_tokens"]
    assert (equal["at"], equal["run"], equal["reference"], equal["note"]) == (800, 4.0, 3.8, None)
    equal = pair["val_at_equal_time"]  # half way from 4.3 to 4.2
    assert [equal[k] for k in ("at", "run", "reference", "difference")] == pytest.approx([2.0, 4.0, 4.25, -0.25])
    assert equal["note"] is None
    assert row_of(text, "first phase: tokens/s") == ["1,000", "-"]
    assert row_of(text, "dense phase: tokens/s") == ["250", "250"]
    assert row_of(text, "training time") == ["2.0", "s", "3.2", "s"]
    assert row_of(text, "speed-up of the whole run over dense") == ["1.60", "x", "-"]
    assert row_of(text, "speed-up of a step of the first phase over dense") == ["5.00", "x", "-"]
    assert row_of(text, "speed-up of a step of the first phase over its dense phase") == ["4.00", "x", "-"]
    assert row_of(text, "first phase: ms/step (median)") == ["100.0", "-"]
    assert row_of(text, "dense phase: ms/step (median)") == ["400.0", "500.0"]
    assert row_of(text, "validation loss, final") == ["4.0000", "(+0.2000)", "3.8000"]
    assert row_of(text, "validation loss at equal tokens") == ["4.0000", "at", "800", "(+0.2000)", "-"]
    assert row_of(text, "validation loss at equal training time") == ["4.0000", "at", "2.0", "s", "(-0.2500)", "-"]
    assert row_of(text, "switch after step") == ["4", "-"]
    assert row_of(text, "training loss before the switch") == ["4.1000", "-"]
    assert row_of(text, "spike at the switch") == ["+0.9000", "-"]
    assert row_of(text, "steps to recover") == ["4", "-"]
    assert "warning" not in text
    # A log of an earlier version, in its words.
    old = [json.dumps(e, separators=(",", ":")).replace("first", "lighthouse") + "\n" for e in first_events()]
    assert compared(tmp_path, capsys, write_log(tmp_path / "lh", old), b)[0] == out


def test_compare_when_the_dense_run_is_shorter(tmp_path, capsys):
    a, b = write_log(tmp_path / "lh", first_events()), write_log(tmp_path / "dense", dense_events(steps=4))
    out, text = compared(tmp_path, capsys, a, b)
    pair, = out["pairs"]
    assert pair["whole_run"] == pytest.approx({"tokens": 400, "run_s": 0.4, "reference_s": 1.6, "speedup": 4.0})
    assert "4.00 x (first 400 tokens)" in text
    equal = pair["val_at_equal_time"]  # of lh between 0.4 s and 2.0 s
    assert (equal["run"], equal["difference"]) == (None, None)
    assert [equal[k] for k in ("at", "reference")] == pytest.approx([1.6, 4.4])
    assert "none is extrapolated; lh's evaluations around it are 1.6 s apart, more than 10% of its 2.0 s: " in text
    assert f"training time: {equal['note']}" in text
    assert [pair["val_at_equal_tokens"][k] for k in ("at", "run", "reference")] == pytest.approx([400, 5.2, 4.4])
    assert "dense stands at step 4 of 8" in out["warnings"]


def test_compare_cannot_interpolate_before_the_first_evaluation(tmp_path, capsys):
    a = write_log(tmp_path / "lh", first_events())
    b = write_log(tmp_path / "dense", dense_events(evals=(8,)))
    out, text = compared(tmp_path, capsys, a, b)
    equal = out["pairs"][0]["val_at_equal_time"]
    assert (equal["at"], equal["run"], equal["reference"], equal["difference"]) == (pytest.approx(2.0), 4.0, None, None)
    assert row_of(text, "validation loss at equal training time") == ["4.0000", "at", "2.0", "s", "-"]
    assert "dense was first evaluated after that" in text
    write_log(tmp_path / "dense", dense_events(evals=()))
    out, text = compared(tmp_path, capsys, a, b)
    assert out["pairs"][0]["val_at_equal_time"]["at"] is None and "dense has no evaluations" in text


def test_compare_does_not_interpolate_between_evaluations_far_apart(tmp_path, capsys):
    a = write_log(tmp_path / "lh", first_events())
    b = write_log(tmp_path / "dense", dense_events(evals=(0, 8)))
    out, text = compared(tmp_path, capsys, a, b)
    pair, = out["pairs"]
    equal = pair["val_at_equal_time"]
    assert (equal["at"], equal["run"], equal["reference"], equal["difference"]) == (pytest.approx(2.0), 4.0, None, None)
    assert row_of(text, "validation loss at equal training time") == ["4.0000", "at", "2.0", "s", "-"]
    assert out["warnings"] == ["validation loss at equal training time: dense's evaluations around it are 3.2 s apart, "
                               "more than 10% of its 3.2 s: use a smaller --val-every"]
    assert (pair["val_at_equal_tokens"]["reference"], pair["val_at_equal_tokens"]["note"]) == (3.8, None)  # none needed


def test_compare_no_recovery_and_no_switch(tmp_path, capsys):
    a = write_log(tmp_path / "lh", first_events((5.0, 4.6, 4.2, 4.0, 5.5, 5.0, 4.8, 4.7)))
    out, text = compared(tmp_path, capsys, a)
    assert out["runs"][0]["switch"]["steps_to_recover"] is None and out["pairs"] == [] and out["reference"] is None
    assert row_of(text, "steps to recover") == "not within the run".split()
    assert "without a dense run" in text
    write_log(a, first_events()[:5])
    out, text = compared(tmp_path, capsys, a)
    assert out["runs"][0]["switch"] is None and "steps to recover" not in text
    assert "lh stands at step 3 of 8" in text


def test_compare_spike_ends_with_the_recovery(tmp_path, capsys):
    """A larger loss of an odd batch later on is no part of the spike; losses that are no numbers are left out."""
    a = write_log(tmp_path / "lh", first_events((5.0, 4.6, 4.2, 4.0, 4.5, float("nan"), 3.7, 9.0)))
    out, _ = compared(tmp_path, capsys, a)
    assert out["runs"][0]["switch"]["spike"] == pytest.approx(0.0)  # the mean of 4.5 and 3.7
    assert out["runs"][0]["switch"]["steps_to_recover"] == 3


def test_compare_resumed_log(tmp_path, capsys):
    """A checkpoint at step 3, steps to 6 lost, resumed with other numbers, stopped at 5: step 6 is no more."""
    events = [config_event("lighthouse"), eval_event(0, 6.0, 6.1, 0.0)]
    events += [step_event(i, 9.0, 0.1 * i, 100.0, "first") for i in range(1, 7)]
    events += [eval_event(6, 8.0, 8.0, 0.6), config_event("lighthouse"), {"event": "resume", "step": 3, "file": "c"}]
    events += [step_event(4, 4.0, 0.5, 200.0, "first"), step_event(5, 3.0, 0.7, 200.0, "first"),
               eval_event(5, 2.5, 2.0, 0.7)]
    a = write_log(tmp_path / "lh", events)
    out, _ = compared(tmp_path, capsys, a)
    lh = out["runs"][0]
    assert (lh["steps"], lh["tokens"], lh["train_s"], lh["final_val_loss"]) == (5, 500, 0.7, 2.5)
    assert lh["phases"]["first"]["steps"] == 5
    write_log(a, events[:11])  # resumed, and no step done since
    lh = compared(tmp_path, capsys, a)[0]["runs"][0]
    assert (lh["steps"], lh["final_val_step"]) == (3, 0)
    # The same without the resume line: what stands later counts.
    write_log(a, [e for e in events if e["event"] != "resume"])
    assert compared(tmp_path, capsys, a)[0]["runs"] == out["runs"]
    write_log(a, [e for e in events[:-1] if e["event"] != "resume"])
    assert compared(tmp_path, capsys, a)[0]["runs"][0]["steps"] == 5
    # A run that began anew in the same directory.
    write_log(a, events + dense_events(steps=2, evals=(0,)))
    lh = compared(tmp_path, capsys, a)[0]["runs"][0]
    assert (lh["program"], lh["steps"], lh["tokens"], lh["final_val_step"]) == ("dense", 2, 200, 0)


def test_compare_brief_is_four_lines(tmp_path, capsys):
    runs = [write_log(tmp_path / "lh", first_events()), write_log(tmp_path / "dense", dense_events())]
    run(compare, *runs, "--brief")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["first phase: tokens/s", "dense phase: tokens/s",
                                                            "training time", "validation loss, final"]
    assert not [line for line in lines[6:] if not line.startswith("warning: ")]


def test_compare_after_a_changed_resume(tmp_path, capsys):
    """The options of every step that is left count: a run is not what its last configuration says."""
    def run_with(*parts):
        """Of (learning rate, first step): each goes on from the step before."""
        out = []
        for rate, first in parts:
            out += [config_event("dense", options={"learning-rate": rate})] + [{"event": "resume", "step": first - 1}][first == 1:]
            out += [step_event(i, 5.0, 0.4 * i, 400.0, "dense") for i in range(first, 9)]
        return out + [eval_event(8, 3.8, None, 3.2)]

    for parts, said in ([[("1", 1), ("2", 6)], '--learning-rate differs: run has "1", then "2", base "2"'],
                        [[("2", 1), ("1", 3), ("2", 5)], '--learning-rate differs: run has "2", then "1", then "2", base "2"'],
                        [[("1", 1), ("2", 1)], None], [[("2", 1), ("1", 7), ("2", 4)], None], [[("2", 1), ("2", 5)], None]):
        runs = [write_log(tmp_path / "base", run_with(("2", 1))), write_log(tmp_path / "run", run_with(*parts))]
        warnings = [w for w in compared(tmp_path, capsys, *runs)[0]["warnings"] if "differs" in w]
        assert warnings == ([said] if said else []), parts
        warnings = [w for w in compared(tmp_path, capsys, *runs[::-1])[0]["warnings"] if "differs" in w]
        assert len(warnings) == (said is not None), "the run that others are compared with counts in the same way"


def test_compare_broken_logs(tmp_path, capsys):
    events = dense_events()
    a = write_log(tmp_path / "dense", events + [json.dumps(step_event(9, 1.0, 9.0, 1.0, "dense"))[:40]])
    assert compared(tmp_path, capsys, a)[0]["runs"][0]["steps"] == 8  # killed in the middle of a line
    write_log(a, events[:3] + ['{"event":"st{"event":"config"}\n'] + events[3:])  # the same, and then resumed
    out, text = compared(tmp_path, capsys, a)
    assert out["runs"][0]["steps"] == 8 and "log.jsonl: lines that are no JSON are left out: 4" in text
    write_log(a, events[:3] + [{"event": "step", "step": 2}])
    assert "line 4 has no field 'loss'" in refused(compare, a)
    write_log(a, events[:3] + ["[1,2]\n"])
    assert "line 4 is no JSON object: [1,2]" in refused(compare, a)
    write_log(a, events[:3] + [{"event": "resume", "step": "2"}])
    assert "line 4 has a field of the wrong type (" in refused(compare, a)
    write_log(a, events[:1])
    assert "no training steps" in refused(compare, a)
    assert "none/log.jsonl" not in refused(compare, tmp_path / "none") and "No such file" in refused(
        compare, tmp_path / "none")


def test_compare_warns_of_different_runs(tmp_path, capsys):
    a = write_log(tmp_path / "lh", first_events())
    for change, message in (
            (dict(options={"seed": "2"}), '--seed differs: lh has "1", dense "2"'),
            (dict(options={"train-data": "e"}), '--train-data differs: lh has "d/train_*.bin", dense "e"'),
            (dict(options={"batch-size": "4"}), "--batch-size differs"),
            (dict(model={"layers": 3, "channels": 32}), 'model differs: lh has {"layers": 2, "channels": 32}'),
            (dict(tokens_per_step=200), "tokens_per_step differs: lh has 100, dense 200"),
            (dict(device="y"), "device differs"),
            (dict(options={"checkpoint-every": "5"}), None)):
        out, text = compared(tmp_path, capsys, a, write_log(tmp_path / "dense", dense_events(**change)))
        assert len(out["warnings"]) == (message is not None) and (message or "") in text, change
    # Every option of the trainer warns but those of the first phase and those that touch neither the training nor its speed.
    free = {"attention", "window", "levels", "pool", "topk", "tile", "switch-step", "out-dir", "checkpoint-every", "keep-last",
            "keep-every", "resume", "dry-run", "val-every", "copy-every", "sample-every", "sample-tokens", "sample-top-k", "prompt",
            "tokenizer", "temperature"}
    names = {row["name"] for row in test_trainer.option_rows()}
    assert len(names) > 50 and free < names
    for name in sorted(names):
        for ours, theirs in ({name: "5"}, {name: "6"}), ({name: "5"}, {}), ({}, {name: "6"}):
            runs = [write_log(tmp_path / "lh", first_events(options=ours)), write_log(tmp_path / "dense", dense_events(options=theirs))]
            warnings = compared(tmp_path, capsys, *runs)[0]["warnings"]
            assert (f"--{name} differs" in " ".join(warnings)) == (name not in free), (name, warnings)
    for what, value in (("processes", 2), ("backend", "cuda"), ("steps", 9)):
        write_log(tmp_path / "lh", first_events(**{what: value}))
        assert f"{what} differs" in compared(tmp_path, capsys, tmp_path / "lh", write_log(tmp_path / "dense", dense_events()))[1]
    write_log(tmp_path / "dense", dense_events()[1:])
    assert "has no config line" in compared(tmp_path, capsys, a, tmp_path / "dense")[1]


def with_context(events, positions, copies):
    """The events with the last validation by position, and copying: (distance, of the text, of random ids) each."""
    last = max(i for i, e in enumerate(events) if e["event"] == "eval")
    events[last] = dict(events[last], positions_dense=positions, positions_first=None)
    return events[:last + 1] + [{"event": "copying", "step": events[last]["step"], "tokens": 240, "sequences": 2, "copies": [
        {"distance": d, "text_loss": x, "text_right": 0.5, "random_loss": y, "random_right": 0.25} for d, x, y in copies]}
    ] + events[last + 1:]


def seeds_of(tmp_path, name, events_of, finals):
    """Runs of seeds 1, 2, ... that end with these losses, as an argument of compare."""
    folders = []
    for seed, final in enumerate(finals, 1):
        events = events_of(options={"seed": str(seed)})
        last = max(i for i, e in enumerate(events) if e["event"] == "eval")
        events[last] = dict(events[last], loss_dense=final)
        events = with_context(events, [9.0] * 10 + [final, final - 1], [(1024, final, 2.0), (1792, 3.0, 5.0)])
        folders.append(str(write_log(tmp_path / f"{name}_s{seed}", events)))
    return f"{name}={','.join(folders)}"


def test_compare_shows_no_figure_of_some_seeds_only():
    average = compare.average
    assert (average([2, 4]), average([2, None]), average([])) == ("3.0000", "-", "-")


def test_compare_seeds(tmp_path, capsys):
    """Means over the seeds, and the differences of equal seeds: .2, .3 and .4 have .3 +- 4.303 * .1 / sqrt(3)."""
    lh = seeds_of(tmp_path, "lh", first_events, (4.0, 4.2, 4.4))
    dense = seeds_of(tmp_path, "dense", dense_events, (3.8, 3.9, 4.0))
    out, text = compared(tmp_path, capsys, lh, dense)
    assert out["recipes"] == {"lh": ["lh_s1", "lh_s2", "lh_s3"], "dense": ["dense_s1", "dense_s2", "dense_s3"]}
    assert out["reference"] == "dense" and out["warnings"] == []
    assert [(p["recipe"], p["run"], p["reference"]) for p in out["pairs"]] == [
        ("lh", f"lh_s{i}", f"dense_s{i}") for i in (1, 2, 3)]
    found = {d["what"]: d for d in out["differences"]}
    final = found["validation loss, final"]
    assert final["values"] == pytest.approx([0.2, 0.3, 0.4]) and final["mean"] == pytest.approx(0.3)
    assert final["interval"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert row_of(text, "validation loss, final") == ["4.2000", "(+0.3000", "±", "0.2484)", "3.9000"]
    assert row_of(text, "validation loss at equal tokens") == ["4.2000", "at", "800", "(+0.3000", "±", "0.2484)", "-"]
    assert found["validation loss at equal training time"]["values"] == pytest.approx([-0.25, -0.05, 0.15])
    assert row_of(text, "seeds") == ["1,", "2,", "3", "1,", "2,", "3"]
    assert row_of(text, "training time") == ["2.0", "s", "3.2", "s"]
    # By position: every second of the powers of two from 256 on, up to the last.
    assert row_of(text, "final loss from position 512 to 1K") == ["9.0000", "(+0.0000", "±", "0.0000)", "9.0000"]
    assert row_of(text, "final loss from position 2K on") == ["3.2000", "(+0.3000", "±", "0.2484)", "2.9000"]
    assert "from position 1K" not in text and "from position 128 " not in text
    assert row_of(text, "copies of the text 1K back: loss, right") == ["4.2000,", "50%", "(+0.3000", "±", "0.2484)", "3.9000,", "50%"]
    assert row_of(text, "copies of random ids 1,792 back: loss, right")[:2] == ["5.0000,", "25%"]
    # A glob finds them too; another baseline; one run alone has a difference without an interval.
    again, _ = compared(tmp_path, capsys, lh, f"dense={tmp_path}/dense_s*")
    assert again == out
    run(compare, dense, lh, "--baseline", "lh", "--window", "2")
    assert "(-0.3000 ± 0.2484)" in capsys.readouterr().out
    assert "4.2000 (+0.3000)" in compared(tmp_path, capsys, tmp_path / "lh_s2", dense)[1]
    # Seeds that the baseline lacks, seeds twice, names twice, other options than the first's.
    out, text = compared(tmp_path, capsys, lh, f"dense={tmp_path}/dense_s2,{tmp_path}/dense_s3")
    assert out["warnings"] == ["lh_s1: no run of dense has its seed, 1"] and "(+0.3500 ± 0.6353, 2 of 3 runs)" in text
    assert "x: two of its runs have one seed; they have 1, 1" in refused(compare, f"x={tmp_path}/lh_s1,{tmp_path}/lh_s1")
    assert "two have one name: dense, dense" in refused(compare, dense, dense)
    assert "--baseline x: there is only lh" in refused(compare, lh, "--baseline", "x")
    assert "No such file" in refused(compare, "x=none")
    write_log(tmp_path / "lh_s2", first_events(options={"seed": "2", "attention": "W"}))
    assert '--attention differs: lh_s2 has "W", lh_s1 "L"' in compared(tmp_path, capsys, lh, dense)[1]


def test_compare_smoothing_and_limits():
    """No mean reaches across the switch, none is a single loss, one that is no number is left out; a run that diverges
    does not press the others into a line."""
    steps = [{"phase": "first" if i < 4 else "dense", "loss": x} for i, x in enumerate([8, 6, 4, 2, 10, None, 4, 2])]
    assert compare.smoothed(steps, 4) == [7, 6, 5, 4, 10, 7, 16 / 3, 3]  # two before, itself and one after
    good, bad = [[5 - 0.02 * i for i in range(100)]], [[5 - 0.02 * i for i in range(40)] + [900.0] * 60]
    runs = [{"steps": [0] * 100, "evals": [{"step": 50, "loss_dense": 4.5, "loss_first": None}]}] * 2
    low, high = compare.loss_limits(runs[:1], good)
    assert low == pytest.approx(3.02 - 0.05 * 1.88) and high == pytest.approx(4.9 + 0.05 * 1.88)
    runs[1] = {"steps": [0] * 100, "evals": [{"step": 80, "loss_dense": 900.0, "loss_first": None}]}
    assert compare.loss_limits(runs, good + bad) == (low, high) and compare.loss_limits(runs, [[math.nan]] * 2) is None


def test_compare_units_of_the_axes():
    """A larger unit is taken from two of it on."""
    for axis, largest, scale, label in (
            ("tokens", 1999, 1, "tokens"), ("tokens", 2000, 1e3, "tokens (thousands)"), ("tokens", 1.9e6, 1e3, "tokens (thousands)"),
            ("tokens", 2e6, 1e6, "tokens (millions)"), ("tokens", 5e9, 1e9, "tokens (billions)"),
            ("train_s", 119, 1, "training time (seconds)"), ("train_s", 120, 60, "training time (minutes)"),
            ("train_s", 7199, 60, "training time (minutes)"), ("train_s", 7200, 3600, "training time (hours)")):
        assert compare.axis_scale(axis, largest) == (scale, label)


def test_compare_png_with_the_context(tmp_path):
    """A third column: the loss by position, and copying by distance."""
    image = pytest.importorskip("matplotlib.image")
    run(compare, seeds_of(tmp_path, "lh", first_events, (4.0, 4.2)), seeds_of(tmp_path, "dense", dense_events, (3.8, 3.9)),
        "--png", tmp_path / "out.png")
    pixels = np.round(image.imread(tmp_path / "out.png")[..., :3] * 255)
    assert pixels.shape == (660, 2220, 3)
    for panel in (pixels[:330, 1560:], pixels[330:, 1560:]):
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (np.abs(panel - colour).max(-1) <= 2).sum() > 100


def test_compare_png(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    a, b = write_log(tmp_path / "lh", first_events()), write_log(tmp_path / "dense", dense_events())
    run(compare, a, b, "--png", tmp_path / "out.png", "--window", 2)
    raw = (tmp_path / "out.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", raw[16:24]) == (1560, 660)
    pixels = np.round(image.imread(tmp_path / "out.png")[..., :3] * 255)
    for panel in (pixels[:, :780], pixels[:, 780:]):  # both runs' colours in both panels, and mostly white
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (np.abs(panel - colour).max(-1) <= 2).sum() > 300
        assert (panel.min(-1) == 255).mean() > 0.7
        bluish = (panel[..., 2] - panel[..., 0] > 60).sum(0)
        assert bluish.max() > 250  # the switch: a dashed line from bottom to top, its edges softened


def test_compare_runs_both_trainers(tmp_path):
    """With trainers that only write down their arguments and a log."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "compare"
    shutil.copy(os.path.join(SCRIPTS, "compare"), script)
    lines = {"lighthouse": first_events(), "dense": dense_events()}
    for name, events in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        trainer = tmp_path / f"train_gpt_{name}_cpu"
        trainer.write_text(f'#!/bin/sh\nfor out; do :; done\ncp "{tmp_path}/{name}.jsonl" "$out/log.jsonl"\n'
                           f'printf "%s\\n" "$@" > "{tmp_path}/{name}.args"\nexit $(cat "{tmp_path}/status")\n')
        trainer.chmod(0o755)
    (tmp_path / "status").write_text("0")
    command = [str(script), "--run", "--backend", "cpu", "--out", str(tmp_path / "pair"), "--json",
               str(tmp_path / "out.json"), "--", "--steps", "8", "--levels=2", "--pool", "4", "--topk", "8", "--tile=4",
               "--attention", "DL", "--window=8", "--switch-step", "4", "--train-data", "a b/*.bin", "--seed=-3"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1.60 x" in done.stdout and f"{tmp_path}/train_gpt_lighthouse_cpu --steps 8 --levels=2" in done.stdout
    args = {name: (tmp_path / f"{name}.args").read_text().splitlines() for name in lines}
    out = {name: ["--out-dir", str(tmp_path / "pair" / name)] for name in lines}
    assert args["dense"] == ["--steps", "8", "--train-data", "a b/*.bin", "--seed=-3", *out["dense"]]
    assert args["lighthouse"] == command[command.index("--") + 1:] + out["lighthouse"]
    assert json.loads((tmp_path / "out.json").read_text())["reference"] == "dense"
    (tmp_path / "status").write_text("3")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1 and "this command ended with status 3" in done.stderr and "dense_cpu" not in done.stdout
    done = subprocess.run([sys.executable, *command, "--out-dir", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "--out-dir is chosen by --out" in done.stderr
    (tmp_path / "train_gpt_dense_cpu").unlink()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1 and "train_gpt_dense_cpu is not there: build it with make" in done.stderr


@pytest.mark.parametrize("status", [130, 0])
def test_compare_waits_for_the_checkpoint_after_ctrl_c(tmp_path, status):
    """A terminal's Ctrl-C goes to the whole group. The trainer needs its time, and the second one is not started."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(os.path.join(SCRIPTS, "compare"), tmp_path / "scripts")
    for name in ("lighthouse", "dense"):
        trainer = tmp_path / f"train_gpt_{name}_cpu"
        trainer.write_text(f'''#!/usr/bin/env python3
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(1)
    pathlib.Path(sys.argv[-1], "checkpoint").write_text("whole")
    sys.exit({status})
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[-1], "begun").touch()
time.sleep(60)
''')
        trainer.chmod(0o755)
    recipe = f"{shlex.quote(sys.executable)} scripts/compare --run --backend cpu --out pair -- --steps 8\ntrue\n"
    process = subprocess.Popen(["sh", "-c", recipe], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for _ in range(1000):
        if (tmp_path / "pair" / "lighthouse" / "begun").exists():
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=30)[1]
    assert (tmp_path / "pair" / "lighthouse" / "checkpoint").read_text() == "whole"
    assert process.returncode in (130, -signal.SIGINT) and not (tmp_path / "pair" / "dense").exists()
    assert message.count("\n") == 1 and f"stopped by Ctrl-C; this command ended with status {status}" in message


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_trained_models_leave_as_they_were_evaluated(tmp_path, monkeypatch, request, positions):
    """With the real CPU trainers, when they are built: what they last measured is what the exported model has."""
    if not all(os.path.exists(os.path.join(ROOT, f"train_gpt_{p}_cpu")) for p in ("lighthouse", "dense")):
        pytest.skip("train_gpt_lighthouse_cpu and train_gpt_dense_cpu are not built")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rng = np.random.default_rng(11)
    tokens = {"train": rng.integers(0, 257, 2000), "val": rng.integers(0, 257, 129)}
    for name, ids in tokens.items():
        head = struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0")
        (tmp_path / f"{name}.bin").write_bytes(head + ids.astype("<u2").tobytes())
    run(compare, "--run", "--backend", "cpu", "--out", tmp_path / "pair", "--json", tmp_path / "out.json", "--",
        "--train-data", tmp_path / "train.bin", "--val-data", tmp_path / "val.bin", "--val-batches", 2, "--steps", 6,
        "--depth", 2, "--channels", 32, "--heads", 2, "--seq-len", 64, "--learning-rate", 1e-2, "--warmup-steps", 0,
        "--vocab-size", 257, "--levels", 2, "--pool", 2, "--topk", 8, "--tile", 4, "--attention", "LW", "--window", 24,
        "--switch-step", 4, "--positions", positions)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["reference"] == "dense" and out["runs"][0]["switch"]["step"] == 4
    assert not [w for w in out["warnings"] if "differs" in w or "stands at" in w]
    for figures in out["runs"]:
        folder = tmp_path / "pair" / figures["name"]
        config, tensors = model_file.read_model(folder / "model.bin")
        assert (config.positions, config.step, config.padded_vocab_size) == (positions, 6, 384)
        assert same(tensors, model_file.read_model(folder / "ckpt_00000006.bin")[1])
        raw = (folder / "ckpt_00000006.bin").read_bytes()
        for damaged in (raw[:9] + b"?" + raw[10:], raw[:4105] + b"?" + raw[4106:], raw[:9000] + b"?" + raw[9001:],
                        raw[:-4]):  # and the trainer refuses it in the same words
            (tmp_path / "damaged.bin").write_bytes(damaged)
            with pytest.raises(model_file.FileError) as e:
                model_file.read_model(tmp_path / "damaged.bin")
            said = subprocess.run([os.path.join(ROOT, "train_gpt_dense_cpu"), "--model", tmp_path / "damaged.bin",
                                   "--train-data", tmp_path / "train.bin", "--val-data", "", "--seq-len", "64",
                                   "--out-dir", tmp_path / "never"], capture_output=True, text=True).stderr
            assert str(e.value) in said
        run(export_hf, folder / "model.bin", folder / "hf")
        models = [lambda ids: forward(config, tensors, ids)]
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            exported = load_exactly(request.getfixturevalue("hf"), folder / "hf")
            models.append(lambda ids: hf_logits(exported, ids).astype(float))
        for logits_of in models:
            losses = []
            for window in (tokens["val"][:65], tokens["val"][64:]):
                logits = logits_of(window[:-1])
                top = logits.max(1, keepdims=True)
                losses.append(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(64), window[1:]])
            assert np.mean(losses) == pytest.approx(figures["final_val_loss"], abs=1e-5)


@pytest.mark.parametrize("args,message", [
    ([], "name at least one RUN"), (["--run", "--", "--steps", "1"], "--run wants --out"),
    (["x", "--window", "0"], "--window is 0"), (["x", "--", "--steps", "1"], "belong to --run"),
    (["--run", "--out", "never", "--png", "x.foo", "--", "--steps", "1"], "--png x.foo: matplotlib writes no .foo")])
def test_compare_usage(capsys, args, message):
    with pytest.raises(SystemExit) as e:
        compare.main(args)
    assert e.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("compiler,works", [("g++", True), ("env g++", True), ("no-such g++", False)])
def test_probe_takes_a_compiler_of_several_words(compiler, works):
    found = subprocess.run([os.path.join(SCRIPTS, "probe")], capture_output=True, text=True,
                           env=dict(os.environ, CXX=compiler, NVCC="none", MPICC="none"))
    assert found.returncode == 0 and ("PROBE_CXX = g++" in found.stdout) == works
    assert ("$(error no working C++ compiler" in found.stdout) != works


@pytest.mark.skipif(not os.path.exists(os.path.join(ROOT, "train_gpt_lighthouse_cpu")), reason="make cpu")
def test_longest_context_is_the_last_that_fits():
    """And more memory or an option for the trainer changes it."""
    script = [sys.executable, os.path.join(SCRIPTS, "longest_context"), "--model", "d6", "--unit", "65536", "--memory"]

    def table(*more):
        done = subprocess.run([*script, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        head, _, row = done.stdout.splitlines()
        return dict(zip(head.split(" | ")[1:], [int(x.strip(" |").replace(",", "")) for x in row.split(" | ")[1:]]))

    found = table("8", "16")
    assert list(found) == ["8 GiB", "16 GiB |"] and 0 < 1.8 * found["8 GiB"] < found["16 GiB |"]
    kept = table("8", "--", "--recompute", "0")
    assert kept["8 GiB |"] < found["8 GiB"]
    wrong = subprocess.run([*script, "8", "--", "--attention", "L", "--pool", "3"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("longest_context: ") and "pool" in wrong.stderr


# ---- setup, in a copy of the tree on a machine that has little ------------------------------------------------------

class Machine:
    """A folder with scripts/setup and the lists, and a PATH of a few commands; apt-get, pip and the like only write
    down that they were called."""
    TOOLS = ("sh", "env", "cat", "cp", "cmp", "rm", "mkdir", "chmod", "mktemp", "grep", "head",
             "tail", "basename", "dirname", "id", "ln")

    def __init__(self, folder):
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        (folder / "tree" / "scripts").mkdir(parents=True)
        (folder / "tree" / "dev").mkdir()
        self.bin.mkdir()
        for name in ("requirements.txt", "dev/requirements.txt", "scripts/setup"):
            shutil.copy(os.path.join(ROOT, name), folder / "tree" / name)
        for name in self.TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        for name in ("make", "g++", "mpicc"):
            self.command(name)

    def command(self, name, body="exit 0"):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n{body}\n')
        (self.bin / name).chmod(0o755)

    def python(self, modules=(), pip="echo no network >&2; exit 1"):
        """A python3 that finds these modules only, and whose venv has the same."""
        body = f"""case "$*" in
*find_spec*) shift 2; for m; do case " {' '.join(modules)} " in *" $m "*) ;; *) exit 1;; esac; done ;;
*"import torch"*) case " {' '.join(modules)} " in *" torch "*) ;; *) exit 1;; esac ;;
*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo > .venv/pyvenv.cfg ;;
*"-m pip"*) {pip} ;;
*ensurepip*) exit 0 ;;
*"import "*) exit 1 ;;
esac"""
        self.command("python3", body)

    def setup(self, *args):
        self.calls.write_text("")
        done = subprocess.run(["/bin/sh", self.folder / "tree" / "scripts" / "setup", *args], capture_output=True,
                              text=True, env={"PATH": str(self.bin), "PYTHON": "python3", "HOME": str(self.folder)})
        return done, self.calls.read_text()


MODULES = ("numpy", "matplotlib", "safetensors", "tokenizers", "tiktoken", "zstandard", "pyarrow")


def test_setup_leaves_a_machine_that_has_everything_alone(tmp_path):
    """No apt-get, no pip: the Python that has the packages is the one that .venv/bin/python calls."""
    machine = Machine(tmp_path)
    machine.python(MODULES)
    for _ in range(2):
        done, calls = machine.setup()
        assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)
        assert "-m pip" not in calls and "-m venv" not in calls
    python = tmp_path / "tree" / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import importlib.util as find_spec", "numpy"]).returncode == 0
    assert str(tmp_path / "bin" / "python3") in python.read_text()


def test_setup_without_root_or_network_goes_on_with_what_is_there(tmp_path):
    machine = Machine(tmp_path)
    machine.python(("numpy",))
    machine.command("g++", 'case "$*" in *-l*) exit 1;; esac')  # links no BLAS
    machine.command("id", "echo 1000")
    machine.command("apt-get")
    (tmp_path / "bin" / "mpicc").unlink()
    done, calls = machine.setup()
    assert done.returncode == 0, done.stderr
    assert "missing, of libopenblas-dev libopenmpi-dev openmpi-bin" in done.stdout
    assert "this user is not root and there is no sudo. It goes on without" in done.stdout
    assert "pip could not install what requirements.txt names (no network). It goes on without numpy" in done.stdout  # none imports
    (tmp_path / "bin" / "make").unlink()
    done, calls = machine.setup()
    assert done.returncode == 1 and "error: make is missing: this user is not root and there is no sudo" in done.stderr
    machine.command("make")
    done, calls = machine.setup("test")
    assert done.returncode == 1 and "the tests need it" in done.stderr


def test_setup_installs_what_is_missing_as_root(tmp_path):
    machine = Machine(tmp_path)
    machine.python((), pip="exit 0")
    machine.command("id", "echo 0")
    machine.command("apt-get")
    (tmp_path / "bin" / "mpicc").unlink()
    done, calls = machine.setup()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "installing libopenmpi-dev openmpi-bin\n"
    assert [line for line in calls.splitlines() if line.startswith("apt-get")] == [
        "apt-get update -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20",
        "apt-get install -y -qq --no-install-recommends libopenmpi-dev",
        "apt-get install -y -qq --no-install-recommends openmpi-bin"]
    assert "-r requirements.txt" in calls
    machine.command("mpicc")
    assert "-m pip" not in machine.setup()[1]  # the list has not changed
    with open(tmp_path / "tree" / "requirements.txt", "a") as f:
        f.write("more\n")
    assert "-m pip" in machine.setup()[1]


def test_what_is_missing_is_a_line_to_paste(tmp_path, monkeypatch):
    """In a folder with a space too."""
    model(tmp_path / "model.bin", positions="rope")
    write_log(tmp_path / "run", first_events())
    monkeypatch.setattr(sys, "executable", "/my work/.venv/bin/python")
    for module, script, args in (("gguf", export_gguf, (tmp_path / "model.bin", tmp_path / "model.gguf")),
                                 ("tensorboard", load("export_log"), (tmp_path / "run", "--tensorboard", tmp_path))):
        monkeypatch.setitem(sys.modules, module, None)
        assert refused(script, *args).endswith(f": '/my work/.venv/bin/python' -m pip install {module}")


# ---- which GPUs a program sees -------------------------------------------------------------------------------------

def with_gpus(folder, count):
    """The environment of a machine whose nvidia-smi lists so many."""
    (folder / "path").mkdir(exist_ok=True)
    lines = "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i}a)\\n  MIG 1g.10gb Device 0: (UUID: MIG-{i}b)\\n" for i in range(count))
    (folder / "path" / "nvidia-smi").write_text(f'#!/bin/sh\nprintf "{lines}"\n')
    (folder / "path" / "nvidia-smi").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return dict(kept, PATH=f"{folder / 'path'}:{os.environ['PATH']}")


@pytest.mark.parametrize("visible,count", [
    (None, 3), ("", 0), ("-1", 0), ("0", 1), ("2,0", 2), ("0, 1", 2), ("3", 0), ("0,3,1", 1), ("0,-1,1", 1),
    ("GPU-0a,GPU-2a", 2), ("MIG-1b", 1), ("NoDevFiles", 0)])
def test_gpus(tmp_path, visible, count):
    for there in (3, 0):
        env = with_gpus(tmp_path, there)
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        assert subprocess.check_output([os.path.join(SCRIPTS, "gpus")], env=env, text=True) == f"{count * there // 3}\n"


@pytest.mark.parametrize("visible,backend", [("", "cpu"), ("-1", "cpu"), ("0", "cuda"), (None, "cuda")])
def test_quickstart_on_a_machine_with_a_gpu(tmp_path, visible, backend):
    """Where CUDA_VISIBLE_DEVICES hides the GPU, both make and scripts/quickstart take the CPU."""
    for name in ("Makefile", "scripts/gpus", "scripts/quickstart"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    env = dict(with_gpus(tmp_path, 1), **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    for name in ("train_gpt_lighthouse", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\necho called: $*\n")
        (tmp_path / name).chmod(0o755)
    made = subprocess.check_output(["make", "-n", "quickstart", "MAKE=echo making"], cwd=tmp_path, env=env, text=True)
    assert ("making all" if backend == "cuda" else "making cpu") in made.splitlines()
    done = subprocess.check_output([tmp_path / "scripts" / "quickstart"], env=env, text=True)
    assert f"called: scripts/compare --run --brief --backend {backend} " in done
    assert f"./train_gpt_lighthouse{'_cpu' * (backend == 'cpu')} --model runs/quickstart" in done


# ---- probe: a CUDA of version 99, which no machine has, made of a few lines -----------------------------------------

def shared_library(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path, f"-Wl,-soname,{path.name}"],
                          input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def header(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fake_cuda(root, version="99.1"):
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ $1 = --version ] && echo "release {version}, V{version}.1" || echo compute_90\n')
    nvcc.chmod(0o755)
    header(root / "include" / "cuda_runtime.h")


def fake_cublas(root, so, version=991000):
    header(root / "include" / "cublasLt.h", 'extern "C" unsigned long cublasLtGetVersion();')
    shared_library(root / "lib" / so, f'extern "C" unsigned long cublasLtGetVersion() {{ return {version}; }}')


def fake_cudnn(root, so, lib="lib", cudart=99010, version=90200):
    header(root / "include" / "cudnn.h",
           'extern "C" unsigned long cudnnGetVersion(); extern "C" unsigned long cudnnGetCudartVersion();')
    shared_library(root / lib / so, f'extern "C" unsigned long cudnnGetVersion() {{ return {version}; }}\n'
                   f'extern "C" unsigned long cudnnGetCudartVersion() {{ return {cudart}; }}')


def fake_nccl(root, so):
    header(root / "include" / "nccl.h", "enum { ncclSuccess }; " 'extern "C" int ncclGetVersion(int*);')
    shared_library(root / "lib" / so, 'extern "C" int ncclGetVersion(int* v) { *v = 22000; return 0; }')


def probed(**env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CUDNN", "NCCL", "CONDA", "NVCC", "LD_L"))}
    done = subprocess.run([os.path.join(SCRIPTS, "probe")], capture_output=True, text=True, cwd=env.pop("cwd", ROOT),
                          env={**kept, "GPU_COMPUTE_CAPABILITY": "90", "MPICC": "none",
                               **{k: str(v) for k, v in env.items()}})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(line.split(" =", 1) for line in done.stdout.splitlines() if " =" in line)


def starts(found, tmp_path, program, names):
    """Builds a program as the Makefile does and starts it without LD_LIBRARY_PATH."""
    libs = " ".join(found[n] for n in names).replace("-Xlinker ", "-Wl,").split()
    flags = [f for n in names for f in found[n.replace("LIBS", "FLAGS")].split() if f.startswith("-I")]
    (tmp_path / "start.cc").write_text(program)
    done = subprocess.run(["g++", *flags, tmp_path / "start.cc", "-o", tmp_path / "start", *libs], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    return subprocess.run([tmp_path / "start"], env=env).returncode == 0


USES_BOTH = ("#include <cublasLt.h>\n#include <cudnn.h>\n"
             "int main() { return cublasLtGetVersion() != 991000 || cudnnGetVersion() != 90200; }")


def test_probe_finds_a_toolkit_by_CUDA_HOME_and_cudnn_by_CUDNN_HOME(tmp_path):
    fake_cuda(tmp_path / "cuda")
    fake_cublas(tmp_path / "cuda", "libcublasLt.so")
    fake_cudnn(tmp_path / "cudnn", "libcudnn.so", "lib64")
    fake_nccl(tmp_path / "nccl", "libnccl.so")
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        found = probed(CUDA_HOME=tmp_path / "cuda", NCCL_HOME=tmp_path / "nccl", MPICC="mpicc",
                       **{name: tmp_path / "cudnn"})
        assert found["PROBE_CUDA"].startswith(
            f" 99.1 by {tmp_path}/cuda/bin/nvcc, cuBLAS in {tmp_path}/cuda/lib, sm 90")
        assert found["PROBE_CUDNN"] == f" found in {tmp_path}/cudnn/lib64"
        assert found["PROBE_NCCL"] in (f" found in {tmp_path}/nccl/lib",
                                       " not used: without MPI the GPU programs train in one process")
        assert starts(found, tmp_path, USES_BOTH, ["CUBLAS_LIBS", "CUDNN_LIBS"])


def test_make_says_why_there_is_no_gpu_program(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "scripts/probe"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    (tmp_path / "train_gpt_dense.cu").write_text("")
    done = subprocess.run(["make", "train_gpt_dense"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "NVCC": "none", "MPICC": "none"})
    assert done.returncode and re.search('CUDA not built: none is of CUDA "".*Stop', done.stderr), done.stderr


@pytest.mark.parametrize("target", ["test", "test-mpi", "test-gpu"])
def test_make_installs_what_its_tests_need(tmp_path, target):
    """On a clean clone, before it looks at what the machine has; for the GPU's tests, whose references may have been brought
    along, only where they and PyTorch are missing, and they go on without."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "scripts/gpus"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    for name, status in (("scripts/setup", int(target == "test-gpu")), ("scripts/probe", 0), ("dev/run_tests", 0), ("dev/run_gpu_tests", 0),
                         ("nvidia-smi", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\nexit {status}\n')
        (tmp_path / name).chmod(0o755)

    def calls():
        (tmp_path / "calls").write_text("")
        env = {k: v for k, v in os.environ.items() if "MAKE" not in k}
        done = subprocess.run(["make", target, "CPU_TRAINERS=", "CPU_TESTS=", "GPU_TRAINERS=", "GPU_TESTS="], cwd=tmp_path, text=True,
                              capture_output=True, env=dict(env, PATH=f"{tmp_path}:{env['PATH']}"))
        assert done.returncode == 0, done.stderr
        return [line.rstrip() for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("nvidia-smi")]

    end = {"test": "dev/run_tests", "test-mpi": "dev/run_tests mpi", "test-gpu": "dev/run_gpu_tests"}[target]
    assert calls() == ["scripts/setup test", "scripts/probe", end]
    if target == "test-gpu":
        (tmp_path / "build" / "oracle").mkdir()
        (tmp_path / "build" / "oracle" / "deep.bin").touch()
        assert calls() == ["scripts/probe", end]


def test_several_makes_at_once_see_the_same_machine(tmp_path):
    """Each looks for itself; what they found is whole and, unchanged, keeps its time, so that nothing is built again."""
    shutil.copy(os.path.join(ROOT, "Makefile"), tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "probe").write_text("#!/bin/sh\necho PROBE_BLAS = a\nsleep 0.$(($$ % 5 + 1))\necho PROBE_MPI = b\n")
    (tmp_path / "scripts" / "probe").chmod(0o755)
    command = ["make", "found", "PYTHON=python3"]
    env = {k: v for k, v in os.environ.items() if "MAKE" not in k}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    found = tmp_path / "build" / "config.mk"
    before = found.stat().st_mtime_ns
    makes = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL) for _ in range(6) if not time.sleep(0.1)]
    assert [make.wait() for make in makes] == [0] * 6
    assert found.read_text() == "PROBE_BLAS = a\nPROBE_MPI = b\n" and found.stat().st_mtime_ns == before
    assert os.listdir(tmp_path / "build") == ["config.mk"]


def test_make_in_a_folder_of_somebody_else():
    """One line says what to do, whatever the target; make help needs no more than to be read."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is nobody else's to enter
        shutil.copy(os.path.join(ROOT, "Makefile"), folder)
        os.chmod(folder, 0o555)
        other = dict(user=65534) if os.getuid() == 0 else {}
        for target in ("all", "quickstart", "test"):
            done = subprocess.run(["make", target], cwd=folder, capture_output=True, text=True, **other)
            assert done.returncode and re.fullmatch(
                f"Makefile:.*this user may not write to {folder}, .* take a copy of your own.  Stop.\n", done.stderr)
        assert subprocess.run(["make", "help"], cwd=folder, stdout=subprocess.DEVNULL, **other).returncode == 0


def test_probe_finds_pips_wheels(tmp_path):
    """They have only .so.9 and the like, and lie in the site-packages of the Python that is found first."""
    site = tmp_path / "site" / "nvidia"
    fake_cuda(site / "cu99")
    fake_cublas(site / "cu99", "libcublasLt.so.99")
    fake_cudnn(site / "cudnn", "libcudnn.so.9")
    found = probed(PYTHONPATH=tmp_path / "site", NVCC=site / "cu99" / "bin" / "nvcc", cwd=tmp_path)
    assert found["PROBE_CUDNN"] == f" found in {site}/cudnn/lib"
    assert found["CUDNN_LIBS"] == f" -L{site}/cudnn/lib -l:libcudnn.so.9 -Xlinker -rpath,{site}/cudnn/lib"
    assert starts(found, tmp_path, USES_BOTH, ["CUBLAS_LIBS", "CUDNN_LIBS"])


def test_probe_finds_condas_layout(tmp_path):
    env = tmp_path / "env"
    fake_cuda(env)
    (env / "include" / "cuda_runtime.h").unlink()
    target = env / "targets" / "x86_64-linux"
    header(target / "include" / "cuda_runtime.h")
    fake_cublas(target, "libcublasLt.so")
    fake_cudnn(env, "libcudnn.so")
    found = probed(CONDA_PREFIX=env, PATH=f"{env}/bin:{os.environ['PATH']}")
    assert found["PROBE_CUDNN"] == f" found in {env}/lib" and f"cuBLAS in {target}/lib, sm" in found["PROBE_CUDA"]
    assert starts(found, tmp_path, USES_BOTH, ["CUBLAS_LIBS", "CUDNN_LIBS"])


def test_probe_says_why_a_library_will_not_do(tmp_path):
    cuda = tmp_path / "cuda"
    fake_cuda(cuda)
    assert "no <cublasLt.h> with -lcublasLt" in probed(CUDA_HOME=cuda)["PROBE_CUDA"] or \
        "libcublasLt.so of the system does not start, or is not for CUDA 99" in probed(CUDA_HOME=cuda)["PROBE_CUDA"]
    fake_cublas(cuda, "libcublasLt.so")
    for wrong in (dict(cudart=12040), dict(version=8900)):  # of another CUDA; too old
        fake_cudnn(tmp_path / "cudnn", "libcudnn.so", **wrong)
        found = probed(CUDA_HOME=cuda, CUDNN_HOME=tmp_path / "cudnn")
        assert found["PROBE_CUDA"].startswith(" not built: ") and "pip install nvidia-cudnn-cu99" in found["PROBE_CUDA"]
        assert "is not for CUDA 99" in found["PROBE_CUDA"] and "NVCC" not in found
    fake_cuda(tmp_path / "old", "12.3")
    assert 'old/bin/nvcc is of CUDA "12.3"; 12.4 or newer' in probed(CUDA_HOME=tmp_path / "old")["PROBE_CUDA"]


def test_probe_names_a_path_with_a_space(tmp_path):
    """Of pip's wheels in a folder such as "my work", be it the compiler or a library."""
    site = tmp_path / "my work" / "nvidia"
    fake_cuda(site / "cu99")
    fake_cudnn(site / "cudnn", "libcudnn.so.9")
    end = " is a path with a space, which the options of compilers cannot name"
    wheels = dict(PYTHONPATH=site.parent, cwd=tmp_path, NVCC="", PATH="/usr/bin:/bin")
    if not shutil.which("nvcc", path="/usr/bin:/bin:/usr/local/cuda/bin"):
        assert probed(**wheels)["PROBE_CUDA"] == f" not built: {site}/cu99/bin/nvcc{end}"
    assert probed(**dict(wheels, CUDA_HOME=site / "cu99"))["PROBE_CUDA"] == f" not built: {site}/cu99/bin/nvcc{end}"
    fake_cuda(tmp_path / "cuda")
    fake_cublas(tmp_path / "cuda", "libcublasLt.so")
    assert f"{site}/cudnn{end} (install" in probed(**dict(wheels, CUDA_HOME=tmp_path / "cuda"))["PROBE_CUDA"]


@pytest.mark.parametrize("name", ["compare", "export_hf", "import_hf", "export_llmc", "export_gguf"])
def test_scripts_start_as_commands(tmp_path, name):
    help_text = subprocess.run([os.path.join(SCRIPTS, name), "--help"], capture_output=True, text=True, cwd=tmp_path,
                               env=dict(os.environ, PATH=os.path.dirname(sys.executable) + ":" + os.environ["PATH"]))
    assert help_text.returncode == 0 and "usage: " + name in help_text.stdout


def test_a_reader_that_leaves_ends_a_script_quietly(tmp_path):
    runs = [write_log(tmp_path / "lh", first_events()), write_log(tmp_path / "dense", dense_events())]
    for command in (["compare", *runs], ["predict_scaling"],
                    ["bench", "page", os.path.join(ROOT, "dev/logs/h200/bench.jsonl")],
                    ["bench_scaling", "page", os.path.join(ROOT, "dev/logs/h200/scaling.jsonl")]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, os.path.join(SCRIPTS, command[0]), *command[1:]], stdout=write,
                              stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert (done.returncode, done.stderr) == (-signal.SIGPIPE, ""), command


@pytest.mark.parametrize("name", ["gpu_parity.py", "gpu_ranks.py"])
def test_gpu_programs_help_without_a_gpu(name):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "dev", name), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Proves on ") and f"usage: dev/{name}" in done.stdout


def test_gpu_ranks_without_nvidia_smi(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "dev", "gpu_ranks.py")], capture_output=True, text=True,
                          env=dict(os.environ, PATH=str(tmp_path)))
    assert done.returncode == 1 and done.stderr.startswith("error: nvidia-smi is not there: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["export_hf", "import_hf", "export_llmc"])
def test_a_python_without_numpy_is_told_which_has_it(tmp_path, name):
    done = subprocess.run([sys.executable, "-S", os.path.join(SCRIPTS, name), "a", "b"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name}: ") and "has no numpy: call it as .venv/bin/python scripts/" in done.stderr
