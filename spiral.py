"""SPIRAL: Learning to Search and Aggregate (arXiv 2606.23595), in one file.

One language model pi does two jobs. It *searches*: for a problem x it samples N1 reasoning traces
y_1 .. y_N1 in parallel. And it *aggregates*: K sets G_1 .. G_K of n traces each are drawn, and for
each set it samples N2 final answers z_k1 .. z_kN2 that read the traces in it. A verifier gives each
answer a reward r_km of 0 or 1; the traces get none of their own. What is trained is

    J = E_{y_1..y_n ~ pi(.|x)} E_{z ~ pi(.|x, y_1..y_n)} [ r(x, z) ], whose gradient has two terms:

    E[ f(G) sum_{j in G} grad log pi(y_j|x) ]     search: how useful was the set that I was in?
    E[ r(x, z) grad log pi(z|x, G) ]              aggregation: was this answer right?

f(G) is the mean reward of the answers that read the set G. After the options and the loading of a
model the file follows the paper: sampling, sets and the prompt of an aggregation, advantages, the
update, the rollout, evaluation, training. Problems and verifiers are in tasks.py; what isn't the
method (printing, other kinds of credit) is imported from experiments/ where it is needed.

    python spiral.py                      # a tiny policy learns countdown, on a laptop
    python spiral.py --algo grpo          # the baseline: as many completions, all of them traces
    python spiral.py --model runs/spiral-countdown-0/step-00030 --ask "4 9 13 61"

Left out on purpose, to keep one idea visible: critic, reward model, KL term, paged cache,
asynchronous rollouts.
"""

import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import comb
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, signal
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tasks

# ---- Config: every field is a command line option, num_traces is --num-traces ----
# The lines of its docstring are the texts of --help, too


@dataclass
class Config:
    """algo: spiral, or grpo: traces alone, each by its own reward
    search_credit: set, as in the paper; curve, pass, trace: by the traces' own rewards (credits.py)
    search_weight: weight of the search term; at 1, with set credit, the update follows grad J
    published: the paper's self-inclusive baselines, and its scale, for set credit
    task: countdown, arithmetic, math, or with options "countdown:numbers=4,high=30"
    data: JSONL file with the problems of countdown or math; the README shows its rows
    model: tiny, which is shipped; a folder in Hugging Face format; or a hub id
    out: folder of the run, resumed if it holds one; default runs/ALGO-TASK-SEED
    seed: fixes problems, traces and sets

    num_traces: N1, search traces per problem
    set_size: n, traces in a set
    num_sets: K, sets per problem
    num_aggregations: N2, aggregation traces per set
    balanced: every trace is in equally many sets; --no-balanced: sets are drawn uniformly
    steps: training steps; 0: evaluate only
    problems: problems per step with an advantage that is not zero
    max_draws: a step draws at most max_draws * problems, and trains on what it has
    train_problems: how many there are to train on, shuffled anew each time through
    updates: optimizer updates per rollout; 1 is plain REINFORCE
    clip: of the importance ratio; matters with more than one update, or in bfloat16
    target_length: L_target, over which no advantage is positive; 0: off
    lr: learning rate of AdamW, constant after 5 steps of warm-up
    max_grad_norm: gradients are clipped to this norm
    temperature: of all sampling, and of the log-probs in the loss

    max_prompt_tokens: longest aggregation prompt; candidates are cut to fit
    max_trace_tokens: longest search trace
    max_aggregation_tokens: longest aggregation trace
    sampler_memory: gigabytes for the keys and values of sampling
    micro_batch_tokens: tokens per forward and backward pass
    gradient_checkpointing: less memory, more time
    dtype: of the weights; bfloat16 ones are trained through fp32 copies
    lora_rank: of new LoRA adapters; 0: all weights train, or the adapters of --model

    eval_problems: held-out problems of the table; 0: no evaluation
    eval_traces: traces per held-out problem
    eval_every: steps between evaluations; 0: only at the start and the end
    rsa_steps: steps of recursive self-aggregation, in the table and for --ask
    lattice: spread the traces of the table and of --ask, see draw_codes()
    save_every: steps between checkpoints, and between printed transcripts
    ask: answer this and stop: "4 9 13 61" to reach 61 with 4, 9 and 13
    """

    algo: Literal["spiral", "grpo"] = "spiral"
    search_credit: Literal["set", "curve", "pass", "trace"] = "set"
    search_weight: float = 0.2
    published: bool = False
    task: str = "countdown"
    data: str = ""
    model: str = "tiny"
    out: str = ""
    seed: int = 0

    num_traces: int = 8
    set_size: int = 4
    num_sets: int = 4
    num_aggregations: int = 4
    balanced: bool = True
    steps: int = 30
    problems: int = 16
    max_draws: int = 2
    train_problems: int = 8000
    updates: int = 1
    clip: float = 0.2
    target_length: int = 0
    lr: float = 1e-4
    max_grad_norm: float = 1.0
    temperature: float = 1.0

    max_prompt_tokens: int = 512
    max_trace_tokens: int = 24
    max_aggregation_tokens: int = 48
    sampler_memory: float = 0.5
    micro_batch_tokens: int = 4096
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 0

    eval_problems: int = 100
    eval_traces: int = 8
    eval_every: int = 0
    rsa_steps: int = 2
    lattice: bool = False
    save_every: int = 10
    ask: str = ""

    def __post_init__(self):
        """Raises ValueError: one line that says what to change."""
        may_be_zero = """seed search_weight steps target_length lora_rank eval_problems eval_every
        rsa_steps""".split()
        for name, value in vars(self).items():
            if type(value) in (int, float):
                smallest = 0 if name in may_be_zero else 1e-12
                if not smallest <= value < 2**31:  # nan isn't
                    raise ValueError(f"--{name.replace('_', '-')} {value}: out of range")
        if min(self.num_sets, self.num_aggregations) < 2:
            raise ValueError("--num-sets, --num-aggregations: below 2 there is no baseline")
        if self.set_size >= self.num_traces or self.set_size > self.eval_traces:
            raise ValueError("--set-size: must be below --num-traces, at most --eval-traces")
        if self.published and (self.algo, self.search_credit) != ("spiral", "set"):
            raise ValueError("--published is a kind of set credit, of --algo spiral")
        # Raises if there are no such sets
        draw_sets(self.num_traces, self.set_size, self.num_sets, balanced=self.balanced)


# ---- Policy: a causal language model. Both roles share it; only the prompt differs ----

TINY = Path(__file__).resolve().parent / "tiny"
# Models whose attention is causal and nothing else. Another one: add its type here and to the tests
PLAIN = "gpt2 gpt_neox llama mistral phi qwen2 qwen3".split()
# Some chat templates tell the date, by either of two names. Today's would change overnight
FIXED_DATE = (
    "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
    "{% set date_string = '26 Jul 2024' %}\n"
)


