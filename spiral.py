"""SPIRAL: Learning to Search and Aggregate (arXiv 2606.23595), in one file.

One language model *searches*: N1 reasoning traces y_1..y_N1, sampled in parallel. And it *aggregates*: for each of K sets G_k of n traces it
writes N2 final answers z_km that read them. Only these are rewarded (r_km, by the task's verifier). The objective, and its gradient:

    J(theta)   = E_{y_1..y_n ~ pi(.|x)} E_{z ~ pi(.|x, y_1..y_n)} [ r(x, z) ]
    grad J     = E[ f(G) sum_{j in G} grad log pi(y_j|x) ]      search term: how useful was the set I was in?   (set RL)
               + E[ r(x, z) grad log pi(z|x, G) ]               aggregation term: was this answer right?        (standard RL)

    python spiral.py                                   # the tiny policy learns countdown: minutes on a laptop
    python spiral.py --algo grpo                       # the baseline, at the same budget of sampled tokens
    python spiral.py --model runs/spiral-countdown-0/step-30 --steps 0      # evaluate a saved policy

Left out on purpose: a paged KV cache, asynchronous rollouts, a reward model, a critic. Read from top to bottom.
"""

import argparse, collections, functools, hashlib, itertools, json, math, os, re, shutil, signal, sys, time  # noqa: E401
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np, safetensors.torch, tiktoken, torch, torch.distributed as dist, transformers  # noqa: E401
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GradientCheckpointingLayer
import tasks

# ---- Config: every field is a command line option (num_traces is --num-traces) and its help. ------------------------
def option(default, text, choices=None, low=None):          # low: the least value allowed; without it it must be above 0
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})

@dataclass
class Config:
    algo: str = option("spiral", "grpo: traces alone; grpo-agg: traces rewarded one by one, aggregation as in spiral", ("spiral", "grpo", "grpo-agg"))
    task: str = option("countdown", 'countdown, arithmetic or math, with options: "countdown:numbers=4,high=30"')
    data: str = option("", 'problems of --task math: a JSONL of {"problem": ..., "answer": ...}')
    model: str = option("tiny", "tiny (its warm start is shipped), a folder in Hugging Face format, or a hub id")
    out: str = option("", "folder of the run; default runs/ALGO-TASK-SEED. One that holds an unfinished run is resumed")
    seed: int = option(0, "fixes problems, traces and sets", low=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    # The four sizes, and the estimator (paper.md sections 2 to 5)
    num_traces: int = option(8, "N1: search traces per problem")
    set_size: int = option(4, "n: traces in a set")
    num_sets: int = option(4, "K: sets per problem")
    num_aggregations: int = option(4, "N2: aggregation traces per set")
    balanced: bool = option(True, "every trace in the same number of sets; off: sets drawn uniformly")
    estimator: str = option("leave-one-out", "exactly unbiased; or published: self-inclusive means, mean marginal", ("leave-one-out", "published"))
    search_weight: float = option(1.0, "weight of the search term; 1 is the exact joint gradient", low=0)
    # Training
    steps: int = option(30, "training steps; 0: evaluate only", low=0)
    problems: int = option(16, "problems per step with an advantage that is not zero")
    max_draws: int = option(2, "draw at most this many times `problems` to find them; 1: take the batch as it comes")
    train_problems: int = option(8000, "distinct training problems; shuffled anew each time they are used up")
    updates: int = option(1, "optimizer updates per rollout; 1 is plain REINFORCE")
    clip: float = option(0.2, "the importance ratio is clipped to [1 - clip, 1 + clip]; it matters when updates > 1")
    kl: float = option(0.0, "weight of the KL divergence from the start policy", low=0)
    target_length: int = option(0, "L_target: a longer completion gets no positive advantage; 0: off", low=0)
    lr: float = option(1e-4, "learning rate (AdamW, constant after a linear warm-up)")
    warmup: int = option(5, "steps of linear warm-up", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    temperature: float = option(1.0, "of all sampling in training, and of the log-probs in the loss")
    max_prompt_tokens: int = option(1024, "aggregation prompts are cut to this; a longer problem is an error")
    max_trace_tokens: int = option(80, "longest search trace")
    max_aggregation_tokens: int = option(96, "longest aggregation trace")
    micro_batch_tokens: int = option(8192, "tokens per forward and backward pass; halved when memory runs out")
    gradient_checkpointing: bool = option(False, "less memory, more time; gives up the shared prefix")
    shard: bool = option(False, "under torchrun: weights, gradients and optimizer state split over the processes (FSDP2), for models too big for one")
    dtype: str = option("auto", "of the weights; bf16 ones train by fp32 copies. auto: bf16 for your own model on a GPU", ("auto", "fp32", "bf16"))
    lora_rank: int = option(0, "train LoRA adapters of this rank (peft) on frozen weights; 0: train all weights", low=0)
    keep_thinking: bool = option(False, "show candidates with their <think> ... </think>")
    # Evaluation, use and records
    eval_problems: int = option(200, "held-out problems of the table before and after; 0: no evaluation", low=0)
    eval_split: str = option("test", "test, or validation for choosing settings", ("test", "validation"))
    eval_traces: int = option(16, "traces per held-out problem; a multiple of set_size")
    rsa_steps: int = option(2, "steps of recursive self-aggregation in the evaluation", low=0)
    population: int = option(8, "population of recursive self-aggregation")
    save_every: int = option(10, "steps between checkpoints; the last two are kept")
    transcript_every: int = option(20, "steps between printed transcripts", low=0)
    dry_run: bool = option(False, "print what a run needs (parameters, tokens, memory) and whether it fits, and stop; loads no weights")
    ask: str = option("", "answer this question with the whole pipeline, and stop: \"4 9 13 61\" to reach 61 with 4, 9 and 13")
    def check(self):
        """Raises ValueError, in one line that says what to change, before any model is loaded."""
        def need(fine, name, text):
            if not fine:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {text}")
        for f in fields(self):
            value, choices, low = getattr(self, f.name), f.metadata["choices"], f.metadata["low"]
            need(not choices or value in choices, f.name, f"choose from {choices}")
            need(type(value) in (bool, str) or (math.isfinite(value) and (value > 0 if low is None else value >= low)), f.name,
                 "must be above 0" if low is None else f"must be at least {low}")
        for name in {"grpo": (), "grpo-agg": ("num_traces", "num_aggregations"), "spiral": ("num_sets", "num_aggregations")}[self.algo]:
            need(getattr(self, name) > 1, name, "the baseline of one is the mean of the others; use at least 2")
        draw_sets(self.num_traces, self.set_size, self.num_sets, torch.Generator(), self.balanced and self.algo != "grpo")
        need(self.eval_traces % self.set_size == 0, "eval_traces", f"must be a multiple of --set-size {self.set_size}")
        need(not self.rsa_steps or self.set_size <= self.population <= self.eval_traces, "population",
             f"must be between --set-size {self.set_size} and --eval-traces {self.eval_traces}")
        need(self.clip < 1, "clip", "must be below 1")
        need(not self.shard or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and not self.kl), "shard", "needs torchrun, 2 processes or more, and --kl 0")
        pick_device(self.device)

def pick_device(name):
    """"auto" is cuda when there is one. Raises ValueError for a device that isn't there."""
    try:
        default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" or torch.cuda.is_available() else "cpu"
        (probe := torch.zeros(1, device=default if name in ("auto", "cuda") else name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    torch.cuda.set_device(probe.device) if probe.is_cuda else None       # that of graphs, and of messages between processes
    return probe.device

def world(): return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)       # (rank, processes) of torchrun

def add_up(tensor):
    """The sum over the processes of torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

# ---- Policy: a causal language model and a tokenizer. Both roles share it; only the prompt differs. -----------------
CANDIDATE, CANDIDATE_END = "<candidate {}>\n", "\n</candidate>\n"
AGGREGATE = ("Each candidate above may be wrong. Audit them one by one (number, verdict), keep what is right, settle their "
             "disagreements, and if all are wrong try another way. Then end with the answer in the format asked for.\n")
TINY = Path(__file__).resolve().parent / "experiments" / "tiny"

class TinyTokenizer:
    """A tiktoken encoding built here. Integers below 1000, the tasks' phrases and role markers are single tokens: readable prompts stay short."""
    def __init__(self):
        words = enumerate([*tasks.WORDS, *map(str, range(10, 1000))], 256)
        ranks = {bytes([b]): b for b in range(256)} | {word.encode(): i for i, word in words}
        self.markers = [*(CANDIDATE.format(i) for i in range(1, 17)), CANDIDATE_END, AGGREGATE]
        special = {marker: len(ranks) + i for i, marker in enumerate([*self.markers, "<end>"])}
        pattern = "|".join(map(re.escape, tasks.WORDS)) + r"|[0-9]{1,3}|[\s\S]"
        self.encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.size, self.eos_id, self.eos_ids = self.encoding.n_vocab, special["<end>"], [special["<end>"]]
    def encode(self, text): return self.encoding.encode_ordinary(text)
    def decode(self, tokens): return self.encoding.decode([t for t in tokens if t != self.eos_id], errors="replace")
    def chat(self, text):                                    # markers in `text` become role markers, see `neutralise`
        return self.encoding.encode(text, allowed_special=set(self.markers), disallowed_special=())

class HubTokenizer:
    """A Hugging Face tokenizer and its chat template, with every token that ends a completion."""
    def __init__(self, path, settings):
        self.hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        try:
            listed = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:                                      # no generation_config.json
            listed = settings.eos_token_id
        self.eos_ids = sorted({self.hf.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None})
        if not self.eos_ids:
            raise ValueError(f"{path} names no end-of-sequence token")
        self.eos_id = self.hf.eos_token_id if self.hf.eos_token_id is not None else self.eos_ids[0]
        self.markers = [m for m in {*self.hf.all_special_tokens, *map(str, self.hf.added_tokens_decoder.values())} if m.strip()]
    def encode(self, text): return self.hf.encode(text, add_special_tokens=False)
    def decode(self, tokens): return self.hf.decode(tokens, skip_special_tokens=True)
    def chat(self, text):
        turns = [{"role": "user", "content": text}]
        return self.hf.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) if self.hf.chat_template else self.hf.encode(text)

@dataclass
class Policy:
    model: torch.nn.Module       # a transformers causal LM
    tokenizer: object            # .encode(str) -> list[int], .decode, .eos_id, .eos_ids, .chat(str) -> prompt tokens, .markers
    device: torch.device
    graphs: bool = False         # decode by replaying CUDA graphs
    slots: object = None         # memory of `sample`, which makes it

def load_tokenizer(config):
    """(path, settings, tokenizer) of config.model, without its weights."""
    path = TINY if config.model == "tiny" else config.model
    adapters = Path(path) / "adapter_config.json"           # a checkpoint of a LoRA run holds these alone
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else path
    settings = AutoConfig.from_pretrained(base, trust_remote_code=False)
    return path, settings, TinyTokenizer() if getattr(settings, "spiral_tokenizer", None) == "tiny" else HubTokenizer(path, settings)

def load_policy(config):
    """The policy that config.model names; config.lora_rank: frozen, with adapters to train. Raises ValueError or OSError when there is none."""
    (path, _, tokenizer), device = load_tokenizer(config), pick_device(config.device)
    half = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda" and isinstance(tokenizer, HubTokenizer))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if half else torch.float32, attn_implementation="sdpa",
                                                 use_safetensors=True, trust_remote_code=False)
    if config.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})      # renamed
    if config.lora_rank and not getattr(model, "peft_config", None):         # a checkpoint of a LoRA run brings its own
        from peft import LoraConfig
        torch.manual_seed(config.seed)                       # the same adapters in every process
        model.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():        # fresh memory: views into a file may be aligned otherwise, and then
        parameter.data = parameter.data.clone()             # a resumed run rounds otherwise
        parameter.requires_grad = "lora_" in name if config.lora_rank else parameter.requires_grad
    if config.shard:                                         # FSDP2: each process keeps a slice of every layer, and gathers the rest of it
        mesh, model.sharded = dist.init_device_mesh(device.type, (world()[1],)), True      # while it runs. Embedding and head stay whole
        for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
            layer.set_gradient_divide_factor(1.0)            # gradients are added up, not averaged
            layer.set_force_sum_reduction_for_comms(True)
    probe, model = torch.zeros(1, 2, dtype=torch.long, device=device), model.eval().to(device)
    with torch.no_grad():
        logits = head(model, hidden_states(model, probe, cache := DynamicCache()), 1.0)
        if not torch.allclose(logits, model(probe).logits.float(), rtol=1e-3, atol=1e-3):
            raise ValueError(f"{path}: this architecture changes its logits in a way that head() doesn't know")
    layers, heads, width = cache_shape(model)
    if [(*layer.keys.shape, *layer.values.shape) for layer in cache.layers] != [(1, heads, 2, width) * 2] * layers:
        raise ValueError(f"{path}: this architecture's cache isn't the keys and values that sample() holds")
    return Policy(model, tokenizer, device, graphs=device.type == "cuda" and not config.shard)

