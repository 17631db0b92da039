"""Tests of what is meant for a GPU, without one: emulated devices, capture, the script for a card
in miniature, export and logging."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "gpu_paper")]
import capture  # noqa: E402
import export  # noqa: E402
import fused  # noqa: E402
import gpu  # noqa: E402
import log_wandb  # noqa: E402

import spiral  # noqa: E402


@pytest.mark.skipif(not shutil.which("g++"), reason="the emulation of a device needs g++")
def test_no_tensor_is_on_the_wrong_device():
    """Sampling, graphs and an update on fake CUDA tensors; bf16 with fused attention alone."""
    command = [sys.executable, HERE / "gpu_paper" / "devices.py", "--short"]
    subprocess.run(command, check=True, timeout=300)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_step_freezes_nothing(checkpointing):
    calls = [{"prompts": capture.PROMPTS, "num_samples": 2}] * 2
    graphs, replays, _, error = capture.compare(torch.float32, checkpointing, calls)
    assert 0 < graphs < replays / 3 and error < 3e-6


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_fused_modules_compute_the_same(kind):
    from peft import LoraConfig

    def forward_and_gradients(model):
        logits = model(torch.arange(12).view(2, 6)).logits
        logits.square().mean().backward()
        return [logits, *[p.grad for p in model.parameters() if p.requires_grad]]

    results = []
    for fuse in (lambda model: None, fused.fuse):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.AutoModelForCausalLM.from_config(settings).eval()
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        fuse(model)
        results.append(forward_and_gradients(model))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_exported_folder_generates_the_same_tokens(rank, tmp_path):
    policy = spiral.load_policy(spiral.Config(lora_rank=rank))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    policy.model.save_pretrained(tmp_path / "checkpoint")
    policy.tokenizer.hf.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "state.json").write_text('{"run": {"dtype": "float32"}}')
    export.export(tmp_path / "checkpoint", tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(model.generation_config.eos_token_id) == policy.tokenizer.eos_ids
    for numbers in ("4 9 13", "2 5 7"):
        prompt = policy.tokenizer.chat(f"{numbers} = 61")
        assert prompt == tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{numbers} = 61"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        (ours,) = spiral.sample(policy, [prompt], 24, temperature=0)[0]
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert whole[0, len(prompt) :].tolist() == ours.tokens


def test_logged_rows_come_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "a": {"b": i}}) + "\n" for i in (1, 2)))
    found = [log_wandb.flat(row) for row in log_wandb.rows(path, lambda: False)]
    assert found == [{"step": 1, "a/b": 1}, {"step": 2, "a/b": 2}]


def test_the_script_for_a_card_in_miniature(tmp_path):
    result = gpu.run_all(tmp_path, miniature=True)
    failed = {name: part for name, part in result["parts"].items() if "error" in part}
    assert not failed
    assert json.loads((tmp_path / "gpu_miniature.json").read_text())["parts"] == result["parts"]
