"""A CPU-only torch that believes in one CUDA device, enough for fake tensors: tensors that have a
shape, a type and a device, but no numbers. A tensor on the wrong device raises, torch's rules of
which attention kernel runs are followed (those of torch 2.13), and kernels and bytes are counted.

Needs g++, once: guard.cpp becomes a library in the folder for temporary files. Import this before
spiral. What it changes in torch stays changed: run it in a process of its own."""

import ctypes
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

TORCH = Path(importlib.util.find_spec("torch").origin).parent / "lib"
GUARD = Path(tempfile.gettempdir(), f"spiral_guard_{os.getuid()}.so")
if not GUARD.exists() or GUARD.stat().st_mtime < (HERE / "guard.cpp").stat().st_mtime:
    aside = GUARD.with_suffix(f".{os.getpid()}")
    subprocess.run(["sh", str(HERE / "build.sh"), sys.executable, str(aside)], check=True)
    os.replace(aside, GUARD)
for name in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"):
    if (TORCH / name).exists():
        ctypes.CDLL(str(TORCH / name), ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(GUARD), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch.nn.attention.bias as bias  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import spiral  # noqa: E402

torch.set_num_threads(1)
fake = FakeTensorMode()
CHOSEN = Counter()  # attention kernels: flash, efficient, or math, which stores all scores


class Parameters:
    """What torch's C++ code asks about a call of attention."""

    def __init__(self, query, key, value, mask, dropout, is_causal, enable_gqa):
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.is_causal, self.grouped = is_causal, enable_gqa


def common(p, grouped_is_fine):
    fine = p.query.is_cuda and p.query.dim() == p.key.dim() == 4
    fine &= p.query.shape[-2] > 0 and p.key.shape[-2] > 0
    fine &= p.query.stride(-1) == p.key.stride(-1) == p.value.stride(-1) == 1
    if p.grouped and grouped_is_fine:
        return fine and p.query.shape[1] % p.key.shape[1] == 0
    return fine and p.query.shape[1] == p.key.shape[1]


def flash(p, debug=False):
    fine = common(p, True) and p.mask is None and p.query.shape[-1] <= 256
    fine &= not (p.is_causal and p.query.shape[-2] != p.key.shape[-2])
    return fine and p.query.dtype in (torch.float16, torch.bfloat16)


def efficient(p, debug=False):
    multiple = 4 if p.query.dtype == torch.float32 else 8
    return common(p, False) and p.query.shape[-1] % multiple == 0


bias.SDPAParams = Parameters
bias.can_use_flash_attention, bias.can_use_efficient_attention = flash, efficient


class LowerRight:
    """For causal_lower_right, whose tensor subclass has no fake."""

    def __init__(self, queries, keys):
        self.variant = bias.CausalVariant.LOWER_RIGHT
        self.seq_len_q, self.seq_len_kv = queries, keys

    def _materialize(self, device):
        ones = torch.ones(self.seq_len_q, self.seq_len_kv, dtype=torch.bool, device=device)
        return ones.tril(self.seq_len_kv - self.seq_len_q)


def attention(query, key, value, mask=None, is_causal=False, scale=None, enable_gqa=False, **other):
    mask = other.get("attn_mask", mask)
    if isinstance(mask, LowerRight):
        CHOSEN["lower right"] += 1
        return bias.CausalBias._dispatch(query, key, value, mask, 0.0, False, scale, enable_gqa)
    p = Parameters(query, key, value, mask, 0.0, is_causal, enable_gqa)
    if flash(p):
        CHOSEN["flash"] += 1
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
    if efficient(p):
        CHOSEN["efficient"] += 1
        needs_sums = torch.is_grad_enabled() and query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_sums, 0.0, is_causal, scale=scale
        )[0]
    CHOSEN["math" if query.shape[-2] else "nothing"] += 1  # a prompt of one token leaves nothing
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = query @ key.mT * scale
    if mask is not None:
        weights = weights + torch.zeros_like(mask, dtype=query.dtype)
    return weights.softmax(-1) @ value


F.scaled_dot_product_attention = attention
spiral.causal_lower_right = LowerRight
torch.cuda.graph_pool_handle = lambda: (0, 1)
real_tensor = torch.tensor


def tensor(values, **options):
    """A mask would choose as many places as it has ones, and fakes have none: their places do."""
    if isinstance(values, list) and values and isinstance(values[0], bool):
        values = [place for place, chosen in enumerate(values) if chosen]
    return real_tensor(values, **options)


torch.tensor = tensor