def check_fit(config, task, problems):
    """Raises ValueError when the longest problem, with candidates, can't fit; needs the tokenizer, not the weights."""
    _, settings, tokenizer = load_tokenizer(config)
    longest = max((task.prompt(problem) for problem in problems), key=lambda prompt: len(tokenizer.chat(prompt)))
    aggregation_prompt(tokenizer, longest, ["0" * 100] * config.set_size, config.max_prompt_tokens)
    limit = getattr(settings.get_text_config(), "max_position_embeddings", None) or math.inf
    if (needed := config.max_prompt_tokens + max(config.max_trace_tokens, config.max_aggregation_tokens)) > limit:
        raise ValueError(f"--max-prompt-tokens and the completion need {needed} positions, but {config.model} has {limit}")

def hidden_states(model, tokens, cache=None, lengths=None, before=0, column=0, own=0):
    """Last hidden states [B, T, d]: the model without its vocabulary head. With `lengths` [B, 1] of prompts: behind `before` columns of these, and
    `own` more, of which `column` is the first token's. A token attends to its prompt and the own columns up to itself, within its sliding window."""
    settings, positions, mask = model.config.get_text_config(), None, None
    if getattr(model, "sharded", False):
        add_up(torch.ones(1))                                # see keep_step
    if lengths is not None:
        columns = torch.arange(max(before, own), device=tokens.device)
        positions = lengths + column + columns[:tokens.shape[1]]                                                         # [B, T]
        keys = torch.cat([torch.where(columns[:before] < lengths, columns[:before], 1 << 30), lengths + columns[:own]], 1)    # [B, S]
        allowed = keys[:, None] <= positions[:, :, None]     # [B, T, S]
        kinds, window = set(getattr(settings, "layer_types", None) or ()), getattr(settings, "sliding_window", None)
        near = allowed & (keys[:, None] > positions[:, :, None] - window) if window else allowed
        def to_add(which): return torch.where(which[:, None], 0.0, torch.finfo(model.dtype).min).to(model.dtype)      # layers share it, not copies
        mask = to_add(allowed if kinds else near) if "sliding_attention" not in kinds else {            # [B, 1, T, S]
            "full_attention": to_add(allowed), "sliding_attention": to_add(near)}
    past = {"cache" if [*map(int, transformers.__version__.split(".")[:2])] >= [5, 24] else "past_key_values": cache}
    return model.base_model(tokens, position_ids=positions, attention_mask=mask, use_cache=cache is not None, **past).last_hidden_state

def head(model, hidden, temperature):
    """Logits at `temperature`, fp32 [..., V]."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits) / temperature

def pad(rows, device):
    """Lists of integers -> [B, longest] int64, zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0).to(device)

def keep_step(model):
    """Gathering a layer takes all processes: those with fewer passes to make add passes over one token. -> their sum, times 0, for backward."""
    nothing = 0.0
    while getattr(model, "sharded", False) and add_up(torch.zeros(1)).item():            # someone is in hidden_states
        token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        nothing = nothing + 0 * model.base_model(input_ids=token, use_cache=False).last_hidden_state.sum()
    return nothing

# ---- Sampler: prefill each distinct prompt once, decode all rows together, let finished rows make room for waiting prompts. ----
@dataclass
class Samples:
    tokens: torch.Tensor         # [B, T] int64
    logprobs: torch.Tensor       # [B, T] float32, of the sampled tokens at the sampling temperature; 0 where mask is False
    mask: torch.Tensor           # [B, T] bool, True up to and including EOS
    truncated: torch.Tensor      # [B] bool, no EOS within the limit
    def __getitem__(self, rows): return Samples(self.tokens[rows], self.logprobs[rows], self.mask[rows], self.truncated[rows])

