"""Reads and writes the trainer's model files, weights inside checkpoints, safetensors and tokenizer files.

A model file is llm.c's: a header of 256 int32, then the tensors one after the other, everything little-endian.
Versions 3 (fp32) and 5 (bf16) hold learned positions; 103 (fp32) and 105 (bf16) are ours for RoPE and have no wpe.
In memory a bf16 tensor is a numpy uint16 array of its bits. Files are mapped, not read, so size is no concern.
"""
from __future__ import annotations

import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

try:
    import numpy as np
except ImportError:
    sys.exit(f"{os.path.basename(sys.argv[0])}: {sys.executable} has no numpy: call it as .venv/bin/python "
             "scripts/..., which scripts/setup makes")

MODEL_MAGIC = 20240326
CHECKPOINT_MAGIC = 20260511
CHECKPOINT_VERSION = 3
TOKENIZER_MAGIC = 20240328
HEADER_BYTES = 1024
CHECKPOINT_HEADER_BYTES = 4096
CHUNK_BYTES = 16 << 20  # a checkpoint has a checksum of so much of its body each
OTHER_MAGICS = {20240520: "a token shard", 20240801: "a wide token shard", TOKENIZER_MAGIC: "a tokenizer file"}
VERSIONS = {3: ("learned", "float32"), 5: ("learned", "bfloat16"), 103: ("rope", "float32"), 105: ("rope", "bfloat16")}
STORAGE = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
# The type names of a safetensors header; a bf16 tensor is read as its bits.
SAFETENSORS_TYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class FileError(Exception):
    """A file that is not what it should be; the message names the file, the value found and the value wanted."""


@dataclass(frozen=True)
class ModelConfig:
    positions: str           # "learned" or "rope"
    max_seq_len: int         # rows of wpe, or the T that a RoPE model was trained at
    vocab_size: int          # V
    padded_vocab_size: int   # Vp, rows of wte
    num_layers: int
    num_heads: int
    channels: int
    dtype: str = "float32"   # of the file: "float32" or "bfloat16"
    rope_theta: float = 0.0  # RoPE only
    step: int = 0            # updates done, 0 if unknown
    eot: int | None = None   # the id of the end of text, where import_hf knew it; the trainer does not

    @property
    def head_size(self):
        return self.channels // self.num_heads

    def version(self):
        return next(v for v, kind in VERSIONS.items() if kind == (self.positions, self.dtype))

    def describe(self):
        positions = "learned positions" if self.positions == "learned" else f"RoPE (theta {self.rope_theta:g})"
        return (f"{self.num_layers} layers, {self.channels} channels, {self.num_heads} heads, vocabulary "
                f"{self.vocab_size} (padded {self.padded_vocab_size}), {positions}, T = {self.max_seq_len}, "
                f"{parameter_count(self):,} parameters, {self.dtype}" + (f", step {self.step}" if self.step else ""))


def tensor_shapes(config):
    """Names and shapes in file order."""
    L, C, Vp = config.num_layers, config.channels, config.padded_vocab_size
    shapes = [("wte", (Vp, C)), ("wpe", (config.max_seq_len, C)), ("ln1w", (L, C)), ("ln1b", (L, C)),
              ("qkvw", (L, 3 * C, C)), ("qkvb", (L, 3 * C)), ("attprojw", (L, C, C)), ("attprojb", (L, C)),
              ("ln2w", (L, C)), ("ln2b", (L, C)), ("fcw", (L, 4 * C, C)), ("fcb", (L, 4 * C)),
              ("fcprojw", (L, C, 4 * C)), ("fcprojb", (L, C)), ("lnfw", (C,)), ("lnfb", (C,))]
    return [s for s in shapes if s[0] != "wpe" or config.positions == "learned"]


def parameter_count(config):
    return sum(math.prod(shape) for _, shape in tensor_shapes(config))


# ---- bf16 ---------------------------------------------------------------------------------------------------------

def to_bfloat16(x):
    """The bits of x rounded to bf16, ties to even. A NaN stays a NaN, where plain rounding could make it infinite."""
    if x.dtype == STORAGE["bfloat16"]:
        return x
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded >> 16).astype("<u2")


