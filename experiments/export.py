"""One plain Hugging Face folder of a checkpoint, adapters merged: weights, tokenizer, and what
`generate` and vLLM need to know of where a completion ends.

    python experiments/export.py runs/spiral-countdown-0/step-00100 exported
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

import spiral  # noqa: E402


def export(checkpoint, folder):
    """bf16 weights stay bf16: adapters are merged in fp32, and the sum is rounded once."""
    config = spiral.Config(model=str(checkpoint), dtype=stored_dtype(checkpoint))
    config.sampler_memory = 1e-6  # nothing is sampled here
    policy = spiral.load_policy(config)
    model = policy.model.cpu()
    if getattr(model, "peft_config", None):
        model = merge(model)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(policy.tokenizer.eos_ids - {None}),
        pad_token_id=policy.tokenizer.hf.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.save_pretrained(folder)
    policy.tokenizer.hf.save_pretrained(folder)
    return policy


def stored_dtype(checkpoint):
    """What the weights on disk are: a run's own option says it, else the folder's config."""
    state = Path(checkpoint, "state.json")
    if state.exists():
        return json.loads(state.read_text("utf-8"))["run"]["dtype"]
    settings = Path(checkpoint, "config.json")
    kind = json.loads(settings.read_text("utf-8")).get("dtype") if settings.exists() else None
    return kind if kind in ("float32", "bfloat16") else "bfloat16"


def merge(model):
    """The base model with the adapters' products added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = model.dtype
    model.float()
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    with torch.device("meta"):  # a model that never had adapters: this one would save them
        plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    plain.load_state_dict(model.to(dtype).state_dict(), assign=True)
    plain.tie_weights()
    return plain


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with torch.no_grad():
        export(sys.argv[1], sys.argv[2])
    print(f"{sys.argv[2]} is a Hugging Face folder")


if __name__ == "__main__":
    main()
