"""Keeps the weights of vLLM's CPU layers as they were loaded, so that a trainer can write new ones into them.

On a CPU vLLM packs weights for oneDNN after loading and drops the parameters: the first update of a colocated engine
fails, and a reload of tied embeddings serves wrong weights. This costs speed, and is for tests only.
"""


def register() -> None:
    """Called by vLLM in each of its processes, where `VLLM_PLUGINS` names `cpu_unpacked`."""
    import vllm._custom_ops as ops

    ops._supports_onednn = False
