"""SPIRAL: Learning to Search and Aggregate (arXiv 2606.23595), in one file.

One language model *searches*: N1 reasoning traces y_1..y_N1, sampled in parallel. And it
*aggregates*: for each of K sets G_k of n traces it writes N2 final answers z_km that read them.
In the paper only their rewards r_km count; our default verifies traces, too: search_credit().

    J(theta) = E_{y_1..y_n ~ pi(.|x)} E_{z ~ pi(.|x, y_1..y_n)} [ r(x, z) ]
    grad J   = E[ f(G) sum_{j in G} grad log pi(y_j|x) ]    search term: how useful was my set?
             + E[ r(x, z) grad log pi(z|x, G) ]             aggregation term: was this answer right?

    python spiral.py                      # the tiny policy learns countdown, on a laptop
    python spiral.py --algo grpo          # the baseline, as many completions
    python spiral.py --model runs/spiral-countdown-0/step-00030 --steps 0    # evaluate a checkpoint

Simplified on purpose: no critic, reward model, KL term, paged cache or asynchronous rollouts.
"""

import inspect
import json
import math
import os
import random
import re
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
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import tasks

# ---- Config: every field is a command line option, num_traces is --num-traces ----


@dataclass
class Config:
    algo: Literal["spiral", "grpo"] = "spiral"  # grpo: traces alone, by their own rewards
    search_credit: Literal["set", "trace", "pass", "curve"] = "curve"  # see search_credit()
    task: str = "countdown"  # or arithmetic, math, "countdown:numbers=4,high=30"
    data: str = ""  # for math: a JSONL of {"problem": ..., "answer": ...}
    model: str = "tiny"  # shipped; or a folder in Hugging Face format, or a hub id
    out: str = ""  # resumed if it holds a run; default runs/ALGO-TASK-SEED, or evaluation-TASK-SEED
    seed: int = 0  # fixes problems, traces and sets
    num_traces: int = 8  # N1: search traces per problem
    set_size: int = 4  # n: traces in a set
    num_sets: int = 4  # K: sets per problem
    num_aggregations: int = 4  # N2: aggregation traces per set
    balanced: bool = True  # every trace in equally many sets; off: sets drawn uniformly
    published: bool = False  # the paper's self-inclusive baselines; theirs is set credit, weight 1
    search_weight: float = 0.2  # of the search term; 1, with set credit, is the exact gradient of J
    lattice: bool = False  # training traces of a problem spread over the CDF: draw_codes()
    steps: int = 30  # training steps; 0: evaluate only
    problems: int = 16  # problems per step with an advantage that is not zero
    max_draws: int = 2  # draw at most this many times `problems` to find them
    train_problems: int = 8000  # at most so many, shuffled every time through
    updates: int = 1  # optimizer updates per rollout; 1 is plain REINFORCE
    clip: float = 0.2  # of the importance ratio; matters when updates > 1, or in bf16
    target_length: int = 0  # L_target: longer ones get no positive advantage; 0: off
    lr: float = 1e-4  # learning rate of AdamW, constant after 5 steps of warm-up
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    temperature: float = 1.0  # of all sampling, and of the log-probs in the loss
    max_prompt_tokens: int = 512  # longest aggregation prompt; candidates are cut to fit
    max_trace_tokens: int = 80  # longest search trace
    max_aggregation_tokens: int = 96  # longest aggregation trace
    rows: int = 512  # completions decoded at a time, and a quarter as many prompts held
    micro_batch_tokens: int = 4096  # tokens per forward and backward pass
    gradient_checkpointing: bool = False  # less memory, more time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bf16 trains fp32 copies
    lora_rank: int = 0  # of new LoRA adapters (peft); 0: all weights, or the adapters of --model
    eval_problems: int = 200  # held-out problems of the table; 0: no evaluation
    eval_traces: int = 8  # traces per held-out problem, and population of RSA
    rsa_steps: int = 2  # steps of recursive self-aggregation (RSA)
    save_every: int = 10  # steps between checkpoints, and between printed transcripts
    ask: str = ""  # answer this and stop: "4 9 13 61" to reach 61 with 4, 9 and 13

    def __post_init__(self):
        """Raises AssertionError or ValueError: one line that says what to change."""
        may_be_0 = "seed search_weight steps target_length lora_rank eval_problems rsa_steps"
        for name, x in vars(self).items():
            if type(x) in (int, float):
                fine = 0 <= x < 2**31 and (x or name in may_be_0.split())
                assert fine, f"--{name.replace('_', '-')} {x}: out of range"
        assert min(self.num_sets, self.num_aggregations) > 1, "--num-sets, --num-aggregations: < 2"
        fits = self.set_size < self.num_traces <= self.rows >= self.eval_traces
        assert fits, "--set-size must be below --num-traces, --rows at least that and --eval-traces"
        draw_sets(self.num_traces, self.set_size, self.num_sets, None, self.balanced)
        assert self.eval_traces % self.set_size == 0, "--eval-traces: not a multiple of --set-size"


# ---- Processes of torchrun: each holds the whole model, and trains on a share of the problems ----


def world():  # (rank, processes)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- Policy: a causal language model. Both roles share it; only the prompt differs ----

TINY = Path(__file__).resolve().parent / "tiny"
CHECKPOINTS = "step-" + "[0-9]" * 5  # a pattern of their names
# Models whose attention is causal and nothing else. Another one: add its type here and to the tests
PLAIN = "gpt2 gpt_neox llama mistral phi qwen2 qwen3".split()


@dataclass
class Policy:
    model: torch.nn.Module  # a transformers causal LM with attn_implementation "spiral"
    tokenizer: object  # .encode(str) .decode(tokens) .chat(str) .eos_ids .markers
    memory: object  # of `sample`: a Memory