def shared_prefix_attention(memory, rows, owner, place, column, places, module, query, key, value, mask, scaling=None, **kwargs):
    """A decoding step's attention, query [B, H, 1, D] -> [B, 1, H, D]: writes key and value [B, kv, 1, D] into the memory, and reads a prompt's keys
    once for all of its completions. For that the queries lie in a grid: prompts (U, and one for dead rows) x places among their completions (R)."""
    prompt_keys, prompt_values, keys, values = (tensor[module.layer_idx] for tensor in memory)   # [U, kv, L, D] twice, [B, kv, T, D] twice
    (prompts, kv, before, width), heads = prompt_keys.shape, query.shape[1]
    keys[rows, :, column], values[rows, :, column] = key[:, :, 0], value[:, :, 0]
    def spread(x):                                           # [B, kv, G, C] -> [U, kv, R * G, C]
        grid = x.new_zeros(prompts + 1, kv, places, *x.shape[2:])
        grid[owner, :, place] = x
        return grid[:-1].flatten(2, 3)
    def collect(x): return x.unflatten(2, (places, -1))[owner, :, place]                         # and back
    def scores(a, b):                                        # in fp32: rounded to bf16 they would cost the log-probs two digits
        if a.dtype != torch.float32 and a.is_cuda:
            return torch.bmm(a.flatten(0, 1), b.flatten(0, 1).mT, out_dtype=torch.float32).unflatten(0, a.shape[:2])
        return a.float() @ b.float().mT
    query = query.view(len(rows), kv, -1, width) * (width ** -0.5 if scaling is None else scaling)             # [B, kv, G, D]
    weights = torch.cat([collect(scores(spread(query), prompt_keys)), scores(query, keys)], -1)             # [B, kv, G, L + T]
    weights = weights.add_(mask).softmax(-1).to(values.dtype)
    mixed = collect(spread(weights[..., :before]) @ prompt_values) + weights[..., before:] @ values         # [B, kv, G, D]
    return mixed.view(len(rows), 1, heads, width), None

class Slots:
    """Memory of decoding: prompts, each once for its completions, and slots. Kept, for fresh memory is slow, and CUDA graphs hold its addresses."""
    def __init__(self, policy, room, longest, count, limit, total):
        (layers, heads, width), device = cache_shape(policy.model), policy.device
        memory = lambda *sizes: torch.zeros(sizes, dtype=policy.model.dtype, device=device)                 # noqa: E731
        self.sizes = self.room, self.longest, self.count, self.limit, self.total = room, longest, count, limit, total
        self.eos_ids, self.graphs = torch.tensor(policy.tokenizer.eos_ids, device=device), {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None    # all graphs work in the same scratch memory
        self.prompts, self.completions = memory(2, layers, room, heads, longest, width), memory(2, layers, count, heads, limit, width)  # keys, values
        # Of each slot: its prompt and its place among the prompt's completions; its row of the output, the next and the last token there
        self.states = self.owner, self.place, self.row, self.step, self.token = [*torch.zeros(5, count, dtype=torch.long, device=device)]
        self.length, self.done = torch.zeros(room, dtype=torch.long, device=device), torch.ones(count, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(total + 1, limit + 1, dtype=torch.float64, device=device)      # the last row and column are trash
        self.tokens, self.logprobs = self.uniforms.long(), self.uniforms.float()

def cache_shape(model):
    """(layers, heads, width) of a model's cache."""
    text = model.config.get_text_config()
    return (text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

def most_slots(model, length, device):
    """How many slots of `length` tokens half of the free memory holds (on the CPU: 1 GB)."""
    free = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if device.type == "cuda" else 2 << 30)
    return max(1, free // 2 // (2 * math.prod(cache_shape(model)) * model.dtype.itemsize * length))

def fill_gaps(used, tensors):
    """The last of the `used` [n] rows move into the gaps before them. Returns how many there are, and where each row is now [n]."""
    left, now_at = int(used.sum()), torch.arange(len(used), device=used.device)
    holes, movers = (~used[:left]).nonzero()[:, 0], used[left:].nonzero()[:, 0] + left
    for tensor in tensors if len(holes) else ():
        tensor[holes] = tensor[movers]
    now_at[movers] = holes
    return left, now_at

def draw_tokens(logits, uniforms, greedy):
    """Tokens and log-probs by inverting the CDF at a row's own uniform: they don't depend on the batch. logits [B, V] fp32, uniforms [B] fp64."""
    if greedy:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])        # a point mass: log-prob 0
    logprobs = logits.log_softmax(-1)                                   # [B, V]
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]