class Tokenizer:
    """What we need of a Hugging Face tokenizer and its chat template.

    eos_ids: the tokens that end a completion; load_policy() adds those of the model. markers: texts
    that structure a prompt, which neutralise() takes out of sampled text before that is shown in a
    prompt. Raises ValueError if the template fails or leaves out the message."""

    def __init__(self, path):
        try:
            self.hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            shown = self.decode(self.chat("MESSAGE"))
        except Exception as error:  # a template is somebody else's program
            raise ValueError(f"{path}: tokenizer or chat template fails: {error}") from None
        if "MESSAGE" not in shown:
            raise ValueError(f"{path}: the chat template leaves out the message")

        added = self.hf.added_tokens_decoder  # {token: its text, and whether it is special}
        self.markers = []
        for kind in added.values():
            # What is in brackets needn't be special: DeepSeek's <|User|> isn't
            if kind.special or re.search(r"[<[|].*[]>|]", kind.content):
                self.markers.append(kind.content)

        # What the template writes after a message ends a turn: <|im_end|> in Qwen's. It is the
        # first token of the rest, if that is an added one
        rest = shown.partition("MESSAGE")[2].strip()
        end_of_turn = added.keys() & self.encode(rest)[:1]
        self.eos_ids = {self.hf.eos_token_id} | end_of_turn

    def encode(self, text):
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, tokens):
        """Text, with special tokens: the tags of thoughts may be such, and verifiers need them."""
        return self.hf.decode(tokens)

    def chat(self, text):
        """Tokens of a user's message, up to where the answer begins."""
        if not self.hf.chat_template:  # a base model: text with BOS, but not with EOS
            return [token for token in self.hf.encode(text) if token != self.hf.eos_token_id]
        return self.hf.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=FIXED_DATE + self.hf.get_chat_template(),
            add_generation_prompt=True,
            return_dict=False,
        )


@dataclass
class Policy:
    model: torch.nn.Module  # a transformers causal LM with attn_implementation "spiral"
    tokenizer: Tokenizer
    memory: object  # of `sample`: a Memory


def load_policy(config, questions=("",)):
    """The policy that config.model names. All of its weights train, or only its LoRA adapters.
    Raises ValueError if it isn't there, if it doesn't suit us, or if the longest of the questions
    leaves no room for candidates: before the weights are loaded, where that can be known."""
    path = str(TINY) if config.model == "tiny" else config.model
    # A LoRA checkpoint names the folder of its base model, which may not depend on where we are
    path = os.path.abspath(path) if os.path.isdir(path) else path
    base, adapters = path, Path(path, "adapter_config.json")
    if adapters.exists():  # a checkpoint of a LoRA run
        base = json.loads(adapters.read_text("utf-8"))["base_model_name_or_path"]
    try:
        settings = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # of many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(f"--model {base}: no such folder, or broken: {reason}") from None
    check_architecture(settings, base, config)

    tokenizer = Tokenizer(path if Path(path, "tokenizer_config.json").exists() else base)
    # A prompt on trial: is there room for candidates, and are its tokens in the vocabulary?
    longest = max(questions, key=lambda text: len(tokenizer.encode(text)))
    candidates = ["0" * 99] * config.set_size
    prompt = aggregation_prompt(tokenizer, longest, candidates, config.max_prompt_tokens)
    if max(prompt) >= settings.vocab_size:
        raise ValueError(f"{path}: the tokenizer has tokens that the model lacks")

    model = load_model(path, config, is_adapter=adapters.exists())
    ends = model.generation_config.eos_token_id
    tokenizer.eos_ids |= set(ends) if isinstance(ends, list) else {ends}
    return Policy(model, tokenizer, Memory(model, config.sampler_memory))


def check_architecture(settings, path, config):
    """Raises ValueError for a model that our attention would get wrong, and for one whose context
    is too short."""
    if settings.model_type not in PLAIN or getattr(settings, "sliding_window", None):
        raise ValueError(f"{path}: {settings.model_type} is not known to be plain and causal")
    if hasattr(settings, "quantization_config"):
        raise ValueError(f"{path}: quantized weights can't be trained")
    rope = getattr(settings, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        raise ValueError(f"{path}: its positions depend on the length of the batch ({rope})")
    new_tokens = max(config.max_trace_tokens, config.max_aggregation_tokens)
    most = settings.max_position_embeddings
    if config.max_prompt_tokens + new_tokens > most:
        raise ValueError(f"{path}: a prompt and a completion may exceed its {most} tokens")


def load_model(path, config, is_adapter):
    """The model on its device, with requires_grad where it trains. Raises ValueError."""
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=config.dtype,
            attn_implementation="spiral",
            use_safetensors=True,
            output_loading_info=True,
        )
    except RuntimeError:  # transformers speaks of ignore_mismatched_sizes
        raise ValueError(f"{path}: its weights have other shapes than its config says") from None
    if loaded["missing_keys"]:
        raise ValueError(f"{path} has no weights for {min(loaded['missing_keys'])}")
    if config.lora_rank and not is_adapter:
        from peft import LoraConfig

        torch.manual_seed(config.seed)  # new adapters are random
        rank = config.lora_rank
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        # Weights mapped from a file are aligned differently, and kernels then round differently
        parameter.data = parameter.data.clone()
        parameter.requires_grad = "lora_" in name or not hasattr(model, "peft_config")

    model.eval()  # for good: there is no dropout
    if torch.cuda.is_available():
        model.to("cuda")
        # cuDNN's attention would plan anew for each new length of a prompt, for half a second
        torch.backends.cuda.enable_cudnn_sdp(False)
        from experiments import fused

        fused.fuse(model)  # the same model in half as many kernels
    elif model.num_parameters() < 20e6:
        torch.set_num_threads(1)  # more would wait for each other longer than they compute
    if config.gradient_checkpointing:
        # From 5.23 on transformers has a new name for it
        old_enable = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", old_enable)
        # Nothing here needs the random state. Sampling runs through these layers, too, and saving
        # the state would forbid its CUDA graphs
        enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in model.modules():  # transformers checkpoints layers in training mode only
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    return model


def attention(module, query, key, value, mask, scaling, attend, **kwargs):
    """What transformers calls in every layer: queries [B, H, T, D], keys, values [B, kv, T, D] ->
    [B, T, H, D]. `attend` is what prefill, decoding and update each give to hidden_states(), from
    where transformers hands it on to here. It gets queries that are scaled."""
    return attend(module.layer_idx, query * scaling, key, value), None


AttentionInterface.register("spiral", attention)  # a name for transformers, nothing more


def causal_attention(query, key, value, mask=None):
    """Of whole sequences: each token attends to itself and all before, or as the mask [T, S] of
    queries and keys says. The queries are scaled already."""
    grouped = query.shape[1] != key.shape[1]  # several heads of queries share a head of keys
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=1.0, enable_gqa=grouped
    )
    return mixed.transpose(1, 2)


def hidden_states(model, tokens, attend, positions=None):
    """Of tokens [B, T], at positions [B, T] (default: 0, 1 ...) -> [B, T, d], for head()."""
    outputs = model.base_model(tokens, position_ids=positions, use_cache=False, attend=attend)
    return outputs.last_hidden_state


def head(model, hidden, temperature):
    """Logits at `temperature`, fp32 [..., V]. At 0 the likeliest token has all probability."""
    return model.get_output_embeddings()(hidden).float().div_(max(temperature, 1e-6))


# ---- Sampler: a prompt is held once, all rows decode together, finished rows make room ----
# In shapes: U prompts, L tokens of a prompt without its last; B rows (completions that are being
# sampled), T tokens of a completion; H heads of queries, kv heads of keys and values, G = H / kv
# queries for each of these; D numbers in a head

PREFILL_TOKENS = 16_384  # of prompts that run in one pass


@dataclass
class Completion:
    """A trace or an aggregation. While it is sampled, it is a row of the batch."""

    prompt_index: int = 0  # which prompt of the call
    sample_index: int = 0  # which of the prompt's completions
    code: float = 0.0  # in [0, 1): chooses the next token, see draw_tokens()
    rng: object = field(default=None, compare=False)  # random.Random(code): see decode()
    probability: float = 1.0  # of all the tokens so far
    tokens: list = field(default_factory=list)  # up to and including EOS
    logprobs: list = field(default_factory=list)  # of the tokens, at the sampling temperature
    truncated: bool = True  # has no EOS, or not yet
    text: str = ""
    reward: float = 0.0
    advantage: float = 0.0


