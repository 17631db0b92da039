"""Write a checkpoint as one plain model folder in Hugging Face format, LoRA adapters merged into the weights.

    python experiments/export.py runs/spiral-math-0/step-60 exported
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spiral  # noqa: E402


def export(folder, target):
    _, _, tokenizer = spiral.load_tokenizer(spiral.Config(model=str(folder)))
    adapters, load = Path(folder) / "adapter_config.json", {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else folder
    model = AutoModelForCausalLM.from_pretrained(base, **load)
    if adapters.exists():
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    model.save_pretrained(target)
    if isinstance(tokenizer, spiral.HubTokenizer):
        tokenizer.hf.save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    export(*sys.argv[1:])
    print(f"{sys.argv[2]}: ready for from_pretrained")