def load_policy(config, questions=("",)):
    """The policy that config.model names, its adapters or all weights trainable. Raises, before
    weights are loaded, if it doesn't suit us, or if no aggregation prompt fits some question."""
    path = TINY if config.model == "tiny" else config.model
    path = os.path.abspath(path) if os.path.isdir(path) else path  # adapters remember it
    base, adapters = path, Path(path) / "adapter_config.json"
    if adapters.exists():  # a checkpoint of a LoRA run
        base = json.loads(adapters.read_text())["base_model_name_or_path"]
    settings = AutoConfig.from_pretrained(base, trust_remote_code=False)
    tiny = hasattr(settings, "spiral_tokenizer")
    tokenizer = tasks.TinyTokenizer() if tiny else tasks.HubTokenizer(base, settings)
    question = max(questions, key=lambda text: len(tokenizer.encode(text)))
    aggregation_prompt(tokenizer, question, ["0" * 99] * config.set_size, config.max_prompt_tokens)
    odd = hasattr(settings, "quantization_config") or getattr(settings, "sliding_window", None)
    plain = settings.model_type in PLAIN and not odd
    assert plain, f"{path}: quantized, or {settings.model_type} not known to be plain and causal"
    longest = max(config.max_trace_tokens, config.max_aggregation_tokens)
    fits = config.max_prompt_tokens + longest <= settings.max_position_embeddings
    assert fits, f"prompt and completion exceed {settings.max_position_embeddings} tokens"
    how = {"attn_implementation": "spiral", "use_safetensors": True, "output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=config.dtype, **how)
    assert not found["missing_keys"], f"{path} has no weights for {min(found['missing_keys'])}"
    if (rank := config.lora_rank) and not adapters.exists():
        from peft import LoraConfig

        torch.manual_seed(config.seed)  # the same adapters in every process
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        # Weights mapped from a file are aligned differently, and kernels then round differently
        parameter.data = parameter.data.clone()
        parameter.requires_grad = "lora_" in name or not hasattr(model, "peft_config")
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")  # eval for good: no dropout
    if config.gradient_checkpointing:  # its name in 5.23 is new, this one works as well
        model.gradient_checkpointing_enable()
        for module in model.modules():  # transformers checkpoints layers in training mode only
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    return Policy(model, tokenizer, Memory(model, config.rows, config.max_prompt_tokens, longest))


def attention(module, query, key, value, mask, scaling, attend, **kwargs):
    """What transformers calls in every layer: queries [B, H, T, D], keys, values [B, kv, T, D] ->
    [B, T, H, D]. Prefill, decoding and update each hand their own `attend` through the model."""
    return attend(module.layer_idx, query * scaling, key, value), None


AttentionInterface.register("spiral", attention)  # a name for transformers, nothing more


def causal_attention(layer, query, key, value, mask=None):
    """The `attend` of whole sequences: to all before, or as the mask [T, S] says."""
    how = {"scale": 1.0, "enable_gqa": query.shape[1] != key.shape[1]}
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **how)
    return out.transpose(1, 2)


def hidden_states(model, tokens, attend, positions=None):
    """Of tokens [B, T], at positions [B, T] (default: 0, 1 ...) -> [B, T, d], for head()."""
    out = model.base_model(tokens, position_ids=positions, use_cache=False, attend=attend)
    return out.last_hidden_state


def head(model, hidden, temperature):
    """Logits at `temperature` (0: all probability on one token), fp32 [..., V]."""
    return model.get_output_embeddings()(hidden).float().div_(max(temperature, 1e-6))


# ---- Sampler: a prompt is held once, all rows decode together, finished rows make room ----


@dataclass
class Completion:  # a trace or an aggregation; while it is sampled, a row of the batch
    prompt: int  # which one of the call
    place: int  # among the prompt's completions
    code: float  # see draw_codes()
    random: object = field(compare=False)  # random.Random(code)
    chance: float = 1.0  # probability of the tokens so far
    tokens: list = field(default_factory=list)  # up to and including EOS
    logprobs: list = field(default_factory=list)  # of the tokens, at the sampling temperature
    truncated: bool = True  # has no EOS
    text: str = ""
    reward: float = 0.0
    advantage: float = 0.0