def to_float32(x):
    if x.dtype == STORAGE["bfloat16"]:
        return (x.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):  # of a double that is too large: import_hf looks for infinities
        return np.asarray(x, "<f4")


def to_dtype(x, dtype):
    return to_float32(x) if dtype == "float32" else to_bfloat16(x)


@contextmanager
def new_file(path):
    """A file to write that takes its name only when it is whole."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as f:
            yield f
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror}")
    except ValueError as e:
        raise FileError(f"{path}: this is not JSON: {e}")


# ---- model files and checkpoints ----------------------------------------------------------------------------------

def pack_header(config):
    header = np.zeros(256, "<i4")
    header[:8] = [MODEL_MAGIC, config.version(), config.max_seq_len, config.vocab_size, config.num_layers,
                  config.num_heads, config.channels, config.padded_vocab_size]
    if config.positions == "rope":
        header[8] = np.array(config.rope_theta, "<f4").view("<i4")
    header[9] = config.step
    header[12] = 0 if config.eot is None else config.eot + 1  # 10 and 11 are the trainer's checksum
    return header.tobytes()


def unpack_header(raw, name):
    header = np.frombuffer(raw, "<i4")
    if header[0] != MODEL_MAGIC:
        kind = OTHER_MAGICS.get(int(header[0]))
        raise FileError(f"{name}: the first word is {header[0]}" + (f" ({kind})" if kind else "") +
                        f", a model file begins with {MODEL_MAGIC}, a checkpoint with {CHECKPOINT_MAGIC}")
    if int(header[1]) not in VERSIONS:
        raise FileError(f"{name}: the version is {header[1]}, wanted 3 or 5 (learned positions, fp32 or bf16) or "
                        "103 or 105 (RoPE, fp32 or bf16)")
    positions, dtype = VERSIONS[int(header[1])]
    max_T, V, L, H, C, Vp = (int(x) for x in header[2:8])
    for what, value in (("sequence length", max_T), ("vocabulary", V), ("number of layers", L),
                        ("number of heads", H), ("number of channels", C)):
        if value < 1:
            raise FileError(f"{name}: the {what} is {value}, wanted at least 1")
    if Vp < V:
        raise FileError(f"{name}: the padded vocabulary is {Vp}, wanted at least the vocabulary, {V}")
    if C % H:
        raise FileError(f"{name}: {C} channels are not divisible by {H} heads")
    theta = 0.0
    if positions == "rope":
        theta = float(header[8:9].view("<f4")[0])
        if not (math.isfinite(theta) and theta > 0):
            raise FileError(f"{name}: the RoPE theta is {theta}, wanted a positive number")
        if (C // H) % 2:
            raise FileError(f"{name}: the head size is {C // H}, RoPE wants an even one")
    if not 0 <= header[12] <= V:
        raise FileError(f"{name}: the end-of-text id is {header[12] - 1}, wanted -1 (unknown) to {V - 1}")
    return ModelConfig(positions, max_T, V, Vp, L, H, C, dtype, theta, int(header[9]),
                       int(header[12]) - 1 if header[12] else None)


def read_model(path):
    """(config, {name: mapped array}) of a model file, or of the weights inside a checkpoint."""
    if os.path.isdir(path):
        raise FileError(f"{path}: this is a folder, wanted a model file or a checkpoint")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(CHECKPOINT_HEADER_BYTES)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror}")
    if len(head) < HEADER_BYTES:
        raise FileError(f"{path}: the size is {size} bytes, wanted at least a header of {HEADER_BYTES}")
    if int(np.frombuffer(head[:4], "<i4")[0]) == CHECKPOINT_MAGIC:
        config, offset = unpack_checkpoint(head, path, size)
        wanted, exact = offset + 4 * parameter_count(config), False  # the optimizer's state may follow
    else:
        config, offset = unpack_header(head[:HEADER_BYTES], path), HEADER_BYTES
        wanted, exact = offset + parameter_count(config) * STORAGE[config.dtype].itemsize, True
    if size < wanted or (exact and size != wanted):
        raise FileError(f"{path}: the size is {size} bytes, wanted {'' if exact else 'at least '}{wanted} "
                        f"({config.describe()}): " + ("the file is cut off" if size < wanted else "it is too long"))
    if not exact:
        check_weights(path, head, offset, parameter_count(config))
    elif config.dtype == "float32" and any(head[40:48]):  # other programs write no checksum
        words = np.memmap(path, "<u4", "r", offset)
        sums = [chunk_sum(words[at:at + CHUNK_BYTES // 4]) for at in range(0, len(words), CHUNK_BYTES // 4)]
        if checksum(np.array(sums, "<u8").tobytes()) | 1 != int.from_bytes(head[40:48], "little"):
            raise FileError(f"{path} is damaged: wrong checksum of the weights")
    tensors, storage = {}, STORAGE[config.dtype]
    for name, shape in tensor_shapes(config):
        tensors[name] = np.memmap(path, storage, "r", offset, shape)
        offset += tensors[name].nbytes
    return config, tensors


def unpack_checkpoint(head, path, size):
    """The model's config and the offset of its fp32 weights."""
    if len(head) < CHECKPOINT_HEADER_BYTES:
        raise FileError(f"{path}: the size is {len(head)} bytes, a checkpoint has a header of "
                        f"{CHECKPOINT_HEADER_BYTES}: the file is cut off")
    version = int(np.frombuffer(head[4:8], "<i4")[0])
    if version != CHECKPOINT_VERSION:
        raise FileError(f"{path}: the checkpoint's version is {version}, wanted {CHECKPOINT_VERSION}")
    if checksum(head[:-8]) != int.from_bytes(head[-8:], "little"):
        raise FileError(f"{path} is damaged: wrong checksum of the header")
    file_bytes = int.from_bytes(head[2064:2072], "little")
    if size != file_bytes:
        raise FileError(f"{path}: {size} bytes, but one of its header's sizes has {file_bytes}: it is cut, or of another "
                        "program")
    config = unpack_header(head[1024:2048], f"{path} (model header inside the checkpoint)")
    if config.dtype != "float32":
        raise FileError(f"{path}: the model header inside the checkpoint has version {config.version()}, wanted 3 "
                        "or 103: a checkpoint's weights are fp32")
    offset, count = (int(x) for x in np.frombuffer(head[2048:2064], "<i8"))
    if count != parameter_count(config):
        raise FileError(f"{path}: the checkpoint has {count} weights, wanted {parameter_count(config)} for "
                        f"{config.describe()}")
    if offset < CHECKPOINT_HEADER_BYTES:
        raise FileError(f"{path}: the weights begin at byte {offset}, wanted at least {CHECKPOINT_HEADER_BYTES}, "
                        "the size of the header")
    return config, offset


