"""Import order must not matter, and `import rarefy` must stay light. Each case runs in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")
REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'rarefy' in m"


def run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_importing_rarefy_imports_neither_torch_nor_transformers() -> None:
    run(
        "import sys; before = set(sys.modules); import rarefy\n"
        "heavy = {n.split('.')[0] for n in set(sys.modules) - before} & {'torch', 'transformers', 'scipy', 'numpy'}\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.quantizers; import rarefy",
        "from transformers import AutoModel; import rarefy",
        "import rarefy; from transformers import PreTrainedModel, AutoModelForCausalLM",
        "import torch; import rarefy.nn.transformers_quantizer; import rarefy",
        "import rarefy, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_every_import_order_registers(imports: str) -> None:
    run(f"{imports}\n{REGISTERED}")


def test_the_hook_leaves_no_trace() -> None:
    run(
        "import rarefy, sys, transformers.quantizers.auto as auto\n"
        "wrappers = [*sys.meta_path, auto.__loader__, auto.__spec__.loader]\n"
        "assert not any(type(wrapper).__module__ == 'rarefy._transformers_hook' for wrapper in wrappers)\n"
        "import inspect; assert 'def register_quantizer' in inspect.getsource(auto)\n"
        "import importlib; importlib.reload(rarefy); importlib.reload(rarefy.nn.transformers_quantizer)"
    )


def test_transformers_still_imports_when_registration_fails() -> None:
    run(
        "import rarefy, sys, warnings\n"
        "sys.modules['rarefy.nn.transformers_quantizer'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import transformers.quantizers.auto\n"
        "assert any('could not register' in str(w.message) for w in caught)"
    )
