"""Operators are looked at without torch's compiler."""

import subprocess
import sys

SCRIPT = """
import sys, torch, spectrim as st
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
x = torch.randn(64, 8)
small = st.compress(model, st.Budget(macs=0.8), example_inputs=x[:1], data=[x])
st.measure(small.model, x[:1], rounds=5)
print("torch._dynamo" in sys.modules)
"""


def test_compressing_does_not_import_the_compiler() -> None:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
