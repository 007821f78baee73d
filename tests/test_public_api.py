import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rarefy

ROOT = Path(__file__).resolve().parents[1]


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rarefy.__version__ == project["version"]


@pytest.mark.parametrize("name", rarefy.__all__)
def test_every_public_name_loads(name):
    assert getattr(rarefy, name) is not None
    assert name in dir(rarefy)


def test_the_table_of_modules_is_complete():
    assert {*rarefy._PUBLIC, "__version__"} == set(rarefy.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rarefy.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from rarefy import nothing  # noqa: F401


def test_import_does_not_import_torch():
    code = "import sys, rarefy; print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["core.results", "layouts", "artifact", "testing"])
def test_the_runtime_does_not_need_torch(module):
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pydantic', 'yaml', 'scipy'): sys.modules[name] = None\n"
        f"import rarefy.{module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
