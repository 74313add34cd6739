"""What a kernel is called in Triton's disk cache must not depend on what ran before it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

CODE = """
import importlib, json, pathlib, random, sys
from triton.runtime import JITFunction
files = sorted(pathlib.Path("kernels").glob("*.py"))
modules = [importlib.import_module(f"kernels.{file.stem}") for file in files]
found = {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if isinstance(f, JITFunction)}
names = sorted(found)
random.Random(int(sys.argv[1])).shuffle(names)
for name in names:
    found[name].cache_key
print(json.dumps({name: found[name].cache_key for name in sorted(found)}))
"""


def keys(seed: int) -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_names_are_the_same_in_any_order() -> None:
    one, other = keys(1), keys(2)
    assert len(one) > 50
    assert [name for name in one if one[name] != other[name]] == []