def bucket(n, sizes=4):
    """n rounded up to one of `sizes` an octave: few shapes, little waste."""
    step = max(1, (1 << (n - 1).bit_length()) // (2 * sizes))
    return -(-n // step) * step

def capture(function, pool):
    """`function`, whose memory is static, as a replay of its CUDA kernels. Weights change in place: it stays valid through training."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool):                  # back to this stream even when it fails
        function()
    return graph.replay

@torch.no_grad()
def sample(policy, prompts, max_new_tokens, temperature=1.0, num_samples=1, generator=None, max_rows=0):
    """Sample `num_samples` completions of each prompt (a list of token lists) -> Samples, in prompt-major order. temperature 0 is greedy. max_rows:
    rows decoded at a time; 0 sizes it to the memory. Reproducible from `generator`: one, or a list of one for each prompt, which makes a
    prompt's samples independent of the others. Raises ValueError for an empty prompt."""
    model, device, settings = policy.model, policy.device, policy.model.config.get_text_config()
    if not prompts or not all(prompts):
        raise ValueError("sample needs at least one prompt, and a token in each")
    total, longest, slots, waiting = len(prompts) * num_samples, bucket(max(map(len, prompts)), 8), policy.slots, {}     # distinct prompt -> its rows
    for i, prompt in enumerate(prompts):
        waiting.setdefault(tuple(prompt), []).extend(range(i * num_samples, (i + 1) * num_samples))
    waiting = sorted(waiting.items(), key=lambda item: len(item[0]))     # the longest are taken first
    share = min(1.0, 2 / num_samples)                        # prompts to a slot: twice what it takes as long as all their completions go on
    def sizes():                                             # of the slots that it takes: as many as it can use, and as the memory holds
        count = min(total, max_rows or total, most_slots(model, max_new_tokens + math.ceil(share * longest), device))
        return min(len(waiting), math.ceil(share * count) + 1), longest, count, max_new_tokens, total
    if not slots or slots.prompts.dtype != model.dtype or any(has < needed for has, needed in zip(slots.sizes, sizes())):
        slots = policy.slots = None                          # too small: its memory is free for the next
        slots = policy.slots = Slots(policy, *sizes())
    room, count, alive, held = slots.room, min(total, max_rows or total, slots.count), 0, 0              # in use: slots 0..alive-1, prompts 0..held-1
    places = min(count, max(len(rows) for _, rows in waiting))
    slots.owner[:], slots.place[:], slots.row[:], slots.step[:], slots.done[:] = -1, 0, -1, 0, True       # nobody's slots work for the trash
    slots.tokens[:], slots.logprobs[:], slots.uniforms[:total, :max_new_tokens] = policy.tokenizer.eos_id, 0, torch.cat([
        torch.rand(num_samples, max_new_tokens, generator=g, dtype=torch.float64, device=g.device if g else "cpu")
        for g in (generator if isinstance(generator, list) else [generator] * len(prompts))])
    def emit(logits, s):
        """Sample a token for each of the slots `s`, record it, and see whether it was the last."""
        row, step, done = slots.row[s], slots.step[s], slots.done[s]
        column = torch.where(done, slots.limit, step)     # a finished completion runs on, into the trash, until the next look
        slots.token[s], logprob = draw_tokens(logits, slots.uniforms[row, column], temperature == 0)
        slots.tokens[row, column], slots.logprobs[row, column] = slots.token[s], logprob
        step += ~done
        done |= (slots.token[s, None] == slots.eos_ids).any(-1) | (step >= max_new_tokens)
    def prefill(batch, new, these):
        """(prompt, rows of the output) each into the prompts `these`, and the first token of each row into the slots `new`."""
        padded = pad([prompt for prompt, _ in batch], device)                                         # [U, L]
        hidden = hidden_states(model, padded, prefix := DynamicCache())                                  # causal: pads come last
        for i, layer in enumerate(prefix.layers):
            slots.prompts[0, i, these, :, :padded.shape[1]], slots.prompts[1, i, these, :, :padded.shape[1]] = layer.keys, layer.values
        slots.length[these] = length = torch.tensor([len(prompt) for prompt, _ in batch], device=device)                 # [U]
        owner, place, row = torch.tensor([(u, i, r) for u, (_, rows) in enumerate(batch) for i, r in enumerate(rows)], device=device).T        # [new]
        slots.owner[new], slots.place[new], slots.row[new], slots.step[new], slots.done[new] = these.start + owner, place, row, 0, False
        emit(head(model, hidden[torch.arange(len(batch), device=device), length - 1], temperature or 1.0)[owner], new)
    def decode(alive, held, before, own):
        """One token for each of the first slots, which attend to `before` columns of one of the first prompts, and `own` of theirs."""
        owner, place, column = slots.owner[:alive], slots.place[:alive], slots.step[:alive] - 1
        memory = (*slots.prompts[:, :, :held, :, :before], *slots.completions[:, :, :alive, :, :own])
        attention = functools.partial(shared_prefix_attention, memory, torch.arange(alive, device=device), owner, place, column, places)
        AttentionInterface.register("shared_prefix", attention)
        plain, settings._attn_implementation = settings._attn_implementation, "shared_prefix"
        try:
            hidden = hidden_states(model, slots.token[:alive, None], None, slots.length[owner][:, None], before, column[:, None], own)    # [B, 1, d]
        finally:
            settings._attn_implementation = plain
            AttentionInterface.register("shared_prefix", None)                                              # it holds the memory
        emit(head(model, hidden[:, 0], temperature or 1.0), slice(alive))
    while waiting or alive:
        # Prefill: waiting prompts as soon as a quarter of the slots is free, at most 16k tokens at a time
        while waiting and held < room and (not alive or count - alive >= max(len(waiting[-1][1]), count // 4)):
            batch, free = [], count - alive
            while waiting and free and held + len(batch) < room and (
                    not batch or (len(waiting[-1][1]) <= free and (len(batch) + 1) * len(batch[0][0]) <= 16384)):
                prompt, rows = waiting.pop()
                batch.append((list(prompt), rows[:free]))
                if len(rows) > free:                         # more samples than slots: the rest waits
                    waiting.append((prompt, rows[free:]))
                free -= len(batch[-1][1])
            prefill(batch, slice(alive, count - free), slice(held, held + len(batch)))
            alive, held = count - free, held + len(batch)
        # Decode: one token for every row; on a GPU eight, for a look at which rows are done waits for it
        own, before = int(slots.step[:alive].max()), int(slots.length[:held].max())
        for i in range(8 if policy.graphs or device.type == "cuda" else 1):
            shape = alive, held, before, min(own + i, max_new_tokens)
            if policy.graphs:                                # of few shapes
                shape = *map(min, map(bucket, (alive, held, before, own + i), (4, 2, 4, 4)), (slots.count, slots.room, slots.longest, slots.limit)),
            key, step = (*shape, places, max_new_tokens, temperature), functools.partial(decode, *shape)
            slots.graphs.get(key, step)()                    # the first time plainly, which warms up for the capture
            if policy.graphs and key not in slots.graphs and len(slots.graphs) < 128:        # some 20 MB each
                try:
                    slots.graphs[key] = capture(step, slots.pool)
                except RuntimeError as error:
                    policy.graphs = False
                    print(f"no CUDA graphs, decoding goes on without: {str(error).splitlines()[0]}", flush=True)
        # Stop: when a tenth has finished, the last ones move into their slots, and into the place of prompts that no slot needs
        left = int((~slots.done[:alive]).sum())
        if left <= 0.9 * alive:
            columns = [layer[:, :, :shape[3]] for layer in slots.completions.flatten(0, 1)]
            fill_gaps(~slots.done[:alive], [*slots.states, slots.done, *columns])
            slots.owner[left:], slots.place[left:], slots.row[left:], slots.step[left:], slots.done[left:] = -1, 0, -1, 0, True
            used = torch.zeros(held, dtype=torch.bool, device=device).index_fill_(0, slots.owner[:left], True)
            columns = [layer[:, :, :shape[2]] for layer in slots.prompts.flatten(0, 1)]
            (held, now_at), alive = fill_gaps(used, [slots.length, *columns]), left
            slots.owner[:left] = now_at[slots.owner[:left]]
    tokens, logprobs = slots.tokens[:total, :max_new_tokens], slots.logprobs[:total, :max_new_tokens]
    ended = (tokens[:, :, None] == slots.eos_ids).any(-1)
    mask = (ended.cumsum(-1) - ended.long()) == 0            # True up to and including the first EOS
    width = int(mask.sum(-1).max())
    return Samples(tokens[:, :width].clone(), logprobs[:, :width] * mask[:, :width], mask[:, :width], ~ended.any(-1))

# ---- Sets, and the aggregation prompt -------------------------------------------------------------------------------
def draw_sets(num_traces, set_size, num_sets, generator=None, balanced=False):
    """`num_sets` distinct sets of `set_size` distinct traces -> LongTensor [K, n], each shuffled. Uniform without replacement; or balanced:
    each trace in K n / N1 sets, by cutting up permutations of the traces until they fit. Raises ValueError when there are no such sets."""
    if not 1 <= set_size <= num_traces or num_sets > math.comb(num_traces, set_size) or (balanced and num_sets * set_size % num_traces):
        raise ValueError(f"there are no {num_sets} distinct{' balanced' * balanced} sets of {set_size} of {num_traces} traces: "
                         f"change --num-sets, --set-size or --num-traces{', or say --no-balanced' * balanced}")
    # A block of whole permutations, cut into sets, holds every trace equally often; without balance a block is one set
    block_size, sets = math.lcm(num_traces, set_size) if balanced else set_size, []
    for _ in range(10_000 * num_sets):
        shuffled = torch.cat([torch.randperm(num_traces, generator=generator) for _ in range(math.ceil(block_size / num_traces))])
        more = sets + shuffled[:block_size].view(-1, set_size).tolist()
        fits = len({frozenset(s) for s in more if len(set(s)) == set_size}) == len(more)
        sets = more if fits else [] if balanced and torch.rand((), generator=generator) < 0.05 else sets         # out of dead ends
        if len(sets) == num_sets:
            return torch.tensor(sets)
    raise ValueError(f"found no {num_sets} distinct{' balanced' * balanced} sets of {set_size} of {num_traces} traces")

def neutralise(text, markers):
    """Sampled text made harmless: it can't close its candidate, open another, or write a special token of the tokenizer."""
    text = re.sub(r"<(/?)candidate", r"(\1candidate", text, flags=re.IGNORECASE)
    while any(marker in text for marker in markers):
        for marker in markers:
            text = text.replace(marker, " ")
    return text

def aggregation_prompt(tokenizer, prompt, traces, max_tokens=0):
    """Tokens of the problem's prompt and the numbered candidates (strings). Over `max_tokens` (0: no limit) these lose their beginnings, for
    answers come last: short ones stay whole, the others share the room equally. Raises ValueError when the problem leaves no room."""
    def build(texts):
        return tokenizer.chat(prompt + "".join(CANDIDATE.format(i) + text + CANDIDATE_END for i, text in enumerate(texts, 1)) + AGGREGATE)
    texts = [neutralise(trace, tokenizer.markers) for trace in traces]
    tokens, bodies, room = build(texts), [tokenizer.encode(text) for text in texts], max_tokens - len(build([""] * len(traces)))
    while max_tokens and len(tokens) > max_tokens:
        if room < len(texts):
            raise ValueError(f"a problem leaves no room for {len(texts)} candidates in {max_tokens} prompt tokens: raise --max-prompt-tokens")
        left, limits = room, [0] * len(texts)
        for rank, i in enumerate(sorted(range(len(texts)), key=lambda i: len(bodies[i]))):
            limits[i] = min(len(bodies[i]), left // (len(texts) - rank))
            left -= limits[i]
        tokens = build([tokenizer.decode(body[len(body) - limit:]) for body, limit in zip(bodies, limits)])
        room -= len(tokens) - max_tokens                     # cutting can change how the text splits into tokens: then once more
    return tokens

# ---- Advantages: sum_j a_j grad log pi(y_j) + sum_km b_km grad log pi(z_km) is unbiased for grad J (paper.md section 5; tests enumerate it). ----
def search_advantages(rewards, sets, num_traces, balanced=False, estimator="leave-one-out"):
    """a_j: rewards [P, K, N2], sets [P, K, n] -> [P, N1]. A_set(k) = f_k - mean_{l != k} f_l;  a_j = sum_{k: j in G_k} A_set(k) / (K (1 - p)).
    Other sets with the same trace cancel the fraction p of its signal. "published": self-inclusive baseline, and the mean over the sets of j."""
    (_, num_sets, set_size), scores = sets.shape, rewards.mean(-1)                     # f_k: [P, K]
    member = torch.nn.functional.one_hot(sets, num_traces).sum(2).to(scores.dtype)     # [P, K, N1]
    advantages = scores - scores.mean(1, keepdim=True)                                 # [P, K]
    summed = (advantages[:, :, None] * member).sum(1)                                  # [P, N1]
    if estimator == "published":
        return summed / member.sum(1).clamp(min=1)
    # p: the chance that another set also holds a given member; balanced, that is another R - 1 of K - 1 sets, R = K n / N1
    p = ((num_sets * set_size / num_traces - 1) / (num_sets - 1) if balanced else
         (math.comb(num_traces - 1, set_size - 1) - 1) / (math.comb(num_traces, set_size) - 1))
    return summed / ((num_sets - 1) * (1 - p))

def aggregation_advantages(rewards, estimator="leave-one-out"):
    """b_km = (r_km - mean_{m' != m} r_km') / (K N2): rewards [P, K, N2] -> [P, K, N2]. "published": r_km - mean_m r_km."""
    advantages = rewards - rewards.mean(-1, keepdim=True)
    return advantages if estimator == "published" else advantages / ((rewards.shape[-1] - 1) * rewards.shape[1])

def grpo_advantages(rewards):
    """(r_j - mean_{i != j} r_i) / G, unbiased for the gradient of E[r(x, y)], so not over a standard deviation: rewards [P, G] -> [P, G]."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.shape[-1] - 1)

# ---- Loss and update ------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """One prompt and its G completions, which run that prompt once in the update."""
    prompt: list                 # token ids
    samples: Samples             # [G, T]
    advantages: torch.Tensor     # [G]
    def __getitem__(self, rows): return Group(self.prompt, self.samples[rows], self.advantages[rows])

def token_logprobs(model, hidden, targets, temperature, chunk_elements=1 << 24):
    """Log-probs of `targets` [M] and entropies, [M] fp32, from hidden states [M, d]; chunks of logits are made again in the backward pass."""
    def chunk_logprobs(hidden, targets):
        logprobs = head(model, hidden, temperature).log_softmax(-1)                    # [chunk, V]
        return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).detach().sum(-1)
    size = max(1, chunk_elements // model.get_output_embeddings().weight.shape[0])
    run = functools.partial(torch.utils.checkpoint.checkpoint, chunk_logprobs, use_reentrant=False) if len(targets) > size else chunk_logprobs
    return tuple(map(torch.cat, zip(*map(run, hidden.split(size), targets.split(size)))))

def length_buckets(items, length, size=lambda item: 0, budget=math.inf):
    """Items in lists, the shortest first: in each of like `length`, for little padding, and of at most `budget` in `size` together."""
    buckets, room = [], budget
    for item in sorted(items, key=lambda item: (length(item), size(item))):
        if not buckets or length(item) > 1.1 * length(buckets[-1][0]) or size(item) > room:
            buckets, room = buckets + [[]], budget
        buckets[-1].append(item)
        room -= size(item)
    return buckets

def completion_logprobs(model, prompts, owner, tokens, mask, temperature, share_prefix=True):
    """Log-probs and entropies [B, T] of completions, with gradients. prompts: U token lists; owner [B]: whose completion; tokens, mask [B, T],
    each row True from its start. share_prefix: a prompt runs once for all its completions. Exact: the gradients are those of whole sequences."""
    device, parts, counts = tokens.device, [], mask.sum(-1).tolist()
    lengths, padded = torch.tensor([len(p) for p in prompts], device=device), pad(prompts, device)       # [U], [U, L]
    if share_prefix:
        hidden = hidden_states(model, padded, prefix := DynamicCache())
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]                               # [U, d]
    for rows in length_buckets(range(len(counts)), counts.__getitem__):
        width, rows = counts[rows[-1]], torch.tensor(rows, device=device)                                   # the longest comes last
        mine = owner[rows]                                                                                  # [b]
        completion, present = tokens[rows, :width], mask[rows, :width]                                      # [b, t]
        row, step = present.nonzero(as_tuple=True)                                                          # [M] of the M tokens
        if share_prefix:
            cache = DynamicCache((layer.keys.index_select(0, mine), layer.values.index_select(0, mine)) for layer in prefix.layers)
            hidden = last[mine][:, None]                                                                    # predicts the first token
            if width > 1:
                later = hidden_states(model, completion[:, :-1], cache, lengths[mine][:, None], padded.shape[1], 0, width - 1)    # [b, t-1, d]
                hidden = torch.cat([hidden, later], 1)
            hidden = hidden[row, step]
        else:
            sequences = [prompts[u] + row[:n] for u, row, n in zip(mine.tolist(), completion.tolist(), present.sum(-1).tolist())]
            hidden = hidden_states(model, pad(sequences, device))[row, lengths[mine][row] + step - 1]      # [M, d]
        parts.append((rows[row], step, *token_logprobs(model, hidden, completion[row, step], temperature)))
    row, step, *values = map(torch.cat, zip(*parts))
    return tuple(torch.zeros(mask.shape, device=device).index_put((row, step), value) for value in values)

def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """Clipped policy gradient, summed over tokens. All [B, T] but advantages [B]. First update: REINFORCE, minus sum advantage * grad log pi."""
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])
    return -(surrogate * mask).sum()

def micro_batches(groups, budget, share_prefix=True):
    """Groups of like prompts together, at most `budget` tokens each, stacked; a larger group is split, down to one completion.
    Yields prompts (lists), owner [B], tokens, logprobs, mask [B, T], advantages [B]."""
    size = lambda group: len(group.prompt) * (1 if share_prefix else len(group.advantages)) + int(group.samples.mask.sum())      # noqa: E731
    def split(group):
        half = len(group.advantages) // 2
        return split(group[:half]) + split(group[half:]) if half and size(group) > budget else [group]
    for batch in length_buckets(itertools.chain(*map(split, groups)), lambda group: len(group.prompt), size, budget):
        owner = torch.cat([torch.full_like(group.advantages, u, dtype=torch.long) for u, group in enumerate(batch)])
        columns = [pad_sequence([row for group in batch for row in getattr(group.samples, name)], True) for name in ("tokens", "logprobs", "mask")]
        yield [group.prompt for group in batch], owner, *columns, torch.cat([group.advantages for group in batch])

def trained(model): return [parameter for parameter in model.parameters() if parameter.requires_grad]

def make_optimizer(model, config):
    """AdamW. Its parameters are fp32: the model's own, or copies of those in bf16, which `update` keeps in step."""
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in trained(model)]
    return torch.optim.AdamW(masters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)            # foreach: as much memory again

def update(policy, optimizer, groups, num_problems, config, start_model=None):
    """One optimizer step on the mean over problems of the estimate; returns statistics. `num_problems`, over all processes, is the one denominator:
    micro-batches don't change the gradient. Completions without advantage are left out. NaN or inf never reaches the weights: no step."""
    groups = [kept for group in groups if len((kept := group if config.kl else group[group.advantages != 0]).advantages)]
    completions = int(add_up(torch.tensor(sum(len(group.advantages) for group in groups))))
    model, masters, share_prefix = policy.model, optimizer.param_groups[0]["params"], not config.gradient_checkpointing
    for module in model.modules():                           # the model stays in eval mode: no dropout, as in the sampler
        module.training = config.gradient_checkpointing and isinstance(module, GradientCheckpointingLayer)
    while True:
        optimizer.zero_grad(), model.zero_grad()
        sums = torch.zeros(4, dtype=torch.float64)           # loss, tokens, difference of the log-probs from the sampler's, entropy
        try:
            batches = [*micro_batches(groups, config.micro_batch_tokens, share_prefix)]
            if config.shard:                                  # as many backward passes in every process: empty ones at the end
                dist.all_reduce(most := torch.tensor(len(batches)), dist.ReduceOp.MAX)
                empty = torch.zeros(1, 1, device=policy.device)
                batches += [([[0]], empty[0].long(), empty.long(), empty, empty.bool(), empty[0])] * (int(most) - len(batches))
            for prompts, owner, tokens, old_logprobs, mask, advantages in batches:
                inputs = (prompts, owner, tokens, mask, config.temperature, share_prefix)
                logprobs, entropies = completion_logprobs(model, *inputs)
                loss = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip)
                if config.kl:                                 # unbiased, non-negative estimate of KL(policy || start)
                    log_ratio = torch.no_grad()(completion_logprobs)(start_model, *inputs)[0] - logprobs
                    loss = loss + config.kl * ((log_ratio.exp() - log_ratio - 1) * mask).sum() * num_problems / completions
                (loss / num_problems + keep_step(model)).backward()
                for parameter, master in zip(trained(model), masters):
                    if master is not parameter and parameter.grad is not None:       # micro-batches are summed in fp32
                        master.grad = parameter.grad.float() + (0 if master.grad is None else master.grad)
                        parameter.grad = None
                sums += torch.stack([loss / num_problems, mask.sum(), (logprobs - old_logprobs).abs().sum(), entropies.sum()]).detach().cpu()
            break
        except torch.OutOfMemoryError:
            if config.micro_batch_tokens < 128 or config.shard:
                raise
            policy.slots = loss = logprobs = log_ratio = None     # these hold memory
            config.micro_batch_tokens //= 2
            print(f"out of memory: going on with --micro-batch-tokens {config.micro_batch_tokens}", flush=True)
            torch.cuda.empty_cache()
    model.eval()
    for master in masters if dist.is_initialized() else ():
        master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        if not isinstance(master, DTensor):                  # FSDP has added up those of the slices
            add_up(master.grad)
    gradients = [master.grad for master in masters if master.grad is not None]
    whole, slices = [g for g in gradients if not isinstance(g, DTensor)], [g.to_local() for g in gradients if isinstance(g, DTensor)]
    norm = torch.hypot(torch.nn.utils.get_total_norm(whole), add_up(torch.nn.utils.get_total_norm(slices) ** 2).sqrt())
    torch.nn.utils.clip_grads_with_norm_(masters, config.max_grad_norm, norm, foreach=False)
    (loss, tokens, difference, entropy), norm = add_up(sums).tolist(), norm.item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite and completions:
        optimizer.step()
        for parameter, master in zip(trained(model), masters):
            parameter.data.copy_(master.data)
    optimizer.zero_grad()
    return {"loss": loss if finite else 0.0, "grad_norm": norm if finite else 0.0, "logprob_difference": difference / max(tokens, 1),
            "trained_tokens": int(tokens), "trained_entropy": entropy / max(tokens, 1), "skipped": int(not finite)}

# ---- Rollout: problems -> traces -> sets -> aggregations -> rewards -> advantages -----------------------------------
def sample_texts(policy, prompts, max_new_tokens, config, num_samples, generator):
    """sample, and the completions as strings: [len(prompts)] lists of `num_samples`."""
    samples = sample(policy, prompts, max_new_tokens, config.temperature, num_samples, generator)
    texts = [policy.tokenizer.decode(row[:n]) for row, n in zip(samples.tokens.tolist(), samples.mask.sum(-1).tolist())]
    return samples, [texts[i:i + num_samples] for i in range(0, len(texts), num_samples)]

def search(policy, task, problems, config, num_samples, generator):
    """`num_samples` traces of each problem -> (prompts, Samples, texts [P][num_samples])."""
    prompts = [policy.tokenizer.chat(task.prompt(problem)) for problem in problems]
    return prompts, *sample_texts(policy, prompts, config.max_trace_tokens, config, num_samples, generator)

def aggregate(policy, task, problems, sets, config, num_samples, generator):
    """`num_samples` aggregations of each set. problems: S of them; sets: the texts in each, [S][n]. -> (prompts, Samples, texts)."""
    if not config.keep_thinking:                             # what comes before the end of a thought is hidden from the aggregator
        sets = [[text.rpartition("</think>")[2] for text in texts] for texts in sets]
    prompts = [aggregation_prompt(policy.tokenizer, task.prompt(problem), texts, config.max_prompt_tokens) for problem, texts in zip(problems, sets)]
    return prompts, *sample_texts(policy, prompts, config.max_aggregation_tokens, config, num_samples, generator)

def rewards_of(task, problems, texts, device=None):
    """Verifier on texts[p][...] -> tensor [P, G] of 0 and 1."""
    return torch.tensor([[float(task.reward(problem, text)) for text in row] for problem, row in zip(problems, texts)], device=device)

def rollout(policy, task, problems, config, generators):
    """The whole pipeline on P problems, each with its own generator -> P records: dicts with `groups` for the update and the rest for people."""
    num_traces = config.num_traces + (config.num_sets * config.num_aggregations if config.algo == "grpo" else 0)          # the same budget
    per_problem = lambda items: [items[i:i + config.num_sets] for i in range(0, len(items), config.num_sets)]            # noqa: E731
    def groups_of(prompts, samples, advantages):
        size, lengths = advantages.shape[1], samples.mask.sum(-1).view(advantages.shape)                   # [prompts, G]
        advantages = torch.where((lengths > (config.target_length or math.inf)) & (advantages > 0), 0.0, advantages)      # L_target
        return [Group(prompt, samples[i * size:(i + 1) * size], advantages[i]) for i, prompt in enumerate(prompts)]
    prompts, samples, traces = search(policy, task, problems, config, num_traces, generators)
    trace_rewards = rewards_of(task, problems, traces, policy.device)                     # [P, N1]; spiral only reports them
    credit, set_groups = grpo_advantages(trace_rewards), [[]] * len(problems)             # [P, N1]; a list of groups for each problem
    columns = {"problem": problems, "traces": traces, "trace_rewards": trace_rewards}
    if config.algo != "grpo":
        sets = torch.stack([draw_sets(num_traces, config.set_size, config.num_sets, g, config.balanced) for g in generators])       # [P, K, n]
        owners, their = ([x for x in row for _ in range(config.num_sets)] for row in (problems, generators))                      # [P * K]
        chosen = [[texts[j] for j in s] for texts, drawn in zip(traces, sets.tolist()) for s in drawn]
        set_prompts, set_samples, texts = aggregate(policy, task, owners, chosen, config, config.num_aggregations, their)
        rewards = rewards_of(task, owners, texts, policy.device).view(len(problems), config.num_sets, -1)                         # [P, K, N2]
        if config.algo == "spiral":
            credit = search_advantages(rewards, sets.to(policy.device), num_traces, config.balanced, config.estimator)
        credit = config.search_weight * credit
        set_groups = per_problem(groups_of(set_prompts, set_samples, aggregation_advantages(rewards, config.estimator).flatten(0, 1)))
        columns |= {"sets": sets, "aggregations": per_problem(texts), "rewards": rewards}
    columns["groups"] = [[group, *theirs] for group, theirs in zip(groups_of(prompts, samples, credit), set_groups)]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]

def problem_at(problems, seed, i):
    """The i-th problem of an endless stream, shuffled anew each time through."""
    epoch, place = divmod(i, len(problems))
    return problems[int(np.random.default_rng((seed, epoch)).permutation(len(problems))[place])]

def collect(policy, task, problems, cursor, config):
    """Dynamic sampling: roll out until config.problems have an advantage, or max_draws times as many are drawn; each process takes every
    `processes`-th. Returns (all records, those to train on, their number over all processes, the cursor behind the last problem)."""
    records, useful, found, (rank, processes), limit = [], [], 0, world(), cursor + config.max_draws * config.problems
    while found < config.problems and cursor < limit:
        end = min(cursor + max(config.problems - found, config.problems // 4), limit)     # small rollouts are slow ones
        if mine := range(cursor + rank, end, processes):
            generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + i) for i in mine]       # of seed and place alone
            records += rollout(policy, task, [problem_at(problems, config.seed, i) for i in mine], config, generators)
        torch.no_grad()(keep_step)(policy.model)
        useful, cursor = [record for record in records if any((group.advantages != 0).any() for group in record["groups"])], end
        found = int(add_up(torch.tensor(len(useful))))
    return records, useful, found, cursor

def statistics(task, records, useful, config):
    """What a step looks like, over all problems drawn, in all processes. Rates and means are per completion; lengths in tokens."""
    total = lambda tensors: (sum(x.sum().item() for x in tensors), sum(x.numel() for x in tensors))                   # noqa: E731
    final = [record.get("rewards", record["trace_rewards"]) for record in records]
    texts = [text for r in records for text in (itertools.chain(*r["aggregations"]) if "rewards" in r else r["traces"])]
    rates = {"answer_reward": total(final), "trace_reward": total([record["trace_rewards"] for record in records]),
             "all_right": total([(x == 1).all() for x in final]), "all_wrong": total([(x == 0).all() for x in final]),
             "no_answer": (sum(task.answer(text) is None for text in texts), len(texts))}
    counts = {"drawn_problems": len(records), "useful_problems": len(useful), "sampled_tokens": 0, "prefill_tokens": 0}
    for role in ("search", "aggregation")[:1 if config.algo == "grpo" else 2]:
        groups = [group for r in records for group in (r["groups"][:1] if role == "search" else r["groups"][1:])]
        tokens, truncated = total([g.samples.mask for g in groups])[0], total([g.samples.truncated for g in groups])
        rates |= {f"{role}_length": (tokens, truncated[1]), f"{role}_truncated": truncated,
                  f"{role}_entropy": (-total([g.samples.logprobs for g in groups])[0], tokens)}                        # E[-log pi]
        counts["sampled_tokens"] += tokens
        counts["prefill_tokens"] += sum(len(g.prompt) for g in groups)
        if role == "aggregation":   # a prompt that was cut fills its room to within a token for each candidate
            rates["prompts_at_limit"] = (sum(len(g.prompt) > config.max_prompt_tokens - config.set_size for g in groups), len(groups))
    sums, totals = add_up(torch.tensor([*rates.values()], dtype=torch.float64)), add_up(torch.tensor([*counts.values()]))
    return {key: above / max(below, 1) for key, (above, below) in zip(rates, sums.tolist())} | dict(zip(counts, totals.tolist()))

def transcript(task, record):
    """One problem as a person reads it: traces, the best set, its aggregations, rewards and advantages."""
    block = lambda text: "\n".join("    " + line for line in text.strip().split("\n"))    # noqa: E731
    search_group, *set_groups = record["groups"]
    lines = ["problem", block(task.prompt(record["problem"]))]
    for j, (text, reward, advantage) in enumerate(zip(record["traces"][:8], record["trace_rewards"], search_group.advantages)):
        lines += [f"trace {j + 1}   {'right' if reward else 'wrong'}   advantage {advantage:+.3f}", block(text)]
    if set_groups:
        k = int((scores := record["rewards"].mean(-1)).argmax())
        lines.append(f"set of traces {', '.join(str(j + 1) for j in record['sets'][k].tolist())}   score {scores[k]:.2f}   "
                     f"(all sets: {', '.join(f'{score:.2f}' for score in scores)})")
        for m, (text, reward, advantage) in enumerate(zip(record["aggregations"][k], record["rewards"][k], set_groups[k].advantages)):
            lines += [f"aggregation {m + 1}   reward {reward:.0f}   advantage {advantage:+.3f}", block(text)]
    return "\n".join(lines) + "\n"

# ---- Evaluation -----------------------------------------------------------------------------------------------------
def pass_at_k(num_samples, num_correct, k):
    """Unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374). Raises ValueError when k > num_samples."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} can't be estimated from {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)

def majority_vote(answers):
    """The most frequent answer; of several, the one seen first. None (no answer) doesn't vote."""
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None

def recursive_self_aggregation(policy, task, problems, config, population=None, steps=1, generator=None):
    """RSA (arXiv 2509.26626): each member of the next population is one aggregation of `set_size` members drawn at random. population:
    [P] lists of texts to start from, else config.population fresh traces. Returns the texts of each step, [steps + 1][P][population]."""
    history = [population or search(policy, task, problems, config, config.population, generator)[2]]
    owners = [problem for problem, texts in zip(problems, history[0]) for _ in texts]
    for _ in range(steps):
        sets = [[texts[j] for j in torch.randperm(len(texts), generator=generator)[:config.set_size]] for texts in history[-1] for _ in texts]
        answers = iter(aggregate(policy, task, owners, sets, config, 1, generator)[2])                    # in lists of one
        history.append([[next(answers)[0] for _ in texts] for texts in history[-1]])
    return history

def solve(policy, task, problem, config, generator=None, show=print):
    """The pipeline as a tool: traces, `rsa_steps` of self-aggregation, a vote. Returns the answer or None; `show` gets a line after each."""
    texts = None
    for step in range(config.rsa_steps + 1):                 # step 0: fresh traces
        texts = recursive_self_aggregation(policy, task, [problem], config, texts, min(step, 1), generator)[-1]
        votes = collections.Counter(task.answer(text) or "no answer" for text in texts[0])
        show(f"{f'aggregation {step}' if step else 'search'}: " + ",  ".join(f"{count} x {answer}" for answer, count in votes.most_common()))
    return majority_vote(map(task.answer, texts[0]))

def evaluate(policy, task, problems, config, seed=0):
    """Held-out accuracy of each way to use the policy, all at config.temperature: (a flat dict of numbers, a record of each problem)."""
    generator, n, size = torch.Generator().manual_seed(seed), config.set_size, config.eval_traces
    _, samples, traces = search(policy, task, problems, config, size, generator)
    rewards = rewards_of(task, problems, traces)                                          # [P, S]
    scores = {f"pass@{k}": float(np.mean([pass_at_k(size, int(c), k) for c in rewards.sum(1)])) for k in (2 ** i for i in range(size.bit_length()))}
    votes = [[f"{tasks.ANSWER}{majority_vote(map(task.answer, texts))}"] for texts in traces]
    scores[f"majority@{size}"] = rewards_of(task, problems, votes).mean().item()
    owners, sets = zip(*((problem, texts[i:i + n]) for problem, texts in zip(problems, traces) for i in range(0, size, n)))        # [P * S/n] both
    _, answers, flat = aggregate(policy, task, owners, sets, config, 1, generator)
    right, hopeless = rewards_of(task, owners, flat)[:, 0], rewards.view(-1, n).sum(1) == 0          # [P * S/n]
    scores |= {f"aggregate@{n}": right.mean().item(), "hopeless sets": hopeless.float().mean().item(),
               "emergent": (right * hopeless).sum().item() / max(1, int(hopeless.sum()))}       # right from a set with no right trace
    history = recursive_self_aggregation(policy, task, problems, config, [texts[:config.population] for texts in traces], config.rsa_steps, generator)
    scores |= {f"rsa step {i}": rewards_of(task, problems, texts).mean().item() for i, texts in enumerate(history) if i}
    lengths = samples.mask.sum(-1).float()
    scores |= {"trace entropy": -samples.logprobs.sum().item() / lengths.sum().item(), "trace length": lengths.mean().item(),
               "trace truncated": samples.truncated.float().mean().item(), "aggregation length": answers.mask.sum().item() / len(flat)}
    texts, right, per = [text for (text,) in flat], right.tolist(), size // n
    return scores, [{"prompt": task.prompt(problem), "traces": traces[p], "trace_rewards": rewards[p].tolist(),
                     "aggregations": texts[p * per:(p + 1) * per], "rewards": right[p * per:(p + 1) * per]} for p, problem in enumerate(problems)]

# ---- Checkpoints: folders in Hugging Face format. A step's randomness is a function of (seed, step): no random states to keep. ----
def save_checkpoint(folder, state, policy, optimizer):
    """Written aside, flushed, renamed: a crash at any instant leaves the last whole checkpoint. `state` is JSON. All processes call, one writes."""
    adam = {f"{i}.{name}": value for i, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}
    adam |= {f"{i}.master": p.detach() for i, p in enumerate(optimizer.param_groups[0]["params"]) if policy.model.dtype != torch.float32}
    weights, adam = ({name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous() for name, value in tensors.items()}
                     for tensors in (policy.model.state_dict(), adam))
    if world()[0]:
        return
    aside = folder.with_name("unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside, state_dict=weights)
    if isinstance(policy.tokenizer, HubTokenizer):          # the tiny one is named in config.json
        policy.tokenizer.hf.save_pretrained(aside)
    safetensors.torch.save_file(adam, aside / "optimizer.safetensors")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(aside.iterdir())}
    (aside / "state.json").write_text(json.dumps({**state, "sha256": sums}))
    for path in (*aside.iterdir(), aside, folder.parent):    # the last one holds the new name
        if path == folder.parent:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

def checkpoints(out):
    """Folders of the run's checkpoints, the newest first."""
    return sorted(Path(out).glob("step-*"), key=lambda path: int(path.name[5:]) if path.name[5:].isdigit() else -1, reverse=True)

def newest_checkpoint(out):
    """(folder, state) of the newest checkpoint that is whole, or (None, None). Names those that are not."""
    for folder in checkpoints(out):
        try:
            state = json.loads((folder / "state.json").read_text())
            torn = [name for name, sha in state["sha256"].items() if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha]
        except (OSError, ValueError, KeyError, TypeError) as error:
            torn = [f"state.json ({type(error).__name__})"]
        if not torn:
            return folder, state
        print(f"{folder} is damaged ({', '.join(torn)}): going on with the one before", flush=True)
    return None, None

def load_optimizer(optimizer, folder):
    for name, value in safetensors.torch.load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".")
        master = optimizer.param_groups[0]["params"][int(index)]
        if isinstance(master, DTensor) and value.ndim:
            value = distribute_tensor(value.to(master.device), master.device_mesh, master.placements)
        if key == "master":
            master.data.copy_(value)
        else:
            optimizer.state[master][key] = value.to(master.device) if value.ndim else value      # AdamW's count of steps stays on the CPU

# ---- Training -------------------------------------------------------------------------------------------------------
def diagnosis(stats, config, dtype=torch.float32):
    """Plain lines about what people otherwise puzzle over."""
    final, limit = ("search", "--max-trace-tokens") if config.algo == "grpo" else ("aggregation", "--max-aggregation-tokens")
    useful, entropy, difference = stats["useful_problems"], stats["search_entropy"], stats["logprob_difference"]
    truncated, cut, without = stats[f"{final}_truncated"], stats.get("prompts_at_limit", 0), stats["no_answer"]
    return [line for seen, line in (
        (not useful, f"no problem has an advantage: nothing to learn from ({stats['all_right']:.0%} of the problems have every answer right, "
                     f"{stats['all_wrong']:.0%} every answer wrong). Make the task easier or harder, or draw more"),
        (0 < useful < config.problems and config.max_draws > 1,
         f"only {useful} of {config.problems} problems have an advantage after {stats['drawn_problems']} draws (--max-draws)"),
        (truncated > 0.5, f"{truncated:.0%} of the {final} traces hit the token limit: raise {limit}"),
        (cut > 0.1, f"{cut:.0%} of the aggregation prompts are at --max-prompt-tokens: candidates lose their beginnings"),
        (without > 0.9, f"{without:.0%} of the final texts hold no answer in the task's format: does the policy know the format?"),
        (entropy < 0.02, f"entropy of the search traces is {entropy:.3f} nats a token: the traces of a problem are nearly the same (collapse)"),
        (difference > (1e-4 if dtype == torch.float32 else 0.01),
         f"sampler and trainer disagree by {difference:.1e} nats a token: the gradient is off-policy"),
        (stats["skipped"], "loss or gradient is not finite: step skipped, weights unchanged")) if seen]

def train(task, config, out):
    """The run, from the beginning or from the newest checkpoint in `out`: rollout and update, then the evaluation. Returns the exit code."""
    (rank, processes), interrupted = world(), []
    problems = task.problems("train", config.train_problems, config.seed)
    check_fit(config, task, problems + (task.problems(config.eval_split, config.eval_problems, 0) if config.eval_problems else []))
    folder, state = newest_checkpoint(out)
    if folder:
        changed = [f.name for f in fields(Config) if state["config"].get(f.name) != getattr(config, f.name)]
        if fatal := {"algo", "task", "data", "model", "seed", "train_problems", "lora_rank", "dtype"} & set(changed):
            raise ValueError(f"{out} holds a run with another {', '.join(sorted(fatal))}: choose another --out")
        print(f"resuming {folder}" + (f", with changed: {', '.join(changed)}" if changed else ""), flush=True)
    policy = load_policy(replace(config, model=str(folder)) if folder else config)
    optimizer = make_optimizer(policy.model, config)
    if folder:
        load_optimizer(optimizer, folder)
    state, metrics = state or {"step": 0, "cursor": 0, "bad": 0, "recent": [], "best": [0, -1.0]}, out / "metrics.jsonl"
    if rank == 0:                                            # rows behind the checkpoint come again
        out.mkdir(parents=True, exist_ok=True)
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        (out / "metrics.unfinished").write_text("".join(row + "\n" for row in rows if row.endswith("}") and json.loads(row)["step"] <= state["step"]))
        os.replace(out / "metrics.unfinished", metrics)
    start_model = load_policy(config).model if config.kl else None
    sizes = [sum(p.numel() for p in parameters) / 1e6 for parameters in (policy.model.parameters(), trained(policy.model))]
    print(f"{config.algo} on {config.task}: {sizes[1]:.1f}M of {sizes[0]:.1f}M parameters trained on {policy.device}"
          f"{f' and {processes - 1} more' if processes > 1 else ''}; everything goes to {out}/", flush=True)
    def interrupt(number, frame):
        interrupted.append(number) if not interrupted else os._exit(128 + number)
        print("finishing this step, then saving; once more stops at once", flush=True)
    handlers, stop = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}, False
    while state["step"] < config.steps and state["bad"] < 5 and not stop:
        began, step = time.time(), state["step"] + 1
        records, useful, found, cursor = collect(policy, task, problems, state["cursor"], config)
        sampled = time.time()
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
        groups = [group for record in useful for group in record["groups"]]
        results = [update(policy, optimizer, groups, max(1, found), config, start_model) for _ in range(config.updates)]
        stats = {"step": step, **statistics(task, records, useful, config), **results[0], "skipped": sum(r["skipped"] for r in results)}
        stop = bool(add_up(torch.tensor(len(interrupted))))
        bad = state["bad"] + 1 if stats["skipped"] else 0                     # steps in a row
        state |= {"step": step, "cursor": cursor, "bad": bad, "recent": state["recent"] + [stats["answer_reward"]]}
        if rank == 0:
            with metrics.open("a") as file:
                file.write(json.dumps(stats) + "\n")
        print(f"step {step:3d}/{config.steps}  answer {stats['answer_reward']:.3f}  trace {stats['trace_reward']:.3f}  "
              f"gradient {stats['grad_norm']:.2f}  entropy {stats['search_entropy']:.2f}  useful {found}/{stats['drawn_problems']}  "
              f"{sampled - began:.1f}+{time.time() - sampled:.1f}s", *diagnosis(stats, config, policy.model.dtype), sep="\n  note: ", flush=True)
        if records and config.transcript_every and (step == 1 or step % config.transcript_every == 0):
            print(f"--- step {step} " + "-" * 60 + "\n" + transcript(task, (useful or records)[0]), flush=True)
        if bad < 5 and (step % config.save_every == 0 or step == config.steps or stop):
            score = sum(state["recent"]) / len(state["recent"])                # reward of the final answers since the last save
            state |= {"recent": [], "best": max(state["best"], [step, score], key=lambda best: best[1])}
            save_checkpoint(out / f"step-{step}", {**state, "config": asdict(config)}, policy, optimizer)
            for old in {*checkpoints(out)[2:]} - {out / f"step-{state['best'][0]}"} if rank == 0 else ():
                shutil.rmtree(old)
    list(map(signal.signal, handlers, handlers.values()))
    if state["bad"] == 5:
        print("five steps in a row were not finite: stopping. Lower --lr, or go back to the last checkpoint", flush=True)
        return 1
    if stop:
        print(f"saved after step {state['step']}; the same command goes on from there", flush=True)
        return 128 + (interrupted or [signal.SIGTERM])[0]
    return report(policy, task, config, out) if config.eval_problems and (rank == 0 or config.shard) else 0