@dataclass
class Cache:
    """Keys and values of one call of sample(). A prompt is held without its last token, which is
    the first input of each of its completions: so all tokens are sampled in decode_step()."""

    prompts: torch.Tensor  # [layers, 2, U, kv, L, D]; 2: keys, values
    completions: torch.Tensor  # [layers, 2, B, kv, T, D]
    num_samples: int  # completions of each prompt


class Memory:
    """One block for keys and values, allocated once. Each call of sample() cuts it anew. What was
    in it before stays there, and is masked. (So it must never hold nan: 0 * nan is nan.)"""

    def __init__(self, model, gigabytes):
        settings = model.config
        query_heads = settings.num_attention_heads
        heads = getattr(settings, "num_key_value_heads", query_heads)
        width = getattr(settings, "head_dim", settings.hidden_size // query_heads)
        self.shape = settings.num_hidden_layers, 2, heads, width  # of what a token has
        numbers = math.prod(self.shape)
        self.tokens = int(gigabytes * 1e9) // (numbers * model.dtype.itemsize)
        self.block = torch.zeros(self.tokens * numbers, dtype=model.dtype, device=model.device)
        self.graphs = {}  # CUDA graphs, see captured()
        self.pool = torch.cuda.graph_pool_handle() if self.block.is_cuda else None

    def cut(self, prompt_tokens, new_tokens, num_samples):
        """A Cache for as many prompts, with all of their completions, as fit. Beyond these it has
        room for a quarter more prompts, since some completions end early, and for one more, whose
        place stays free for the rows that decode() adds. Raises ValueError if none fits."""
        length = max(64, round_up(prompt_tokens))  # few lengths: few CUDA graphs
        groups = (self.tokens - length) // (num_samples * new_tokens + 5 * length // 4)
        if groups < 1:
            raise ValueError("memory is too small: raise --sampler-memory or lower token limits")
        layers, _, heads, width = self.shape
        prompts = layers, 2, groups + groups // 4 + 1, heads, length, width
        completions = layers, 2, groups * num_samples, heads, new_tokens, width
        first, rest = self.block.tensor_split([math.prod(prompts)])
        rest = rest[: math.prod(completions)]
        return Cache(first.view(prompts), rest.view(completions), num_samples)


def draw_codes(num_samples, generator=None, lattice=False):
    """The codes of a prompt's completions, which choose their tokens: [num_samples] fp64 in [0, 1).

    Independent uniforms give independent samples. As a lattice they lie at equal distances, shifted
    by one uniform, in random order: each completion alone is still a sample of the policy, but
    together they repeat each other less (QuasiMoTTo, arXiv 2607.01179)."""
    if not lattice:
        return torch.rand(num_samples, generator=generator, dtype=torch.float64)
    order = torch.rand(num_samples, generator=generator).argsort()
    shift = torch.rand(1, generator=generator, dtype=torch.float64)
    return (order + shift) / num_samples


def draw_tokens(logits, codes):
    """A token for each row: the one whose slice of the cumulative distribution holds the code.

    logits [B, V] fp32, codes [B] fp64 in [0, 1) -> [3, B] fp64: tokens, their log-probs, and the
    next codes: where in its slice each code lay, from 0 to 1. They are uniform again."""
    logprobs = logits.log_softmax(-1)  # [B, V]
    probs = logprobs.exp()
    cdf = probs.cumsum(-1, dtype=torch.float64)  # [B, V]
    # Rounding: the distribution may end a little off 1, and a code may fall on a slice's edge
    heights = (codes * cdf[:, -1])[:, None]  # [B, 1] where the codes lie on it
    tokens = torch.searchsorted(cdf, heights, right=True)  # [B, 1]
    tokens.clamp_(max=cdf.shape[1] - 1)
    width = probs.gather(-1, tokens)  # [B, 1] of the token's slice
    below = cdf.gather(-1, tokens) - width  # where it begins
    next_codes = ((heights - below) / width).clamp(0, 1 - 2**-53)
    return torch.cat([tokens, logprobs.gather(-1, tokens), next_codes], 1).T


def prefill(policy, prompts, cached):
    """Runs prompts (token lists) once, without their last tokens. Their keys and values go to
    cached [layers, 2, U, kv, L, D]."""
    # A prompt of one token leaves nothing to run. The 0 in its place is masked for all rows
    tokens = [torch.tensor(prompt[:-1] or [0]) for prompt in prompts]
    tokens = pad_sequence(tokens, batch_first=True).to(policy.model.device)  # [U, L]

    def attend(layer, query, key, value):
        cached[layer, :, : len(prompts), :, : tokens.shape[1]] = torch.stack([key, value])
        return causal_attention(query, key, value)  # pads come last, so that no token sees them

    hidden_states(policy.model, tokens, attend)


def product(x, y):
    """x @ y for attention scores, [U, kv, M, C] and [U, kv, C, N] -> fp32 [U, kv, M, N]. bf16 would
    lose too much of large scores; the fused attention of the update has them in fp32, too."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        batch = torch.bmm(x.flatten(0, 1), y.flatten(0, 1), out_dtype=torch.float32)
        return batch.unflatten(0, x.shape[:2])
    return x.float() @ y.float()


def decode_step(model, cache, temperature, last_tokens, lengths, prompt_lengths, slots, codes):
    """The next token of B rows -> [3, B], as draw_tokens() gives them. A row attends to its prompt
    and to itself, both of which are in the cache. Of each row, in tensors [B]:

    last_tokens     its input: the last one sampled, at first the last one of its prompt
    lengths, prompt_lengths  how many tokens it has, and its prompt in the cache
    slots           its place in a grid [U, num_samples] of all completions that the cached prompts
                    may have: place of the prompt * num_samples + sample_index
    codes           for draw_tokens()

    No shape depends on a value in a tensor, so that all of this can be one CUDA graph."""
    num_prompts, heads, prompt_tokens = cache.prompts.shape[2:5]  # U, kv, L
    new_tokens, num_samples = cache.completions.shape[4], cache.num_samples  # T
    arange = partial(torch.arange, device=slots.device)
    row = arange(len(slots))
    in_prompt = arange(prompt_tokens) < prompt_lengths[:, None]  # [B, L]
    in_completion = arange(new_tokens) <= lengths[:, None]  # [B, T], the input token among them
    seen = torch.cat([in_prompt, in_completion], 1)  # [B, L + T]
    bias = torch.where(seen, 0.0, -math.inf)[:, None, None]  # [B, 1, 1, L + T]

    # The completions' keys are in the order of the rows. A prompt's keys are shared by its rows: to
    # read them once, these rows' queries, and later their weights, stand together in the grid
    place, sample = slots // num_samples, slots % num_samples

    def to_grid(x):  # [B, kv, G, C] -> [U, kv, num_samples * G, C], 0 where there is no row
        grid = x.new_zeros(num_prompts, heads, num_samples, *x.shape[2:])
        grid[place, :, sample] = x
        return grid.flatten(2, 3)

    def from_grid(grid):  # the way back
        return grid.unflatten(2, (num_samples, -1))[place, :, sample]

    def attend(layer, query, key, value):  # [B, H, 1, D], twice [B, kv, 1, D] -> [B, 1, H, D]
        prompt_keys, prompt_values = cache.prompts[layer]  # [U, kv, L, D]
        keys, values = cache.completions[layer]  # [B, kv, T, D]
        keys[row, :, lengths] = key[:, :, 0]
        values[row, :, lengths] = value[:, :, 0]

        query = query.unflatten(1, (heads, -1))[:, :, :, 0]  # [B, kv, G, D], G = H / kv
        prompt_scores = from_grid(product(to_grid(query), prompt_keys.mT))  # [B, kv, G, L]
        scores = torch.cat([prompt_scores, product(query, keys.mT)], -1)  # [B, kv, G, L + T]
        weights = (scores + bias).softmax(-1).to(values.dtype)

        of_prompt, of_completion = weights.split([prompt_tokens, new_tokens], -1)
        mixed = from_grid(to_grid(of_prompt) @ prompt_values) + of_completion @ values
        return mixed.flatten(1, 2)[:, None]

    positions = prompt_lengths + lengths
    hidden = hidden_states(model, last_tokens[:, None], attend, positions[:, None])
    return draw_tokens(head(model, hidden[:, 0], temperature), codes)


def round_up(size):
    """To a power of two from 16 to 256, then to a multiple of 256: few sizes need few graphs."""
    if size > 256:
        return -(-size // 256) * 256
    return max(16, 1 << (size - 1).bit_length())


def captured(memory, step, inputs, key):
    """`step` as a CUDA graph, captured once for each key: launching its kernels one by one from
    Python would take longer than they run. A graph takes some 20 MB: when there are 128, steps with
    other keys run without one."""
    if key not in memory.graphs and len(memory.graphs) < 128:
        examples = tuple(tensor.clone() for tensor in inputs)
        memory.graphs[key] = torch.cuda.make_graphed_callables(step, examples, pool=memory.pool)
    return memory.graphs.get(key, step)


def decode(policy, active, held, prompts, cache, temperature):
    """Adds a token to each row of `active`. held: the prompts in the cache, in their places."""
    places = {prompt: place for place, prompt in enumerate(held)}
    num_samples = cache.num_samples
    last_tokens = [(row.tokens or prompts[row.prompt_index])[-1] for row in active]
    lengths = [len(row.tokens) for row in active]
    prompt_lengths = [len(prompts[row.prompt_index]) - 1 for row in active]
    slots = [places[row.prompt_index] * num_samples + row.sample_index for row in active]
    # Once a row's tokens are less likely than this, no other code of a lattice shares them. Fresh
    # uniforms are as good from there on, and better in one thing: each token magnifies the rounding
    # error of a code by 1 / its probability
    spread = 1 / num_samples
    codes = [row.code if row.probability >= spread else row.rng.random() for row in active]

    memory = policy.memory
    sizes = [len(held), max(prompt_lengths), len(active), 1 + max(lengths)]  # in use
    if memory.pool:  # a CUDA graph has fixed sizes; one more prompt: the place that stays free
        sizes[0] += 1
        sizes = [round_up(size) for size in sizes]
    num_prompts, prompt_tokens, num_rows, new_tokens = sizes
    part = Cache(
        cache.prompts[:, :, :num_prompts, :, :prompt_tokens],
        cache.completions[:, :, :num_rows, :, :new_tokens],
        num_samples,
    )

    # Rows that the rounding adds decode garbage. Their slot is in the place that stays free: in any
    # other they might overwrite a real row's entry in the grid
    padding = 0, part.completions.shape[2] - len(active)
    integers = F.pad(torch.tensor([last_tokens, lengths, prompt_lengths, slots]), padding)
    integers[3, len(active) :] = part.prompts.shape[2] * num_samples - 1
    codes = F.pad(torch.tensor(codes, dtype=torch.float64), padding)
    device = policy.model.device
    inputs = [*integers.to(device), codes.to(device)]
    step = partial(decode_step, policy.model, part, temperature)
    if memory.pool:
        # The strides tell how memory was cut: where the views begin, and num_samples, too
        views = part.prompts, part.completions
        key = *[(view.shape, view.stride()) for view in views], temperature
        step = captured(memory, step, inputs, key)

    # zip() leaves out the added rows
    for row, token, logprob, code in zip(active, *step(*inputs).tolist()):
        if math.isnan(logprob):
            raise ValueError("the policy's log-probs are nan: its weights are damaged")
        row.tokens.append(int(token))
        row.logprobs.append(logprob)
        row.code = code
        row.probability *= math.exp(logprob)
        row.truncated = token not in policy.tokenizer.eos_ids


def compact(items, needed, cached):
    """Drops the items that are not needed. The last one moves into the gap, and what is in
    cached[:, :, index of the item] moves with it."""
    for i in reversed(range(len(items))):
        if not needed[i]:
            cached[:, :, i] = cached[:, :, len(items) - 1]
            items[i] = items[-1]
            items.pop()


@torch.no_grad()
def sample(
    policy, prompts, max_new_tokens, temperature=1.0, num_samples=1, generator=None, codes=None
):
    """`num_samples` completions of each prompt (token lists) -> [prompts][num_samples] Completions.

    They don't depend on what else is in the batch, up to the rounding of kernels. codes, in place
    of num_samples and generator: [prompts, samples] of draw_codes(). temperature 0 takes the
    likeliest token. Raises ValueError for an empty prompt, for what memory doesn't hold, and for a
    policy whose log-probs are nan."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) == 0:
        raise ValueError("sample needs at least one prompt, and a token in each")
    if codes is None:
        codes = torch.rand(len(prompts), num_samples, generator=generator, dtype=torch.float64)
    num_samples = codes.shape[1]
    results = []
    for i, prompt_codes in enumerate(codes.tolist()):
        rows = [Completion(i, j, code, random.Random(code)) for j, code in enumerate(prompt_codes)]
        results.append(rows)

    cache = policy.memory.cut(max(lengths), max_new_tokens, num_samples)
    most_prompts = cache.prompts.shape[2] - 1  # one place stays free for decode()
    most_rows = cache.completions.shape[2]
    waiting = sorted(range(len(prompts)), key=lambda i: -lengths[i])  # the longest go first
    active, held = [], []  # rows; prompts in memory
    progress = tqdm(total=codes.numel(), desc="sampling", delay=5, leave=False, disable=None)
    while waiting or active:
        room = min((most_rows - len(active)) // num_samples, most_prompts - len(held))
        # To prefill few prompts is slow. (With no row left, all of the room is there)
        enough_room = num_samples * room >= most_rows / 4
        if waiting and enough_room:
            # All are padded to the length of the first, and run in one pass
            count = min(room, 1 + PREFILL_TOKENS // lengths[waiting[0]])
            new, waiting = waiting[:count], waiting[count:]
            prefill(policy, [prompts[i] for i in new], cache.prompts[:, :, len(held) :])
            held += new
            for i in new:
                active += results[i]

        decode(policy, active, held, prompts, cache, temperature)

        unfinished = [row.truncated and len(row.tokens) < max_new_tokens for row in active]
        progress.update(unfinished.count(False))
        compact(active, unfinished, cache.completions)
        needed = {row.prompt_index for row in active}
        compact(held, [i in needed for i in held], cache.prompts)
    progress.close()
    return results


# ---- Sets, and the prompt of an aggregation ----


@dataclass
class Group:
    """Completions of one prompt: a problem's traces, or the aggregations of one set of them."""

    prompt: list  # token ids
    completions: list
    problem: object = None
    aggregations: list = field(default_factory=list)  # of a problem's traces: K Groups
    candidates: list = field(default_factory=list)  # of aggregations: which traces these read


CANDIDATE, CANDIDATE_END = "<candidate {}>\n", "\n</candidate>\n"
AGGREGATE = (
    "Each candidate above may be wrong. Audit them one by one (number, verdict), keep what is "
    "right, settle their disagreements, and if all are wrong try another way. Then end with the "
    "answer in the format asked for.\n"
)


def draw_sets(num_traces, set_size, num_sets, generator=None, balanced=False):
    """`num_sets` distinct sets of `set_size` distinct traces -> LongTensor [K, n], each in random
    order. If balanced, each trace is in K n / N1 of them. Raises ValueError if there are none."""
    if num_sets > comb(num_traces, set_size):
        raise ValueError(f"--num-sets: {num_traces} traces have not so many sets of {set_size}")
    if balanced and num_sets * set_size % num_traces:
        raise ValueError("--num-sets * --set-size is no multiple of --num-traces: --no-balanced?")
    sets = []
    while len(sets) < num_sets:
        members = set(torch.randperm(num_traces, generator=generator)[:set_size].tolist())
        if members not in sets:
            sets.append(members)
    if balanced:
        balance(sets, num_traces, generator)

    orders = torch.rand(num_sets, set_size, generator=generator).argsort(1)
    return torch.tensor([sorted(members) for members in sets]).gather(1, orders)


def balance(sets, num_traces, generator):
    """Exchanges members of the sets, in place, until each trace is in equally many sets.

    Each exchange puts a trace of few sets in the place of one of many, so that it ends. And there
    is always one that makes no set twice: more sets hold `most` without `least` than the other way
    round, so that for one of them the set with the two exchanged isn't there yet."""
    noise = torch.rand(num_traces, generator=generator)  # which of equals comes first
    while True:
        uses = torch.tensor([sum(j in members for members in sets) for j in range(num_traces)])
        if uses.max() == uses.min():
            return
        most = int((uses + noise).argmax())
        least = int((uses - noise).argmin())
        for number, members in enumerate(sets):  # the sets are in random order
            exchanged = members - {most} | {least}
            if most in members and least not in members and exchanged not in sets:
                sets[number] = exchanged
                break


def neutralise(text, markers):
    """Sampled text that can close no candidate, open none, and write no special token."""
    text = re.sub(r"<(/?)candidate", r"(\1candidate", text, flags=re.IGNORECASE)
    if not markers:
        return text
    # Left out, the inner marker of "<|im_<|im_end|>end|>" would leave another one
    return re.sub("|".join(map(re.escape, markers)), "\ufffd", text)


def aggregation_prompt(tokenizer, prompt, traces, max_tokens):
    """Tokens of the problem's prompt with numbered candidates (strings). Over `max_tokens` the
    longest lose their beginnings. Raises ValueError if the problem leaves no room."""
    texts = [neutralise(trace, tokenizer.markers) for trace in traces]
    bodies = [tokenizer.encode(text) for text in texts]
    longest = 1 + max(len(body) for body in bodies)  # tokens that a candidate may have, at least 1
    while longest > 0:
        message = prompt
        for number, (text, body) in enumerate(zip(texts, bodies), 1):
            if len(body) > longest:
                text = tokenizer.decode(body[len(body) - longest :])
            message += CANDIDATE.format(number) + text + CANDIDATE_END
        tokens = tokenizer.chat(message + AGGREGATE)
        excess = len(tokens) - max_tokens
        if excess <= 0:
            return tokens
        # If all were long, each would have to lose excess / n. Half of it is taken at a time, so as
        # not to cut too much, until it fits
        longest -= 1 + excess // (2 * len(bodies))
    raise ValueError(f"no room for candidates in {max_tokens} tokens: raise --max-prompt-tokens")


# ---- Advantages: sum_j a_j grad log pi(y_j) + sum_km b_km grad log pi(z_km) ----
# With set credit at weight 1 its expectation is the gradient of J: exactly, but for what is left
# out on purpose: problems that teach nothing, what the clip bounds, and --target-length


def search_advantages(rewards, sets, num_traces, balanced=False, published=False):
    """Set credit: rewards [P, K, N2] of the aggregations of sets [P, K, n] -> a_j, [P, N1].

    A_set(k) = f_k - mean_{l != k} f_l compares a set's score f_k with the other sets' scores, and
    a_j = sum_{k: j in G_k} A_set(k) / (K (1 - p)). p is the chance that another set holds j, too.
    j's own merit is then in the baseline and cancels this part of the signal, so that dividing by
    1 - p makes the estimate unbiased. published: the baseline is the mean of all sets,
    and a_j the mean, not the sum, over the sets that hold j; 0 if there is none."""
    num_sets, set_size = sets.shape[1:]
    scores = rewards.mean(-1)  # [P, K] f_k
    member = F.one_hot(sets, num_traces).sum(2)  # [P, K, N1] 1 where trace j is in set k

    if published:
        from_mean = scores - scores.mean(1, keepdim=True)
        return (from_mean[:, :, None] * member).sum(1) / member.sum(1).clamp(min=1)

    others_mean = (scores.sum(1, keepdim=True) - scores) / (num_sets - 1)
    set_advantages = scores - others_mean  # [P, K] A_set(k)
    if balanced:  # R - 1 of the K - 1 other sets hold j
        sets_per_trace = num_sets * set_size / num_traces  # R
        shared = (sets_per_trace - 1) / (num_sets - 1)  # p
    else:  # each of all other sets is as likely to be drawn
        sets_with_trace = comb(num_traces - 1, set_size - 1)
        shared = (sets_with_trace - 1) / (comb(num_traces, set_size) - 1)
    return (set_advantages[:, :, None] * member).sum(1) / (num_sets * (1 - shared))


def aggregation_advantages(rewards, published=False):
    """b_km = (r_km - mean_{m' != m} r_km') / (K N2), rewards and result [P, K, N2]. The baseline is
    the set's other answers. published: r_km - mean_m r_km, its own among them."""
    if published:
        return rewards - rewards.mean(-1, keepdim=True)
    num_sets, num_aggregations = rewards.shape[1:]
    others_mean = (rewards.sum(-1, keepdim=True) - rewards) / (num_aggregations - 1)
    return (rewards - others_mean) / (num_sets * num_aggregations)


def grpo_advantages(rewards):
    """(r_j - mean_{i != j} r_i) / N: rewards [P, N] -> [P, N]. No standard deviation: unbiased."""
    num_traces = rewards.shape[1]
    others_mean = (rewards.sum(1, keepdim=True) - rewards) / (num_traces - 1)
    return (rewards - others_mean) / num_traces


# ---- Update: a prompt and its completions are one flat sequence: the prompt runs once ----


def micro_batches(groups, budget):
    """Completions with an advantage, in lists of Groups: of at most `budget` tokens, or of a single
    completion that has more."""
    batch, size = [], 0
    for group in groups:
        current = None  # this prompt's Group in the present batch
        for completion in group.completions:
            if completion.advantage == 0:
                continue
            needed = len(completion.tokens)
            if current is None:
                needed += len(group.prompt)
            if batch and size + needed > budget:
                yield batch
                batch, size, current = [], 0, None
                needed = len(group.prompt) + len(completion.tokens)
            if current is None:
                current = Group(group.prompt, [])
                batch.append(current)
            current.completions.append(completion)
            size += needed
    if batch:
        yield batch


def token_logprobs(model, hidden, targets, temperature, chunk_elements=1 << 26):
    """Log-probs [N] fp32 of targets [N] from hidden states [N, d]. Logits are made in chunks, and
    made again in the backward pass, so that [N, V] is never there."""

    def chunk_logprobs(hidden, targets):
        return -F.cross_entropy(head(model, hidden, temperature), targets, reduction="none")

    size = 1 + chunk_elements // len(model.get_output_embeddings().weight)
    chunks = []
    for part, part_targets in zip(hidden.split(size), targets.split(size)):
        chunks.append(
            checkpoint(
                chunk_logprobs, part, part_targets, use_reentrant=False, preserve_rng_state=False
            )
        )
    return torch.cat(chunks)


def completion_logprobs(model, groups, temperature):
    """(log-probs, the sampler's log-probs, advantages), [N] each, of all sampled tokens of groups.

    All is one flat sequence of pieces, for a prompt p_0 .. p_L (L + 1 tokens) and completions a, b:
        p_0 .. p_L-1,  p_L a_0 a_1 ..,  p_L b_0 b_1 ..
    The prompt runs once. As in the sampler, its last token is the first input of each completion,
    so that the i-th token of a completion's piece predicts the i-th token that was sampled."""
    inputs, positions = [], []  # of the whole sequence
    sampled = []  # the places in it that predict a sampled token
    targets, old_logprobs, advantages = [], [], []  # of these tokens
    sizes, masks = [], []  # of the pieces
    for group in groups:
        *prompt, last_prompt_token = group.prompt
        start = len(prompt)
        inputs += prompt
        positions += range(start)
        sizes.append(start)
        masks.append(None)
        for completion in group.completions:
            size = len(completion.tokens)
            sampled += range(len(inputs), len(inputs) + size)
            inputs += [last_prompt_token] + completion.tokens[:-1]
            positions += range(start, start + size)
            targets += completion.tokens
            old_logprobs += completion.logprobs
            advantages += [completion.advantage] * size
            sizes.append(size)
            masks.append(causal_lower_right(size, start + size))  # sees the prompt, and its own

    def attend(layer, query, key, value):  # [1, H, M, D], [1, kv, M, D] twice -> [1, M, H, D]
        outputs = []
        pieces = zip(masks, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2))
        for mask, piece_query, piece_key, piece_value in pieces:
            if mask is None:
                prompt_key, prompt_value = piece_key, piece_value
            else:
                piece_key = torch.cat([prompt_key, piece_key], 2)  # [1, kv, L + T, D]
                piece_value = torch.cat([prompt_value, piece_value], 2)
            outputs.append(causal_attention(piece_query, piece_key, piece_value, mask))
        return torch.cat(outputs, 1)

    tensor = partial(torch.tensor, device=model.device)
    hidden = hidden_states(model, tensor([inputs]), attend, tensor([positions]))[0]  # [M, d]
    hidden = hidden[tensor(sampled)]  # [N, d]
    logprobs = token_logprobs(model, hidden, tensor(targets), temperature)
    return logprobs, tensor(old_logprobs), tensor(advantages)


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """PPO's clipped loss, a sum over tokens; all [N]. In a rollout's first update the ratio is 1,
    up to rounding, and the gradient is REINFORCE's."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def make_optimizer(model, lr, folder=None):
    """AdamW on fp32 masters: copies of the trained parameters, or these themselves if they are
    fp32. Steps too small for bf16 add up in them. Their gradients, which update() sets to 0 first,
    are sums over micro-batches. folder: a checkpoint to go on from."""
    masters = {p: p.detach().float() for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0, foreach=False
    )

    def add_to_master(parameter):  # when a micro-batch has its gradient
        masters[parameter].grad += parameter.grad
        parameter.grad = None

    def copy_from_masters(*_):  # after a step; if fp32, onto itself
        for parameter, master in masters.items():
            parameter.data.copy_(master)

    for parameter in masters:
        parameter.register_post_accumulate_grad_hook(add_to_master)
    optimizer.register_step_post_hook(copy_from_masters)
    if folder:  # weights_only: tensors and plain containers, no code
        path = folder / "optimizer.pt"
        saved_masters, state = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
        for master, saved in zip(masters.values(), saved_masters):
            master.copy_(saved)
    return optimizer


def update(policy, optimizer, groups, num_problems, config):
    """One optimizer step on the sum over all completions, divided by num_problems, the useful ones:
    so the gradient doesn't depend on micro-batches. No step if loss or gradient isn't finite."""
    masters = optimizer.param_groups[0]["params"]
    for master in masters:
        master.grad = torch.zeros_like(master)
    total_loss, distance, tokens = 0.0, 0.0, 0  # distance: from the sampler's log-probs
    for batch in micro_batches(groups, config.micro_batch_tokens):
        logprobs, old_logprobs, advantages = completion_logprobs(
            policy.model, batch, config.temperature
        )
        loss = policy_loss(logprobs, old_logprobs, advantages, config.clip) / num_problems
        loss.backward()
        total_loss += loss.item()
        distance += (logprobs.detach() - old_logprobs).abs().sum().item()
        tokens += len(old_logprobs)

    norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm).item()
    finite = math.isfinite(norm + total_loss)
    if finite and tokens:
        optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": total_loss,
        "grad_norm": norm,
        "logprob_difference": distance / max(tokens, 1),
        "skipped": not finite,
    }


# ---- Rollout and dynamic sampling: traces -> sets -> aggregations -> rewards -> advantages ----


def complete(policy, task, groups, codes, max_new_tokens, temperature):
    """Samples the completions of Groups that have none, and scores them. codes: a row [samples] for
    each Group, see draw_codes()."""
    prompts = [group.prompt for group in groups]
    results = sample(policy, prompts, max_new_tokens, temperature, codes=torch.stack(codes))
    # Some chat templates write the tag that opens a thought. Without it nobody could tell that what
    # follows is one, which neither verifier nor aggregator may read
    thinks = policy.tokenizer.decode(prompts[0]).rstrip().endswith("<think>")
    for group, completions in zip(groups, results):
        group.completions = completions
        for c in completions:
            text = policy.tokenizer.decode(c.tokens if c.truncated else c.tokens[:-1])
            c.text = "<think>" + text if thinks else text
            c.reward = float(task.reward(group.problem, c.text))


def search(policy, task, problems, config, num_traces, generators, lattice=False):
    """`num_traces` traces of each problem, by its own generator -> [P] Groups."""
    groups = []
    for problem in problems:
        groups.append(Group(policy.tokenizer.chat(task.prompt(problem)), [], problem))
    codes = [draw_codes(num_traces, generator, lattice) for generator in generators]
    complete(policy, task, groups, codes, config.max_trace_tokens, config.temperature)
    return groups


def aggregate(policy, task, groups, sets, config, num_samples, generators):
    """Gives each of P groups its aggregations: `num_samples` of each set. sets: [P][K, n] indices
    of the group's completions."""
    codes = []
    for group, group_sets, generator in zip(groups, sets, generators):
        group.aggregations = []
        for members in group_sets.tolist():
            texts = [tasks.after_thought(group.completions[j].text) for j in members]
            question = task.prompt(group.problem)
            prompt = aggregation_prompt(
                policy.tokenizer, question, texts, max_tokens=config.max_prompt_tokens
            )
            group.aggregations.append(Group(prompt, [], group.problem, candidates=members))
            codes.append(draw_codes(num_samples, generator))
    answers = aggregations_of(groups)
    complete(policy, task, answers, codes, config.max_aggregation_tokens, config.temperature)


def aggregations_of(groups):
    """The Groups of aggregations of problems, in one list."""
    return [answer for group in groups for answer in group.aggregations]


def completions_of(groups):
    return [completion for group in groups for completion in group.completions]


def rewards_of(groups):
    """[groups, completions] fp32."""
    return torch.tensor([[c.reward for c in group.completions] for group in groups])


def assign_advantages(groups, advantages, target_length):
    """Hands out advantages, one for each completion, in order. Over L_target tokens none is
    positive: being long is never rewarded, and being wrong still punished (0: no such limit)."""
    pairs = zip(completions_of(groups), advantages.flatten().tolist())
    for completion, advantage in pairs:
        too_long = 0 < target_length < len(completion.tokens)
        completion.advantage = min(advantage, 0.0) if too_long else advantage


def rollout(policy, task, problems, config, generators):
    """The whole pipeline on P problems, each with its own generator -> P Groups of traces, with
    their aggregations, and advantages."""
    num_traces = config.num_traces
    if config.algo == "grpo":  # as many completions as spiral samples
        num_traces += config.num_sets * config.num_aggregations
    groups = search(policy, task, problems, config, num_traces, generators)
    if config.algo == "grpo":
        assign_advantages(groups, grpo_advantages(rewards_of(groups)), config.target_length)
        return groups

    sets = []
    for generator in generators:
        drawn = draw_sets(
            num_traces, config.set_size, config.num_sets, generator, balanced=config.balanced
        )
        sets.append(drawn)
    sets = torch.stack(sets)  # [P, K, n]
    aggregate(policy, task, groups, sets, config, config.num_aggregations, generators)

    rewards = torch.stack([rewards_of(group.aggregations) for group in groups])  # [P, K, N2]

    if config.search_credit == "set":
        credit = search_advantages(  # [P, N1]
            rewards, sets, num_traces, balanced=config.balanced, published=config.published
        )
    else:  # not the paper's: it asks the verifier about traces
        from experiments import credits

        credit = credits.verified_credit(groups, config.search_credit, config.set_size)
    assign_advantages(groups, config.search_weight * credit, config.target_length)
    advantages = aggregation_advantages(rewards, config.published)
    assign_advantages(aggregations_of(groups), advantages, config.target_length)
    return groups


def draw_problems(problems, seed, places):
    """The problems at these places of an endless stream, which is shuffled anew in each epoch."""
    shuffled, drawn = {}, []
    for place in places:
        epoch, index = divmod(place, len(problems))
        if epoch not in shuffled:
            shuffled[epoch] = random.Random(f"{seed} {epoch}").sample(problems, len(problems))
        drawn.append(shuffled[epoch][index])
    return drawn


def collect(policy, task, problems, cursor, config):
    """Dynamic sampling: rolls out until config.problems have an advantage, or max_draws times as
    many are drawn. Returns (groups of all that were drawn, how many have one, cursor after them).
    The cursor is the place in the stream of problems, which fixes the problems and their seeds."""
    groups, useful = [], 0
    limit = cursor + config.max_draws * config.problems
    while useful < config.problems and cursor < limit:
        missing = max(config.problems - useful, config.problems // 4)  # small rollouts are slow
        places = range(cursor, min(cursor + missing, limit))
        cursor = places.stop
        seeds = [config.seed * 1_000_003 + place for place in places]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        batch = draw_problems(problems, config.seed, places)
        groups += rollout(policy, task, batch, config, generators)
        useful = 0
        for group in groups:
            useful += any(c.advantage for c in completions_of([group, *group.aggregations]))
    return groups, useful, cursor


# ---- Evaluation, and what people read ----


def statistics(groups):
    """How often right and cut off, tokens, entropy in nats a token."""
    completions = completions_of(groups)
    count = max(1, len(completions))
    tokens = sum(len(c.tokens) for c in completions)
    return {
        "tokens": tokens,
        "length": tokens / count,
        "reward": sum(c.reward for c in completions) / count,
        "truncated": sum(c.truncated for c in completions) / count,
        "entropy": -sum(sum(c.logprobs) for c in completions) / max(1, tokens),
    }


def majority_vote(answers):
    """The place of the most frequent answer; of several, the one seen first. None where nobody
    answers: None is no answer, and doesn't vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    if votes:
        return answers.index(max(votes, key=votes.get))


def vote_reward(task, group):
    winner = majority_vote([task.answer(c.text) for c in group.completions])
    return 0.0 if winner is None else group.completions[winner].reward


def recursive_self_aggregation(policy, task, problems, config, seeds):
    """RSA (arXiv 2509.26626). The first population of a problem is eval_traces traces. Each step
    makes a new one of as many aggregations: each of them reads set_size random members of the last
    population. seeds: one for each of P problems -> [rsa_steps + 1][P] Groups."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = config.eval_traces
    history = [search(policy, task, problems, config, size, generators, config.lattice)]
    for _ in range(config.rsa_steps):
        groups = history[-1]
        orders = [
            torch.rand(size, size, generator=generator).argsort(1) for generator in generators
        ]
        sets = [order[:, : config.set_size] for order in orders]
        aggregate(policy, task, groups, sets, config, 1, generators)
        history.append([])
        for group in groups:
            members = completions_of(group.aggregations)
            history[-1].append(Group([], members, group.problem))  # of no common prompt
    return history


def evaluate(policy, task, problems, config, seeds):
    """The rows of the table, {name: scores [P]}: of a trace, the best trace, and the traces' vote;
    after one step, of an aggregation and the aggregations' vote; after more steps, of the vote.
    seeds: one for each problem."""
    history = recursive_self_aggregation(policy, task, problems, config, seeds)
    size, rewards = config.eval_traces, rewards_of(history[0])
    label = f"{size} traces (lattice)" if config.lattice else f"{size} traces"
    scores = {"a trace is right": rewards.mean(1), f"one of {label} is right": rewards.amax(1)}
    for step, groups in enumerate(history):
        name = f"vote after step {step}"
        if step == 0:
            name = f"vote of {label}"
        if step == 1:
            name = f"vote of {size} aggregations"
            scores[f"one aggregation of {config.set_size}"] = rewards_of(groups).mean(1)
        scores[name] = torch.tensor([vote_reward(task, group) for group in groups])
    return scores


def report(policy, task, config, out, name):
    """Evaluates on held-out problems: a row of evaluation.jsonl; if that is interrupted, of fewer
    problems. Prints the table."""
    if config.eval_problems == 0:
        return
    problems = task.problems("test", config.eval_problems, 0)
    sums, done = Counter(), 0
    try:
        for start in tqdm(range(0, len(problems), 50), f"evaluating {name}", disable=None):
            part = problems[start : start + 50]
            end = start + len(part)
            seeds = range(start, end)
            for score_name, scores in evaluate(policy, task, part, config, seeds).items():
                sums[score_name] += scores.sum().item()
            done = end
    finally:
        if done:
            row = {"policy": name, "problems": done}
            row |= {score_name: round(total / done, 4) for score_name, total in sums.items()}
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "evaluation.jsonl", "a", encoding="utf-8") as file:
                print(json.dumps(row), file=file)
            print_table(evaluation_rows(out))


def evaluation_rows(out):
    path = out / "evaluation.jsonl"
    return [json.loads(line) for line in open(path, encoding="utf-8")] if path.exists() else []


def print_table(rows):
    """The last six evaluations, side by side."""
    for key in rows[-1]:
        print(f"{key:<35}", *[f"{row.get(key, ''):>10}" for row in rows[-6:]])


# ---- Training. Checkpoints are Hugging Face folders; randomness comes from seed and cursor ----

CHECKPOINTS = "step-" + "[0-9]" * 5  # a pattern of their names, up to step 99,999


def save_checkpoint(folder, state, policy, optimizer):
    """Written aside, flushed to disk, renamed: a kill leaves the last whole one. `state` is JSON.
    Raises OSError or SafetensorError if it can't be written."""
    aside = folder.with_name("unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside)
    policy.tokenizer.hf.save_pretrained(aside)
    masters = optimizer.param_groups[0]["params"]
    try:
        torch.save([masters, optimizer.state_dict()], aside / "optimizer.pt")
    except RuntimeError:  # torch speaks of streams
        raise OSError(f"can't write {aside}: is the disk full?") from None
    (aside / "state.json").write_text(json.dumps(state))
    for path in aside.rglob("*.*"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(aside, folder)


def remove_old_checkpoints(out):
    """All but the last two."""
    for folder in sorted(out.glob(CHECKPOINTS))[:-2]:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            print(f"  note: {folder} can't be removed: {error}")


def resume(config, out):
    """(folder, state) of the newest checkpoint, or (None, new state). Raises ValueError if the
    folder holds a run with other settings."""
    fixed = """algo search_credit published task data model seed train_problems lora_rank dtype
    num_traces set_size num_sets num_aggregations balanced"""
    settings = {name: getattr(config, name) for name in fixed.split()}
    settings["model"] = os.path.normpath(config.model)
    for folder in sorted(out.glob(CHECKPOINTS), reverse=True):
        state = json.loads((folder / "state.json").read_text("utf-8"))
        saved = vars(Config()) | state["run"]  # what an older version didn't save: the default
        for name, value in settings.items():
            if saved[name] != value:
                there = f"--{name.replace('_', '-')} {saved[name]}, here {value}"
                raise ValueError(f"{out} holds another run ({there}): choose another --out")
        print(f"resuming {folder}")
        return folder, state
    return None, {"run": settings, "step": 0, "cursor": 0, "metrics_bytes": 0}


def train_step(policy, optimizer, task, problems, state, config):
    """Rollout and update; `state` moves on. Returns (statistics, groups)."""
    began, step = time.time(), state["step"] + 1
    groups, useful, cursor = collect(policy, task, problems, state["cursor"], config)
    drawn = cursor - state["cursor"]
    state.update(step=step, cursor=cursor)

    answers, lr = aggregations_of(groups), config.lr * min(1.0, step / 5)
    optimizer.param_groups[0]["lr"] = lr
    updates = []
    for _ in range(config.updates):
        updates.append(update(policy, optimizer, groups + answers, max(1, useful), config))

    seconds = time.time() - began
    stats = updates[0] | {"step": step, "drawn": drawn, "useful": useful, "lr": lr}
    stats["skipped"] = sum(result["skipped"] for result in updates)
    stats["search"] = statistics(groups)
    stats["aggregation"] = statistics(answers or groups)  # grpo has traces alone
    stats["seconds"] = seconds
    stats["tokens_per_second"] = statistics(groups + answers)["tokens"] / seconds
    if torch.cuda.is_available():
        stats["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"step {step:3d}/{config.steps}  answer {stats['aggregation']['reward']:.3f}  "
        f"trace {stats['search']['reward']:.3f}  entropy {stats['search']['entropy']:.2f}  "
        f"gradient {stats['grad_norm']:.2f}  useful {useful}/{drawn}  {seconds:.1f}s"
    )
    return stats, groups


def take_steps(policy, optimizer, task, problems, state, config, out):
    """Steps up to config.steps, or until a signal: then it saves. Returns the signal, or 0."""
    from experiments import show

    out.mkdir(parents=True, exist_ok=True)
    metrics = open(out / "metrics.jsonl", "a", encoding="utf-8")
    state["metrics_bytes"] = min(state["metrics_bytes"], metrics.tell())
    metrics.truncate(state["metrics_bytes"])  # what came after the checkpoint comes again
    received = []  # signals. A step that has begun is finished, and saved
    for number in (SIGINT, SIGTERM):
        signal(number, lambda number, frame: received.append(number))
    while state["step"] < config.steps:
        stats, groups = train_step(policy, optimizer, task, problems, state, config)
        step = state["step"]
        first_reward = state.setdefault("first_reward", stats["search"]["reward"])
        for note in show.notes(stats, first_reward):
            print(f"  note: {note}")
        if metrics.seek(0, os.SEEK_END) != state["metrics_bytes"]:
            raise ValueError(f"another run writes into {out}")
        print(json.dumps(stats), file=metrics, flush=True)
        state["metrics_bytes"] = metrics.tell()
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            report(policy, task, config, out, f"step {step}")
        if received or step == config.steps or step % config.save_every == 0:
            print(f"--- step {step} ---\n{show.transcript(task, groups[0])}")
            save_checkpoint(out / f"step-{step:05d}", state, policy, optimizer)
            remove_old_checkpoints(out)
            if received:
                break
    signal(SIGINT, default_int_handler)
    signal(SIGTERM, SIG_DFL)
    return received[0] if received else 0


def train(task, config, out):
    """Evaluates the start of a new run, or resumes; trains; evaluates. Returns the exit code."""
    problems = task.problems("train", config.train_problems, config.seed)
    folder, state = resume(config, out)
    config = replace(config, model=str(folder or config.model))
    policy = load_policy(config, [task.prompt(problem) for problem in problems])
    optimizer = make_optimizer(policy.model, config.lr, folder)
    method = "grpo"
    if config.algo == "spiral":
        method = f"spiral, {config.search_credit} credit at weight {config.search_weight:g}"
    print(f"{method}, on {config.task}, into {out}/")
    if not folder:
        report(policy, task, config, out, "start")
    number = take_steps(policy, optimizer, task, problems, state, config, out)
    if number:
        print(f"saved after step {state['step']}; the same command goes on from there")
        return 128 + number

    name, rows = f"step {state['step']}", evaluation_rows(out)
    # An evaluation that was interrupted has fewer problems than the first, and doesn't count
    whole = [row["policy"] for row in rows if row["problems"] == rows[0]["problems"]]
    if name in whole:  # a finished run, called again
        print_table(rows)
    else:
        report(policy, task, config, out, name)
    example = getattr(task, "example", "...")
    options = f"--model {out}/step-{state['step']:05d} --task {config.task}"
    print(f'next: python spiral.py {options} --ask "{example}"')
    return 0


# ---- Command line ----


def parse_config(arguments=None):
    """Config from options, and from files of them (@presets/some.args). Raises ValueError."""
    lines = (Config.__doc__ or "").splitlines()
    texts = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    for option in fields(Config):
        option.metadata = {"help": texts.get(option.name, "")}
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = partial(shlex.split, comments=True)  # the lines of a file

    def fail(message):  # in one line, not with a page of usage
        raise ValueError(message)

    parser.error = fail
    return parser.parse_args_into_dataclasses(arguments)[0]


def run(config):
    """Training, evaluation or an answer, as the config says. Returns the exit code."""
    if "LOCAL_RANK" in os.environ:
        raise ValueError("this file runs in one process, on one GPU: start it without torchrun")
    task = tasks.make_task(config.task, config.data)
    name = config.algo if config.steps else "evaluation"
    out = Path(config.out or f"runs/{name}-{config.task.partition(':')[0]}-{config.seed}")
    if not str(out).isprintable():  # what the encoding lacks comes as lone surrogates
        raise ValueError(f"--out {ascii(str(out))}: set PYTHONUTF8=1")
    if config.ask:
        from experiments import show

        policy, problem = load_policy(config), task.question(config.ask)
        history = recursive_self_aggregation(policy, task, [problem], config, [config.seed])
        print("answer:", show.votes(task, history))
    elif config.steps:
        return train(task, config, out)
    else:
        report(load_policy(config), task, config, out, Path(config.model).name)
    return 0


def main(arguments=None):
    """Returns the exit code. Trouble that a user can mend ends in one line."""
    transformers.logging.disable_progress_bar()
    # A character that the terminal lacks is no reason to stop; a log is written line by line
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        return run(parse_config(arguments))
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError:
        message = "out of memory: lower --micro-batch-tokens, --sampler-memory or token limits"
        code = 2
    except (ValueError, OSError, ImportError, SafetensorError, torch.AcceleratorError) as error:
        message, code = (str(error).strip() or type(error).__name__).splitlines()[0], 2
    print(f"spiral.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
