"""Convolutions on torch's threads: the same bits, and children of fork() that have none of them."""

import os
import subprocess
import sys

import pytest

from rarefy.kernels import extension_status

PROGRAM = """
import copy, os, numpy as np, torch
from torch import nn
from rarefy.core.solution import Solution
from rarefy.kernels import set_num_threads
from rarefy.layouts import pack
from rarefy.nn import replace_linear
from rarefy.nn.team import share_threads

has_team = "OpenMP" in torch.__config__.parallel_info()
assert share_threads() == (has_team and os.environ["OMP_WAIT_POLICY"] == "ACTIVE")
model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32))
layouts = {
    "0": pack(Solution.dense(np.random.default_rng(0).standard_normal((32, 144), np.float32))),
    "1": pack(Solution.dense(np.random.default_rng(1).standard_normal((32, 9), np.float32))),
}
replace_linear(model, layouts)
x = torch.randn(2, 16, 40, 40)

def run(ours, torchs):
    set_num_threads(ours)
    torch.set_num_threads(torchs)
    with torch.no_grad():
        return model(x)

expected = run(1, 1)
for counts in ((2, 2), (3, 3), (3, 2), (2, 3), (1, 2), (2, 2)):
    assert torch.equal(run(*counts), expected), counts
child = os.fork()
if child == 0:
    # Without an operation of torch's own: those hang here.
    with torch.no_grad():
        same = np.array_equal(model(x).numpy(), expected.numpy())
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(2, 2), expected)
print("same")
"""


@pytest.mark.parametrize("policy", ["ACTIVE", "PASSIVE"])
@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_the_same_bits_on_threads_of_torch_and_in_a_child(policy: str) -> None:
    if not extension_status()[0]:
        pytest.skip("the extension is not built")
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr
