"""What comes with the code: the default model of every command, and the official configuration."""

from pathlib import Path

_MODELS = Path(__file__).parent.parent / "model"
DEMO = _MODELS / "demo"
OFFICIAL_671B = _MODELS / "deepseek_v32"  # config.json of DeepSeek-V3.2-Exp, to measure with random weights
