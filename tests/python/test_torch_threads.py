"""Packed layers in torch run on torch's threads and past its dispatcher where nobody watches: the same results, and torch sees the operator where it has to."""

import concurrent.futures
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from arrow_quant_v2 import _core  # noqa: E402
from arrow_quant_v2.torch import QuantLinear, StoredForm, ops, threads  # noqa: E402


@pytest.fixture
def lent():
    if not threads.lend():
        pytest.skip("this torch has no OpenMP to share")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    threads.lend()


def make(bits=4, size=1024, bias=True):
    torch.manual_seed(bits)
    return QuantLinear.from_linear(torch.nn.Linear(size, size, bias=bias), StoredForm(bits, 128, "f16"), "rtn")


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8, 49, 200])
def test_lent_and_started_threads_give_the_same_bits(lent, rows):
    layer, x = make(), torch.randn(rows, 1024)
    torch.set_num_threads(1)
    expected = layer(x)
    for n in (2, 3, 1, 4, 2):  # teams that grow and shrink
        torch.set_num_threads(n)
        threads.lend()
        assert torch.equal(layer(x), expected)
        _core._lend_team(0, 0, 0)
        assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_python_threads_may_call_at_once(lent):
    layer, x = make(), [torch.randn(1 + 16 * i, 1024) for i in range(6)]
    expected = [layer(one) for one in x]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(layer, x), expected))


def test_FA17_a_child_computes_after_its_parent_used_torchs_threads():
    code = """
import os, torch, arrow_quant_v2 as aq
from arrow_quant_v2.torch import QuantLinear, StoredForm
torch.set_num_threads(2)
layer, x = QuantLinear.from_linear(torch.nn.Linear(1024, 1024), StoredForm(4, 128, "f16"), "rtn"), torch.randn(64, 1024)
with torch.no_grad():
    expected = layer(x), layer(x[:1])
    child = os.fork()
    if child == 0:
        same = [bytes(a.numpy()) == bytes(b.numpy()) for a, b in ((layer(x), expected[0]), (layer(x[:1]), expected[1]))]  # torch.equal itself would hang
        os._exit(0 if all(same) else 1)
    assert torch.equal(layer(x), expected[0])
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert run.stdout == "0\n", run.stderr


class Layers(torch.utils.data.Dataset):
    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, i):
        return self.layer(self.x)


@torch.no_grad()
def test_FA17_workers_of_a_data_loader_compute(lent):
    layer, x = make(), torch.randn(64, 1024)
    torch.set_num_threads(2)
    expected = layer(x)
    loader = torch.utils.data.DataLoader(Layers(layer, x), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(y, expected) for y in loader)


def test_a_torch_without_openmp_keeps_started_threads(monkeypatch):
    monkeypatch.setattr(threads, "_symbols", lambda: None)
    assert threads.lend() is False


# ---- past the dispatcher ----


def now(layer, x):
    return ops.linear_now(x, layer.qweight, layer.qparams, layer.bias, layer.form)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1024,), (1, 1024), (2, 3, 1024)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_short_way_gives_what_the_operator_gives(shape, bias):
    layer, x = make(bias=bias), torch.randn(shape)
    expected = ops.linear(x, layer.qweight, layer.qparams, layer.bias, 4, 128, "f16")
    assert torch.equal(now(layer, x), expected) and torch.equal(layer(x), expected)


def test_torch_sees_the_operator_where_it_has_to():
    layer, x = make(), torch.randn(2, 1024)
    assert now(layer, x) is None  # the bias wants a gradient
    with torch.no_grad():
        assert now(layer, x) is not None
        for other in (x.half(), x.double(), x.to("meta"), torch.randn(1024, 2).T, torch.empty(0, 1024), torch._neg_view(x)):
            assert now(layer, other) is None
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))
        with torch.profiler.profile() as profile:
            layer(x)
        assert any(event.key == "arrowquant::linear" for event in profile.key_averages())
    layer.requires_grad_(False)
    assert now(layer, x) is not None and now(layer, x.clone().requires_grad_()) is None


@torch.no_grad()
def test_transformations_and_modes_see_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, x, seen = make(), torch.randn(3, 1024), []
    with Recording():
        recorded = layer(x)
    assert "arrowquant.linear.default" in seen and torch.equal(recorded, layer(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, 1024)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(x * 2), layer(x * 2)) and "arrowquant::linear" in str(traced.inlined_graph)
    with torch.autograd.forward_ad.dual_level():
        assert now(layer, x) is None


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match="the input has 1023 features, the layer 1024"):
        make()(torch.randn(2, 1023))
    layer = make()
    with pytest.raises(ValueError, match="codes and parameters must be"), torch.no_grad():
        now(layer, torch.randn(2, 512))