class Memory:
    """Keys and values while decoding, allocated once. A prompt is held without its last token,
    which is the first input of its rows: so all tokens are sampled in one place, decode_step()."""

    def __init__(self, model, rows, prompt_tokens, new_tokens):
        settings = model.config
        queries = settings.num_attention_heads
        heads = getattr(settings, "num_key_value_heads", queries)
        width = getattr(settings, "head_dim", settings.hidden_size // queries)
        layers = settings.num_hidden_layers  # each with 2: keys, values
        zeros = partial(torch.zeros, layers, 2, dtype=model.dtype, device=model.device)
        self.own = zeros(rows, heads, new_tokens, width)
        self.prompts = zeros(rows // 4 + 2, heads, prompt_tokens, width)  # one is replay_graph()'s
        self.graphs = {}  # which share scratch memory, the pool
        self.pool = self.own.is_cuda and torch.cuda.graph_pool_handle()


def draw_codes(num_samples, generator=None, lattice=1):
    """Codes [num_samples] fp64 in [0, 1) of a prompt's completions. Those of a lattice, at (i +
    shift) / lattice in random order, spread over the CDF (QuasiMoTTo, arXiv 2607.01179). A token
    is the slice of the CDF that the code lies in. Where in it, scaled to [0, 1), is the next code,
    while another one of the lattice may share the tokens. Then come fresh uniforms."""
    shape = num_samples // lattice, lattice
    order = torch.rand(shape, generator=generator).argsort(1)
    shifts = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
    return ((order + shifts) / lattice).view(num_samples)


def draw_tokens(logits, codes):
    """Inverts the CDF: logits [B, V] fp32, codes [B] fp64 in [0, 1) -> [3, B] fp64: tokens, their
    log-probs, what is left of the codes: where in its token's slice each fell, uniform again."""
    logprobs = logits.log_softmax(-1)  # [B, V]
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    heights = (codes * cdf[:, -1])[:, None]
    tokens = torch.searchsorted(cdf, heights, right=True).clamp_(max=logits.shape[-1] - 1)  # [B, 1]
    logprob = logprobs.gather(-1, tokens)
    above, width = cdf.gather(-1, tokens) - heights, logprob.exp()  # slice: above the code, whole
    left = (1 - above / width).clamp(0, 1 - 2**-53)
    return torch.cat([tokens, logprob, left], 1).T


def prefill(policy, prompts, first):
    """Runs prompts (token lists), once each, into the places of memory from `first` on."""
    tokens = [torch.tensor(prompt[:-1] or [0]) for prompt in prompts]  # 0: nobody sees it
    tokens = pad_sequence(tokens, batch_first=True).to(policy.model.device)  # [U, L]
    cache = policy.memory.prompts[:, :, first : first + len(prompts), :, : tokens.shape[1]]

    def attend(layer, query, key, value):
        cache[layer] = torch.stack([key, value])
        return causal_attention(layer, query, key, value)  # pads come last: unseen

    hidden_states(policy.model, tokens, attend)


def decode(policy, active, held, prompts, num_samples, temperature, lattice):
    """A token for each row of `active`. held: prompts in memory, of `num_samples` rows each."""
    inputs = []
    for row in active:
        prompt, step = prompts[row.prompt], len(row.tokens)
        slot = held.index(row.prompt) * num_samples + row.place
        # Below 1 / lattice (with 1: always) a slice holds one code at most: a uniform is as good
        code = row.code if row.chance * lattice > 1 else row.random.random()
        inputs.append([(row.tokens or prompt)[-1], step, len(prompt) - 1, slot, code])
    inputs = torch.tensor(inputs, dtype=torch.float64).T.to(policy.model.device)
    columns = int(inputs[2].max()), int(inputs[1].max()) + 1  # in use: of prompts, of rows
    forward = replay_graph if policy.memory.pool else decode_step
    outputs = forward(policy, inputs, (len(held), *columns, num_samples), temperature)
    for row, (token, logprob, row.code) in zip(active, outputs.T.tolist(), strict=True):
        row.tokens.append(int(token))
        row.logprobs.append(logprob)
        row.chance *= math.exp(logprob)
        row.truncated = token not in policy.tokenizer.eos_ids


def decode_step(policy, inputs, shape, temperature):
    """inputs [5, B] fp64: last token, tokens so far, tokens of its prompt in memory, slot, code ->
    what draw_tokens() gives. shape: prompts, their columns, columns of rows, num_samples. To read a
    prompt once for all of its rows, these sit in a grid [U, num_samples] of slots. No shape depends
    on a value: it can be a CUDA graph."""
    count, prompt_columns, own_columns, num_samples = shape
    tokens, steps, lengths, slots = inputs[:4].long()
    prompts = policy.memory.prompts[:, :, :count, :, :prompt_columns]  # [layers, 2, U, kv, L, D]
    own = policy.memory.own[:, :, : len(slots), :, :own_columns]  # [layers, 2, B, kv, T, D]
    start, width = prompts.shape[4], own.shape[4]  # L, T
    index = torch.arange(len(slots) + start + width, device=slots.device)
    rows, column = index[: len(slots)], index[: start + width]
    seen = torch.where(column < start, column < lengths[:, None], column <= start + steps[:, None])
    bias = torch.where(seen, 0.0, -math.inf)[:, None, None]  # [B, 1, 1, L + T]

    def with_prompts(equation, x, held):
        """einsum of rows [B, kv, G, C] with what is held [U, kv, L, D] of their prompts."""
        grid = x.new_zeros(len(held) * num_samples, *x.shape[1:])
        grid[slots] = x
        grid = grid.unflatten(0, (-1, num_samples))  # [U, num_samples, kv, G, C]
        return torch.einsum(equation, grid, held).flatten(0, 1)[slots]

    def attend(layer, query, key, value):  # [B, H, 1, D] -> [B, 1, H, D]
        own[layer, :, rows, :, steps] = torch.stack([key, value], 1)[:, :, :, 0]
        (prompt_keys, prompt_values), (keys, values) = prompts[layer], own[layer]
        query = query.unflatten(1, (keys.shape[1], -1))[:, :, :, 0].float()  # [B, kv, G, D]
        keys, prompt_keys = keys.float(), prompt_keys.float()  # fused kernels add up so
        scores = [with_prompts("upkgd,ukld->upkgl", query, prompt_keys), query @ keys.mT]
        weights = (torch.cat(scores, -1) + bias).softmax(-1).to(values.dtype)
        of_prompt, of_own = weights.split([start, width], -1)
        mixed = with_prompts("upkgl,ukld->upkgd", of_prompt, prompt_values) + of_own @ values
        return mixed.flatten(1, 2)[:, None]

    hidden = hidden_states(policy.model, tokens[:, None], attend, (lengths + steps)[:, None])
    logits = head(policy.model, hidden[:, 0], temperature)  # [B, V]
    return draw_tokens(logits, inputs[4])


def replay_graph(policy, inputs, shape, temperature):
    """decode_step as a CUDA graph. Sizes are rounded up to powers of two: few graphs; the rows that
    this adds decode garbage in the last slot, of a prompt that nobody has."""
    memory, (prompts, *columns, num_samples), rows = policy.memory, shape, inputs.shape[1]
    size, *rounded = [1 << (n - 1).bit_length() for n in (rows, prompts + 1, *columns)]
    padded = inputs.new_zeros(5, memory.own.shape[2])[:, :size]
    padded[3] = -1  # the last slot
    padded[:, :rows] = inputs
    key = size, *rounded, num_samples, temperature
    step = partial(decode_step, policy, shape=(*rounded, num_samples), temperature=temperature)
    if key not in memory.graphs and len(memory.graphs) < 128:  # some 20 MB each
        graph = torch.cuda.make_graphed_callables(step, (padded.clone(),), pool=memory.pool)
        memory.graphs[key] = graph
    return memory.graphs.get(key, step)(padded)[:, :rows]


def compact(items, needed, cache):
    """Drops items not needed: the last one fills each gap, in cache[:, :, items] as well."""
    for i in reversed(range(len(items))):
        if not needed[i]:
            cache[:, :, i] = cache[:, :, len(items) - 1]
            items[i] = items[-1]
            items.pop()


@torch.no_grad()
def sample(
    policy, prompts, max_new_tokens, temperature=1.0, num_samples=1, generator=None, lattice=1
):
    """`num_samples` completions of each prompt (a list of token lists) -> [prompts][num_samples]
    Completions, the same in any batch. temperature 0 is greedy. generator: one, or a list of them,
    each for an equal part of the prompts. lattice: so many of a prompt's completions share one.
    Raises AssertionError for an empty prompt, and for what memory doesn't hold."""
    memory = policy.memory
    most_held, rows = memory.prompts.shape[2] - 1, memory.own.shape[2]  # one is replay_graph()'s
    lengths, columns = [len(prompt) for prompt in prompts], memory.prompts.shape[4]
    assert min(lengths, default=0) > 0, "sample needs at least one prompt, and a token in each"
    fits = max(lengths) <= columns and max_new_tokens <= memory.own.shape[4] and num_samples <= rows
    assert fits, "memory is too small: raise --max-prompt-tokens or --rows"
    generators, results = generator if isinstance(generator, list) else [generator], []
    for i in range(len(prompts)):
        source = generators[i * len(generators) // len(prompts)]
        codes = draw_codes(num_samples, source, lattice).tolist()
        results.append([Completion(i, j, x, random.Random(x)) for j, x in enumerate(codes)])
    waiting = sorted(range(len(prompts)), key=lambda i: -lengths[i])  # the longest go first
    active, held = [], []
    progress = tqdm(total=len(prompts) * num_samples, desc="sampling", delay=5, leave=False)
    while waiting or active:
        room = min((rows - len(active)) // num_samples, most_held - len(held))  # for prompts
        if waiting and 4 * room >= min(rows // num_samples, most_held):  # small batches are slow
            new, waiting = waiting[:room], waiting[room:]
            prefill(policy, [prompts[i] for i in new], len(held))
            held += new
            for i in new:
                active += results[i]
        decode(policy, active, held, prompts, num_samples, temperature, lattice)
        go_on = [row.truncated and len(row.tokens) < max_new_tokens for row in active]
        progress.update(go_on.count(False))
        compact(active, go_on, memory.own)  # finished rows leave, then prompts that nobody needs
        needed = {row.prompt for row in active}
        compact(held, [i in needed for i in held], memory.prompts)
    progress.close()
    return results


# ---- Sets, and the aggregation prompt ----


def draw_sets(num_traces, set_size, num_sets, generator=None, balanced=False):
    """`num_sets` distinct sets of `set_size` distinct traces -> LongTensor [K, n], each in random
    order; if balanced, each trace in K n / N1 of them. Raises ValueError when it finds none."""
    # Balanced: whole permutations, cut into sets. All is drawn again until no set comes twice
    total, used = num_sets * set_size, num_traces if balanced else set_size
    possible = set_size <= num_traces and total % used == 0
    for _ in range(1000 * possible):
        orders = [torch.randperm(num_traces, generator=generator) for _ in range(total // used)]
        sets = torch.stack(orders)[:, :used].reshape(num_sets, set_size)
        distinct = {frozenset(members) for members in sets.tolist()}
        if sum(map(len, distinct)) == total:
            return sets
    raise ValueError(f"no {num_sets} sets of {set_size} of {num_traces} traces: --no-balanced?")


def neutralise(text, markers):
    """Sampled text that can close no candidate, open none, and write no special token."""
    text = re.sub(r"<(/?)candidate", r"(\1candidate", text, flags=re.IGNORECASE)
    # What comes instead is in no marker: else pieces around it could become one
    return re.sub("|".join(map(re.escape, markers)) or "$^", "\ufffd", text)


def aggregation_prompt(tokenizer, prompt, traces, max_tokens=0):
    """Tokens of the problem's prompt and numbered candidates (strings). Over `max_tokens` (0: no
    limit) the longest lose their beginnings. AssertionError when the problem leaves no room."""
    texts = [neutralise(trace, tokenizer.markers) for trace in traces]
    bodies = [tokenizer.encode(text) for text in texts]
    most = max(map(len, bodies))  # tokens of a candidate
    while True:
        message = prompt
        for i, body in enumerate(bodies):
            text = texts[i] if len(body) <= most else tokenizer.decode(body[-most:])
            message += tasks.CANDIDATE.format(i + 1) + text + tasks.CANDIDATE_END
        tokens = tokenizer.chat(message + tasks.AGGREGATE)
        over = len(tokens) - max_tokens
        if over <= 0 or not max_tokens:
            return tokens
        most -= 1 + over // (2 * len(bodies))
        assert most > 0, f"no room for candidates in {max_tokens} tokens: raise --max-prompt-tokens"


# ---- Advantages: sum_j a_j grad log pi(y_j) + sum_km b_km grad log pi(z_km) estimates grad J ----


def search_advantages(rewards, sets, num_traces, balanced=False, published=False):
    """Set credit (see experiments/): rewards [P, K, N2], sets [P, K, n] -> a_j, [P, N1].
    A_set(k) = f_k - mean_{l != k} f_l is the set's score against the other sets', and
    a_j = sum_{k: j in G_k} A_set(k) / (K (1 - p)). p is the chance that another set holds j too:
    j's own score is then in the baseline, which cancels this fraction of its signal. published:
    self-inclusive baseline, and the mean over the sets that hold j."""
    _, num_sets, set_size = sets.shape
    scores = rewards.mean(-1)  # [P, K] f_k
    member = F.one_hot(sets, num_traces).sum(2)  # [P, K, N1]
    from_mean = scores - scores.mean(1, keepdim=True)  # [P, K]
    if published:
        return (from_mean[:, :, None] * member).sum(1) / member.sum(1).clamp(min=1)
    against_others = from_mean * num_sets / (num_sets - 1)  # [P, K] A_set(k)
    # p, balanced: R - 1 of the K - 1 other sets hold j, R = K n / N1. Else the sets are any others
    # of all C(N1, n), of which C(N1, n) n / N1 hold j: the same with C(N1, n) for K
    every = num_sets if balanced else comb(num_traces, set_size)
    p = (every * set_size / num_traces - 1) / (every - 1)
    return (against_others[:, :, None] * member).sum(1) / (num_sets * (1 - p))


def aggregation_advantages(rewards, published=False):
    """b_km = (r_km - mean_{m' != m} r_km') / (K N2), [P, K, N2]. published: r_km - mean_m r_km."""
    _, num_sets, many = rewards.shape
    from_mean = rewards - rewards.mean(-1, keepdim=True)
    # Leaving one out is N2 / (N2 - 1) times as far from the mean; N2 is then in the scale as well
    return from_mean if published else from_mean / (num_sets * (many - 1))


def grpo_advantages(rewards):
    """(r_j - mean_{i != j} r_i) / G: rewards [P, G] -> [P, G]. No standard deviation: unbiased."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.shape[-1] - 1)


def curve_advantages(trace_rewards, curve, set_size):
    """Set credit with far less noise, and bias (see experiments/): trace_rewards [P, N1], 0 or 1,
    curve [n + 1] -> [P, N1]. curve[c], how often aggregations are right when c of n candidates are,
    scores all C(N1, n) sets for nothing. A trace gets n / N1 times the mean score of the sets that
    hold it minus that of the others. c / n makes this grpo_advantages, a step at 1 pass@n."""
    many, right = trace_rewards.shape[1], trace_rewards.long()
    right_others = right.sum(1, keepdim=True) - right  # [P, N1]

    def mean_score(m, size, r):
        """Of all sets of `size` of the others, m of them right, and of r right ones."""
        ways = [comb(m, c) * comb(many - 1 - m, size - c) for c in range(size + 1)]
        return torch.tensor([x / sum(ways) for x in ways]) @ curve[r : r + size + 1]

    credit = [  # [2, N1]: by the trace's reward, and right ones of the others
        [mean_score(m, set_size - 1, r) - mean_score(m, set_size, 0) for m in range(many)]
        for r in range(2)
    ]
    return set_size / many * torch.tensor(credit)[right, right_others]


def search_credit(config, trace_rewards, rewards, sets, curve):
    """a_j [P, N1]. set: by aggregations alone, as in the paper. The others ask the verifier about
    traces: trace, as GRPO would; pass, for pass@n; curve, for what aggregations made of them."""
    n, kind = config.set_size, config.search_credit
    if kind != "set":
        share = torch.arange(n + 1) / n
        curves = {"trace": share, "pass": share.ceil(), "curve": curve}
        return curve_advantages(trace_rewards, curves[kind], n)
    return search_advantages(rewards, sets, config.num_traces, config.balanced, config.published)


# ---- Update: a prompt and its completions are one flat sequence: the prompt runs once ----


@dataclass
class Group:
    prompt: list  # token ids
    completions: list


def micro_batches(groups, budget):
    """Completions with an advantage, in lists of Groups of at most `budget` tokens, or of one."""
    batch, tokens = [], 0
    for prompt, c in [(g.prompt, c) for g in groups for c in g.completions if c.advantage]:
        if batch and tokens + len(prompt + c.tokens) > budget:
            yield batch
            batch, tokens = [], 0
        if not batch or batch[-1].prompt is not prompt:
            batch.append(Group(prompt, []))
            tokens += len(prompt)
        batch[-1].completions.append(c)
        tokens += len(c.tokens)
    if batch:
        yield batch


def token_logprobs(model, hidden, targets, temperature, chunk_elements=1 << 24):
    """Log-probs [N] fp32 of targets [N] from hidden states [N, d]. Logits are made in chunks, and
    made again in the backward pass, so that [N, V] is never there."""

    def chunk_logprobs(hidden, targets):
        return -F.cross_entropy(head(model, hidden, temperature), targets, reduction="none")

    size = 1 + chunk_elements // len(model.get_output_embeddings().weight)
    recomputed = partial(checkpoint, chunk_logprobs, use_reentrant=False)
    return torch.cat([*map(recomputed, hidden.split(size), targets.split(size))])


def completion_logprobs(model, groups, temperature):
    """(log-probs, the sampler's log-probs, advantages), [N] each, of all sampled tokens of groups,
    in one flat sequence. A prompt runs once, before its completions. As in the sampler, its last
    token is each one's first input: so every place in a completion predicts the token there."""
    # Pieces: p_0 .. p_L-1, then p_L a_0 a_1, p_L b_0 b_1 b_2 ...; targets: a_0 a_1 a_2, b_0 b_1 ...
    sizes, masks, table = [], [], []
    for group in groups:
        *prompt, last = group.prompt
        start = len(prompt)
        sizes.append(start)
        masks.append(None)
        table += [(token, i, -1, 0, 0) for i, token in enumerate(prompt)]  # -1: not sampled
        for c in group.completions:
            size = len(c.tokens)
            sizes.append(size)
            masks.append(causal_lower_right(size, start + size))  # all that was there to be read
            inputs, places = [last, *c.tokens[:-1]], range(start, start + size)
            table += zip(inputs, places, c.tokens, c.logprobs, [c.advantage] * size, strict=True)
    table = torch.tensor(table, device=model.device).T  # [5, M]
    inputs, positions, targets = table[:3, None].long()  # [1, M]

    def attend(layer, *parts):  # queries [1, H, M, D], keys, values [1, kv, M, D] -> ..
        out, split = [], [x.split(sizes, 2) for x in parts]
        for mask, query, *own in zip(masks, *split, strict=True):
            if mask is None:
                prompt = own
            else:  # keys, values [1, kv, L + T, D]
                own = [torch.cat(pair, 2) for pair in zip(prompt, own, strict=True)]
            out.append(causal_attention(layer, query, *own, mask))
        return torch.cat(out, 1)

    hidden = hidden_states(model, inputs, attend, positions)[0]  # [M, d]
    sampled = targets[0] >= 0
    logprobs = token_logprobs(model, hidden[sampled], targets[0, sampled], temperature)  # [N]
    return logprobs, *table[3:, sampled]


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """PPO's clipped loss, a sum over tokens; all [N]. In fp32 the first update is REINFORCE."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def make_optimizer(model, lr, folder=None):
    """AdamW on fp32 masters of the trained parameters; each micro-batch's gradients are added to
    theirs. fp32 parameters share their memory, bf16 ones are copies. folder: to go on from."""
    masters = {p: p.detach().float() for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(masters.values(), lr, (0.9, 0.95), weight_decay=0, foreach=False)

    def to_master(parameter):
        masters[parameter].grad += parameter.grad
        parameter.grad = None

    def from_masters(*_):
        for parameter, master in masters.items():
            parameter.data.copy_(master)

    for parameter in masters:
        parameter.register_post_accumulate_grad_hook(to_master)
    optimizer.register_step_post_hook(from_masters)
    if folder:  # weights_only: tensors and plain containers, no code
        saved, adam = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(adam)
        for master, x in zip(masters.values(), saved, strict=True):
            master.copy_(x)
    return optimizer


def update(policy, optimizer, groups, num_problems, config):
    """One optimizer step on the mean of the estimate over num_problems, those of all processes: so
    micro-batches don't change the gradient. No step without finite loss and gradient."""
    masters = optimizer.param_groups[0]["params"]
    for master in masters:
        master.grad = torch.zeros_like(master)
    sums = torch.zeros(3)  # loss, distance from the sampler's log-probs, tokens
    for batch in micro_batches(groups, config.micro_batch_tokens):
        logprobs, old, advantages = completion_logprobs(policy.model, batch, config.temperature)
        loss = policy_loss(logprobs, old, advantages, config.clip) / num_problems
        loss.backward()
        distance = (logprobs.detach() - old).abs().sum()
        sums += torch.tensor([loss.item(), distance.item(), len(old)])
    loss, distance, tokens = add_up(sums).tolist()
    for master in masters:
        add_up(master.grad)
    norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm).item()
    finite = math.isfinite(norm + loss)
    if finite and tokens:
        optimizer.step()
    optimizer.zero_grad()
    away = distance / max(tokens, 1)
    return {"loss": loss, "grad_norm": norm, "logprob_difference": away, "skipped": not finite}


# ---- Rollout and dynamic sampling: traces -> sets -> aggregations -> rewards -> advantages ----


def score(policy, task, problems, prompts, results):
    """[P] Groups of what was sampled, with texts and rewards."""
    # Some chat templates begin the thought that the verifier and the aggregator must not see
    thinks = policy.tokenizer.decode(prompts[0]).rstrip().endswith("<think>")
    for problem, completions in zip(problems, results, strict=True):
        for c in completions:
            c.text = "<think>" * thinks + policy.tokenizer.decode(c.tokens)
            c.reward = float(task.reward(problem, c.text))
    return list(map(Group, prompts, results))


def search(policy, task, problems, config, num_samples, generator, lattice=1):
    """`num_samples` traces of each problem -> [P] Groups."""
    prompts = [policy.tokenizer.chat(task.prompt(problem)) for problem in problems]
    how = config.max_trace_tokens, config.temperature, num_samples, generator, lattice
    return score(policy, task, problems, prompts, sample(policy, prompts, *how))


def aggregate(policy, task, problems, groups, sets, config, num_samples, generator):
    """`num_samples` aggregations of sets of members of the groups: [P][K][n] -> [P][K] Groups."""
    owners, prompts = [], []
    for i, chosen in enumerate(sets):
        for members in chosen:
            texts = [tasks.after_thought(groups[i].completions[j].text) for j in members]
            how = texts, config.max_prompt_tokens
            prompts.append(aggregation_prompt(policy.tokenizer, task.prompt(problems[i]), *how))
            owners.append(problems[i])
    how = config.max_aggregation_tokens, config.temperature, num_samples, generator
    found = iter(score(policy, task, owners, prompts, sample(policy, prompts, *how)))
    return [[next(found) for _ in chosen] for chosen in sets]


@dataclass
class Record:  # one problem's rollout
    problem: object
    search: Group  # N1 traces; for grpo N1 + K N2
    aggregations: list  # K Groups of N2 aggregations
    sets: torch.Tensor  # [K, n] indices of traces; for grpo []

    def completions(self):
        return [c for group in [self.search, *self.aggregations] for c in group.completions]


def rewards_of(groups):
    """[groups, completions] fp32."""
    return torch.tensor([[c.reward for c in group.completions] for group in groups])


def assign_advantages(groups, advantages, target_length):
    """Hands out advantages [groups, completions], beyond L_target none > 0 (see experiments/)."""
    completions = [c for group in groups for c in group.completions]
    for c, advantage in zip(completions, advantages.flatten().tolist(), strict=True):
        gated = advantage > 0 and 0 < target_length < len(c.tokens)
        c.advantage = 0.0 if gated else advantage


def rollout(policy, task, problems, config, generators, curve):
    """The whole pipeline on P problems, each with its own generator -> P Records."""
    num_traces, many, grpo = config.num_traces, config.num_aggregations, config.algo == "grpo"
    if grpo:
        num_traces += config.num_sets * many  # as many completions as spiral samples
    lattice = num_traces if config.lattice else 1
    found = search(policy, task, problems, config, num_traces, generators, lattice)  # P groups
    trace_rewards = rewards_of(found)  # [P, N1]
    if grpo:
        sets = answers = [[]] * len(problems)
        credit = grpo_advantages(trace_rewards)
    else:
        sizes = num_traces, config.set_size, config.num_sets
        sets = [draw_sets(*sizes, generator, config.balanced) for generator in generators]
        answers = aggregate(policy, task, problems, found, sets, config, many, generators)
        rewards = torch.stack([*map(rewards_of, answers)])  # [P, K, N2]
        credit = search_credit(config, trace_rewards, rewards, torch.stack(sets), curve)  # [P, N1]
        credit *= config.search_weight
        advantages = aggregation_advantages(rewards, config.published)
        assign_advantages(sum(answers, []), advantages, config.target_length)
    assign_advantages(found, credit, config.target_length)
    return list(map(Record, problems, found, answers, sets))


def problem_at(problems, seed, i):
    """The i-th problem of an endless stream, shuffled anew each time through."""
    epoch, place = divmod(i, len(problems))
    return random.Random(f"{seed} {epoch}").sample(problems, len(problems))[place]


def collect(policy, task, problems, cursor, config, curve):
    """Dynamic sampling: rolls out until config.problems have an advantage, or max_draws times as
    many are drawn. Returns (records, useful problems of all processes, cursor after the last)."""
    rank, processes = world()
    records, useful, limit = [], 0, cursor + config.max_draws * config.problems
    while useful < config.problems and cursor < limit:
        missing = max(config.problems - useful, config.problems // 4)  # small rollouts are slow
        drawn = range(cursor, min(cursor + missing, limit))
        cursor = drawn.stop
        mine = drawn[rank::processes]
        if mine:
            generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + i) for i in mine]
            batch = [problem_at(problems, config.seed, i) for i in mine]
            records += rollout(policy, task, batch, config, generators, curve)
        useful = sum(any(c.advantage for c in record.completions()) for record in records)
        useful = int(add_up(torch.tensor(useful)))
    return records, useful, cursor


def response_counts(records, set_size):
    """[2, n + 1]: aggregations that were right, and all, by the number of right candidates."""
    counts = torch.zeros(2, set_size + 1)
    for record in records:
        for members, group in zip(record.sets, record.aggregations, strict=True):
            right = int(sum(record.search.completions[j].reward for j in members))
            counts[:, right] += torch.tensor([[c.reward, 1] for c in group.completions]).sum(0)
    return add_up(counts)


# ---- Evaluation, and what people read ----


def statistics(groups):
    """Of this process: how often right and cut off, tokens, entropy in nats a token."""
    every = [c for group in groups for c in group.completions]
    tokens, count = sum(len(c.tokens) for c in every), max(1, len(every))
    return {
        "tokens": tokens,
        "length": tokens / count,
        "reward": sum(c.reward for c in every) / count,
        "truncated": sum(c.truncated for c in every) / count,
        "entropy": -sum(sum(c.logprobs) for c in every) / max(1, tokens),
    }


def notes(stats, start):
    """Plain lines about what people otherwise puzzle over. start: the first step's trace reward."""
    search, answers, apart = stats["search"], stats["aggregation"], stats["logprob_difference"]
    cut_off = answers["truncated"] > 0.5 and answers != search  # which for grpo are the same
    signs = {
        f"all advantages are 0; {answers['reward']:.0%} of answers are right": not stats["useful"],
        "most traces are cut off: raise --max-trace-tokens": search["truncated"] > 0.5,
        "most answers are cut off: raise --max-aggregation-tokens": cut_off,
        "the search collapses: lower --lr or --search-weight": search["reward"] < 0.5 * start,
        f"sampler and trainer are {apart:.1e} nats a token apart": apart > 0.1,
        "loss or gradient is not finite: no step. Lower --lr": stats["skipped"],
    }
    return [note for note, seen in signs.items() if seen]


def transcript(task, record):
    """A problem as a person reads it: traces, the best set's aggregations, and advantages."""
    shown = [("trace", c) for c in record.search.completions]
    if record.aggregations:
        best = int(rewards_of(record.aggregations).mean(1).argmax())
        title = f"aggregation of {(record.sets[best] + 1).tolist()}"
        shown += [(title, c) for c in record.aggregations[best].completions]
    text = task.prompt(record.problem)
    for i, (title, c) in enumerate(shown, 1):
        text += f"\n{i}. {title}   reward {c.reward:.0f}   advantage {c.advantage:+.3f}\n{c.text}\n"
    return text


def pass_at_k(num_samples, num_correct, k):
    """Chance that one of k samples is right, unbiased (arXiv 2107.03374); ValueError over all."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} can't be estimated from {num_samples} samples")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_vote(answers):
    """The most frequent answer; of several, the one seen first. None (no answer) doesn't vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get, default=None)


def vote_reward(task, completions):
    """The reward of a completion of the winning group; 0 when nobody answers."""
    answers = [task.answer(c.text) for c in completions]
    winner = majority_vote(answers)
    return 0.0 if winner is None else completions[answers.index(winner)].reward


def recursive_self_aggregation(
    policy, task, problems, config, population=None, steps=1, generator=None
):
    """RSA (arXiv 2509.26626): a member of the next population aggregates `set_size` random ones.
    population: [P] Groups, else config.eval_traces traces. Returns Groups, [steps + 1][P]."""
    size = config.eval_traces
    groups = population or search(policy, task, problems, config, size, generator, size)
    size, history = len(groups[0].completions), [groups]
    for _ in range(steps):
        orders = torch.rand(len(problems), size, size, generator=generator).argsort(2)
        sets = orders[:, :, : config.set_size]
        answers = aggregate(policy, task, problems, history[-1], sets, config, 1, generator)
        history.append([Group([], [g.completions[0] for g in groups]) for groups in answers])
    return history


def solve(policy, task, problem, config, generator=None):
    """Traces, steps of self-aggregation, a vote: prints all votes, returns the answer or None."""
    how = [problem], config, None, config.rsa_steps, generator
    for step, (group,) in enumerate(recursive_self_aggregation(policy, task, *how)):
        answers = [task.answer(c.text) for c in group.completions]
        votes = Counter(answer or "no answer" for answer in answers)
        print(f"votes after {step} aggregations: {dict(votes.most_common())}")
        print(f"one of the texts: {group.completions[0].text}")
    return majority_vote(answers)


def evaluate(policy, task, problems, config, generator):
    """Mean scores. A problem's traces are one lattice: higher pass@k than of independent ones."""
    n, size = config.set_size, config.eval_traces
    found = search(policy, task, problems, config, size, generator, size)
    rewards = rewards_of(found)  # [P, S]
    sets = [torch.arange(size).view(-1, n)] * len(problems)  # [P][S / n, n]
    found_sets = aggregate(policy, task, problems, found, sets, config, 1, generator)
    answers = rewards_of(sum(found_sets, []))[:, 0]  # [P S / n]
    hopeless = rewards.view(-1, n).sum(1) == 0  # [P S / n]: sets without a right trace
    votes = torch.tensor([vote_reward(task, group.completions) for group in found])
    scores = {"pass@1": rewards, f"pass@{size}": rewards.amax(1), f"majority@{size}": votes}
    scores |= {f"aggregate@{n}": answers, "hopeless sets": hopeless, "emergent": answers * hopeless}
    how = config, found, config.rsa_steps, generator
    for step, groups in enumerate(recursive_self_aggregation(policy, task, problems, *how)):
        scores[f"rsa step {step}"] = rewards_of(groups)
    stats = statistics(found)
    del stats["reward"], stats["tokens"]
    return {name: x.float().mean().item() for name, x in scores.items()} | stats


# ---- Training. Checkpoints are Hugging Face folders; randomness comes from seed and cursor ----


def save_checkpoint(folder, state, policy, optimizer):
    """Written aside, flushed, renamed: a kill leaves the last whole one. `state` is JSON."""
    aside = folder.with_name("unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside)
    if hasattr(policy.tokenizer, "hf"):  # the tiny one is named in config.json
        policy.tokenizer.hf.save_pretrained(aside)
    masters = optimizer.param_groups[0]["params"]
    try:
        torch.save([masters, optimizer.state_dict()], aside / "optimizer.pt")
    except RuntimeError:  # torch speaks of streams
        raise OSError(f"can't write {aside}: is the disk full?") from None
    (aside / "state.json").write_text(json.dumps(state))
    os.sync()
    os.replace(aside, folder)


def resume(config, out):
    """(folder, state) of the newest checkpoint, or (None, new state). Refuses another run's."""
    fixed = """algo search_credit published lattice task data model seed train_problems lora_rank
    dtype num_traces set_size num_sets num_aggregations balanced""".split()
    run = {name: getattr(config, name) for name in fixed}
    for folder in sorted(out.glob(CHECKPOINTS), reverse=True):
        state = json.loads((folder / "state.json").read_text())
        assert state["run"] == run, f"{out} holds another run, {state['run']}: choose another --out"
        print(f"resuming {folder}")
        return folder, state
    curve = [[0.0] * (config.set_size + 1)] * 2
    return None, {"run": run, "step": 0, "cursor": 0, "metrics_bytes": 0, "curve": curve}


def train_step(policy, optimizer, task, problems, state, config):
    """Rollout and update; `state` moves on. Returns (statistics, records)."""
    began, step = time.time(), state["step"] + 1
    counts = torch.tensor(state["curve"])  # [2, n + 1] of earlier steps
    prior = torch.linspace(0, 1, config.set_size + 1)  # c / n, which counts as one aggregation
    curve = (counts[0] + prior) / (counts[1] + 1)
    records, useful, cursor = collect(policy, task, problems, state["cursor"], config, curve)
    drawn = cursor - state["cursor"]
    counts = 0.9 * counts + response_counts(records, config.set_size)
    state |= {"step": step, "cursor": cursor, "curve": counts.tolist()}
    optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / 5)
    traces = [record.search for record in records]
    answers = [group for record in records for group in record.aggregations]
    how = traces + answers, max(1, useful), config
    stats, *more = [update(policy, optimizer, *how) for _ in range(config.updates)]
    stats["skipped"] += sum(later["skipped"] for later in more)
    stats |= {"step": step, "drawn": drawn, "useful": useful, "curve": curve.tolist()}
    stats |= {"search": statistics(traces), "aggregation": statistics(answers or traces)}
    print(
        f"step {step:3d}/{config.steps}  answer {stats['aggregation']['reward']:.3f}  "
        f"trace {stats['search']['reward']:.3f}  entropy {stats['search']['entropy']:.2f}  "
        f"gradient {stats['grad_norm']:.2f}  useful {useful}/{drawn}  {time.time() - began:.1f}s"
    )
    for note in notes(stats, state.setdefault("start", stats["search"]["reward"])):
        print(f"  note: {note}")
    return stats, records


def train(task, config, out):
    """Evaluates the start of a new run, or resumes; steps; evaluates. Returns the exit code."""
    problems = task.problems("train", config.train_problems, config.seed)
    folder, state = resume(config, out)
    config = replace(config, model=str(folder or config.model))
    policy = load_policy(config, map(task.prompt, problems))
    optimizer = make_optimizer(policy.model, config.lr, folder)
    print(f"{config.algo} on {config.task}, into {out}/")
    if not folder:
        report(policy, task, config, out, "start")
    metrics = open(out / "metrics.jsonl", "a")
    metrics.truncate(state["metrics_bytes"])  # what came after the checkpoint comes again
    signals, stop = [], 0
    for number in SIGINT, SIGTERM:
        signal(number, lambda number, _: signals.append(number))
    for step in range(state["step"] + 1, config.steps + 1):
        stats, records = train_step(policy, optimizer, task, problems, state, config)
        stop = int(add_up(torch.tensor(len(signals))))  # all processes, or none
        save = not step % config.save_every or step == config.steps or stop
        if records and save:
            print(f"--- step {step} ---\n{transcript(task, records[0])}")
        if not world()[0]:
            assert metrics.seek(0, 2) == state["metrics_bytes"], f"another run writes into {out}"
            print(json.dumps(stats), file=metrics, flush=True)
            state["metrics_bytes"] = metrics.tell()
            if save:
                save_checkpoint(out / f"step-{step:05d}", state, policy, optimizer)
            for old in sorted(out.glob(CHECKPOINTS))[:-2]:
                shutil.rmtree(old)
        if stop:
            break
    signal(SIGINT, default_int_handler)
    signal(SIGTERM, SIG_DFL)
    if stop or signals:
        print(f"saved after step {state['step']}; the same command goes on from there")
        return 128 + max(signals, default=SIGTERM)
    report(policy, task, config, out, f"step {state['step']}")
    return 0


def report(policy, task, config, out, name):
    """Evaluates on held-out problems: a row of evaluation.jsonl, of fewer problems after Ctrl-C."""
    out.mkdir(parents=True, exist_ok=True)
    problems = task.problems("test", config.eval_problems, 0) if config.eval_problems else []
    generator, sums, done = torch.Generator().manual_seed(0), Counter(), 0
    try:
        for start in tqdm(range(0, len(problems), 50), f"evaluating {name}", leave=False):
            part = problems[start : start + 50]
            for key, score in evaluate(policy, task, part, config, generator).items():
                sums[key] += score * len(part)
            done += len(part)
    finally:
        if done and not world()[0]:
            row = {"policy": name, "problems": done}
            row |= {key: round(x / done, 4) for key, x in sums.items()}
            with open(out / "evaluation.jsonl", "a") as file:
                print(json.dumps(row), file=file)
            rows = [json.loads(line) for line in open(out / "evaluation.jsonl")]
            for key in row:
                print(f"{key:<18}", *[f"{old.get(key, ''):>11}" for old in rows[-6:]])


# ---- Command line ----


def parse_config(arguments=None):
    """Config from options, and from files of them (@presets/some.args). Raises as Config."""
    texts = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for option in fields(Config):
        option.metadata = {"help": texts[option.name]}
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, fromfile_prefix_chars="@")

    def fail(message):  # in one line, not with a page of usage
        raise ValueError(message)

    parser.error = fail
    return parser.parse_args_into_dataclasses(arguments)[0]


def run(config):
    """Training, evaluation or an answer, as the config says. Returns the exit code."""
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if dist.get_rank():  # one speaks for all
            sys.stdout = open(os.devnull, "w")
    task = tasks.make_task(config.task, config.data)
    name = config.algo if config.steps else "evaluation"
    out = Path(config.out or f"runs/{name}-{config.task.partition(':')[0]}-{config.seed}")
    if config.ask:
        problem, generator = task.question(config.ask), torch.Generator().manual_seed(config.seed)
        print("answer:", solve(load_policy(config), task, problem, config, generator))
    elif config.steps:
        return train(task, config, out)
    else:
        report(load_policy(config), task, config, out, Path(config.model).name)
    return 0


def main(arguments=None):
    """Returns the exit code. Trouble that a user can mend ends in one line."""
    transformers.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):  # terminals that lack a character; logs to follow
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        return run(parse_config(arguments))
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError:
        message, code = "out of memory: lower --micro-batch-tokens, --rows or the token limits", 2
    except (AssertionError, ValueError, OSError, ImportError, SafetensorError) as error:
        message, code = (str(error).strip() or type(error).__name__).splitlines()[0], 2
    print(f"spiral.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