def efficient_backward(grad, query, key, value, mask, out, *rest, **options):
    empty = torch.empty((), device=query.device)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), empty


library = torch.library.Library("aten", "IMPL")
library.impl("_efficient_attention_backward", efficient_backward, "Meta", allow_override=True)


# ---- Counting ----

Kernel = namedtuple("Kernel", "name read written flops dtype shape")  # read, written: bytes
VIEWS = "detach alias _unsafe_view view _reshape_alias lift_fresh split unbind".split()
EMPTY = "empty empty_like new_empty empty_strided new_empty_strided".split()
GATHERS = "index embedding gather searchsorted".split()  # read as much as they write


def size(tensor):
    """Bytes, of expanded dimensions once."""
    number = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        number *= length if stride else 1
    return number


class Meter(TorchDispatchMode):
    """kernels: all that run. With memory=True, peak: the most bytes on the device at once, made
    while it counts."""

    def __init__(self, memory=False):
        super().__init__()
        self.memory, self.kernels, self.live, self.peak, self.storages = memory, [], 0, 0, {}
        self.at = ""

    def track(self, tensor, name):
        storage = tensor.untyped_storage()
        key, number = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.storages:
            return
        self.storages[key] = number
        self.live += number
        if self.live > self.peak:
            self.peak, self.at = self.live, name

        def gone():
            self.live -= number
            self.storages.pop(key, None)

        weakref.finalize(storage, gone)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "prim":
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        name, schema = function.__name__.split(".")[0], function._schema
        aliases = [r.alias_info is not None and not r.alias_info.is_write for r in schema.returns]
        changed = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if self.memory:
            for tensor in inputs:
                if tensor.is_cuda:
                    self.storages.setdefault(tensor.untyped_storage()._cdata, 0)
            for tensor in outputs:
                if tensor.is_cuda:
                    self.track(tensor, name)
        is_view = (aliases and all(aliases)) or name in VIEWS
        if (is_view and not changed) or name in EMPTY:
            return out

        read = sum(size(t) for t in inputs if t.is_cuda)
        written = 0 if changed else sum(size(t) for t in outputs if t.is_cuda)
        if name == "index_put_":
            read = written = size(inputs[-1])
        if name == "copy_":
            read, written = size(args[1]), size(args[0])
        if name in GATHERS:
            read = written = size(outputs[0])
        if name in ("fill_", "zero_"):
            read, written = 0, size(args[0])
        flops = 0
        if name in ("mm", "bmm", "addmm"):
            x, y = inputs[1:3] if name == "addmm" else inputs[:2]
            flops = 2 * x.numel() * y.shape[-1]
        dtype = str(inputs[0].dtype) if inputs else ""
        shape = tuple(outputs[0].shape) if outputs else ()
        self.kernels.append(Kernel(name, read, written, flops, dtype, shape))
        return out


# ---- Policies of fake tensors ----

QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
MODELS = {
    "tiny": {
        "vocab_size": 1275,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen3-4b": {
        **QWEN,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def settings_of(name, **changes):
    kind = transformers.Qwen2Config if name.startswith("qwen2") else transformers.Qwen3Config
    return kind(**{**MODELS[name], **changes})


def fuse(model):
    """As experiments/fused.py does on a GPU, if spiral.load_model() asks for it. An emulated
    rms_norm falls apart into what fuses on a card: layer_norm, which doesn't, stands in for it."""
    if "fused" not in inspect.getsource(spiral.load_model):
        return
    from experiments import fused

    fused.fuse(model)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            options = {**module.forward.keywords}
            module.forward = partial(F.layer_norm, **options)


class Ends:
    eos_ids = {0}


def make_policy(settings, dtype, lora_rank=0, checkpointing=False, gigabytes=1.0):
    """As spiral.load_policy() makes it, but of fake tensors on the fake device. Under `fake`."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            settings, attn_implementation="spiral", dtype=dtype
        )
    if lora_rank:
        import peft.tuners.tuners_utils as utils
        from peft import LoraConfig

        # peft moves new adapters with `.to`, which fake parameters refuse: they are made in place
        utils.BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *_, **__: None
        moves, torch.nn.Module.to = torch.nn.Module.to, lambda self, *_, **__: self
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            model.add_adapter(
                LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
            )
        torch.set_default_dtype(torch.float32)
        torch.nn.Module.to = moves
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or not lora_rank
    fuse(model)
    model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in model.modules():
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    return spiral.Policy(model, Ends(), spiral.Memory(model, gigabytes))
