"""A small model of nanochat's, and its files as `torch.save` and `pickle` write them, made without PyTorch."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

from tests.export import golden

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}
SIZES = {"sequence_len": 64, "vocab_size": 290, "n_layer": 2, "n_head": 1, "n_kv_head": 1, "n_embd": 128}


def weights(padding=0) -> dict[str, np.ndarray]:
    """The weights of a model of `SIZES` with random numbers, [out, in], as nanochat calls them."""
    random, width, rows = np.random.RandomState(1), SIZES["n_embd"], SIZES["vocab_size"] + padding
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for i in range(SIZES["n_layer"]):
        shapes |= {f"transformer.h.{i}.attn.c_{part}.weight": (width, width) for part in ("q", "k", "v", "proj")}
        shapes[f"transformer.h.{i}.mlp.c_fc.weight"] = (4 * width, width)
        shapes[f"transformer.h.{i}.mlp.c_proj.weight"] = (width, 4 * width)
    return {name: random.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def parameters(arrays):
    """jaxchat's parameters of these weights: kernels are [in, out], and the vocabulary has 384 rows."""

    def padded(name):
        rows = arrays[name][:290].astype(np.float32)
        return np.concatenate([rows, np.zeros((94, 128), np.float32)])

    def block(i):
        names = {name: f"transformer.h.{i}.attn.c_{'proj' if name == 'o' else name}.weight" for name in "qkvo"}
        attn = {name: {"kernel": arrays[there].T} for name, there in names.items()}
        mlp = {name: arrays[f"transformer.h.{i}.mlp.c_{there}.weight"].T for name, there in MLP.items()}
        return {"attn": attn, "mlp": {name: {"kernel": kernel} for name, kernel in mlp.items()}}

    return {
        "embed": {"embedding": padded("transformer.wte.weight")},
        "blocks": {str(i): block(i) for i in range(SIZES["n_layer"])},
        "head": {"kernel": padded("lm_head.weight").T},
    }


MLP = {"up": "fc", "down": "proj"}


def write_nanochat(folder, arrays=None, *, step=650, meta=None, tokenizer=True):
    """A folder of checkpoints, as on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder / f"model_{step:06}.pt", weights() if arrays is None else arrays)
    (folder / f"meta_{step:06}.json").write_text(json.dumps({"step": step, "model_config": SIZES, **(meta or {})}))
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(golden.tokenizer().to_tiktoken()))


# --- torch.save -------------------------------------------------------------------------------------------------------


def write_torch(path, arrays):
    """A state_dict of arrays. An array that is transposed in memory is one in the file."""
    data, names = bytearray(b"\x80\x02"), []
    data += named("collections", "OrderedDict") + b")R("
    for key, (name, array) in enumerate(arrays.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        data += text(name) + named("torch._utils", "_rebuild_tensor_v2") + b"("
        data += b"(" + text("storage") + named("torch", STORAGES[array.dtype]) + text(str(key)) + text("cuda:0")
        data += number(array.size) + b"tQ" + number(0) + numbers(array.shape) + numbers(strides) + b"\x89"
        data += named("collections", "OrderedDict") + b")RtR"
        names.append(array.tobytes("A"))
    data += b"u}" + text("_metadata") + b"}sb."
    write_archive(path, bytes(data), names)


def write_archive(path, data, storages=(), **compression):
    with zipfile.ZipFile(path, "w", **compression) as archive:
        archive.writestr(f"{path.stem}/data.pkl", data)
        archive.writestr(f"{path.stem}/byteorder", b"little")
        for key, storage in enumerate(storages):
            archive.writestr(f"{path.stem}/data/{key}", storage)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"
