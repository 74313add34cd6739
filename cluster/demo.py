"""Where the checkpoint lies that comes with the code: the default model of every command."""

from pathlib import Path

DEMO = Path(__file__).parent.parent / "model" / "demo"
