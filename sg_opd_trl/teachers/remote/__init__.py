"""Models behind vLLM's OpenAI-compatible HTTP API. The standard library alone: no torch, no HTTP package."""

from .asking import RequestLimits
from .client import CompletionsClient
from .settings import API_KEY_VARIABLE, read_servers

__all__ = ["API_KEY_VARIABLE", "CompletionsClient", "RequestLimits", "read_servers"]