def checksum(data):
    """The trainer's: FNV-1a over 8-byte words; the data is a multiple of them."""
    h = 14695981039346656037
    for word in np.frombuffer(data, "<u8").tolist():
        h = (h ^ word) * 1099511628211 % 2 ** 64
    return h ^ (h >> 32)


def chunk_sum(words):
    """The trainer's add_to_sums for a chunk: the sum of mix64(word | place << 32), by parts that stay in the cache."""
    total, part = 0, 1 << 15
    shift, high = [np.uint64(x) for x in (30, 27, 31)], np.arange(part, dtype="<u8") << np.uint64(32)
    for at in range(0, len(words), part):
        x = words[at:at + part].astype("<u8")
        x += high[:len(x)] + np.uint64((at << 32) + 0x9E3779B97F4A7C15)
        x = (x ^ (x >> shift[0])) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> shift[1])) * np.uint64(0x94D049BB133111EB)
        total += int((x ^ (x >> shift[2])).sum())
    return total % 2 ** 64


def check_weights(path, head, offset, count):
    """Compares the checksums of a checkpoint's weights, as the trainer does before it reads them."""
    file_bytes, state_bytes, chunks, state_checksum = (int(x) for x in np.frombuffer(head[2064:2096], "<u8"))
    with open(path, "rb") as f:
        f.seek(CHECKPOINT_HEADER_BYTES)
        front = f.read(state_bytes + 8 * chunks)
    if checksum(front) != state_checksum:
        raise FileError(f"{path} is damaged: wrong checksum of the run's state")
    sums, body = np.frombuffer(front[state_bytes:], "<u8"), np.memmap(path, "<u4", "r", offset)
    for chunk in range(-(-4 * count // CHUNK_BYTES)):
        words = body[chunk * CHUNK_BYTES // 4:(chunk + 1) * CHUNK_BYTES // 4]
        if chunk_sum(words) != int(sums[chunk]):
            at = offset + chunk * CHUNK_BYTES
            raise FileError(f"{path} is damaged: wrong checksum of bytes {at} to {min(at + CHUNK_BYTES, file_bytes)}")


def write_model(path, config, tensors):
    """Writes pairs of name and array, which come in file order, in config.dtype."""
    tensors = iter(tensors)
    with new_file(path) as f:
        f.write(pack_header(config))
        for wanted, shape in tensor_shapes(config):
            name, array = next(tensors, ("nothing", np.empty(0)))
            if name != wanted or array.shape != shape:
                raise FileError(f"{path}: {name} {array.shape} comes where tensor {wanted} {shape} belongs")
            f.write(np.ascontiguousarray(to_dtype(array, config.dtype)).data)


# ---- safetensors --------------------------------------------------------------------------------------------------
# The format is a uint64 header size, a JSON header and the tensors; written here so that bf16 needs no other package.

def write_safetensors(path, tensors, dtype):
    """tensors: (name, shape, array whose elements in C order are the tensor's). Views are made solid one at a time."""
    itemsize, offset, header = STORAGE[dtype].itemsize, 0, {"__metadata__": {"format": "pt"}}
    for name, shape, array in tensors:
        end = offset + array.size * itemsize
        header[name] = {"dtype": "F32" if dtype == "float32" else "BF16", "shape": list(shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with new_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, array in tensors:
            f.write(np.ascontiguousarray(to_dtype(array, dtype)).data)


def read_safetensors(path):
    """{name: mapped array}, or the name of its type for a tensor of another than SAFETENSORS_TYPES."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            raw = f.read(8)
            length = int.from_bytes(raw, "little")
            if len(raw) < 8 or length > min(size - 8, 100 << 20):
                raise FileError(f"{path}: not a safetensors file, or cut off: its header says {length} bytes, the "
                                f"file has {size}")
            header = json.loads(f.read(length))
    except OSError as e:
        raise FileError(f"{path}: {e.strerror}")
    except ValueError as e:
        raise FileError(f"{path}: the safetensors header is not JSON: {e}")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise FileError(f"{path}: the safetensors header says of tensor {name}: {entry}")
        storage = SAFETENSORS_TYPES.get(kind)
        if storage is None:
            tensors[name] = kind  # a mask stored as U8, say, which nobody needs
            continue
        if end - begin != math.prod(shape) * storage.itemsize or begin < 0 or 8 + length + end > size:
            raise FileError(f"{path}: tensor {name} {tuple(shape)} of type {kind} lies at bytes {begin} to "
                            f"{end} of {size - 8 - length}: the file is damaged or cut off")
        if end == begin:
            tensors[name] = np.zeros(shape, storage)
        else:
            tensors[name] = np.memmap(path, storage, "r", 8 + length + begin, tuple(shape))
    return tensors


# ---- tokenizer files ----------------------------------------------------------------------------------------------

def read_tokenizer(path):
    """(list of the tokens' bytes, end-of-text id)."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
    except OSError as e:
        raise FileError(f"{path}: {e.strerror}")
    if len(raw) < HEADER_BYTES:
        raise FileError(f"{path}: the size is {len(raw)} bytes, wanted at least a header of {HEADER_BYTES}")
    magic, version, count, eot = (int(x) for x in np.frombuffer(raw[:16], "<i4"))
    if magic != TOKENIZER_MAGIC or version != 2:
        raise FileError(f"{path}: the first words are {magic} {version}, a tokenizer file begins with "
                        f"{TOKENIZER_MAGIC} 2")
    if not 0 <= eot < count:
        raise FileError(f"{path}: the end-of-text id is {eot}, wanted 0 to {count - 1}")
    tokens, at = [], HEADER_BYTES
    for _ in range(count):
        if at >= len(raw) or at + 1 + raw[at] > len(raw):
            raise FileError(f"{path}: token {len(tokens)} of {count} is cut off")
        tokens.append(raw[at + 1:at + 1 + raw[at]])
        at += 1 + raw[at]
    if at != len(raw):
        raise FileError(f"{path}: the size is {len(raw)} bytes, wanted {at}: it is too long")
    return tokens, eot