def report(policy, task, config, out):
    """The table, on problems never trained on; also to evaluation.jsonl, all texts to records-*.jsonl. steps 0: of this policy alone. Returns 0."""
    held_out, columns = task.problems(config.eval_split, config.eval_problems, 0), {}
    out.mkdir(parents=True, exist_ok=True)
    for name in ("before", "after") if config.steps else (config.model,):
        print(f"evaluating on {len(held_out)} {config.eval_split} problems: {name} ...", flush=True)
        mine = load_policy(config) if name == "before" else policy
        columns[name], records = evaluate(mine, task, held_out, config)
        keep_step(mine.model)
        if world()[0]:
            continue
        with (out / "evaluation.jsonl").open("a") as file:
            file.write(json.dumps({"policy": name, "step": config.steps * (name == "after"), "split": config.eval_split, **columns[name]}) + "\n")
        (out / f"records-{Path(name).name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"\n{'held-out ' + config.eval_split:<18}" + (f"{'before':>10}{'after':>10}{'change':>10}" if config.steps else ""))
    for key, *values in zip(columns[name], *(column.values() for column in columns.values())):
        print(f"{key:<18}" + "".join(f"{value:10.3f}" for value in values) + (f"{values[1] - values[0]:+10.3f}" if config.steps else ""))
    return 0

# ---- Command line ---------------------------------------------------------------------------------------------------
PRESETS = {"paper": dict(       # the last line is ours, as the paper doesn't disclose it; temperature 1 and no KL are the defaults
    num_traces=8, set_size=4, num_sets=4, num_aggregations=4, max_trace_tokens=4096, max_aggregation_tokens=4096, lr=2e-5, lora_rank=32, problems=256,
    dtype="bf16", max_prompt_tokens=17920, max_draws=4, gradient_checkpointing=True, steps=100, eval_problems=50)}
PRESETS["80gb"] = PRESETS["paper"] | dict(problems=64)                      # Qwen3-4B
PRESETS["24gb"] = PRESETS["80gb"] | dict(problems=32, max_trace_tokens=1024, max_aggregation_tokens=1024, max_prompt_tokens=5120)      # Qwen3-4B

def parse_config(arguments=None):
    parser = argparse.ArgumentParser(prog="spiral.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: (print(f"spiral.py: {message}", file=sys.stderr), sys.exit(2))
    parser.add_argument("--preset", choices=PRESETS, help="other defaults: the paper's settings, or what fits a GPU (see --dry-run)")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if type(f.default) is bool else {"type": type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"].replace("%", "%%"), **kind)
    parser.set_defaults(**PRESETS.get(parser.parse_known_args(arguments)[0].preset, {}))
    return Config(**{name: value for name, value in vars(parser.parse_args(arguments)).items() if name != "preset"})

def main(arguments=None):
    transformers.logging.disable_progress_bar()
    config = parse_config(arguments)
    try:
        config.check()
        if "RANK" in os.environ and not dist.is_initialized():           # started by torchrun
            dist.init_process_group()
        sys.stdout = open(os.devnull, "w") if world()[0] else sys.stdout           # one process speaks for all
        if config.dry_run:
            sys.path.insert(0, str(TINY.parent))
            import plan
            return plan.show(config)
        task = tasks.make_task(config.task, config.data)
        out = Path(config.out or f"runs/{config.algo if config.steps else 'evaluation'}-{config.task.partition(':')[0]}-{config.seed}")
        if config.ask:
            print(f"answer: {solve(load_policy(config), task, task.question(config.ask), config, torch.Generator().manual_seed(config.seed))}")
            return 0
        return train(task, config, out) if config.steps else report(load_policy(config), task, config, out)
    except torch.OutOfMemoryError:
        print("spiral.py: out of memory: lower --problems, the token limits or --micro-batch-tokens; the last checkpoint is whole", file=sys.stderr)
    except (ValueError, OSError, safetensors.SafetensorError) as error:      # a full disk among them
        print(f"spiral.py: {str(error).splitlines()[0]}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    code = main()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code) if "RANK" in os.environ else sys.exit(code)           # a process of torchrun: threads of its libraries can abort a slow end
